package workloadapi

import (
	"context"
	"errors"
	"log/slog"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/workloadapi/peer"
)

// securityHeader must come with every call, with the value "true" exactly: a program that is tricked into sending a
// request here does not know of it. [Workload Endpoint §3]
const securityHeader = "workload.spiffe.io"

// exempt services work without the header: Envoy and health checkers cannot be made to send it (DEC-20).
var exempt = [...]string{
	"/grpc.health.v1.Health/",
	"/envoy.service.secret.v3.SecretDiscoveryService/",
	"/envoy.service.auth.v3.Authorization/",
}

// checkHeader comes before everything else, also before the answer that a method does not exist (WEP-08).
func (s *Server) checkHeader(ctx context.Context, method string) error {
	if !s.cfg.RequireHeaderEverywhere {
		for _, prefix := range exempt {
			if strings.HasPrefix(method, prefix) {
				return nil
			}
		}
	}
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get(securityHeader); len(v) != 1 || v[0] != "true" {
		return &ArgumentError{Text: "the metadata " + securityHeader + ": true is missing: SPIFFE clients send it with each call, exactly once", Reason: ReasonHeaderMissing}
	}
	return nil
}

// enter lets a call in. The context it returns ends with the call, with the server, with the calling process, and with
// cancel. leave is never nil.
func (s *Server) enter(ctx context.Context, method string) (_ context.Context, cancel context.CancelCauseFunc, leave func(), err error) {
	ctx, cancel = context.WithCancelCause(ctx)
	leave = func() { cancel(nil) }
	if err := s.checkHeader(ctx, method); err != nil {
		return ctx, cancel, leave, err
	}
	info, err := peer.InfoFromContext(ctx)
	if err != nil {
		return ctx, cancel, leave, err
	}
	if info.Err != nil && !strings.HasPrefix(method, exempt[0]) { // health says nothing about anybody
		return ctx, cancel, leave, info.Err
	}
	if err := s.pace(info, method); err != nil {
		return ctx, cancel, leave, err
	}
	if err := s.calls.Take(uidKey(info.UID)); err != nil {
		return ctx, cancel, leave, err
	}
	unhook := context.AfterFunc(s.stopping, func() { cancel(ErrStopping) })
	return ctx, cancel, func() {
		unhook()
		cancel(nil)
		s.calls.Put(uidKey(info.UID))
	}, nil
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	start := time.Now()
	ctx, _, leave, err := s.enter(ctx, info.FullMethod)
	defer leave()
	var resp any
	if err == nil {
		resp, err = handler(ctx, req)
	}
	if err = s.ended(ctx, info.FullMethod, start, err); err != nil {
		return nil, err
	}
	return resp, nil
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	start := time.Now()
	ctx, cancel, leave, err := s.enter(ss.Context(), info.FullMethod)
	defer leave()
	if err == nil {
		call := &stream{ServerStream: ss, ctx: ctx, server: s}
		call.end = func() { cancel(ErrStopping) }
		unhook := context.AfterFunc(s.leaving, call.leave)
		defer unhook()
		err = handler(srv, call)
	}
	return s.ended(ctx, info.FullMethod, start, err)
}

// A stream has the context that enter made. When the server leaves, it ends once its caller has had an answer.
type stream struct {
	grpc.ServerStream
	ctx      context.Context
	server   *Server
	end      func()
	answered atomic.Bool
}

func (s *stream) Context() context.Context { return s.ctx }

// SendMsg sends an answer.
func (s *stream) SendMsg(m any) error {
	err := s.ServerStream.SendMsg(m)
	s.answered.Store(true)
	// The order matters, here and in leave: whichever of the two comes second sees what the first has done.
	if s.server.leaving.Err() != nil {
		s.end()
	}
	return err
}

func (s *stream) leave() {
	if s.answered.Load() {
		s.end()
	}
}

// ended turns the error of a call into its status and reports it.
func (s *Server) ended(ctx context.Context, method string, start time.Time, err error) error {
	st := Status(ctx, err)
	// Health, reflection and unimplemented methods make their own status. It counts only as the outermost error: one that
	// is wrapped comes from elsewhere, such as the CA, and does not speak about this call.
	if own, ok := err.(interface{ GRPCStatus() *status.Status }); ok && !errors.Is(context.Cause(ctx), ErrStopping) {
		st = own.GRPCStatus().Err()
	}
	code := status.Code(st)
	if s.cfg.OnCall != nil {
		if code == codes.Unimplemented {
			method = "unknown" // the client chose the name: as a label it would be unbounded
		}
		end := CallEnd{Method: method, Code: code, Duration: time.Since(start)}
		if st != nil {
			end.Reason, end.Text = ReasonOf(st), status.Convert(st).Message()
		}
		if info, ierr := peer.InfoFromContext(ctx); ierr == nil {
			end.UID = info.UID
			if info.Process != nil {
				end.PID = info.Process.PID
			}
		}
		s.cfg.OnCall(end)
	}
	var who []slog.Attr
	if p, perr := peer.FromContext(ctx); perr == nil {
		who = []slog.Attr{slog.Int("pid", int(p.PID)), slog.Uint64("uid", uint64(p.UID))}
	}
	s.refusals.Note(ctx, method, code, err, who...)
	return st
}

// pace counts the call for its process and for its user, of whom neither may begin too many. It comes before the process is
// looked at, which is what costs.
func (s *Server) pace(info peer.Info, method string) error {
	r := s.rates
	if own := s.ownRates[method]; own != nil {
		r = own
	}
	if info.Process != nil {
		if err := r.ofProcess.Take(processKey{info.Process.ID(), info.Process.PID}); err != nil {
			return err
		}
	}
	return r.ofUser.Take(uidKey(info.UID))
}

// rates bound the calls that one process begins, and those of one user.
type rates struct {
	ofProcess *CallRate[processKey]
	ofUser    *CallRate[uidKey]
}

func newRates(perSecond int) *rates {
	return &rates{NewCallRate[processKey](perSecond), NewCallRate[uidKey](callRateOfUser * perSecond)}
}

// A processKey is a process whose calls are counted.
type processKey struct {
	id  uint64
	pid int32
}

func (p processKey) String() string { return "process " + strconv.Itoa(int(p.pid)) }

// A uidKey is a user whose calls are counted.
type uidKey uint32

func (u uidKey) String() string { return "uid " + strconv.FormatUint(uint64(u), 10) }
