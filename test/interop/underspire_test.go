package interop

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// briefly makes a SPIRE server issue for so short that renewals come within the test.
const briefly = "agent_ttl = \"30s\"\n  default_x509_svid_ttl = \"30s\"\n  default_jwt_svid_ttl = \"20s\""

// everySecond makes what a test waits for come soon.
const everySecond = "poll_interval: 1s\n"

// underSPIRE is our agent under a SPIRE server. Without a host it comes by a join token of spire-server token generate.
func underSPIRE(t *testing.T, ctx context.Context, spire *server, h *host, alias, extra string) (a *agent, agentID string) {
	t.Helper()
	dir := shortDir(t)
	yaml := fmt.Sprintf("trust_domain: %s\nserver_address: %s\ndata_dir: %s/signet\nsocket_path: %s/agent.sock\nadmin_socket: {path: %s/admin.sock}\ntrust_bundle_path: %s\n%s",
		trustDomain, spire.addr, dir, dir, shortDir(t), spire.bundleFile(ctx), extra)
	if h != nil {
		agentID = h.agentID
		yaml += fmt.Sprintf("node_attestation: {x509pop: {certificate_path: %s, private_key_path: %s}}\n", h.cert, h.key)
		if alias != "" {
			must[string](t)(spire.spire(ctx, "entry", "create", "-node", "-spiffeID", full(alias), "-selector", "x509pop:subject:cn:"+h.name))
		}
	} else {
		var token string
		token, agentID = spire.joinToken(ctx, alias)
		yaml += "join_token_file: " + writeFile(t, dir+"/token", token) + "\n"
	}
	a = newSignetAgent(t, agentConfig{server: spire, dir: dir, yaml: yaml})
	a.start()
	return a, agentID
}

// says waits until a daemon has said something.
func says(t *testing.T, ctx context.Context, p *process, what string) {
	t.Helper()
	if err := eventually(ctx, func() error {
		if !strings.Contains(p.out.String(), what) {
			return fmt.Errorf("%s has not said %q", p.name, what)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// TestUnderSPIREByJoinToken lets our agent in at an unmodified SPIRE server by a token of its command line. It serves beside a SPIRE
// agent; entries come, change and go, more than go into a page; everything is renewed, and no call fails while the server is killed
// and started again.
func TestUnderSPIREByJoinToken(t *testing.T) {
	foreign(t, envAgent)
	ctx := bounded(t, 5*time.Minute)
	spire := startSPIREServer(t, ctx, briefly, "")
	a, agentID := underSPIRE(t, ctx, spire, nil, "/node/ours", everySecond)
	token, _ := spire.joinToken(ctx, "/node/theirs")
	b := newSPIREAgent(t, agentConfig{server: spire, token: token, bundle: spire.bundleFile(ctx), extra: `experimental { sync_interval = "1s" }`})
	b.start()
	spire.entry(ctx, "/ours", "/node/ours")
	spire.entry(ctx, "/theirs", "/node/theirs")
	a.serves(ctx, "/ours")
	b.serves(ctx, "/theirs")
	servesAll(t, ctx, a, "/ours")
	says(t, ctx, a.process, "the CA is a SPIRE server")

	ours, theirs := newWorkload(t, ctx, a, "/ours"), newWorkload(t, ctx, b, "/theirs")
	tr := startTraffic(ctx, ours, theirs)
	first, serial := serialOf(t, ours), agentSerial(t, ctx, spire, agentID)
	tr.more(t, ctx, 20)
	renewed := func() {
		t.Helper()
		if err := eventually(ctx, func() error {
			if serialOf(t, ours) == first {
				return errNotRenewed
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	renewed()
	awaitOtherSerial(t, ctx, spire, agentID, serial)

	// A killed server is no more than a pause.
	spire.kill()
	tr.more(t, ctx, 10)
	a.kill() // and started again without its server, it serves what it has sealed
	a.start()
	a.serves(ctx, "/ours")
	tr.more(t, ctx, 10)
	spire.up(ctx)
	first, serial = serialOf(t, ours), agentSerial(t, ctx, spire, agentID)
	renewed()
	awaitOtherSerial(t, ctx, spire, agentID, serial)
	tr.more(t, ctx, 20)
	tr.stop(t)

	second := spire.entry(ctx, "/second", "/node/ours")
	a.serves(ctx, "/ours", "/second")
	must[string](t)(spire.spire(ctx, "entry", "update", "-entryID", entryID(t, ctx, spire, "/ours"), "-spiffeID", full("/ours"), "-parentID", full("/node/ours"), "-selector", self(), "-dns", "ours.internal"))
	if err := eventually(ctx, func() error {
		svid, err := ours.x509.GetX509SVID()
		if err == nil && !slices.Contains(svid.Certificates[0].DNSNames, "ours.internal") {
			err = fmt.Errorf("the SVID has DNS names %q", svid.Certificates[0].DNSNames)
		}
		return err
	}); err != nil {
		t.Errorf("a changed entry did not arrive: %v", err)
	}
	must[string](t)(spire.spire(ctx, "entry", "delete", "-entryID", second))
	a.withholds(ctx, "/second")

	const many = 700
	create := &entryv1.BatchCreateEntryRequest{}
	for i := range many {
		create.Entries = append(create.Entries, &types.Entry{Id: fmt.Sprintf("many-%d", i), SpiffeId: &types.SPIFFEID{TrustDomain: trustDomain, Path: fmt.Sprintf("/many/%d", i)}, X509SvidTtl: 3600,
			ParentId: &types.SPIFFEID{TrustDomain: trustDomain, Path: "/node/ours"}, Selectors: []*types.Selector{{Type: "unix", Value: strings.TrimPrefix(self(), "unix:")}}})
	}
	for i, r := range must[*entryv1.BatchCreateEntryResponse](t)(entryv1.NewEntryClient(spire.conn).BatchCreateEntry(ctx, create)).Results {
		if r.Status.Code != 0 {
			t.Fatalf("entry %d: %v", i, r.Status)
		}
	}
	all := func(want int) {
		t.Helper()
		if err := eventually(ctx, func() error {
			ids, err := a.ids(ctx)
			if err == nil && len(ids) != want {
				err = fmt.Errorf("%d SVIDs, want %d", len(ids), want)
			}
			return err
		}); err != nil {
			t.Errorf("more than a page of entries: %v", err)
		}
	}
	all(many + 1)
	must[string](t)(spire.spire(ctx, "entry", "delete", "-entryID", "many-650"))
	a.withholds(ctx, "/many/650")
	all(many)
	if out := must[string](t)(spire.spire(ctx, "agent", "show", "-spiffeID", agentID)); !strings.Contains(out, "join_token") {
		t.Errorf("agent show:\n%s", out)
	}
}

// TestUnderSPIREByX509POP attests by certificate: at half life again, and by itself after an eviction, after a ban that was lifted,
// and when its SVID has ended while it was away.
func TestUnderSPIREByX509POP(t *testing.T) {
	foreign(t, envServer)
	ctx := bounded(t, 4*time.Minute)
	p := newPKI(t)
	spire := startSPIREServer(t, ctx, briefly, p.spireAccepts())
	h := p.ec("node7")
	a, agentID := underSPIRE(t, ctx, spire, &h, "/node", everySecond)
	spire.entry(ctx, "/web", "/node")
	a.serves(ctx, "/web")
	servesAll(t, ctx, a, "/web")
	first := agentSerial(t, ctx, spire, agentID)
	awaitOtherSerial(t, ctx, spire, agentID, first)

	must[string](t)(spire.spire(ctx, "agent", "evict", "-spiffeID", agentID))
	back := func() {
		t.Helper()
		if err := eventually(ctx, func() error {
			_, err := spire.spire(ctx, "agent", "show", "-spiffeID", agentID)
			return err
		}); err != nil {
			t.Fatalf("the agent did not attest again: %v", err)
		}
	}
	back()
	spire.entry(ctx, "/after", "/node")
	a.serves(ctx, "/after")

	must[string](t)(spire.spire(ctx, "agent", "ban", "-spiffeID", agentID))
	says(t, ctx, a.process, "this agent is banned")
	if ids, err := a.ids(ctx); err != nil || !slices.Contains(ids, "/web") {
		t.Errorf("banned, it serves %q, %v; what it holds is good until it ends", ids, err)
	}
	must[string](t)(spire.spire(ctx, "agent", "evict", "-spiffeID", agentID)) // SPIRE's way to lift a ban
	back()
	spire.entry(ctx, "/again", "/node")
	a.serves(ctx, "/again")

	// Away until its SVID is over.
	ended := must[x509SVID](t)(newWorkload(t, ctx, a, "/web").x509.GetX509SVID()).Certificates[0].NotAfter
	a.end(syscall.SIGTERM)
	if err := eventually(ctx, func() error {
		if left := time.Until(ended.Add(5 * time.Second)); left > 0 {
			return fmt.Errorf("%s are left", left)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	a.start()
	a.serves(ctx, "/web", "/again")
}

// TestUnderSPIRERotation rotates the SPIRE server's authorities, prepare, activate, taint and revoke, under an X509Source with
// continuous handshakes.
func TestUnderSPIRERotation(t *testing.T) {
	foreign(t, envServer)
	ctx := bounded(t, 4*time.Minute)
	p := newPKI(t)
	spire := startSPIREServer(t, ctx, `ca_ttl = "24h"`, p.spireAccepts())
	h := p.ec("node7")
	a, id1 := underSPIRE(t, ctx, spire, nil, "/node/a", everySecond)
	b, id2 := underSPIRE(t, ctx, spire, &h, "/node/b", everySecond)
	spire.entry(ctx, "/a", "/node/a")
	spire.entry(ctx, "/b", "/node/b")
	a.serves(ctx, "/a")
	b.serves(ctx, "/b")
	at, bt := newWorkload(t, ctx, a, "/a"), newWorkload(t, ctx, b, "/b")
	tr := startTraffic(ctx, at, bt)
	tr.more(t, ctx, 10)

	before := map[string]string{}
	for _, kind := range []string{"x509", "jwt"} {
		before[kind] = authorityID(t, ctx, spire, kind, "active")
		must[string](t)(spire.spire(ctx, "localauthority", kind, "prepare"))
	}
	trusts(t, ctx, 2, 2, at, bt)
	after := map[string]string{}
	for _, kind := range []string{"x509", "jwt"} {
		after[kind] = authorityID(t, ctx, spire, kind, "prepared")
		must[string](t)(spire.spire(ctx, "localauthority", kind, "activate", "-authorityID", after[kind]))
	}
	tr.more(t, ctx, 20)
	own := map[string]string{id1: agentSerial(t, ctx, spire, id1), id2: agentSerial(t, ctx, spire, id2)}
	for _, kind := range []string{"x509", "jwt"} {
		must[string](t)(spire.spire(ctx, "localauthority", kind, "taint", "-authorityID", before[kind]))
	}
	issuedBy(t, ctx, at, spire) // nothing but the taint makes them renew: they live an hour
	issuedBy(t, ctx, bt, spire)
	for _, w := range []*workload{at, bt} {
		if err := eventually(ctx, func() error {
			if got := w.keyID(); got != after["jwt"] {
				return fmt.Errorf("%s calls with a JWT-SVID of key %s", w.id, got)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
	for id, serial := range own {
		awaitOtherSerial(t, ctx, spire, id, serial)
	}
	tr.more(t, ctx, 10)
	for _, kind := range []string{"x509", "jwt"} {
		must[string](t)(spire.spire(ctx, "localauthority", kind, "revoke", "-authorityID", before[kind]))
	}
	trusts(t, ctx, 1, 1, at, bt)
	tr.more(t, ctx, 20)
	tr.stop(t)
}

// TestUnderSPIREFederation gives a workload the bundle of another trust domain, changes it, and takes it away.
func TestUnderSPIREFederation(t *testing.T) {
	foreign(t, envServer)
	ctx := bounded(t, 2*time.Minute)
	spire := startSPIREServer(t, ctx, "", "")
	a, _ := underSPIRE(t, ctx, spire, nil, "/node", everySecond)
	federates(t, ctx, spire, a)
}

// TestServerOfAnotherKind swaps the server behind the agents' address while they run: a SPIRE server, signet's CA, and the SPIRE server
// again. They find out by themselves what there is, attest there, and no call between their workloads fails.
func TestServerOfAnotherKind(t *testing.T) {
	foreign(t, envServer)
	ctx := bounded(t, 4*time.Minute)
	p := newPKI(t)
	spire, ca := startSPIREServer(t, ctx, `ca_ttl = "24h"`, p.spireAccepts()), startCA(t, ctx, p.accepts())
	// Each publishes the other's authorities beside its own.
	theirs := writeFile(t, spire.dir+"/spire.json", must[string](t)(spire.spire(ctx, "bundle", "show", "-output", "json")))
	must[string](t)(ca.signet(ctx, "bundle", "append", theirs))
	ours := writeFile(t, spire.dir+"/signet.json", must[string](t)(ca.signet(ctx, "bundle", "show", "--format", "spire", "--own")))
	must[string](t)(spire.signet(ctx, "bundle", "append", ours))

	switched := startProxy(t, spire.addr)
	behind := *spire
	behind.addr = switched.addr
	var agents []*agent
	var workloads []*workload
	for _, name := range []string{"a", "b"} {
		h := p.ec(name)
		for _, s := range []*server{spire, ca} {
			s.entry(ctx, "/"+name, h.agentID, "-entryID", name)
		}
		a, _ := underSPIRE(t, ctx, &behind, &h, "", everySecond)
		a.serves(ctx, "/"+name)
		agents = append(agents, a)
		workloads = append(workloads, newWorkload(t, ctx, a, "/"+name))
	}
	trusts(t, ctx, 2, 2, workloads...)
	tr := startTraffic(ctx, workloads...)
	tr.more(t, ctx, 10)
	for _, to := range []*server{ca, spire, ca} {
		switched.lead(to.addr)
		for _, w := range workloads {
			issuedBy(t, ctx, w, to)
		}
		tr.more(t, ctx, 10)
	}
	tr.stop(t)
	for _, a := range agents {
		if n := strings.Count(a.out.String(), "the CA is a SPIRE server"); n != 2 {
			t.Errorf("%s: has met a SPIRE server %d times, want 2", a.name, n)
		}
	}
}
