package spiffe_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/signet-id/signet/spiffe"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func ExampleParseID() {
	id, err := spiffe.ParseID("spiffe://example.org/billing/payments")
	fmt.Println(id.TrustDomain(), id.Path(), err)

	_, err = spiffe.ParseID("spiffe://Example.org/billing")
	fmt.Println(err)
	// Output:
	// example.org /billing/payments <nil>
	// trust domain "Example.org" has the uppercase letter 'E', write it in lower case [ID-07]
}

func ExampleValidateJWTSVID() {
	// An authority of example.org, and a token that it issued.
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		fmt.Println(err)
		return
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k1"}}, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	now := time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
	claims := fmt.Sprintf(`{"sub":"spiffe://example.org/web","aud":"spiffe://example.org/documents","exp":%d}`, now.Add(5*time.Minute).Unix())
	signed, err := signer.Sign([]byte(claims))
	if err != nil {
		fmt.Println(err)
		return
	}
	token, err := signed.CompactSerialize()
	if err != nil {
		fmt.Println(err)
		return
	}

	// The recipient knows the bundle of example.org, and its own name.
	bundle := jwtbundle.FromJWTAuthorities(spiffeid.RequireTrustDomainFromString("example.org"), map[string]crypto.PublicKey{"k1": key.Public()})
	svid, err := spiffe.ValidateJWTSVID(token, bundle, []string{"spiffe://example.org/documents"}, spiffe.JWTOptions{Now: now})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(svid.ID, "until", svid.Expiry.Format(time.TimeOnly))

	_, err = spiffe.ValidateJWTSVID(token, bundle, []string{"spiffe://example.org/archive"}, spiffe.JWTOptions{Now: now})
	fmt.Println(spiffe.RowOf(err))
	// Output:
	// spiffe://example.org/web until 12:05:00
	// JWT-14
}
