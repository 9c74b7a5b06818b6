package workloadapi

import (
	"errors"
	"slices"
	"time"

	"google.golang.org/grpc"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/api/signet/policy/v1/policyapi"
	"github.com/signet-id/signet/policy"
)

// A policyService is signet.policy.v1.Policies. It is a service of its own: the Workload API is not extended. (WEP-30)
type policyService struct {
	policyapi.UnimplementedPoliciesServer
	server *Server
}

// Watch streams the call policies of the caller's own IDs. They are never spread over time: an operator's "no" must hold
// at once.
func (p *policyService) Watch(req *policyapi.WatchRequest, ss grpc.ServerStreamingServer[policyapi.WatchResponse]) error {
	if req.GetFormat() == 0 {
		return badArgument("format is 0: send the newest policy format that the caller reads, such as 1")
	}
	var sent watched
	return p.server.Follow(ss.Context(), Stream{
		Method: policyapi.Policies_Watch_FullMethodName,
		Render: func(u Update) (Message, error) {
			if u.NoPolicies {
				return Message{}, errNoPolicies
			}
			if u.Policies == nil {
				return Message{}, errors.New("policies were never synchronised")
			}
			if have := u.Policies.GetFormat(); have > req.GetFormat() {
				return Message{}, &formatError{reads: req.GetFormat(), have: have}
			}
			resp := &policyapi.WatchResponse{
				MaxOffline:             int64(p.server.cfg.MaxOffline / time.Second),
				MaxRevocationStaleness: int64(p.server.cfg.MaxRevocationStaleness / time.Second),
			}
			if !u.Offline.IsZero() {
				resp.OfflineSince = u.Offline.Unix()
			}
			now := watched{policies: u.Policies, offline: resp.GetOfflineSince(), revocations: u.Revocations, begun: true}
			seen := map[string]bool{}
			for _, i := range u.Identities {
				if id := i.ID.String(); !seen[id] {
					seen[id] = true
					now.services = append(now.services, id)
				}
			}
			if !sent.begun || now.revocations != sent.revocations {
				resp.Revocations = u.Revocations.Set()
			}
			same := sent.begun && now.policies == sent.policies && slices.Equal(now.services, sent.services)
			if same && resp.Revocations == nil && now.offline == sent.offline {
				return Message{}, nil // what has changed is not shown here
			}
			if resp.Partial = same && req.GetPartial(); !resp.Partial {
				resp.Policies, resp.ServiceIds = now.policies, now.services
			}
			m, err := Show(resp, ss)
			send := m.Send
			m.Send = func() error {
				sent = now
				return send()
			}
			return m, err
		},
	})
}

// watched is what a stream was sent last.
type watched struct {
	begun       bool
	services    []string
	policies    *policyv1.PolicySet
	revocations *policy.Revocations
	offline     int64
}
