package ca

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

func identities(names ...string) string {
	var b strings.Builder
	for i, n := range names {
		fmt.Fprintf(&b, "kind: Identity\nname: %s\nspiffeID: /%s\nmatch: [\"unix:uid:%d\"]\n---\n", n, n, i+1)
	}
	return b.String()
}

// What locks everybody out goes only with yes, by whichever way it comes, and who is locked out is said.
func TestLockoutNeedsYes(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api := adminv1.NewAdminClient(h.admin)
	h.apply(identities("documents", "web", "api") + "kind: CallPolicy\nname: p\nservice: /documents\nallow: [{from: [/web, /api]}]\n")
	request := func(doc string) *adminv1.ApplyRequest {
		return &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(doc), File: "t.yaml"}}}
	}
	const who = "spiffe://example.org/documents can be called by nobody any more: it locks out 2 callers that may call it now: spiffe://example.org/api, spiffe://example.org/web"
	refused := func(what string, err error) {
		t.Helper()
		if code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), who) || !strings.Contains(err.Error(), "--yes") {
			t.Errorf("%s: %v; want a refusal that names who is locked out", what, err)
		}
	}
	for name, doc := range map[string]string{
		"no allow":       "kind: CallPolicy\nname: p\nservice: /documents\n",
		"nobody else":    "kind: CallPolicy\nname: p\nservice: /documents\nallow: [{from: [/documents]}]\n",
		"only reporting": "kind: CallPolicy\nname: p\nservice: /documents\nmode: shadow\nallow: [{from: [/web, /api]}]\n",
		"a deny":         "kind: CallPolicy\nname: q\nservice: /**\ndeny: [{from: [/**]}]\n",
	} {
		rev := h.ca.reg.Revision()
		_, err := api.Apply(t.Context(), request(doc))
		refused(name, err)
		if h.ca.reg.Revision() != rev {
			t.Errorf("%s: something was written", name)
		}
		plan, err := api.Plan(t.Context(), request(doc))
		if err != nil || !strings.Contains(strings.Join(plan.Warnings, "\n"), who) {
			t.Errorf("%s: the plan warns of %q, %v", name, plan.GetWarnings(), err)
		}
	}
	prune := request("kind: CallPolicy\nname: other\nservice: /web\nallow: [{from: [/api]}]\n")
	prune.Prune = true
	_, err := api.Apply(t.Context(), prune)
	refused("prune", err)
	_, err = api.DeleteResource(t.Context(), &adminv1.DeleteResourceRequest{Kind: "CallPolicy", Name: "p"})
	refused("delete", err)
	if got := h.audit("resource.delete"); len(got) != 1 || got[0]["outcome"] == "success" {
		t.Errorf("audit of the refused deletion: %v", got)
	}
	// Narrower than before, but somebody may still call.
	h.apply("kind: CallPolicy\nname: p\nservice: /documents\nallow: [{from: [/web]}]\n")
	// PolicyDefaults that let everybody in, taken away again.
	h.apply("kind: PolicyDefaults\nmode: shadow\n")
	const others = "spiffe://example.org/api can be called by nobody any more, nor can 1 more of its kind: it locks out 2 callers"
	if _, err := api.Apply(t.Context(), request("kind: PolicyDefaults\nmode: deny\n")); code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), others) {
		t.Errorf("defaults to deny: %v", err)
	}
	if _, err := api.DeleteResource(t.Context(), &adminv1.DeleteResourceRequest{Kind: "PolicyDefaults", Name: "default"}); code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), others) {
		t.Errorf("defaults deleted: %v", err)
	}
	yes := request("kind: CallPolicy\nname: p\nservice: /documents\n---\nkind: PolicyDefaults\nmode: deny\n")
	yes.Yes = true
	if _, err := api.Apply(t.Context(), yes); err != nil {
		t.Errorf("with yes: %v", err)
	}
}

// What is hardly meant is said with its place, and applied all the same.
func TestApplyWarnsOfWhatIsHardlyMeant(t *testing.T) {
	h := start(t, config(t.TempDir()))
	got := h.apply(identities("documents") + "kind: CallPolicy\nname: p\nservice: /documents\nallow:\n  - from: [/web, \"spiffe://partner.example/x\"]\n  - from: [/**]\n").Warnings
	for _, want := range []string{
		`test.yaml:10:12: no Identity and no entry issues "/web"`,
		`test.yaml:10:18: there is no bundle of the trust domain "partner.example"`,
		`test.yaml:11:12: "/**" is every workload of the trust domain`,
	} {
		if !strings.Contains(strings.Join(got, "\n"), want) {
			t.Errorf("%q; want %q", got, want)
		}
	}
	// An Identity of the same apply counts, and what does not change is not spoken of again.
	if got := h.apply(identities("web") + "kind: CallPolicy\nname: q\nservice: /web\nallow: [{from: [/documents]}]\n").Warnings; len(got) > 0 {
		t.Errorf("warnings of documents that are well: %q", got)
	}
}

// Those who were seen to call count before those who may.
func TestLockoutOfThoseWhoWereSeen(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api := adminv1.NewAdminClient(h.admin)
	h.apply(identities("documents", "web", "api") + "kind: CallPolicy\nname: p\nservice: /documents\nallow: [{from: [/web, /api]}]\n")
	seen := &policyv1.Observation{Service: "spiffe://example.org/documents", Peer: "spiffe://example.org/api", Protocol: policyv1.CallProtocol_CALL_PROTOCOL_TLS,
		Allowed: true, Reason: "allowed", Count: 3, First: time.Now().UnixNano(), Last: time.Now().UnixNano()}
	if err := h.ca.observations.Add("spiffe://example.org/spire/agent/x", []*policyv1.Observation{seen}, func(int) bool { return true }, 0); err != nil {
		t.Fatal(err)
	}
	const narrower = "kind: CallPolicy\nname: p\nservice: /documents\nallow: [{from: [/web]}]\n"
	_, err := api.Apply(t.Context(), &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(narrower), File: "t.yaml"}}})
	if code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "it locks out 1 caller that did call it: spiffe://example.org/api") {
		t.Errorf("%v; want a refusal that names who was seen", err)
	}
}
