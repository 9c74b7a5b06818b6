package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi/peer"
)

// A Subject is whom a call is answered for: the process that calls, or the workload that the caller speaks for.
type Subject interface {
	// Attest says what the subject is, as it is now.
	Attest(ctx context.Context) (Caller, error)

	// Check says whether the subject is still what c, which Attest returned, describes. ErrSubjectChanged asks for another
	// attestation; any other error is why the subject is not answered any more.
	Check(ctx context.Context, c Caller) error

	// Done is closed when the subject has ended. The error for that is peer.ErrGone.
	Done() <-chan struct{}
}

// ProcessSubject returns a pinned process as a Subject. The gate bounds what one user can make the agent look at.
func ProcessSubject(p *peer.Process, attestor Attestor, gate *peer.Gate) Subject {
	return &processSubject{process: p, attestor: attestor, gate: gate}
}

// freshFor is how long a process need not be looked at again after it was attested: an answer that is at hand leaves within
// this time.
const freshFor = time.Millisecond

type processSubject struct {
	process  *peer.Process
	attestor Attestor
	gate     *peer.Gate
	lookedAt time.Time // when the process was seen in the state that Attest told of; zero after the first Check
}

func (s *processSubject) Done() <-chan struct{} { return s.process.Done() }

// Attest says what the process is, as it is now.
//
// A process may exec or change its user while it is looked at. What was found out counts only if the process is still in
// the state that it was found out about; otherwise a program could collect another one's selectors.
func (s *processSubject) Attest(ctx context.Context) (Caller, error) {
	leave, err := s.gate.Enter(ctx, s.process.UID)
	if err != nil {
		return Caller{}, err
	}
	defer leave()
	for range maxAttempts {
		began := time.Now()
		caller, err := s.attestor.Attest(ctx, s.process)
		if err != nil {
			return Caller{}, fmt.Errorf("attesting process %d: %w", s.process.PID, err)
		}
		if caller.Known {
			s.lookedAt = began
			return caller, nil
		}
		began = time.Now()
		now, err := s.process.Snapshot()
		if err != nil {
			return Caller{}, err
		}
		if now.Equal(caller.State) {
			s.lookedAt = began
			return caller, nil
		}
	}
	return Caller{}, errUnsteady
}

// Check says whether the process is still what caller describes.
func (s *processSubject) Check(ctx context.Context, caller Caller) error {
	looked := s.lookedAt
	s.lookedAt = time.Time{}
	if !caller.Fleeting && time.Since(looked) < freshFor {
		return s.process.Alive()
	}
	leave, err := s.gate.Enter(ctx, s.process.UID)
	if err != nil {
		return err
	}
	defer leave()
	now, err := s.process.Snapshot()
	if err != nil {
		return err
	}
	if !now.Equal(caller.State) {
		return ErrSubjectChanged
	}
	if !caller.Fleeting {
		return nil
	}
	again, err := s.attestor.Attest(ctx, s.process)
	if err != nil {
		return fmt.Errorf("attesting process %d: %w", s.process.PID, err)
	}
	if !again.State.Equal(caller.State) || !sameSelectors(again.Selectors, caller.Selectors) {
		return ErrSubjectChanged
	}
	return nil
}

// sameSelectors compares two lists without repetitions.
func sameSelectors(a, b []spiffe.Selector) bool { return len(a) == len(b) && hasAll(a, b) }

// hasAll tells whether all of b are in a.
func hasAll(a, b []spiffe.Selector) bool {
	in := make(map[spiffe.Selector]bool, len(a))
	for _, s := range a {
		in[s] = true
	}
	return !slices.ContainsFunc(b, func(s spiffe.Selector) bool { return !in[s] })
}

// A FoundProcess is a process that somebody else speaks for, pinned when it was looked up. Close gives it up.
//
// Unlike one that calls, it may give up the user that it had when it was looked up first: a service that is started as
// root and drops that is what it is then.
type FoundProcess struct {
	table    *peer.Table
	attestor Attestor
	gate     *peer.Gate

	process *peer.Process
	subject Subject // of process
}

// FindProcess pins the process with an id, as the agent counts them. The error is peer.ErrGone if there is none.
func FindProcess(pid int32, table *peer.Table, attestor Attestor, gate *peer.Gate) (*FoundProcess, error) {
	s := &FoundProcess{table: table, attestor: attestor, gate: gate}
	process, err := table.Open(pid)
	if err != nil {
		return nil, err
	}
	s.take(process)
	return s, nil
}

func (s *FoundProcess) take(p *peer.Process) {
	s.process, s.subject = p, ProcessSubject(p, s.attestor, s.gate)
}

// Close gives up the process.
func (s *FoundProcess) Close() { s.process.Close() }

// Done is closed when the process has ended.
func (s *FoundProcess) Done() <-chan struct{} { return s.subject.Done() }

// Attest says what the process is, as it is now. See Subject.
func (s *FoundProcess) Attest(ctx context.Context) (Caller, error) {
	caller, err := s.subject.Attest(ctx)
	if !errors.Is(err, peer.ErrUserChanged) {
		return caller, err
	}
	again, err := s.table.Open(s.process.PID)
	if err != nil {
		return Caller{}, err
	}
	if again.ID() != s.process.ID() { // another process has its id by now
		again.Close()
		return Caller{}, fmt.Errorf("process %d: %w", s.process.PID, peer.ErrGone)
	}
	s.process.Close()
	s.take(again)
	return s.subject.Attest(ctx)
}

// Check says whether the process is still what c describes. See Subject.
func (s *FoundProcess) Check(ctx context.Context, c Caller) error {
	err := s.subject.Check(ctx, c)
	if errors.Is(err, peer.ErrUserChanged) {
		return ErrSubjectChanged
	}
	return err
}
