package nodeattest

import (
	"context"
	"fmt"
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
