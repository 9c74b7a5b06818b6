package interop

import (
	"fmt"
	"net"
	"testing"
	"time"
)

// TestNestedSPIREServer puts an unmodified SPIRE server below signet's CA: it gets its X.509 authority from us and publishes its
// JWT keys through us. Workloads of its agents and of ours call each other, while our authority rotates.
func TestNestedSPIREServer(t *testing.T) {
	foreign(t, envAgent)
	foreign(t, envServer)
	ctx := bounded(t, 4*time.Minute)
	ca := startCA(t, ctx, "authorities: {refresh_hint: 1s}\n") // an activation waits for five, since another server fetches the bundle
	token, _ := ca.joinToken(ctx, "/node/top")
	top := newSignetAgent(t, agentConfig{server: ca, token: token})
	top.start()
	// The SPIRE server is a workload of our agent, with the right of a downstream CA.
	must[string](t)(ca.spire(ctx, "entry", "create", "-spiffeID", full("/nested-server"), "-parentID", full("/node/top"), "-selector", self(), "-downstream"))
	top.serves(ctx, "/nested-server")
	host, port, _ := net.SplitHostPort(ca.addr)
	nested := startSPIREServer(t, ctx, `ca_ttl = "1h"`, fmt.Sprintf(`UpstreamAuthority "spire" { plugin_data { server_address = %q server_port = %q workload_api_socket = %q } }`, host, port, top.socket))

	token, _ = nested.joinToken(ctx, "/node/below")
	below := newSPIREAgent(t, agentConfig{server: nested, token: token, bundle: nested.bundleFile(ctx), extra: `experimental { sync_interval = "1s" }`})
	below.start()
	nested.entry(ctx, "/below", "/node/below")
	below.serves(ctx, "/below")
	ca.entry(ctx, "/top", "/node/top")
	top.serves(ctx, "/top")
	a, b := newWorkload(t, ctx, top, "/top"), newWorkload(t, ctx, below, "/below")
	if chain := must[x509SVID](t)(b.x509.GetX509SVID()).Certificates; len(chain) != 2 {
		t.Errorf("an SVID of the nested server has %d certificates, want the leaf and the nested server's authority", len(chain))
	}
	trusts(t, ctx, 1, 2, a, b) // one root, and the JWT authorities of both
	tr := startTraffic(ctx, a, b)
	tr.more(t, ctx, 20)

	// The nested server asks for its next authority.
	before := serialOf(t, b)
	must[string](t)(nested.spire(ctx, "localauthority", "x509", "prepare"))
	must[string](t)(nested.spire(ctx, "localauthority", "x509", "activate", "-authorityID", authorityID(t, ctx, nested, "x509", "prepared")))
	must[string](t)(nested.spire(ctx, "localauthority", "jwt", "prepare"))
	trusts(t, ctx, 1, 3, a, b)
	must[string](t)(nested.spire(ctx, "localauthority", "jwt", "activate", "-authorityID", authorityID(t, ctx, nested, "jwt", "prepared")))
	must[string](t)(nested.spire(ctx, "entry", "update", "-entryID", entryID(t, ctx, nested, "/below"), "-spiffeID", full("/below"), "-parentID", full("/node/below"), "-selector", self(), "-dns", "below.internal"))
	if err := eventually(ctx, func() error {
		if serialOf(t, b) == before {
			return errNotRenewed
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	tr.more(t, ctx, 20)

	// Ours rotates: the nested server learns the new root from us before anything is signed with it.
	rotate(t, ctx, ca, "x509")
	trusts(t, ctx, 2, 3, a, b)
	tr.more(t, ctx, 20)
	tr.stop(t)
}
