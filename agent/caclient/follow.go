package caclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// keepUp keeps the follower up to date over s, until the stream or the session ends: by Follow, or by polling if the server
// has no Follow. It returns only when every goroutine that it started has ended. With fresh it asks for a snapshot.
//
// What a server has is asked on each new connection, since another program may answer at the address. Only its own answer
// counts, which comes over a connection that has shown the CA's SVID: nobody else can make the agent poll.
func (c *Client) keepUp(ctx context.Context, s *session, fresh bool) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var group sync.WaitGroup
	group.Go(func() {
		select {
		case <-s.ended:
			cancel(s.endErr)
		case <-ctx.Done():
		}
	})
	var err error
	for range maxAskedAnew {
		s.local = ""
		s.spire.Store(false)
		if err = c.follow(ctx, s, fresh); status.Code(err) != codes.Unimplemented || s.local == "" {
			break
		}
		// A connection that ends between the two is no loss of contact: whoever is there now is asked the same.
		if err = c.poll(ctx, s, fresh); !errors.Is(err, errAnotherConnection) || s.inSync.Load() {
			break
		}
		s.out.forget(fmt.Errorf("%w: %w", ErrUnreachable, err))
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause // why the stream was cut says more than that it was
	}
	s.end(err)
	group.Wait()
	s.out.fail(fmt.Errorf("%w: %w", ErrUnreachable, err))
	return err
}

// follow says what is held and then applies what the CA sends, until the stream ends; its error says why.
func (c *Client) follow(ctx context.Context, s *session, fresh bool) error {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := c.hello(ctx, s, fresh)
	if err != nil {
		cancel()
		return err
	}
	var group sync.WaitGroup
	group.Go(func() {
		if err := s.out.run(ctx, stream); err != nil {
			s.end(err)
		}
	})
	defer group.Wait()
	defer cancel()
	// The answer to this Sync is the proof that the agent holds the newest state, also when there is nothing to send.
	return fromStatus(c.receive(stream, s, s.out.sync()))
}

func (c *Client) hello(ctx context.Context, s *session, fresh bool) (nodev1.Node_FollowClient, error) {
	hello := &nodev1.FollowRequest_Hello{Format: Format, AgentVersion: c.config.Version, Position: c.config.Follower.Position()}
	if !fresh {
		hello.Epoch, hello.Revision = c.config.Follower.Held()
	}
	stream, err := nodev1.NewNodeClient(s.conn).Follow(ctx)
	if err != nil {
		return nil, fromStatus(err)
	}
	err = stream.Send(&nodev1.FollowRequest{Message: &nodev1.FollowRequest_Hello_{Hello: hello}})
	if err != nil && !errors.Is(err, io.EOF) { // EOF: Recv knows the reason
		return nil, fromStatus(err)
	}
	return stream, nil
}

// receive applies messages until the stream ends; its error says why.
func (c *Client) receive(stream nodev1.Node_FollowClient, s *session, first *syncCall) error {
	silence := time.AfterFunc(answerTimeout, func() {
		s.end(fmt.Errorf("the CA has not answered on Follow for %s", answerTimeout))
	})
	defer silence.Stop()
	var snapshot snapshot
	for n := 0; ; n++ {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return errors.New("the CA ended Follow")
		}
		if n == 0 && status.Code(err) == codes.Unimplemented {
			s.local = localAddr(stream.Context())
		}
		if err != nil {
			return err
		}
		if n == 0 {
			c.connections.Add(1)
			c.server.Store(int32(Signet))
		}
		if !s.inSync.Load() {
			silence.Reset(answerTimeout)
		}
		if m.GetFormat() > Format {
			return fmt.Errorf("the CA sends Follow messages of format %d, this agent reads up to %d; update the agent", m.GetFormat(), Format)
		}
		whole, err := snapshot.add(m)
		if err != nil {
			return err
		}
		if whole == nil {
			continue
		}
		if err := c.apply(whole); err != nil {
			return err
		}
		s.out.ack(whole.GetTo())
		s.out.answered(whole.GetSyncIds())
		if !s.inSync.Load() && first.answered() {
			s.inSync.Store(true)
			c.mu.Lock()
			c.lastErr = nil
			c.mu.Unlock()
			silence.Stop()
			c.config.Log.Info("in sync with the CA", "server_address", c.config.Address, "revision", whole.GetTo())
			if c.config.InSync != nil {
				c.config.InSync()
			}
		}
	}
}

// apply hands m to the follower if it continues what is held, or replaces it.
func (c *Client) apply(m *nodev1.FollowResponse) error {
	epoch, revision := c.config.Follower.Held()
	if !m.GetSnapshot() {
		switch {
		case m.GetEpoch() != epoch:
			return fmt.Errorf("%w: it sent differences of epoch %q, and the agent holds epoch %q", errOutOfStep, m.GetEpoch(), epoch)
		case m.GetFrom() != revision:
			return fmt.Errorf("%w: it sent differences from revision %d, and the agent holds revision %d", errOutOfStep, m.GetFrom(), revision)
		case m.GetTo() < revision:
			return fmt.Errorf("%w: it sent differences from revision %d back to %d", errOutOfStep, m.GetFrom(), m.GetTo())
		}
	}
	if err := c.config.Follower.Apply(m); err != nil {
		return fmt.Errorf("%w: applying revision %d: %w", errOutOfStep, m.GetTo(), err)
	}
	c.applied.Add(1)
	return nil
}

// A snapshot collects the parts of one until the last.
type snapshot struct {
	parts *nodev1.FollowResponse
	bytes int
}

// add returns m itself if it is a difference, the united snapshot if m is its last part, and nil before.
func (s *snapshot) add(m *nodev1.FollowResponse) (*nodev1.FollowResponse, error) {
	if !m.GetSnapshot() {
		if s.parts != nil {
			return nil, fmt.Errorf("the CA sent differences (to revision %d) before the snapshot of revision %d was complete",
				m.GetTo(), s.parts.GetTo())
		}
		return m, nil
	}
	s.bytes += proto.Size(m)
	if s.bytes > maxSnapshotBytes {
		return nil, fmt.Errorf("the CA's snapshot has more than the %d bytes allowed", maxSnapshotBytes)
	}
	if s.parts == nil {
		s.parts = m
	} else {
		p := s.parts
		if p.GetEpoch() != m.GetEpoch() || p.GetTo() != m.GetTo() {
			return nil, fmt.Errorf("the CA mixed parts of two snapshots: %q/%d and %q/%d", p.GetEpoch(), p.GetTo(), m.GetEpoch(), m.GetTo())
		}
		p.SyncIds = append(p.SyncIds, m.GetSyncIds()...)
		p.Entries = append(p.Entries, m.GetEntries()...)
		p.Policies = append(p.Policies, m.GetPolicies()...)
		p.Bundles = append(p.Bundles, m.GetBundles()...)
		p.Revocations = append(p.Revocations, m.GetRevocations()...)
		p.Crls = append(p.Crls, m.GetCrls()...)
		p.UserIssuers = append(p.UserIssuers, m.GetUserIssuers()...)
		p.UnknownEntryPrefixes = append(p.UnknownEntryPrefixes, m.GetUnknownEntryPrefixes()...)
		if m.PolicyDefaults != nil {
			p.PolicyDefaults = m.PolicyDefaults
		}
		if m.Position != nil {
			p.Position = m.Position
		}
		p.Complete = m.GetComplete()
	}
	if !m.GetComplete() {
		return nil, nil
	}
	whole := s.parts
	*s = snapshot{}
	return whole, nil
}
