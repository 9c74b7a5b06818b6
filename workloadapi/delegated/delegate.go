package delegated

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi"
	"github.com/signet-id/signet/workloadapi/peer"
)

// errNoProcess says that the process which a delegate named does not exist, or does not any more.
var errNoProcess = errors.New("the process does not exist, or does not any more")

// A delegate is the attested process that a call comes from, whose right to call is watched as long as the call lasts.
type delegate struct {
	id       spiffeid.ID // the one by which it may call
	process  workloadapi.Subject
	caller   workloadapi.Caller
	watching sync.WaitGroup
}

// admit attests the process and finds out whether it is a delegate. From then on ctx ends, with the cause, as soon as it is
// none any more. The caller cancels ctx and then leaves, also after an error if there is a delegate beside it.
func (s *Service) admit(ctx context.Context, cancel context.CancelCauseFunc, p *peer.Process) (*delegate, error) {
	d := &delegate{process: workloadapi.ProcessSubject(p, s.cfg.Attestor, s.gate)}
	var err error
	if d.caller, err = d.process.Attest(ctx); err != nil {
		return nil, err
	}
	updates, err := s.cfg.Source.Watch(ctx, d.caller)
	if err != nil {
		return nil, fmt.Errorf("the delegate's own identities: %w", err)
	}
	admitted := make(chan error, 1)
	d.watching.Go(func() { s.watch(updates, d, admitted, cancel) })
	wait, stop := context.WithTimeout(ctx, s.cfg.IssueWait)
	defer stop()
	select {
	case err = <-admitted:
	case <-wait.Done():
		if err = context.Cause(ctx); err == nil {
			err = fmt.Errorf("the delegate's own first SVID: %w", workloadapi.ErrUnavailable)
		}
	}
	return d, err
}

// leave waits until nothing watches the delegate any more. ctx has ended before.
func (d *delegate) leave() { d.watching.Wait() }

// watch says once on admitted whether the process is a delegate, and cancels the call when it is none any more. It ends
// when the source closes updates, which is when the call's context has ended.
func (s *Service) watch(updates <-chan workloadapi.Update, d *delegate, admitted chan<- error, cancel context.CancelCauseFunc) {
	ack, _ := s.cfg.Source.(workloadapi.Acknowledger)
	decided := false
	for u := range updates {
		if ack != nil {
			ack.HandedOn(updates, u.BundleRevision) // nobody is shown a bundle on this subscription
		}
		var err error
		switch id, ok := s.delegateOf(u); {
		case ok && !decided:
			d.id = id // before admitted is told
		case ok:
		case len(u.Identities) > 0:
			err = errNotDelegate
		case u.Entitled:
			continue // its SVIDs are on their way
		default:
			err = errNoIdentity
		}
		if !decided {
			decided = true
			admitted <- err
		} else if err != nil {
			cancel(err)
		}
	}
}

// delegateOf returns the first of the identities that is a delegate's.
func (s *Service) delegateOf(u workloadapi.Update) (spiffeid.ID, bool) {
	for _, i := range u.Identities {
		if s.delegates[i.ID] {
			return i.ID, true
		}
	}
	return spiffeid.ID{}, false
}

// stillThere says whether the delegate may still have an answer.
func (d *delegate) stillThere(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	err := d.process.Check(ctx, d.caller)
	if errors.Is(err, workloadapi.ErrSubjectChanged) {
		return errDelegateChanged
	}
	return err
}

// A subject is the workload that a delegate speaks for. Before each answer its delegate is looked at as well.
type subject struct {
	workloadapi.Subject
	delegate *delegate
	name     string // for the log
	close    func()
}

func (s *subject) Check(ctx context.Context, c workloadapi.Caller) error {
	if err := s.delegate.stillThere(ctx); err != nil {
		return err
	}
	return gone(s.Subject.Check(ctx, c))
}

func (s *subject) Attest(ctx context.Context) (workloadapi.Caller, error) {
	c, err := s.Subject.Attest(ctx)
	return c, gone(err)
}

// gone tells the end of the workload from that of the delegate.
func gone(err error) error {
	if errors.Is(err, peer.ErrGone) {
		return fmt.Errorf("%w: %w", errNoProcess, err)
	}
	return err
}

// subject resolves what a request names: exactly one of selectors and a process id.
func (s *Service) subject(d *delegate, selectors []*types.Selector, pid int32) (*subject, error) {
	if (len(selectors) > 0) == (pid != 0) {
		return nil, badArgument("must provide either selectors or non-zero PID, but not both")
	}
	if pid < 0 {
		return nil, badArgument("pid %d is negative", pid)
	}
	if pid > 0 {
		found, err := workloadapi.FindProcess(pid, s.peers, s.cfg.Attestor, s.gate)
		if err != nil {
			return nil, gone(err)
		}
		return &subject{Subject: found, delegate: d, name: fmt.Sprintf("process %d", pid), close: found.Close}, nil
	}
	given, err := parseSelectors(selectors)
	if err != nil {
		return nil, err
	}
	caller := workloadapi.Caller{UID: d.caller.UID, GID: d.caller.GID, Selectors: given}
	return &subject{Subject: described(caller), delegate: d, name: fmt.Sprintf("%d selectors", len(given)), close: func() {}}, nil
}

func parseSelectors(selectors []*types.Selector) ([]spiffe.Selector, error) {
	if len(selectors) > maxSelectors {
		return nil, badArgument("%d selectors: at most %d are allowed", len(selectors), maxSelectors)
	}
	seen := map[spiffe.Selector]bool{}
	var out []spiffe.Selector
	for i, s := range selectors {
		parsed := spiffe.Selector{Type: s.GetType(), Value: s.GetValue()}
		if err := parsed.Check(); err != nil {
			return nil, badArgument("could not parse provided selectors: selectors[%d]: %v", i, err)
		}
		if !seen[parsed] {
			seen[parsed] = true
			out = append(out, parsed)
		}
	}
	return out, nil
}

func badArgument(format string, args ...any) error {
	return &workloadapi.ArgumentError{Text: fmt.Sprintf(format, args...)}
}

// A described workload is known by the delegate's word alone: it never changes, and ends when the delegate says so.
type described workloadapi.Caller

func (w described) Attest(context.Context) (workloadapi.Caller, error) {
	return workloadapi.Caller(w), nil
}
func (w described) Check(context.Context, workloadapi.Caller) error { return nil }
func (w described) Done() <-chan struct{}                           { return nil }
