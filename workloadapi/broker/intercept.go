package broker

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi"
)

// securityHeader must come with every call, with the value "true" exactly, so that a program that is tricked into sending
// a request here cannot. [Broker Endpoint §3]
const securityHeader = "broker.spiffe.io"

// A caller is the broker that a call comes from.
type caller struct {
	*Broker
	conn connInfo
}

type callerKey struct{}

func callerFrom(ctx context.Context) caller { return ctx.Value(callerKey{}).(caller) }

// enter lets a call in. The context that it returns ends with the call and with the endpoint, and knows the broker. leave
// is never nil.
func (e *Endpoint) enter(ctx context.Context) (_ context.Context, leave func(), err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	leave = func() { cancel(nil) }
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get(securityHeader); len(v) != 1 || v[0] != "true" {
		return ctx, leave, &workloadapi.ArgumentError{Text: "the metadata " + securityHeader + ": true is missing: brokers send it with each call, exactly once"}
	}
	conn, ok := connFromContext(ctx)
	if !ok {
		return ctx, leave, errUnidentified
	}
	if err := e.identify(conn); err != nil {
		return ctx, leave, err
	}
	broker := e.brokers[conn.id]
	if broker == nil {
		return ctx, leave, errNotListed
	}
	if err := e.calls.Take(broker.ID); err != nil {
		return ctx, leave, err
	}
	unhook := context.AfterFunc(e.stopping, func() { cancel(workloadapi.ErrStopping) })
	return context.WithValue(ctx, callerKey{}, caller{broker, conn}), func() {
		unhook()
		cancel(nil)
		e.calls.Put(broker.ID)
	}, nil
}

// identify says whether the SVID that a connection was opened with is still good: it may have ended since, or its
// authority may have left the bundle.
func (e *Endpoint) identify(conn connInfo) error {
	if _, _, err := spiffe.VerifyX509SVID(conn.chain, e.cfg.Bundles, spiffe.X509Options{Now: e.cfg.Now()}); err != nil {
		return errors.Join(errUnidentified, err)
	}
	return nil
}

func (e *Endpoint) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	start := time.Now()
	ctx, leave, err := e.enter(ctx)
	defer leave()
	var resp any
	if err == nil {
		resp, err = handler(ctx, req)
	}
	if err = e.ended(ctx, info.FullMethod, start, err); err != nil {
		return nil, err
	}
	return resp, nil
}

func (e *Endpoint) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	start := time.Now()
	ctx, leave, err := e.enter(ss.Context())
	defer leave()
	if err == nil {
		err = handler(srv, &stream{ServerStream: ss, ctx: ctx})
	}
	return e.ended(ctx, info.FullMethod, start, err)
}

// A stream has the context that enter made.
type stream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *stream) Context() context.Context { return s.ctx }

// ended turns the error of a call into its status and reports it.
func (e *Endpoint) ended(ctx context.Context, method string, start time.Time, err error) error {
	st := toStatus(ctx, err)
	// Reflection and unimplemented methods make their own status. It counts only as the outermost error.
	if own, ok := err.(interface{ GRPCStatus() *status.Status }); ok && !errors.Is(context.Cause(ctx), workloadapi.ErrStopping) {
		st = own.GRPCStatus().Err()
	}
	code := status.Code(st)
	if e.cfg.OnCall != nil {
		label := method
		if code == codes.Unimplemented {
			label = "unknown" // the client chose the name: as a label it would be unbounded
		}
		e.cfg.OnCall(workloadapi.CallEnd{Method: label, Code: code, Duration: time.Since(start)})
	}
	who := []slog.Attr{slog.String("broker", "")}
	if conn, ok := connFromContext(ctx); ok {
		who[0] = slog.String("broker", conn.id.String())
	}
	e.refusals.Note(ctx, method, code, err, who...)
	return st
}
