package spiffe

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// witType is what the header typ of a WIT-SVID must be. [WIT-SVID §2]
const witType = "wit+jwt"

// An IssuedWIT is what a CA says about a WIT-SVID that it has just signed for somebody who knows the rest.
type IssuedWIT struct {
	// KeyID names the WIT authority that signed.
	KeyID string

	// NotBefore is when the token begins, zero if it does not say; Expiry is its end.
	NotBefore, Expiry time.Time
}

// CheckIssuedWITSVID says whether a WIT-SVID is what its holder asked for: for this SPIFFE ID and this public key, signed by
// one of these WIT authorities, by their key ids, and not expired at now. It is for whoever keeps the private key, such as
// an agent: it tells nobody who the presenter of a token is, which takes a proof of possession as well (WIT-30).
//
// The error is a [RowError]. It never repeats the token. [WIT-SVID §2, §3]
func CheckIssuedWITSVID(token string, id spiffeid.ID, key crypto.PublicKey, authorities map[string]crypto.PublicKey, now time.Time) (IssuedWIT, error) {
	parts, err := splitToken(token, 0)
	if err != nil {
		return IssuedWIT{}, err
	}
	header, err := parseHeader(parts[0])
	if err != nil {
		return IssuedWIT{}, err
	}
	if typ, _ := header.members["typ"].(string); typ != witType {
		return IssuedWIT{}, broken("WIT-04", "header typ of the token is %s, it must be %s", quoteValue(header.members["typ"]), witType)
	}
	if header.kid == "" {
		return IssuedWIT{}, broken("WIT-02", "token names no key: the header kid is missing or empty")
	}
	for name := range header.members {
		if name != "alg" && name != "kid" && name != "typ" {
			return IssuedWIT{}, broken("WIT-06", "token has the header %q, an issuer sets alg, kid and typ", excerpt(name))
		}
	}
	payload, claims, err := parseClaims(parts[1])
	if err != nil {
		return IssuedWIT{}, err
	}
	out := IssuedWIT{KeyID: header.kid}
	if err := out.readClaims(claims, id, key, now); err != nil {
		return IssuedWIT{}, err
	}
	authority, ok := authorities[header.kid]
	if !ok {
		return IssuedWIT{}, broken("WIT-51", "token names the key %q, which is no WIT authority of trust domain %q", excerpt(header.kid), id.TrustDomain())
	}
	if err := keyFits(header.alg, authority); err != nil {
		return IssuedWIT{}, err
	}
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.SignatureAlgorithm(header.alg)})
	if err != nil {
		return IssuedWIT{}, broken("WIT-01", "token is malformed: %w", err)
	}
	if verified, err := jws.Verify(authority); err != nil || !bytes.Equal(verified, payload) {
		return IssuedWIT{}, broken("WIT-01", "signature of the token does not verify with the key %q", excerpt(header.kid))
	}
	return out, nil
}

func (w *IssuedWIT) readClaims(claims map[string]any, id spiffeid.ID, key crypto.PublicKey, now time.Time) error {
	if sub, _ := claims["sub"].(string); sub != id.String() {
		return broken("WIT-08", "claim sub of the token is %s, it must be %q", quoteValue(claims["sub"]), id)
	}
	if _, has := claims["aud"]; has {
		return broken("WIT-21", "token has the claim aud, which a WIT-SVID must not have")
	}
	expiry, has := claims["exp"]
	if !has {
		return broken("WIT-16", "claim exp of the token is missing")
	}
	var err error
	if w.Expiry, err = readNumericDate("exp", expiry, "WIT-16"); err != nil {
		return err
	}
	if !now.Before(w.Expiry) {
		return broken("WIT-16", "token expired at %s, it is now %s", w.Expiry.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	if begin, has := claims["nbf"]; has {
		if w.NotBefore, err = readNumericDate("nbf", begin, "WIT-17"); err != nil {
			return err
		}
	}
	confirmation, _ := claims["cnf"].(map[string]any)
	jwk, ok := confirmation["jwk"].(map[string]any)
	if !ok {
		return broken("WIT-10", "claim cnf of the token is missing, or has no jwk")
	}
	bound, err := parsePublicKey(jwk)
	if err != nil {
		return broken("WIT-13", "cnf.jwk of the token: %w", err)
	}
	alg, _ := jwk["alg"].(string)
	if !slices.Contains(jwtAlgorithms[:], alg) {
		return broken("WIT-11", "cnf.jwk.alg of the token is %s, allowed are %v", quoteValue(jwk["alg"]), jwtAlgorithms)
	}
	if err := keyFits(alg, bound); err != nil {
		return broken("WIT-12", "cnf.jwk of the token: %w", err)
	}
	if equal, ok := bound.(interface{ Equal(crypto.PublicKey) bool }); !ok || !equal.Equal(key) {
		return broken("WIT-10", "token is bound to another key")
	}
	return nil
}

// MarshalWITJWKS returns the WIT authorities of a trust domain, by their key ids, in the form that the Workload API hands
// out: a JWK Set whose keys say that their use is wit-svid (DEC-11), sorted by key id, and [] for none.
//
// The error is a [RowError] if a key has no id or cannot verify a WIT-SVID.
func MarshalWITJWKS(keys map[string]crypto.PublicKey) ([]byte, error) {
	return marshalSet(useWITSVID, keys)
}

// MarshalWITKey returns a private key on P-256 as the JWK that the Workload API hands out beside the WIT-SVID that is bound
// to it. It is a secret. (WAPI-74)
func MarshalWITKey(key *ecdsa.PrivateKey) (string, error) {
	if key == nil || key.Curve != elliptic.P256() {
		return "", broken("WPT-07", "the key of a WIT-SVID must be an EC key on P-256")
	}
	doc, err := jose.JSONWebKey{Key: key, Algorithm: algorithmOf(key.Curve)}.MarshalJSON()
	if err != nil {
		return "", broken("WAPI-74", "writing the key of a WIT-SVID: %w", err)
	}
	return string(doc), nil
}
