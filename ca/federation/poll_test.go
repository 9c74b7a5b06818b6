package federation

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store/bolt"
	"github.com/signet-id/signet/spiffe"
)

var own = spiffeid.RequireTrustDomainFromString("example.org")

// A world is a registry on a store, a poller, and what it wrote into the audit log.
type world struct {
	t        *testing.T
	registry *registry.Registry
	poller   *Poller

	mu      sync.Mutex
	records []auditlog.Record // guarded by mu
	broken  error             // guarded by mu: what the audit log answers
}

// open makes a world; stop ends it.
func open(t *testing.T, fetch func(context.Context, *registry.Federation) (*spiffebundle.Bundle, []error, error)) (w *world, stop func()) {
	t.Helper()
	s, err := bolt.Open(bolt.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	r, err := registry.Open(t.Context(), registry.Config{TrustDomain: own, Store: s})
	if err != nil {
		t.Fatal(err)
	}
	w = &world{t: t, registry: r}
	w.poller = New(Config{Registry: r, Fetch: fetch, Actor: "spiffe://example.org/spire/server", Audit: func(_ context.Context, rec auditlog.Record) error {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.records = append(w.records, rec)
		return w.broken
	}})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := r.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	return w, func() { cancel(); wg.Wait(); s.Close() }
}

func (w *world) create(rel *registry.Federation, bundle []byte) {
	w.t.Helper()
	if err := w.registry.CreateFederation(w.t.Context(), rel, bundle); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) events() (out []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range w.records {
		out = append(out, r.Event)
	}
	return out
}

func (w *world) stored() *spiffebundle.Bundle {
	w.t.Helper()
	b, err := w.registry.Bundle(partner)
	if err != nil {
		return nil
	}
	parsed, _, err := spiffe.ParseBundle(partner, b.Content)
	if err != nil {
		w.t.Fatal(err)
	}
	return parsed
}

// sample is a bundle with a sequence, a refresh hint and one key.
func sample(t testing.TB, sequence uint64, hint time.Duration, kid string) *spiffebundle.Bundle {
	t.Helper()
	b := spiffebundle.New(partner)
	if sequence > 0 {
		b.SetSequenceNumber(sequence)
	}
	b.SetRefreshHint(hint)
	if err := b.AddJWTAuthority(kid, newKey(t).Public()); err != nil {
		t.Fatal(err)
	}
	return b
}

// times are when something happened.
type times struct {
	mu sync.Mutex
	at []time.Time // guarded by mu
}

func (s *times) add(t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at = append(s.at, t)
}

func (s *times) all() []time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.at)
}

// FED-06, FED-27: the bundle is fetched at once, then at its refresh hint with jitter, and after a failure no sooner.
func TestFED_27_PollsAtTheRefreshHintAndNoSoonerAfterFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bundle := sample(t, 1, 10*time.Minute, "k")
		var seen times
		var fail atomic.Bool
		w, stop := open(t, func(context.Context, *registry.Federation) (*spiffebundle.Bundle, []error, error) {
			seen.add(time.Now())
			if fail.Load() {
				return nil, nil, errors.New("down")
			}
			return bundle.Clone(), nil, nil
		})
		defer stop()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.poller.Run(ctx) }()
		start := time.Now()
		w.create(web("https://partner.example/"), nil)
		synctest.Wait()
		at := seen.all()
		if len(at) != 1 || at[0].Sub(start) > time.Second || w.stored() == nil {
			t.Fatalf("a new relationship: fetched at %v, stored %v", at, w.stored())
		}
		for len(seen.all()) < 11 {
			time.Sleep(time.Minute)
			synctest.Wait()
		}
		fail.Store(true)
		for len(seen.all()) < 21 {
			time.Sleep(time.Minute)
			synctest.Wait()
		}
		at = seen.all()
		for i := 1; i < len(at); i++ {
			if d := at[i].Sub(at[i-1]); d < 9*time.Minute || d > 11*time.Minute+maxSleep {
				t.Errorf("fetch %d came %v after the one before, want 10 minutes or so", i, d)
			}
		}
		jitter := map[time.Duration]bool{}
		for i := 1; i < len(at); i++ {
			jitter[at[i].Sub(at[i-1])] = true
		}
		if len(jitter) < 5 {
			t.Errorf("%d different intervals in %d: no jitter", len(jitter), len(at)-1)
		}
		// One change and one beginning of a failure are in the audit log, not every poll; the old bundle stays. [FED-28]
		if got := strings.Join(w.events(), " "); got != "federation.fetched federation.failed" {
			t.Errorf("audit: %s", got)
		}
		if st := w.poller.Statuses(); len(st) != 1 || st[0].Err == nil || st[0].SucceededAt.IsZero() || !st[0].FetchedAt.After(st[0].SucceededAt) {
			t.Errorf("status %+v", st)
		}
		if w.stored() == nil {
			t.Error("the last good bundle is gone")
		}
		// Ending the relationship ends the polling and the trust. [FED-29]
		if err := w.registry.DeleteFederation(t.Context(), partner); err != nil {
			t.Fatal(err)
		}
		n := len(seen.all())
		time.Sleep(time.Hour)
		synctest.Wait()
		if at = seen.all(); len(at) != n || w.stored() != nil || len(w.poller.Statuses()) != 0 {
			t.Errorf("%d fetches after the end; bundle %v", len(at)-n, w.stored())
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// A changed relationship is fetched at once, and what was fetched from the old address is not stored.
func TestChangedRelationshipIsFetchedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := sample(t, 5, time.Hour, "first"), sample(t, 6, time.Hour, "second")
		hold := make(chan struct{})
		w, stop := open(t, func(ctx context.Context, rel *registry.Federation) (*spiffebundle.Bundle, []error, error) {
			if rel.URL == "https://old.example/" {
				<-hold
				return first.Clone(), nil, nil
			}
			return second.Clone(), nil, nil
		})
		defer stop()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.poller.Run(ctx) }()
		w.create(web("https://old.example/"), nil)
		synctest.Wait()
		if _, err := w.registry.UpdateFederation(t.Context(), partner, func(f *registry.Federation) error { f.URL = "https://new.example/"; return nil }, nil); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		close(hold)
		synctest.Wait()
		if b := w.stored(); b == nil || !b.HasJWTAuthority("second") || b.HasJWTAuthority("first") {
			t.Errorf("stored %v; want what the new address serves", b)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// FED-08, FED-09, FED-10, V125: which bundle takes the place of which.
func TestFED_08_OlderSequenceIsNotAdopted(t *testing.T) {
	var next *spiffebundle.Bundle
	w, stop := open(t, func(context.Context, *registry.Federation) (*spiffebundle.Bundle, []error, error) {
		return next.Clone(), nil, nil
	})
	defer stop()
	w.create(web("https://partner.example/"), nil)
	nine := sample(t, 9, time.Hour, "nine")
	nineChanged := sample(t, 9, time.Hour, "nine-changed")
	for _, tt := range []struct {
		name   string
		bundle *spiffebundle.Bundle
		kid    string
		text   string
	}{
		{"the first", nine, "nine", ""},
		{"the same", nine, "nine", ""},
		{"older [V125]", sample(t, 7, time.Hour, "seven"), "nine", "FED-08"},
		{"same sequence, other content [TDB-05]", nineChanged, "nine-changed", ""},
		{"newer", sample(t, 10, time.Hour, "ten"), "ten", ""},
		{"no sequence: the latest wins [FED-09]", sample(t, 0, time.Hour, "none"), "none", ""},
		{"empty [TDB-11]", spiffebundle.New(partner), "", ""},
	} {
		next = tt.bundle
		err := w.poller.Refresh(t.Context(), partner)
		if tt.text == "" && err != nil || tt.text != "" && (err == nil || !strings.Contains(err.Error(), tt.text)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.text)
		}
		if b := w.stored(); b == nil || tt.kid != "" && !b.HasJWTAuthority(tt.kid) || tt.kid == "" && !b.Empty() {
			t.Errorf("%s: stored %v, want the key %q", tt.name, b, tt.kid)
		}
	}
	// What an operator sets by hand counts until the next refresh. [FED-10]
	doc, err := spiffe.MarshalBundle(sample(t, 0, time.Hour, "by-hand"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.registry.SetBundle(t.Context(), partner, doc); err != nil || !w.stored().HasJWTAuthority("by-hand") {
		t.Fatal(err)
	}
	next = nine
	if err := w.poller.Refresh(t.Context(), partner); err != nil || !w.stored().HasJWTAuthority("nine") {
		t.Errorf("the next refresh: %v, stored %v", err, w.stored())
	}
	if err := w.poller.Refresh(t.Context(), own); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("a trust domain without a relationship: %v", err)
	}
}

// A bundle that cannot be recorded in the audit log is not adopted.
func TestNothingIsAdoptedUnlogged(t *testing.T) {
	bundle := sample(t, 1, time.Hour, "k")
	w, stop := open(t, func(context.Context, *registry.Federation) (*spiffebundle.Bundle, []error, error) {
		return bundle, nil, nil
	})
	defer stop()
	w.broken = errors.New("disk full")
	w.create(web("https://partner.example/"), nil)
	if err := w.poller.Refresh(t.Context(), partner); err == nil || w.stored() != nil {
		t.Errorf("Refresh: %v; stored %v", err, w.stored())
	}
}

// FED-55: after the first fetch a self-serving endpoint is verified by the latest bundle, not by the one to begin with.
func TestFED_55_SelfServingEndpointRotatesItsRoot(t *testing.T) {
	roots := []*issuer{newIssuer(t, partner), newIssuer(t, partner), newIssuer(t, partner)}
	const id = "spiffe://partner.example/bundle"
	var shown *issuer
	var doc []byte
	publish := func(sequence uint64, by *issuer, which ...*issuer) {
		b := spiffebundle.New(partner)
		for _, r := range which {
			b.AddX509Authority(r.cert)
		}
		b.SetSequenceNumber(sequence)
		var err error
		if doc, err = spiffe.MarshalBundle(b); err != nil {
			t.Fatal(err)
		}
		shown = by
	}
	// Each step has a server of its own, since a server's certificate is fixed.
	var w *world
	fetcher := &Fetcher{Bundles: sourceFunc(func(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
		b, err := w.registry.Bundle(td)
		if err != nil {
			return nil, err
		}
		parsed, _, err := spiffe.ParseBundle(td, b.Content)
		if err != nil {
			return nil, err
		}
		return parsed.X509Bundle(), nil
	})}
	w, stop := open(t, func(ctx context.Context, rel *registry.Federation) (*spiffebundle.Bundle, []error, error) {
		at := *rel
		at.URL = serve(t, shown.leaf(id, nil), func(w http.ResponseWriter, _ *http.Request) { w.Write(doc) })
		return fetcher.Fetch(ctx, &at)
	})
	defer stop()
	rel := &registry.Federation{TrustDomain: partner, URL: "https://127.0.0.1:1/", Profile: registry.ProfileSPIFFE, EndpointID: spiffeid.RequireFromString(id)}
	if err := w.registry.CreateFederation(t.Context(), rel, nil); err == nil || !strings.Contains(err.Error(), "not known") {
		t.Errorf("without a bundle to begin with [FED-50]: %v", err)
	}
	w.create(rel, document(t, roots[0].cert, 1))
	for i, step := range []struct {
		by    *issuer
		which []*issuer
		good  bool
	}{
		{roots[0], []*issuer{roots[0], roots[1]}, true},
		{roots[1], []*issuer{roots[1], roots[2]}, true},
		{roots[0], []*issuer{roots[0]}, false}, // the bootstrap root is no longer good
		{roots[2], []*issuer{roots[2]}, true},
	} {
		publish(uint64(i+2), step.by, step.which...)
		if err := w.poller.Refresh(t.Context(), partner); (err == nil) != step.good {
			t.Errorf("step %d: %v, want good %t", i, err, step.good)
		}
	}
	if b := w.stored(); !b.HasX509Authority(roots[2].cert) || len(b.X509Authorities()) != 1 {
		t.Errorf("stored at last: %v", b)
	}
}

type sourceFunc func(spiffeid.TrustDomain) (*x509bundle.Bundle, error)

func (f sourceFunc) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return f(td)
}

// Many relationships are fetched a few at a time, and all of them.
func TestManyEndpointsAFewAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		running, most := 0, 0
		fetched := map[string]int{}
		w, stop := open(t, func(_ context.Context, rel *registry.Federation) (*spiffebundle.Bundle, []error, error) {
			mu.Lock()
			running++
			most = max(most, running)
			fetched[rel.TrustDomain.Name()]++
			mu.Unlock()
			time.Sleep(time.Second)
			mu.Lock()
			running--
			mu.Unlock()
			return nil, nil, errors.New("down")
		})
		defer stop()
		const n = 50
		for i := range n {
			w.create(&registry.Federation{TrustDomain: spiffeid.RequireTrustDomainFromString(fmt.Sprintf("td%d.example", i)), URL: "https://h/", Profile: registry.ProfileWeb}, nil)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.poller.Run(ctx) }()
		time.Sleep(time.Minute)
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if len(fetched) != n || most > maxFetches {
			t.Errorf("%d of %d fetched, %d at once; at most %d may be", len(fetched), n, most, maxFetches)
		}
	})
}
