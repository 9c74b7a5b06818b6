package spiffe

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"maps"
	"slices"

	"github.com/go-jose/go-jose/v4"
)

// The values of use that have a meaning. They are case-sensitive. [Trust Domain and Bundle §4.2.2, WIT-SVID §5.1]
const (
	useX509SVID = "x509-svid"
	useJWTSVID  = "jwt-svid"
	useWITSVID  = "wit-svid"
)

// MarshalJWKS returns the JWT authorities of a trust domain, by their key ids, in the form that the Workload API hands
// out: a plain JWK Set without use and sequence, for validators off the shelf (DEC-11). It is sorted by key id, so equal
// sets give equal bytes. An empty set has the keys [] and never null (WAPI-49).
//
// The error is a [RowError] if a key has no id or cannot verify a JWT-SVID; above all, a private key is never written.
func MarshalJWKS(keys map[string]crypto.PublicKey) ([]byte, error) { return marshalSet("", keys) }

// marshalSet returns the JWK Set of keys that verify SVIDs of one kind.
func marshalSet(use string, keys map[string]crypto.PublicKey) ([]byte, error) {
	set := struct {
		Keys []json.RawMessage `json:"keys"`
	}{Keys: []json.RawMessage{}}
	for _, kid := range slices.Sorted(maps.Keys(keys)) {
		jwk, err := marshalSigningKey(use, kid, keys[kid])
		if err != nil {
			return nil, err
		}
		set.Keys = append(set.Keys, jwk)
	}
	return json.Marshal(set)
}

// marshalSigningKey returns the JWK of a key that verifies JWT-SVIDs or WIT-SVIDs.
func marshalSigningKey(use, kid string, key crypto.PublicKey) (json.RawMessage, error) {
	if kid == "" {
		return nil, broken("JWT-27", "a signing key has no key id, which its JWK needs")
	}
	if err := checkSigningKey(key); err != nil {
		return nil, broken(RowOf(err), "key %q: %w", excerpt(kid), errors.Unwrap(err))
	}
	return marshalJWK(jose.JSONWebKey{Key: key, KeyID: kid, Use: use})
}

// marshalAuthority returns the JWK of an X.509 authority. It has no kid (X509-61).
func marshalAuthority(authority *x509.Certificate) (json.RawMessage, error) {
	if authority == nil || !isAuthority(authority, true) {
		return nil, broken("X509-68", "a bundle can only hold certificates of CAs")
	}
	switch authority.PublicKey.(type) {
	case *rsa.PublicKey, *ecdsa.PublicKey, ed25519.PublicKey:
	default:
		return nil, broken("X509-64", "authority %q has a key of type %T, which no JWK can hold", excerpt(authority.Subject.String()), authority.PublicKey)
	}
	return marshalJWK(jose.JSONWebKey{Key: authority.PublicKey, Use: useX509SVID, Certificates: []*x509.Certificate{authority}})
}

func marshalJWK(jwk jose.JSONWebKey) (json.RawMessage, error) {
	doc, err := jwk.MarshalJSON()
	if err != nil {
		return nil, broken("TDB-16", "writing a JWK: %w", err)
	}
	return doc, nil
}

// checkSigningKey says whether a key can verify JWT-SVIDs: an RSA key of at least 2048 bits, or an EC key on P-256, P-384
// or P-521. It is also what keeps private keys out of documents, which go-jose would write out.
func checkSigningKey(key crypto.PublicKey) error {
	alg := "RS256"
	if ec, ok := key.(*ecdsa.PublicKey); ok && ec != nil && ec.Curve != nil {
		if alg = algorithmOf(ec.Curve); alg == "" {
			return broken("JWT-08", "EC key is on %s, allowed are P-256, P-384 and P-521", ec.Curve.Params().Name)
		}
	}
	return keyFits(alg, key)
}

// publicMembers returns the members that make up the public key of a kty, or nil if the kty is not known.
func publicMembers(kty string) []string {
	switch kty {
	case "EC":
		return []string{"crv", "x", "y"}
	case "RSA":
		return []string{"n", "e"}
	case "OKP":
		return []string{"crv", "x"}
	default:
		return nil
	}
}

// parsePublicKey returns the public key of a JWK. go-jose gets to see nothing but kty and the members of the public key,
// so nothing else in the entry can change what is read.
func parsePublicKey(entry map[string]any) (crypto.PublicKey, error) {
	kty, ok := entry["kty"].(string)
	if !ok {
		return nil, broken("TDB-13", "kty is missing or no string")
	}
	for _, name := range [...]string{"d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"} {
		if _, private := entry[name]; !private {
			continue
		}
		if kty == "oct" {
			return nil, broken("JWT-33", "kty is oct, a symmetric key is never used")
		}
		return nil, broken("JWT-28", "entry holds the private member %q, so its key is no longer secret", name)
	}
	names := publicMembers(kty)
	if names == nil {
		return nil, broken("TDB-13", "kty %q is not known", excerpt(kty))
	}
	public := map[string]string{"kty": kty}
	for _, name := range names {
		value, ok := entry[name].(string)
		if !ok {
			return nil, broken("TDB-20", "member %q of the %s key is missing or no string", name, kty)
		}
		public[name] = value
	}
	doc, err := json.Marshal(public)
	if err != nil {
		return nil, broken("TDB-20", "%w", err)
	}
	var jwk jose.JSONWebKey
	if err := jwk.UnmarshalJSON(doc); err != nil {
		return nil, broken("TDB-20", "%s key is malformed: %w", kty, err)
	}
	if !jwk.Valid() {
		return nil, broken("TDB-20", "%s key is invalid", kty)
	}
	return jwk.Key, nil
}
