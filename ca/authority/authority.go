// Package authority holds the X.509 and JWT authorities of the trust domain: it makes the first ones, follows their records
// in the store, checks what is to be issued and signs it. The CA calls it; nothing else signs for the trust domain.
//
// Authorities belong to the trust domain, not to a replica: all replicas on one store use the same. Only what CheckX509 has
// checked can be signed, and every SVID has one fixed profile. Private keys are in package keys; this package never sees
// their bytes, and knows nothing about who asks: whether a caller may hold an ID is decided before it is called.
package authority

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

// Defaults of Config.
const (
	DefaultX509Lifetime = 365 * 24 * time.Hour
	DefaultJWTLifetime  = 90 * 24 * time.Hour
	DefaultX509TTL      = time.Hour
	DefaultJWTTTL       = 5 * time.Minute
	DefaultMaxX509TTL   = 24 * time.Hour
	DefaultMaxJWTTTL    = time.Hour
	DefaultMaxAudiences = 16
	DefaultRefreshHint  = 5 * time.Minute
	DefaultUpstreamTTL  = 3 * 24 * time.Hour
)

// Backdate is how far before its issuance an SVID or authority begins to be valid, for verifiers whose clock is late.
const Backdate = 30 * time.Second

var (
	// ErrNoActive is returned when something is to be signed and no authority is active: none was activated after the last
	// one was revoked.
	ErrNoActive = errors.New("no active authority; prepare and activate one")

	// ErrExpired is returned when something is to be signed and the active authority is past its end, or the clock is
	// before its begin.
	ErrExpired = errors.New("the active authority is not valid now; check the clock, or prepare and activate a new authority")

	// ErrStopped is returned by everything that signs after the records of the authorities went back in state, changed
	// behind the CA's back or could not be read. The Set does not sign again until it is opened anew.
	ErrStopped = errors.New("issuing has stopped")

	// ErrRefused is in the chain of every error that says that a request itself cannot be issued, whatever the authorities
	// are. The text tells the caller what to change.
	ErrRefused = errors.New("refused")

	// ErrUnavailable is in the chain of every error that says that a key store, or the upstream CA, did not do what it was
	// asked. It may do so later; the text names it, and the key.
	ErrUnavailable = keys.ErrUnavailable
)

// Config says how a Set is opened.
type Config struct {
	// TrustDomain is the trust domain the authorities speak for. Names that Go's crypto/x509 cannot read back from a
	// certificate are refused. [DEC-03]
	TrustDomain spiffeid.TrustDomain

	// Store keeps the records of the authorities, under "authority/".
	Store store.Store

	// Seal encrypts the authorities' private keys, or where they are.
	Seal *keys.SealKey

	// Keys makes and opens the authorities' keys. Nil: new keys are made in this process and sealed in the store.
	Keys *keys.Ring

	// Exclusive says that no other process can have the store open. Then whatever an earlier process was at is taken over
	// at once.
	Exclusive bool

	// Now tells the time that ends up in SVIDs. Nil means time.Now.
	Now func() time.Time

	// Upstream is the CA that signs new X.509 authorities. Nil means that they sign themselves.
	Upstream Upstream

	// UpstreamTTL is the validity that is asked of Upstream for an X.509 authority; it may give less. Zero means 3 days.
	UpstreamTTL time.Duration

	// X509Lifetime and JWTLifetime are the lifetimes of the authorities that are made here from now on. Zero means a year for
	// X.509 and 90 days for JWT authorities.
	X509Lifetime, JWTLifetime time.Duration

	// DefaultX509TTL and DefaultJWTTTL are the validity of SVIDs for which no TTL was asked. Zero means 1 hour for
	// X509-SVIDs and 5 minutes for JWT-SVIDs.
	DefaultX509TTL, DefaultJWTTTL time.Duration

	// MaxX509TTL and MaxJWTTTL cut the validity that may be asked for. Zero means 24 hours for X509-SVIDs and 1 hour for
	// JWT-SVIDs.
	MaxX509TTL, MaxJWTTTL time.Duration

	// MaxAudiences is the most audiences a JWT-SVID may have. Each is another party that could replay it. Zero means 16.
	// [JWT-SVID §3.2]
	MaxAudiences int

	// RefreshHint is how often consumers of the bundle should fetch it. Zero means 5 minutes.
	RefreshHint time.Duration

	// Issuer is the iss claim of JWT-SVIDs, for OIDC federation. Empty means that there is none.
	Issuer string

	// WIT says whether WIT-SVIDs are issued.
	WIT WITConfig

	// Log gets a line for each change of the authorities. Nil means slog.Default.
	Log *slog.Logger
}

// check fills in the defaults and refuses what cannot work.
func (c *Config) check() error {
	if c.TrustDomain.IsZero() {
		return errors.New("trust_domain is not set")
	}
	if err := spiffe.CheckOwnTrustDomain(c.TrustDomain); err != nil {
		return err
	}
	if c.Store == nil {
		return errors.New("the authorities need a store")
	}
	if c.Seal == nil {
		return errors.New("no seal key; set seal.key_file, seal.systemd_credential or seal.kms")
	}
	if err := c.WIT.check(); err != nil {
		return err
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Keys == nil {
		c.Keys = keys.NewRing(keys.RingConfig{TrustDomain: c.TrustDomain, Log: c.Log})
	}
	if c.MaxAudiences == 0 {
		c.MaxAudiences = DefaultMaxAudiences
	}
	if c.MaxAudiences < 0 {
		return fmt.Errorf("max_audiences is %d; it must be at least 1", c.MaxAudiences)
	}
	for _, d := range []struct {
		name     string
		value    *time.Duration
		standard time.Duration
	}{
		{"x509 authority lifetime", &c.X509Lifetime, DefaultX509Lifetime},
		{"jwt authority lifetime", &c.JWTLifetime, DefaultJWTLifetime},
		{"max_x509_ttl", &c.MaxX509TTL, DefaultMaxX509TTL},
		{"max_jwt_ttl", &c.MaxJWTTTL, DefaultMaxJWTTTL},
		{"default_x509_ttl", &c.DefaultX509TTL, min(DefaultX509TTL, positive(c.MaxX509TTL, DefaultX509TTL))},
		{"default_jwt_ttl", &c.DefaultJWTTTL, min(DefaultJWTTTL, positive(c.MaxJWTTTL, DefaultJWTTTL))},
		{"refresh_hint", &c.RefreshHint, DefaultRefreshHint},
		{"the ttl asked of the upstream", &c.UpstreamTTL, DefaultUpstreamTTL},
	} {
		if *d.value == 0 {
			*d.value = d.standard
		}
		if *d.value < time.Second {
			return fmt.Errorf("%s is %v; it must be at least 1s", d.name, *d.value)
		}
	}
	for _, o := range []struct {
		small, large string
		a, b         time.Duration
	}{
		{"default_x509_ttl", "max_x509_ttl", c.DefaultX509TTL, c.MaxX509TTL},
		{"default_jwt_ttl", "max_jwt_ttl", c.DefaultJWTTTL, c.MaxJWTTTL},
		{"max_x509_ttl", "the x509 authority lifetime", c.MaxX509TTL, c.X509Lifetime},
		{"max_jwt_ttl", "the jwt authority lifetime", c.MaxJWTTTL, c.JWTLifetime},
	} {
		if o.a > o.b {
			return fmt.Errorf("%s is %v, longer than %s, which is %v; shorten the first or lengthen the second", o.small, o.a, o.large, o.b)
		}
	}
	return nil
}

func positive(d, otherwise time.Duration) time.Duration {
	if d > 0 {
		return d
	}
	return otherwise
}

// A Set is the authorities of the trust domain as of the newest record it was shown. Its methods may be called concurrently;
// those that sign take no lock.
type Set struct {
	config Config

	// owner names this process in intents; making is held by who makes a key.
	owner  string
	making chan struct{}

	// current is replaced as a whole by Load and Observe; what it points to is never changed.
	current atomic.Pointer[snapshot]

	// stopped holds the reason for which nothing is signed any more. It is set once, and then halted is closed.
	stopped atomic.Pointer[error]
	halted  chan struct{}

	// signatures counts, to pick the sample for self-checks.
	signatures atomic.Uint64

	// mu makes Load and Observe one after the other. No signature waits for it. It guards moved, which is closed and replaced
	// with each new snapshot.
	mu    sync.Mutex
	moved chan struct{}
}

// Open loads the trust domain's authorities from the store, or makes the first ones if the store has none. Of several
// replicas that open an empty store at once, one makes them and all use those. They are published (in Bundle) before
// anything is signed with them.
//
// errors.Is tells keys.ErrWrongSealKey and keys.ErrSealBroken.
func Open(ctx context.Context, c Config) (*Set, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	s := &Set{config: c, owner: newOwner(), making: make(chan struct{}, 1), moved: make(chan struct{}), halted: make(chan struct{})}
	// Whoever loses the commit of the first ones finds the winner's in the next round.
	for range 2 {
		items, err := s.list(ctx)
		if err != nil {
			return nil, err
		}
		if len(items) > 0 {
			if err := s.Load(items); err != nil {
				return s, err
			}
			s.settleIntents(ctx)
			if err := s.noteLongestTTLs(ctx); err != nil {
				return s, err
			}
			return s, s.switchWIT(ctx)
		}
		if err := s.makeFirst(ctx); err != nil {
			return nil, err
		}
	}
	return nil, errors.New("the store forgets the authorities as soon as they are written to it")
}

// Sealed tells whether the store holds authorities already, whose keys a seal key seals.
func Sealed(ctx context.Context, st store.Store) (bool, error) {
	found := errors.New("found")
	_, err := st.List(ctx, keyPrefix, 0, func(store.Item) error { return found })
	if errors.Is(err, found) {
		return true, nil
	}
	return false, err
}

// Health returns nil if the Set can sign all kinds of SVIDs that are in use now, or else why it cannot. A key store that does
// not answer is named together with its key.
func (s *Set) Health() error {
	x, err := s.activeX509(s.config.Now())
	if err != nil {
		return err
	}
	j, err := s.activeJWT(s.config.Now())
	if err != nil {
		return err
	}
	// All are asked, since asking tries a key store again that was down.
	xErr, jErr := x.key.Health(), j.key.Health()
	if xErr != nil {
		return fmt.Errorf("x509 authority %s: %w", x.id, xErr)
	}
	if jErr != nil {
		return fmt.Errorf("jwt authority %s: %w", j.id, jErr)
	}
	if !s.config.WIT.Enabled {
		return nil
	}
	w, err := s.activeWIT(s.config.Now())
	if err != nil {
		return err
	}
	if err := w.key.Health(); err != nil {
		return fmt.Errorf("wit authority %s: %w", w.id, err)
	}
	return nil
}

// Prove makes one signature with each active key that is in a key store, and logs which cannot. A CA starts without its key
// store, since most of its work needs no signature; so it is told of a wrong PIN at once, and Health says so.
func (s *Set) Prove(ctx context.Context) {
	now := s.config.Now()
	prove := func(use keys.Use, id string, key *keys.Key) {
		if err := key.Prove(ctx); err != nil && ctx.Err() == nil {
			s.config.Log.Error("an active authority cannot sign; its key store is asked again from time to time", "kind", string(use), "authority_id", id, "err", err)
		}
	}
	if a, err := s.activeX509(now); err == nil {
		prove(keys.UseX509, a.id, a.key)
	}
	if a, err := s.activeJWT(now); err == nil {
		prove(keys.UseJWT, a.id, a.key)
	}
	if !s.config.WIT.Enabled {
		return
	}
	if a, err := s.activeWIT(now); err == nil {
		prove(keys.UseWIT, a.id, a.key)
	}
}

func (s *Set) list(ctx context.Context) ([]store.Item, error) {
	var items []store.Item
	_, err := s.config.Store.List(ctx, keyPrefix, 0, func(item store.Item) error {
		if len(items) == maxRecords {
			return fmt.Errorf("more than %d records under %q in the store", maxRecords, keyPrefix)
		}
		items = append(items, item)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading the authorities from the store: %w", err)
	}
	return items, nil
}

// stop ends issuance for good and returns the reason.
func (s *Set) stop(cause error) error {
	err := fmt.Errorf("%w: %w", ErrStopped, cause)
	if s.stopped.CompareAndSwap(nil, &err) {
		close(s.halted)
		s.config.Log.Error("issuing has stopped", "trust_domain", s.config.TrustDomain.Name(), "err", cause)
	}
	return *s.stopped.Load()
}

// activeX509 returns the authority to sign X509-SVIDs with at now.
func (s *Set) activeX509(now time.Time) (*x509Authority, error) {
	if err := s.stopped.Load(); err != nil {
		return nil, *err
	}
	a := s.current.Load().activeX509
	if a == nil {
		return nil, fmt.Errorf("x509: %w", ErrNoActive)
	}
	if notBefore, notAfter := a.validity(); now.Before(notBefore) || !now.Before(notAfter) {
		return nil, fmt.Errorf("x509 authority %s is valid from %s to %s: %w", a.id, notBefore.UTC().Format(time.RFC3339), notAfter.UTC().Format(time.RFC3339), ErrExpired)
	}
	return a, nil
}

// activeJWT returns the authority to sign JWT-SVIDs with at now.
func (s *Set) activeJWT(now time.Time) (*jwtAuthority, error) {
	if err := s.stopped.Load(); err != nil {
		return nil, *err
	}
	return usableToken(KindJWT, s.current.Load().activeJWT, now)
}
