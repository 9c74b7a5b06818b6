package nodeapi

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// silent is a stream on which nothing comes.
type silent struct {
	grpc.ServerStream
	ctx context.Context
}

func (s silent) Context() context.Context                   { return s.ctx }
func (s silent) Send(*agentv1.AttestAgentResponse) error    { return nil }
func (s silent) Recv() (*agentv1.AttestAgentRequest, error) { <-s.ctx.Done(); return nil, s.ctx.Err() }

// speechless is a stream of an agent that opens it and says no more.
type speechless struct {
	grpc.ServerStream
	ctx context.Context
}

func (s speechless) Context() context.Context             { return s.ctx }
func (s speechless) Send(*nodev1.FollowResponse) error    { return nil }
func (s speechless) Recv() (*nodev1.FollowRequest, error) { <-s.ctx.Done(); return nil, s.ctx.Err() }

// A stream without a hello is not watched, so that it would outlive a ban.
func TestFollowDoesNotWaitForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, hangUp := context.WithCancel(t.Context())
		begun := time.Now()
		done := make(chan error, 1)
		go func() { done <- New(Config{}).Follow(speechless{ctx: ctx}) }()
		select {
		case err := <-done:
			if status.Code(err) != codes.DeadlineExceeded || time.Since(begun) > maxHello {
				t.Errorf("after %v: %v", time.Since(begun), err)
			}
		case <-time.After(10 * maxHello):
			t.Error("a stream that says nothing is held for ever")
		}
		hangUp() // as gRPC does when the handler returns
	})
}

func TestAttestationDoesNotWaitForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, hangUp := context.WithCancel(t.Context())
		begun := time.Now()
		done := make(chan error, 1)
		go func() { done <- New(Config{}).AttestAgent(silent{ctx: ctx}) }()
		select {
		case err := <-done:
			if status.Code(err) != codes.DeadlineExceeded || time.Since(begun) > maxAttestation {
				t.Errorf("after %v: %v", time.Since(begun), err)
			}
		case <-time.After(10 * maxAttestation):
			t.Error("a stream that says nothing is held for ever")
		}
		hangUp() // as gRPC does when the handler returns
	})
}
