package caclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

const (
	// syncEvery is the least time between two Sync requests: ten a second.
	syncEvery = 100 * time.Millisecond
	// maxOpenSyncs bounds the requests that the CA has not answered.
	maxOpenSyncs = 64
)

// A syncCall is one Sync request, on which any number of callers wait.
type syncCall struct {
	done chan struct{} // closed when answered or failed
	err  error         // set before done is closed
}

func (c *syncCall) answered() bool {
	select {
	case <-c.done:
		return c.err == nil
	default:
		return false
	}
}

// An outbox is what a session has to say on Follow, by level: the newest revision to acknowledge, the authorities
// handed on, and at most one Sync that is not yet sent.
type outbox struct {
	wake chan struct{} // one slot: look again

	mu      sync.Mutex
	acked   int64
	ackDue  bool
	handed  []string
	inUse   []string
	queued  *syncCall            // not yet sent, so that newcomers may join it
	open    map[uint64]*syncCall // sent, not yet answered
	lastID  uint64
	failure error // set when the session is over
}

func (o *outbox) init() {
	o.wake = make(chan struct{}, 1)
	o.open = make(map[uint64]*syncCall)
}

func (o *outbox) kick() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// ack acknowledges everything up to revision.
func (o *outbox) ack(revision int64) {
	o.mu.Lock()
	o.acked, o.ackDue = revision, true
	o.mu.Unlock()
	o.kick()
}

// setHandedOn makes the next acknowledgement name ids.
func (o *outbox) setHandedOn(ids []string) {
	o.mu.Lock()
	changed := !slices.Equal(o.handed, ids)
	o.handed = ids
	if changed && o.acked > 0 {
		o.ackDue = true
	}
	o.mu.Unlock()
	if changed {
		o.kick()
	}
}

// setInUse makes the next acknowledgement name the authorities in use.
func (o *outbox) setInUse(ids []string) {
	o.mu.Lock()
	changed := !slices.Equal(o.inUse, ids)
	o.inUse = ids
	if changed && o.acked > 0 {
		o.ackDue = true
	}
	o.mu.Unlock()
	if changed {
		o.kick()
	}
}

// sync returns a request that will leave after this call began. One that was already sent would not do: its answer may
// be older than what the caller asks about.
func (o *outbox) sync() *syncCall {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.failure != nil {
		c := &syncCall{done: make(chan struct{}), err: o.failure}
		close(c.done)
		return c
	}
	if o.queued == nil {
		o.queued = &syncCall{done: make(chan struct{})}
		o.kick()
	}
	return o.queued
}

// answered wakes those who wait for ids.
func (o *outbox) answered(ids []uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, id := range ids {
		if c := o.open[id]; c != nil {
			delete(o.open, id)
			close(c.done)
		}
	}
}

// take returns the ids of all requests that nobody has answered, for an answer that begins now; none if nobody waits.
func (o *outbox) take() (ids []uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.queued != nil {
		o.lastID++
		o.open[o.lastID] = o.queued
		o.queued = nil
	}
	for id := range o.open {
		ids = append(ids, id)
	}
	return ids
}

// wanted says whether somebody waits for a request that nothing is done for yet.
func (o *outbox) wanted() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.queued != nil
}

// fail ends all waiting, now and later, with err.
func (o *outbox) fail(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.failure = err
	o.lose(err)
	if c := o.queued; c != nil {
		o.queued = nil
		c.err = err
		close(c.done)
	}
}

// forget ends the waiting for what was sent, with err.
func (o *outbox) forget(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.lose(err)
}

// lose is called with mu held.
func (o *outbox) lose(err error) {
	for id, c := range o.open {
		delete(o.open, id)
		c.err = err
		close(c.done)
	}
}

// run sends until ctx ends or the stream is broken, whose reason Recv knows.
func (o *outbox) run(ctx context.Context, stream nodev1.Node_FollowClient) error {
	var lastSync time.Time
	pace := time.NewTimer(0)
	defer pace.Stop()
	for {
		ack, sync, wait, err := o.next(time.Since(lastSync))
		if err != nil {
			return err
		}
		if sync != nil {
			lastSync = time.Now()
		}
		for _, m := range []*nodev1.FollowRequest{ack, sync} {
			if m == nil {
				continue
			}
			if err := stream.Send(m); errors.Is(err, io.EOF) {
				return nil
			} else if err != nil {
				return err
			}
		}
		var paced <-chan time.Time
		if wait > 0 {
			pace.Reset(wait)
			paced = pace.C
		}
		select {
		case <-o.wake:
		case <-paced:
		case <-ctx.Done():
			return nil
		}
	}
}

// next takes what is due. wait says when a Sync that is held back by its pace is due; 0 means that there is none.
func (o *outbox) next(sinceSync time.Duration) (ack, sync *nodev1.FollowRequest, wait time.Duration, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ackDue {
		o.ackDue = false
		ack = &nodev1.FollowRequest{Message: &nodev1.FollowRequest_Ack_{Ack: &nodev1.FollowRequest_Ack{
			Revision: o.acked, AuthoritiesHandedOn: o.handed, AuthoritiesInUse: o.inUse,
		}}}
	}
	if o.queued != nil {
		if sinceSync < syncEvery {
			return ack, nil, syncEvery - sinceSync, nil
		}
		if len(o.open) >= maxOpenSyncs {
			return nil, nil, 0, fmt.Errorf("the CA has left %d Sync requests without an answer", len(o.open))
		}
		o.lastID++
		o.open[o.lastID] = o.queued
		o.queued = nil
		sync = &nodev1.FollowRequest{Message: &nodev1.FollowRequest_Sync_{Sync: &nodev1.FollowRequest_Sync{Id: o.lastID}}}
	}
	return ack, sync, 0, nil
}

// Sync returns nil once the follower holds everything that was committed before Sync was called. Callers that come
// together share a request; at most ten a second are sent. Without a connection it fails at once with ErrUnreachable.
func (c *Client) Sync(ctx context.Context) error {
	s, release, err := c.use()
	if err != nil {
		return err
	}
	defer release()
	call := s.out.sync()
	select {
	case <-call.done:
		return call.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// HandedOn tells the CA which authorities (X.509 authority ids and JWT key ids) the agent has written to every open
// Workload API stream. ids replaces what was told before; the slice is the client's from now on.
func (c *Client) HandedOn(ids []string) {
	c.mu.Lock()
	c.handed = ids
	s := c.session
	c.mu.Unlock()
	if s != nil {
		s.out.setHandedOn(ids)
	}
}

// InUse tells the CA of which X.509 authorities the agent holds workloads' SVIDs. ids replaces what was told before; the
// slice is the client's from now on.
func (c *Client) InUse(ids []string) {
	c.mu.Lock()
	c.inUse = ids
	s := c.session
	c.mu.Unlock()
	if s != nil {
		s.out.setInUse(ids)
	}
}
