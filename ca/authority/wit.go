package authority

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/store"
)

// Defaults of WITConfig.
const (
	DefaultWITLifetime = DefaultJWTLifetime
	DefaultWITTTL      = time.Hour
	DefaultMaxWITTTL   = 24 * time.Hour
)

// ErrNoWIT is returned for everything about WIT-SVIDs while they are not enabled.
var ErrNoWIT = errors.New("WIT-SVIDs are not enabled; set wit.enabled in the CA's configuration")

// WITConfig says whether and how WIT-SVIDs are issued. They are incubating in the standard, and a bundle that holds WIT
// authorities is refused as a whole by some older consumers, so that the zero value is: not at all. [WIT-52, STAB-01]
type WITConfig struct {
	// Enabled makes a WIT authority, publishes it and allows issuance. Without it the WIT authorities of the store are
	// kept, but neither published nor used.
	Enabled bool

	// Lifetime is that of the authorities that are made from now on. Zero means 90 days.
	Lifetime time.Duration

	// DefaultTTL is the validity of WIT-SVIDs for which none was asked: zero means 1 hour. MaxTTL cuts what may be asked
	// for: zero means 24 hours.
	DefaultTTL, MaxTTL time.Duration

	// Issuer is the iss claim; empty means that there is none. An https URL is refused: nobody shall find OpenID Connect
	// discovery through it. [WIT-20]
	Issuer string
}

// Check refuses what cannot work. The error names fields as the CA's configuration does.
func (w WITConfig) Check() error { return w.check() }

// check fills in the defaults and refuses what cannot work.
func (w *WITConfig) check() error {
	w.Lifetime = cmp.Or(w.Lifetime, DefaultWITLifetime)
	w.MaxTTL = cmp.Or(w.MaxTTL, min(DefaultMaxWITTTL, positive(w.Lifetime, DefaultMaxWITTTL)))
	w.DefaultTTL = cmp.Or(w.DefaultTTL, min(DefaultWITTTL, positive(w.MaxTTL, DefaultWITTTL)))
	switch {
	case w.DefaultTTL < time.Second || w.MaxTTL < time.Second || w.Lifetime < time.Second:
		return fmt.Errorf("wit: ttl %v, max_ttl %v and lifetime %v must be at least 1s", w.DefaultTTL, w.MaxTTL, w.Lifetime)
	case w.DefaultTTL > w.MaxTTL:
		return fmt.Errorf("wit.ttl is %v, longer than wit.max_ttl, which is %v; shorten the first or lengthen the second", w.DefaultTTL, w.MaxTTL)
	case w.MaxTTL > w.Lifetime:
		return fmt.Errorf("wit.max_ttl is %v, longer than wit.lifetime, which is %v; shorten the first or lengthen the second", w.MaxTTL, w.Lifetime)
	case len(w.Issuer) >= len("https://") && strings.EqualFold(w.Issuer[:len("https://")], "https://"):
		return fmt.Errorf("wit.issuer %q is an https URL, by which OpenID Connect discovery could be tried; leave it out, or use a URN [WIT-20]", w.Issuer)
	}
	return nil
}

// WITRequest says what a WIT-SVID shall be.
type WITRequest struct {
	// NotBefore is as in JWTRequest.
	NotBefore time.Time

	// ID is the subject: a SPIFFE ID in the trust domain of the Set, with a path that is not under /spire.
	ID spiffeid.ID

	// PublicKey is the workload's, from ParsePublicKey. Whoever presents the WIT-SVID proves possession of it.
	PublicKey crypto.PublicKey

	// Algorithm is the one with which that key signs proofs: one of the nine of JWT-SVID, fitting the key. [WIT-11, WIT-12]
	Algorithm string

	// TTL is the validity asked for. Zero means WITConfig.DefaultTTL. More than WITConfig.MaxTTL, or than the authority has
	// left, is cut.
	TTL time.Duration
}

// WITSVID is a signed WIT-SVID.
type WITSVID struct {
	// Token is the JWS compact serialization. It is of use only to who holds the private key of its cnf claim.
	Token string

	// KeyID is the id of the WIT authority that signed, and JTI the jti claim: 128 random bits. [WIT-14]
	KeyID, JTI string

	// IssuedAt is the iat claim, a few seconds before the issuance, and Expiry the exp claim.
	IssuedAt, Expiry time.Time
}

// witClaims of a WIT-SVID. There is no audience, in any form. [WIT-21]
type witClaims struct {
	Confirmation confirmation `json:"cnf"`
	Expiry       int64        `json:"exp"`
	IssuedAt     int64        `json:"iat"`
	Issuer       string       `json:"iss,omitempty"`
	JTI          string       `json:"jti"`
	Begin        int64        `json:"nbf"`
	Subject      string       `json:"sub"`
}

// A confirmation names the key that the presenter has to prove. [RFC 7800 §3.2, WIT-10]
type confirmation struct {
	JWK json.RawMessage `json:"jwk"`
}

// SignWIT checks a request and signs it. Errors that wrap ErrRefused are the request's fault; ErrNoWIT says that WIT-SVIDs
// are not enabled. [WIT-SVID §3]
func (s *Set) SignWIT(ctx context.Context, r WITRequest) (*WITSVID, error) {
	if !s.config.WIT.Enabled {
		return nil, ErrNoWIT
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := s.checkID(r.ID, false); err != nil {
		return nil, fmt.Errorf("wit-svid %w: %w", ErrRefused, err)
	}
	if r.TTL < 0 {
		return nil, fmt.Errorf("wit-svid %w: ttl %v is negative", ErrRefused, r.TTL)
	}
	jwk, err := confirmationKey(r.PublicKey, r.Algorithm)
	if err != nil {
		return nil, err
	}
	now := s.config.Now()
	a, err := s.activeWIT(now)
	if err != nil {
		return nil, err
	}
	now = now.UTC().Truncate(time.Second)
	jti := make([]byte, 16)
	rand.Read(jti) // never fails since Go 1.24
	svid := &WITSVID{KeyID: a.id, JTI: hex.EncodeToString(jti), IssuedAt: issuedAt(now, r.NotBefore), Expiry: s.witExpiry(now, r.TTL, a)}
	svid.Token, err = jwt.Signed(a.signer.signer).Claims(witClaims{
		Confirmation: confirmation{JWK: jwk},
		Expiry:       svid.Expiry.Unix(),
		IssuedAt:     svid.IssuedAt.Unix(),
		Issuer:       s.config.WIT.Issuer,
		JTI:          svid.JTI,
		Begin:        svid.IssuedAt.Unix(),
		Subject:      r.ID.String(),
	}).Serialize()
	if err != nil {
		return nil, fmt.Errorf("signing a wit-svid for %q: %w", r.ID.String(), err)
	}
	if a.key.External() || s.signatures.Add(1)%sampleEvery == 1 {
		if err := a.selfCheck(svid.Token, r.ID); err != nil {
			return nil, fmt.Errorf("self-check of a wit-svid for %q, signed by authority %s: %w", r.ID.String(), a.id, err)
		}
	}
	return svid, nil
}

// confirmationKey returns the JWK of a cnf claim: the public key and the algorithm of its proofs, and nothing else. [WIT-11,
// WIT-13]
func confirmationKey(key crypto.PublicKey, algorithm string) ([]byte, error) {
	if err := checkKeyStrength(key); err != nil {
		return nil, err
	}
	fitting, err := proofAlgorithms(key)
	if err != nil {
		return nil, fmt.Errorf("wit-svid %w: %w", ErrRefused, err)
	}
	if !slices.Contains(fitting, jose.SignatureAlgorithm(algorithm)) {
		return nil, fmt.Errorf("wit-svid %w: signing_algorithm %.20q does not fit the key; ask for one of %v", ErrRefused, algorithm, fitting)
	}
	return jose.JSONWebKey{Key: key, Algorithm: algorithm}.MarshalJSON()
}

// proofAlgorithms returns the algorithms with which a key can sign proofs. [WIT-05, WIT-12]
func proofAlgorithms(key crypto.PublicKey) ([]jose.SignatureAlgorithm, error) {
	switch key := key.(type) {
	case *rsa.PublicKey:
		return []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512}, nil
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256():
			return []jose.SignatureAlgorithm{jose.ES256}, nil
		case elliptic.P384():
			return []jose.SignatureAlgorithm{jose.ES384}, nil
		case elliptic.P521():
			return []jose.SignatureAlgorithm{jose.ES512}, nil
		}
	}
	return nil, fmt.Errorf("no algorithm of WIT-SVID fits a key of type %T; use EC P-256", key)
}

// witExpiry returns the exp claim of a WIT-SVID issued at now. A token never outlives its authority's place in the bundle.
func (s *Set) witExpiry(now time.Time, asked time.Duration, a *jwtAuthority) time.Time {
	asked = min(cmp.Or(asked, s.config.WIT.DefaultTTL), s.config.WIT.MaxTTL)
	expiry := now.Add(max(time.Second, asked)).Truncate(time.Second)
	if expiry.After(a.expiresAt) {
		expiry = a.expiresAt.Truncate(time.Second)
	}
	return expiry
}

// activeWIT returns the authority to sign WIT-SVIDs with at now.
func (s *Set) activeWIT(now time.Time) (*jwtAuthority, error) {
	if err := s.stopped.Load(); err != nil {
		return nil, *err
	}
	return usableToken(KindWIT, s.current.Load().activeWIT, now)
}

// usableToken returns the active JWT or WIT authority if it may sign at now.
func usableToken(kind Kind, a *jwtAuthority, now time.Time) (*jwtAuthority, error) {
	if a == nil {
		return nil, fmt.Errorf("%s: %w", kind, ErrNoActive)
	}
	if now.Before(a.notBefore) || !now.Before(a.expiresAt) {
		return nil, fmt.Errorf("%s authority %s is valid from %s to %s: %w", kind, a.id,
			a.notBefore.UTC().Format(time.RFC3339), a.expiresAt.UTC().Format(time.RFC3339), ErrExpired)
	}
	return a, nil
}

// WITEnabled tells whether WIT-SVIDs are issued.
func (s *Set) WITEnabled() bool { return s.config.WIT.Enabled }

// CheckWITTTL refuses a WIT-SVID TTL that issuance would cut. Zero, which asks for the default, passes.
func (s *Set) CheckWITTTL(ttl time.Duration) error {
	if !s.config.WIT.Enabled {
		return ErrNoWIT
	}
	now := s.config.Now()
	a, err := s.activeWIT(now)
	if err != nil {
		return err
	}
	return checkTTL("wit svid", ttl, s.config.WIT.MaxTTL, a.expiresAt.Sub(now))
}

// Kinds returns the kinds of authorities that are in use.
func (s *Set) Kinds() []Kind {
	if s.config.WIT.Enabled {
		return []Kind{KindX509, KindJWT, KindWIT}
	}
	return []Kind{KindX509, KindJWT}
}

func (s *Set) checkKind(kind Kind) error {
	switch {
	case slices.Contains(s.Kinds(), kind):
		return nil
	case kind == KindWIT:
		return ErrNoWIT
	}
	return fmt.Errorf("unknown kind of authority %q; there are x509, jwt and wit", string(kind))
}

// tokens returns the JWT or the WIT authorities.
func (n *snapshot) tokens(kind Kind) map[string]*jwtAuthority {
	if kind == KindWIT {
		return n.wit
	}
	return n.jwt
}

// addWIT publishes the WIT authorities. A key id must not name two keys: where a JWT authority that is not our own has
// chosen the id of one of our WIT authorities, it is left out. [WIT-03]
func (n *snapshot) addWIT(b *Bundle) {
	for _, a := range slices.SortedFunc(maps.Values(n.wit), func(a, b *jwtAuthority) int {
		return cmp.Or(cmp.Compare(a.generation, b.generation), cmp.Compare(a.id, b.id))
	}) {
		if a.state.published() {
			b.WIT = append(b.WIT, JWTAuthority{KeyID: a.id, PublicKey: a.public, ExpiresAt: a.expiresAt, State: a.state})
		}
	}
	b.JWT = slices.DeleteFunc(b.JWT, func(j JWTAuthority) bool { return n.wit[j.KeyID] != nil })
}

// switchWIT brings the store in line with the configuration: it publishes the WIT authorities or no longer does, and makes
// one if WIT-SVIDs are enabled and none can sign them, since they were just switched on, or were off for longer than the
// last one lived. Whoever loses to another replica takes what that one wrote. A key store that does not make the key, or one
// in which another replica makes it at this moment, keeps nobody from all else: Health says what is missing.
func (s *Set) switchWIT(ctx context.Context) error {
	const attempts = 4
	wanted := s.config.WIT.Enabled
	for range attempts {
		items, err := s.list(ctx)
		if err != nil {
			return err
		}
		if err := s.Load(items); err != nil {
			return err
		}
		e, err := s.newEdit(KindWIT, items)
		if err != nil {
			return err
		}
		active := s.current.Load().activeWIT
		usable := active != nil && s.config.Now().Before(active.expiresAt) // a clock that went back makes none
		if e.index.WITPublished == s.config.WIT.Enabled && (usable || !wanted) {
			return nil
		}
		e.index.WITPublished, e.indexTouched = s.config.WIT.Enabled, true
		if wanted && !usable {
			id, err := e.create(ctx, StatePrepared)
			if err != nil && ctx.Err() == nil {
				s.config.Log.Error("no WIT authority was made, so that no WIT-SVIDs are issued; the schedule of authorities tries again, or prepare and activate one", "err", err)
				wanted = false
				continue
			}
			if err != nil {
				return err
			}
			if err := e.activate(e.records[id]); err != nil {
				return err
			}
		}
		checks, writes, err := e.commit()
		if err != nil {
			return err
		}
		_, err = s.config.Store.Commit(store.WithReserve(ctx), checks, writes)
		if conflict := (*store.ConflictError)(nil); err != nil && !errors.As(err, &conflict) {
			return fmt.Errorf("switching WIT-SVIDs in the store: %w", err)
		}
	}
	return ErrConflict
}
