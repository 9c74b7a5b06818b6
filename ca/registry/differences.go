package registry

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// compare tells whether a document differs from the stored one, and how. A CallPolicy whose rules moved to another
// line is a change: explanations name lines.
func (r *Registry) compare(x *resource, old *Entry, doc *Document) (Action, []string) {
	if doc.same(&x.doc) {
		return Unchanged, nil
	}
	diffs := r.differences(x, old, doc)
	switch {
	case len(diffs) > 0:
		return Change, diffs
	case doc.samePlace(&x.doc) && x.kind != KindCallPolicy:
		return Unchanged, nil
	}
	return Change, []string{"only its text or place changed"}
}

func (x *resource) encode(created time.Time) ([]byte, error) {
	if x.entry != nil {
		x.entry.CreatedAt = created
		return x.entry.encode()
	}
	if x.revoked != nil {
		x.revoked.CreatedAt = created
		return x.revoked.encode()
	}
	if x.issuer != nil {
		return x.encodeUserIssuer(created)
	}
	rec := policyRecord{V: recordVersion, Document: x.doc.document(), Mode: int32(x.mode), CreatedAt: unix(created)}
	if x.compiled != nil {
		b, err := proto.Marshal(x.compiled)
		if err != nil {
			return nil, err
		}
		rec.Compiled, rec.Mode = b, 0
	}
	return marshal(rec)
}

// differences lists what applying x changes, a line each.
func (r *Registry) differences(x *resource, old *Entry, doc *Document) []string {
	var out []string
	diff := func(field string, a, b any) {
		if as, bs := fmt.Sprint(a), fmt.Sprint(b); as != bs {
			out = append(out, fmt.Sprintf("%s: %s -> %s", field, as, bs))
		}
	}
	switch {
	case x.entry != nil && old != nil:
		n := x.entry
		diff("spiffeID", old.IDText(), n.IDText())
		diff("match", selectorStrings(old.Selectors), selectorStrings(n.Selectors))
		diff("on", selectorStrings(old.On), selectorStrings(n.On))
		diff("x509TTL", old.X509TTL, n.X509TTL)
		diff("jwtTTL", old.JWTTTL, n.JWTTTL)
		diff("dnsNames", old.DNSNames, n.DNSNames)
		diff("federatesWith", old.FederatesWith, n.FederatesWith)
		diff("hint", old.Hint, n.Hint)
		diff("admin", old.Admin, n.Admin)
		diff("jwtIncludeJTI", old.JWTIncludeJTI, n.JWTIncludeJTI)
		diff("canary", old.Canary, n.Canary)
		diff("expiresAt", old.ExpiresAt, n.ExpiresAt)
	case x.compiled != nil:
		was := r.ix.policies[x.name].Compiled
		diff("service", was.Services, x.compiled.Services)
		diff("mode", modeWord(was.Mode.String()), modeWord(x.compiled.Mode.String()))
		a, b := ruleLines(was), ruleLines(x.compiled)
		for _, s := range a {
			if !slices.Contains(b, s) {
				out = append(out, "- "+s)
			}
		}
		for _, s := range b {
			if !slices.Contains(a, s) {
				out = append(out, "+ "+s)
			}
		}
	case x.revocation != nil:
		was := r.ix.revocations.documents[x.name]
		diff("target", was.Target, x.revocation.Target())
		if len(was.Items) > 0 {
			diff("reason", was.Items[0].Reason, x.revocation.Reason)
		}
		diff("expires", was.Expires, x.revocation.Expires)
	case x.issuer != nil:
		r.ix.issuers.byName[x.name].differences(x, diff)
	case x.kind == KindPolicyDefaults:
		diff("name", doc.Name, x.name)
		diff("mode", modeWord(r.ix.defaults.Mode.String()), modeWord(x.mode.String()))
	}
	return out
}

// modeWord is a mode as documents have it.
func modeWord(name string) string {
	return strings.ToLower(name[strings.LastIndexByte(name, '_')+1:])
}

// ruleLines prints each rule of a policy without its place. A nil policy has none.
func ruleLines(p *policyv1.Policy) []string {
	var out []string
	for _, rule := range p.GetRules() {
		s := strings.ToLower(strings.TrimPrefix(rule.Effect.String(), "EFFECT_")) + " from " + strings.Join(rule.From, ", ")
		for _, h := range rule.Http {
			s += fmt.Sprintf(" http methods=%v paths=%v", h.Methods, h.Paths)
		}
		if len(rule.Grpc) > 0 {
			s += " grpc " + strings.Join(rule.Grpc, ", ")
		}
		if rule.Jwt != nil {
			s += fmt.Sprintf(" jwt audience=%v subject=%s", rule.Jwt.Audience, strings.ToLower(strings.TrimPrefix(rule.Jwt.Subject.String(), "SUBJECT_BINDING_")))
		}
		if rule.When != "" {
			s += " when " + rule.When
		}
		if rule.Shadow {
			s += " (shadow)"
		}
		out = append(out, s)
	}
	return out
}
