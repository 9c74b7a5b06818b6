package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/source"
)

// metric returns the sum of a metric's values at an agent.
func metric(ctx context.Context, address, name string) (float64, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	sum, found := 0.0, false
	lines := bufio.NewScanner(response.Body)
	for lines.Scan() {
		rest, ok := strings.CutPrefix(lines.Text(), name)
		if !ok || rest == "" || rest[0] != ' ' && rest[0] != '{' {
			continue
		}
		v, err := strconv.ParseFloat(rest[strings.LastIndexByte(rest, ' ')+1:], 64)
		if err != nil {
			return 0, err
		}
		sum, found = sum+v, true
	}
	if err := lines.Err(); err != nil {
		return 0, err
	}
	if !found {
		return 0, fmt.Errorf("%s has no metric %s", address, name)
	}
	return sum, nil
}

// A survivor is a fleet whose agent shows its metrics, and what more its configuration has.
type survivor struct {
	*fleet
	metrics string
}

func newSurvivor(ctx context.Context, t *testing.T, server func(*fleet) string, more string) *survivor {
	f := newFleet(t)
	s := &survivor{fleet: f, metrics: freePort(t)}
	f.ca.start()
	f.configureAgent(ctx, server(f))
	b, err := os.ReadFile(f.dir + "/agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	f.write("agent.yaml", fmt.Sprintf("%smetrics: {listen: %q}\n%s", b, s.metrics, more))
	f.agent.start()
	return s
}

// saved waits until the agent holds as many SVIDs and everything is on its disk.
func (s *survivor) saved(ctx context.Context, svids float64) {
	s.t.Helper()
	if err := eventually(ctx, func() error {
		n, err := metric(ctx, s.metrics, "signet_agent_x509_svids")
		if err != nil || n < svids {
			return errors.Join(err, fmt.Errorf("the agent holds %v SVIDs, want %v", n, svids))
		}
		unsaved, err := metric(ctx, s.metrics, "signet_agent_sealed_cache_unsaved_seconds")
		if err != nil || unsaved != 0 {
			return errors.Join(err, fmt.Errorf("what is %v s old is not saved", unsaved))
		}
		return nil
	}); err != nil {
		s.t.Fatal(err)
	}
}

// A program is an executable of its own, which no process has run before.
func (s *survivor) program(name string) string {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.Link(os.Args[0], path); err != nil {
		if err := exec.Command("cp", os.Args[0], path).Run(); err != nil { // another file system
			s.t.Fatal(err)
		}
	}
	return path
}

// runs runs a program as a workload and returns what it prints about its identities.
func (s *survivor) runs(ctx context.Context, program string) (string, error) {
	cmd := exec.CommandContext(ctx, program, "svid", "fetch", "x509", "--endpoint", s.endpoint(), "-o", "json")
	cmd.Env = append(os.Environ(), asSignet+"=1")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

const outagePolicies = `---
kind: CallPolicy
name: web
service: /web
allow:
  - from: [/caller]
`

func decide(t *testing.T, p *policy.Policies, from string) bool {
	t.Helper()
	id := func(path string) spiffeid.ID { return spiffeid.RequireFromString("spiffe://example.org" + path) }
	return p.Decide(&policy.Request{Service: id("/web"), Peer: id(from), Method: "GET", Path: "/"}).Allowed
}

// TestAgentRestartedWithoutItsCA kills the CA for good, and the agent, and starts the agent again. Workloads find all they had:
// their SVIDs at the first call, bundles, validation of tokens and call policies; also a program that never ran before.
// [DESIGN §7]
func TestAgentRestartedWithoutItsCA(t *testing.T) {
	t.Parallel()
	ctx := bounded(t, 90*time.Second)
	s := newSurvivor(ctx, t, func(f *fleet) string { return f.addr }, "")
	later := s.program("later")
	s.apply(ctx, identity("web")+fmt.Sprintf("---\nkind: Identity\nname: later\nspiffeID: /later\nmatch: [%q]\n", "unix:path:"+later)+outagePolicies)
	s.await(ctx, "/web")
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(s.endpoint()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	token, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "db"})
	if err != nil {
		t.Fatal(err)
	}
	before, err := client.FetchX509SVID(ctx)
	if err != nil {
		t.Fatal(err)
	}
	s.saved(ctx, 2)
	s.ca.end(syscall.SIGKILL)
	s.agent.end(syscall.SIGKILL)
	s.agent.start()

	// The socket is there when the agent is; the first call that reaches it gets the SVID.
	var after struct {
		ids    []string
		serial string
	}
	if err := eventually(ctx, func() error {
		svid, err := client.FetchX509SVID(ctx)
		if status.Code(err) == codes.Unavailable && !strings.Contains(err.Error(), "the agent ") {
			return err // the transport's word: the old connection broke, or nobody listens yet
		}
		if err != nil {
			t.Fatalf("the first call that was answered: %v", err)
		}
		after.serial = svid.Certificates[0].SerialNumber.String()
		after.ids = append(after.ids, svid.ID.Path())
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(after.ids, []string{"/web"}) || after.serial != before.Certificates[0].SerialNumber.String() {
		t.Errorf("after the restart: %v, serial %s; want the SVID of before, %s", after.ids, after.serial, before.Certificates[0].SerialNumber)
	}
	if bundles, err := client.FetchJWTBundles(ctx); err != nil || !bundles.Has(before.ID.TrustDomain()) {
		t.Errorf("JWT bundles: %v", err)
	}
	if _, err := client.ValidateJWTSVID(ctx, token.Marshal(), "db"); err != nil {
		t.Errorf("a token of before the outage: %v", err)
	}
	if _, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "db"}); status.Code(err) != codes.Unavailable {
		t.Errorf("a new token without a CA: %v, want Unavailable", err)
	}
	policies, err := source.New(ctx, source.Options{Addr: s.endpoint()})
	if err != nil {
		t.Fatal(err)
	}
	defer policies.Close()
	if !decide(t, policies.Policies(), "/caller") || decide(t, policies.Policies(), "/stranger") {
		t.Error("the call policies of before the outage are not enforced")
	}
	if out, err := s.runs(ctx, later); err != nil || !strings.Contains(out, "spiffe://example.org/later") {
		t.Errorf("a program that never ran before: %v\n%s", err, out)
	}
	if out, err := s.runs(ctx, s.program("nobody")); err != nil || strings.Contains(out, "/later") {
		t.Errorf("a program without an entry of its own: %v\n%s", err, out) // it is /web by its user
	}
	for name, want := range map[string]float64{"signet_agent_restored": 1, "signet_agent_connected": 0} {
		if got, err := metric(ctx, s.metrics, name); err != nil || got != want {
			t.Errorf("%s = %v, %v; want %v", name, got, err, want)
		}
	}
	if got, err := metric(ctx, s.metrics, "signet_agent_offline_seconds"); err != nil || got <= 0 {
		t.Errorf("signet_agent_offline_seconds = %v, %v", got, err)
	}
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", s.agent.cmd.Process.Pid))
	if err != nil || !regexp.MustCompile(`(?m)^Max core file size +0 +0 `).Match(limits) {
		t.Errorf("the agent's memory, with all keys, may be dumped: %v\n%s", err, limits)
	}
	if !strings.Contains(s.agent.out.String(), "serving from the sealed cache") {
		t.Error("the agent does not say that it serves from the sealed cache")
	}
}

// TestDeletedDuringTheOutage: what was deleted while the agent could not hear of it is gone when it can, from open streams,
// too, and nothing is issued for it in between.
func TestDeletedDuringTheOutage(t *testing.T) {
	t.Parallel()
	ctx := bounded(t, 90*time.Second)
	var r *relay
	s := newSurvivor(ctx, t, func(f *fleet) string {
		r = newRelay(t, f.addr)
		return r.l.Addr().String()
	}, "")
	s.apply(ctx, identity("one")+identity("two"))
	s.await(ctx, "/two")
	s.saved(ctx, 2)
	r.setCut(true)
	s.agent.end(syscall.SIGKILL)
	s.agent.start()
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(s.endpoint()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	w := make(watcher, 16)
	watching, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { client.WatchX509Context(watching, w) })
	defer wg.Wait()
	defer stop()
	if got := <-w; len(got) != 2 {
		t.Errorf("during the outage: %v", got)
	}
	if _, err := adminv1.NewAdminClient(s.admin).DeleteResource(ctx, &adminv1.DeleteResourceRequest{Kind: "Identity", Name: "two", Yes: true}); err != nil {
		t.Fatal(err)
	}
	issued := len(audit(t, s.admin, "x509svid.issued"))
	r.setCut(false)
	for got := range w {
		if slices.Equal(got, []string{"/one"}) {
			break
		}
	}
	if ids, err := s.ids(ctx); err != nil || !slices.Equal(ids, []string{"/one"}) {
		t.Errorf("after the outage: %v, %v", ids, err)
	}
	for _, record := range audit(t, s.admin, "x509svid.issued")[issued:] {
		if record["spiffe_id"] == "spiffe://example.org/two" {
			t.Errorf("an SVID was asked for an entry that was deleted: %v", record)
		}
	}
	// Streams hear of a change before the whole of the CA's answer is in the cache.
	if err := eventually(ctx, func() error {
		got, err := metric(ctx, s.metrics, "signet_agent_restored")
		if err == nil && got != 0 {
			err = fmt.Errorf("signet_agent_restored = %v after the outage", got)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}
