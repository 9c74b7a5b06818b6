// Package nodeattest says how the CA judges what an unknown node shows of itself: the contract between the door that
// nodes attest at and the attestors, which are in the packages below, one for each kind of evidence. It knows neither the
// registry nor the wire, signs nothing and remembers nothing; the door asks for the ban, signs and stores.
package nodeattest

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"github.com/signet-id/signet/spiffe"
)

const (
	// MaxPayloadBytes bounds what a caller that proved nothing yet can make an attestor look at, and MaxResponseBytes each
	// of its answers.
	MaxPayloadBytes  = 64 << 10
	MaxResponseBytes = 64 << 10
	// MaxChallenges bounds the questions of one attestation. Agents give up after 16.
	MaxChallenges = 8
	// MaxSelectors bounds what one attestor may say of a node.
	MaxSelectors = 1000
)

// An Attestor judges one kind of evidence. It is safe for concurrent use.
type Attestor interface {
	// Type is the attestor's name: in the request, in the agent's SPIFFE ID, and the type of its selectors.
	Type() string

	// Attest judges what a caller shows that is not trusted. It returns before ctx ends, and checks what is cheap before
	// what is expensive. What the caller did wrong, or the CA cannot find out now, is a *Refusal; an error of Challenge is
	// passed on; any other is answered as an internal error without its text.
	Attest(ctx context.Context, a Attempt) (*Evidence, error)
}

// An Attempt is what a caller shows.
type Attempt struct {
	// Payload is what it sent first, at most MaxPayloadBytes and not empty.
	Payload []byte

	// Address is where the caller comes from; the zero Addr if that is not known.
	Address netip.Addr

	// Challenge puts a question to the caller, which is not empty, and returns its answer of at most MaxResponseBytes. It may
	// be called MaxChallenges times.
	Challenge func(question []byte) ([]byte, error)
}

// Evidence is what was proven of a node.
type Evidence struct {
	// Path are the segments of the agent's SPIFFE ID after /spire/agent. The first is the attestor's type, unless the operator
	// has chosen other paths; it is never that of another attestor.
	Path []string

	// Selectors are the values of the node's selectors; their type is the attestor's. Doubles are left out later.
	Selectors []string

	// CanReattest says that the same evidence may be shown again: the agent then renews its SVID by attesting, and comes
	// back that way after an expiry or a loss. Without it the first to show the evidence is the node, and everybody else is
	// refused until an operator evicts the node; the agent renews by RenewAgent.
	CanReattest bool

	// Facts go into the audit log beside the attestor's name, such as the fingerprint of a certificate. No secrets.
	Facts map[string]any
}

// Check says whether the evidence is one that an attestor of that type may return, and gives the selectors, each once.
func (e *Evidence) Check(attestor string) ([]spiffe.Selector, error) {
	if len(e.Path) < 2 {
		return nil, fmt.Errorf("path %q is too short for an agent's", e.Path)
	}
	for _, segment := range e.Path {
		if segment == "" || strings.Contains(segment, "/") {
			return nil, fmt.Errorf("path segment %q cannot be one", segment)
		}
	}
	if n := len(e.Selectors); n > MaxSelectors {
		return nil, fmt.Errorf("%d selectors, more than the %d allowed", n, MaxSelectors)
	}
	selectors := make([]spiffe.Selector, 0, len(e.Selectors))
	seen := map[string]bool{}
	for _, value := range e.Selectors {
		s := spiffe.Selector{Type: attestor, Value: value}
		if err := s.Check(); err != nil {
			return nil, err
		}
		if !seen[value] {
			seen[value] = true
			selectors = append(selectors, s)
		}
	}
	return selectors, nil
}

// A Kind says whose fault a refusal is, and what the caller does about it.
type Kind int

const (
	// Malformed: the evidence cannot be read.
	Malformed Kind = iota + 1
	// Denied: it was read and does not convince. Agents of SPIRE stop here.
	Denied
	// Unavailable: what the CA asks about it does not answer now; the caller may try again.
	Unavailable
	// Internal: what the CA asks about it answers nonsense, or an error that the operator of the CA must see to.
	Internal
)

// A Refusal is why evidence was not accepted.
type Refusal struct {
	Kind Kind
	// Text is for the caller, who is not trusted: what is wrong with what it sent, nothing of what the CA knows besides.
	Text string
	// Reason is for the CA's log and audit log; it may say more. Nil: Text says all.
	Reason error
}

func (r *Refusal) Error() string {
	if r.Reason != nil {
		return r.Text + ": " + r.Reason.Error()
	}
	return r.Text
}

func (r *Refusal) Unwrap() error { return r.Reason }

// Because adds what only the CA's operators may know.
func (r *Refusal) Because(reason error) *Refusal {
	return &Refusal{Kind: r.Kind, Text: r.Text, Reason: reason}
}

// Refuse returns a refusal with a text for the caller.
func Refuse(kind Kind, format string, args ...any) *Refusal {
	return &Refusal{Kind: kind, Text: fmt.Sprintf(format, args...)}
}
