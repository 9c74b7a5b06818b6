package authority

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/bolt"
)

var (
	testTD  = spiffeid.RequireTrustDomainFromString("example.org")
	testNow = time.Date(2027, 3, 4, 5, 6, 7, 890_000_000, time.UTC)
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDirVariable); dir != "" {
		openAsChild(dir)
		return
	}
	if dir := os.Getenv(lifeDirVariable); dir != "" {
		rotateAsChild(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

// openStore opens the store in dir until the test ends.
func openStore(t testing.TB, dir string) store.Store {
	t.Helper()
	s, err := bolt.Open(bolt.Config{Dir: dir, Reserve: 4096, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func testSealKey(t testing.TB) *keys.SealKey {
	t.Helper()
	seal, err := keys.CreateSealKey(filepath.Join(t.TempDir(), "seal.key"))
	if err != nil {
		t.Fatal(err)
	}
	return seal
}

// A clock is a Config.Now that tests move.
type clock struct{ nanoseconds atomic.Int64 }

func newClock(at time.Time) *clock {
	c := &clock{}
	c.set(at)
	return c
}

func (c *clock) now() time.Time   { return time.Unix(0, c.nanoseconds.Load()) }
func (c *clock) set(at time.Time) { c.nanoseconds.Store(at.UnixNano()) }

func testConfig(t testing.TB) Config {
	t.Helper()
	return Config{
		TrustDomain: testTD,
		Store:       openStore(t, t.TempDir()),
		Seal:        testSealKey(t),
		Now:         newClock(testNow).now,
		Log:         slog.New(slog.DiscardHandler),
	}
}

// openSet opens a Set on a new store, at testNow unless change says otherwise.
func openSet(t testing.TB, change ...func(*Config)) *Set {
	t.Helper()
	c := testConfig(t)
	for _, f := range change {
		f(&c)
	}
	s, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newPublicKey(t testing.TB) crypto.PublicKey { return newKey(t).Public() }

func mustID(t testing.TB, path string) spiffeid.ID {
	t.Helper()
	id, err := spiffeid.FromPath(testTD, path)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// records returns the records of the store by key.
func records(t testing.TB, s store.Store) map[string]store.Item {
	t.Helper()
	found := map[string]store.Item{}
	if _, err := s.List(t.Context(), keyPrefix, 0, func(item store.Item) error {
		found[item.Key] = item
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return found
}

// checkOneSet holds what must be true of every store that was opened at least once: an index, and one active authority of
// each kind.
func checkOneSet(t testing.TB, s store.Store) {
	t.Helper()
	active := map[string]int{}
	all := records(t, s)
	for key, item := range all {
		var r struct{ State State }
		if err := json.Unmarshal(item.Value, &r); err != nil {
			t.Fatal(err)
		}
		if _, kind := splitKey(key); r.State == StateActive {
			active[kind]++
		}
	}
	if _, ok := all[keyIndex]; !ok || len(all) != 3 || active[keyX509Prefix] != 1 || active[keyJWTPrefix] != 1 {
		t.Errorf("the store holds %d records (index: %t), active: %v; want the index and one active authority of each kind", len(all), ok, active)
	}
}

func TestFirstStartMakesOneSetAndLoadsItAgain(t *testing.T) {
	c := testConfig(t)
	first, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	checkOneSet(t, c.Store)
	again, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	checkOneSet(t, c.Store)
	if first.Pin() != again.Pin() || len(first.Pin()) != 64 {
		t.Errorf("pins %q and %q, want the same of 64 digits", first.Pin(), again.Pin())
	}
	if a, b := first.Bundle().JWT[0].KeyID, again.Bundle().JWT[0].KeyID; a != b {
		t.Errorf("JWT key ids %q and %q, want the same", a, b)
	}
	if err := again.Health(); err != nil {
		t.Error(err)
	}
}

// A meetingStore lets commits through only when all expected ones are there, so that every Open has seen an empty store.
type meetingStore struct {
	store.Store
	arrive  *sync.WaitGroup
	commits *atomic.Int64
}

func (m meetingStore) Commit(ctx context.Context, checks []store.Check, writes []store.Write) (store.Revision, error) {
	m.arrive.Done()
	m.arrive.Wait()
	m.commits.Add(1)
	return m.Store.Commit(ctx, checks, writes)
}

func TestRacingOpensGiveOneSet(t *testing.T) {
	const replicas = 8
	c := testConfig(t)
	var arrive sync.WaitGroup
	arrive.Add(replicas)
	var commits atomic.Int64
	c.Store = meetingStore{c.Store, &arrive, &commits}
	sets := make([]*Set, replicas)
	var wg sync.WaitGroup
	for i := range sets {
		wg.Go(func() {
			var err error
			if sets[i], err = Open(t.Context(), c); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	checkOneSet(t, c.Store)
	if commits.Load() != replicas {
		t.Errorf("%d commits were tried, want %d: the test did not race", commits.Load(), replicas)
	}
	for _, s := range sets {
		if s.Pin() != sets[0].Pin() || s.Bundle().JWT[0].KeyID != sets[0].Bundle().JWT[0].KeyID {
			t.Error("two replicas hold different authorities")
		}
	}
}

func TestDEC03_UnencodableTrustDomainRefused(t *testing.T) {
	for _, name := range []string{"a..b", ".a", "a."} {
		c := testConfig(t)
		c.TrustDomain = spiffeid.RequireTrustDomainFromString(name)
		if _, err := Open(t.Context(), c); err == nil || !strings.Contains(err.Error(), "X.509 peers written in Go") {
			t.Errorf("Open for trust domain %q = %v, want a refusal that says why", name, err)
		}
		if len(records(t, c.Store)) != 0 {
			t.Errorf("Open for trust domain %q wrote to the store", name)
		}
	}
	for _, name := range []string{"10.0.0.1", "my_td", "-", "xn--mnchen-3ya.de", strings.Repeat("a", 255)} {
		s := openSet(t, func(c *Config) { c.TrustDomain = spiffeid.RequireTrustDomainFromString(name) })
		if got := s.Bundle().X509[0].Certificate.URIs[0].String(); got != "spiffe://"+name {
			t.Errorf("authority of %q has the ID %q", name, got)
		}
	}
}

func TestConfigIsChecked(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"no trust domain", func(c *Config) { c.TrustDomain = spiffeid.TrustDomain{} }, "trust_domain is not set"},
		{"no store", func(c *Config) { c.Store = nil }, "need a store"},
		{"no seal key", func(c *Config) { c.Seal = nil }, "seal.key_file"},
		{"negative lifetime", func(c *Config) { c.X509Lifetime = -time.Hour }, "x509 authority lifetime is -1h0m0s"},
		{"TTL below a second", func(c *Config) { c.DefaultJWTTTL = time.Millisecond }, "default_jwt_ttl is 1ms"},
		{"default over maximum", func(c *Config) { c.DefaultX509TTL, c.MaxX509TTL = 2*time.Hour, time.Hour }, "default_x509_ttl is 2h0m0s, longer than max_x509_ttl"},
		{"maximum over authority", func(c *Config) { c.MaxJWTTTL = 100 * 24 * time.Hour }, "longer than the jwt authority lifetime"},
		{"negative audiences", func(c *Config) { c.MaxAudiences = -1 }, "max_audiences is -1"},
	} {
		c := testConfig(t)
		tt.change(&c)
		if _, err := Open(t.Context(), c); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: Open = %v, want an error with %q", tt.name, err, tt.want)
		}
	}
	// A maximum below the standard default lowers the default.
	s := openSet(t, func(c *Config) { c.MaxX509TTL, c.MaxJWTTTL = time.Minute, time.Minute })
	if s.config.DefaultX509TTL != time.Minute || s.config.DefaultJWTTTL != time.Minute {
		t.Errorf("defaults are %v and %v, want the maxima of 1m", s.config.DefaultX509TTL, s.config.DefaultJWTTTL)
	}
}

func TestWrongSealKeyNamesTheAuthority(t *testing.T) {
	c := testConfig(t)
	s, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	c.Seal = testSealKey(t)
	_, err = Open(t.Context(), c)
	if !errors.Is(err, keys.ErrWrongSealKey) {
		t.Fatalf("Open with another seal key = %v, want ErrWrongSealKey", err)
	}
	b := s.Bundle()
	if !strings.Contains(err.Error(), b.X509[0].ID) && !strings.Contains(err.Error(), b.JWT[0].KeyID) {
		t.Errorf("error %q names neither authority", err)
	}
	checkOneSet(t, c.Store)
}

func TestStoreOfAnotherTrustDomainRefused(t *testing.T) {
	c := testConfig(t)
	if _, err := Open(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	c.TrustDomain = spiffeid.RequireTrustDomainFromString("example.com")
	if _, err := Open(t.Context(), c); err == nil || !strings.Contains(err.Error(), `"example.org"`) || !strings.Contains(err.Error(), `"example.com"`) {
		t.Errorf("Open = %v, want a refusal that names both trust domains", err)
	}
}

func TestStoreErrorsEndOpen(t *testing.T) {
	c := testConfig(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, c); !errors.Is(err, context.Canceled) {
		t.Errorf("Open with an ended context = %v", err)
	}
}
