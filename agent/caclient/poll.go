package caclient

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"
)

const (
	// DefaultPollEvery is how often a SPIRE server is asked for changes, as by its own agents.
	DefaultPollEvery = 5 * time.Second
	// demandEvery is the least time between the beginnings of two polls, however many callers wait for one.
	demandEvery = time.Second
	// maxAskedAnew is how often a server is asked what it is because the connection was made anew before it could be polled.
	maxAskedAnew = 3
)

// errAnotherConnection means that calls go over another connection than the one on which the server said what it is.
var errAnotherConnection = errors.New("the connection to the CA was made anew")

// poll asks a SPIRE server for changes, again and again, until ctx or the connection ends; its error says why. A poll that
// fails ends it: the next connection is made with growing patience.
func (c *Client) poll(ctx context.Context, s *session, fresh bool) error {
	c.connections.Add(1)
	s.spire.Store(true)
	conn := sameConnection{ClientConnInterface: s.conn, local: s.local}
	for {
		began := time.Now()
		waiting := s.out.take()
		if err := c.pollOnce(ctx, conn, fresh); err != nil {
			return err
		}
		fresh = false
		s.out.answered(waiting)
		if !s.inSync.Load() {
			s.inSync.Store(true)
			c.meetSPIRE(ctx, conn)
		}
		if err := c.awaitPoll(ctx, s, began); err != nil {
			return err
		}
	}
}

// pollOnce asks once and applies what is new.
func (c *Client) pollOnce(ctx context.Context, conn grpc.ClientConnInterface, fresh bool) error {
	epoch, revision := c.config.Follower.Held()
	if fresh {
		epoch, revision = "", 0
	}
	m, err := c.poller.Poll(ctx, conn, epoch, revision)
	if err != nil {
		return fromStatus(err)
	}
	if m == nil {
		return nil
	}
	return c.apply(m)
}

// meetSPIRE does what is due when the first poll over a connection has succeeded.
func (c *Client) meetSPIRE(ctx context.Context, conn grpc.ClientConnInterface) {
	if Server(c.server.Swap(int32(SPIRE))) != SPIRE {
		c.config.Log.Warn("the CA is a SPIRE server: it is asked for changes instead of telling them, and it has no call policies, so that services that ask for them allow nothing",
			"server_address", c.config.Address, "poll_interval", c.config.PollEvery)
	}
	level := slog.LevelInfo
	if c.moved {
		level = slog.LevelDebug // SPIRE's servers end each connection after some minutes
	}
	_, revision := c.config.Follower.Held()
	c.config.Log.Log(ctx, level, "in sync with the CA", "server_address", c.config.Address, "server", SPIRE.String(), "revision", revision)
	if c.config.InSync != nil {
		c.config.InSync()
	}
	if c.moved {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	// The version is for the operator's eyes only, and a server may not know the call.
	if _, err := agentv1.NewAgentClient(conn).PostStatus(ctx, &agentv1.PostStatusRequest{AgentVersion: c.config.Version}); err != nil {
		c.config.Log.Debug("the CA was not told the agent's version", "err", err)
	}
}

// awaitPoll waits until the next poll is due, or somebody wants one and the last, which began then, is long enough ago.
func (c *Client) awaitPoll(ctx context.Context, s *session, began time.Time) error {
	// A tenth to either side, as SPIRE's agents do, so that those of a site do not come all at once.
	due := time.Now().Add(c.config.PollEvery*9/10 + rand.N(c.config.PollEvery/5+1))
	timer := time.NewTimer(time.Until(due))
	defer timer.Stop()
	for {
		at := due
		if demanded := began.Add(demandEvery); s.out.wanted() && demanded.Before(at) {
			at = demanded
		}
		timer.Reset(max(time.Until(at), 0))
		select {
		case <-timer.C:
			return nil
		case <-s.out.wake:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// A sameConnection makes calls that fail if they would go over another connection than that of the given local address:
// gRPC makes a new one by itself, and who answers there may be another program.
type sameConnection struct {
	grpc.ClientConnInterface
	local string
}

func (c sameConnection) Invoke(ctx context.Context, method string, args, reply any, options ...grpc.CallOption) error {
	var p peer.Peer
	err := c.ClientConnInterface.Invoke(ctx, method, args, reply, append(options, grpc.Peer(&p))...)
	if err != nil {
		return err
	}
	return c.check(&p)
}

func (c sameConnection) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, options ...grpc.CallOption) (grpc.ClientStream, error) {
	stream, err := c.ClientConnInterface.NewStream(ctx, desc, method, options...)
	if err != nil {
		return nil, err
	}
	return &sameStream{ClientStream: stream, conn: c}, nil
}

// A sameStream looks at the first answer, since until then gRPC may choose another connection.
type sameStream struct {
	grpc.ClientStream
	conn sameConnection
	seen bool
}

func (s *sameStream) RecvMsg(m any) error {
	if err := s.ClientStream.RecvMsg(m); err != nil || s.seen {
		return err
	}
	s.seen = true
	p, _ := peer.FromContext(s.Context())
	return s.conn.check(p)
}

func (c sameConnection) check(p *peer.Peer) error {
	if p == nil || p.LocalAddr == nil || p.LocalAddr.String() != c.local {
		return errAnotherConnection
	}
	return nil
}

// localAddr is our end of the connection that a stream went over, empty if that is not known.
func localAddr(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok || p.LocalAddr == nil {
		return ""
	}
	return p.LocalAddr.String()
}
