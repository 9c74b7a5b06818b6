package analyse

import (
	"fmt"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

func TestLockouts(t *testing.T) {
	known := knownIDs(t, "partner.example", "/documents", "/web", "/api", "/ns/a/sa/x", "/ns/b/sa/x", "/other")
	const policyOf = "kind: CallPolicy\nname: %s\nservice: %s\n"
	doc := func(name, service, rest string) string { return fmt.Sprintf(policyOf, name, service) + rest }
	shadow := "kind: PolicyDefaults\nmode: shadow\n"
	p := doc("p", "/documents", "allow:\n  - from: [/web, /api]\n")
	for _, tt := range []struct {
		name, before, after string
		seen                []string // callers of /documents
		want                string
	}{
		{"the policy goes", p, "", nil, "spiffe://example.org/documents can be called by nobody any more: it locks out 2 callers that may call it now: spiffe://example.org/api, spiffe://example.org/web"},
		{"its allow goes", p, doc("p", "/documents", ""), nil, "it locks out 2 callers"},
		{"one caller stays", p, doc("p", "/documents", "allow:\n  - from: [/web]\n"), nil, ""},
		{"another policy still allows", p + "---\n" + doc("q", "/**", "allow:\n  - from: [/web]\n"), doc("q", "/**", "allow:\n  - from: [/web]\n"), nil, ""},
		{"all callers change", p, doc("p", "/documents", "allow:\n  - from: [/other]\n"), nil, "it locks out 2 callers"},
		{"a deny for all", p, p + "---\n" + doc("q", "/documents", "deny:\n  - from: [/**]\n"), nil, "it locks out 2 callers"},
		{"a deny for some requests", p, p + "---\n" + doc("q", "/documents", "deny:\n  - from: [/**]\n    http: [{methods: [GET]}]\n"), nil, ""},
		{"it only reports now", p, doc("p", "/documents", "mode: shadow\nallow:\n  - from: [/web, /api]\n"), nil, "it locks out 2 callers"},
		{"it only reported before", doc("p", "/documents", "mode: shadow\nallow:\n  - from: [/web]\n"), "", nil, ""},
		{"it speaks of another service now", p, doc("p", "/other", "allow:\n  - from: [/web]\n"), nil, "documents can be called by nobody"},
		{"a service that nobody is", doc("p", "/gone", "allow:\n  - from: [/web]\n"), "", nil, ""},
		{"callers by pattern", doc("p", "/documents", "allow:\n  - from: [/ns/*/sa/x]\n"), "", nil, "it locks out 2 callers that may call it now: spiffe://example.org/ns/a/sa/x, spiffe://example.org/ns/b/sa/x"},
		{"callers of a partner", doc("p", "/documents", "allow:\n  - from: [\"spiffe://partner.example/r/**\"]\n"), "", nil, "it locks out 1 caller that may call it now: spiffe://partner.example/r/**"},
		{"nobody could call before", doc("p", "/documents", "allow:\n  - from: [/web]\ndeny:\n  - from: [/**]\n"), "", nil, ""},
		{"those who were seen", p, doc("p", "/documents", "allow:\n  - from: [/web]\n"), []string{"/api"}, "it locks out 1 caller that did call it: spiffe://example.org/api"},
		{"one of those who were seen stays", p, doc("p", "/documents", "allow:\n  - from: [/web]\n"), []string{"/api", "/web"}, ""},
		{"the defaults become deny", shadow, "kind: PolicyDefaults\nmode: deny\n", nil, "spiffe://example.org/api can be called by nobody any more, nor can 5 more of its kind: it locks out 5 callers"},
		{"the defaults are deleted, but one service has a policy", shadow + "---\n" + p, p, nil, "spiffe://example.org/api can be called by nobody any more, nor can 4 more of its kind"},
		{"an empty policy where the defaults let all in", shadow, shadow + "---\n" + doc("p", "/documents", ""), nil, "it locks out 5 callers"},
		{"a policy where the defaults let all in", shadow, shadow + "---\n" + p, nil, ""},
		{"calling oneself does not count", doc("p", "/documents", "allow:\n  - from: [/documents]\n"), "", nil, ""},
	} {
		change := Replacement{Before: empty(t, tt.before), After: empty(t, tt.after), Changed: map[string]bool{"p": true, "q": strings.Contains(tt.after, "name: q") != strings.Contains(tt.before, "name: q")}, Known: known}
		for _, s := range tt.seen {
			if change.Seen == nil {
				change.Seen = map[spiffeid.ID][]spiffeid.ID{}
			}
			change.Seen[id(t, "/documents")] = append(change.Seen[id(t, "/documents")], id(t, s))
		}
		got, complete, err := change.Lockouts()
		if err != nil || !complete {
			t.Fatalf("%s: %v, complete %t", tt.name, err, complete)
		}
		if tt.want == "" && len(got) > 0 || tt.want != "" && (len(got) != 1 || !strings.Contains(got[0].String(), tt.want)) {
			t.Errorf("%s: %v\nwant %q", tt.name, got, tt.want)
		}
	}
}

// empty is set for documents of which there may be none.
func empty(t *testing.T, docs string) *policyv1.PolicySet {
	if docs == "" {
		return &policyv1.PolicySet{Format: 1, TrustDomain: "example.org", Defaults: policyv1.DefaultsMode_DEFAULTS_MODE_DENY}
	}
	return set(t, docs)
}

func TestLockoutsOfMany(t *testing.T) {
	s, known := many(10_000)
	changes, changed := map[string]*policyv1.Policy{}, map[string]bool{}
	for i := range 100 {
		changes[fmt.Sprintf("p%d", i)], changed[fmt.Sprintf("p%d", i)] = nil, true
	}
	r := Replacement{Before: s, After: Replaced(s, changes), Changed: changed, Known: known}
	found, complete, err := r.Lockouts()
	if err != nil || !complete || len(found) != 100 || found[0].Count < 5 {
		t.Errorf("%d lock-outs, complete %t, %v", len(found), complete, err)
	}
	// A deny for everybody everywhere: more services than are named.
	all := &policyv1.Policy{Name: "all", Mode: policyv1.Mode_MODE_ENFORCE, Services: []string{"spiffe://example.org/**"},
		Rules: []*policyv1.Rule{{Effect: policyv1.Effect_EFFECT_DENY, From: []string{"spiffe://example.org/**"}}}}
	r = Replacement{Before: s, After: Replaced(s, map[string]*policyv1.Policy{"all": all}), Changed: map[string]bool{"all": true}, Known: known}
	if found, complete, err = r.Lockouts(); err != nil || complete || len(found) != maxLockouts {
		t.Errorf("%d lock-outs, complete %t, %v", len(found), complete, err)
	}
}
