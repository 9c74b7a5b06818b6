package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/workloadapi"
	"github.com/signet-id/signet/workloadapi/peer"
)

// Bounds of the endpoint that nobody needs to change.
const (
	// maxRequestBytes bounds a request: the longest has a reference and a list of audiences.
	maxRequestBytes = 128 << 10

	// maxHeaderBytes bounds the metadata of a call.
	maxHeaderBytes = 16 << 10

	// handshakeTimeout is how long a connection may take for TLS and to say that it speaks HTTP/2.
	handshakeTimeout = 10 * time.Second

	// maxConnections bounds open connections, maxConnectionsEach those of one broker, and maxStrangers those of all that
	// are no broker and only wait to be told so.
	maxConnections, maxConnectionsEach, maxStrangers = 512, 64, 8

	// stopTimeout is how long calls may take to end at shutdown before their connections are closed.
	stopTimeout = 2 * time.Second

	// attestingEach and attestingTotal bound the processes that are looked at simultaneously.
	attestingEach, attestingTotal = 32, 256

	// DefaultMaxStreams bounds the open calls of one broker: a node runs some hundred workloads with up to three streams.
	DefaultMaxStreams = 4096
)

// A Broker is one that may call, and what it may ask for.
type Broker struct {
	// ID is the SPIFFE ID by which it is known. It is of the endpoint's own trust domain.
	ID spiffeid.ID

	// References are the ways in which it may name workloads. At least one.
	References []ReferenceType

	// Namespaces are those of the pods that it may name. Empty: all.
	Namespaces []string

	// IDs are patterns of the SPIFFE IDs that it may get, in full, such as spiffe://example.org/shop/**. Empty: all that
	// the workload has.
	IDs []string

	// Audiences are those of the JWT-SVIDs that it may ask for. Empty: any.
	Audiences []string

	// PIDOverLoopback lets it name processes by their id over TCP too, when both ends of the connection are this host's
	// loopback interface.
	PIDOverLoopback bool
}

// Config is what an endpoint needs.
type Config struct {
	// TrustDomain is the endpoint's own.
	TrustDomain spiffeid.TrustDomain

	// Source knows the workloads' identities. Attestor says what processes are. Both are the Workload Endpoint's.
	Source   workloadapi.Source
	Attestor workloadapi.Attestor

	// Pods knows the pods of this node. Nil: Kubernetes references are not understood.
	Pods Pods

	// SVID is the endpoint's own X509-SVID, asked for at each handshake, so that a renewed one is used at once. Nil while
	// there is none: no handshake succeeds then.
	SVID func() *x509svid.SVID

	// Bundles verify the brokers.
	Bundles x509bundle.Source

	// Listeners are Unix sockets and TCP ports; the endpoint closes them.
	Listeners []net.Listener

	// Brokers may call, nobody else. At least one.
	Brokers []Broker

	// DisableX509 and DisableJWT answer the RPCs of that profile with Unimplemented.
	DisableX509, DisableJWT bool

	// IssueWait is how long a call for a registered workload waits for its first SVID. Zero means 10 s.
	IssueWait time.Duration

	// SpreadUpdates spreads updates that only bring new bundles over this time. Zero sends them at once.
	SpreadUpdates time.Duration

	// MaxStreams bounds the open calls of one broker. Zero means DefaultMaxStreams.
	MaxStreams int

	// Executables looks at what processes run. Nil means this process itself.
	Executables peer.Executables

	// Log gets what operators should know, and a line for each SVID that is handed to a broker, which names both. Nil
	// means nowhere. Secrets and tokens never go there.
	Log *slog.Logger

	// Now is the clock that brokers' SVIDs are judged by. Nil means time.Now.
	Now func() time.Time

	// OnCall, if not nil, is told when a call has ended; OnPush when a stream's message has been sent. They must not block.
	OnCall func(workloadapi.CallEnd)
	OnPush func(method string)
}

// An Endpoint is a Broker Endpoint. It answers while Run runs.
type Endpoint struct {
	cfg      Config
	brokers  map[spiffeid.ID]*Broker
	feed     *workloadapi.Feed
	peers    *peer.Table
	gate     *peer.Gate
	conns    *connections
	grpc     *grpc.Server
	calls    *workloadapi.CallLimit[spiffeid.ID]
	refusals *workloadapi.RefusalLog

	// stopping ends when Run's context does; its cause is workloadapi.ErrStopping.
	stopping context.Context
	stop     context.CancelCauseFunc

	closeOnce sync.Once
	closeErr  error
}

// New checks the configuration. Whoever does not call Run calls Close.
func New(cfg Config) (*Endpoint, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	peers, err := peer.NewTable(peer.Config{Executables: cfg.Executables, Log: cfg.Log})
	if err != nil {
		return nil, err
	}
	e := &Endpoint{
		cfg: cfg, brokers: map[spiffeid.ID]*Broker{}, peers: peers, gate: peer.NewGate(attestingEach, attestingTotal),
		feed:     &workloadapi.Feed{Source: cfg.Source, IssueWait: cfg.IssueWait, SpreadUpdates: cfg.SpreadUpdates, Log: cfg.Log, OnPush: cfg.OnPush},
		calls:    workloadapi.NewCallLimit[spiffeid.ID](len(cfg.Brokers)*cfg.MaxStreams, cfg.MaxStreams),
		refusals: workloadapi.NewRefusalLog(cfg.Log),
	}
	for i := range cfg.Brokers {
		e.brokers[cfg.Brokers[i].ID] = &cfg.Brokers[i]
	}
	e.conns = newConnections(&e.cfg, func(id spiffeid.ID) bool { return e.brokers[id] != nil })
	e.stopping, e.stop = context.WithCancelCause(context.Background())
	e.grpc = grpc.NewServer(
		grpc.Creds(e.conns.credentials()),
		grpc.MaxRecvMsgSize(maxRequestBytes),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.MaxConcurrentStreams(uint32(cfg.MaxStreams)),
		grpc.ConnectionTimeout(handshakeTimeout),
		// Pings find a broker that is gone without a word, over TCP. An idle connection is kept: brokers wait.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.UnaryInterceptor(e.unary),
		grpc.StreamInterceptor(e.stream),
		// So that the interceptor sees calls to services that are not there, too.
		grpc.UnknownServiceHandler(func(_ any, ss grpc.ServerStream) error {
			return status.Error(codes.Unimplemented, "no such method on this endpoint")
		}),
	)
	brokerpb.RegisterAPIServer(e.grpc, &api{endpoint: e})
	reflection.Register(e.grpc)
	return e, nil
}

func (c *Config) check() error {
	switch {
	case c.TrustDomain.IsZero() || c.Source == nil || c.Attestor == nil || c.SVID == nil || c.Bundles == nil:
		return errors.New("config of the Broker Endpoint: TrustDomain, Source, Attestor, SVID and Bundles are all needed")
	case len(c.Listeners) == 0:
		return errors.New("config of the Broker Endpoint: Listeners is empty")
	case len(c.Brokers) == 0:
		return errors.New("config of the Broker Endpoint: Brokers is empty, so that nobody could call it")
	case c.MaxStreams < 0 || c.IssueWait < 0 || c.SpreadUpdates < 0:
		return fmt.Errorf("MaxStreams %d, IssueWait %s and SpreadUpdates %s: must not be negative", c.MaxStreams, c.IssueWait, c.SpreadUpdates)
	}
	seen := map[spiffeid.ID]bool{}
	for _, b := range c.Brokers {
		switch {
		case !b.ID.MemberOf(c.TrustDomain) || b.ID.Path() == "":
			return fmt.Errorf("broker %q: not the SPIFFE ID of a workload of trust domain %q", b.ID, c.TrustDomain.Name())
		case seen[b.ID]:
			return fmt.Errorf("broker %q is there twice", b.ID)
		case len(b.References) == 0:
			return fmt.Errorf("broker %q may use no type of reference: allow %s, %s or both", b.ID, PID, Kubernetes)
		}
		for _, r := range b.References {
			if r != PID && r != Kubernetes {
				return fmt.Errorf("broker %q: %q is no type of reference: %s and %s are", b.ID, r, PID, Kubernetes)
			}
		}
		seen[b.ID] = true
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.IssueWait == 0 {
		c.IssueWait = 10 * time.Second
	}
	if c.MaxStreams == 0 {
		c.MaxStreams = DefaultMaxStreams
	}
	c.Brokers = slices.Clone(c.Brokers)
	return nil
}

// Run serves until ctx ends. Streams then end with Unavailable, so that brokers come back. Run returns when everything
// that it started has ended: nil if that was because of ctx. It is called once.
func (e *Endpoint) Run(ctx context.Context) error {
	served := make(chan error, len(e.cfg.Listeners))
	for _, l := range e.cfg.Listeners {
		go func() {
			if err := e.grpc.Serve(e.conns.listener(l)); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
				served <- fmt.Errorf("serving %s: %w", l.Addr(), err)
				return
			}
			served <- nil
		}()
	}
	left := len(e.cfg.Listeners)
	var err error
	select {
	case <-ctx.Done():
		e.stop(workloadapi.ErrStopping)
		e.stopGRPC()
	case err = <-served:
		left--
	}
	err = errors.Join(err, e.Close())
	for range left {
		err = errors.Join(err, <-served)
	}
	return err
}

func (e *Endpoint) stopGRPC() {
	done := make(chan struct{})
	go func() {
		e.grpc.GracefulStop()
		close(done)
	}()
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		e.grpc.Stop()
		<-done
	}
}

// Close ends what still runs, without grace. Run does it by itself.
func (e *Endpoint) Close() error {
	e.closeOnce.Do(func() {
		e.stop(workloadapi.ErrStopping)
		e.grpc.Stop()
		var errs []error
		for _, l := range e.cfg.Listeners {
			if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
				errs = append(errs, err)
			}
		}
		e.closeErr = errors.Join(append(errs, e.peers.Close())...)
	})
	return e.closeErr
}

func (b *Broker) mayUse(t ReferenceType) bool { return slices.Contains(b.References, t) }

func (b *Broker) mayAsk(audiences []string) (string, bool) {
	for _, a := range audiences {
		if len(b.Audiences) > 0 && !slices.Contains(b.Audiences, a) {
			return a, false
		}
	}
	return "", true
}

func (b *Broker) mayGet(id spiffeid.ID) bool {
	return len(b.IDs) == 0 || slices.ContainsFunc(b.IDs, func(pattern string) bool { return policy.ServiceMatches(pattern, id) })
}
