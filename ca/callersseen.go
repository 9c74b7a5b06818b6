package ca

import (
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/tally"
)

// callersSeen returns, of each service, the callers whose calls were allowed as far as observations are kept: those whom a
// change of policies would lock out. Nil if none are taken.
func (ca *CA) callersSeen() map[spiffeid.ID][]spiffeid.ID {
	if ca.observations == nil {
		return nil
	}
	type pair struct{ service, peer string }
	pairs := make(map[pair]bool)
	ca.observations.List(tally.Filter{Limit: 1, Wanted: func(o *policyv1.Observation) bool {
		if o.GetAllowed() {
			pairs[pair{o.GetService(), o.GetPeer()}] = true
		}
		return false
	}})
	out := make(map[spiffeid.ID][]spiffeid.ID)
	for p := range pairs {
		service, err := spiffeid.FromString(p.service)
		if err != nil {
			continue
		}
		if peer, err := spiffeid.FromString(p.peer); err == nil && !slices.Contains(out[service], peer) {
			out[service] = append(out[service], peer)
		}
	}
	return out
}
