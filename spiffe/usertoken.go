package spiffe

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// A TokenIssuer issues tokens that are no SVIDs, such as an OpenID provider for its users.
type TokenIssuer struct {
	// Issuer is what iss must be, byte for byte.
	Issuer string
	// Audience are the names of which the token must carry one, byte for byte.
	Audience []string
	// Keys verify its tokens, by their kid.
	Keys map[string]crypto.PublicKey
}

// CheckTokenKey says why a public key cannot verify the tokens of an issuer: it is neither RSA of 2048 to 8192 bits nor EC
// on P-256, P-384 or P-521.
func CheckTokenKey(key crypto.PublicKey) error {
	if err := checkSigningKey(key); err != nil {
		return errors.Unwrap(err)
	}
	return nil
}

// ValidateToken validates a signed JWT of an issuer and returns its claims, numbers as json.Number. It is as strict as
// ValidateJWTSVID, and has the same limits: the same nine algorithms, none of them symmetric, exp required, nbf obeyed, no
// key but that of the issuer which kid names, no header that changes how the rest is read. Of JWTOptions, Now, Leeway and
// MaxBytes count. Other headers are ignored, as OpenID providers have some.
//
// The error does not hold the token, nor its claims.
func ValidateToken(token string, issuer TokenIssuer, o JWTOptions) (map[string]any, error) {
	if issuer.Issuer == "" || len(issuer.Audience) == 0 || slices.Contains(issuer.Audience, "") {
		return nil, errors.New("the issuer has no name or no audience, so that its tokens would be good for anyone")
	}
	if o.Leeway == 0 {
		o.Leeway = DefaultJWTLeeway
	}
	if o.Leeway < 0 || o.Leeway > MaxJWTLeeway {
		return nil, fmt.Errorf("leeway is %v, it must lie between 0 and %v", o.Leeway, MaxJWTLeeway)
	}
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	parts, err := splitToken(token, o.MaxBytes)
	if err != nil {
		return nil, errors.Unwrap(err)
	}
	header, err := parseHeader(parts[0])
	if err != nil {
		return nil, errors.Unwrap(err)
	}
	key, err := tokenKey(header, issuer)
	if err != nil {
		return nil, err
	}
	if _, err := decodePart("signature", parts[2]); err != nil {
		return nil, errors.Unwrap(err)
	}
	payload, claims, err := parseClaims(parts[1])
	if err != nil {
		return nil, errors.Unwrap(err)
	}
	// The signature comes first: what an unsigned token says is not worth a message of its own.
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.SignatureAlgorithm(header.alg)})
	if err != nil {
		return nil, errors.New("the token is malformed")
	}
	if verified, err := jws.Verify(key); err != nil || !bytes.Equal(verified, payload) {
		return nil, errors.New("the signature of the token does not verify with the key of its issuer that it names")
	}
	if err := checkTokenClaims(claims, issuer, o); err != nil {
		return nil, err
	}
	return claims, nil
}

// tokenKey returns the key of the issuer that a header names and fits.
func tokenKey(header jwtHeader, issuer TokenIssuer) (crypto.PublicKey, error) {
	for _, name := range dangerousHeaders {
		if _, present := header.members[name]; present {
			return nil, fmt.Errorf("the token has the header %q, which is never allowed", name)
		}
	}
	if typ, present := header.members["typ"]; present {
		kind, ok := typ.(string)
		if kind = strings.TrimPrefix(strings.ToLower(kind), "application/"); !ok || kind != "jwt" && kind != "jose" && kind != "at+jwt" {
			return nil, errors.New("header typ of the token must be JWT, JOSE, at+jwt or absent")
		}
	}
	if !header.hasKid {
		return nil, errors.New("the token has no kid, so it does not say which key of its issuer signed it")
	}
	key, found := issuer.Keys[header.kid]
	if !found {
		return nil, errors.New("the token names a key that its issuer is not known to have")
	}
	if err := keyFits(header.alg, key); err != nil {
		return nil, errors.Unwrap(err)
	}
	return key, nil
}

func checkTokenClaims(claims map[string]any, issuer TokenIssuer, o JWTOptions) error {
	if iss, ok := claims["iss"].(string); !ok || iss != issuer.Issuer {
		return fmt.Errorf("claim iss of the token is not %q", excerpt(issuer.Issuer))
	}
	audience, err := readAudience(claims["aud"])
	if err != nil {
		return errors.Unwrap(err)
	}
	if !slices.ContainsFunc(audience, func(a string) bool { return slices.Contains(issuer.Audience, a) }) {
		return fmt.Errorf("the token is not for any of %q", shortened(issuer.Audience))
	}
	var times unverifiedSVID
	if _, present := claims["exp"]; !present {
		return errors.New("claim exp of the token is missing")
	}
	if times.Expiry, err = readNumericDate("exp", claims["exp"], "JWT-17"); err != nil {
		return errors.Unwrap(err)
	}
	if nbf, present := claims["nbf"]; present {
		if times.notBefore, err = readNumericDate("nbf", nbf, "JWT-20"); err != nil {
			return errors.Unwrap(err)
		}
	}
	if err := first(times.checkTime(o.Now, o.Leeway)); err != nil {
		return errors.Unwrap(err)
	}
	return nil
}
