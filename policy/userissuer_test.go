package policy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/strictyaml"
)

func parseIssuer(text string) (*policyv1.UserIssuer, string, error) {
	docs, err := strictyaml.Split([]byte(text), "u.yaml", 1)
	if err != nil {
		return nil, "", err
	}
	return ParseUserIssuer(docs[0])
}

func TestParseUserIssuer(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := (&jose.JSONWebKey{Key: key.Public(), KeyID: "k1"}).MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	private, err := (&jose.JSONWebKey{Key: key, KeyID: "k1"}).MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	got, url, err := parseIssuer(fmt.Sprintf("kind: UserIssuer\nname: corp\nissuer: https://login.example.com\naudience: [documents, mail]\nheader: X-User-Token\njwks: '{\"keys\":[%s]}'\n", public))
	if err != nil {
		t.Fatal(err)
	}
	der, _ := x509.MarshalPKIXPublicKey(key.Public())
	if got.Name != "corp" || got.Issuer != "https://login.example.com" || fmt.Sprint(got.Audience) != "[documents mail]" || got.Header != "X-User-Token" || url != "" ||
		len(got.Keys) != 1 || got.Keys[0].KeyId != "k1" || string(got.Keys[0].PublicKey) != string(der) {
		t.Errorf("got %v, %q", got, url)
	}
	got, url, err = parseIssuer("{kind: UserIssuer, name: corp, issuer: i, audience: [a], jwksURL: 'https://login.example.com/keys?v=2'}")
	if err != nil || got.Header != "Authorization" || len(got.Keys) != 0 || url != "https://login.example.com/keys?v=2" {
		t.Errorf("got %v, %q, %v", got, url, err)
	}
	_, _, err = parseIssuer(fmt.Sprintf("kind: UserIssuer\nname: corp\nissuer: i\naudience: [a]\njwks: '{\"keys\":[%s]}'\n", private))
	if err == nil || !strings.Contains(err.Error(), `private member "d"`) || strings.Contains(err.Error(), string(private)) {
		t.Errorf("a private key: %v", err)
	}
	const head = "kind: UserIssuer\nname: x\nissuer: i\naudience: [a]\n"
	for doc, want := range map[string]string{
		"kind: UserIssuer\nname: x\naudience: [a]\njwksURL: https://a":               "issuer is missing",
		"kind: UserIssuer\nname: x\nissuer: ''\naudience: [a]\njwksURL: https://a":   "issuer has 0 bytes",
		"kind: UserIssuer\nname: x\nissuer: i\njwksURL: https://a":                   "audience is missing",
		"kind: UserIssuer\nname: x\nissuer: i\naudience: []\njwksURL: https://a":     "audience is empty",
		"kind: UserIssuer\nname: x\nissuer: i\naudience: ['']\njwksURL: https://a":   "audience has 0 bytes",
		"kind: UserIssuer\nname: x\nissuer: i\naudience: [a, a]\njwksURL: https://a": "listed twice",
		"kind: UserIssuer\nname: X y\nissuer: i\naudience: [a]\njwksURL: https://a":  `name is "X y"`,
		head + "jwksURL: http://a":                   "must begin with https://",
		head + "jwksURL: 'https://u:secret@a'":       "must not hold a user or password",
		head + "jwksURL: 'https:///keys'":            "has no host",
		head + "jwksURL: 'https://a/#b'":             "fragment",
		head + "jwksURL: 'https://a\x7f:secret'":     "u.yaml",
		head:                                         "jwksURL is missing",
		head + "jwks: '{}'\njwksURL: https://a":      "exclude each other",
		head + "jwks: '{}'":                          "no keys",
		head + "jwks: {keys: []}":                    "it must be",
		head + "header: Cookie\njwksURL: https://a":  "cannot hold the token",
		head + "header: 'a b'\njwksURL: https://a":   "cannot hold the token",
		head + "header: ':path'\njwksURL: https://a": "cannot hold the token",
		head + "secret: x\njwksURL: https://a":       `unknown field "secret"`,
	} {
		_, _, err := parseIssuer(doc)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret@") {
			t.Errorf("%s\n got %v\nwant %s", doc, err, want)
		}
	}
}

func TestCheckReadsUserIssuers(t *testing.T) {
	docs, err := strictyaml.Split([]byte("{kind: UserIssuer, name: a, issuer: i, audience: [a], jwksURL: 'https://a'}\n---\n{kind: UserIssuer, name: a, issuer: i, audience: [a], jwksURL: 'https://a'}\n"), "u.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Check(docs, exampleOrg); err == nil || !strings.Contains(err.Error(), `u.yaml:3:26: a second UserIssuer named "a"`) {
		t.Errorf("two of one name: %v", err)
	}
	got, err := Check(docs[:1], exampleOrg)
	if err != nil || len(got.UserIssuers) != 1 || got.UserIssuers[0].Name != "a" {
		t.Errorf("got %v, %v", got, err)
	}
}
