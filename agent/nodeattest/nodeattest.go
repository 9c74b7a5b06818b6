// Package nodeattest holds the evidence by which this node proves to the CA what it is, and the key that it proves it
// for. The agent calls it when it attests; it never talks to the CA itself and never writes to disk.
package nodeattest

import "context"

// An Attestor proves what this node is, as often as it is asked: at the first start, when the agent renews its SVID by
// attesting again, and after an eviction. It is called by one goroutine at a time.
type Attestor interface {
	// Type is the attestor's name at the CA.
	Type() string

	// Begin gathers the evidence for one attestation, afresh: files may have changed. It returns before ctx ends. If the
	// evidence is an io.Closer, it is closed when the attestation is over.
	Begin(ctx context.Context) (Evidence, error)
}

// Evidence is what is shown in one attestation. It is what the client of the CA asks for.
type Evidence interface {
	// Type is the attestor's name at the CA.
	Type() string
	// Payload is what the agent sends first.
	Payload(ctx context.Context) ([]byte, error)
	// Respond answers a challenge of the CA, which may be anybody's until the TLS connection is verified; it is then.
	Respond(ctx context.Context, challenge []byte) ([]byte, error)
}

// MaxChallengeBytes bounds the challenges that are looked at.
const MaxChallengeBytes = 64 << 10
