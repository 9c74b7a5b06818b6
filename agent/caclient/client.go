// Package caclient is the agent's only door to the CA: one mutually authenticated gRPC connection that carries Follow
// and, beside it, issuance and renewal. It reconnects by itself, with jitter and a cap, and tells apart a CA that is
// away from one that refuses this agent. It holds no state of the trust domain: what it receives it hands to a
// Follower, whole messages only.
package caclient

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/signet-id/signet/agent/caclient/spireserver"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// Format is the newest FollowResponse format that this package reads.
const Format = 1

const (
	// maxMessageBytes bounds one message from the CA.
	maxMessageBytes = 16 << 20
	// maxSnapshotBytes bounds the parts of one snapshot together, so that a broken CA cannot fill the node's memory.
	maxSnapshotBytes = 1 << 30
	// callTimeout bounds one RPC, as SPIRE's agent does.
	callTimeout = 30 * time.Second
	// answerTimeout is how long the CA may stay silent while it owes an answer on Follow.
	answerTimeout = 30 * time.Second
	// keepaliveTime and keepaliveTimeout find a CA that vanished without closing the connection.
	keepaliveTime    = 45 * time.Second
	keepaliveTimeout = 10 * time.Second
	// retryMin and retryMax bound the wait between two attempts to reach the CA.
	retryMin = time.Second
	retryMax = 30 * time.Second
)

// ErrUnreachable means that there is no connection to the CA now. The client is trying to make one.
var ErrUnreachable = errors.New("the CA is not reachable")

// A Follower keeps what Follow delivers. Its methods are called by one goroutine at a time.
type Follower interface {
	// Held says what is held: the epoch and the revision, or zero values for nothing.
	Held() (epoch string, revision int64)

	// Position is the newest one of the node's cluster that was applied, nil if there was none.
	Position() *nodev1.Position

	// Apply takes over one message: a whole snapshot, which replaces everything, or the differences to what is held.
	// After an error nothing has changed, and the client asks for a snapshot.
	Apply(*nodev1.FollowResponse) error
}

// Config says whom a Client talks to, and as whom.
type Config struct {
	// Address is the CA's host:port.
	Address string

	// TrustDomain is the agent's. The CA must be spiffe://<TrustDomain>/spire/server.
	TrustDomain spiffeid.TrustDomain

	// Identity returns the agent's present X509-SVID. It is asked for each new connection.
	Identity func() *x509svid.SVID

	// Bundles verifies the CA; it is asked for each new connection.
	Bundles x509bundle.Source

	// Follower receives the state of the trust domain.
	Follower Follower

	// HeldAs is who the agent was when it received what Follower holds from an earlier run. Zero: that is no base for
	// differences, and a snapshot is asked for.
	HeldAs spiffeid.ID

	// InSync is called when the CA has confirmed that the agent holds its newest state, once per connection. It must not
	// block. May be nil.
	InSync func()

	// Lost is called when the contact that InSync told of has ended: the connection broke, or the CA refuses this agent. It
	// is not called when another connection takes over. It must not block. May be nil.
	Lost func()

	// PollEvery is how often a server that does not push is asked for changes: a SPIRE server. Zero means DefaultPollEvery.
	PollEvery time.Duration

	// Version is the agent's, for the CA's list of agents.
	Version string

	// Log receives what operators want to know about the connection. Nil means slog.Default.
	Log *slog.Logger

	// Now is the wall clock. Nil means time.Now.
	Now func() time.Time
}

// A Client is the connection to the CA. Its methods may be called at the same time.
type Client struct {
	config Config
	batch  atomic.Int64 // items in the next IssueX509SVIDs call
	jwt    *jwtQueue
	as     spiffeid.ID        // whom what is held was followed as; Run's own
	poller spireserver.Poller // Run's own
	moved  bool               // the session takes the place of one whose connection the server has ended; Run's own
	server atomic.Int32       // a Server: what answered last

	mu      sync.Mutex
	session *session // nil while there is no connection; guarded by mu
	lastErr error    // why there is none; guarded by mu
	handed  []string // authorities handed on to every open stream; guarded by mu
	inUse   []string // X.509 authorities of which workloads hold SVIDs; guarded by mu

	applied     atomic.Int64
	connections atomic.Int64
}

// New returns a Client that does nothing until Run.
func New(c Config) (*Client, error) {
	switch {
	case c.Address == "":
		return nil, errors.New("the CA's address is empty")
	case c.TrustDomain.IsZero():
		return nil, errors.New("the trust domain is empty")
	case c.Identity == nil || c.Bundles == nil || c.Follower == nil:
		return nil, errors.New("caclient needs Identity, Bundles and Follower")
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.PollEvery <= 0 {
		c.PollEvery = DefaultPollEvery
	}
	client := &Client{config: c, as: c.HeldAs, poller: spireserver.Poller{TrustDomain: c.TrustDomain, Log: c.Log}}
	client.jwt = newJWTQueue(client.issueJWTs)
	client.batch.Store(MaxBatch)
	return client, nil
}

// Run keeps following the CA until ctx ends, which gives nil, or until the CA refuses this agent, which gives a
// *DeniedError, or does not verify, which gives an *UnverifiedError: then the caller decides how to become welcome again or
// by what else to verify the CA, waits, and calls Run again. At most one Run at a time.
func (c *Client) Run(ctx context.Context) error {
	var retiring sync.WaitGroup
	defer retiring.Wait()
	wait := retryMin
	var old *session
	fresh := false   // ask for a snapshot, whatever is held
	contact := false // InSync was called, and Lost has not been since
	for {
		started := time.Now()
		s, err := c.open()
		if gone := old; gone != nil {
			retiring.Go(func() { gone.retire(ctx) })
			old = nil
		}
		if err == nil {
			// What was held as another node is no base for differences to what this one is sent.
			fresh = fresh || c.as != s.svid.ID
			c.as = s.svid.ID
			err = c.keepUp(ctx, s, fresh)
			contact = contact || s.inSync.Load()
		}
		if ctx.Err() == nil && (errors.Is(err, errReplaced) || errors.Is(err, errAnotherConnection) && s.inSync.Load()) {
			old, wait, fresh = s, retryMin, false
			c.moved = errors.Is(err, errAnotherConnection)
			continue
		}
		if s != nil {
			c.close(s, err)
		}
		if ctx.Err() != nil {
			return nil
		}
		if contact && c.config.Lost != nil {
			c.config.Lost()
		}
		contact, c.moved = false, false
		var denied *DeniedError
		if errors.As(err, &denied) {
			if s.svid == c.config.Identity() {
				denied.SVID = s.svid
				return denied
			}
			continue // the SVID was renewed meanwhile; the new one has not been judged
		}
		if s != nil {
			if failed := s.unverified.Load(); failed != nil && s.svid == c.config.Identity() {
				return &UnverifiedError{*failed}
			}
		}
		fresh = errors.Is(err, errOutOfStep)
		if s != nil && s.inSync.Load() && time.Since(started) > wait {
			wait = retryMin
		}
		delay := jitter(wait)
		c.config.Log.Warn("no connection to the CA", "server_address", c.config.Address, "retry_in", delay.Round(time.Millisecond), "err", err)
		if err := sleep(ctx, delay); err != nil {
			return nil
		}
		wait = min(2*wait, retryMax)
	}
}

// Reconnect makes the next calls use the present identity and bundle: a new connection takes the place of the old one,
// on which calls under way may finish.
func (c *Client) Reconnect() {
	c.mu.Lock()
	s := c.session
	c.mu.Unlock()
	if s != nil {
		s.end(errReplaced)
	}
}

// Connected says whether the CA has confirmed that the agent holds its newest state, and the connection still stands.
func (c *Client) Connected() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.session != nil && c.session.inSync.Load()
}

// Trouble is why the last attempt to be in contact with the CA came to nothing, or nil while there is contact.
func (c *Client) Trouble() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.session != nil && c.session.inSync.Load() {
		return nil
	}
	return c.lastErr
}

// A Server is what kind of CA there is.
type Server int32

// The kinds of CAs.
const (
	// Unknown: none has answered yet.
	Unknown Server = iota
	// Signet pushes.
	Signet
	// SPIRE is one without the service signet.node.v1. It is polled, and has no call policies.
	SPIRE
)

func (s Server) String() string { return [...]string{"unknown", "signet", "spire"}[s] }

// Server says what kind of CA answered last.
func (c *Client) Server() Server { return Server(c.server.Load()) }

// Stats are counters since the Client was made.
type Stats struct {
	// Applied counts Follow messages that were applied.
	Applied int64
	// Connections counts connections that reached the CA.
	Connections int64
}

// Stats returns the counters.
func (c *Client) Stats() Stats {
	return Stats{Applied: c.applied.Load(), Connections: c.connections.Load()}
}

// errOutOfStep means that what the CA sends does not continue what is held.
var errOutOfStep = errors.New("out of step with the CA")

// errReplaced ends a session that a newer identity takes the place of.
var errReplaced = errors.New("the agent's SVID or the bundle has changed")

// A session is one connection. It is closed when Follow has ended and the last call on it is done.
type session struct {
	conn   *grpc.ClientConn
	svid   *x509svid.SVID
	out    outbox
	inSync atomic.Bool // the CA has answered the first Sync
	local  string      // our end of the connection on which the server said that it has no Follow; else empty
	spire  atomic.Bool // the server is one that is polled

	unverified atomic.Pointer[error] // why the server did not verify, the last time that it did not

	ended   chan struct{} // closed by end
	endOnce sync.Once
	endErr  error

	users sync.WaitGroup // calls under way; Add under Client.mu while the session is the client's
}

// end makes follow return err. Only the first call counts.
func (s *session) end(err error) {
	s.endOnce.Do(func() {
		s.endErr = err
		close(s.ended)
	})
}

// open makes the session that all calls use from now on. The connection itself is made by the first RPC.
func (c *Client) open() (*session, error) {
	svid := c.config.Identity()
	if svid == nil {
		return nil, errors.New("the agent has no SVID yet")
	}
	s := &session{svid: svid, ended: make(chan struct{})}
	failed := func(err error) { s.unverified.Store(&err) }
	var err error
	if s.conn, err = dial(c.config.Address, clientTLS(c.config.TrustDomain, svid, c.config.Bundles, c.config.Now, failed)); err != nil {
		return nil, err
	}
	s.out.init()
	c.mu.Lock()
	c.session = s
	handed, inUse := c.handed, c.inUse
	c.mu.Unlock()
	s.out.setHandedOn(handed)
	s.out.setInUse(inUse)
	return s, nil
}

// close takes s out of use. Nobody answers on it any more: calls under way fail at once, and their callers may try the
// next connection.
func (c *Client) close(s *session, err error) {
	c.mu.Lock()
	if c.session == s {
		c.session = nil
		c.lastErr = err
	}
	c.mu.Unlock()
	_ = s.conn.Close() // closing a client connection has no failure that anybody could act on
	s.users.Wait()
}

// retire closes the connection of a session that another has taken the place of, once the calls under way on it are
// done. They were allowed when they began, so that they may finish.
func (s *session) retire(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { _ = s.conn.Close() })
	defer stop()
	s.users.Wait()
	_ = s.conn.Close()
}

// use returns the present connection and a function to give it back.
func (c *Client) use() (*session, func(), error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.session == nil {
		if c.lastErr != nil {
			return nil, nil, fmt.Errorf("%w: %w", ErrUnreachable, c.lastErr)
		}
		return nil, nil, ErrUnreachable
	}
	s := c.session
	s.users.Add(1)
	return s, s.users.Done, nil
}

func dial(address string, creds grpc.DialOption) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("dns:///"+address, creds,
		grpc.WithDisableServiceConfig(),
		// A name may stand for several replicas of the CA: each attempt begins with another, and agents spread over them.
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"pick_first": {"shuffleAddressList": true}}]}`),
		grpc.WithNoProxy(),
		grpc.WithIdleTimeout(0),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes)),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: 10 * time.Second}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
	)
	if err != nil {
		return nil, fmt.Errorf("server_address %q: %w", address, err)
	}
	return conn, nil
}
