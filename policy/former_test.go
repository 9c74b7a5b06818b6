package policy

import (
	"testing"

	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// rolledOut is what an agent holds that is among the first to have the policies in after: each names what it replaces.
func rolledOut(t testing.TB, before, after string, rollouts map[string]string) *Policies {
	t.Helper()
	old := map[string]*policyv1.Policy{}
	if before != "" {
		for _, p := range set(t, before).Policies {
			old[p.Name] = p
		}
	}
	s := set(t, after)
	for _, p := range s.Policies {
		if name := rollouts[p.Name]; name != "" {
			p.Rollout = &policyv1.Rollout{Name: name, Former: old[p.Name]}
		}
	}
	return compile(t, s)
}

const formerDocuments = `
{kind: CallPolicy, name: a, service: /s, allow: [{from: [/x]}, {from: [/t], jwt: {audience: [old]}}]}
---
{kind: CallPolicy, name: b, service: /s, allow: [{from: [/y]}]}
`

const latterDocuments = `
{kind: CallPolicy, name: a, service: /s, allow: [{from: [/z]}, {from: [/u], jwt: {audience: [new]}}]}
---
{kind: CallPolicy, name: b, service: /s, allow: [{from: [/z]}]}
---
{kind: CallPolicy, name: c, service: /other, allow: [{from: [/z]}]}
---
{kind: PolicyDefaults, mode: shadow}
`

func TestADenialNamesTheRolloutThatIsToBlame(t *testing.T) {
	p := rolledOut(t, formerDocuments, latterDocuments, map[string]string{"a": "first", "b": "second", "c": "third"})
	for _, tt := range []struct{ name, from, to, want string }{
		{"the replaced rule allowed it", "/x", "/s", "first"},
		{"the other roll-out's did", "/y", "/s", "second"},
		{"nothing ever allowed it", "/q", "/s", ""},
		{"no policy named the service, and the defaults let it through", "/q", "/other", "third"},
	} {
		d := p.Decide(call(t, tt.from, tt.to, "tls"))
		if d.Allowed || d.FormerlyAllowed != (tt.want != "") || d.Rollout != tt.want {
			t.Errorf("%s: %+v, want roll-out %q", tt.name, d, tt.want)
		}
		if m := p.MightAllow(id(t, tt.to), id(t, tt.from)); m.Allowed || m.Rollout != tt.want || m.FormerlyAllowed != (tt.want != "") {
			t.Errorf("%s, at the handshake: %+v, want roll-out %q", tt.name, m, tt.want)
		}
	}
	if d := p.Decide(call(t, "/z", "/s", "tls")); !d.Allowed || d.FormerlyAllowed || d.Rollout != "" {
		t.Errorf("what is allowed blames a roll-out: %+v", d)
	}
	if d := p.Stale().Decide(call(t, "/x", "/s", "tls")); d.FormerlyAllowed || d.Reason != ReasonStalePolicy {
		t.Errorf("policies that are too old blame a roll-out: %+v", d)
	}
	everyone := CompileRevocations(&policyv1.RevocationSet{Revocations: []*policyv1.Revocation{{Name: "r", Target: &policyv1.Revocation_SpiffeId{SpiffeId: "spiffe://example.org/x"}}}}, exampleOrg)
	if d := p.WithRevocations(everyone).Decide(call(t, "/x", "/s", "tls")); d.FormerlyAllowed || d.Reason != ReasonRevoked {
		t.Errorf("a revoked peer blames a roll-out: %+v", d)
	}
}

// A token is looked at, although only a rule that is gone asks for it.
func TestADenialIsComparedWithTheTokenThatWasAskedFor(t *testing.T) {
	p := rolledOut(t, formerDocuments, latterDocuments, map[string]string{"a": "first"})
	if got := p.Audiences(id(t, "/s"), id(t, "/t")); len(got) != 1 || got[0] != "old" {
		t.Fatalf("audiences %v, want those of the replaced rule", got)
	}
	r := call(t, "/t", "/s", "GET /")
	r.Token = &Token{ID: id(t, "/t"), Audience: []string{"old"}}
	if d := p.Decide(r); d.Allowed || d.Rollout != "first" {
		t.Errorf("got %+v, want a denial by the roll-out", d)
	}
	r = call(t, "/u", "/s", "GET /")
	r.Token = &Token{ID: id(t, "/u"), Audience: []string{"old"}}
	if d := p.Decide(r); d.Allowed {
		t.Errorf("a token for another audience is enough: %+v", d)
	}
}

func TestARolloutDecidesNothing(t *testing.T) {
	with := rolledOut(t, formerDocuments, latterDocuments, map[string]string{"a": "first", "b": "first", "c": "first"})
	plain := with.Set()
	for _, p := range plain.Policies {
		p.Rollout = nil
	}
	without := compile(t, plain)
	for _, from := range []string{"/x", "/y", "/z", "/t", "/u", "/q"} {
		for _, to := range []string{"/s", "/other", "/none"} {
			a, b := with.Decide(call(t, from, to, "tls")), without.Decide(call(t, from, to, "tls"))
			a.FormerlyAllowed, a.Rollout = false, ""
			if a != b {
				t.Errorf("%s -> %s: %+v with a roll-out, %+v without", from, to, a, b)
			}
		}
	}
	if !proto.Equal(with.Set().Policies[0].Rollout.Former, set(t, formerDocuments).Policies[0]) {
		t.Error("the set does not tell what was there before")
	}
}

func TestAComparedDenialAllocatesNothing(t *testing.T) {
	p := rolledOut(t, formerDocuments, latterDocuments, map[string]string{"a": "first", "b": "second"})
	r := call(t, "/y", "/s", "tls")
	if n := testing.AllocsPerRun(100, func() { p.Decide(r) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
