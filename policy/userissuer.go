package policy

import (
	"crypto/x509"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/spiffe"
)

// KindUserIssuer is the kind of the documents that say whose user tokens conditions may ask for.
const KindUserIssuer = "UserIssuer"

// maxKeysURL bounds the URL from which keys are fetched.
const maxKeysURL = 2048

type userIssuerDoc struct {
	Kind     text  `yaml:"kind" enum:"UserIssuer" required:"true" desc:"UserIssuer"`
	Name     text  `yaml:"name" required:"true" desc:"Name of the issuer, unique among UserIssuers."`
	Issuer   text  `yaml:"issuer" required:"true" desc:"The iss claim of its tokens, exactly."`
	Audience texts `yaml:"audience" required:"true" desc:"Audiences, of which a token must carry one."`
	Header   text  `yaml:"header" desc:"Request header that holds the token: Authorization (default; after Bearer), or any other (the token alone, or after Bearer)."`
	JWKS     text  `yaml:"jwks" desc:"The issuer's public keys as a JWK Set in JSON. Excludes jwksURL."`
	JWKSURL  text  `yaml:"jwksURL" desc:"Where the CA fetches the issuer's JWK Set, by https. Excludes jwks."`
}

// ParseUserIssuer reads a UserIssuer document. Without keys of its own it has the URL from which they are to be fetched. The
// error is of type strictyaml.Errors.
func ParseUserIssuer(doc strictyaml.Document) (issuer *policyv1.UserIssuer, jwksURL string, err error) {
	var d userIssuerDoc
	p := &parser{file: doc.File}
	p.decode(doc, &d)
	p.kind(d.Kind, KindUserIssuer)
	out := &policyv1.UserIssuer{Name: p.name(d.Name), Issuer: d.Issuer.Value, Header: d.Header.Value}
	switch {
	case d.Issuer.Line == 0:
		p.missing("issuer", "the iss claim of its tokens, such as https://login.example.com")
	case d.Issuer.Value == "" || len(d.Issuer.Value) > maxIssuerBytes:
		p.fail(d.Issuer, "issuer has %d bytes; it must have 1 to %d", len(d.Issuer.Value), maxIssuerBytes)
	}
	if d.Audience.Line == 0 {
		p.missing("audience", "the names under which the services accept user tokens")
	}
	if n := len(d.Audience.Value); n > maxAudiences {
		p.at(d.Audience.Line, d.Audience.Column, "audience has %d items, at most %d are allowed", n, maxAudiences)
	}
	for _, t := range p.filled("audience", d.Audience) {
		switch {
		case t.Value == "" || len(t.Value) > maxIssuerBytes:
			p.fail(t, "audience has %d bytes; it must have 1 to %d", len(t.Value), maxIssuerBytes)
		case slices.Contains(out.Audience, t.Value):
			p.fail(t, "audience %q is listed twice", shorten(t.Value))
		}
		out.Audience = append(out.Audience, t.Value)
	}
	if d.Header.Line == 0 {
		out.Header = "Authorization"
	} else {
		p.headerName(d.Header)
	}
	switch {
	case d.JWKS.Line != 0 && d.JWKSURL.Line != 0:
		p.fail(d.JWKSURL, "jwks and jwksURL exclude each other; keep one")
	case d.JWKS.Line == 0 && d.JWKSURL.Line == 0:
		p.missing("jwksURL", "where the issuer publishes its keys, or the keys themselves as jwks")
	case d.JWKSURL.Line != 0:
		p.httpsURL(d.JWKSURL)
	default:
		if out.Keys, _, err = ParseUserKeys([]byte(d.JWKS.Value)); err != nil {
			p.fail(d.JWKS, "jwks: %v", err)
		}
	}
	if err := p.err(); err != nil {
		return nil, "", err
	}
	return out, d.JWKSURL.Value, nil
}

// ParseUserKeys reads a JWK Set into the keys of a UserIssuer, in order of key id. What is left out is said in skipped; see
// spiffe.ParseUserKeys.
func ParseUserKeys(jwks []byte) (keys []*policyv1.UserKey, skipped []error, err error) {
	parsed, skipped, err := spiffe.ParseUserKeys(jwks)
	if err != nil {
		return nil, skipped, err
	}
	if len(parsed) > maxIssuerKeys {
		return nil, skipped, fmt.Errorf("the JWK Set has %d keys that can verify tokens, at most %d are allowed", len(parsed), maxIssuerKeys)
	}
	for _, kid := range slices.Sorted(maps.Keys(parsed)) {
		der, err := x509.MarshalPKIXPublicKey(parsed[kid])
		if err != nil {
			return nil, skipped, err
		}
		keys = append(keys, &policyv1.UserKey{KeyId: kid, PublicKey: der})
	}
	return keys, skipped, nil
}

// headerName refuses what cannot be, or must not be, the header of a token.
func (p *parser) headerName(t text) {
	if name := strings.ToLower(t.Value); name != "authorization" {
		if why := headerFault(name); why != "" {
			p.fail(t, "header %q cannot hold the token (%s); write Authorization, or a header of its own such as X-User-Token", shorten(t.Value), why)
		}
	}
}

func (p *parser) httpsURL(t text) {
	u, err := url.Parse(t.Value)
	switch {
	case err != nil:
		p.fail(t, "jwksURL is no URL such as https://login.example.com/keys") // the text may hold a password
	case len(t.Value) > maxKeysURL:
		p.fail(t, "jwksURL has %d bytes, at most %d are allowed", len(t.Value), maxKeysURL)
	case u.Scheme != "https":
		p.fail(t, "jwksURL must begin with https://; keys that anybody on the way can change are worth nothing")
	case u.User != nil:
		p.fail(t, "jwksURL must not hold a user or password")
	case u.Hostname() == "" || u.Opaque != "":
		p.fail(t, "jwksURL has no host")
	case strings.Contains(t.Value, "#"):
		p.fail(t, "jwksURL must not have a fragment")
	}
}
