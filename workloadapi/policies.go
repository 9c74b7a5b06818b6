package workloadapi

import (
	"errors"
	"time"

	"google.golang.org/grpc"

	"github.com/signet-id/signet/api/signet/policy/v1/policyapi"
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
			resp := &policyapi.WatchResponse{Policies: u.Policies}
			resp.MaxOffline = int64(p.server.cfg.MaxOffline / time.Second)
			if !u.Offline.IsZero() {
				resp.OfflineSince = u.Offline.Unix()
			}
			seen := map[string]bool{}
			for _, i := range u.Identities {
				if id := i.ID.String(); !seen[id] {
					seen[id] = true
					resp.ServiceIds = append(resp.ServiceIds, id)
				}
			}
			return Show(resp, ss)
		},
	})
}
