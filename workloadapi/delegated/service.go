package delegated

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"

	"github.com/signet-id/signet/workloadapi"
)

// anyID: each ID may be handed to a delegate; what is privileged is left out all the same.
func anyID(spiffeid.ID) bool { return true }

// SubscribeToX509SVIDs streams the X509-SVIDs of a workload with their keys. For one that has none, or none yet, or none any
// more, the message is empty.
func (s *Service) SubscribeToX509SVIDs(req *delegatedv1.SubscribeToX509SVIDsRequest, ss grpc.ServerStreamingServer[delegatedv1.SubscribeToX509SVIDsResponse]) error {
	const method = delegatedv1.DelegatedIdentity_SubscribeToX509SVIDs_FullMethodName
	return s.call(ss.Context(), method, func(ctx context.Context, d *delegate) error {
		workload, err := s.subject(d, req.GetSelectors(), req.GetPid())
		if err != nil {
			return err
		}
		defer workload.close()
		return gone(s.svids.Follow(ctx, workload, workloadapi.Stream{
			Method: method, BundlesOnly: true,
			Narrow: func(u workloadapi.Update) workloadapi.Update { return workloadapi.ForSpeaker(u, anyID) },
			Render: func(u workloadapi.Update) (workloadapi.Message, error) {
				resp, ids, err := x509SVIDs(u)
				if err != nil {
					return workloadapi.Message{}, err
				}
				m, err := workloadapi.Show(resp, ss)
				send := m.Send
				m.Send = func() error {
					if len(ids) > 0 {
						s.record(d, workload, "X509-SVIDs", ids) // before it leaves
					}
					return send()
				}
				return m, err
			},
		}))
	})
}

func x509SVIDs(u workloadapi.Update) (resp *delegatedv1.SubscribeToX509SVIDsResponse, ids []string, err error) {
	identities, federated, err := workloadapi.X509SVIDs(u)
	if err != nil {
		return nil, nil, err
	}
	resp = &delegatedv1.SubscribeToX509SVIDsResponse{}
	for td := range federated {
		resp.FederatesWith = append(resp.FederatesWith, td)
	}
	slices.Sort(resp.FederatesWith)
	for _, i := range identities {
		certs, err := x509.ParseCertificates(i.Chain)
		if err != nil {
			return nil, nil, fmt.Errorf("the X509-SVID of %q: %w", i.ID, err)
		}
		svid := &types.X509SVID{Id: idOf(i.ID), ExpiresAt: i.NotAfter.Unix(), Hint: i.Hint}
		for _, c := range certs {
			svid.CertChain = append(svid.CertChain, c.Raw)
		}
		resp.X509Svids = append(resp.X509Svids, &delegatedv1.X509SVIDWithKey{X509Svid: svid, X509SvidKey: i.Key})
		ids = append(ids, i.ID.String())
	}
	return resp, ids, nil
}

func idOf(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

// FetchJWTSVIDs returns a JWT-SVID for each identity of a workload.
func (s *Service) FetchJWTSVIDs(ctx context.Context, req *delegatedv1.FetchJWTSVIDsRequest) (*delegatedv1.FetchJWTSVIDsResponse, error) {
	var resp *delegatedv1.FetchJWTSVIDsResponse
	err := s.call(ctx, delegatedv1.DelegatedIdentity_FetchJWTSVIDs_FullMethodName, func(ctx context.Context, d *delegate) error {
		if err := workloadapi.CheckAudience(req.GetAudience()); err != nil {
			return err
		}
		workload, err := s.subject(d, req.GetSelectors(), req.GetPid())
		if err != nil {
			return err
		}
		defer workload.close()
		var ids []string
		err = s.svids.Answer(ctx, workload, func(c workloadapi.Caller) error {
			svids, err := s.cfg.Source.FetchJWTSVIDs(ctx, c, spiffeid.ID{}, req.GetAudience())
			if err != nil {
				return fmt.Errorf("JWT-SVIDs for a delegate: %w", err)
			}
			resp, ids, err = jwtSVIDs(workloadapi.DistinctJWTSVIDs(workloadapi.JWTForSpeaker(svids, anyID)), req.GetAudience())
			return err
		})
		if err != nil {
			return gone(err)
		}
		s.record(d, workload, "JWT-SVIDs", ids)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

func jwtSVIDs(svids []workloadapi.JWTSVID, audience []string) (resp *delegatedv1.FetchJWTSVIDsResponse, ids []string, err error) {
	if len(svids) == 0 {
		return nil, nil, workloadapi.ErrNoIdentity
	}
	resp = &delegatedv1.FetchJWTSVIDsResponse{}
	for _, svid := range svids {
		// The CA has issued it and the cache has checked it; what is wanted are its times.
		parsed, err := jwtsvid.ParseInsecure(svid.Token, audience)
		if err != nil {
			return nil, nil, fmt.Errorf("the JWT-SVID of %q is unusable: %w", svid.ID, err)
		}
		out := &types.JWTSVID{Token: svid.Token, Id: idOf(svid.ID), ExpiresAt: parsed.Expiry.Unix(), Hint: svid.Hint}
		if iat, ok := parsed.Claims["iat"].(float64); ok {
			out.IssuedAt = int64(iat)
		}
		resp.Svids = append(resp.Svids, out)
		ids = append(ids, svid.ID.String())
	}
	return resp, ids, nil
}

// SubscribeToX509Bundles streams the X.509 bundles that the node holds.
func (s *Service) SubscribeToX509Bundles(_ *delegatedv1.SubscribeToX509BundlesRequest, ss grpc.ServerStreamingServer[delegatedv1.SubscribeToX509BundlesResponse]) error {
	return s.followBundles(ss.Context(), delegatedv1.DelegatedIdentity_SubscribeToX509Bundles_FullMethodName, func(u workloadapi.Update) (workloadapi.Message, error) {
		bundles, err := workloadapi.X509Bundles(u)
		if err != nil {
			return workloadapi.Message{}, err
		}
		return workloadapi.Show(&delegatedv1.SubscribeToX509BundlesResponse{CaCertificates: bundles}, ss)
	})
}

// SubscribeToJWTBundles streams the JWT bundles that the node holds, as JWK Sets.
func (s *Service) SubscribeToJWTBundles(_ *delegatedv1.SubscribeToJWTBundlesRequest, ss grpc.ServerStreamingServer[delegatedv1.SubscribeToJWTBundlesResponse]) error {
	return s.followBundles(ss.Context(), delegatedv1.DelegatedIdentity_SubscribeToJWTBundles_FullMethodName, func(u workloadapi.Update) (workloadapi.Message, error) {
		bundles, err := workloadapi.JWTBundles(u, func(td spiffeid.TrustDomain, err error) {
			s.cfg.Log.LogAttrs(ss.Context(), slog.LevelWarn, "JWT bundle of a foreign trust domain left out", slog.String("trust_domain", td.Name()), slog.Any("err", err))
		})
		if err != nil {
			return workloadapi.Message{}, err
		}
		return workloadapi.Show(&delegatedv1.SubscribeToJWTBundlesResponse{Bundles: bundles}, ss)
	})
}

// followBundles serves a stream with all bundles of the node, to the delegate for itself.
func (s *Service) followBundles(ctx context.Context, method string, render func(workloadapi.Update) (workloadapi.Message, error)) error {
	return s.call(ctx, method, func(ctx context.Context, d *delegate) error {
		all := &subject{Subject: described(d.caller), delegate: d}
		return s.bundles.Follow(ctx, all, workloadapi.Stream{
			Method: method, BundlesOnly: true,
			Render: func(u workloadapi.Update) (workloadapi.Message, error) {
				// Whatever is in the update: it is about the node and not about one workload's federation.
				of := workloadapi.Identity{}
				for td := range u.X509Bundles {
					of.FederatesWith = append(of.FederatesWith, td)
				}
				u.Identities = []workloadapi.Identity{of}
				return render(u)
			},
		})
	})
}

// record writes down what a delegate was given, and on behalf of whom. It is never left out.
func (s *Service) record(d *delegate, workload *subject, what string, ids []string) {
	s.cfg.Log.LogAttrs(context.Background(), slog.LevelInfo, what+" handed to a delegate", slog.String("delegate", d.id.String()),
		slog.Int64("delegate_pid", int64(d.caller.PID)), slog.String("spiffe_id", strings.Join(ids, " ")), slog.String("workload", workload.name))
}
