package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/api/signet/policy/v1/policyapi"
	"github.com/signet-id/signet/workloadapi/peer"
)

// Bounds of the endpoint that nobody needs to change.
const (
	// maxRequestBytes bounds a request. Of the Workload API the longest is a JWT-SVID of 16 KiB with an audience, or a list
	// of audiences; an Envoy names in its first request each of its several hundred extensions.
	maxRequestBytes = 256 << 10

	// readBufferBytes is what a connection reads at once, into a buffer that it has only while something comes (peer's
	// connections see to that). Callers send little.
	readBufferBytes = 4 << 10

	// maxHeaderBytes bounds the metadata of a call.
	maxHeaderBytes = 16 << 10

	// maxStreamsPerConnection is far above what a client opens, which is one for each RPC it uses.
	maxStreamsPerConnection = 100

	// handshakeTimeout is how long a connection may take to say that it speaks HTTP/2.
	handshakeTimeout = 10 * time.Second

	// idleTimeout ends connections without a call.
	idleTimeout = 15 * time.Minute

	// callRateOfUser is how many times the calls of one process all of its user's may begin in a second.
	callRateOfUser = 4

	// stopTimeout is how long calls may take to end at shutdown before their connections are closed.
	stopTimeout = 2 * time.Second

	// spareDescriptors are kept free for everything that is not a caller's connection.
	spareDescriptors = 256

	// attestingPerUID and attestingTotal bound the processes that are looked at simultaneously.
	attestingPerUID, attestingTotal = 32, 1024
)

// Config is what an endpoint needs. Source, Attestor and SocketPath have no default.
type Config struct {
	// Source knows the callers' identities. If it is an Acknowledger as well, it is told what has been handed on.
	Source Source

	// Attestor says what callers are.
	Attestor Attestor

	// SocketPath is where the Unix socket is made, at most 107 bytes. A missing directory is made with mode 0755.
	SocketPath string

	// Socket, if not nil, listens at SocketPath already, and is taken instead of making one: the service manager's, or that
	// of the agent before this one. If nothing is at SocketPath any more, one is made all the same. SocketLock is the lock
	// that came with it. The caller closes both.
	Socket, SocketLock *os.File

	// Executables looks at what callers run. Nil means this process itself.
	Executables peer.Executables

	// Mode is the socket's mode. Zero means 0777: any local process may ask, and attestation decides.
	Mode os.FileMode

	// Log gets what operators should know. Nil means nowhere. Secrets and tokens never go there.
	Log *slog.Logger

	// Now is the clock that tokens are judged by. Nil means time.Now.
	Now func() time.Time

	// MaxOffline is for how long policies count after the contact to the CA was lost, as enforcement points are told. Zero: it
	// is theirs to say.
	MaxOffline time.Duration

	// MaxRevocationStaleness is for how long calls go on by revocations that may be out of date, as enforcement points are
	// told. Zero: as long as policies count.
	MaxRevocationStaleness time.Duration

	// JWTLeeway is how far the clock of a JWT-SVID's issuer may be off. Zero means 30 s; at most 60 s.
	JWTLeeway time.Duration

	// AllowUnknownJWTHeaders lets ValidateJWTSVID accept tokens with header members other than alg, kid and typ.
	AllowUnknownJWTHeaders bool

	// AllowForeignPrivateClaims lets ValidateJWTSVID return all claims of a token from a foreign trust domain, and not
	// only the registered ones. [Workload API §6.2.3]
	AllowForeignPrivateClaims bool

	// RequireHeaderEverywhere demands the security header also from SDS, ext_authz and grpc.health, which are exempt
	// otherwise so that Envoy and health checks work as they are.
	RequireHeaderEverywhere bool

	// AllowBundlesWithoutIdentity serves our own trust domain's bundles to callers without a registration entry.
	AllowBundlesWithoutIdentity bool

	// WIT has the WIT-SVIDs. Nil answers the RPCs of that profile with Unimplemented. [Workload API §7]
	WIT WITSource

	// DisableX509 and DisableJWT answer the RPCs of that profile with Unimplemented.
	DisableX509, DisableJWT bool

	// IssueWait is how long a call of a registered caller waits for its first SVID before it ends with Unavailable.
	// Zero means 10 s.
	IssueWait time.Duration

	// SpreadUpdates spreads updates that only bring new bundles, which concern every stream at once, over this time.
	// Zero sends them at once. [Workload API §4.2]
	SpreadUpdates time.Duration

	// MaxStreams bounds open calls, and open connections. Zero means 16384. New lowers it, and says so in the log, where
	// the limit of open files allows less.
	MaxStreams int

	// MaxStreamsPerUID bounds those of one user, so that one cannot lock out the others. Zero means a quarter of
	// MaxStreams.
	MaxStreamsPerUID int

	// MaxCallsPerSecond bounds the calls that one process begins, and four times as many those of one user, with five seconds'
	// worth of them after a pause. Zero means 1000; negative means that there is no bound.
	MaxCallsPerSecond int

	// Observations takes what enforcement points decided. Nil: their reports are answered with Unimplemented.
	Observations Observations

	// OwnRates are bounds for single methods, by their full names, for which MaxCallsPerSecond does not hold: such as one that is
	// called for every request of a busy proxy. They are meant as MaxCallsPerSecond is; zero or negative means no bound.
	OwnRates map[string]int

	// OnCall, if not nil, is told when a call has ended. It must not block.
	OnCall func(CallEnd)

	// OnPush, if not nil, is told when a stream's message has been sent. It must not block.
	OnPush func(method string)

	// Services are registered on the same socket, under the same rules: SDS and ext_authz are such.
	Services []func(grpc.ServiceRegistrar, *Server)
}

// A CallEnd is one finished call, for metrics. It names no SPIFFE ID.
type CallEnd struct {
	// Method is the full gRPC method, or "unknown" if there is no such method.
	Method   string
	Code     codes.Code
	Duration time.Duration
	// Reason and Text are what a refused caller was told. The text may repeat what the caller sent: it is no label, either.
	Reason Reason
	Text   string
	// PID and UID are the caller's; PID is 0 for one in another PID namespace.
	PID int32
	UID uint32
}

// A Server is a Workload Endpoint. It listens from New on and answers while Run runs.
type Server struct {
	cfg      Config
	log      *slog.Logger
	socket   *socket
	peers    *peer.Table
	gate     *peer.Gate
	feed     *Feed
	grpc     *grpc.Server
	health   *health.Server
	calls    *CallLimit[uidKey]
	rates    *rates
	ownRates map[string]*rates // by method
	reports  reportRates
	refusals *RefusalLog

	// leaving ends when Run's context does: calls that have had an answer end. stopping ends when the others have had
	// theirs, or stopTimeout later; its cause is ErrStopping.
	leaving  context.Context
	leave    context.CancelFunc
	stopping context.Context
	stop     context.CancelCauseFunc

	closeOnce sync.Once
	closeErr  error
}

// New checks the configuration and creates the socket. Callers can connect from then on, and wait for Run. Whoever does
// not call Run calls Close.
func New(cfg Config) (*Server, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	peers, err := peer.NewTable(peer.Config{MaxConnections: cfg.MaxStreams, MaxConnectionsPerUID: cfg.MaxStreamsPerUID, Executables: cfg.Executables, Log: cfg.Log})
	if err != nil {
		return nil, err
	}
	sock, err := cfg.listen()
	if err != nil {
		return nil, errors.Join(err, peers.Close())
	}
	s := &Server{
		cfg: cfg, log: cfg.Log, socket: sock, peers: peers,
		gate:   peer.NewGate(attestingPerUID, attestingTotal),
		health: health.NewServer(),
		calls:  NewCallLimit[uidKey](cfg.MaxStreams, cfg.MaxStreamsPerUID),
		rates:  newRates(cfg.MaxCallsPerSecond), ownRates: map[string]*rates{},
		reports:  newReportRates(),
		refusals: NewRefusalLog(cfg.Log),
	}
	s.feed = &Feed{
		Source: cfg.Source, IssueWait: cfg.IssueWait, SpreadUpdates: cfg.SpreadUpdates, BundlesWithoutIdentity: cfg.AllowBundlesWithoutIdentity,
		Log: cfg.Log, OnPush: cfg.OnPush,
	}
	for method, perSecond := range cfg.OwnRates {
		s.ownRates[method] = newRates(max(perSecond, 0))
	}
	s.leaving, s.leave = context.WithCancel(context.Background())
	s.stopping, s.stop = context.WithCancelCause(context.Background())
	s.grpc = grpc.NewServer(
		grpc.Creds(greeting{peers.Credentials()}),
		grpc.MaxRecvMsgSize(maxRequestBytes),
		grpc.ReadBufferSize(readBufferBytes),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.MaxConcurrentStreams(maxStreamsPerConnection),
		grpc.ConnectionTimeout(handshakeTimeout),
		// No pings from our side: the kernel reports a peer that is gone, and a stopped one is no reason to hang up.
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
		// So that the interceptor sees calls to services that are not there, too.
		grpc.UnknownServiceHandler(func(_ any, ss grpc.ServerStream) error {
			return status.Error(codes.Unimplemented, "no such method on this endpoint")
		}),
	)
	workload.RegisterSpiffeWorkloadAPIServer(s.grpc, &workloadService{server: s})
	policyapi.RegisterPoliciesServer(s.grpc, &policyService{server: s})
	healthpb.RegisterHealthServer(s.grpc, s.health)
	for _, register := range cfg.Services {
		register(s.grpc, s)
	}
	reflection.Register(s.grpc)
	for name := range s.grpc.GetServiceInfo() {
		s.health.SetServingStatus(name, healthpb.HealthCheckResponse_NOT_SERVING)
	}
	s.health.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	return s, nil
}

func (c *Config) check() error {
	switch {
	case c.Source == nil:
		return errors.New("config of the Workload Endpoint: Source is nil")
	case c.Attestor == nil:
		return errors.New("config of the Workload Endpoint: Attestor is nil")
	case c.MaxOffline < 0:
		return fmt.Errorf("MaxOffline is %s: must not be negative", c.MaxOffline)
	case c.MaxRevocationStaleness < 0:
		return fmt.Errorf("MaxRevocationStaleness is %s: must not be negative", c.MaxRevocationStaleness)
	case c.JWTLeeway < 0 || c.JWTLeeway > time.Minute:
		return fmt.Errorf("JWTLeeway is %s: must be between 0 and 1m", c.JWTLeeway)
	case c.IssueWait < 0 || c.SpreadUpdates < 0:
		return fmt.Errorf("IssueWait %s and SpreadUpdates %s: must not be negative", c.IssueWait, c.SpreadUpdates)
	case c.MaxStreams < 0 || c.MaxStreamsPerUID < 0:
		return fmt.Errorf("MaxStreams %d and MaxStreamsPerUID %d: must not be negative", c.MaxStreams, c.MaxStreamsPerUID)
	case c.Mode&^os.ModePerm != 0:
		return fmt.Errorf("socket mode (Mode) %v: only permission bits, such as 0777", c.Mode)
	}
	if c.Mode == 0 {
		c.Mode = 0o777
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
	level := slog.LevelWarn
	if c.MaxStreams == 0 {
		c.MaxStreams = 16384
		level = slog.LevelInfo // nobody asked for so many
	}
	if err := c.fitDescriptors(level); err != nil {
		return err
	}
	if c.MaxStreamsPerUID == 0 {
		c.MaxStreamsPerUID = max(1, c.MaxStreams/4)
	}
	if c.MaxCallsPerSecond == 0 {
		c.MaxCallsPerSecond = 1000
	}
	c.MaxCallsPerSecond = min(max(c.MaxCallsPerSecond, 0), 1_000_000)
	return nil
}

// fitDescriptors lowers MaxStreams to what the process may open. Otherwise one user's connections, within that user's own
// limit, could use up all descriptors: nobody else would be let in, and the agent could not reach its CA.
func (c *Config) fitDescriptors(level slog.Level) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("asking for the limit of open files: %w", err)
	}
	most := 1
	if limit.Cur > spareDescriptors {
		most = max(1, peer.MaxConnections(int(min(limit.Cur-spareDescriptors, math.MaxInt32))))
	}
	if c.MaxStreams > most {
		c.Log.Log(context.Background(), level, "max_streams is lowered to what the limit of open files allows", "max_streams", c.MaxStreams,
			"lowered_to", most, "open_files", limit.Cur, "wanted", peer.Descriptors(c.MaxStreams)+spareDescriptors)
		c.MaxStreams = most
	}
	return nil
}

// Addr is the socket's address as SPIFFE_ENDPOINT_SOCKET wants it.
func (s *Server) Addr() string { return "unix://" + s.socket.path }

// InPlace says whether the socket is still where callers look for it: somebody may have removed it, or put another there; and
// whether a server that is started anew could make it, as a service manager's alone can only that one.
func (s *Server) InPlace() (there, ours bool) { return s.socket.inPlace(), s.socket.lock != nil }

// Files are the listening socket and its lock, for who serves it next. The caller closes them. From then on the socket is
// not removed at the end. lock is nil if there is none.
func (s *Server) Files() (listening, lock *os.File, err error) {
	if listening, err = s.socket.listener.File(); err != nil {
		return nil, nil, fmt.Errorf("socket %s: %w", s.socket.path, err)
	}
	s.socket.kept.Store(true)
	if s.socket.lock == nil {
		return listening, nil, nil
	}
	fd, err := unix.FcntlInt(s.socket.lock.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("lock of socket %s: %w", s.socket.path, err), listening.Close())
	}
	return listening, os.NewFile(uintptr(fd), s.socket.lock.Name()), nil
}

// listen takes the socket that was passed in, or makes one.
func (c *Config) listen() (*socket, error) {
	if c.Socket != nil {
		s, err := adopt(c.SocketPath, c.Socket, c.SocketLock, c.Log)
		if s != nil || err != nil {
			return s, err
		}
		c.Log.Warn("nothing is where the socket that was passed in should be: another one is made", "socket", c.SocketPath)
		if s, err = listen(c.SocketPath, c.Mode, c.Log); err != nil {
			return nil, fmt.Errorf("%w (the socket that was passed in is not there any more; systemctl restart signet-agent.socket makes it anew)", err)
		}
		return s, nil
	}
	return listen(c.SocketPath, c.Mode, c.Log)
}

// Run serves until ctx ends. Calls that wait for their first answer still get it; streams that had theirs end with
// Unavailable, so that clients come back, and the socket is removed unless somebody else holds it too. Run returns when
// everything it started has ended: nil if that was because of ctx. It is called once.
func (s *Server) Run(ctx context.Context) error {
	s.health.Resume()
	served := make(chan error, 1)
	connections := newAcceptor(s.socket.listener)
	go func() { served <- s.grpc.Serve(connections) }()

	var err error
	select {
	case <-ctx.Done():
		s.health.Shutdown()
		connections.pause()
		s.stopGRPC()
		<-served
	case err = <-served:
		err = fmt.Errorf("serving %s: %w", s.socket.path, err)
	}
	return errors.Join(err, s.Close())
}

// stopGRPC lets calls end with their own status. A client that does not let go, such as one that holds a reflection
// stream open, is cut off, which it sees as Unavailable too.
//
// Clients are told that no new calls are taken on their connections while their streams end. Whoever is quicker than that and
// calls once more on the old connection gets one answer.
func (s *Server) stopGRPC() {
	done := make(chan struct{})
	go func() {
		s.grpc.GracefulStop()
		close(done)
	}()
	s.leave()
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		s.stop(ErrStopping)
		s.grpc.Stop()
		<-done
	}
}

// Close ends what still runs, without grace, and removes the socket. Run does it by itself.
func (s *Server) Close() error {
	s.closeOnce.Do(func() {
		s.leave()
		s.stop(ErrStopping)
		s.health.Shutdown()
		s.grpc.Stop()
		s.closeErr = errors.Join(s.socket.close(), s.peers.Close())
	})
	return s.closeErr
}
