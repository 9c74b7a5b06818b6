package spiffe

import (
	"bytes"
	"crypto"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// DefaultJWTLeeway and MaxJWTLeeway bound how far a validator's clock may be off.
	DefaultJWTLeeway = 30 * time.Second
	MaxJWTLeeway     = 60 * time.Second

	// DefaultMaxJWTBytes is the longest token that is read, unless an option says otherwise.
	DefaultMaxJWTBytes = 16 << 10

	// maxKeysTried bounds the signature checks that one token without a kid can cause.
	maxKeysTried = 16
)

// JWTOptions changes how JWT-SVIDs are validated. The zero value is the strict way, at the present time.
type JWTOptions struct {
	// Now is the time at which the token must be valid. Zero means time.Now.
	Now time.Time

	// Leeway is how far the issuer's clock may be off. Zero means 30 seconds; more than 60 is an error.
	Leeway time.Duration

	// AllowUnknownHeaders accepts header members other than alg, kid and typ (DEC-05). Those that bring a key or change
	// how the token is read are refused all the same: b64, crit, jku, jwk, x5c, x5u.
	AllowUnknownHeaders bool

	// AllowPathless accepts a subject without a path (DEC-06).
	AllowPathless bool

	// MaxBytes is the longest token that is read. Zero means 16 KiB.
	MaxBytes int
}

// A JWTSVID is what a valid JWT-SVID says.
type JWTSVID struct {
	// ID is the subject.
	ID spiffeid.ID
	// Audience holds all values of aud, in their order. There is at least one.
	Audience []string
	// Expiry is the end of validity. A validator may accept the token a little longer, by its leeway.
	Expiry time.Time
	// IssuedAt is zero if the token does not say.
	IssuedAt time.Time
	// KeyID is the kid of the key that verified the token, also if the token does not name it.
	KeyID string
	// Claims holds all claims, numbers as json.Number. They are the issuer's word: use them only together with the
	// trust domain of ID (SVID-07).
	Claims map[string]any
	// JTI is empty if the token has none.
	JTI string
}

// ValidateJWTSVID validates a JWT-SVID for a recipient that is known under the given audiences, of which the token must
// name at least one, byte for byte. Without an audience it refuses to work, since the token would be good for anyone.
//
// Only the bundle of the subject's own trust domain counts. A token without kid is tried with the keys that fit its
// algorithm. The error is a [RowError]. [JWT-SVID §4, §5]
func ValidateJWTSVID(token string, bundles jwtbundle.Source, audience []string, o JWTOptions) (*JWTSVID, error) {
	if len(audience) == 0 || slices.Contains(audience, "") {
		return nil, broken("JWT-15", "no audience given, or an empty one: a validator must know under which names it is meant")
	}
	if bundles == nil {
		return nil, broken("JWT-26", "no bundle source given")
	}
	if o.Leeway == 0 {
		o.Leeway = DefaultJWTLeeway
	}
	if o.Leeway < 0 || o.Leeway > MaxJWTLeeway {
		return nil, broken("DEC-17", "leeway is %v, it must lie between 0 and %v", o.Leeway, MaxJWTLeeway)
	}
	if o.Now.IsZero() {
		o.Now = time.Now()
	}

	parts, err := splitToken(token, o.MaxBytes)
	if err != nil {
		return nil, err
	}
	header, err := parseHeader(parts[0])
	if err != nil {
		return nil, err
	}
	if err := first(header.check(o.AllowUnknownHeaders)); err != nil {
		return nil, err
	}
	// go-jose decodes leniently: the unused bits of the last character would make several tokens out of one.
	if _, err := decodePart("signature", parts[2]); err != nil {
		return nil, err
	}
	payload, claims, err := parseClaims(parts[1])
	if err != nil {
		return nil, err
	}
	svid, errs := readClaims(claims, o.AllowPathless)
	if err := first(errs); err != nil {
		return nil, err
	}
	if err := first(svid.checkTime(o.Now, o.Leeway)); err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(svid.Audience, func(a string) bool { return slices.Contains(audience, a) }) {
		return nil, broken("JWT-14", "token is for the audience %q, not for any of %q", shortened(svid.Audience), shortened(audience))
	}
	if svid.KeyID, err = verifySignature(token, payload, header, svid.ID.TrustDomain(), bundles); err != nil {
		return nil, err
	}
	return &svid.JWTSVID, nil
}

// verifySignature verifies the token with the keys of td, and returns the id of the key that did.
func verifySignature(token string, payload []byte, header jwtHeader, td spiffeid.TrustDomain, bundles jwtbundle.Source) (string, error) {
	bundle, err := bundles.GetJWTBundleForTrustDomain(td)
	if err != nil {
		return "", broken("JWT-26", "no JWT bundle for trust domain %q: %w", td, err)
	}
	if bundle == nil || bundle.TrustDomain() != td {
		return "", broken("JWT-26", "no JWT bundle for trust domain %q: the source returned another one", td)
	}
	kids, keys, err := candidateKeys(header, bundle)
	if err != nil {
		return "", err
	}
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.SignatureAlgorithm(header.alg)})
	if err != nil {
		return "", broken("JWT-25", "token is malformed: %w", err)
	}
	for i, key := range keys {
		verified, err := jws.Verify(key)
		if err == nil && bytes.Equal(verified, payload) {
			return kids[i], nil
		}
	}
	return "", broken("JWT-25", "signature of the token does not verify with any key of trust domain %q that fits it, of which there are %d", td, len(keys))
}

// candidateKeys returns the keys of the bundle that may verify a token with this header: the one that its kid names, or
// without a kid all that fit its algorithm.
func candidateKeys(header jwtHeader, bundle *jwtbundle.Bundle) (kids []string, keys []crypto.PublicKey, err error) {
	td := bundle.TrustDomain()
	if header.hasKid {
		key, found := bundle.FindJWTAuthority(header.kid)
		if !found {
			return nil, nil, broken("JWT-26", "token names the key %q, which the JWT bundle of trust domain %q does not have", excerpt(header.kid), td)
		}
		if err := keyFits(header.alg, key); err != nil {
			return nil, nil, err
		}
		return []string{header.kid}, []crypto.PublicKey{key}, nil
	}
	authorities := bundle.JWTAuthorities()
	for kid, key := range authorities {
		if keyFits(header.alg, key) == nil {
			kids = append(kids, kid)
		}
	}
	switch {
	case len(authorities) == 0:
		return nil, nil, broken("JWT-29", "the JWT bundle of trust domain %q has no key, so none of its JWT-SVIDs is trusted", td)
	case len(kids) == 0:
		return nil, nil, broken("JWT-08", "the JWT bundle of trust domain %q has no key that fits the algorithm %s", td, header.alg)
	case len(kids) > maxKeysTried:
		return nil, nil, broken("JWT-10", "token has no kid, and the JWT bundle of trust domain %q has %d keys that fit it, more than the %d that are tried: issue tokens with a kid", td, len(kids), maxKeysTried)
	}
	slices.Sort(kids)
	for _, kid := range kids {
		keys = append(keys, authorities[kid])
	}
	return kids, keys, nil
}

// first returns the first error of a list, or nil.
func first(errs []error) error {
	if len(errs) == 0 {
		return nil
	}
	return errs[0]
}

// shortened prepares foreign strings for an error message.
func shortened(values []string) []string {
	short := make([]string, 0, 4)
	for _, value := range values[:min(len(values), 4)] {
		short = append(short, excerpt(value))
	}
	return short
}
