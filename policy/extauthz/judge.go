package extauthz

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/spiffe"
)

// point is what judgements name this enforcement point.
const point = "ext_authz"

// A verdict is a decision that nobody has been told of yet.
type verdict struct {
	request  policy.Request
	decision policy.Decision
	err      error // why there was nothing to decide
	token    error // why there is no token although a rule asks for one
	user     error // the same for a user's token
}

// judge decides the call that a check is about. It tells nobody.
func (s *Service) judge(k *known, req *authv3.CheckRequest) (v verdict) {
	now := s.config.Now()
	policies := k.at(now, s.config.MaxOffline, s.config.MaxRevocationStaleness)
	r := &v.request
	attributes := req.GetAttributes()
	refuse := func(reason policy.Reason, err error) verdict {
		v.decision = policy.Decision{Outcome: policy.Outcome{Reason: reason}}
		v.decision.Epoch, v.decision.Revision = policies.Revision()
		v.err = err
		return v
	}
	unread := read(req, r)
	var err error
	if r.Service, err = k.service(attributes.GetDestination().GetPrincipal()); err != nil {
		return refuse(policy.ReasonForeignService, err)
	}
	switch err := unread; {
	case errors.Is(err, errBadPath), errors.Is(err, errContradiction):
		return refuse(policy.ReasonPath, err)
	case err != nil:
		return refuse(policy.ReasonInvalidPeer, err)
	}
	if text := attributes.GetSource().GetCertificate(); text != "" {
		if r.Certificate, err = s.certificates.check(text, r.Peer, now); err != nil {
			return refuse(policy.ReasonInvalidSVID, err)
		}
	} else if !s.config.AllowMissingCertificate {
		return refuse(policy.ReasonInvalidSVID, errNoCertificate)
	}
	if r.Protocol == policy.ProtocolHTTP {
		if audiences := policies.Audiences(r.Service, r.Peer); len(audiences) > 0 {
			r.Token, v.token = s.bearer(k, policies.Revocations(), r.Headers.Values("authorization"), audiences, now)
		}
		r.User, v.user = policies.User(r, now)
	}
	v.decision = policies.Decide(r)
	return v
}

// bearer validates the token of a request.
func (s *Service) bearer(k *known, revocations *policy.Revocations, authorization, audiences []string, now time.Time) (*policy.Token, error) {
	switch len(authorization) {
	case 0:
		return nil, errors.New("none")
	case 1:
	default:
		return nil, fmt.Errorf("%d Authorization headers", len(authorization))
	}
	kind, token, _ := strings.Cut(authorization[0], " ")
	if !strings.EqualFold(kind, "Bearer") {
		return nil, errors.New("the Authorization header is not of the kind Bearer")
	}
	svid, err := spiffe.ValidateJWTSVID(token, k.bundles, audiences, spiffe.JWTOptions{Now: now, Leeway: s.config.JWTLeeway, AllowUnknownHeaders: s.config.AllowUnknownJWTHeaders})
	if err != nil {
		return nil, err
	}
	if name, found := revocations.JWTSVID(svid.ID, svid.JTI, svid.IssuedAt); found {
		return nil, fmt.Errorf("the JWT-SVID is revoked by %q", name)
	}
	return &policy.Token{ID: svid.ID, Audience: svid.Audience, Claims: svid.Claims}, nil
}

// call is what of the call may be written down, with the reason why a token did not count.
func (v *verdict) call() policy.Call {
	call := policy.CallOf(&v.request)
	switch {
	case v.token != nil:
		call = call.WithToken(v.token)
	case v.user != nil:
		call = call.WithToken(fmt.Errorf("user token: %w", v.user))
	}
	return call
}

// tell gives a verdict its id, hands it to whoever wants to know, and returns the answer for the Envoy.
func (s *Service) tell(ctx context.Context, v *verdict) *authv3.CheckResponse {
	d := v.decision
	if d.Allowed && s.config.Observer == nil && s.config.OnDecision == nil && !d.ShadowDiffers() && !s.config.Log.Enabled(ctx, slog.LevelDebug) {
		return allowed(&v.request)
	}
	j := policy.Judgement{ID: rand.Text(), Time: s.config.Now(), Service: v.request.Service, Peer: v.request.Peer, Decision: d, Point: point, Call: v.call()}
	if s.config.Observer != nil {
		s.config.Observer.Observe(j)
	}
	if s.config.OnDecision != nil {
		s.config.OnDecision(j)
	}
	s.log.note(ctx, j, v)
	if d.Allowed {
		return allowed(&v.request)
	}
	return denied(&v.request, j)
}

// A decisionLog writes decisions down as the other enforcement points do, but not more of them than an operator can read:
// callers repeat themselves, and this log is that of the whole node.
type decisionLog struct {
	log   *slog.Logger
	limit *rate.Limiter

	mu      sync.Mutex
	skipped int
}

func newDecisionLog(log *slog.Logger) *decisionLog {
	return &decisionLog{log: log, limit: rate.NewLimiter(10, 100)}
}

func (l *decisionLog) note(ctx context.Context, j policy.Judgement, v *verdict) {
	level, message := slog.LevelDebug, "call allowed"
	switch {
	case !j.Decision.Allowed:
		level, message = slog.LevelInfo, "call denied"
	case j.Decision.ShadowDiffers():
		level, message = slog.LevelInfo, "call allowed, would be denied"
	}
	if !l.log.Enabled(ctx, level) {
		return
	}
	skipped := 0
	if level > slog.LevelDebug {
		l.mu.Lock()
		if !l.limit.Allow() {
			l.skipped++
			l.mu.Unlock()
			return
		}
		skipped, l.skipped = l.skipped, 0
		l.mu.Unlock()
	}
	attrs := []slog.Attr{slog.String("decision_id", j.ID), slog.String("spiffe_id", shown(j.Peer)), slog.String("service", shown(j.Service)),
		slog.Any("decision", j.Decision), slog.String("point", point)}
	if v.request.Protocol == policy.ProtocolHTTP {
		attrs = append(attrs, slog.String("method", excerpt(v.request.Method)), slog.String("path", excerpt(v.request.Path)))
	}
	if v.err != nil {
		attrs = append(attrs, slog.Any("err", v.err))
	}
	if v.token != nil {
		attrs = append(attrs, slog.String("token", v.token.Error()))
	}
	if v.user != nil {
		attrs = append(attrs, slog.String("user_token", v.user.Error()))
	}
	if skipped > 0 {
		attrs = append(attrs, slog.Int("not_logged", skipped))
	}
	l.log.LogAttrs(ctx, level, message, attrs...)
}

func shown(id spiffeid.ID) string {
	if id.IsZero() {
		return ""
	}
	return id.String()
}
