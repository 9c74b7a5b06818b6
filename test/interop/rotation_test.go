package interop

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// authorityID asks for the state of the authorities of a kind by the stock command line.
func authorityID(t *testing.T, ctx context.Context, s *server, kind, state string) string {
	t.Helper()
	v := s.spireJSON(t, ctx, "localauthority", kind, "show")
	a, _ := v[state].(map[string]any)
	id, _ := a["authority_id"].(string)
	return id
}

// rotate prepares and activates a new authority of a kind and returns the IDs of the old one and the new one. Activation
// waits for the agents' acknowledgement, so it is tried until it is granted.
func rotate(t *testing.T, ctx context.Context, s *server, kind string) (before, after string) {
	t.Helper()
	before = authorityID(t, ctx, s, kind, "active")
	if _, err := s.spire(ctx, "localauthority", kind, "prepare"); err != nil {
		t.Fatal(err)
	}
	after = authorityID(t, ctx, s, kind, "prepared")
	if before == "" || after == "" || before == after {
		t.Fatalf("prepare %s: active %q, prepared %q", kind, before, after)
	}
	if err := eventually(ctx, func() error {
		_, err := s.spire(ctx, "localauthority", kind, "activate", "-authorityID", after)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return before, after
}

// TestRotation rotates both kinds of authorities under a SPIRE agent and a signet agent that have traffic: prepare,
// activate, taint, revoke. What a tainted authority signed is renewed at once, and no call fails.
func TestRotation(t *testing.T) {
	foreign(t, envServer)
	ctx := bounded(t, 4*time.Minute)
	ca := startCA(t, ctx, "")
	token, spireID := ca.joinToken(ctx, "/node/spire")
	spire := newSPIREAgent(t, agentConfig{server: ca, token: token, bundle: ca.bundleFile(ctx), extra: `experimental { sync_interval = "1s" }`})
	token, signetID := ca.joinToken(ctx, "/node/signet")
	signet := newSignetAgent(t, agentConfig{server: ca, token: token})
	spire.start()
	signet.start()
	ca.entry(ctx, "/at-spire", "/node/spire")
	ca.entry(ctx, "/at-signet", "/node/signet")
	spire.serves(ctx, "/at-spire")
	signet.serves(ctx, "/at-signet")
	a, b := newWorkload(t, ctx, spire, "/at-spire"), newWorkload(t, ctx, signet, "/at-signet")
	tr := startTraffic(ctx, a, b)
	tr.more(t, ctx, 10)

	before, after := rotate(t, ctx, ca, "x509")
	tr.more(t, ctx, 10)
	own := map[string]string{spireID: agentSerial(t, ctx, ca, spireID), signetID: agentSerial(t, ctx, ca, signetID)}
	if _, err := ca.spire(ctx, "localauthority", "x509", "taint", "-authorityID", before); err != nil {
		t.Fatal(err)
	}
	// The lives are an hour: nothing but the taint makes them renew now.
	for _, w := range []*workload{a, b} {
		if err := eventually(ctx, func() error {
			leaf := must[x509SVID](t)(w.x509.GetX509SVID()).Certificates[0]
			if got := fmt.Sprintf("%x", leaf.AuthorityKeyId); got != after {
				return fmt.Errorf("%s: its SVID is still signed by %s", w.name, got)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
	for id, serial := range own { // the agents' own SVIDs, too
		awaitOtherSerial(t, ctx, ca, id, serial)
	}
	if _, err := ca.spire(ctx, "localauthority", "x509", "revoke", "-authorityID", before); err != nil {
		t.Errorf("revoke: %v", err)
	}
	tr.more(t, ctx, 20)
	for _, w := range []*workload{a, b} {
		if err := eventually(ctx, func() error {
			bundle, err := w.x509.GetX509BundleForTrustDomain(w.id.TrustDomain())
			if err == nil && len(bundle.X509Authorities()) != 1 {
				err = fmt.Errorf("%s has %d authorities; the revoked one is to leave the bundle", w.name, len(bundle.X509Authorities()))
			}
			return err
		}); err != nil {
			t.Error(err)
		}
	}

	before, after = rotate(t, ctx, ca, "jwt")
	tr.more(t, ctx, 10)
	if _, err := ca.spire(ctx, "localauthority", "jwt", "taint", "-authorityID", before); err != nil {
		t.Fatal(err)
	}
	for _, w := range []*workload{a, b} {
		if err := eventually(ctx, func() error {
			if _, err := w.bearer(ctx); err != nil {
				return err
			}
			if out := w.keyID(); out != after {
				return fmt.Errorf("%s: its JWT-SVID is signed by %s, not by %s", w.name, out, after)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
	if _, err := ca.spire(ctx, "localauthority", "jwt", "revoke", "-authorityID", before); err != nil {
		t.Error(err)
	}
	tr.more(t, ctx, 20)
	tr.stop(t)
	if !spire.running() || strings.Contains(spire.out.String(), "panic") {
		t.Error(errors.New("the SPIRE agent did not survive"))
	}
}
