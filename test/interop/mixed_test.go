package interop

import (
	"testing"
	"time"
)

// TestMixedAgents has workloads of a SPIRE agent and of a signet agent under one CA call each other, while the CA is killed
// and their SVIDs are renewed.
func TestMixedAgents(t *testing.T) {
	foreign(t, envServer)
	ctx := bounded(t, 3*time.Minute)
	ca := startCA(t, ctx, short)
	bundle := ca.bundleFile(ctx)
	spireToken, _ := ca.joinToken(ctx, "/node/spire")
	spire := newSPIREAgent(t, agentConfig{server: ca, token: spireToken, bundle: bundle})
	signetToken, _ := ca.joinToken(ctx, "/node/signet") // of the stock command line, for our agent
	signet := newSignetAgent(t, agentConfig{server: ca, token: signetToken})
	spire.start()
	signet.start()
	ca.entry(ctx, "/at-spire", "/node/spire")
	ca.entry(ctx, "/at-signet", "/node/signet")
	spire.serves(ctx, "/at-spire")
	signet.serves(ctx, "/at-signet")
	if ids, err := signet.ids(ctx); err != nil || len(ids) != 1 {
		t.Errorf("the signet agent gives %q, %v; what is registered on the other node is not its own", ids, err)
	}
	servesAll(t, ctx, signet, "/at-signet") // SPIRE's client at our agent

	a, b := newWorkload(t, ctx, spire, "/at-spire"), newWorkload(t, ctx, signet, "/at-signet")
	first := [2]string{serialOf(t, a), serialOf(t, b)}
	tr := startTraffic(ctx, a, b)
	tr.more(t, ctx, 20)
	ca.kill()
	tr.more(t, ctx, 20)
	ca.up(ctx)
	if err := eventually(ctx, func() error {
		for i, w := range []*workload{a, b} {
			if serialOf(t, w) == first[i] {
				return errNotRenewed
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	tr.more(t, ctx, 20)
	tr.stop(t)
}
