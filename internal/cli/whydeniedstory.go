package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/analyse"
	"github.com/signet-id/signet/spiffe"
)

// A deniedStory is all that can be told of a decision. It is what -o json prints.
type deniedStory struct {
	DecisionID string `json:"decision_id,omitempty"`
	// Verdict is denied, or allowed; WouldBe is what enforcing all that only reports would make of it, if that differs.
	Verdict string `json:"verdict"`
	WouldBe string `json:"would_be,omitempty"`
	Peer    string `json:"peer"`
	Service string `json:"service"`
	Call    string `json:"call"`
	Method  string `json:"method,omitempty"`
	Path    string `json:"path,omitempty"`
	First   string `json:"first"`
	Last    string `json:"last"`
	Count   uint64 `json:"count"`
	// AgentID is the agent of the node, Point the kind of enforcement point there.
	AgentID string `json:"agent_id,omitempty"`
	Point   string `json:"point,omitempty"`

	Epoch    string `json:"epoch,omitempty"`
	Revision int64  `json:"revision"`
	Reason   string `json:"reason"`
	// Because is the reason in words.
	Because     string       `json:"because"`
	Rule        *policy.Rule `json:"rule,omitempty"`
	WouldReason string       `json:"would_be_reason,omitempty"`
	WouldRule   *policy.Rule `json:"would_be_rule,omitempty"`
	Token       string       `json:"token,omitempty"`
	Rollout     string       `json:"rollout,omitempty"`
	// FormerlyAllowed says that the call was allowed before the roll-out.
	FormerlyAllowed bool             `json:"formerly_allowed,omitempty"`
	Revocation      *revocationStory `json:"revocation,omitempty"`
	Now             *deniedNow       `json:"now,omitempty"`
	NotNow          string           `json:"now_unknown,omitempty"`
	Nearest         *analyse.Remedy  `json:"nearest,omitempty"`
	AskedBy         string           `json:"told_by"`
}

// deniedNow is what would be decided by the policies in force now.
type deniedNow struct {
	Allowed  bool   `json:"allowed"`
	Because  string `json:"because"`
	Revision int64  `json:"revision"`
	// Changed says whether the deciding policy has changed since; absent: that is not known.
	Changed    *bool               `json:"policy_changed,omitempty"`
	Considered []policy.Considered `json:"considered,omitempty"`
	// Unless says what of the call was not kept and might change the answer.
	Unless string `json:"unless,omitempty"`
}

// revocationStory is who revoked the caller.
type revocationStory struct {
	Name    string `json:"name"`
	Present *bool  `json:"in_force,omitempty"`
	Target  string `json:"target,omitempty"`
	Reason  string `json:"reason,omitempty"`
	Expires string `json:"expires,omitempty"`
	By      string `json:"by,omitempty"`
	At      string `json:"at,omitempty"`
}

// tellDenied puts together what is known of one decision.
func (a *app) tellDenied(ctx context.Context, o *policyv1.Observation, found *denials) *deniedStory {
	first, last := moments(o.GetFirst(), o.GetLast())
	s := &deniedStory{
		DecisionID: o.GetDecisionId(), Verdict: verdictWord(o.GetAllowed()), Peer: o.GetPeer(), Service: o.GetService(), Method: o.GetMethod(), Path: o.GetPath(),
		First: first.Format(time.RFC3339Nano), Last: last.Format(time.RFC3339Nano), Count: o.GetCount(), AgentID: o.GetAgentId(), Point: o.GetPoint(),
		Epoch: o.GetEpoch(), Revision: o.GetRevision(), Reason: o.GetReason(), Rule: ruleOfRef(o.GetRule()), Token: o.GetToken(),
		Rollout: o.GetRollout(), FormerlyAllowed: o.GetFormerlyAllowed(), AskedBy: found.by,
	}
	request, unless, err := requestOf(o)
	var explained *policy.Explanation
	var policies *policy.Policies
	switch {
	case err != nil:
		s.NotNow = err.Error()
	case found.policies == nil:
		s.NotNow = "the policies of the service are not known to " + found.by
	default:
		if policies, err = policy.Compile(found.policies); err != nil {
			s.NotNow = fmt.Sprintf("the policies in force cannot be read: %v", err)
			break
		}
		e := policies.Explain(request)
		explained = &e
	}
	s.Call = callWords(o)
	fault := ""
	if explained != nil {
		fault = explained.PathFault
	}
	s.Because = becauseOf(o.GetAllowed(), o.GetReason(), o.GetRule(), fault)
	if o.GetShadowReason() != "" && o.GetShadowAllowed() != o.GetAllowed() {
		s.WouldBe, s.WouldRule = verdictWord(o.GetShadowAllowed()), ruleOfRef(o.GetShadowRule())
		s.WouldReason = becauseOf(o.GetShadowAllowed(), o.GetShadowReason(), o.GetShadowRule(), fault)
	}
	if name := o.GetRevocation(); name != "" {
		s.Revocation = a.tellRevocation(ctx, found.ca, name)
		s.Because = fmt.Sprintf("the caller's SVID is revoked by %q", name)
	}
	if explained == nil {
		return s
	}
	s.Now = &deniedNow{Allowed: explained.Decision.Allowed, Because: explained.Decision.Outcome.Because(fault), Revision: explained.Decision.Revision,
		Considered: explained.Considered, Unless: unless}
	s.Now.Changed = changedSince(found.policies, o)
	if r := s.Revocation; r != nil && (r.Present == nil || *r.Present) {
		s.Now.Allowed, s.Now.Because = false, fmt.Sprintf("as long as the revocation %q is in force, no policy lets the caller in", r.Name)
		return s
	}
	if !s.Now.Allowed {
		remedy := analyse.Nearest(policies, request)
		s.Nearest = &remedy
	}
	return s
}

// changedSince says whether the deciding policy, or where no rule decided one of the service's, has changed since. Nil: that is
// not known, since what is deleted leaves no trace here.
func changedSince(now *policyv1.PolicySet, o *policyv1.Observation) *bool {
	if now.GetEpoch() != o.GetEpoch() {
		return nil
	}
	changed, found := false, false
	for _, p := range now.GetPolicies() {
		if name := o.GetRule().GetPolicy(); name == "" || name == p.GetName() {
			found = true
			changed = changed || p.GetRevision() > o.GetRevision()
		}
	}
	switch {
	case !found && o.GetRule().GetPolicy() != "":
		changed = true // it is gone
	case !changed && o.GetRule().GetPolicy() == "":
		return nil
	}
	return &changed
}

func verdictWord(allowed bool) string {
	if allowed {
		return "allowed"
	}
	return "denied"
}

func ruleOfRef(r *policyv1.RuleRef) *policy.Rule {
	if r.GetPolicy() == "" {
		return nil
	}
	return &policy.Rule{Policy: r.GetPolicy(), Index: int(r.GetIndex()), File: r.GetFile(), Line: r.GetLine()}
}

// becauseOf is an outcome in words. A reason that is newer than this program stays as it is.
func becauseOf(allowed bool, reason string, rule *policyv1.RuleRef, fault string) string {
	r, known := policy.ParseReason(reason)
	if !known {
		return fmt.Sprintf("%q", reason)
	}
	o := policy.Outcome{Allowed: allowed, Reason: r}
	if at := ruleOfRef(rule); at != nil {
		o.Rule = *at
	}
	if r == policy.ReasonPath && fault == "" {
		fault = "it can be understood in different ways"
	}
	return o.Because(fault)
}

// requestOf makes a call of what was kept of it. unless says what was not.
func requestOf(o *policyv1.Observation) (r *policy.Request, unless string, err error) {
	r = &policy.Request{}
	if r.Service, err = spiffe.ParseWorkloadID(o.GetService()); err != nil {
		return nil, "", fmt.Errorf("the service is no SPIFFE ID: %w", err)
	}
	if r.Peer, err = spiffe.ParseWorkloadID(o.GetPeer()); err != nil {
		return nil, "", errors.New("the caller has no SPIFFE ID by which policies could decide")
	}
	switch o.GetProtocol() {
	case policyv1.CallProtocol_CALL_PROTOCOL_TLS:
		return r, "", nil
	case policyv1.CallProtocol_CALL_PROTOCOL_GRPC:
		r.ContentTypes = []string{"application/grpc"}
	case policyv1.CallProtocol_CALL_PROTOCOL_HTTP:
	default:
		return nil, "", errors.New("this program does not know the protocol of the call")
	}
	r.Protocol, r.Method, r.Path = policy.ProtocolHTTP, o.GetMethod(), o.GetPath()
	const kept = 256 // bytes of a path
	switch {
	case r.Path == "" && o.GetReason() != policy.ReasonInvalidSVID.String():
		return nil, "", errors.New("the path of the request was not kept: the agent's configuration says so (observations.paths), or there were too many different ones")
	case len(r.Path) >= kept:
		unless = "its path was longer than what is kept of it"
	default:
		unless = "a rule asks for headers or tokens, of which none are kept"
	}
	return r, unless, nil
}

func callWords(o *policyv1.Observation) string {
	path := o.GetPath()
	if path == "" {
		path = "(path not kept)"
	}
	switch o.GetProtocol() {
	case policyv1.CallProtocol_CALL_PROTOCOL_TLS:
		return "TLS connection"
	case policyv1.CallProtocol_CALL_PROTOCOL_GRPC:
		return "gRPC " + path
	}
	return "HTTP " + o.GetMethod() + " " + path
}

// tellRevocation says who revoked, why and until when, as far as the CA tells. Without the CA only the name is known.
func (a *app) tellRevocation(ctx context.Context, c *caConn, item string) *revocationStory {
	name, _, _ := strings.Cut(item, "/") // what a document is compiled into has a number behind its name
	s := &revocationStory{Name: name}
	if c == nil {
		return s
	}
	admin := adminv1.NewAdminClient(c)
	answer, err := admin.GetResources(ctx, &adminv1.GetResourcesRequest{Kind: registry.KindRevocation, Name: name})
	if err == nil || status.Code(err) == codes.NotFound {
		present := len(answer.GetResources()) > 0
		s.Present = &present
	}
	stream, err := admin.SearchAudit(ctx, &adminv1.SearchAuditRequest{Events: []string{"resource."}, Text: registry.KindRevocation + "/" + name})
	if err != nil {
		return s
	}
	for {
		record, err := stream.Recv()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				a.note("the CA's audit log does not say who revoked: %v", err)
			}
			return s
		}
		var line struct {
			Time                  time.Time
			Event, Actor, Outcome string
			Details               struct{ Target, Reason, Expires string }
		}
		if json.Unmarshal(record.GetJson(), &line) != nil || line.Outcome != auditlog.Done || line.Event == "resource.delete" {
			continue
		}
		s.By, s.At, s.Target, s.Reason, s.Expires = line.Actor, stamp(line.Time), line.Details.Target, line.Details.Reason, line.Details.Expires
	}
}
