package workloadapi

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-id/signet/spiffe"
)

// FetchJWTSVID returns a JWT-SVID for each of the caller's identities or for the one asked for. [Workload API §6.2.1]
func (w *workloadService) FetchJWTSVID(ctx context.Context, req *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if w.server.cfg.DisableJWT {
		return nil, ErrDisabled
	}
	if err := CheckAudience(req.GetAudience()); err != nil {
		return nil, err
	}
	var id spiffeid.ID
	if req.GetSpiffeId() != "" {
		var err error
		if id, err = spiffe.ParseWorkloadID(req.GetSpiffeId()); err != nil {
			return nil, badArgument("spiffe_id: %v", err)
		}
	}
	var resp *workload.JWTSVIDResponse
	err := w.server.Answer(ctx, func(caller Caller) error {
		svids, err := w.server.cfg.Source.FetchJWTSVIDs(ctx, caller, id, req.GetAudience())
		if err != nil {
			return fmt.Errorf("JWT-SVIDs for the caller: %w", err)
		}
		if len(svids) == 0 {
			return ErrNoIdentity
		}
		resp = &workload.JWTSVIDResponse{}
		for _, svid := range DistinctJWTSVIDs(svids) {
			if svid.ID.IsZero() || svid.Token == "" || (!id.IsZero() && svid.ID != id) {
				return fmt.Errorf("the source returned an unusable JWT-SVID for %q", svid.ID)
			}
			resp.Svids = append(resp.Svids, &workload.JWTSVID{SpiffeId: svid.ID.String(), Svid: svid.Token, Hint: svid.Hint})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// FetchJWTBundles streams the JWT bundles of our own trust domain and of those that the caller's identities federate
// with, as plain JWK Sets without use and sequence. [Workload API §6.2.2]
func (w *workloadService) FetchJWTBundles(_ *workload.JWTBundlesRequest, ss grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	if w.server.cfg.DisableJWT {
		return ErrDisabled
	}
	return w.server.Follow(ss.Context(), Stream{
		Method:      workload.SpiffeWorkloadAPI_FetchJWTBundles_FullMethodName,
		BundlesOnly: true,
		Spread:      true,
		Render: func(u Update) (Message, error) {
			bundles, err := JWTBundles(u, func(td spiffeid.TrustDomain, err error) {
				w.server.log.LogAttrs(ss.Context(), slog.LevelWarn, "JWT bundle of a foreign trust domain left out",
					slog.String("trust_domain", td.Name()), slog.Any("err", err))
			})
			if err != nil {
				return Message{}, err
			}
			resp := &workload.JWTBundlesResponse{Bundles: bundles}
			return Show(resp, ss)
		},
	})
}

// ValidateJWTSVID says whether a token is valid for an audience, by the bundles that the caller may have.
// [Workload API §6.2.3]
func (w *workloadService) ValidateJWTSVID(ctx context.Context, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	if w.server.cfg.DisableJWT {
		return nil, ErrDisabled
	}
	if req.GetAudience() == "" {
		return nil, badArgument("audience is empty: name the audience that the caller is")
	}
	if req.GetSvid() == "" {
		return nil, badArgument("svid is empty: it must be a JWT-SVID in JWS compact serialization")
	}
	var resp *workload.ValidateJWTSVIDResponse
	err := w.server.Answer(ctx, func(caller Caller) error {
		u, err := w.server.Current(ctx, caller)
		if err != nil {
			return err
		}
		resp, err = w.server.validate(u, req.GetAudience(), req.GetSvid())
		return err
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

func (s *Server) validate(u Update, audience, token string) (*workload.ValidateJWTSVIDResponse, error) {
	bundles := jwtbundle.NewSet()
	for td := range allowedDomains(u, u.Identities) {
		if keys, ok := u.JWTBundles[td]; ok {
			bundles.Add(jwtbundle.FromJWTAuthorities(td, withKeyID(keys)))
		}
	}
	svid, err := spiffe.ValidateJWTSVID(token, bundles, []string{audience}, spiffe.JWTOptions{
		Now: s.cfg.Now(), Leeway: s.cfg.JWTLeeway, AllowUnknownHeaders: s.cfg.AllowUnknownJWTHeaders,
	})
	if err != nil {
		return nil, &ArgumentError{Text: fmt.Sprintf("svid: %v", err), Reason: ReasonTokenInvalid}
	}
	if name, found := u.Revocations.JWTSVID(svid.ID, svid.JTI, svid.IssuedAt); found {
		return nil, &ArgumentError{Text: fmt.Sprintf("svid: it is revoked by %q", name), Reason: ReasonTokenInvalid}
	}
	claims := svid.Claims
	if svid.ID.TrustDomain() != u.TrustDomain && !s.cfg.AllowForeignPrivateClaims {
		claims = registeredClaims(claims)
	}
	fields, err := claimsStruct(claims)
	if err != nil {
		return nil, &ArgumentError{Text: fmt.Sprintf("svid: %v", err), Reason: ReasonTokenInvalid}
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: svid.ID.String(), Claims: fields}, nil
}

// registeredClaims keeps the claims of RFC 7519 §4.1. What others mean in a foreign trust domain is that domain's affair,
// and a program that reads them as its own domain's would be misled.
func registeredClaims(claims map[string]any) map[string]any {
	kept := map[string]any{}
	for _, name := range []string{"iss", "sub", "aud", "exp", "nbf", "iat", "jti"} {
		if v, ok := claims[name]; ok {
			kept[name] = v
		}
	}
	return kept
}

func claimsStruct(claims map[string]any) (*structpb.Struct, error) {
	fields := make(map[string]*structpb.Value, len(claims))
	for name, v := range claims {
		value, err := claimValue(v)
		if err != nil {
			return nil, fmt.Errorf("claim %q: %w", name, err)
		}
		fields[name] = value
	}
	return &structpb.Struct{Fields: fields}, nil
}

// claimValue turns JSON into a protobuf value. Its numbers are float64, so whole numbers are exact up to 2^53.
func claimValue(v any) (*structpb.Value, error) {
	switch v := v.(type) {
	case json.Number:
		f, err := v.Float64()
		if err != nil {
			return nil, fmt.Errorf("number %q is out of range", v.String())
		}
		return structpb.NewNumberValue(f), nil
	case []any:
		list := &structpb.ListValue{Values: make([]*structpb.Value, len(v))}
		for i := range v {
			value, err := claimValue(v[i])
			if err != nil {
				return nil, err
			}
			list.Values[i] = value
		}
		return structpb.NewListValue(list), nil
	case map[string]any:
		fields, err := claimsStruct(v)
		if err != nil {
			return nil, err
		}
		return structpb.NewStructValue(fields), nil
	default:
		return structpb.NewValue(v) // null, bool, string; an error for anything that JSON does not have
	}
}
