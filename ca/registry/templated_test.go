package registry

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/template"
	"github.com/signet-id/signet/internal/strictyaml"
)

const clusterDefault = `kind: Identity
name: cluster-default
spiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}
on: [k8s_psat:cluster:prod]
`

func TestTemplatesThatAreRefused(t *testing.T) {
	r := open(t)
	for _, tt := range []struct{ doc, want string }{
		{"spiffeID: /{{ .k8s.ns }}", "t.yaml:3:12: spiffeID: the first path segment must be fixed"},
		{"spiffeID: /ns/{{ .k8s.nss }}", "t.yaml:3:18: spiffeID: there is no variable .k8s.nss"},
		{`spiffeID: "/ns/{{ .k8s.ns | x }}"`, "t.yaml:3:27: spiffeID: expected }}"},
		{"spiffeID: spiffe://example.org/ns/{{ .k8s.n }}", "t.yaml:3:38: spiffeID: there is no variable"},
		{"spiffeID: spiffe://other.example/ns/{{ .k8s.ns }}", `must be in trust domain "example.org"`},
		{"spiffeID: /ns/{{ .k8s.ns }}\nadmin: true", "t.yaml:4:1: admin: templates make no admins"},
		{"spiffeID: /ns/{{ .k8s.ns }}\ncanary: true", "t.yaml:4:1: canary: a template is no canary"},
		{"spiffeID: /ns/{{ .k8s.ns }}\ndnsNames:\n- ok.internal\n- '{{ .k8s.ns }}'", "t.yaml:6:4: dnsNames: the last label"},
		{"spiffeID: /ns/{{ .k8s.ns }}\ndnsNames: [a b]", `dnsNames "a b"`},
		{"spiffeID: /plain\nmatch: [k8s:ns:x]\ndnsNames: ['{{ .k8s.ns }}.internal']", "dnsNames: a template needs one in spiffeID"},
		{"spiffeID: /ns/{{ .k8s.ns }}\nx509TTL: -1h", "must not be negative"},
		{"spiffeID: /ns/{{ .k8s.ns }}\ndownstream: true", "downstream"},
	} {
		if _, err := tryPlan(r, "kind: Identity\nname: x\n"+tt.doc+"\n"); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s\ngives %v, want %q", tt.doc, err, tt.want)
		}
	}
	if _, err := tryPlan(r, clusterDefault+"---\n"+strings.Replace(clusterDefault, "cluster-default", "again", 1)); err == nil || !strings.Contains(err.Error(), "same registration") {
		t.Errorf("two alike: %v", err)
	}
}

// TestATemplatedIdentityIsOneResource: it is shown, compared, changed, pruned and deleted as any, and is no entry.
func TestATemplatedIdentityIsOneResource(t *testing.T) {
	r := open(t)
	apply(t, r, "kind: Identity\nname: cluster-default\nspiffeID: /plain\nmatch: [unix:uid:1]\n")
	p := plan(t, r, clusterDefault)
	if len(p.Changes) != 1 || p.Changes[0].Action != Change || !slices.Contains(p.Changes[0].Differences, "spiffeID: spiffe://example.org/plain -> /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}") {
		t.Errorf("plan %+v", p.Changes)
	}
	if len(p.Warnings) != 1 || !strings.Contains(p.Warnings[0].Text, "watches no cluster") {
		t.Errorf("warnings %q", p.Warnings)
	}
	rev := apply(t, r, clusterDefault)
	if got, at := r.Templates(); len(got) != 1 || got[0].Revision != rev || at < rev {
		t.Errorf("templates %v at %d", got, at)
	}
	if all, _ := r.ListEntries(EntryFilter{}, "", 10); len(all) != 0 || r.CountEntries(EntryFilter{}) != 0 {
		t.Errorf("entries %v", all)
	}
	if p := plan(t, r, clusterDefault); p.Changes[0].Action != Unchanged {
		t.Errorf("applied once more: %+v", p.Changes)
	}
	if p := plan(t, r, clusterDefault+"match: [k8s:ns:shop]\nx509TTL: 10m\n"); len(p.Changes[0].Differences) != 2 {
		t.Errorf("differences %q", p.Changes[0].Differences)
	}
	if _, err := tryPlan(r, strings.Replace(clusterDefault, "cluster-default", "other", 1)); err == nil || !strings.Contains(err.Error(), `as Identity "cluster-default"`) {
		t.Errorf("another of the same: %v", err)
	}
	res, err := r.Resources(KindIdentity, "cluster-default")
	if err != nil || len(res) != 1 || !res[0].Templated || res[0].Pods != 0 || string(res[0].Document.Content) != clusterDefault {
		t.Errorf("resources %+v, %v", res, err)
	}
	if _, _, err := r.DeleteEntry(t.Context(), "identity.cluster-default"); err == nil || !strings.Contains(err.Error(), "belongs to Identity") {
		t.Errorf("deleted as an entry: %v", err)
	}
	if res := r.CreateEntries(t.Context(), []*Entry{{ID: "identity.cluster-default", SPIFFEID: mustID(td, "/x"), ParentID: mustID(td, "/y"), Selectors: golden()["entry/plain"].(*Entry).Selectors}}); res[0].Err == nil {
		t.Error("an entry took the place of a templated Identity")
	}
	docs := split(t, "kind: Identity\nname: kept\nspiffeID: /kept\nmatch: [unix:uid:2]\n")
	p, err = r.Plan(docs, Options{Prune: true})
	if err != nil || len(p.Changes) != 2 || p.Changes[1].Action != Delete || p.Changes[1].Name != "cluster-default" {
		t.Fatalf("prune: %+v, %v", p, err)
	}
	if p, err = r.PlanDelete(KindIdentity, "cluster-default", false); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if got, _ := r.Templates(); len(got) != 0 {
		t.Errorf("after its deletion: %v", got)
	}
}

// TestAnOlderCARefusesTemplates: its record has a version that a CA without templates does not read, so that agents do not
// lose what pods have to a CA that knows of no templates.
func TestAnOlderCARefusesTemplates(t *testing.T) {
	b, err := templated().encode()
	if err != nil || !strings.Contains(string(b), `"v":2`) {
		t.Errorf("%s, %v", b, err)
	}
	for _, damaged := range []string{`{"v":1,"template":"/a/{{ .k8s.ns }}","spiffe_id":"spiffe://example.org/a","parent_id":"spiffe://example.org/b"}`, `{"v":2,"spiffe_id":"spiffe://example.org/a"}`, `{"v":2,"template":"/{{ .k8s.ns }}"}`} {
		if err := newIndex().apply(td, store.Event{Item: store.Item{Key: "entry/identity.x", Value: []byte(damaged)}}, nil); err == nil {
			t.Errorf("%s is read", damaged)
		}
	}
	// What a CA without templates reads of a record is its version, which is not its.
	if templateRecordVersion <= recordVersion {
		t.Error("an older CA would take a template for an entry")
	}
}

func TestExpandingAnIdentity(t *testing.T) {
	e := templated()
	e.Revision = 7
	pod := &template.Pod{Cluster: "prod", Namespace: "shop", ServiceAccount: "web", Name: "web-1"}
	got, err := e.Expand(td, pod)
	if err != nil || got.SPIFFEID.String() != "spiffe://example.org/ns/shop/sa/web" || !slices.Equal(got.DNSNames, []string{"web.internal"}) || got.Revision != 7 ||
		!slices.Equal(selectorStrings(got.Selectors), []string{"k8s:container-name:web"}) || got.X509TTL != e.X509TTL || !got.JWTIncludeJTI || got.Identity != nil || got.Template != nil {
		t.Errorf("%+v, %v", got, err)
	}
	pod.Namespace = "other"
	if got, err := e.Expand(td, pod); got != nil || err != nil {
		t.Errorf("a pod that it does not concern: %+v, %v", got, err)
	}
	pod.Namespace, pod.ServiceAccount = "shop", ""
	if got, err := e.Expand(td, pod); got != nil || err == nil || !strings.Contains(err.Error(), "spiffeID: .k8s.sa is empty") {
		t.Errorf("an empty value: %+v, %v", got, err)
	}
	if _, ok := errors.AsType[*ValidationError](err); ok {
		t.Error("unexpected kind")
	}
}

func split(t testing.TB, text string) []strictyaml.Document {
	t.Helper()
	docs, err := strictyaml.Split([]byte(text), "f.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	return docs
}

// TestIdentitiesThatNothingHas: a cluster that is not watched, and selectors that nobody makes, are mostly typing errors.
func TestIdentitiesThatNothingHas(t *testing.T) {
	r := open(t)
	r.ClusterKnown("prod", false)
	for _, tt := range []struct{ doc, want string }{
		{"spiffeID: /ns/{{ .k8s.ns }}\non: [k8s_psat:cluster:prd]", `Identity "x" stands for no pods: this CA watches no cluster "prd", as in on "k8s_psat:cluster:prd", but prod`},
		{"spiffeID: /ns/{{ .k8s.ns }}\non: [k8s_psat:cluster:prod, k8s_psat:agent_node_name:a, node:group:b]", ""},
		{"spiffeID: /ns/{{ .k8s.ns }}\nmatch: [k8s:namespace:shop]", `Identity "x" matches nothing where an agent of signet runs: it makes no selectors k8s:namespace, as in match "k8s:namespace:shop", but k8s:ns, k8s:sa`},
		{"spiffeID: /ns/{{ .k8s.ns }}\nmatch: [k8s:ns:shop, k8s:ns-label:team:a, k8s:container-name:app, unix:uid:1, docker:label:a:b]", ""},
		{"spiffeID: /web\nmatch: [k8s:ns-label:team:a]", `it makes no selectors k8s:ns-label`},
		{"spiffeID: /web\nmatch: [k8s:podlabel:team:a]\non: [k8s_psat:cluster:prd]", `it makes no selectors k8s:podlabel`},
	} {
		p := plan(t, r, "kind: Identity\nname: x\n"+tt.doc+"\n")
		if tt.want == "" && len(p.Warnings) == 0 {
			continue
		}
		if len(p.Warnings) != 1 || p.Warnings[0].Of != (Ref{KindIdentity, "x"}) || tt.want == "" || !strings.Contains(p.Warnings[0].Text, tt.want) {
			t.Errorf("%s\nhas the warnings %+v, want %q", tt.doc, p.Warnings, tt.want)
		}
	}
}
