// Package adminapi is the agent's admin socket: what an operator of this node may ask of the agent (signet.agent.v1), and
// other services that are not for workloads, such as the Delegated Identity API. Who calls is pinned as on the Workload
// API's socket. It holds no state: what it answers the agent on top of it says.
package adminapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
	"github.com/signet-id/signet/internal/adminsocket"
	"github.com/signet-id/signet/workloadapi/peer"
)

// Bounds of the socket that nobody needs to change.
const (
	maxConnections       = 1024
	maxConnectionsPerUID = 256
	// maxStreamsPerConnection is above what an operator's command opens, and allows a delegate one for each workload.
	maxStreamsPerConnection = 1000
	// maxExplaining bounds the explanations under way, which look at processes and files.
	maxExplaining    = 4
	maxRequestBytes  = 64 << 10
	maxHeaderBytes   = 16 << 10
	handshakeTimeout = 10 * time.Second
	// stopTimeout is how long calls may take to end at shutdown before their connections are closed.
	stopTimeout = 2 * time.Second
)

// ErrStopping is the cause of the end of a call's context at shutdown.
var ErrStopping = errors.New("the agent is shutting down")

// Config is what an admin socket needs.
type Config struct {
	// Socket says where it is and who is an admin.
	Socket adminsocket.Config

	// Status says how the agent is.
	Status func(context.Context) *agentv1.GetStatusResponse

	// Explain says why a process gets what it gets. caller is who asks; peers pins processes. Its errors are statuses.
	Explain func(ctx context.Context, caller *peer.Process, peers *peer.Table, req *agentv1.ExplainRequest) (*agentv1.ExplainResponse, error)

	// Decisions knows what was denied on this node. Nil: nothing is known of it.
	Decisions agentv1.DecisionsServer

	// Services are further services on the same socket. They judge each caller themselves: peer.FromContext gives the
	// pinned process, who need not be an admin. Only who may open the socket gets as far; Socket.Open lets everybody. A
	// call's context ends with the connection, with the calling process, and at shutdown, with ErrStopping as its cause;
	// what they then return leaves as Unavailable. Any error that has no gRPC status leaves without its text.
	Services []func(grpc.ServiceRegistrar)

	// Executables looks at what processes run. Nil means this process itself.
	Executables peer.Executables

	// Log gets what operators should know. Nil means nowhere.
	Log *slog.Logger
}

// A Server is an admin socket. It listens from New on and answers while Run runs.
type Server struct {
	config   Config
	log      *slog.Logger
	listener net.Listener
	peers    *peer.Table
	grpc     *grpc.Server
	judge    map[string]bool // services that judge their callers themselves

	stopping context.Context // ends at shutdown, with ErrStopping
	stop     context.CancelCauseFunc

	closeOnce sync.Once
	closeErr  error
}

// New makes the socket. Whoever does not call Run calls Close.
func New(c Config) (*Server, error) {
	if c.Status == nil || c.Explain == nil {
		return nil, errors.New("config of the admin socket: Status or Explain is nil")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	peers, err := peer.NewTable(peer.Config{MaxConnections: maxConnections, MaxConnectionsPerUID: maxConnectionsPerUID, Executables: c.Executables, Log: c.Log})
	if err != nil {
		return nil, err
	}
	listener, err := adminsocket.Listen(c.Socket)
	if err != nil {
		return nil, errors.Join(err, peers.Close())
	}
	s := &Server{config: c, log: c.Log, listener: listener, peers: peers, judge: map[string]bool{}}
	s.stopping, s.stop = context.WithCancelCause(context.Background())
	s.grpc = grpc.NewServer(
		grpc.Creds(peers.Credentials()),
		grpc.MaxRecvMsgSize(maxRequestBytes),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.MaxConcurrentStreams(maxStreamsPerConnection),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
	)
	for _, register := range c.Services {
		register(s.grpc)
	}
	for name := range s.grpc.GetServiceInfo() {
		s.judge[name] = true
	}
	if c.Decisions != nil {
		agentv1.RegisterDecisionsServer(s.grpc, c.Decisions)
	}
	agentv1.RegisterAgentServer(s.grpc, &service{config: &s.config, peers: peers, explaining: make(chan struct{}, maxExplaining)})
	reflection.Register(s.grpc)
	return s, nil
}

// Path is where the socket is.
func (s *Server) Path() string { return s.listener.Addr().String() }

// Run serves until ctx ends and returns when everything it started has ended: nil if that was because of ctx. It is
// called once.
func (s *Server) Run(ctx context.Context) error {
	served := make(chan error, 1)
	go func() { served <- s.grpc.Serve(s.listener) }()
	var err error
	select {
	case <-ctx.Done():
		s.stop(ErrStopping)
		s.stopGRPC()
		<-served
	case err = <-served:
		err = fmt.Errorf("serving %s: %w", s.Path(), err)
	}
	return errors.Join(err, s.Close())
}

// stopGRPC lets calls end with their own status, and cuts off what does not.
func (s *Server) stopGRPC() {
	done := make(chan struct{})
	go func() {
		s.grpc.GracefulStop()
		close(done)
	}()
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		s.grpc.Stop()
		<-done
	}
}

// Close ends what still runs, without grace, and removes the socket. Run does it by itself.
func (s *Server) Close() error {
	s.closeOnce.Do(func() {
		s.stop(ErrStopping)
		s.grpc.Stop()
		if err := s.listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			s.closeErr = err
		}
		s.closeErr = errors.Join(s.closeErr, s.peers.Close())
	})
	return s.closeErr
}

// enter lets a call in: callers that can be told apart, to services that judge them themselves; admins, to all others.
// The context ends with the server, too. leave is never nil.
func (s *Server) enter(ctx context.Context, method string) (_ context.Context, leave func(), err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	unhook := context.AfterFunc(s.stopping, func() { cancel(ErrStopping) })
	leave = func() {
		unhook()
		cancel(nil)
	}
	p, err := peer.FromContext(ctx)
	if err != nil {
		return ctx, leave, status.Error(codes.PermissionDenied, err.Error())
	}
	name, _, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	if s.judge[name] {
		return ctx, leave, nil
	}
	return ctx, leave, s.admin(p)
}

// admin says whether the process is an admin: as who it connected, and as who it is now.
func (s *Server) admin(p *peer.Process) error {
	now, err := p.Snapshot()
	if err != nil {
		return status.Error(codes.PermissionDenied, err.Error())
	}
	if !s.config.Socket.Allows(p.UID, p.GID, now.Groups) || !s.config.Socket.Allows(now.EffectiveUID, now.EffectiveGID, now.Groups) {
		return status.Errorf(codes.PermissionDenied, "uid %d is no admin of this agent: root, the agent's own user and whom admin_socket in its configuration names are", p.UID)
	}
	return nil
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, leave, err := s.enter(ctx, info.FullMethod)
	defer leave()
	var resp any
	if err == nil {
		resp, err = handler(ctx, req)
	}
	if err = s.ended(ctx, info.FullMethod, err); err != nil {
		return nil, err
	}
	return resp, nil
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, leave, err := s.enter(ss.Context(), info.FullMethod)
	defer leave()
	if err == nil {
		err = handler(srv, &stream{ServerStream: ss, ctx: ctx})
	}
	return s.ended(ctx, info.FullMethod, err)
}

// A stream has the context that enter made.
type stream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *stream) Context() context.Context { return s.ctx }

// ended turns the error of a call into its status.
func (s *Server) ended(ctx context.Context, method string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(context.Cause(ctx), ErrStopping) {
		return status.Error(codes.Unavailable, ErrStopping.Error())
	}
	// A status counts only as the outermost error: one that is wrapped comes from elsewhere, such as the CA, and does not
	// speak about this call.
	var st *status.Status
	own, ok := err.(interface{ GRPCStatus() *status.Status })
	switch {
	case ok:
		st = own.GRPCStatus()
	case ctx.Err() != nil:
		st = status.FromContextError(ctx.Err())
	default:
		s.log.LogAttrs(ctx, slog.LevelError, "call on the admin socket failed", slog.String("method", method), slog.Any("err", err))
		st = status.New(codes.Internal, "internal error")
	}
	if st.Code() == codes.PermissionDenied {
		s.log.LogAttrs(ctx, slog.LevelInfo, "call on the admin socket refused", slog.String("method", method), slog.String("why", st.Message()))
	}
	return st.Err()
}
