package interop

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// A step is one call of the stock command line. It runs against a real SPIRE server and against signet's CA, and both
// must say the same, but for what is random or a time.
type step struct {
	args string
	// keep names a value of the output that later steps may use as $NAME, by a pattern with one group.
	keep map[string]string
	// fails: it must fail at both, with the same gRPC codes.
	fails bool
	// want must be in signet's output: so that both being silent is no success.
	want []string
	// own says why the outputs may differ; only success is compared then.
	own string
}

func steps(dir string) []step {
	return []step{
		{args: "healthcheck", want: []string{"Server is healthy."}},
		{args: "healthcheck -shallow -verbose", want: []string{"Server is healthy."}},

		{args: "entry create -entryID web -spiffeID spiffe://example.org/web -parentID spiffe://example.org/node -selector unix:uid:1 -selector unix:gid:2 -x509SVIDTTL 600 -jwtSVIDTTL 60 -dns web.internal -dns web2.internal -hint front",
			want: []string{"Entry ID: web", "SPIFFE ID: spiffe://example.org/web", "Selector: unix:uid:1", "DNS name: web.internal", "Hint: front"}},
		{args: "entry create -entryID web2 -spiffeID spiffe://example.org/web -parentID spiffe://example.org/node -selector unix:uid:1 -selector unix:gid:2", fails: true,
			want: []string{"AlreadyExists"}},
		{args: "entry create -entryID nodes -node -spiffeID spiffe://example.org/node -selector x509pop:subject:cn:a", want: []string{"Parent ID: spiffe://example.org/spire/server"}},
		{args: "entry create -entryID boss -spiffeID spiffe://example.org/boss -parentID spiffe://example.org/node -selector unix:uid:0 -admin", want: []string{"Admin: true"}},
		{args: "entry create -entryID down -spiffeID spiffe://example.org/down -parentID spiffe://example.org/node -selector unix:uid:0 -downstream", want: []string{"Downstream: true"}},
		{args: "entry create -entryID stored -spiffeID spiffe://example.org/stored -parentID spiffe://example.org/node -selector disk:name:x -storeSVID", want: []string{"StoreSvid: true"}},
		{args: "entry create -entryID late -spiffeID spiffe://example.org/late -parentID spiffe://example.org/node -selector unix:uid:5 -entryExpiry 4102444800", want: []string{"2100-01-01"}},
		{args: "entry create -entryID jti -spiffeID spiffe://example.org/jti -parentID spiffe://example.org/node -selector unix:uid:6 -jwtSVIDIncludeJTI -disableX509SVIDPrefetch"},
		{args: "entry create -spiffeID spiffe://example.org/spire/x -parentID spiffe://example.org/node -selector unix:uid:1", fails: true},
		{args: "entry create -spiffeID spiffe://other.example/x -parentID spiffe://example.org/node -selector unix:uid:1", fails: true},
		{args: "entry create -data " + dir + "/entries.json", want: []string{"spiffe://example.org/from/file"}},
		{args: "entry show -entryID web", want: []string{"Found 1 entry"}},
		{args: "entry show -entryID nobody", fails: true},
		{args: "entry show", want: []string{"Found 8 entries"}}, // that of the downstream server among them
		{args: "entry show -downstream", want: []string{"Found 1 entry"}},
		{args: "entry show -spiffeID spiffe://example.org/web", want: []string{"Found 1 entry"}},
		{args: "entry show -parentID spiffe://example.org/spire/server", want: []string{"Found 1 entry"}},
		{args: "entry show -selector unix:uid:1 -matchSelectorsOn superset", want: []string{"Found 1 entry"}},
		{args: "entry show -selector unix:uid:1 -selector unix:uid:5 -selector unix:gid:2 -matchSelectorsOn subset", want: []string{"Found 2 entries"}},
		{args: "entry show -selector unix:uid:1 -selector unix:gid:2 -matchSelectorsOn exact", want: []string{"Found 1 entry"}},
		{args: "entry show -selector unix:uid:5 -selector unix:uid:6 -matchSelectorsOn any", want: []string{"Found 2 entries"}},
		{args: "entry show -hint front", want: []string{"Found 1 entry"}},
		{args: "entry update -entryID web -spiffeID spiffe://example.org/web -parentID spiffe://example.org/node -selector unix:uid:3 -x509SVIDTTL 300", want: []string{"unix:uid:3"}},
		{args: "entry update -entryID nobody -spiffeID spiffe://example.org/web -parentID spiffe://example.org/node -selector unix:uid:3", fails: true},
		{args: "entry count", want: []string{"8 registration entries"}},
		{args: "entry count -selector unix:uid:3", want: []string{"1 registration"}},
		{args: "entry delete -entryID jti", want: []string{"Deleted entry with ID: jti"}},
		{args: "entry delete -entryID jti", fails: true},

		{args: "token generate -spiffeID spiffe://example.org/alias -ttl 300", keep: map[string]string{"TOKEN": `Token: (\S+)`}},
		{args: "entry show -spiffeID spiffe://example.org/alias", want: []string{"Found 1 entry", "spiffe_id:spiffe://example.org/spire/agent/join_token/"}, own: "the parent holds the token at SPIRE, its public part here"},
		{args: "token generate -ttl 0", fails: true},

		{args: "agent count", want: []string{"1 attested agent"}},
		{args: "agent list", keep: map[string]string{"AGENT": `SPIFFE ID +: (\S+)`}, want: []string{"Found 1 attested agent", "Attestation type: join_token", "Can re-attest: false"}},
		{args: "agent list -attestationType x509pop", want: []string{"No attested agents"}},
		{args: "agent list -canReattest false -banned false", want: []string{"Found 1 attested agent"}},
		{args: "agent list -expiresBefore 2001-01-01T00:00:00Z", fails: true}, // not its format
		{args: "agent count -attestationType join_token", want: []string{"1 attested agent"}},
		{args: "agent show -spiffeID $AGENT", want: []string{"Found an attested agent given its SPIFFE ID"}},
		{args: "agent show -spiffeID spiffe://example.org/spire/agent/join_token/none", fails: true},
		{args: "agent purge -dryRun", want: []string{"No agents to purge."}},
		{args: "agent ban -spiffeID $AGENT", want: []string{"Agent banned successfully"}},
		{args: "agent list -banned true", want: []string{"Found 1 attested agent", "Banned: true"}},
		{args: "agent evict -spiffeID $AGENT", want: []string{"Agent evicted successfully"}},
		{args: "agent evict -spiffeID $AGENT", fails: true},
		{args: "agent ban -spiffeID $AGENT", fails: true},

		{args: "bundle show", want: []string{"<pem>"}},
		{args: "bundle show -format spiffe", want: []string{"x509-svid", "jwt-svid", "spiffe_sequence"}, own: "sequence and refresh hint are the server's own"},
		{args: "bundle set -id spiffe://partner.example -path " + dir + "/partner.pem", want: []string{"bundle set."}},
		{args: "bundle set -id spiffe://example.org -path " + dir + "/partner.pem", fails: true},
		{args: "bundle set -id spiffe://second.example -path " + dir + "/partner.pem", want: []string{"bundle set."}},
		{args: "bundle list", want: []string{"* partner.example", "* second.example"}},
		{args: "bundle list -id spiffe://partner.example", want: []string{"<pem>"}},
		{args: "bundle list -id spiffe://none.example", fails: true},
		{args: "bundle count", want: []string{"bundles"}},
		{args: "entry create -entryID fed -spiffeID spiffe://example.org/fed -parentID spiffe://example.org/node -selector unix:uid:8 -federatesWith spiffe://partner.example", want: []string{"FederatesWith: partner.example"}},
		{args: "entry show -federatesWith spiffe://partner.example", want: []string{"Found 1 entry"}},
		{args: "bundle delete -id spiffe://partner.example", fails: true},
		{args: "bundle delete -id spiffe://partner.example -mode dissociate", want: []string{"bundle deleted."}},
		{args: "entry show -entryID fed", want: []string{"Found 1 entry"}},
		{args: "bundle delete -id spiffe://second.example -mode delete", want: []string{"bundle deleted."}},
		{args: "bundle delete -id spiffe://none.example", fails: true},

		{args: "federation create -trustDomain spi.example -bundleEndpointURL https://127.0.0.1:1/bundle -bundleEndpointProfile https_spiffe -endpointSpiffeID spiffe://spi.example/bundle -trustDomainBundlePath " + dir + "/partner.pem",
			want: []string{"https_spiffe", "spiffe://spi.example/bundle"}},
		{args: "federation create -trustDomain web.example -bundleEndpointURL https://127.0.0.1:1/bundle -bundleEndpointProfile https_web", want: []string{"https_web"}},
		{args: "federation create -trustDomain web.example -bundleEndpointURL https://127.0.0.1:1/bundle -bundleEndpointProfile https_web", fails: true, want: []string{"AlreadyExists"}, own: "SPIRE shows its database's error as Internal"},
		{args: "federation create -trustDomain example.org -bundleEndpointURL https://127.0.0.1:1/bundle -bundleEndpointProfile https_web", fails: true},
		{args: "federation list", want: []string{"Found 2 federation relationships"}},
		{args: "federation show -trustDomain spi.example", want: []string{"spi.example"}},
		{args: "federation show -trustDomain none.example", fails: true},
		{args: "federation update -trustDomain web.example -bundleEndpointURL https://127.0.0.1:2/bundle -bundleEndpointProfile https_web", want: []string{"https://127.0.0.1:2/bundle"}},
		{args: "federation refresh -id spiffe://none.example", fails: true},
		{args: "federation delete -id spiffe://web.example", want: []string{"federation relationship deleted."}},
		{args: "federation delete -id spiffe://web.example", fails: true},

		{args: "x509 mint -spiffeID spiffe://example.org/minted -ttl 5m -dns minted.internal -write " + dir, want: []string{"X509-SVID written to"}},
		{args: "x509 mint -spiffeID spiffe://other.example/minted", fails: true},
		{args: "jwt mint -spiffeID spiffe://example.org/minted -audience a -audience b -ttl 1m", keep: map[string]string{"JWT": `(eyJ\S+)`}},
		{args: "jwt mint -spiffeID spiffe://other.example/minted -audience a", fails: true},

		{args: "localauthority x509 show", want: []string{"Active X.509 authority:", "No prepared X.509 authority found"}, keep: map[string]string{"X1": `Authority ID: (\S+)`}},
		{args: "localauthority x509 activate -authorityID nothing", fails: true},
		{args: "localauthority x509 taint -authorityID $X1", fails: true}, // it is active
		{args: "localauthority x509 prepare", want: []string{"Prepared X.509 authority:"}, keep: map[string]string{"X2": `Authority ID: (\S+)`}},
		{args: "localauthority x509 taint -authorityID $X2", fails: true}, // it is prepared
		{args: "localauthority x509 activate -authorityID $X2", want: []string{"Activated X.509 authority:"}},
		{args: "localauthority x509 revoke -authorityID $X1", fails: true, own: "SPIRE calls it Internal"}, // it is not tainted
		{args: "localauthority x509 taint -authorityID $X1", want: []string{"Tainted X.509 authority:"}},
		{args: "localauthority x509 revoke -authorityID $X1", want: []string{"Revoked X.509 authority:"}, own: "SPIRE does not say when it ends"},
		{args: "localauthority jwt show", want: []string{"Active JWT authority:"}, keep: map[string]string{"J1": `Authority ID: (\S+)`}},
		{args: "localauthority jwt prepare", want: []string{"Prepared JWT authority:"}, keep: map[string]string{"J2": `Authority ID: (\S+)`}},
		{args: "localauthority jwt activate -authorityID $J2", want: []string{"Activated JWT authority:"}},
		{args: "localauthority jwt taint -authorityID $J1", want: []string{"Tainted JWT authority:"}, own: "SPIRE does not say when it ends"},
		{args: "localauthority jwt revoke -authorityID $J1", want: []string{"Revoked JWT authority:"}, own: "SPIRE does not say when it ends"},
		{args: "upstreamauthority taint -subjectKeyID 00", fails: true},
		{args: "upstreamauthority revoke -subjectKeyID 00", fails: true},

		{args: "logger get", want: []string{"Logger Level"}, own: "the levels of this test differ"},
		{args: "logger set -level debug", want: []string{"Logger Level: debug"}, own: "so does the level at launch"},
		{args: "logger set -level loud", fails: true},
		{args: "logger reset", own: "so does the level at launch"},
		{args: "debug getinfo", own: "what is counted is the server's own"},
	}
}

// random are what two servers cannot have in common.
var random = []struct {
	pattern *regexp.Regexp
	by      string
}{
	{regexp.MustCompile(`(?s)-----BEGIN [A-Z ]+-----.+?-----END [A-Z ]+-----`), "<pem>"},
	{regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`), "<uuid>"},
	{regexp.MustCompile(`20\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d[^\n"]*`), "<time>"},
	{regexp.MustCompile(` +: `), ": "},
	{regexp.MustCompile(`(Serial number: )\d+`), "$1<serial>"},
	{regexp.MustCompile(`(Agent version: ).*`), "$1<version>"},
	{regexp.MustCompile(`(Revision: )\d+`), "$1<revision>"}, // both rise; ours is the store's
	{regexp.MustCompile(`(Bundle Endpoint.*|Upstream authority.*)\n`), ""},
}

var codesIn = regexp.MustCompile(`code[:=]? ?=? [A-Z][A-Za-z]+`)

// TestCommandLine drives both servers by the stock command line.
func TestCommandLine(t *testing.T) {
	foreign(t, envServer)
	ctx := bounded(t, 4*time.Minute)
	servers := []*server{startSPIREServer(t, ctx, "", ""),
		// The bundle is federated when its authorities rotate: activation waits for five refresh hints.
		startCA(t, ctx, "authorities: {refresh_hint: 1s}\n")}
	vars := []map[string]string{{}, {}}
	dirs := []string{t.TempDir(), t.TempDir()}
	partner := startCA(t, ctx, "")
	for i, s := range servers {
		writeFile(t, dirs[i]+"/partner.pem", must[string](t)(partner.signet(ctx, "bundle", "show", "--format", "pem")))
		writeFile(t, dirs[i]+"/entries.json", `{"entries": [{"entry_id": "file", "spiffe_id": "spiffe://example.org/from/file", "parent_id": "spiffe://example.org/node", "selectors": [{"type": "unix", "value": "uid:77"}], "x509_svid_ttl": 120}]}`)
		token, _ := s.joinToken(ctx, "")
		a := newSPIREAgent(t, agentConfig{server: s, token: token, bundle: s.bundleFile(ctx)})
		a.start()
		if err := eventually(ctx, func() error {
			out, err := s.spire(ctx, "agent", "count")
			if err == nil && !strings.HasPrefix(out, "1 ") {
				err = fmt.Errorf("agent count: %s", out)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	all := [][]step{steps(dirs[0]), steps(dirs[1])}
	for n := range all[0] {
		var outs [2]string
		var errs [2]error
		for i, s := range servers {
			outs[i], errs[i] = callStep(ctx, s, all[i][n], vars[i])
			outs[i] = strings.ReplaceAll(outs[i], dirs[i], "<dir>")
			outs[i] = strings.ReplaceAll(outs[i], s.socket, "<socket>")
		}
		st := all[1][n]
		if failed := errs[1] != nil; failed != st.fails {
			t.Errorf("%s: signet: %v; it must fail: %t\n%s", st.args, errs[1], st.fails, outs[1])
			continue
		}
		for _, w := range st.want {
			if !strings.Contains(outs[1], w) {
				t.Errorf("%s: signet's output lacks %q:\n%s", st.args, w, outs[1])
			}
		}
		if st.own != "" {
			continue
		}
		if failed := errs[0] != nil; failed != st.fails {
			t.Errorf("%s: SPIRE's server: %v; is the test's expectation wrong?\n%s", st.args, errs[0], outs[0])
			continue
		}
		if st.fails {
			// Each has its own words for a refusal; the codes are for programs.
			outs[0], outs[1] = fmt.Sprintln(codesIn.FindAllString(outs[0], -1)), fmt.Sprintln(codesIn.FindAllString(outs[1], -1))
		}
		if outs[0] != outs[1] {
			t.Errorf("%s:\n--- SPIRE's server says\n%s--- signet's CA says\n%s", st.args, outs[0], outs[1])
		}
	}
	checkMinted(t, servers[1], dirs[1], vars[1]["JWT"])
}

// callStep runs a step and returns its output with what is random replaced. A failure's text is part of the output.
func callStep(ctx context.Context, s *server, st step, vars map[string]string) (string, error) {
	args := strings.Fields(st.args)
	for i := range args {
		for name, value := range vars {
			args[i] = strings.ReplaceAll(args[i], "$"+name, value)
		}
	}
	out, err := s.spire(ctx, args...)
	if err != nil {
		_, after, _ := strings.Cut(err.Error(), "\n")
		out = after
	}
	for name, pattern := range st.keep {
		if m := regexp.MustCompile(pattern).FindStringSubmatch(out); m != nil {
			vars[name] = m[1]
		}
	}
	for name, value := range vars {
		out = strings.ReplaceAll(out, value, "$"+name)
	}
	for _, r := range random {
		out = r.pattern.ReplaceAllString(out, r.by)
	}
	return out, err
}

// checkMinted verifies what x509 mint wrote, as a peer would.
func checkMinted(t *testing.T, s *server, dir, jwt string) {
	t.Helper()
	svid, err := x509svid.Load(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	td := spiffeid.RequireTrustDomainFromString(trustDomain)
	bundle := x509bundle.New(td)
	data := must[[]byte](t)(os.ReadFile(filepath.Join(dir, "bundle.pem")))
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		bundle.AddX509Authority(must[*x509.Certificate](t)(x509.ParseCertificate(block.Bytes)))
	}
	if id, _, err := x509svid.Verify(svid.Certificates, bundle); err != nil || id.Path() != "/minted" {
		t.Errorf("the minted SVID: %s, %v", id, err)
	}
	if err := svid.Certificates[0].VerifyHostname("minted.internal"); err != nil {
		t.Errorf("the minted SVID: %v", err)
	}
	if strings.Count(jwt, ".") != 2 {
		t.Errorf("jwt mint gave no JWT-SVID")
	}
}
