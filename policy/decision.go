package policy

import (
	"log/slog"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A Reason is why a call was allowed or denied. Its text is stable: it goes into logs and metrics.
type Reason uint8

const (
	// ReasonNone is the zero Reason: nothing was decided.
	ReasonNone Reason = iota
	// ReasonAllowed: a rule allows the call.
	ReasonAllowed
	// ReasonDefaultShadow: no enforced policy names the service and PolicyDefaults is shadow.
	ReasonDefaultShadow
	// ReasonDenied: a rule denies the call.
	ReasonDenied
	// ReasonNoAllow: policies name the service, and no allow covers the call.
	ReasonNoAllow
	// ReasonNoPolicy: no enforced policy names the service.
	ReasonNoPolicy
	// ReasonToken: an allow would cover the call if it came with the JWT-SVID that the rule asks for.
	ReasonToken
	// ReasonPath: the path is one that programs could understand in different ways.
	ReasonPath
	// ReasonMethodOverride: a header overrides the method where a deny lists methods.
	ReasonMethodOverride
	// ReasonUnsupported: a policy or a deny needs a newer reader, or is malformed.
	ReasonUnsupported
	// ReasonUnknownPolicy: no policies have arrived yet.
	ReasonUnknownPolicy
	// ReasonStalePolicy: the policies are too old to be relied on.
	ReasonStalePolicy
	// ReasonForeignService: the service is not one of the trust domain of the policies.
	ReasonForeignService
	// ReasonInvalidPeer: the peer has no SPIFFE ID with a path.
	ReasonInvalidPeer
	// ReasonInvalidSVID: the peer's X509-SVID is missing, malformed or expired. Enforcement points give it.
	ReasonInvalidSVID
	// ReasonTooManyPatterns: so many patterns with "*" in different places fit the call that not all were looked at.
	ReasonTooManyPatterns
	// ReasonRevoked: the peer's SVID is revoked.
	ReasonRevoked
	// ReasonTooManyLinks: there are so many connections that no further one can be watched. Enforcement points give it.
	ReasonTooManyLinks
	// ReasonCondition: an allow would cover the call if its condition held.
	ReasonCondition
	// ReasonTooManyConditions: so many rules with a condition fit the call that not all were looked at.
	ReasonTooManyConditions
)

func (r Reason) String() string {
	switch r {
	case ReasonNone:
		return "none"
	case ReasonAllowed:
		return "allowed"
	case ReasonDefaultShadow:
		return "default_shadow"
	case ReasonDenied:
		return "denied"
	case ReasonNoAllow:
		return "no_allow"
	case ReasonNoPolicy:
		return "no_policy"
	case ReasonToken:
		return "token"
	case ReasonPath:
		return "path"
	case ReasonMethodOverride:
		return "method_override"
	case ReasonUnsupported:
		return "unsupported"
	case ReasonUnknownPolicy:
		return "unknown_policy"
	case ReasonStalePolicy:
		return "stale_policy"
	case ReasonForeignService:
		return "foreign_service"
	case ReasonInvalidPeer:
		return "invalid_peer"
	case ReasonInvalidSVID:
		return "invalid_svid"
	case ReasonTooManyPatterns:
		return "too_many_patterns"
	case ReasonRevoked:
		return "revoked"
	case ReasonTooManyLinks:
		return "too_many_links"
	case ReasonCondition:
		return "condition"
	case ReasonTooManyConditions:
		return "too_many_conditions"
	}
	return "unknown"
}

// MarshalText returns the text of String.
func (r Reason) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// Public returns what a refused caller may be told. It says what the caller can change about the request and nothing
// about the rules.
func (r Reason) Public() string {
	switch r {
	case ReasonPath:
		return "path_refused"
	case ReasonMethodOverride:
		return "method_override_refused"
	case ReasonInvalidPeer, ReasonInvalidSVID, ReasonRevoked:
		return "svid_refused"
	case ReasonUnknownPolicy, ReasonStalePolicy:
		return "policy_unavailable"
	}
	return "denied"
}

// A Rule names a rule of a policy, or the policy as a whole.
type Rule struct {
	// Policy is the name of the CallPolicy. Empty: no rule.
	Policy string `json:"policy,omitempty"`
	// Index counts the rules of the compiled policy from 0, allows before denies; -1 is the policy as a whole.
	Index int `json:"index"`
	// File and Line are where the operator wrote it.
	File string `json:"file,omitempty"`
	Line uint32 `json:"line,omitempty"`
}

// An Outcome is what was, or would be, decided.
type Outcome struct {
	Allowed bool   `json:"allowed"`
	Reason  Reason `json:"reason"`
	// Rule is the one that decided; its Policy is empty if none did.
	Rule Rule `json:"rule,omitzero"`
}

func outcomeOf(allowed bool, reason Reason, r *rule) Outcome {
	o := Outcome{Allowed: allowed, Reason: reason, Rule: Rule{Policy: r.policy.GetName(), Index: r.index, File: r.policy.GetFile(), Line: r.policy.GetLine()}}
	if r.spec.GetLine() != 0 {
		o.Rule.Line = r.spec.GetLine()
	}
	return o
}

// A Decision is the answer to one call. The zero Decision denies.
type Decision struct {
	Outcome
	// Shadow is what would be decided if everything that only reports were enforced: shadow policies, shadow rules, and
	// the denial that a PolicyDefaults in shadow mode holds back. Its Reason is ReasonNone if there is nothing of the
	// kind for the service.
	Shadow Outcome `json:"shadow,omitzero"`
	// Epoch and Revision name the policies that decided.
	Epoch    string `json:"epoch,omitempty"`
	Revision int64  `json:"revision,omitempty"`
	// Revocation is the name of the revocation that refused the call.
	Revocation string `json:"revocation,omitempty"`
	// FormerlyAllowed says of a denial that the call would be allowed if Rollout, a roll-out of policies that this service
	// is among the first to have, had not begun.
	FormerlyAllowed bool   `json:"formerly_allowed,omitempty"`
	Rollout         string `json:"rollout,omitempty"`
}

// ShadowDiffers reports whether enforcing what only reports would change the answer.
func (d Decision) ShadowDiffers() bool {
	return d.Shadow.Reason != ReasonNone && d.Shadow.Allowed != d.Allowed
}

// LogValue puts the decision into a log record as a group.
func (d Decision) LogValue() slog.Value {
	attrs := []slog.Attr{slog.Bool("allowed", d.Allowed), slog.String("reason", d.Reason.String()), slog.Int64("revision", d.Revision)}
	if d.Revocation != "" {
		attrs = append(attrs, slog.String("revocation", d.Revocation))
	}
	if d.FormerlyAllowed {
		attrs = append(attrs, slog.Bool("formerly_allowed", true), slog.String("rollout", d.Rollout))
	}
	if d.Rule.Policy != "" {
		attrs = append(attrs, slog.String("policy", d.Rule.Policy), slog.Int("rule", d.Rule.Index), slog.String("file", d.Rule.File), slog.Int64("line", int64(d.Rule.Line)))
	}
	if d.Shadow.Reason != ReasonNone {
		attrs = append(attrs, slog.Group("shadow", slog.Bool("allowed", d.Shadow.Allowed), slog.String("reason", d.Shadow.Reason.String()),
			slog.String("policy", d.Shadow.Rule.Policy), slog.Int64("line", int64(d.Shadow.Rule.Line))))
	}
	return slog.GroupValue(attrs...)
}

// A Judgement is one decision with its circumstances, as an enforcement point reports it to its OnDecision function.
type Judgement struct {
	// ID is the decision id: 128 random bits in base32.
	ID            string
	Time          time.Time
	Service, Peer spiffeid.ID
	Decision      Decision
	// Point is the kind of enforcement point that decided: tls, http, grpc, ext_authz or proxy.
	Point string
	// Call is what was asked for.
	Call Call
}

// A Call is what of a request may be written down: no query, no header, no claim but for what Token says.
type Call struct {
	Protocol Protocol
	// GRPC says that the request is a gRPC call.
	GRPC         bool
	Method, Path string
	// Token is why the JWT-SVID that a rule asks for did not count, if it did not. It may name the audience, the subject and
	// the times of the token.
	Token string
}

// WithToken returns a call with the reason why its JWT-SVID did not count.
func (c Call) WithToken(err error) Call {
	c.Token = clip(err.Error(), maxCallToken)
	return c
}

// CallOf returns what of a request may be written down.
func CallOf(r *Request) Call {
	s := newScan(r)
	return Call{Protocol: r.Protocol, GRPC: s.grpc, Method: clip(r.Method, maxCallMethod), Path: clip(s.path, maxCallPath)}
}

// What of a call is written down, in bytes.
const (
	maxCallMethod = 64
	maxCallPath   = 256
	maxCallToken  = 256
)

func clip(s string, most int) string {
	if len(s) > most {
		return s[:most]
	}
	return s
}

// An Observer is told of every decision. A source of policies that is one, such as a source.Source, is told by the
// enforcement points that use it.
type Observer interface {
	// Observe must not block.
	Observe(Judgement)
}

// A DeniedError is the refusal of a call, for the service's own eyes: its text names the rule. Tell the caller
// Reason.Public and the decision id only.
type DeniedError struct{ Judgement Judgement }

func (e *DeniedError) Error() string {
	j := e.Judgement
	text := "call of " + j.Peer.String() + " to " + j.Service.String() + " denied: " + j.Decision.Reason.String()
	if r := j.Decision.Rule; r.Policy != "" {
		text += " by " + strings.TrimSuffix(place(r), ":")
	}
	return text + " (decision " + j.ID + ")"
}
