package authority

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"errors"
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/cryptosigner"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/keys"
)

// jwtBackdate is how far iat and nbf lie before the issuance: some validators reject an iat in their future. [JWT-21]
const jwtBackdate = 5 * time.Second

const maxAudienceBytes = 2048

// maxAudiencesBytes bounds all audiences of a JWT-SVID together: they go into one audit record, where escapes can make
// them six times as long.
const maxAudiencesBytes = 8 << 10

// JWTRequest says what a JWT-SVID shall be.
type JWTRequest struct {
	// ID is the subject: a SPIFFE ID in the trust domain of the Set, with a path that is not under /spire.
	ID spiffeid.ID

	// Audience has at least one value; one is best.
	Audience []string

	// TTL is the validity asked for. Zero means Config.DefaultJWTTTL. More than Config.MaxJWTTTL, or than the authority has
	// left, is cut.
	TTL time.Duration

	// NotBefore, if it is later than the usual backdate, is the earliest iat: what was issued earlier is revoked.
	NotBefore time.Time

	// IncludeJTI adds a random jti claim.
	IncludeJTI bool
}

// JWTSVID is a signed JWT-SVID.
type JWTSVID struct {
	// Token is the JWS compact serialization. Whoever holds it is the subject until Expiry.
	Token string

	// KeyID is the id of the JWT authority that signed.
	KeyID string

	// IssuedAt is the iat claim, a few seconds before the issuance, and Expiry the exp claim.
	IssuedAt, Expiry time.Time

	// JTI is the jti claim; empty if there is none.
	JTI string
}

// A jwtSigner signs with one authority. It may be used concurrently.
type jwtSigner struct {
	signer    jose.Signer
	algorithm jose.SignatureAlgorithm
}

func newJWTSigner(use keys.Use, kid string, key *keys.Key) (*jwtSigner, error) {
	algorithm, err := jwtAlgorithm(key.Public())
	if err != nil {
		return nil, fmt.Errorf("%s authority %s: %w", use, kid, err)
	}
	// With alg and kid all the header there is. [JWT-04, JWT-11, WIT-04, WIT-06]
	options := (&jose.SignerOptions{}).WithType("JWT")
	if use == keys.UseWIT {
		options = options.WithType("wit+jwt")
	}
	signer, err := jose.NewSigner(jose.SigningKey{
		Algorithm: algorithm,
		Key:       jose.JSONWebKey{Key: cryptosigner.Opaque(key), KeyID: kid},
	}, options)
	if err != nil {
		return nil, fmt.Errorf("%s authority %s: %w", use, kid, err)
	}
	return &jwtSigner{signer: signer, algorithm: algorithm}, nil
}

// jwtAlgorithm returns the one algorithm that fits a key. [JWT-05, JWT-08]
func jwtAlgorithm(key crypto.PublicKey) (jose.SignatureAlgorithm, error) {
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256():
			return jose.ES256, nil
		case elliptic.P384():
			return jose.ES384, nil
		case elliptic.P521():
			return jose.ES512, nil
		}
	case *rsa.PublicKey:
		return jose.RS256, nil
	}
	return "", fmt.Errorf("no algorithm of JWT-SVID fits a key of type %T; use EC P-256", key)
}

// claims of a JWT-SVID. aud is always an array, which every validator must understand.
type claims struct {
	Audience []string `json:"aud"`
	Expiry   int64    `json:"exp"`
	IssuedAt int64    `json:"iat"`
	Issuer   string   `json:"iss,omitempty"`
	JTI      string   `json:"jti,omitempty"`
	Begin    int64    `json:"nbf"`
	Subject  string   `json:"sub"`
}

// SignJWT checks a request and signs it. Errors that wrap ErrRefused are the request's fault.
func (s *Set) SignJWT(ctx context.Context, r JWTRequest) (*JWTSVID, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := s.checkJWT(r); err != nil {
		return nil, fmt.Errorf("jwt-svid %w: %w", ErrRefused, err)
	}
	now := s.config.Now()
	a, err := s.activeJWT(now)
	if err != nil {
		return nil, err
	}
	now = now.UTC().Truncate(time.Second)
	svid := &JWTSVID{KeyID: a.id, IssuedAt: issuedAt(now, r.NotBefore), Expiry: s.jwtExpiry(now, r.TTL, a)}
	if r.IncludeJTI {
		jti := make([]byte, 16)
		rand.Read(jti)
		svid.JTI = hex.EncodeToString(jti)
	}
	svid.Token, err = jwt.Signed(a.signer.signer).Claims(claims{
		Audience: r.Audience,
		Expiry:   svid.Expiry.Unix(),
		IssuedAt: svid.IssuedAt.Unix(),
		Issuer:   s.config.Issuer,
		JTI:      svid.JTI,
		Begin:    svid.IssuedAt.Unix(),
		Subject:  r.ID.String(),
	}).Serialize()
	if err != nil {
		return nil, fmt.Errorf("signing a jwt-svid for %q: %w", r.ID.String(), err)
	}
	if a.key.External() || s.signatures.Add(1)%sampleEvery == 1 {
		if err := a.selfCheck(svid.Token, r.ID); err != nil {
			return nil, fmt.Errorf("self-check of a jwt-svid for %q, signed by authority %s: %w", r.ID.String(), a.id, err)
		}
	}
	return svid, nil
}

// issuedAt returns the iat and nbf of a token that is issued at now.
func issuedAt(now, notBefore time.Time) time.Time {
	at := now.Add(-jwtBackdate)
	if notBefore.After(at) {
		at = notBefore.UTC().Truncate(time.Second)
	}
	return at
}

// CheckJWTTTL refuses a JWT-SVID TTL, asked for in the configuration or in a registration entry, that issuance would cut.
// Zero, which asks for the default, passes.
func (s *Set) CheckJWTTTL(ttl time.Duration) error {
	now := s.config.Now()
	a, err := s.activeJWT(now)
	if err != nil {
		return err
	}
	return checkTTL("jwt svid", ttl, s.config.MaxJWTTTL, a.expiresAt.Sub(now))
}

func (s *Set) checkJWT(r JWTRequest) error {
	if err := s.checkID(r.ID, false); err != nil {
		return err
	}
	if r.TTL < 0 {
		return fmt.Errorf("ttl %v is negative", r.TTL)
	}
	if len(r.Audience) == 0 {
		return errors.New("it has no audience; name the service that shall accept it")
	}
	if len(r.Audience) > s.config.MaxAudiences {
		return fmt.Errorf("it has %d audiences, more than max_audiences, %d; use one token per service", len(r.Audience), s.config.MaxAudiences)
	}
	sum := 0
	for _, audience := range r.Audience {
		sum += len(audience)
		switch {
		case audience == "":
			return errors.New("it has an empty audience")
		case len(audience) > maxAudienceBytes:
			return fmt.Errorf("it has an audience of %d bytes, more than %d", len(audience), maxAudienceBytes)
		case !utf8.ValidString(audience):
			return fmt.Errorf("audience %q is not UTF-8", audience) // JSON would alter it
		}
	}
	if sum > maxAudiencesBytes {
		return fmt.Errorf("its audiences have %d bytes together, more than %d; use one token per service", sum, maxAudiencesBytes)
	}
	return nil
}

// jwtExpiry returns the exp claim of a JWT-SVID issued at now. A token never outlives its key's place in the bundle. [JWT-19]
func (s *Set) jwtExpiry(now time.Time, asked time.Duration, a *jwtAuthority) time.Time {
	if asked == 0 {
		asked = s.config.DefaultJWTTTL
	}
	expiry := now.Add(max(time.Second, min(asked, s.config.MaxJWTTTL))).Truncate(time.Second)
	if expiry.After(a.expiresAt) {
		expiry = a.expiresAt.Truncate(time.Second)
	}
	return expiry
}

// selfCheck verifies a token with the published key.
func (a *jwtAuthority) selfCheck(token string, id spiffeid.ID) error {
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{a.signer.algorithm})
	if err != nil {
		return err
	}
	var got claims
	if err := parsed.Claims(a.public, &got); err != nil {
		return err
	}
	if got.Subject != id.String() {
		return fmt.Errorf("it has the subject %q", got.Subject)
	}
	return nil
}
