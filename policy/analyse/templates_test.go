package analyse

import (
	"slices"
	"strings"
	"testing"

	"github.com/signet-id/signet/policy"
)

// What a templated Identity may give a pod is not unknown: of pods that are known it is a note that none has it, and else nothing.
func TestTemplatesInChecks(t *testing.T) {
	ids := knownIDs(t, "", "/documents", "/ns/shop/sa/web")
	templates := []string{"spiffe://example.org/ns/*/sa/*", "spiffe://elsewhere.example/x/*", "no pattern"}
	for _, tt := range []struct{ name, service, from, want string }{
		{"a pod's", "/ns/shop/sa/web", "/ns/shop/sa/web", ""},
		{"a pod that is not there", "/ns/shop/sa/api", "/documents", `note: no pod has "/ns/shop/sa/api" now`},
		{"a caller that is not there", "/documents", "/ns/bnak/sa/db", `note: no pod has "/ns/bnak/sa/db" now`},
		{"a pattern of some", "/ns/shop/sa/*", "/ns/*/sa/web", ""},
		{"a pattern of none", "/documents", "/ns/*/sa/cron", `note: no pod has "/ns/*/sa/cron" now`},
		{"all of a namespace", "/documents", "/ns/bank/**", `note: no pod has "/ns/bank/**" now`},
		{"deeper than the template", "/documents", "/ns/shop/sa/web/x", `no Identity and no entry issues "/ns/shop/sa/web/x", so nobody`},
		{"shorter than it", "/documents", "/ns/shop", `no Identity and no entry issues "/ns/shop", so nobody`},
		{"of no template", "/documents", "/elsewhere/a", `no Identity and no entry issues "/elsewhere/a", so nobody`},
	} {
		docs := "kind: CallPolicy\nname: p\nservice: " + tt.service + "\nallow:\n  - from: [" + tt.from + "]\n"
		for _, unseen := range []bool{false, true} {
			got := slices.DeleteFunc(lint(t, docs, ids.WithTemplates(templates, unseen)), func(s string) bool { return strings.HasPrefix(s, "no_policy") })
			want := tt.want
			if unseen && strings.Contains(want, "no pod has") {
				want = ""
			}
			if want == "" && len(got) > 0 || want != "" && (len(got) != 1 || !strings.Contains(got[0], want)) {
				t.Errorf("%s (unseen: %t): %q, want %q", tt.name, unseen, got, want)
			}
		}
	}
	// A deny reads /ns/** wide.
	deny := "kind: CallPolicy\nname: p\nservice: /documents\nallow:\n  - from: [/documents]\ndeny:\n  - from: [/ns/a/sa/b/**]\n"
	if got := lint(t, deny, knownIDs(t, "", "/documents").WithTemplates(templates, true)); len(got) > 0 {
		t.Errorf("a deny: %q", got)
	}
}

// While it is not known which pods there are, the guard goes by what the templates may give.
func TestLockoutsOfPodsThatAreNotKnown(t *testing.T) {
	const p = "kind: CallPolicy\nname: p\nservice: SERVICE\nallow:\n  - from: [FROM]\n"
	templates := []string{"spiffe://example.org/ns/*/sa/*"}
	for _, tt := range []struct{ service, from, want string }{
		{"/ns/bank/sa/db", "/ns/shop/sa/web", "spiffe://example.org/ns/bank/sa/db can be called by nobody any more: it locks out 1 caller that may call it now: spiffe://example.org/ns/shop/sa/web"},
		{"/ns/bank/sa/db", "/ns/*/sa/web", "spiffe://example.org/ns/bank/sa/db can be called by nobody any more: it locks out 1 caller that may call it now: spiffe://example.org/ns/*/sa/web"},
		{"/ns/bank/**", "/documents", "spiffe://example.org/ns/bank/** can be called by nobody any more: it locks out 1 caller that may call it now: spiffe://example.org/documents"},
		{"/documents", "/ns/*/sa/web", "spiffe://example.org/documents can be called by nobody any more"},
		{"/elsewhere/x", "/documents", ""},
	} {
		docs := strings.NewReplacer("SERVICE", tt.service, "FROM", tt.from).Replace(p)
		for _, unseen := range []bool{true, false} {
			r := Replacement{Before: set(t, docs), After: empty(t, ""), Changed: map[string]bool{"p": true}, Known: knownIDs(t, "", "/documents").WithTemplates(templates, unseen)}
			got, complete, err := r.Lockouts()
			want := tt.want
			if !unseen {
				want = "" // no pod is there, so none is locked out
			}
			if err != nil || !complete || want == "" && len(got) > 0 || want != "" && (len(got) != 1 || !strings.HasPrefix(got[0].String(), want)) {
				t.Errorf("%s from %s (unseen: %t): %v, %t, %v; want %q", tt.service, tt.from, unseen, got, complete, err, want)
			}
		}
	}
}

// Where only documents are at hand, the pattern of a rule stands for the pods that a template may give.
func TestWhoCanByTemplates(t *testing.T) {
	s := set(t, "kind: CallPolicy\nname: p\nservice: /documents\nallow:\n  - from: [/ns/*/sa/archiver, /ns/shop/sa/web, /gone/*]\n")
	known := knownIDs(t, "", "/documents")
	ask := func(k *Known) (out []string) {
		grants, err := WhoCan(s, k, policy.Request{Service: id(t, "/documents"), Peer: id(t, "/x")}, true)
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range grants {
			out = append(out, strings.TrimPrefix(g.Peer, "spiffe://example.org"))
		}
		return out
	}
	templates := []string{"spiffe://example.org/ns/*/sa/*"}
	if got := ask(known.WithTemplates(templates, true)); !slices.Equal(got, []string{"/ns/*/sa/archiver", "/ns/shop/sa/web"}) {
		t.Errorf("by a template: %q", got)
	}
	if got := ask(knownIDs(t, "", "/ns/a/sa/archiver", "/ns/b/sa/archiver").WithTemplates(templates, false)); !slices.Equal(got, []string{"/ns/a/sa/archiver", "/ns/b/sa/archiver", "/ns/shop/sa/web"}) {
		t.Errorf("of pods that are there: %q", got)
	}
	if got := ask(known); !slices.Equal(got, []string{"/ns/shop/sa/web"}) {
		t.Errorf("without a template: %q", got)
	}
}
