package adminapi

import (
	"context"

	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
)

// A service is signet.agent.v1.Agent.
type service struct {
	agentv1.UnimplementedAgentServer
	config *Config
}

// GetStatus says how the agent is.
func (s *service) GetStatus(ctx context.Context, _ *agentv1.GetStatusRequest) (*agentv1.GetStatusResponse, error) {
	return s.config.Status(ctx), nil
}
