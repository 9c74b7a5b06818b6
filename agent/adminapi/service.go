package adminapi

import (
	"context"

	"google.golang.org/grpc/status"

	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
	"github.com/signet-id/signet/workloadapi/peer"
)

// A service is signet.agent.v1.Agent.
type service struct {
	agentv1.UnimplementedAgentServer
	config     *Config
	peers      *peer.Table
	explaining chan struct{} // a place for each explanation under way
}

// GetStatus says how the agent is.
func (s *service) GetStatus(ctx context.Context, _ *agentv1.GetStatusRequest) (*agentv1.GetStatusResponse, error) {
	return s.config.Status(ctx), nil
}

// Explain says why a process gets what it gets.
func (s *service) Explain(ctx context.Context, req *agentv1.ExplainRequest) (*agentv1.ExplainResponse, error) {
	caller, err := peer.FromContext(ctx)
	if err != nil {
		return nil, err
	}
	select {
	case s.explaining <- struct{}{}:
		defer func() { <-s.explaining }()
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	return s.config.Explain(ctx, caller, s.peers, req)
}
