package interop

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/encoding/protojson"
)

const page = "../../docs/operate/moving-from-spire.md"

// A guide is the page of documentation that the move goes by. Its blocks are run in its order, with the sockets and
// files of this test in the place of those of the text.
type guide struct {
	t      *testing.T
	dir    string // where the reader stands
	env    []string
	order  []string
	blocks map[string]string // by directive
	done   map[string]bool
}

func readGuide(t *testing.T, env ...string) *guide {
	t.Helper()
	text := string(must[[]byte](t)(os.ReadFile(page)))
	g := &guide{t: t, dir: t.TempDir(), env: env, blocks: map[string]string{}, done: map[string]bool{}}
	for _, m := range regexp.MustCompile("(?s)(?:<!-- ([^\n]*) -->\n)?```([a-z]+)\n(.*?)```").FindAllStringSubmatch(text, -1) {
		directive := m[1]
		if directive == "" || g.blocks[directive] != "" {
			t.Fatalf("%s: a block needs a directive of its own, not %q:\n%s", page, directive, m[3])
		}
		g.blocks[directive], g.order = m[3], append(g.order, directive)
	}
	return g
}

func (g *guide) block(directive string) string {
	g.t.Helper()
	text := g.blocks[directive]
	if text == "" {
		g.t.Fatalf("%s has no block %q", page, directive)
	}
	g.done[directive] = true
	return text
}

// run runs a block of commands and returns what it wrote. All of it must succeed.
func (g *guide) run(ctx context.Context, name string) string {
	g.t.Helper()
	out, err := run(ctx, g.env, "bash", "-euo", "pipefail", "-c", "cd "+g.dir+"\n"+g.block("run: "+name))
	if err != nil {
		g.t.Fatalf("%s, block %q: %v", page, name, err)
	}
	return out
}

// file returns a file that the page shows, with the paths and addresses of the test.
func (g *guide) file(name string, replace ...string) string {
	g.t.Helper()
	text := g.block("file: " + name)
	for i := 0; i < len(replace); i += 2 {
		if !strings.Contains(text, replace[i]) {
			g.t.Fatalf("%s: %s does not hold %q", page, name, replace[i])
		}
	}
	return strings.NewReplacer(replace...).Replace(text)
}

func (g *guide) allDone() {
	g.t.Helper()
	for _, d := range g.order {
		if !g.done[d] && d != "sockets" {
			g.t.Errorf("%s: block %q was not run", page, d)
		}
	}
}

// programs is a directory with signet and spire-server, for PATH.
func programs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\n%s=1 exec %s \"$@\"\n", asSignet, must[string](t)(filepath.Abs(os.Args[0])))
	if err := os.WriteFile(dir+"/signet", []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(must[string](t)(filepath.Abs(foreign(t, envServer))), dir+"/spire-server"); err != nil {
		t.Fatal(err)
	}
	return dir
}

// active returns the subject key id of the X.509 authority that the server signs with.
func (s *server) active(ctx context.Context) (string, error) {
	if s.name == "spire-server" {
		return authorityID(s.t, ctx, s, "x509", "active"), nil
	}
	out, err := s.signet(ctx, "bundle", "show", "--format", "spire", "--own")
	if err != nil {
		return "", err
	}
	var own types.Bundle
	if err := protojson.Unmarshal([]byte(out), &own); err != nil || len(own.X509Authorities) != 1 {
		return "", fmt.Errorf("the CA has %d authorities of its own: %v", len(own.X509Authorities), err)
	}
	cert, err := x509.ParseCertificate(own.X509Authorities[0].Asn1)
	return fmt.Sprintf("%x", cert.SubjectKeyId), err
}

// issuedBy waits until the workload's SVID is one that this server signed.
func issuedBy(t *testing.T, ctx context.Context, w *workload, s *server) {
	t.Helper()
	if err := eventually(ctx, func() error {
		want, err := s.active(ctx)
		if err != nil {
			return err
		}
		leaf := must[x509SVID](t)(w.x509.GetX509SVID()).Certificates[0]
		if got := fmt.Sprintf("%x", leaf.AuthorityKeyId); got != want {
			return fmt.Errorf("%s has an SVID of authority %s, not of %s of %s", w.id, got, want, s.name)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// trusts waits until the workloads' bundles have so many X.509 and JWT authorities.
func trusts(t *testing.T, ctx context.Context, roots, keys int, all ...*workload) {
	t.Helper()
	for _, w := range all {
		if err := eventually(ctx, func() error {
			x, err := w.x509.GetX509BundleForTrustDomain(w.id.TrustDomain())
			if err != nil {
				return err
			}
			j, err := w.jwt.GetJWTBundleForTrustDomain(w.id.TrustDomain())
			if err == nil && (len(x.X509Authorities()) != roots || len(j.JWTAuthorities()) != keys) {
				err = fmt.Errorf("%s has %d X.509 and %d JWT authorities, want %d and %d", w.id, len(x.X509Authorities()), len(j.JWTAuthorities()), roots, keys)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestMoveFromSPIRE moves a trust domain of three nodes by docs/operate/moving-from-spire.md, while a workload on each node calls
// those on the others, both ways, with mTLS and a JWT-SVID. Node a keeps its SPIRE agent; b and c get signet's, by
// certificate and by join token. On the way the SPIRE server rotates its authorities, and node b goes back once. No call fails.
func TestMoveFromSPIRE(t *testing.T) {
	foreign(t, envAgent)
	foreign(t, envServer)
	ctx := bounded(t, 6*time.Minute)
	hosts := newPKI(t)
	hostA, hostB := hosts.ec("a"), hosts.ec("b")
	spire := startSPIREServer(t, ctx, `ca_ttl = "24h"`, hosts.spireAccepts())
	partner := startCA(t, ctx, "")
	partnerBundle := writeFile(t, spire.dir+"/partner.pem", must[string](t)(partner.signet(ctx, "bundle", "show", "--format", "pem")))
	must[string](t)(spire.spire(ctx, "federation", "create", "-trustDomain", "partner.example", "-bundleEndpointURL", "https://partner.example/bundle",
		"-bundleEndpointProfile", "https_web", "-trustDomainBundlePath", partnerBundle))

	// The deployment that is there: three nodes, a workload on each.
	fast := `experimental { sync_interval = "1s" }`
	bundle := spire.bundleFile(ctx)
	token, _ := spire.joinToken(ctx, "/node/c")
	agents := []*agent{
		newSPIREAgent(t, agentConfig{server: spire, attestor: hostA.attestor(), bundle: bundle, extra: fast}),
		newSPIREAgent(t, agentConfig{server: spire, attestor: hostB.attestor(), bundle: bundle, extra: fast}),
		newSPIREAgent(t, agentConfig{server: spire, token: token, bundle: bundle, extra: fast}),
	}
	parents := []string{hostA.agentID, "/node/b", "/node/c"}
	must[string](t)(spire.spire(ctx, "entry", "create", "-node", "-spiffeID", full("/node/b"), "-selector", "x509pop:subject:cn:b"))
	var workloads []*workload
	for i, a := range agents {
		id := "/" + string(rune('a'+i))
		a.name += " of node " + id[1:]
		spire.entry(ctx, id, parents[i], "-selector", self(), "-federatesWith", "spiffe://partner.example")
		a.start()
		a.serves(ctx, id)
		workloads = append(workloads, newWorkload(t, ctx, a, id))
	}
	must[string](t)(spire.spire(ctx, "entry", "create", "-spiffeID", full("/below"), "-parentID", full("/node/b"), "-selector", "unix:uid:9", "-downstream"))
	a, b, c := workloads[0], workloads[1], workloads[2]
	tr := startTraffic(ctx, workloads...)
	tr.more(t, ctx, 12)

	// The page.
	ca := startCA(t, ctx, hosts.accepts())
	g := readGuide(t, "PATH="+programs(t)+":"+os.Getenv("PATH"), "SPIRE_SOCKET="+spire.socket, "SIGNET_CA_SOCKET="+ca.socket)
	g.run(ctx, "federation")
	g.run(ctx, "relationship")
	if out := g.run(ctx, "entries"); !strings.Contains(out, "5 created, 0 changed, 0 unchanged") {
		t.Errorf("the import says\n%s", out)
	}
	sameEntries(t, ctx, spire, ca, "/node/c")
	g.run(ctx, "bundles")
	trusts(t, ctx, 2, 2, a, b, c)
	again := must[string](t)(run(ctx, g.env, "sh", "-c", "cd "+g.dir+" && sh keep-bundles.sh"))
	if strings.Count(again, "nothing to append") != 2 {
		t.Errorf("run again, keep-bundles.sh says\n%s", again)
	}
	tr.more(t, ctx, 12)

	// Node b gets signet's agent, goes back to SPIRE's, and moves for good.
	agents[1].end(syscall.SIGTERM)
	moved := func() *agent {
		m := newSignetAgent(t, agentConfig{server: ca, dir: agents[1].dir, yaml: g.file("agent.yaml", "ca.example.org:8081", ca.addr, "/var/lib/signet/agent", agents[1].dir+"/signet",
			"/run/spire/agent.sock", agents[1].socket, "/etc/signet/bundle.pem", ca.bundleFile(ctx), "/etc/host/cert.pem", hostB.cert, "/etc/host/key.pem", hostB.key)})
		m.start()
		return m
	}
	m := moved()
	issuedBy(t, ctx, b, ca)
	tr.more(t, ctx, 12)
	m.end(syscall.SIGTERM)
	agents[1].start()
	issuedBy(t, ctx, b, spire)
	tr.more(t, ctx, 12)
	agents[1].end(syscall.SIGTERM)
	moved()
	issuedBy(t, ctx, b, ca)
	trusts(t, ctx, 2, 2, b)

	// The SPIRE server rotates. Its next authority must be everywhere before it signs.
	for _, kind := range []string{"x509", "jwt"} {
		must[string](t)(spire.spire(ctx, "localauthority", kind, "prepare"))
	}
	must[string](t)(run(ctx, g.env, "sh", "-c", "cd "+g.dir+" && sh keep-bundles.sh"))
	trusts(t, ctx, 3, 3, a, b, c)
	for _, kind := range []string{"x509", "jwt"} {
		must[string](t)(spire.spire(ctx, "localauthority", kind, "activate", "-authorityID", authorityID(t, ctx, spire, kind, "prepared")))
	}
	must[string](t)(spire.spire(ctx, "entry", "update", "-entryID", entryID(t, ctx, spire, "/c"), "-spiffeID", full("/c"), "-parentID", full("/node/c"), "-selector", self(), "-dns", "c.internal"))
	issuedBy(t, ctx, c, spire) // by the new authority
	tr.more(t, ctx, 12)

	// Node c, by join token; what changed at the SPIRE server comes along.
	must[string](t)(run(ctx, g.env, "bash", "-euc", "cd "+g.dir+"\nsignet entry export --socket $SPIRE_SOCKET > entries.json\nsignet entry import entries.json --update"))
	g.run(ctx, "token")
	agents[2].end(syscall.SIGTERM)
	newSignetAgent(t, agentConfig{server: ca, dir: agents[2].dir, token: strings.TrimSpace(string(must[[]byte](t)(os.ReadFile(g.dir + "/join.token"))))}).start()
	issuedBy(t, ctx, c, ca)
	if names := must[x509SVID](t)(c.x509.GetX509SVID()).Certificates[0].DNSNames; len(names) != 1 || names[0] != "c.internal" {
		t.Errorf("after the move, c has DNS names %q", names)
	}
	tr.more(t, ctx, 12)

	// Node a keeps its SPIRE agent, which is only told where the server is. Its cached SVID is of the other server.
	agents[0].end(syscall.SIGTERM)
	repointed := newSPIREAgent(t, agentConfig{server: ca, dir: agents[0].dir, attestor: hostA.attestor(), bundle: bundle, extra: fast})
	repointed.startAnew(ctx)
	issuedBy(t, ctx, a, ca)
	tr.more(t, ctx, 12)
	repointed.end(syscall.SIGTERM) // back, and there again
	newSPIREAgent(t, agentConfig{server: spire, dir: agents[0].dir, attestor: hostA.attestor(), bundle: bundle, extra: fast})
	agents[0].startAnew(ctx)
	issuedBy(t, ctx, a, spire)
	agents[0].end(syscall.SIGTERM)
	repointed = newSPIREAgent(t, agentConfig{server: ca, dir: agents[0].dir, attestor: hostA.attestor(), bundle: bundle, extra: fast})
	repointed.startAnew(ctx)
	issuedBy(t, ctx, a, ca)

	if out := g.run(ctx, "look"); !strings.Contains(out, hostA.agentID) || !strings.Contains(out, hostB.agentID) {
		t.Errorf("signet agent list lacks the nodes:\n%s", out)
	}
	must[string](t)(ca.signet(ctx, "entry", "create", "--id", "new", "--spiffe-id", "/new", "--parent-id", "/node/b", "--selector", "unix:uid:10"))
	g.run(ctx, "back")
	must[string](t)(spire.spire(ctx, "entry", "show", "-entryID", "new"))

	// The end of the SPIRE server.
	spire.end(syscall.SIGTERM)
	tr.more(t, ctx, 12)
	g.run(ctx, "end")
	trusts(t, ctx, 1, 1, a, b, c)
	tr.more(t, ctx, 12)
	tr.stop(t)
	g.allDone()
}

// sameEntries compares what the two servers have registered, but for what is not to be copied.
func sameEntries(t *testing.T, ctx context.Context, from, to *server, alias string) {
	t.Helper()
	there := must[*entryv1.ListEntriesResponse](t)(entryv1.NewEntryClient(from.conn).ListEntries(ctx, &entryv1.ListEntriesRequest{}))
	for _, want := range there.Entries {
		got, err := entryv1.NewEntryClient(to.conn).GetEntry(ctx, &entryv1.GetEntryRequest{Id: want.Id})
		if want.SpiffeId.Path == alias {
			if err == nil {
				t.Errorf("the alias of a join token's agent was copied: %v", got)
			}
			continue
		}
		if err != nil {
			t.Errorf("entry of %s: %v", want.SpiffeId.Path, err)
			continue
		}
		for _, e := range []*struct{ a, b any }{{got.SpiffeId.Path, want.SpiffeId.Path}, {got.ParentId.Path, want.ParentId.Path}, {fmt.Sprint(got.Selectors), fmt.Sprint(want.Selectors)},
			{got.Downstream, want.Downstream}, {fmt.Sprint(got.FederatesWith), fmt.Sprint(want.FederatesWith)}} {
			if e.a != e.b {
				t.Errorf("entry of %s: %v", want.SpiffeId.Path, errors.New(fmt.Sprint(e.a, " is not ", e.b)))
			}
		}
	}
}
