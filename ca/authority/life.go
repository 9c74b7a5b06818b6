package authority

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store"
)

// This file moves authorities through their lives. Each step is one commit, checked against the index and against every
// record that it builds on: of two operators at once one wins, and a crash leaves the state of before or of after.

// Kind is what an authority signs: X509-SVIDs, JWT-SVIDs or WIT-SVIDs.
type Kind = keys.Use

// The kinds of authorities.
const (
	KindX509 = keys.UseX509
	KindJWT  = keys.UseJWT
	KindWIT  = keys.UseWIT
)

const (
	// maxPublished is how many authorities of a kind may be in the bundle. Every one of them is trusted by everybody.
	maxPublished = 16

	// keptRevoked is how many records of revoked authorities of a kind are kept, for those who ask what became of them and
	// for callers whose SVID one of them has signed.
	keptRevoked = 64

	// signedSlack is how long after the last moment at which an SVID of an authority can be valid the authority still counts
	// as needed: another replica may have signed a little longer, and a verifier's clock may be late.
	signedSlack = 2 * time.Minute
)

var (
	// ErrConflict is returned when somebody else changed the authorities at the same moment. Nothing was changed.
	ErrConflict = errors.New("somebody else changed the authorities at this moment; look again with signet authority list and retry")

	// ErrUnknownAuthority is returned for an id that no authority of the kind has.
	ErrUnknownAuthority = errors.New("no such authority; signet authority list shows all")

	// ErrTooMany is returned by Prepare when the bundle holds as many authorities as it may.
	ErrTooMany = errors.New("the bundle holds as many authorities as it may; revoke old ones first")

	// ErrBelow is in the chain of the error for an intermediate of an upstream CA, which cannot be tainted or revoked.
	ErrBelow = errors.New("verifiers trust what it signed as long as that root is in the bundle; let the upstream get a new root, and taint and revoke the old one when an authority below the new one is active")

	// ErrNotYet is in the chain of the error of Activate for an authority that is not valid yet, or no more.
	ErrNotYet = errors.New("it cannot sign now")
)

// A StateError says that an authority is not in the state from which the step can be made.
type StateError struct {
	Kind  Kind
	ID    string
	State State
	// Want is the state it would have to be in.
	Want State
}

func (e *StateError) Error() string {
	hint := ""
	switch {
	case e.State == StateActive && e.Want != StatePrepared:
		hint = "; activate another one first, or say that the key was stolen (--stolen)"
	case e.State == StateOld && e.Want == StateTainted:
		hint = "; taint it first, so that what it signed is re-issued"
	}
	return fmt.Sprintf("%s authority %s is %s, not %s%s", e.Kind, e.ID, e.State, e.Want, hint)
}

// A life is when an authority came into each of its states. Authorities that were made before this was recorded, and the
// first ones, lack the early moments.
type life struct {
	PreparedAt    time.Time `json:"prepared_at,omitzero"`
	ActivatedAt   time.Time `json:"activated_at,omitzero"`
	DeactivatedAt time.Time `json:"deactivated_at,omitzero"`
	TaintedAt     time.Time `json:"tainted_at,omitzero"`
	RevokedAt     time.Time `json:"revoked_at,omitzero"`

	// SignedUntil is set when it stops signing: nothing that it signed is valid after that.
	SignedUntil time.Time `json:"signed_until,omitzero"`

	reach
}

// An Authority is one authority in any state, with what is known of its life. Moments that have not come are zero.
type Authority struct {
	Kind       Kind
	ID         string
	Generation uint64
	State      State
	// Certificate is nil for JWT and WIT authorities.
	Certificate *x509.Certificate
	// Above leads from the issuer of Certificate to the root, which is the last and the one that is in the bundle. It is
	// empty for self-signed X.509 authorities.
	Above []*x509.Certificate
	// NotBefore and NotAfter are the time in which it, and all above it, is valid.
	NotBefore, NotAfter time.Time

	PreparedAt, ActivatedAt, DeactivatedAt, TaintedAt, RevokedAt time.Time
	// SignedUntil is the moment after which nothing that an old, tainted or revoked authority signed is valid.
	SignedUntil time.Time
}

// PublishedID is the id under which the bundle holds the authority, and by which agents say that they have handed it on:
// below an upstream CA that of the root, else its own.
func (a Authority) PublishedID() string {
	if len(a.Above) == 0 {
		return a.ID
	}
	return rootID(a.Above[len(a.Above)-1])
}

// Authorities returns all authorities of a kind in every state, oldest first.
func (s *Set) Authorities(kind Kind) []Authority { return s.current.Load().authorities(kind) }

// Prepared returns the PublishedIDs of the authorities that are prepared, of every kind, sorted. It costs next to nothing, and its
// result must not be changed.
func (s *Set) Prepared() []string { return s.current.Load().prepared }

func (n *snapshot) authorities(kind Kind) []Authority {
	var out []Authority
	add := func(id string, generation uint64, state State, cert *x509.Certificate, notBefore, notAfter time.Time, l life) {
		out = append(out, Authority{
			Kind: kind, ID: id, Generation: generation, State: state, Certificate: cert, NotBefore: notBefore, NotAfter: notAfter,
			PreparedAt: l.PreparedAt, ActivatedAt: l.ActivatedAt, DeactivatedAt: l.DeactivatedAt, TaintedAt: l.TaintedAt,
			RevokedAt: l.RevokedAt, SignedUntil: l.SignedUntil,
		})
	}
	if kind == KindX509 {
		for _, a := range n.x509 {
			notBefore, notAfter := a.validity()
			add(a.id, a.generation, a.state, a.certificate, notBefore, notAfter, a.life)
			out[len(out)-1].Above = slices.Clone(a.above)
		}
	} else {
		for _, a := range n.tokens(kind) {
			add(a.id, a.generation, a.state, nil, a.notBefore, a.expiresAt, a.life)
		}
	}
	slices.SortFunc(out, func(a, b Authority) int {
		return cmp.Or(cmp.Compare(a.Generation, b.Generation), cmp.Compare(a.ID, b.ID))
	})
	return out
}

// A Step is what became of a change.
type Step struct {
	Authority
	// Changed is false if the authority was in that state already, and nothing was written.
	Changed bool
}

// Prepare makes a new authority and publishes it; it signs nothing yet. If one is prepared already, that one is returned.
func (s *Set) Prepare(ctx context.Context, kind Kind) (Step, error) {
	return s.change(ctx, kind, func(e *edit) (string, error) {
		if r := e.in(StatePrepared); r != nil {
			return r.id, nil
		}
		return e.create(ctx, StatePrepared)
	})
}

// Activate makes a prepared authority the one that signs; the one that did becomes old. An empty id means the one that is
// prepared. Whether everybody knows it already is for the caller to see to.
func (s *Set) Activate(ctx context.Context, kind Kind, id string) (Step, error) {
	return s.change(ctx, kind, func(e *edit) (string, error) {
		r, err := e.find(id, StatePrepared)
		if err != nil || r.state == StateActive {
			return id, err
		}
		return r.id, e.activate(r)
	})
}

// Taint marks an old authority, so that all that it signed is re-issued.
func (s *Set) Taint(ctx context.Context, kind Kind, id string) (Step, error) {
	return s.change(ctx, kind, func(e *edit) (string, error) {
		if err := e.notBelow(id); err != nil {
			return "", err
		}
		r, err := e.find(id, StateOld)
		if err != nil || r.state == StateTainted {
			return id, err
		}
		e.move(r, StateTainted)
		return r.id, nil
	})
}

// Revoke takes a tainted authority out of the bundle: nothing that it signed is good any more. Its key, if it is sealed in
// the store, is forgotten.
func (s *Set) Revoke(ctx context.Context, kind Kind, id string) (Step, error) {
	return s.change(ctx, kind, func(e *edit) (string, error) {
		if err := e.notBelow(id); err != nil {
			return "", err
		}
		r, err := e.find(id, StateTainted)
		if err != nil || r.state == StateRevoked {
			return id, err
		}
		e.move(r, StateRevoked)
		return r.id, nil
	})
}

// Stolen brings an authority in any state to tainted or revoked, in one commit. If it is the active one, the prepared one
// takes over in the same commit, or one that is made for it: nobody has heard of that before it signs, which is the price
// of not letting a thief's key stay good.
func (s *Set) Stolen(ctx context.Context, kind Kind, id string, to State) (Step, error) {
	if to != StateTainted && to != StateRevoked {
		return Step{}, fmt.Errorf("a stolen authority becomes tainted or revoked, not %q", to)
	}
	return s.change(ctx, kind, func(e *edit) (string, error) {
		if err := e.notBelow(id); err != nil {
			return "", err
		}
		r, err := e.find(id, StateOld)
		if state := (*StateError)(nil); errors.As(err, &state) {
			r, err = e.records[id], nil
		}
		if err != nil || r.state.rank() >= to.rank() {
			return id, err
		}
		if r.state == StateActive {
			next := e.in(StatePrepared)
			if next == nil || e.cannotSign(next) != nil {
				made, err := e.create(ctx, StatePrepared)
				if err != nil {
					return "", err
				}
				next = e.records[made]
			}
			if err := e.activate(next); err != nil {
				return "", err
			}
		}
		e.move(r, to)
		return r.id, nil
	})
}

// Retire revokes an old or prepared authority that is of no more use: nothing that it signed is valid any more. For what
// is still good it is refused with a *StateError.
func (s *Set) Retire(ctx context.Context, kind Kind, id string) (Step, error) {
	return s.change(ctx, kind, func(e *edit) (string, error) {
		r := e.records[id]
		if r == nil {
			return "", fmt.Errorf("%s authority %.64q: %w", kind, id, ErrUnknownAuthority)
		}
		now := s.config.Now()
		ended := !now.Before(r.notAfter)
		spent := (r.state == StateOld || r.state == StateTainted) && (ended || !r.life.SignedUntil.IsZero() && !now.Before(r.life.SignedUntil))
		if !spent && !(r.state == StatePrepared && ended) {
			return "", &StateError{Kind: kind, ID: id, State: r.state, Want: StateTainted}
		}
		e.move(r, StateRevoked)
		return id, nil
	})
}

// WaitFor returns when the Set was shown everything up to revision that concerns it.
func (s *Set) WaitFor(ctx context.Context, revision store.Revision) error {
	for {
		s.mu.Lock()
		moved := s.moved
		s.mu.Unlock()
		if s.current.Load().revision >= revision {
			return nil
		}
		select {
		case <-moved:
		case <-s.halted: // it follows nothing any more
			return *s.stopped.Load()
		case <-ctx.Done():
			return fmt.Errorf("the authorities were written, but this CA has not caught up with the store yet: %w", ctx.Err())
		}
	}
}
