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
)

// silent is a stream on which nothing comes.
type silent struct {
	grpc.ServerStream
	ctx context.Context
}

func (s silent) Context() context.Context                   { return s.ctx }
func (s silent) Send(*agentv1.AttestAgentResponse) error    { return nil }
func (s silent) Recv() (*agentv1.AttestAgentRequest, error) { <-s.ctx.Done(); return nil, s.ctx.Err() }

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
