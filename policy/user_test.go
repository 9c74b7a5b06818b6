package policy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// An idp issues tokens of users.
type idp struct {
	key  *ecdsa.PrivateKey
	spec *policyv1.UserIssuer
}

func newIDP(t testing.TB, issuer, header string) *idp {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return &idp{key, &policyv1.UserIssuer{Name: "login", Issuer: issuer, Audience: []string{"documents"}, Header: header, Keys: []*policyv1.UserKey{{KeyId: "k", PublicKey: der}}}}
}

func (i *idp) token(t testing.TB, issuer string, groups ...string) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: i.key, KeyID: "k"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(jwt.Claims{Issuer: issuer, Audience: jwt.Audience{"documents"}, Expiry: jwt.NewNumericDate(userNow.Add(time.Minute))}).
		Claims(map[string]any{"groups": groups}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

var userNow = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

const login, other = "https://login.example", "https://other.example"

func userSet(issuers ...*policyv1.UserIssuer) *policyv1.PolicySet {
	set := setOf(ruleWhen(policyv1.Effect_EFFECT_ALLOW, fixedUser+`"editors" in user.claims.groups`))
	set.UserIssuers = issuers
	return set
}

func TestUser(t *testing.T) {
	i, o := newIDP(t, login, "x-user-token"), newIDP(t, other, "Authorization")
	good := i.token(t, login, "editors")
	bad := good[:len(good)-8] + "AAAAAAAA"
	p := compile(t, userSet(i.spec, o.spec))
	for _, tt := range []struct {
		name    string
		headers http.Header
		want    string // the error; empty: a user
	}{
		{"the token alone", http.Header{"X-User-Token": {good}}, ""},
		{"after Bearer", http.Header{"X-User-Token": {"bearer " + good}}, ""},
		{"no header", http.Header{}, "no header x-user-token"},
		{"in another header", http.Header{"Authorization": {"Bearer " + good}}, "no header x-user-token"},
		{"two lines", http.Header{"X-User-Token": {good, good}}, "2 lines"},
		{"two tokens in a line", http.Header{"X-User-Token": {good + "," + good}}, "the byte"},
		{"a signature that is none", http.Header{"X-User-Token": {bad}}, "signature"},
		{"of another issuer", http.Header{"X-User-Token": {i.token(t, other, "editors")}}, "iss"},
		{"another's signature", http.Header{"X-User-Token": {o.token(t, login, "editors")}}, "signature"},
		{"too long", http.Header{"X-User-Token": {strings.Repeat("A", 1<<20)}}, "bytes"},
	} {
		r := asked(t, "", "")
		r.Headers = tt.headers
		user, err := p.User(r, userNow)
		r.User = user
		switch {
		case tt.want == "" && (err != nil || user == nil || user.Issuer != login || !p.Decide(r).Allowed):
			t.Errorf("%s: %v, %v, decision %v", tt.name, user, err, p.Decide(r))
		case tt.want != "" && (err == nil || user != nil || !strings.Contains(err.Error(), tt.want) || p.Decide(r).Allowed):
			t.Errorf("%s: %v, error %v, want one with %q, decision %v", tt.name, user, err, tt.want, p.Decide(r))
		}
		if err != nil && (strings.Contains(err.Error(), strings.Split(good, ".")[1]) || strings.Contains(err.Error(), "AAAAAAAA")) {
			t.Errorf("%s: the error holds the token: %v", tt.name, err)
		}
	}
	if user, err := p.User(func() *Request { r := asked(t, "", ""); r.Headers = http.Header{"X-User-Token": {good}}; return r }(), userNow.Add(2*time.Minute)); err == nil {
		t.Errorf("an expired token is %v", user)
	}
	r := asked(t, "", "")
	r.Peer, r.Headers = id(t, "/stranger"), http.Header{"X-User-Token": {good}}
	if user, err := p.User(r, userNow); user != nil || err != nil {
		t.Errorf("no rule asks for a user of this peer's calls, and there is %v, %v", user, err)
	}
	if got := p.UserIssuers(id(t, "/s"), id(t, "/a")); !slices.Equal(got, []string{login}) {
		t.Errorf("UserIssuers is %q", got)
	}
	if got := ConditionIssuers(p.set.Policies[0].Rules[0]); !slices.Equal(got, []string{login}) {
		t.Errorf("ConditionIssuers is %q", got)
	}
}

// TestUsersOfTwoIssuers holds that a request with valid tokens of two issuers has no user: it would be for two people.
func TestUsersOfTwoIssuers(t *testing.T) {
	i, o := newIDP(t, login, "x-user-token"), newIDP(t, other, "authorization")
	set := setOf(ruleWhen(policyv1.Effect_EFFECT_ALLOW, `(user.issuer == "`+login+`" && user.claims.groups == "x") || user.issuer == "`+other+`"`))
	set.UserIssuers = []*policyv1.UserIssuer{i.spec, o.spec}
	p := compile(t, set)
	r := asked(t, "", "")
	r.Headers = http.Header{"X-User-Token": {i.token(t, login)}}
	if user, err := p.User(r, userNow); err != nil || user.Issuer != login {
		t.Errorf("%v, %v", user, err)
	}
	r.Headers = http.Header{"Authorization": {"Bearer " + o.token(t, other)}}
	if user, err := p.User(r, userNow); err != nil || user.Issuer != other {
		t.Errorf("%v, %v", user, err)
	}
	r.Headers = http.Header{"Authorization": {o.token(t, other)}}
	if user, err := p.User(r, userNow); err == nil || user != nil {
		t.Errorf("Authorization without Bearer: %v, %v", user, err)
	}
	r.Headers = http.Header{"X-User-Token": {i.token(t, login)}, "Authorization": {"Bearer " + o.token(t, other)}}
	if user, err := p.User(r, userNow); err == nil || user != nil {
		t.Errorf("two users: %v, %v", user, err)
	}
}

// TestUserIssuerThatCannotBeUsed holds that what is malformed validates nothing, and says why.
func TestUserIssuerThatCannotBeUsed(t *testing.T) {
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(small.Public())
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, want string
		change     func(*policyv1.UserIssuer)
	}{
		{"no issuer", "issuer has 0 bytes", func(u *policyv1.UserIssuer) { u.Issuer = "" }},
		{"no audience", "audience", func(u *policyv1.UserIssuer) { u.Audience = nil }},
		{"an empty audience", "audience", func(u *policyv1.UserIssuer) { u.Audience = []string{""} }},
		{"no keys", "0 keys", func(u *policyv1.UserIssuer) { u.Keys = nil }},
		{"a key without an id", "no id", func(u *policyv1.UserIssuer) { u.Keys[0].KeyId = "" }},
		{"a key twice", "twice", func(u *policyv1.UserIssuer) { u.Keys = append(u.Keys, u.Keys[0]) }},
		{"a key that is none", "PKIX", func(u *policyv1.UserIssuer) { u.Keys[0].PublicKey = []byte("x") }},
		{"a small key", "1024 bits", func(u *policyv1.UserIssuer) { u.Keys[0].PublicKey = der }},
		{"a cookie", "cannot hold the token", func(u *policyv1.UserIssuer) { u.Header = "Cookie" }},
		{"no header", "1 to 128", func(u *policyv1.UserIssuer) { u.Header = "" }},
	} {
		i := newIDP(t, login, "x-user-token")
		tt.change(i.spec)
		if err := CheckUserIssuer(i.spec); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want one with %q", tt.name, err, tt.want)
		}
		r := asked(t, "", "")
		r.Headers = http.Header{"X-User-Token": {i.token(t, login, "editors")}, "Cookie": {i.token(t, login, "editors")}}
		if user, err := compile(t, userSet(i.spec)).User(r, userNow); err == nil || user != nil {
			t.Errorf("%s: there is a user %v, %v", tt.name, user, err)
		}
	}
	i := newIDP(t, login, "x-user-token")
	r := asked(t, "", "")
	r.Headers = http.Header{"X-User-Token": {i.token(t, login, "editors")}}
	for n, issuers := range [][]*policyv1.UserIssuer{nil, {i.spec, newIDP(t, login, "x-user-token").spec}} {
		if user, err := compile(t, userSet(issuers...)).User(r, userNow); err == nil || user != nil || !strings.Contains(fmt.Sprint(err), "UserIssuer") {
			t.Errorf("%d: %v, %v", n, user, err)
		}
	}
}
