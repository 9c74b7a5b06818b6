package grpcauthz

import (
	"context"
	"net"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/internal/live"
)

// watching are credentials whose connections tell of their end.
type watching struct {
	credentials.TransportCredentials
}

func (w watching) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return w.TransportCredentials.ServerHandshake(&live.Conn{Conn: raw})
}

func (w watching) Clone() credentials.TransportCredentials {
	return watching{w.TransportCredentials.Clone()}
}

// A held RPC is one that was let through and is being answered.
type held struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	done   func()

	mu      sync.Mutex
	refused error         // the status that ends it; nil: none
	over    chan struct{} // closed with refused
}

// hold keeps an RPC that was let through.
func (a *Authorizer) hold(ctx context.Context, r *policy.Request) (*held, error) {
	h := &held{over: make(chan struct{})}
	h.ctx, h.cancel = context.WithCancelCause(ctx)
	done, j, err := a.point.KeepRequest(ctx, r, func(j policy.Judgement) {
		h.mu.Lock()
		h.refused = refusal(j)
		h.mu.Unlock()
		close(h.over)
		h.cancel(&policy.DeniedError{Judgement: j})
	})
	if err != nil {
		h.cancel(err)
		return nil, refusal(j)
	}
	h.done = done
	return h, nil
}

// release is called when the RPC has been answered.
func (h *held) release() {
	h.done()
	h.cancel(nil)
}

// ended is the status by which the RPC was ended, or nil.
func (h *held) ended() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.refused
}

// An outcome is how a handler ended.
type outcome struct {
	err      error
	panicked any
	returned bool
}

// stream runs the handler of a stream. A stream that is ended while its handler waits for a message must not wait for that:
// the handler runs aside, and finds its stream over when it looks. Its panic is the stream's, unless that has ended.
func (h *held) stream(handler func() error) error {
	result := make(chan outcome, 1)
	go func() {
		var o outcome
		defer func() {
			if !o.returned {
				o.panicked = recover()
			}
			result <- o
		}()
		o.err = handler()
		o.returned = true
	}()
	select {
	case o := <-result:
		if o.panicked != nil {
			panic(o.panicked)
		}
		if err := h.ended(); err != nil {
			return err
		}
		return o.err
	case <-h.over:
		return h.ended()
	}
}

type judgedStream struct {
	grpc.ServerStream
	held *held
}

func (s *judgedStream) Context() context.Context { return s.held.ctx }

func (s *judgedStream) SendMsg(m any) error {
	if err := s.held.ended(); err != nil {
		return err
	}
	return s.ServerStream.SendMsg(m)
}

func (s *judgedStream) RecvMsg(m any) error {
	if err := s.held.ended(); err != nil {
		return err
	}
	err := s.ServerStream.RecvMsg(m)
	if ended := s.held.ended(); ended != nil {
		return ended // what came after the end is not for the handler
	}
	return err
}
