package svidcache

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// An authority of the test's CA.
type authority struct {
	id   string
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t testing.TB, id string) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(10 * 365 * 24 * time.Hour),
		Subject: pkix.Name{CommonName: id}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{{Scheme: "spiffe", Host: td.Name()}}, SubjectKeyId: []byte("ski of " + id),
	}, &x509.Certificate{}, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{id: id, key: key, cert: cert}
}

// A testCA signs like a real one. Its fields are set before use or under mu.
type testCA struct {
	t testing.TB

	mu       sync.Mutex
	active   *authority
	jwtKey   *authority
	entries  map[string]*nodev1.Entry
	ttl      time.Duration
	skew     time.Duration              // of its clock
	fail     func(entryID string) error // nil: never
	failJWT  error                      //
	syncErr  error                      //
	onSync   func()                     //
	gate     chan struct{}              // non-nil: NewJWTSVID waits for it
	issued   map[string]int             // by entry
	batches  []int                      // sizes
	jwts     int                        //
	syncs    int                        //
	inUse    []string
	handedOn [][]string //
	kid      string     // of JWT-SVIDs
}

func newTestCA(t testing.TB) *testCA {
	return &testCA{
		t: t, active: newAuthority(t, "a1"), jwtKey: newAuthority(t, "jwt"), entries: make(map[string]*nodev1.Entry), ttl: time.Hour, issued: make(map[string]int), kid: "k1",
	}
}

func (ca *testCA) IssueX509(_ context.Context, requests []X509Request) []X509Answer {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.batches = append(ca.batches, len(requests))
	answers := make([]X509Answer, len(requests))
	for i, r := range requests {
		answers[i] = ca.sign(r)
	}
	return answers
}

func (ca *testCA) sign(r X509Request) X509Answer {
	if ca.fail != nil {
		if err := ca.fail(r.EntryID); err != nil {
			return X509Answer{Err: err}
		}
	}
	e := ca.entries[r.EntryID]
	if e == nil {
		return X509Answer{Err: errors.New("entry not found")}
	}
	public, err := x509.ParsePKIXPublicKey(r.PublicKey)
	if err != nil {
		return X509Answer{Err: err}
	}
	id, err := url.Parse(e.GetSpiffeId())
	if err != nil {
		return X509Answer{Err: err}
	}
	now := time.Now().Add(ca.skew)
	ca.issued[r.EntryID]++
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(int64(len(ca.batches)*1000 + ca.issued[r.EntryID])), NotBefore: now.Add(-30 * time.Second), NotAfter: now.Add(ca.ttl),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, URIs: []*url.URL{id},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, ca.active.cert, public, ca.active.key)
	if err != nil {
		return X509Answer{Err: err}
	}
	return X509Answer{Chain: [][]byte{der}, EntryRevision: e.GetRevision()}
}

func (ca *testCA) NewJWTSVID(ctx context.Context, entryID string, audience []string) (JWTAnswer, error) {
	ca.mu.Lock()
	gate := ca.gate
	ca.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return JWTAnswer{}, ctx.Err()
		}
	}
	ca.mu.Lock()
	defer ca.mu.Unlock()
	if ca.failJWT != nil {
		return JWTAnswer{}, ca.failJWT
	}
	ca.jwts++
	header := base64.RawURLEncoding.EncodeToString([]byte(fmt.Sprintf(`{"alg":"ES256","kid":%q}`, ca.kid)))
	aud := fmt.Sprintf(`"%s"`, strings.Join(audience, `","`))
	payload := base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"sub":%q,"aud":[%s]}`, ca.entries[entryID].GetSpiffeId(), aud))
	return JWTAnswer{
		Token:    fmt.Sprintf("%s.%s.%d", header, payload, ca.jwts),
		IssuedAt: time.Now().Add(ca.skew), ExpiresAt: time.Now().Add(ca.skew + 5*time.Minute),
	}, nil
}

func (ca *testCA) Sync(context.Context) error {
	ca.mu.Lock()
	ca.syncs++
	err, f := ca.syncErr, ca.onSync
	ca.mu.Unlock()
	if f != nil {
		f()
	}
	return err
}

func (ca *testCA) HandedOn(ids []string) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.handedOn = append(ca.handedOn, slices.Clone(ids))
}

func (ca *testCA) InUse(ids []string) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.inUse = ids
}

func (ca *testCA) lastInUse() []string {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return ca.inUse
}

func (ca *testCA) lastHandedOn() []string {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	if len(ca.handedOn) == 0 {
		return nil
	}
	return ca.handedOn[len(ca.handedOn)-1]
}

func (ca *testCA) count(f func(*testCA) int) int {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return f(ca)
}

// bundle is the own bundle with the given authorities; a name that ends in "!" is tainted.
func (ca *testCA) bundle(revision int64, jwtKeys []string, authorities ...*authority) *nodev1.Bundle {
	b := &nodev1.Bundle{TrustDomain: td.Name(), Revision: revision}
	for _, a := range authorities {
		b.X509Authorities = append(b.X509Authorities, &nodev1.X509Authority{
			Certificate: a.cert.Raw, AuthorityId: a.id, State: nodev1.AuthorityState_AUTHORITY_STATE_ACTIVE,
		})
	}
	public, err := x509.MarshalPKIXPublicKey(ca.jwtKey.key.Public())
	if err != nil {
		ca.t.Fatal(err)
	}
	for _, id := range jwtKeys {
		state := nodev1.AuthorityState_AUTHORITY_STATE_ACTIVE
		name, tainted := strings.CutSuffix(id, "!")
		if tainted {
			state = nodev1.AuthorityState_AUTHORITY_STATE_TAINTED
		}
		b.JwtAuthorities = append(b.JwtAuthorities, &nodev1.JWTAuthority{KeyId: name, PublicKey: public, State: state})
	}
	return b
}

// A world is a cache with its CA, running inside a synctest bubble.
type world struct {
	t     testing.TB
	ca    *testCA
	cache *Cache
	ctx   context.Context
	jump  func(time.Duration)

	revision int64
}

func newWorld(t testing.TB, change func(*Config)) *world {
	t.Helper()
	w := &world{t: t, ca: newTestCA(t)}
	var mu sync.Mutex
	var offset time.Duration
	w.jump = func(d time.Duration) {
		mu.Lock()
		defer mu.Unlock()
		offset += d
	}
	config := Config{
		TrustDomain: td, CA: w.ca, ServiceMatches: policy.ServiceMatches, Log: slog.New(slog.DiscardHandler),
		Now: func() time.Time {
			mu.Lock()
			defer mu.Unlock()
			return time.Now().Add(offset)
		},
	}
	if change != nil {
		change(&config)
	}
	cache, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	w.cache = cache
	ctx, cancel := context.WithCancel(context.Background())
	w.ctx = ctx
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := cache.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return w
}

// start applies a snapshot with the own bundle and the given entries.
func (w *world) start(entries ...*nodev1.Entry) {
	w.t.Helper()
	w.revision++
	deny := policyv1.DefaultsMode_DEFAULTS_MODE_DENY
	m := &nodev1.FollowResponse{
		Epoch: "e1", To: w.revision, Snapshot: true, Complete: true, Entries: w.stamp(entries), PolicyDefaults: &deny,
		Bundles: []*nodev1.Bundle{w.ca.bundle(w.revision, []string{"k1"}, w.ca.active)},
	}
	w.apply(m)
}

func (w *world) stamp(entries []*nodev1.Entry) []*nodev1.Entry {
	w.ca.mu.Lock()
	defer w.ca.mu.Unlock()
	for _, e := range entries {
		if e.Revision == 0 {
			e.Revision = w.revision
		}
		w.ca.entries[e.Id] = e
	}
	return entries
}

// change applies differences.
func (w *world) change(m *nodev1.FollowResponse) {
	w.t.Helper()
	m.Epoch, m.From = "e1", w.revision
	w.revision++
	m.To = w.revision
	w.stamp(m.Entries)
	w.apply(m)
}

func (w *world) apply(m *nodev1.FollowResponse) {
	w.t.Helper()
	if err := w.cache.Apply(m); err != nil {
		w.t.Fatalf("Apply: %v", err)
	}
	w.checkInvariants()
}

// checkInvariants says whether the cache agrees with itself.
func (w *world) checkInvariants() {
	w.t.Helper()
	c := w.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.state.Load()
	indexed := 0
	s.index.all(func(sel spiffe.Selector, list []*entry) bool {
		for _, e := range list {
			indexed++
			if have, ok := s.entries.get(e.id); !ok || have != e || e.indexed != sel {
				w.t.Errorf("the index lists entry %q under %v, which is not held so", e.id, sel)
			}
		}
		return true
	})
	if indexed != s.entries.len() {
		w.t.Errorf("the index lists %d entries, %d are held", indexed, s.entries.len())
	}
	if c.idle.Len() > c.config.MaxPrefetch {
		w.t.Errorf("%d idle SVIDs, more than the %d allowed", c.idle.Len(), c.config.MaxPrefetch)
	}
	for id, r := range c.records {
		if _, ok := s.entries.get(id); !ok {
			w.t.Errorf("there is a record of entry %q, which does not exist", id)
		}
		if (len(r.watchers) == 0) != (r.idle != nil) {
			w.t.Errorf("record %q has %d watchers, idle %t", id, len(r.watchers), r.idle != nil)
		}
	}
}

func anEntry(id, path string, selectors ...string) *nodev1.Entry {
	return &nodev1.Entry{Id: id, SpiffeId: "spiffe://example.org" + path, Selectors: selectors, CreatedAt: 1000}
}

func caller(uid uint32, selectors ...string) workloadapi.Caller {
	c := workloadapi.Caller{PID: 1, UID: uid}
	for _, s := range selectors {
		parsed, err := spiffe.ParseSelector(s)
		if err != nil {
			panic(err)
		}
		c.Selectors = append(c.Selectors, parsed)
	}
	return c
}

// watch subscribes until the test ends.
func (w *world) watch(c workloadapi.Caller) (updates <-chan workloadapi.Update, stop func()) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.ctx)
	updates, err := w.cache.Watch(ctx, c)
	if err != nil {
		w.t.Fatalf("Watch: %v", err)
	}
	return updates, func() {
		cancel()
		for range updates { // drained until closed
		}
	}
}

// next returns the next update, which must come without time passing beyond d.
func (w *world) next(updates <-chan workloadapi.Update, d time.Duration) workloadapi.Update {
	w.t.Helper()
	timer := time.NewTimer(max(d, 1)) // fires only when everything else in the bubble is blocked
	defer timer.Stop()
	select {
	case u, ok := <-updates:
		if !ok {
			w.t.Fatal("the channel of updates was closed")
		}
		return u
	case <-timer.C:
		w.t.Fatalf("no update within %s", d)
	}
	panic("unreachable")
}

// silent fails if an update comes within d.
func (w *world) silent(updates <-chan workloadapi.Update, d time.Duration) {
	w.t.Helper()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case u := <-updates:
		w.t.Errorf("an update with %d identities came where nothing changed", len(u.Identities))
	case <-timer.C:
	}
}

func ids(u workloadapi.Update) string {
	var out []string
	for _, i := range u.Identities {
		out = append(out, i.ID.Path())
	}
	return strings.Join(out, " ")
}

func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}
