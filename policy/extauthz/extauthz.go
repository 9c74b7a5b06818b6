// Package extauthz is Envoy's external authorization, version 3, on the agent's socket: an Envoy asks about each call that
// it is about to let through, and the call policies of the Envoy's own SPIFFE IDs answer.
//
// Who asks is attested as every caller of the socket is, anew for each call. The service that is judged is what the asking
// process is attested as; what its message says of the destination only chooses among several IDs of that process. Of the
// message the Envoy is believed who its peer is, since it has verified it, and what the peer asked for. Nothing else in it
// carries identity: no header, no context extension, no metadata.
package extauthz

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/workloadapi"
	"github.com/signet-id/signet/workloadapi/peer"
)

// CheckMethod is the full gRPC method that Envoy calls.
const CheckMethod = authv3.Authorization_Check_FullMethodName

// Config says how calls are decided. Source has no default.
type Config struct {
	// Source knows the identities and the policies of the Envoys. The agent's SVID cache is one.
	Source workloadapi.Source

	// MaxOffline is for how long policies count after the contact to the CA was lost. Zero means 24 hours.
	MaxOffline time.Duration

	// MaxRevocationStaleness is for how long calls go on by the revocations that are known, after the contact to the CA was lost.
	// Zero means that MaxOffline alone counts.
	MaxRevocationStaleness time.Duration

	// AllowMissingCertificate decides calls whose check comes without the peer's certificate, which an Envoy sends if its
	// filter says include_peer_certificate. Nobody sees then that the X509-SVID has expired while its connection was open,
	// or that its serial number or its authority is revoked.
	AllowMissingCertificate bool

	// JWTLeeway and AllowUnknownJWTHeaders are as in workloadapi.Config.
	JWTLeeway              time.Duration
	AllowUnknownJWTHeaders bool

	// Observer, if not nil, is told of every decision.
	Observer policy.Observer

	// OnDecision, if not nil, is called with each decision, for counting. It must not block.
	OnDecision func(policy.Judgement)

	// Log gets denials and what shadow policies would deny, as many as an operator can read. Nil means nowhere.
	Log *slog.Logger

	// Now is the clock for the validity of SVIDs and policies. Nil means time.Now.
	Now func() time.Time
}

const defaultMaxOffline = 24 * time.Hour

// A Service is envoy.service.auth.v3.Authorization.
type Service struct {
	authv3.UnimplementedAuthorizationServer
	config       Config
	server       *workloadapi.Server
	envoys       *envoys
	certificates certificates
	log          *decisionLog
}

// New returns a Service. Register puts it on a Workload Endpoint; Close ends what it keeps of its callers.
func New(c Config) (*Service, error) {
	if c.Source == nil {
		return nil, errors.New("extauthz: config field Source is nil; use the agent's SVID cache")
	}
	if c.MaxOffline < 0 || c.MaxRevocationStaleness < 0 {
		return nil, fmt.Errorf("extauthz: config fields MaxOffline %v and MaxRevocationStaleness %v must not be negative", c.MaxOffline, c.MaxRevocationStaleness)
	}
	if c.MaxOffline == 0 {
		c.MaxOffline = defaultMaxOffline
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Service{config: c, envoys: newEnvoys(c), log: newDecisionLog(c.Log)}, nil
}

// Register is for workloadapi.Config.Services.
func (s *Service) Register(r grpc.ServiceRegistrar, server *workloadapi.Server) {
	s.server = server
	authv3.RegisterAuthorizationServer(r, s)
}

// Close lets go of the callers and waits until that is done. It comes after the endpoint has ended.
func (s *Service) Close() { s.envoys.close() }

// Check answers whether a call may go through. An error means that it could not be found out, and Envoy then denies unless
// it was configured to let calls through (failure_mode_allow).
func (s *Service) Check(ctx context.Context, req *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	process, err := peer.FromContext(ctx)
	if err != nil {
		return nil, err
	}
	var v verdict
	err = s.server.Answer(ctx, func(caller workloadapi.Caller) error {
		known, err := s.envoys.of(ctx, process, caller)
		if err != nil {
			return err
		}
		v = s.judge(known, req)
		return nil
	})
	if err != nil {
		return nil, err
	}
	// Only now: an Envoy that has become another program meanwhile is judged anew, and one call is one decision.
	return s.tell(ctx, &v), nil
}
