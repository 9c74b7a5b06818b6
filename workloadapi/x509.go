package workloadapi

import (
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
)

// A workloadService is the SPIFFE Workload API. [Workload API §5, §6, §7]
type workloadService struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	server *Server
}

// FetchX509SVID streams the caller's X509-SVIDs with their keys and bundles. [Workload API §5.2.1]
func (w *workloadService) FetchX509SVID(_ *workload.X509SVIDRequest, ss grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if w.server.cfg.DisableX509 {
		return ErrDisabled
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
		return ErrDisabled
	}
	return w.server.Follow(ss.Context(), Stream{
		Method:      workload.SpiffeWorkloadAPI_FetchX509Bundles_FullMethodName,
		BundlesOnly: true,
		Spread:      true,
		Render: func(u Update) (Message, error) {
			bundles, err := X509Bundles(u)
			if err != nil {
				return Message{}, err
			}
			resp := &workload.X509BundlesResponse{Bundles: bundles, Crl: u.CRLs[u.TrustDomain]}
			return Show(resp, ss)
		},
	})
}

func x509SVIDResponse(u Update) (*workload.X509SVIDResponse, error) {
	identities, federated, err := X509SVIDs(u)
	if err != nil {
		return nil, err
	}
	resp := &workload.X509SVIDResponse{FederatedBundles: federated, Crl: u.CRLs[u.TrustDomain]}
	for _, i := range identities {
		resp.Svids = append(resp.Svids, &workload.X509SVID{
			SpiffeId: i.ID.String(), X509Svid: i.Chain, X509SvidKey: i.Key, Bundle: u.X509Bundles[i.ID.TrustDomain()], Hint: i.Hint,
		})
	}
	return resp, nil
}
