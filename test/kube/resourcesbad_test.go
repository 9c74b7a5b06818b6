//go:build kube

package kube

import (
	"fmt"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/ca/kube/resources"
)

// Each bad resource is refused, by the API server at once or by the condition, with a message that says what is wrong.
func TestBadResources(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	s := custom(t, ctx, k, k.kubeconfig, nil)
	const (
		allow = "service: /a\nallow:\n- from: [/b]\n"
		fed   = "trustDomain: partner.example\nbundleEndpointURL: https://partner.example/b\n"
	)
	for i, tt := range []struct {
		kind, spec string
		server     string // part of the API server's message; empty: it takes the resource
		condition  string // part of the condition's
	}{
		{"Identity", "spiffeID: /a\n", "needs selectors", ""},
		{"Identity", "match: [unix:uid:1]\n", "spec.spiffeID: Required", ""},
		{"Identity", "spiffeID: a\nmatch: [unix:uid:1]\n", "must begin with /", ""},
		{"Identity", "spiffeID: /a\nmatch: [unix:uid:1]\nadmin: true\n", "only an operator can make an admin", ""},
		{"Identity", "spiffeID: /{{ .k8s.ns }}/a\n", "first path segment must be fixed", ""},
		{"Identity", "spiffeID: /a/{{ .k8s.ns }}-{{ .k8s.sa }}\n", "one variable at most", ""},
		{"Identity", "spiffeID: /a\nmatch: unix:uid:1\n", "must be of type array", ""},
		{"Identity", "spiffeID: /a\nmatch: [1]\n", "must be of type string", ""},
		{"Identity", "spiffeID: /a\nmatch: [uid]\n", "", "type:value"},
		{"Identity", "spiffeID: /a//b\nmatch: [unix:uid:1]\n", "", "spiffeID"},
		{"Identity", "spiffeID: /spire/server\nmatch: [unix:uid:1]\n", "", "spire"},
		{"Identity", "spiffeID: spiffe://other.example/a\nmatch: [unix:uid:1]\n", "", "other.example"},
		{"Identity", "spiffeID: /a\nmatch: [unix:uid:1]\nx509TTL: soon\n", "", "x509TTL"},
		{"Identity", "spiffeID: /a\nmatch: [unix:uid:1]\nexpiresAt: tomorrow\n", "", "expiresAt"},
		{"Identity", "spiffeID: /a\nmatch: [unix:uid:1]\ndnsNames: ['a b']\n", "", "dnsNames"},
		{"Identity", "spiffeID: /a\nmatch: [unix:uid:1]\nselectors: [x]\n", "", "unknown field"},
		{"Identity", "spiffeID: /a/{{ .k8s.secret }}\n", "", "k8s.secret"},
		{"Identity", "spiffeID: /a\nmatch: [unix:uid:1]\nname: other\n", "", "spec.name"},

		{"ClusterCallPolicy", "allow:\n- from: [/b]\n", "spec.service: Required", ""},
		{"ClusterCallPolicy", "service: /a\nmode: maybe\nallow: [{from: [/b]}]\n", `supported values: "enforce", "shadow"`, ""},
		{"ClusterCallPolicy", "service: /a\nallow:\n- {}\n", "from: Required", ""},
		{"ClusterCallPolicy", "service: /a\nallow:\n- from: []\n", "at least 1 items", ""},
		{"ClusterCallPolicy", "service: /a\nallow:\n- from: [/b]\n  http: []\n", "at least 1 items", ""},
		{"ClusterCallPolicy", "service: /a\nallow:\n- from: [/b]\n  http: [{}]\n", "at least 1 properties", ""},
		{"ClusterCallPolicy", "service: /a\nallow:\n- from: [/b]\n  http: [{paths: [/x]}]\n  grpc: [a.B/*]\n", "http and grpc exclude each other", ""},
		{"ClusterCallPolicy", "service: /a\ndeny:\n- from: [/b]\n  http: [{methods: []}]\n", "at least 1 items", ""},
		{"ClusterCallPolicy", allow + "  shadow: 'yes'\n", "must be of type boolean", ""},
		{"ClusterCallPolicy", "service: [" + strings.Repeat("/a, ", 3) + "5]\nallow: [{from: [/b]}]\n", "", "must be a string"},
		{"ClusterCallPolicy", "service: " + strings.Repeat("[", 40) + "/a" + strings.Repeat("]", 40) + "\nallow: [{from: [/b]}]\n", "", "nested deeper than 32 levels"},
		{"ClusterCallPolicy", "service: {id: /a}\nallow: [{from: [/b]}]\n", "", "service"},
		{"ClusterCallPolicy", "service: /a/*b\nallow: [{from: [/b]}]\n", "", "wildcard is a whole segment"},
		{"ClusterCallPolicy", "service: spiffe://other.example/a\nallow: [{from: [/b]}]\n", "", "other.example"},
		{"ClusterCallPolicy", "service: /a\nallow: [{from: [/**/b]}]\n", "", "can only be the last segment"},
		{"ClusterCallPolicy", allow + "  http: [{methods: [get]}]\n", "", "get"},
		{"ClusterCallPolicy", allow + "  http: [{paths: [x]}]\n", "", "spec.allow[0].http[0].paths[0]: "},
		{"ClusterCallPolicy", allow + "  http: [{metods: [GET], paths: [/x]}]\n", "", "unknown field"},
		{"ClusterCallPolicy", allow + "  grpc: [Method]\n", "", "spec.allow[0].grpc[0]: "},
		{"ClusterCallPolicy", allow + "  when: 'request.'\n", "", "when"},
		{"ClusterCallPolicy", allow + "  when: 'nobody.knows == 1'\n", "", "nobody"},
		{"ClusterCallPolicy", allow + "  unless: x\n", "", "unknown field"},

		{"CallPolicy", "service: /nobody\nallow: [{from: [/b]}]\n", "", "not of namespace"},
		{"CallPolicy", "service: /**\nallow: [{from: [/b]}]\n", "", "not of namespace"},

		{"Federation", fed, "spec.profile: Required", ""},
		{"Federation", fed + "profile: magic\n", "Unsupported value", ""},
		{"Federation", fed + "profile: https_spiffe\n", "needed with the profile https_spiffe", ""},
		{"Federation", fed + "profile: https_web\nendpointSPIFFEID: spiffe://a.example/b\n", "leave it out", ""},
		{"Federation", "trustDomain: partner.example\nbundleEndpointURL: http://partner.example/b\nprofile: https_web\n", "must begin with https://", ""},
		{"Federation", "trustDomain: example.org\nbundleEndpointURL: https://partner.example/b\nprofile: https_web\n", "", "this trust domain itself"},
		{"Federation", "trustDomain: PARTNER\nbundleEndpointURL: https://partner.example/b\nprofile: https_web\n", "", "trustDomain"},
		{"Federation", fed + "profile: https_web\nbundle: nonsense\n", "", "bundle"},

		{"Revocation", "reason: x\n", "exactly one of", ""},
		{"Revocation", "id: /a\njti: b\n", "exactly one of", ""},
		{"Revocation", "jti: a\nissuedBefore: 2026-01-01T00:00:00Z\n", "goes with id only", ""},
		{"Revocation", "id: a b\n", "", "spec.id: "},
		{"Revocation", "serial: xyz\n", "", "spec.serial: "},
		{"Revocation", "id: /a\nexpires: never\n", "", "expires"},
	} {
		name := fmt.Sprintf("bad-%02d", i)
		t.Run(tt.kind+" "+tt.spec, func(t *testing.T) {
			s := *s
			c := *s.cluster
			c.t, s.cluster = t, &c
			_, err := s.create(tt.kind, name, tt.spec)
			if tt.server != "" {
				if err == nil || !strings.Contains(err.Error(), tt.server) {
					t.Errorf("the API server says %v, want %q", err, tt.server)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			u := s.until(tt.kind, name, "it is judged", func(u *unstructured.Unstructured) bool { st, _, _ := accepted(u); return st != "" })
			st, reason, message := accepted(u)
			if st != "False" || !strings.Contains(message, tt.condition) {
				t.Errorf("the condition is %s %s %q, want a refusal that says %q", st, reason, message, tt.condition)
			}
			s.remove(tt.kind, name)
		})
	}
}

// A namespace speaks for services of its own pods, for as long as an Identity says which those are.
func TestResourcesOfANamespace(t *testing.T) {
	const policy = "service: /ns/%s/sa/api\nallow:\n- from: [/shop]\n"
	ctx := bounded(t)
	k := first(t, ctx)
	s := custom(t, ctx, k, k.kubeconfig, nil)
	s.mustCreate("CallPolicy", "own", fmt.Sprintf(policy, k.namespace))
	s.refused("CallPolicy", "own", "NotOfItsNamespace")
	s.mustCreate("Identity", "pods", "spiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}\n'on': ['k8s_psat:cluster:prod']\n")
	s.accepted("Identity", "pods")
	k.apply("apiVersion: signet-id.github.io/v1alpha1\nkind: Identity\nmetadata: {name: unquoted}\nspec:\n  spiffeID: /unquoted\n  match: [unix:uid:1]\n  on: [k8s_psat:cluster:prod]\n") // kubectl makes true of on
	s.accepted("Identity", "unquoted")
	if doc := s.document("Identity", "unquoted"); !strings.Contains(doc, "k8s_psat:cluster:prod") {
		t.Errorf("the CA holds %q", doc)
	}
	s.accepted("CallPolicy", "own") // by itself
	document := "prod_" + k.namespace + "_own"
	if s.document("CallPolicy", document) == "" {
		t.Error("the CA does not hold the policy")
	}
	s.mustCreate("CallPolicy", "other", fmt.Sprintf(policy, "bank"))
	if m := s.refused("CallPolicy", "other", "NotOfItsNamespace"); !strings.Contains(m, "/ns/"+k.namespace) {
		t.Errorf("the condition %q does not say where the namespace's services are", m)
	}
	// A policy that reaches out keeps what was accepted before, and no more.
	s.set("CallPolicy", "own", "service: /ns/**\nallow:\n- from: [/shop]\n", map[string]string{resources.AnnotationYes: "2"})
	if m := s.refused("CallPolicy", "own", "NotOfItsNamespace"); !strings.Contains(m, "stays in force") {
		t.Errorf("the condition %q does not say what is in force", m)
	}
	if doc := s.document("CallPolicy", document); !strings.Contains(doc, "/ns/"+k.namespace+"/sa/api") {
		t.Errorf("the CA holds %q", doc)
	}
	// Whose Identity vanishes loses its right, and its policy is withdrawn.
	s.remove("Identity", "pods")
	s.gone("CallPolicy", document)
}

// Two clusters in one trust domain that share a template: no namespace speaks for services that another cluster's has too.
func TestNamespacesOfTwoClusters(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	s := custom(t, ctx, k, k.kubeconfig, func(c *ca.Config) {
		c.Kubernetes.Clusters["stage"] = ca.KubernetesCluster{Kubeconfig: k.kubeconfig}
	})
	s.mustCreate("Identity", "pods", "spiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}\n")
	s.mustCreate("CallPolicy", "own", "service: /ns/"+k.namespace+"/sa/api\nallow:\n- from: [/shop]\n")
	if m := s.refused("CallPolicy", "own", "NotOfItsNamespace"); !strings.Contains(m, "{{ .k8s.cluster }}") && !strings.Contains(m, "no services") {
		t.Errorf("the condition says %q", m)
	}
	s.mustCreate("Identity", "named", "spiffeID: /c/{{ .k8s.cluster }}/{{ .k8s.ns }}/{{ .k8s.sa }}\n")
	s.accepted("Identity", "named")
	s.mustCreate("CallPolicy", "named", "service: /c/prod/"+k.namespace+"/api\nallow:\n- from: [/shop]\n")
	s.accepted("CallPolicy", "named")
	s.mustCreate("CallPolicy", "reaching", "service: /c/stage/"+k.namespace+"/api\nallow:\n- from: [/shop]\n")
	s.refused("CallPolicy", "reaching", "NotOfItsNamespace")
	list, err := s.of("CallPolicy", k.namespace).List(ctx, metav1.ListOptions{})
	if err != nil || len(list.Items) != 3 {
		t.Errorf("%d policies (%v), want 3", len(list.Items), err)
	}
}

// Who makes a resource so large that no status fits into it keeps nobody else from hearing what became of theirs, and the cluster from nothing.
func TestAResourceWithoutRoomForAStatus(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	k.allow()
	k.define()
	k.may("resources", resourceRules)
	s, p := k.sceneOf("resources: {}", "")
	p.start()
	fits, largest := 0, "" // bytes of padding that the API server takes
	for step := 1 << 20; step > 0; step /= 2 {
		name := fmt.Sprint("large-", step)
		_, err := s.create("CallPolicy", name, "service: /nobody\nallow: [{from: [/b]}]\npadding: "+strings.Repeat("x", fits+step)+"\n")
		if err == nil {
			fits, largest = fits+step, name
		} else if !strings.Contains(err.Error(), "too large") {
			t.Fatal(err)
		}
	}
	t.Logf("a resource may have %d bytes of padding", fits)
	for i := range 5 {
		name := fmt.Sprint("small-", i)
		s.mustCreate("ClusterCallPolicy", name, "service: /a\nallow: [{from: [/b]}]\n")
		s.accepted("ClusterCallPolicy", name)
	}
	k.until("the largest has an Event", func(out string, err error) bool { return err == nil && strings.Contains(out, "its text has more than") },
		"-n", k.namespace, "get", "events", "--field-selector=involvedObject.kind=CallPolicy,involvedObject.name="+largest, "-o", "jsonpath={.items[*].message}")
	if page := p.page("/ready"); !strings.HasPrefix(page, "200") || strings.Contains(page, "warning") {
		t.Errorf("/ready says %s", page)
	}
}
