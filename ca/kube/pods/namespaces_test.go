package pods

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/spiffe"
)

// planOfNamespace plans a CallPolicy of a namespace of cluster prod for a service.
func planOfNamespace(t *testing.T, r *registry.Registry, ns, service string) error {
	t.Helper()
	name := "prod_" + ns + "_p"
	docs, err := strictyaml.Split(fmt.Appendf(nil, "kind: CallPolicy\nname: %s\nservice: %s\nallow: [{from: [/x]}]\n", name, service), "p.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.Plan(docs, registry.Options{Owner: "kubernetes/prod/resources", Namespaces: map[string]registry.Namespace{name: {Cluster: "prod", Name: ns, Clusters: []string{"prod"}}}})
	return err
}

// TestANamespaceDoesNotSpeakForPodsElsewhere: an ID below its segment that another rule gives to pods of another namespace is none of
// its own, from when the first such pod is there until the last is gone; its own pods' is, by whatever rule.
func TestANamespaceDoesNotSpeakForPodsElsewhere(t *testing.T) {
	r := newRegistry(t)
	apply(t, r, byServiceAccount)
	x := New(Config{Registry: r})
	x.Synced("prod", true)
	x.SetRules("spire:prod", []Rule{
		&rule{name: "ClusterSPIFFEID stray", ns: "evil", path: func(*Pod) (string, error) { return "/ns/bank/sa/accounts", nil }},
		&rule{name: "ClusterSPIFFEID own", ns: "bank", path: func(p *Pod) (string, error) { return "/ns/bank/sa/" + p.ServiceAccount + "/extra", nil }}})
	refused := func(what, service, want string) {
		t.Helper()
		if err := planOfNamespace(t, r, "bank", service); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s, %s: %v, want %q", what, service, err, want)
		}
	}
	x.Update("prod", []*Pod{pod("1", "node-a", "bank", "db")}, nil)
	counted := r.TemplatesChanged()
	refused("its own pods", "/ns/bank/sa/db", "")
	refused("its own pods", "/ns/bank/**", "")

	woken := make(chan int, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		woken <- r.AwaitTemplates(ctx, counted)
	}()
	x.Update("prod", []*Pod{pod("2", "node-a", "evil", "web"), pod("3", "node-a", "evil", "api")}, nil)
	if n := <-woken; n == counted {
		t.Error("policies of namespaces are not judged anew")
	}
	const stray = "spiffe://example.org/ns/bank/sa/accounts is that of pod evil/pod-"
	refused("a pod elsewhere", "/ns/bank/sa/accounts", stray)
	refused("a pod elsewhere", "/ns/bank/sa/*", stray)
	refused("another service", "/ns/bank/sa/db", "")
	// More of the same, and its own pods, are no reason to judge anew.
	counted = r.TemplatesChanged()
	x.Update("prod", []*Pod{pod("4", "node-a", "evil", "web"), pod("5", "node-a", "bank", "web"), pod("6", "node-b", "shop", "web")}, nil)
	if n := r.TemplatesChanged(); n != counted {
		t.Errorf("%d reasons to judge policies of namespaces anew, for pods that change nothing", n-counted)
	}
	x.Update("prod", nil, []string{"2", "3"})
	refused("one is left", "/ns/bank/sa/accounts", stray)
	x.Update("prod", nil, []string{"4"})
	refused("they are gone", "/ns/bank/sa/accounts", "")
	refused("they are gone", "/ns/bank/**", "")
}

// TestEntriesThatAControllerLeft: what spire-controller-manager registered for a pod says nothing of namespaces. It is told what
// to do, and once it is gone the service is the namespace's.
func TestEntriesThatAControllerLeft(t *testing.T) {
	r := newRegistry(t)
	apply(t, r, byServiceAccount)
	x := New(Config{Registry: r})
	x.Synced("prod", true)
	agent := node(t, r, "prod", "node-a")
	x.Update("prod", []*Pod{pod("1", "node-a", "bank", "db")}, nil)
	res := r.CreateEntries(t.Context(), []*registry.Entry{{ID: "prod.b3c1", SPIFFEID: spiffeid.RequireFromPath(td, "/ns/bank/sa/db"), ParentID: agent, Hint: "db",
		Selectors: []spiffe.Selector{{Type: "k8s", Value: "pod-uid:1"}}}})
	if res[0].Err != nil {
		t.Fatal(res[0].Err)
	}
	expect(t, "the pod keeps its ID by the controller's entry", of(r, agent), "/ns/bank/sa/db")
	for _, service := range []string{"/ns/bank/sa/db", "/ns/bank/**"} {
		if err := planOfNamespace(t, r, "bank", service); err == nil || !strings.Contains(err.Error(), "entry (prod.b3c1) for one pod") || !strings.Contains(err.Error(), "'signet entry delete'") {
			t.Errorf("%s: %v", service, err)
		}
	}
	if _, _, err := r.DeleteEntry(t.Context(), "prod.b3c1"); err != nil {
		t.Fatal(err)
	}
	expect(t, "and by the Identity when that is gone", of(r, agent), "/ns/bank/sa/db for 1")
	if err := planOfNamespace(t, r, "bank", "/ns/bank/**"); err != nil {
		t.Errorf("when it is gone: %v", err)
	}
}
