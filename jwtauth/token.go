// Package jwtauth is for programs that show and check JWT-SVIDs in their calls over HTTP and gRPC. A Cache fetches tokens
// from the Workload API, one for each audience, and renews them before they end; a Transport and PerRPC attach them to
// calls, each callee under its own audience; a Verifier checks those that come in. It never writes a token anywhere.
package jwtauth

import (
	"fmt"
	"io"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A TokenSource gives tokens for one audience. It has the shape of oauth2.TokenSource; docs/policy/jwt.md shows the few lines
// that make it one.
type TokenSource interface {
	// Token returns a token that is valid for a while. It is safe for concurrent use.
	Token() (*Token, error)
}

// A Token is a JWT-SVID with what is known of it. It has the names of oauth2.Token. It prints as "[JWT-SVID]".
type Token struct {
	// AccessToken is the JWT-SVID itself, for one header of one call.
	AccessToken string
	// TokenType is Bearer.
	TokenType string
	// Expiry is the end of its validity.
	Expiry time.Time
	// ID is the subject.
	ID spiffeid.ID
}

// Format keeps the token out of logs.
func (t Token) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[JWT-SVID]") }

// MarshalText keeps it out of documents.
func (t Token) MarshalText() ([]byte, error) { return []byte("[JWT-SVID]"), nil }

func (t *Token) header() string { return t.TokenType + " " + t.AccessToken }
