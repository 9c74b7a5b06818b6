package workloadapi

import (
	"fmt"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
)

// A workloadService is the SPIFFE Workload API. The RPCs of the WIT-SVID profile are not implemented and say so.
// [Workload API §5, §6, §7]
type workloadService struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	server *Server
}

// FetchX509SVID streams the caller's X509-SVIDs with their keys and bundles. [Workload API §5.2.1]
func (w *workloadService) FetchX509SVID(_ *workload.X509SVIDRequest, ss grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if w.server.cfg.DisableX509 {
		return errDisabled
	}
	return w.server.Follow(ss.Context(), Stream{
		Method: workload.SpiffeWorkloadAPI_FetchX509SVID_FullMethodName,
		Spread: true,
		Render: func(u Update) (Message, error) {
			resp, err := x509SVIDResponse(u)
			if err != nil {
				return Message{}, err
			}
			return Show(resp, ss)
		},
	})
}

// FetchX509Bundles streams the X.509 bundles of our own trust domain and of those that the caller's identities federate
// with. [Workload API §5.2.2]
func (w *workloadService) FetchX509Bundles(_ *workload.X509BundlesRequest, ss grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	if w.server.cfg.DisableX509 {
		return errDisabled
	}
	return w.server.Follow(ss.Context(), Stream{
		Method:      workload.SpiffeWorkloadAPI_FetchX509Bundles_FullMethodName,
		BundlesOnly: true,
		Spread:      true,
		Render: func(u Update) (Message, error) {
			resp := &workload.X509BundlesResponse{Bundles: map[string][]byte{}}
			for td := range allowedDomains(u, u.Identities) {
				if bundle := u.X509Bundles[td]; len(bundle) > 0 {
					resp.Bundles[td.IDString()] = bundle
				}
			}
			if resp.Bundles[u.TrustDomain.IDString()] == nil {
				return Message{}, fmt.Errorf("the X.509 bundle of our own trust domain %q is missing", u.TrustDomain.Name())
			}
			return Show(resp, ss)
		},
	})
}

// x509SVIDResponse builds the whole message or none: a client discards a message in which anything is missing.
func x509SVIDResponse(u Update) (*workload.X509SVIDResponse, error) {
	identities := distinctHints(u.Identities, func(i Identity) string { return i.Hint })
	resp := &workload.X509SVIDResponse{FederatedBundles: map[string][]byte{}}
	for _, i := range identities {
		bundle := u.X509Bundles[i.ID.TrustDomain()]
		switch {
		case i.ID.IsZero() || i.ID.Path() == "":
			return nil, fmt.Errorf("entry %q has the SPIFFE ID %q, which names no workload", i.EntryID, i.ID)
		case len(i.Chain) == 0 || len(i.Key) == 0:
			return nil, fmt.Errorf("the X509-SVID or the key of %q is missing", i.ID)
		case len(bundle) == 0:
			return nil, fmt.Errorf("the X.509 bundle for %q is missing", i.ID)
		}
		resp.Svids = append(resp.Svids, &workload.X509SVID{
			SpiffeId: i.ID.String(), X509Svid: i.Chain, X509SvidKey: i.Key, Bundle: bundle, Hint: i.Hint,
		})
	}
	for td := range allowedDomains(u, identities) {
		if bundle := u.X509Bundles[td]; td != u.TrustDomain && len(bundle) > 0 {
			resp.FederatedBundles[td.IDString()] = bundle
		}
	}
	return resp, nil
}

// allowedDomains is our own trust domain and those that the identities federate with. A bundle of any other does not
// leave, whatever the source put into the update. (WAPI-36)
func allowedDomains(u Update, identities []Identity) map[spiffeid.TrustDomain]bool {
	allowed := map[spiffeid.TrustDomain]bool{u.TrustDomain: true}
	for _, i := range identities {
		for _, td := range i.FederatesWith {
			allowed[td] = true
		}
	}
	return allowed
}

// distinctHints leaves out what repeats an earlier non-empty hint. The order is the source's: the default identity, then
// the oldest entry first. [Workload API §5.2.1]
func distinctHints[T any](all []T, hint func(T) string) []T {
	seen := map[string]bool{}
	var distinct []T
	for _, one := range all {
		if h := hint(one); h != "" {
			if seen[h] {
				continue
			}
			seen[h] = true
		}
		distinct = append(distinct, one)
	}
	return distinct
}
