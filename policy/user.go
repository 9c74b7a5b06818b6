package policy

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/spiffe"
)

// A userIssuer issues tokens of users.
type userIssuer struct {
	spiffe.TokenIssuer
	header string // in lower case
}

// What a UserIssuer may hold.
const (
	maxIssuerBytes = 1024
	maxIssuerKeys  = 32
	maxAudiences   = 32
)

// newUserIssuer returns the issuer, or what is wrong with it.
func newUserIssuer(spec *policyv1.UserIssuer) (*userIssuer, error) {
	u := &userIssuer{header: strings.ToLower(spec.GetHeader())}
	u.Issuer, u.Audience, u.Keys = spec.GetIssuer(), slices.Clone(spec.GetAudience()), make(map[string]crypto.PublicKey)
	switch {
	case u.Issuer == "" || len(u.Issuer) > maxIssuerBytes:
		return nil, fmt.Errorf("issuer has %d bytes; it is the iss of the tokens, of 1 to %d", len(u.Issuer), maxIssuerBytes)
	case len(u.Audience) == 0 || len(u.Audience) > maxAudiences || slices.Contains(u.Audience, ""):
		return nil, fmt.Errorf("audience has %d names, or an empty one; tokens must be for one of 1 to %d", len(u.Audience), maxAudiences)
	case len(spec.GetKeys()) == 0 || len(spec.GetKeys()) > maxIssuerKeys:
		return nil, fmt.Errorf("it has %d keys; it needs 1 to %d", len(spec.GetKeys()), maxIssuerKeys)
	}
	if u.header != "authorization" {
		if why := headerFault(u.header); why != "" {
			return nil, fmt.Errorf("header %q cannot hold the token (%s); write Authorization, or a header of its own such as x-user-token", shorten(spec.GetHeader()), why)
		}
	}
	for _, k := range spec.GetKeys() {
		if k.GetKeyId() == "" {
			return nil, errors.New("a key has no id; it is the kid of the tokens")
		}
		if _, found := u.Keys[k.GetKeyId()]; found {
			return nil, fmt.Errorf("key %q is there twice", shorten(k.GetKeyId()))
		}
		key, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
		if err != nil {
			return nil, fmt.Errorf("key %q is not a public key in PKIX form: %w", shorten(k.GetKeyId()), err)
		}
		if err := spiffe.CheckTokenKey(key); err != nil {
			return nil, fmt.Errorf("key %q: %w", shorten(k.GetKeyId()), err)
		}
		u.Keys[k.GetKeyId()] = key
	}
	return u, nil
}

// CheckUserIssuer says what is wrong with an issuer of user tokens.
func CheckUserIssuer(spec *policyv1.UserIssuer) error {
	_, err := newUserIssuer(spec)
	return err
}

// userIssuers returns the issuers by name. A malformed one is left out, and so is one of a name that is there twice: their
// tokens are never valid.
func userIssuers(list []*policyv1.UserIssuer) map[string]*userIssuer {
	issuers, twice := make(map[string]*userIssuer), make(map[string]bool)
	for _, spec := range list {
		name := spec.GetIssuer()
		if _, found := issuers[name]; found || twice[name] {
			twice[name] = true
			delete(issuers, name)
			continue
		}
		if u, err := newUserIssuer(spec); err == nil {
			issuers[name] = u
		} else {
			twice[name] = true
		}
	}
	return issuers
}

// User returns what the token of the user says for whom the peer of a request asks: the token in the header that its
// issuer names, valid at now. It is nil without an error if no rule for calls from this peer to this service asks for a
// user. An enforcement point calls it before Decide, and sets Request.User.
//
// The error is for the operator, and holds nothing of the token. Where several issuers have valid tokens there is no
// telling for whom the call is: an error.
func (p *Policies) User(r *Request, now time.Time) (*User, error) {
	names := p.UserIssuers(r.Service, r.Peer)
	if len(names) == 0 {
		return nil, nil
	}
	var user *User
	var errs []error
	for _, name := range names {
		found, err := p.userOf(name, r.Headers, now)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("user token of %q: %w", shorten(name), err))
		case user != nil:
			return nil, fmt.Errorf("the request has user tokens of %q and of %q", shorten(user.Issuer), shorten(name))
		default:
			user = found
		}
	}
	if user == nil {
		return nil, errors.Join(errs...)
	}
	return user, nil
}

func (p *Policies) userOf(name string, headers Headers, now time.Time) (*User, error) {
	issuer := p.issuers[name]
	if issuer == nil {
		return nil, errors.New("no UserIssuer document that can be used describes this issuer")
	}
	lines := (&headerMap{headers}).lines(issuer.header)
	switch {
	case len(lines) == 0:
		return nil, fmt.Errorf("the request has no header %s", issuer.header)
	case len(lines) > 1:
		return nil, fmt.Errorf("the request has %d lines of header %s", len(lines), issuer.header)
	}
	token := lines[0]
	const bearer = "bearer "
	switch {
	case len(token) > len(bearer) && strings.EqualFold(token[:len(bearer)], bearer):
		token = token[len(bearer):]
	case issuer.header == "authorization":
		return nil, errors.New("the header authorization is not of the kind Bearer")
	}
	claims, err := spiffe.ValidateToken(token, issuer.TokenIssuer, spiffe.JWTOptions{Now: now})
	if err != nil {
		return nil, err
	}
	return &User{Issuer: issuer.Issuer, Claims: claims}, nil
}

// peerHints returns the hints that a policy knows, by SPIFFE ID. An ID with two different hints has none.
func peerHints(pol *policyv1.Policy) map[string]string {
	if len(pol.GetPeerHints()) == 0 {
		return nil
	}
	hints, unclear := make(map[string]string), make(map[string]bool)
	for _, h := range pol.GetPeerHints() {
		if old, found := hints[h.GetSpiffeId()]; found && old != h.GetHint() {
			unclear[h.GetSpiffeId()] = true
		}
		hints[h.GetSpiffeId()] = h.GetHint()
	}
	for id := range unclear {
		delete(hints, id)
	}
	return hints
}

// WithPeerHint returns the same policies as they would decide if the registration entry of id had this hint. It is for
// trying out; a service never calls it.
func (p *Policies) WithPeerHint(id spiffeid.ID, hint string) *Policies {
	if p == nil {
		return nil
	}
	with := *p
	with.hints = map[spiffeid.ID]string{id: hint}
	return &with
}
