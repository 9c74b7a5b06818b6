package gcpiit

import (
	"crypto/rsa"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/signet-id/signet/ca/nodeattest"
)

const (
	// maxTokenBytes bounds the token. Google's have about 1.5 KB, more with license codes.
	maxTokenBytes = 16 << 10
	maxNameBytes  = 256
	// leeway is how far Google's clock and ours may be apart.
	leeway = time.Minute
	// maxLife is the longest validity of a token that is believed. Google's are valid for an hour.
	maxLife = time.Hour + leeway
)

// issuers are the names under which Google issues identity tokens.
var issuers = []string{"https://accounts.google.com", "accounts.google.com"}

// A token is an identity token that has not been verified.
type token struct {
	jwt *jwt.JSONWebToken
	kid string
}

func malformed(format string, args ...any) error {
	return nodeattest.Refuse(nodeattest.Malformed, format, args...)
}

// parseToken reads a JWT with the one algorithm that Google uses; with any other, no key is even looked for. The error
// never repeats the token.
func parseToken(payload []byte) (*token, error) {
	if len(payload) > maxTokenBytes {
		return nil, malformed("the identity token has %d bytes, at most %d are allowed", len(payload), maxTokenBytes)
	}
	parsed, err := jwt.ParseSigned(string(payload), []jose.SignatureAlgorithm{jose.RS256})
	if err != nil || len(parsed.Headers) != 1 {
		return nil, malformed("unable to parse the identity token: not a JWT that is signed with RS256")
	}
	h := parsed.Headers[0]
	if h.KeyID == "" {
		return nil, malformed("unable to parse the identity token: its header has no kid")
	}
	return &token{jwt: parsed, kid: h.KeyID}, nil
}

// claims are those of Google's identity tokens with format=full, as far as they are used.
type claims struct {
	jwt.Claims
	Email         string `json:"email"`
	EmailVerified bool   `json:"email_verified"`
	Google        struct {
		ComputeEngine *computeEngine `json:"compute_engine"`
	} `json:"google"`
}

type computeEngine struct {
	ProjectID    string `json:"project_id"`
	Zone         string `json:"zone"`
	InstanceID   string `json:"instance_id"`
	InstanceName string `json:"instance_name"`
}

// verify checks the signature and reads the claims, of which none may occur twice.
func (t *token) verify(key *rsa.PublicKey) (*claims, error) {
	var c claims
	if err := t.jwt.Claims(key, &c); err != nil {
		return nil, nodeattest.Refuse(nodeattest.Malformed, "failed to validate the identity token signature").Because(err)
	}
	return &c, nil
}

// check judges the claims of a verified token.
func (c *claims) check(audience string, now time.Time) error {
	denied := func(format string, args ...any) error {
		return nodeattest.Refuse(nodeattest.Denied, "failed to validate the identity token claims: "+format, args...)
	}
	switch {
	case !slices.Contains(issuers, c.Issuer):
		return denied("the issuer %q is not Google", clip(c.Issuer))
	case len(c.Audience) != 1 || c.Audience[0] != audience:
		return denied("the audience is not %q", audience)
	case c.Expiry == nil || c.IssuedAt == nil:
		return denied("exp or iat is missing")
	case !now.Before(c.Expiry.Time().Add(leeway)):
		return denied("the token has expired, at %s", c.Expiry.Time().UTC().Format(time.RFC3339))
	case now.Add(leeway).Before(c.IssuedAt.Time()):
		return denied("the token is issued in the future, at %s", c.IssuedAt.Time().UTC().Format(time.RFC3339))
	case c.NotBefore != nil && now.Add(leeway).Before(c.NotBefore.Time()):
		return denied("the token is not valid yet")
	case c.Expiry.Time().Sub(c.IssuedAt.Time()) > maxLife:
		return denied("the token is valid for longer than %v", maxLife)
	case c.Google.ComputeEngine == nil:
		return denied("there is no google.compute_engine; the agent must ask for format=full, on an instance of Compute Engine")
	}
	m := c.Google.ComputeEngine
	switch {
	case !isName(m.ProjectID):
		return denied("google.compute_engine.project_id is missing or malformed")
	case !isName(m.Zone):
		return denied("google.compute_engine.zone is missing or malformed")
	case !isName(m.InstanceName):
		return denied("google.compute_engine.instance_name is missing or malformed")
	case m.InstanceID == "" || len(m.InstanceID) > 20 || strings.Trim(m.InstanceID, "0123456789") != "":
		return denied("google.compute_engine.instance_id is not a number of at most 20 digits")
	case len(c.Email) > maxNameBytes || strings.ContainsFunc(c.Email, func(r rune) bool { return r <= ' ' || r > '~' }):
		return denied("email is malformed")
	}
	return nil
}

// isName says whether s can be the name of a project, zone or instance. Old projects have a domain and a colon in front.
func isName(s string) bool {
	return s != "" && len(s) <= maxNameBytes && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' || r == '.' || r == ':')
	})
}

// clip keeps foreign text in messages short.
func clip(s string) string {
	if len(s) > 64 {
		return strings.ToValidUTF8(s[:64], "") + "..."
	}
	return s
}
