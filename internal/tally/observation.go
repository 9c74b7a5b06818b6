package tally

import (
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/spiffe"
)

// How long the parts of an observation may be, in bytes.
const (
	maxID         = 2048 // of a SPIFFE ID [SPIFFE-ID §2.3]
	maxMethod     = 64
	maxPath       = 256
	maxName       = 256 // of policies, roll-outs, revocations, epochs
	maxFile       = 1024
	maxShort      = 32 // of reasons and points
	maxDecisionID = 64
	maxToken      = 256
	// maxCount bounds what one observation may stand for, so that sums stay numbers.
	maxCount = 1 << 40
)

// Check says what is wrong with an observation that somebody else has made, and moves its times to between earliest and
// now: clocks differ, and nobody may make a record that is never forgotten.
func Check(o *policyv1.Observation, earliest, now time.Time) error {
	if err := checkSizes(o); err != nil {
		return err
	}
	if _, err := spiffe.ParseWorkloadID(o.GetService()); err != nil {
		return fmt.Errorf("service: %w", err)
	}
	if o.GetPeer() != "" { // empty: a caller without an SVID
		if _, err := spiffe.ParseID(o.GetPeer()); err != nil {
			return fmt.Errorf("peer: %w", err)
		}
	}
	if !isDecisionID(o.GetDecisionId()) {
		return fmt.Errorf("decision_id: not 1 to %d of A-Z and 0-9", maxDecisionID)
	}
	switch n := o.GetCount(); {
	case n == 0 || n > maxCount:
		return fmt.Errorf("count: %d is not 1 to %d", n, uint64(maxCount))
	case n != 1 && o.GetDecisionId() != "":
		return fmt.Errorf("count: %d of a single decision", n)
	}
	o.Last = min(max(o.GetLast(), earliest.UnixNano()), now.UnixNano())
	o.First = min(max(o.GetFirst(), earliest.UnixNano()), o.Last)
	return nil
}

func checkSizes(o *policyv1.Observation) error {
	for _, f := range [...]struct {
		name, value string
		most        int
	}{
		{"decision_id", o.GetDecisionId(), maxDecisionID}, {"service", o.GetService(), maxID}, {"peer", o.GetPeer(), maxID},
		{"method", o.GetMethod(), maxMethod}, {"path", o.GetPath(), maxPath}, {"reason", o.GetReason(), maxShort}, {"shadow_reason", o.GetShadowReason(), maxShort},
		{"epoch", o.GetEpoch(), maxName}, {"point", o.GetPoint(), maxShort}, {"rollout", o.GetRollout(), maxName}, {"revocation", o.GetRevocation(), maxName},
		{"token", o.GetToken(), maxToken},
		{"rule.policy", o.GetRule().GetPolicy(), maxName}, {"rule.file", o.GetRule().GetFile(), maxFile},
		{"shadow_rule.policy", o.GetShadowRule().GetPolicy(), maxName}, {"shadow_rule.file", o.GetShadowRule().GetFile(), maxFile},
	} {
		if len(f.value) > f.most {
			return fmt.Errorf("%s: %d bytes are more than %d", f.name, len(f.value), f.most)
		}
		if !utf8.ValidString(f.value) {
			return fmt.Errorf("%s: not UTF-8", f.name)
		}
	}
	// What a newer version may say beside would be kept without a bound.
	o.ProtoReflect().SetUnknown(nil)
	for _, r := range [...]*policyv1.RuleRef{o.GetRule(), o.GetShadowRule()} {
		if r != nil {
			r.ProtoReflect().SetUnknown(nil)
		}
	}
	if _, known := policyv1.CallProtocol_name[int32(o.GetProtocol())]; !known {
		o.Protocol = policyv1.CallProtocol_CALL_PROTOCOL_UNSPECIFIED
	}
	return nil
}

// isDecisionID accepts the empty string as well.
func isDecisionID(s string) bool {
	for _, c := range []byte(s) {
		if (c < 'A' || c > 'Z') && (c < '0' || c > '9') {
			return false
		}
	}
	return true
}

// OmitPath takes the path out of an observation, unless it is a gRPC method, which is a name in a program.
func OmitPath(o *policyv1.Observation) {
	if o.GetPath() != "" && o.GetProtocol() != policyv1.CallProtocol_CALL_PROTOCOL_GRPC {
		o.Path = ""
	}
}

func (k *key) omitPath() {
	if k.protocol != policyv1.CallProtocol_CALL_PROTOCOL_GRPC {
		k.path = ""
	}
}

func keyOf(j *policy.Judgement) key {
	d := &j.Decision
	k := key{
		service: j.Service.String(), peer: j.Peer.String(), method: j.Call.Method, path: j.Call.Path, point: j.Point,
		rule: d.Rule, reason: d.Reason.String(), revocation: d.Revocation, rollout: d.Rollout, formerly: d.FormerlyAllowed, allowed: d.Allowed, protocol: policyv1.CallProtocol_CALL_PROTOCOL_TLS,
	}
	if d.Shadow.Reason != policy.ReasonNone {
		k.shadowAllowed, k.shadowReason, k.shadowRule = d.Shadow.Allowed, d.Shadow.Reason.String(), d.Shadow.Rule
	}
	switch {
	case j.Call.GRPC:
		k.protocol = policyv1.CallProtocol_CALL_PROTOCOL_GRPC
	case j.Call.Protocol == policy.ProtocolHTTP:
		k.protocol = policyv1.CallProtocol_CALL_PROTOCOL_HTTP
	}
	return k
}

func keyOfObservation(o *policyv1.Observation) key {
	return key{
		service: o.GetService(), peer: o.GetPeer(), method: o.GetMethod(), path: o.GetPath(), point: o.GetPoint(), protocol: o.GetProtocol(),
		rule: ruleOf(o.GetRule()), reason: o.GetReason(), allowed: o.GetAllowed(), revocation: o.GetRevocation(), rollout: o.GetRollout(), formerly: o.GetFormerlyAllowed(),
		shadowAllowed: o.GetShadowAllowed(), shadowReason: o.GetShadowReason(), shadowRule: ruleOf(o.GetShadowRule()),
	}
}

// observation is a key in words of the wire, where strings are UTF-8 and within bounds.
func (k *key) observation() *policyv1.Observation {
	return &policyv1.Observation{
		Service: text(k.service), Peer: text(k.peer), Protocol: k.protocol, Method: text(k.method), Path: text(k.path), Point: text(k.point),
		Allowed: k.allowed, Reason: text(k.reason), Rule: reference(k.rule), ShadowAllowed: k.shadowAllowed, ShadowReason: text(k.shadowReason), ShadowRule: reference(k.shadowRule),
		Revocation: text(clip(k.revocation, maxName)), Rollout: text(clip(k.rollout, maxName)), FormerlyAllowed: k.formerly,
	}
}

func ruleOf(r *policyv1.RuleRef) policy.Rule {
	return policy.Rule{Policy: r.GetPolicy(), Index: int(r.GetIndex()), File: r.GetFile(), Line: r.GetLine()}
}

func reference(r policy.Rule) *policyv1.RuleRef {
	if r.Policy == "" {
		return nil
	}
	return &policyv1.RuleRef{Policy: text(r.Policy), Index: int32(r.Index), File: text(clip(r.File, maxFile)), Line: r.Line}
}

// text makes bytes of a request a string of the wire. A "?" takes the place of what is none: it cannot be in a path, and
// unlike U+FFFD does not make it longer.
func text(s string) string { return strings.ToValidUTF8(s, "?") }

func clip(s string, most int) string {
	if len(s) > most {
		return s[:most]
	}
	return s
}

// Single is a decision as an observation of its own.
func Single(j policy.Judgement, omitPath bool) *policyv1.Observation {
	k := keyOf(&j)
	if omitPath {
		k.omitPath()
	}
	return k.single(&j)
}

func (k *key) single(j *policy.Judgement) *policyv1.Observation {
	o := k.observation()
	o.DecisionId, o.Count = j.ID, 1
	o.First, o.Last = j.Time.UnixNano(), j.Time.UnixNano()
	o.Epoch, o.Revision = text(j.Decision.Epoch), j.Decision.Revision
	if !o.GetAllowed() {
		o.Token = text(j.Call.Token)
	}
	return o
}

// ShadowDiffers reports whether enforcing what only reports would change the answer.
func ShadowDiffers(o *policyv1.Observation) bool {
	return o.GetShadowReason() != "" && o.GetShadowAllowed() != o.GetAllowed()
}
