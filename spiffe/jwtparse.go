package spiffe

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"math"
	"slices"
	"strings"
	"time"
)

// minRSABits is the smallest RSA modulus that is taken for a signature. [RFC 7518 §3.3]
const minRSABits = 2048

// maxRSABits bounds the work that a key from a foreign bundle can cause. crypto/tls has the same bound.
const maxRSABits = 8192

// jwtAlgorithms are the nine values that alg may have. [JWT-SVID §2.1]
var jwtAlgorithms = [...]string{"RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512"}

// dangerousHeaders bring their own key, or change how the rest of the token is read. No option allows them.
var dangerousHeaders = [...]string{"b64", "crit", "jku", "jwk", "x5c", "x5u"}

// jwtJSONLimits bounds header and claims. The bytes are bounded by the token.
var jwtJSONLimits = jsonLimits{bytes: math.MaxInt, depth: 16, values: 4096}

// splitToken splits a token in JWS Compact Serialization into its three parts. No other serialization is read.
func splitToken(token string, maxBytes int) (parts []string, err error) {
	if maxBytes <= 0 {
		maxBytes = DefaultMaxJWTBytes
	}
	if len(token) > maxBytes {
		return nil, broken("JWT-01", "token has %d bytes, at most %d are allowed", len(token), maxBytes)
	}
	if strings.HasPrefix(strings.TrimSpace(token), "{") {
		return nil, broken("JWT-01", "token is in JWS JSON serialization, only the compact one is allowed")
	}
	for i := range len(token) {
		c := token[i]
		if 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '.' {
			continue
		}
		// Decoders skip line breaks, so they must not get that far: one token would have many spellings.
		return nil, broken("JWT-25", "token has the byte %q at offset %d, allowed are base64url without padding and dots", token[i:i+1], i)
	}
	switch dots := strings.Count(token, "."); dots {
	case 2:
		return strings.Split(token, "."), nil
	case 4:
		return nil, broken("JWT-03", "token is an encrypted JWE of five parts, a JWT-SVID is a signed JWS of three")
	default:
		return nil, broken("JWT-01", "token has %d parts, a JWT-SVID has three", dots+1)
	}
}

// decodePart decodes one part of a token, in its only spelling.
func decodePart(name, part string) ([]byte, error) {
	decoded, err := base64.RawURLEncoding.Strict().DecodeString(part)
	if err != nil {
		return nil, broken("JWT-25", "%s of the token is not base64url: %w", name, err)
	}
	return decoded, nil
}

// jwtHeader is the header of a token, with alg already known to be allowed.
type jwtHeader struct {
	alg     string
	kid     string
	hasKid  bool
	members map[string]any
}

// parseHeader reads the header of a token and, before anything else, its algorithm (JWT-07).
func parseHeader(part string) (jwtHeader, error) {
	decoded, err := decodePart("header", part)
	if err != nil {
		return jwtHeader{}, err
	}
	members, err := readJSONObject(decoded, jwtJSONLimits, "JWT-25", "JWT-24")
	if err != nil {
		return jwtHeader{}, err
	}
	header := jwtHeader{members: members}
	header.kid, header.hasKid = members["kid"].(string)
	alg, ok := members["alg"].(string)
	if !ok {
		return header, broken("JWT-06", "token has no header alg, or it is no string, allowed are %v", jwtAlgorithms)
	}
	if !slices.Contains(jwtAlgorithms[:], alg) {
		return header, broken("JWT-06", "token has the algorithm %q, allowed are %v", excerpt(alg), jwtAlgorithms)
	}
	header.alg = alg
	if kid, present := members["kid"]; present && !header.hasKid {
		return header, broken("JWT-09", "header kid of the token is %s, it must be a string", jsonKind(kid))
	}
	return header, nil
}

// check returns a RowError for each header member that a JWT-SVID must not have.
func (h jwtHeader) check(allowUnknown bool) []error {
	var errs []error
	if typ, present := h.members["typ"]; present && typ != "JWT" && typ != "JOSE" {
		errs = append(errs, broken("JWT-11", "header typ of the token is %s, it must be JWT or JOSE or absent", quoteValue(typ)))
	}
	for _, name := range sortedNames(h.members) {
		switch {
		case name == "alg" || name == "kid" || name == "typ":
		case slices.Contains(dangerousHeaders[:], name):
			errs = append(errs, broken("JWT-04", "token has the header %q, which is never allowed", name))
		case !allowUnknown:
			errs = append(errs, broken("JWT-04", "token has the header %q, allowed are alg, kid and typ", excerpt(name)))
		}
	}
	return errs
}

// parseClaims returns the payload of a token and the claims in it.
func parseClaims(part string) ([]byte, map[string]any, error) {
	payload, err := decodePart("payload", part)
	if err != nil {
		return nil, nil, err
	}
	claims, err := readJSONObject(payload, jwtJSONLimits, "JWT-25", "JWT-24")
	if err != nil {
		return nil, nil, err
	}
	return payload, claims, nil
}

// unverifiedSVID is a JWT-SVID before its signature and its times are known to be good.
type unverifiedSVID struct {
	JWTSVID
	notBefore time.Time // zero if absent
}

// readClaims reads the claims that have a meaning here, and returns a RowError for each that is missing or malformed.
func readClaims(claims map[string]any, allowPathless bool) (unverifiedSVID, []error) {
	svid := unverifiedSVID{JWTSVID: JWTSVID{Claims: claims}}
	var errs []error
	note := func(err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
	var err error

	sub, ok := claims["sub"].(string)
	if !ok {
		note(broken("JWT-12", "claim sub of the token is missing or no string, it must be a SPIFFE ID"))
	} else if svid.ID, err = ParseID(sub); err != nil {
		note(&RowError{Row: "JWT-12", Err: err})
	} else if svid.ID.Path() == "" && !allowPathless {
		note(broken("DEC-06", "claim sub of the token is %q, which names a trust domain, a workload has a path", excerpt(sub)))
	}

	svid.Audience, err = readAudience(claims["aud"])
	note(err)

	if expiry, present := claims["exp"]; !present {
		note(broken("JWT-17", "claim exp of the token is missing"))
	} else {
		svid.Expiry, err = readNumericDate("exp", expiry, "JWT-17")
		note(err)
	}
	if notBefore, present := claims["nbf"]; present {
		svid.notBefore, err = readNumericDate("nbf", notBefore, "JWT-20")
		note(err)
	}
	if issuedAt, present := claims["iat"]; present {
		svid.IssuedAt, err = readNumericDate("iat", issuedAt, "JWT-21")
		note(err)
	}
	if jti, present := claims["jti"]; present {
		if svid.JTI, ok = jti.(string); !ok {
			note(broken("JWT-22", "claim jti of the token is %s, it must be a string", jsonKind(jti)))
		}
	}
	return svid, errs
}

// checkTime returns a RowError if the token is not valid at now.
func (s unverifiedSVID) checkTime(now time.Time, leeway time.Duration) []error {
	var errs []error
	if !now.Add(-leeway).Before(s.Expiry) {
		errs = append(errs, broken("JWT-18", "token expired at %s, it is now %s", s.Expiry.Format(time.RFC3339), now.UTC().Format(time.RFC3339)))
	}
	if now.Add(leeway).Before(s.notBefore) {
		errs = append(errs, broken("JWT-20", "token is valid from %s on, it is now %s", s.notBefore.Format(time.RFC3339), now.UTC().Format(time.RFC3339)))
	}
	return errs
}

// readAudience reads aud, which is a string or an array of strings. [RFC 7519 §4.1.3]
func readAudience(claim any) ([]string, error) {
	values, isArray := claim.([]any)
	if !isArray {
		values = []any{claim}
	}
	if len(values) == 0 {
		return nil, broken("JWT-13", "claim aud of the token is empty, it must name at least one audience")
	}
	audience := make([]string, 0, len(values))
	for _, value := range values {
		name, ok := value.(string)
		if !ok || name == "" {
			return nil, broken("JWT-13", "claim aud of the token is missing, or holds an empty string or something else than strings")
		}
		audience = append(audience, name)
	}
	return audience, nil
}

// maxNumericDate is the end of the year 9999, the last that RFC 3339 can write.
const maxNumericDate = 253402300799

// readNumericDate reads a claim in seconds since 1970, which may have a fraction. [RFC 7519 §2]
func readNumericDate(name string, claim any, row string) (time.Time, error) {
	number, ok := claim.(json.Number)
	if !ok {
		return time.Time{}, broken(row, "claim %s of the token is %s, it must be a number of seconds since 1970", name, jsonKind(claim))
	}
	seconds, err := number.Int64()
	fraction := 0.0
	if err != nil {
		whole, err := number.Float64()
		if err != nil || math.Abs(whole) > maxNumericDate {
			return time.Time{}, broken(row, "claim %s of the token is %q, it must be a number of seconds between 1970 and 9999", name, excerpt(number.String()))
		}
		whole, fraction = math.Modf(whole)
		seconds = int64(whole)
	}
	if seconds < 0 || seconds > maxNumericDate || fraction < 0 {
		return time.Time{}, broken(row, "claim %s of the token is %q, it must be a number of seconds between 1970 and 9999", name, excerpt(number.String()))
	}
	return time.Unix(seconds, int64(fraction*1e9)).UTC(), nil
}

// keyFits says whether a token with the algorithm alg may be verified with the key. [RFC 7518 §3]
func keyFits(alg string, key crypto.PublicKey) error {
	switch key := key.(type) {
	case *rsa.PublicKey:
		if key == nil || key.N == nil {
			return broken("JWT-08", "RSA key is incomplete")
		}
		if alg[0] == 'E' {
			return broken("JWT-08", "token has the algorithm %s, but its key is an RSA key", alg)
		}
		if key.N.BitLen() < minRSABits {
			return broken("JWT-08", "RSA key has %d bits, at least %d are required", key.N.BitLen(), minRSABits)
		}
		if key.N.BitLen() > maxRSABits {
			return broken("JWT-08", "RSA key has %d bits, at most %d are allowed", key.N.BitLen(), maxRSABits)
		}
		return nil
	case *ecdsa.PublicKey:
		if key == nil || key.Curve == nil {
			return broken("JWT-08", "EC key is incomplete")
		}
		if fitting := algorithmOf(key.Curve); fitting != alg {
			return broken("JWT-08", "token has the algorithm %s, but its key is an EC key on %s", alg, key.Curve.Params().Name)
		}
		return nil
	default:
		return broken("JWT-08", "key is a %T, a JWT-SVID is signed with an RSA or EC key", key)
	}
}

// algorithmOf returns the one algorithm for keys on a curve, or "" if there is none.
func algorithmOf(curve elliptic.Curve) string {
	switch curve {
	case elliptic.P256():
		return "ES256"
	case elliptic.P384():
		return "ES384"
	case elliptic.P521():
		return "ES512"
	default:
		return ""
	}
}

// quoteValue prints a foreign JSON value for an error message.
func quoteValue(value any) string {
	if s, ok := value.(string); ok {
		quoted, err := json.Marshal(excerpt(s))
		if err == nil {
			return string(quoted)
		}
	}
	return jsonKind(value)
}

func sortedNames(object map[string]any) []string {
	names := make([]string, 0, len(object))
	for name := range object {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
