package interop

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// short lives make renewals come within the test. The agent rotates at half life, and looks every five seconds.
const short = "ttl: {agent: 30s, x509: 30s, jwt: 20s}\n"

// TestAgentByJoinToken lets an unmodified SPIRE agent in by a token of each command line and serves workloads through it.
func TestAgentByJoinToken(t *testing.T) {
	foreign(t, envServer)
	for _, tt := range []struct {
		name  string
		token func(context.Context, *server) (token, agentID string)
	}{
		{"token of signet", func(ctx context.Context, ca *server) (string, string) {
			var v struct {
				Token   string `json:"token"`
				AgentID string `json:"agent_id"`
			}
			if err := json.Unmarshal([]byte(must[string](ca.t)(ca.signet(ctx, "token", "create", "-o", "json"))), &v); err != nil {
				ca.t.Fatal(err)
			}
			return v.Token, v.AgentID
		}},
		{"token of spire-server", func(ctx context.Context, ca *server) (string, string) { return ca.joinToken(ctx, "") }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx := bounded(t, 2*time.Minute)
			ca := startCA(t, ctx, "")
			token, agentID := tt.token(ctx, ca)
			a := newSPIREAgent(t, agentConfig{server: ca, token: token, bundle: ca.bundleFile(ctx)})
			a.start()
			ca.entry(ctx, "/web", agentID) // the whole token as last segment, as scripts write it: it must hold all the same
			a.serves(ctx, "/web")
			servesAll(t, ctx, a, "/web")
			if out, err := ca.spire(ctx, "agent", "list"); err != nil || !strings.Contains(out, "join_token") {
				t.Errorf("agent list: %v\n%s", err, out)
			}
			if strings.Contains(ca.out.String(), token) {
				t.Error("the CA logged the join token")
			}
		})
	}
}

// servesAll does what a workload does with SPIRE's own client: X.509, JWT, and its verification.
func servesAll(t *testing.T, ctx context.Context, a *agent, id string) {
	t.Helper()
	id = full(id)
	out, err := a.api(ctx, "fetch", "x509", "-write", t.TempDir())
	if err != nil || !strings.Contains(out, id) {
		t.Errorf("fetch x509: %v\n%s", err, out)
	}
	out, err = a.api(ctx, "fetch", "jwt", "-audience", "reports", "-spiffeID", id, "-output", "json")
	if err != nil {
		t.Errorf("fetch jwt: %v", err)
		return
	}
	var answers []struct {
		Svids []struct {
			SpiffeID string `json:"spiffe_id"`
			Svid     string `json:"svid"`
		} `json:"svids"`
	}
	if err := json.Unmarshal([]byte(out), &answers); err != nil || len(answers) == 0 || len(answers[0].Svids) != 1 || answers[0].Svids[0].SpiffeID != id {
		t.Errorf("fetch jwt: %v\n%s", err, out)
		return
	}
	jwt := answers[0].Svids[0].Svid
	if out, err := a.api(ctx, "validate", "jwt", "-audience", "reports", "-svid", jwt); err != nil || !strings.Contains(out, "SVID is valid") {
		t.Errorf("validate jwt: %v\n%s", err, out)
	}
	if out, err := a.api(ctx, "validate", "jwt", "-audience", "others", "-svid", jwt); err == nil {
		t.Errorf("a JWT-SVID for another audience is valid:\n%s", out)
	}
}

// joined is a SPIRE agent under signet's CA, with the alias /node.
func joined(t *testing.T, ctx context.Context, extra string) (*server, *agent, string) {
	t.Helper()
	foreign(t, envServer)
	ca := startCA(t, ctx, extra)
	token, agentID := ca.joinToken(ctx, "/node")
	a := newSPIREAgent(t, agentConfig{server: ca, token: token, bundle: ca.bundleFile(ctx)})
	a.start()
	ca.entry(ctx, "/web", "/node")
	a.serves(ctx, "/web")
	return ca, a, agentID
}

// TestAgentEntries changes entries under a running SPIRE agent: one is created, changed, and deleted; and there are more
// than go into one page.
func TestAgentEntries(t *testing.T) {
	ctx := bounded(t, 3*time.Minute)
	ca, a, _ := joined(t, ctx, "")
	src := newWorkload(t, ctx, a, "/web").x509

	second := ca.entry(ctx, "/second", "/node")
	a.serves(ctx, "/web", "/second")
	web := entryID(t, ctx, ca, "/web")
	if _, err := ca.spire(ctx, "entry", "update", "-entryID", web, "-spiffeID", full("/web"), "-parentID", full("/node"), "-selector", self(), "-dns", "web.internal"); err != nil {
		t.Fatal(err)
	}
	if err := eventually(ctx, func() error {
		svid, err := src.GetX509SVID()
		if err == nil && !slices.Contains(svid.Certificates[0].DNSNames, "web.internal") {
			err = fmt.Errorf("the SVID has DNS names %q", svid.Certificates[0].DNSNames)
		}
		return err
	}); err != nil {
		t.Errorf("a changed entry did not arrive: %v", err)
	}
	if _, err := ca.spire(ctx, "entry", "delete", "-entryID", second); err != nil {
		t.Fatal(err)
	}
	a.withholds(ctx, "/second")

	// 700 entries more: two pages of revisions, and their entries in two.
	const many = 700
	create := &entryv1.BatchCreateEntryRequest{}
	for i := range many {
		create.Entries = append(create.Entries, &types.Entry{SpiffeId: &types.SPIFFEID{TrustDomain: trustDomain, Path: fmt.Sprintf("/many/%d", i)},
			ParentId: &types.SPIFFEID{TrustDomain: trustDomain, Path: "/node"}, Selectors: []*types.Selector{{Type: "unix", Value: strings.TrimPrefix(self(), "unix:")}}})
		if len(create.Entries) == 100 {
			answer := must[*entryv1.BatchCreateEntryResponse](t)(entryv1.NewEntryClient(ca.conn).BatchCreateEntry(ctx, create))
			for _, r := range answer.Results {
				if r.Status.Code != 0 {
					t.Fatalf("creating entries: %v", r.Status)
				}
			}
			create = &entryv1.BatchCreateEntryRequest{}
		}
	}
	if err := eventually(ctx, func() error {
		ids, err := a.ids(ctx)
		if err == nil && len(ids) != many+1 {
			err = fmt.Errorf("%d SVIDs, want %d", len(ids), many+1)
		}
		return err
	}); err != nil {
		t.Errorf("more than a page of entries: %v", err)
	}
	// One of them changes: what is on the other pages stays.
	if _, err := ca.spire(ctx, "entry", "delete", "-entryID", entryID(t, ctx, ca, "/many/650")); err != nil {
		t.Fatal(err)
	}
	a.withholds(ctx, "/many/650")
	if ids, err := a.ids(ctx); err != nil || len(ids) != many {
		t.Errorf("after one was deleted: %d SVIDs, %v; want %d", len(ids), err, many)
	}
}

func entryID(t *testing.T, ctx context.Context, s *server, id string) string {
	t.Helper()
	v := s.spireJSON(t, ctx, "entry", "show", "-spiffeID", full(id))
	list, _ := v["entries"].([]any)
	if len(list) != 1 {
		t.Fatalf("entry show -spiffeID %s: %v", id, v)
	}
	return list[0].(map[string]any)["id"].(string)
}

// TestAgentRenews waits for the agent's own SVID and its workload's to be renewed, and kills the CA meanwhile.
func TestAgentRenewsAndSurvivesTheCA(t *testing.T) {
	ctx := bounded(t, 3*time.Minute)
	ca, a, agentID := joined(t, ctx, short)
	src := newWorkload(t, ctx, a, "/web").x509
	first := must[x509SVID](t)(src.GetX509SVID())
	serial := agentSerial(t, ctx, ca, agentID)
	if err := eventually(ctx, func() error {
		svid, err := src.GetX509SVID()
		if err == nil && svid.Certificates[0].SerialNumber.Cmp(first.Certificates[0].SerialNumber) == 0 {
			err = errors.New("the workload's SVID was not renewed")
		}
		if err == nil && agentSerial(t, ctx, ca, agentID) == serial {
			err = errors.New("the agent's SVID was not renewed")
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}

	ca.kill()
	if ids, err := a.ids(ctx); err != nil || !slices.Contains(ids, "/web") {
		t.Errorf("with the CA dead the agent serves %v, %v", ids, err)
	}
	ca.up(ctx)
	ca.entry(ctx, "/later", "/node")
	a.serves(ctx, "/web", "/later")
	servesAll(t, ctx, a, "/later")
	if svid, err := src.GetX509SVID(); err != nil || time.Now().After(svid.Certificates[0].NotAfter) {
		t.Errorf("the workload's SVID: %v", err)
	}
}

func agentSerial(t *testing.T, ctx context.Context, s *server, agentID string) string {
	t.Helper()
	return fmt.Sprint(s.spireJSON(t, ctx, "agent", "show", "-spiffeID", agentID)["x509svid_serial_number"])
}

// TestBannedAgent ends by itself and leaves no SVID behind.
func TestBannedAgent(t *testing.T) {
	ctx := bounded(t, 2*time.Minute)
	ca, a, agentID := joined(t, ctx, "")
	kept := files(t, a.dir+"/data")
	if len(kept) == 0 {
		t.Fatal("the agent keeps nothing on disk")
	}
	if _, err := ca.spire(ctx, "agent", "ban", "-spiffeID", agentID); err != nil {
		t.Fatal(err)
	}
	if err := a.ends(ctx); err != nil {
		t.Fatalf("banned: %v", err)
	}
	if !strings.Contains(strings.ToLower(a.out.String()), "banned") {
		t.Error("the agent does not say that it is banned")
	}
	a.start() // on the same files: it has no SVID any more, and its token is used
	if err := a.ends(ctx); err != nil {
		t.Errorf("the banned agent came back: %v", err)
	}
	if out, err := ca.spire(ctx, "agent", "show", "-spiffeID", agentID); err != nil || !strings.Contains(out, "Banned") {
		t.Errorf("agent show: %v\n%s", err, out)
	}
}

// TestEvictedAgent ends, since a join token is good once; with another token it is let in.
func TestEvictedAgent(t *testing.T) {
	ctx := bounded(t, 2*time.Minute)
	ca, a, agentID := joined(t, ctx, "")
	if _, err := ca.spire(ctx, "agent", "evict", "-spiffeID", agentID); err != nil {
		t.Fatal(err)
	}
	if err := a.ends(ctx); err != nil {
		t.Fatalf("evicted: %v", err)
	}
	token, _ := ca.joinToken(ctx, "/node")
	b := newSPIREAgent(t, agentConfig{server: ca, token: token, bundle: ca.bundleFile(ctx), dir: a.dir})
	b.start()
	b.serves(ctx, "/web")
}

// TestStaleSVID starts an agent on files from before its last renewals: its serial is an old one.
func TestStaleSVID(t *testing.T) {
	ctx := bounded(t, 3*time.Minute)
	ca, a, agentID := joined(t, ctx, "ttl: {agent: 1m}\n")
	a.end(syscall.SIGTERM)
	old := shortDir(t)
	if err := os.CopyFS(old, os.DirFS(a.dir+"/data")); err != nil {
		t.Fatal(err)
	}
	serial := agentSerial(t, ctx, ca, agentID)
	a.start()
	if err := eventually(ctx, func() error {
		if agentSerial(t, ctx, ca, agentID) == serial {
			return errors.New("the agent's SVID was not renewed")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	a.end(syscall.SIGTERM)
	if err := os.RemoveAll(a.dir + "/data"); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(a.dir+"/data", os.DirFS(old)); err != nil {
		t.Fatal(err)
	}
	a.start()
	if err := a.ends(ctx); err != nil {
		t.Fatalf("with a stale SVID: %v", err)
	}
	if !strings.Contains(a.out.String(), "Agent needs to re-attest: removing SVID") {
		t.Error("the agent was not told that its SVID is not the active one")
	}
}

// startAnew starts a SPIRE agent whose cached SVID the server does not take. It then drops the SVID and ends, and attests
// when it is started again, as a service manager does.
func (a *agent) startAnew(ctx context.Context) {
	a.t.Helper()
	said := len(a.out.String())
	a.start()
	if err := a.ends(ctx); err != nil {
		a.t.Fatalf("with an SVID that the server does not take: %v", err)
	}
	if now := a.out.String()[said:]; !strings.Contains(now, "Agent needs to re-attest: removing SVID") {
		a.t.Errorf("the agent was not told to attest again:\n%s", now)
	}
	a.start()
}

func files(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	for _, e := range must[[]os.DirEntry](t)(os.ReadDir(dir)) {
		out = append(out, e.Name())
	}
	return out
}
