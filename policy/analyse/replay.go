package analyse

import (
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

// Bounds at which what enforcement points record of a call is cut, in bytes.
const (
	recordedMethod = 64
	recordedPath   = 256
)

// A Replayed is one recorded decision, decided again.
type Replayed struct {
	Peer    string `json:"from"`
	Service string `json:"to"`
	Call    string `json:"call"`
	Count   uint64 `json:"count"`
	Before  string `json:"before"`
	// After is allow or deny, or empty if the record does not say enough; Why says what is missing.
	After Verdict     `json:"after,omitempty"`
	Why   string      `json:"why,omitempty"`
	Rule  policy.Rule `json:"rule,omitzero"`
	// Assumes says what the answer takes for granted that is not in the record.
	Assumes string `json:"assumes,omitempty"`
}

// Changed reports whether the answer is another one.
func (r Replayed) Changed() bool { return r.After != "" && string(r.After) != r.Before }

// A Replay decides recorded decisions by other policies.
type Replay struct{ judge *judge }

// NewReplay prepares a set for that.
func NewReplay(set *policyv1.PolicySet) (*Replay, error) {
	j, err := newJudge(set, conditionsOf(set))
	return &Replay{j}, err
}

// Decide decides one record. What cannot be told from it is said to be so, never guessed.
func (p *Replay) Decide(o *policyv1.Observation) Replayed {
	out := Replayed{Peer: o.GetPeer(), Service: o.GetService(), Call: callText(o), Count: max(o.GetCount(), 1), Before: string(VerdictDeny)}
	if o.GetAllowed() {
		out.Before = string(VerdictAllow)
	}
	switch o.GetReason() {
	case "revoked", "invalid_svid", "invalid_peer", "unknown_policy", "stale_policy":
		out.Why = "it was not a policy that decided: " + o.GetReason()
		return out
	}
	r, why := request(o)
	if why != "" {
		out.Why = why
		return out
	}
	verdict, answers, outcome := p.judge.judge(r)
	out.Rule = outcome.Rule
	if verdict == VerdictConditional {
		out.Why = "it depends on a token, a header or a claim, which are not recorded"
		return out
	}
	out.After = verdict
	odd := *r
	if r.Protocol == policy.ProtocolHTTP && !odd.HasMethodOverride {
		odd.HasMethodOverride = true
		if _, other, _ := p.judge.judge(&odd); other != answers {
			out.Assumes = "no header that overrides the method"
		}
	}
	if r.Method == "POST" && len(r.ContentTypes) == 0 && r.Protocol == policy.ProtocolHTTP {
		odd = *r
		odd.ContentTypes = []string{"application/grpc;x"}
		if _, other, _ := p.judge.judge(&odd); other != answers {
			out.Assumes = strings.TrimPrefix(out.Assumes+"; a content type that is not like gRPC's", "; ")
		}
	}
	return out
}

func callText(o *policyv1.Observation) string {
	switch o.GetProtocol() {
	case policyv1.CallProtocol_CALL_PROTOCOL_TLS:
		return "TLS"
	case policyv1.CallProtocol_CALL_PROTOCOL_GRPC:
		return "gRPC " + strings.TrimPrefix(o.GetPath(), "/")
	}
	return o.GetMethod() + " " + o.GetPath()
}

// request is the call of a record, or why it cannot be told.
func request(o *policyv1.Observation) (*policy.Request, string) {
	r := &policy.Request{Method: o.GetMethod(), Path: o.GetPath(), HasMethodOverride: o.GetReason() == "method_override"}
	var err error
	if r.Service, err = spiffeid.FromString(o.GetService()); err != nil {
		return nil, "its service is not a SPIFFE ID"
	}
	if r.Peer, err = spiffeid.FromString(o.GetPeer()); err != nil {
		return nil, "its caller is not a SPIFFE ID"
	}
	switch o.GetProtocol() {
	case policyv1.CallProtocol_CALL_PROTOCOL_TLS:
		return r, ""
	case policyv1.CallProtocol_CALL_PROTOCOL_HTTP:
	case policyv1.CallProtocol_CALL_PROTOCOL_GRPC:
		r.ContentTypes = []string{"application/grpc"}
	default:
		return nil, fmt.Sprintf("its protocol %d is not known", o.GetProtocol())
	}
	r.Protocol = policy.ProtocolHTTP
	switch {
	case len(o.GetPath()) >= recordedPath:
		return nil, "its path was cut when it was recorded"
	case len(o.GetMethod()) >= recordedMethod:
		return nil, "its method was cut when it was recorded"
	case strings.Contains(o.GetPath(), "?"):
		return nil, "its path has a query, which no record has"
	}
	return r, ""
}
