package nodeattest

import (
	"context"
	"fmt"
	"strings"
)

// Shown is evidence that is one payload, for attestors that know no challenge.
type Shown struct {
	// Attestor is the attestor's name at the CA.
	Attestor string
	// Bytes are what the agent sends. They may be a secret, so that a Shown never prints them.
	Bytes []byte
}

// Format prints the attestor's name only, whatever the verb.
func (s Shown) Format(f fmt.State, _ rune) { _, _ = fmt.Fprintf(f, "[evidence of %s]", s.Attestor) }

// Type is the attestor's name at the CA.
func (s Shown) Type() string { return s.Attestor }

// Payload is what the agent sends.
func (s Shown) Payload(context.Context) ([]byte, error) { return s.Bytes, nil }

// Respond answers a challenge, of which there is none.
func (s Shown) Respond(context.Context, []byte) ([]byte, error) {
	return nil, fmt.Errorf("the CA sent a challenge, which %s attestation does not have; is server_address that of a CA?", s.Attestor)
}

// IsJWT says whether s has the form of a signed JWT and nothing around it, so that nothing else is shown to the CA for one.
// It is no judgement on it.
func IsJWT(s string) bool {
	parts := strings.Split(s, ".")
	for _, p := range parts {
		if p == "" || strings.ContainsFunc(p, func(r rune) bool {
			return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_')
		}) {
			return false
		}
	}
	return len(parts) == 3
}
