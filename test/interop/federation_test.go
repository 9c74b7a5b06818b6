package interop

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// TestFederationBundles gives a workload of a SPIRE agent the bundle of another trust domain, changes it, and takes it away.
func TestFederationBundles(t *testing.T) {
	ctx := bounded(t, 2*time.Minute)
	ca, a, _ := joined(t, ctx, "")
	federates(t, ctx, ca, a)
	must[string](t)(ca.spire(ctx, "bundle", "delete", "-id", "spiffe://partner.example"))
}

// federates gives a workload of agent a at the server the bundle of partner.example, changes it, and takes it away.
func federates(t *testing.T, ctx context.Context, at *server, a *agent) {
	t.Helper()
	partner := spiffeid.RequireTrustDomainFromString("partner.example")
	set := func(from *server) {
		t.Helper()
		bundle := writeFile(t, at.dir+"/partner.pem", must[string](t)(from.signet(ctx, "bundle", "show", "--format", "pem")))
		must[string](t)(at.spire(ctx, "bundle", "set", "-id", partner.IDString(), "-path", bundle))
	}
	first, second := startCA(t, ctx, ""), startCA(t, ctx, "")
	set(first)
	at.entry(ctx, "/friend", "/node", "-selector", self(), "-federatesWith", partner.IDString())
	a.serves(ctx, "/friend")
	src := newWorkload(t, ctx, a, "/friend").x509
	has := func(want string) {
		t.Helper()
		if err := eventually(ctx, func() error {
			b, err := src.GetX509BundleForTrustDomain(partner)
			switch {
			case want == "" && err == nil:
				return errors.New("the workload still has the bundle")
			case want == "":
				return nil
			case err != nil:
				return err
			}
			if got := fmt.Sprintf("%x", b.X509Authorities()[0].SubjectKeyId); got != want || len(b.X509Authorities()) != 1 {
				return fmt.Errorf("the workload has authority %s, want %s", got, want)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
	has(must[string](t)(first.active(ctx)))
	set(second)
	has(must[string](t)(second.active(ctx)))

	// An SVID of the partner is good at the workload.
	dir := t.TempDir()
	must[string](t)(second.signet(ctx, "svid", "mint", "x509", "--id", "/there", "--write", dir))
	svid := must[x509SVID](t)(loadSVID(dir))
	bundle := must[*x509bundle.Bundle](t)(src.GetX509BundleForTrustDomain(partner))
	if _, err := svid.Certificates[0].Verify(verifyOptions(bundle)); err != nil {
		t.Errorf("an SVID of the other server's: %v", err)
	}

	web := entryID(t, ctx, at, "/friend")
	must[string](t)(at.spire(ctx, "entry", "update", "-entryID", web, "-spiffeID", full("/friend"), "-parentID", full("/node"), "-selector", self()))
	has("")
}
