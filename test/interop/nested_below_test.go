package interop

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestSignetBelowSPIRE puts signet's CA below an unmodified SPIRE server: its X.509 authority is signed there, and its JWT keys
// are published there. Workloads of SPIRE's agent and of ours call each other, while the SPIRE server's root rotates.
func TestSignetBelowSPIRE(t *testing.T) {
	foreign(t, envAgent)
	foreign(t, envServer)
	ctx := bounded(t, 4*time.Minute)
	spire := startSPIREServer(t, ctx, `ca_ttl = "1h"`, "")
	token, _ := spire.joinToken(ctx, "/node/top")
	top := newSPIREAgent(t, agentConfig{server: spire, token: token, bundle: spire.bundleFile(ctx), extra: `experimental { sync_interval = "1s" }`})
	top.start()
	// Our CA is a workload of SPIRE's agent, with the right of a downstream CA.
	must[string](t)(spire.spire(ctx, "entry", "create", "-spiffeID", full("/nested-ca"), "-parentID", full("/node/top"), "-selector", self(), "-downstream"))
	top.serves(ctx, "/nested-ca")
	ca := startCA(t, ctx, fmt.Sprintf("upstream: {spire: {server_address: %q, agent_socket: %s, spiffe_id: %q}}\n", spire.addr, top.socket, full("/nested-ca")))

	token, _ = ca.joinToken(ctx, "/node/below") // its pin is that of SPIRE's root
	below := newSignetAgent(t, agentConfig{server: ca, token: token})
	below.start()
	ca.entry(ctx, "/below", "/node/below")
	below.serves(ctx, "/below")
	spire.entry(ctx, "/top", "/node/top")
	top.serves(ctx, "/top")
	a, b := newWorkload(t, ctx, top, "/top"), newWorkload(t, ctx, below, "/below")
	if chain := must[x509SVID](t)(b.x509.GetX509SVID()).Certificates; len(chain) != 2 {
		t.Errorf("an SVID of the lower CA has %d certificates, want the leaf and the intermediate", len(chain))
	}
	trusts(t, ctx, 1, 2, a, b) // one root, and the JWT authorities of both
	tr := startTraffic(ctx, a, b)
	tr.more(t, ctx, 20)

	// The stock command line may not taint what only the upstream has.
	if out, err := ca.spire(ctx, "localauthority", "x509", "taint", "-authorityID", authorityID(t, ctx, ca, "x509", "active")); err == nil || !strings.Contains(out+err.Error(), "upstream authority is configured") {
		t.Errorf("tainting a local authority below an upstream: %s, %v", out, err)
	}
	// SPIRE's root rotates: we learn the new one before anything is signed with it, and so does everybody below.
	must[string](t)(spire.spire(ctx, "localauthority", "x509", "prepare"))
	trusts(t, ctx, 2, 2, a, b)
	must[string](t)(spire.spire(ctx, "localauthority", "x509", "activate", "-authorityID", authorityID(t, ctx, spire, "x509", "prepared")))
	tr.more(t, ctx, 20)
	tr.stop(t)
}
