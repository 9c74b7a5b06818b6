package workloadapi

import (
	"fmt"
	"log/slog"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/signet-id/signet/spiffe"
)

// FetchWITSVID streams a WIT-SVID with its key for each of the caller's identities, or for the one asked for.
// [Workload API §7.2.1]
func (w *workloadService) FetchWITSVID(req *workload.WITSVIDRequest, ss grpc.ServerStreamingServer[workload.WITSVIDResponse]) error {
	if w.server.cfg.WIT == nil {
		return ErrDisabled
	}
	var id spiffeid.ID
	if req.GetSpiffeId() != "" {
		var err error
		if id, err = spiffe.ParseWorkloadID(req.GetSpiffeId()); err != nil {
			return badArgument("spiffe_id: %v", err)
		}
	}
	return w.server.Follow(ss.Context(), Stream{
		Method: workload.SpiffeWorkloadAPI_FetchWITSVID_FullMethodName,
		WIT:    w.server.cfg.WIT,
		Render: func(u Update) (Message, error) {
			resp := &workload.WITSVIDResponse{}
			for _, i := range distinctHints(u.Identities, func(i Identity) string { return i.Hint }) {
				switch {
				case !id.IsZero() && i.ID != id:
					continue
				case i.WIT == nil || i.WIT.Token == "" || i.WIT.Key == "":
					return Message{}, fmt.Errorf("the WIT-SVID or the key of %q is missing", i.ID)
				}
				resp.Svids = append(resp.Svids, &workload.WITSVID{SpiffeId: i.ID.String(), WitSvid: i.WIT.Token, WitSvidKey: i.WIT.Key, Hint: i.Hint})
			}
			switch {
			case len(resp.Svids) == 0 && u.Pending:
				return Message{}, errNothingYet // it may be the one asked for
			case len(resp.Svids) == 0:
				return Message{}, ErrNoIdentity
			}
			return Show(resp, ss)
		},
	})
}

// FetchWITBundles streams the WIT bundles of our own trust domain and of those that the caller's identities federate with,
// as JWK Sets. [Workload API §7.2.2]
func (w *workloadService) FetchWITBundles(_ *workload.WITBundlesRequest, ss grpc.ServerStreamingServer[workload.WITBundlesResponse]) error {
	if w.server.cfg.WIT == nil {
		return ErrDisabled
	}
	return w.server.Follow(ss.Context(), Stream{
		Method:      workload.SpiffeWorkloadAPI_FetchWITBundles_FullMethodName,
		BundlesOnly: true,
		Spread:      true,
		Render: func(u Update) (Message, error) {
			resp := &workload.WITBundlesResponse{Bundles: map[string]string{}}
			for td := range allowedDomains(u, u.Identities) {
				keys := u.WITBundles[td]
				if len(keys) == 0 && td != u.TrustDomain {
					continue // it does not support WIT-SVIDs (WIT-51)
				}
				jwks, err := spiffe.MarshalWITJWKS(withKeyID(keys))
				switch {
				case err == nil:
					resp.Bundles[td.IDString()] = string(jwks)
				case td == u.TrustDomain:
					return Message{}, fmt.Errorf("the WIT bundle of our own trust domain %q: %w", td.Name(), err)
				default:
					w.server.log.LogAttrs(ss.Context(), slog.LevelWarn, "WIT bundle of a foreign trust domain left out",
						slog.String("trust_domain", td.Name()), slog.Any("err", err))
				}
			}
			return Show(resp, ss)
		},
	})
}
