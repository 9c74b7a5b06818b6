//go:build kube

package kube

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/ca/kube/resources"
	"github.com/signet-id/signet/test/signettest"
)

const definitionFiles = "../../deploy/helm/signet/files/crds"

// A scene is a CA that reads the custom resources of a cluster.
type scene struct {
	*cluster
	dyn   dynamic.Interface
	admin adminv1.AdminClient
	ca    *signettest.Signet
}

// custom starts a CA that reads the custom resources at the end of a kubeconfig, and installs their definitions.
func custom(t *testing.T, ctx context.Context, k *cluster, kubeconfig string, change func(*ca.Config)) *scene {
	t.Helper()
	k.define()
	if _, err := k.try("", "create", "namespace", "signet-system"); err != nil && !strings.Contains(err.Error(), "AlreadyExists") {
		t.Fatal(err)
	}
	client, err := kube.Open("prod", k.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	s := signettest.Start(t, signettest.Config{CA: func(c *ca.Config) {
		c.Kubernetes.Clusters = map[string]ca.KubernetesCluster{"prod": {Kubeconfig: kubeconfig, Resources: &ca.KubernetesResources{}}}
		if change != nil {
			change(c)
		}
	}})
	return &scene{cluster: k, dyn: client.Dynamic, admin: adminv1.NewAdminClient(s.AdminConn()), ca: s}
}

// define installs the definitions and takes all custom resources away afterwards.
func (k *cluster) define() {
	k.t.Helper()
	k.kubectl("apply", "-f", definitionFiles)
	k.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", definitionFiles)
	k.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		k.ctx = ctx
		for _, kind := range resources.Kinds {
			if kind.Namespaced {
				k.kubectl("delete", kind.Plural+"."+resources.Group, "--all", "-A", "--ignore-not-found")
			} else { // one request, however many there are
				k.kubectl("delete", "--raw", "/apis/"+resources.Group+"/"+resources.Version+"/"+kind.Plural)
			}
		}
	})
}

// object reads a resource of ours; its fields are those of the document, below spec.
func object(t *testing.T, kind, namespace, name, spec string) *unstructured.Unstructured {
	t.Helper()
	u := &unstructured.Unstructured{Object: map[string]any{}}
	var fields map[string]any
	if err := yaml.Unmarshal([]byte(spec), &fields); err != nil {
		t.Fatal(err)
	}
	u.SetAPIVersion(resources.Group + "/" + resources.Version)
	u.SetKind(kind)
	u.SetName(name)
	u.SetNamespace(namespace)
	u.Object["spec"] = fields
	return u
}

func (s *scene) of(kind, namespace string) dynamic.ResourceInterface {
	for _, k := range resources.Kinds {
		if k.Kind == kind {
			r := s.dyn.Resource(schema.GroupVersionResource{Group: resources.Group, Version: resources.Version, Resource: k.Plural})
			if k.Namespaced {
				return r.Namespace(namespace)
			}
			return r
		}
	}
	panic("no kind " + kind)
}

// create makes a resource, strictly, as kubectl does.
func (s *scene) create(kind, name, spec string) (*unstructured.Unstructured, error) {
	ns := s.namespaceOf(kind)
	return s.of(kind, ns).Create(s.ctx, object(s.t, kind, ns, name, spec), metav1.CreateOptions{FieldValidation: metav1.FieldValidationStrict})
}

func (s *scene) namespaceOf(kind string) string {
	if kind == "CallPolicy" {
		return s.namespace
	}
	return ""
}

// set gives a resource another spec.
func (s *scene) set(kind, name, spec string, annotations map[string]string) {
	s.t.Helper()
	have, err := s.of(kind, s.namespaceOf(kind)).Get(s.ctx, name, metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	next := object(s.t, kind, s.namespaceOf(kind), name, spec)
	next.SetResourceVersion(have.GetResourceVersion())
	next.SetAnnotations(annotations)
	if _, err := s.of(kind, s.namespaceOf(kind)).Update(s.ctx, next, metav1.UpdateOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

// until waits until a resource is as it should be, and returns it.
func (s *scene) until(kind, name, what string, ok func(*unstructured.Unstructured) bool) *unstructured.Unstructured {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
	defer cancel()
	w, err := s.of(kind, s.namespaceOf(kind)).Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name})
	if err != nil {
		s.t.Fatal(err)
	}
	defer w.Stop()
	last := &unstructured.Unstructured{}
	for {
		select {
		case e := <-w.ResultChan():
			u, isObject := e.Object.(*unstructured.Unstructured)
			if !isObject || e.Type == watch.Deleted {
				s.t.Fatalf("%s %s: waiting until %s, the watch says %s; its last status is %v", kind, name, what, e.Type, last.Object["status"])
			}
			if last = u; ok(u) {
				return u
			}
		case <-ctx.Done():
			s.t.Fatalf("%s %s: waited in vain until %s; its status is %v", kind, name, what, last.Object["status"])
		}
	}
}

// accepted returns the condition for the present generation; nothing if there is none yet.
func accepted(u *unstructured.Unstructured) (status, reason, message string) {
	list, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions")
	for _, c := range list {
		m := c.(map[string]any)
		if m["type"] == "Accepted" && m["observedGeneration"] == u.GetGeneration() {
			return m["status"].(string), m["reason"].(string), m["message"].(string)
		}
	}
	return "", "", ""
}

func (s *scene) accepted(kind, name string) *unstructured.Unstructured {
	s.t.Helper()
	return s.until(kind, name, "it is accepted", func(u *unstructured.Unstructured) bool { st, _, _ := accepted(u); return st == "True" })
}

func (s *scene) refused(kind, name, reason string) string {
	s.t.Helper()
	u := s.until(kind, name, "it is refused as "+reason, func(u *unstructured.Unstructured) bool { st, r, _ := accepted(u); return st == "False" && r == reason })
	_, _, message := accepted(u)
	return message
}

func (s *scene) mustCreate(kind, name, spec string) {
	s.t.Helper()
	if _, err := s.create(kind, name, spec); err != nil {
		s.t.Fatal(err)
	}
}

func (s *scene) remove(kind, name string) {
	s.t.Helper()
	if err := s.of(kind, s.namespaceOf(kind)).Delete(s.ctx, name, metav1.DeleteOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

// document returns what the CA holds, "" if nothing.
func (s *scene) document(kind, name string) string {
	out, err := s.admin.GetResources(s.ctx, &adminv1.GetResourcesRequest{Kind: kind, Name: name})
	if err != nil {
		return ""
	}
	return string(out.Resources[0].Document.Content)
}

// gone waits until the CA holds no such document.
func (s *scene) gone(kind, name string) {
	s.t.Helper()
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for s.document(kind, name) != "" {
		select {
		case <-ticker.C:
		case <-s.ctx.Done():
			s.t.Fatalf("%s %s is still there", kind, name)
		}
	}
}

func TestResourcesAreDocuments(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	s := custom(t, ctx, k, k.kubeconfig, nil)

	s.mustCreate("Identity", "web", "spiffeID: /web\nmatch: [unix:uid:1001]\nx509TTL: 30m\n")
	s.mustCreate("ClusterCallPolicy", "web", "service: /web\nallow:\n- from: [/shop, /admin/**]\n  http: [{methods: [GET], paths: [/v1/**]}]\n- from: [/shop]\n  grpc: [pkg.Service/*]\n  when: request.path.endsWith(\"/Get\")\ndeny:\n- from: [/bad]\n")
	s.mustCreate("Federation", "partner", "trustDomain: partner.example\nbundleEndpointURL: https://partner.example/bundle\nprofile: https_web\n")
	s.mustCreate("Revocation", "stolen", "id: /stolen\nreason: stolen laptop\n")
	for _, kind := range []string{"Identity", "Federation", "Revocation", "ClusterCallPolicy"} {
		name := map[string]string{"Identity": "web", "ClusterCallPolicy": "web", "Federation": "partner", "Revocation": "stolen"}[kind]
		u := s.accepted(kind, name)
		if rev, _, _ := unstructured.NestedInt64(u.Object, "status", "revision"); rev == 0 {
			t.Errorf("%s %s has no revision", kind, name)
		}
		if doc := s.document(strings.TrimPrefix(kind, "Cluster"), name); !strings.Contains(doc, "name: \""+name+"\"") {
			t.Errorf("%s %s: the CA holds %q", kind, name, doc)
		}
	}
	p := s.accepted("ClusterCallPolicy", "web")
	if a, _, _ := unstructured.NestedInt64(p.Object, "status", "allow"); a != 2 {
		t.Errorf("the policy has %d allows, want 2", a)
	}
	table := k.kubectl("get", "clustercallpolicies,revocations,identities,federations")
	for _, want := range []string{"ALLOW", "/web", "Applied", "id spiffe://example.org/stolen", "partner.example"} {
		if !strings.Contains(table, want) {
			t.Errorf("kubectl get does not show %q:\n%s", want, table)
		}
	}

	// What is changed is changed; what is changed into something bad stays as it was, and says so.
	s.set("ClusterCallPolicy", "web", "service: /web\nallow:\n- from: [/shop, /other]\n", nil)
	s.accepted("ClusterCallPolicy", "web")
	if doc := s.document("CallPolicy", "web"); !strings.Contains(doc, "/other") {
		t.Errorf("after a change the CA holds %q", doc)
	}
	s.set("ClusterCallPolicy", "web", "service: /web\nallow:\n- from: [/a*b]\n", nil)
	message := s.refused("ClusterCallPolicy", "web", "Invalid")
	for _, want := range []string{"/a*b", "wildcard is a whole segment", "stays in force"} {
		if !strings.Contains(message, want) {
			t.Errorf("the condition %q does not say %q", message, want)
		}
	}
	if strings.Contains(message, "kubernetes/prod") {
		t.Errorf("the condition %q names a text that its author never saw", message)
	}
	if doc := s.document("CallPolicy", "web"); !strings.Contains(doc, "/other") {
		t.Errorf("after a bad change the CA holds %q", doc)
	}
	event := func(kind, text string) {
		t.Helper()
		k.until("an Event of type "+kind+" says "+text, func(out string, err error) bool { return err == nil && strings.Contains(out, text) },
			"get", "events", "-n", "default", "--field-selector=involvedObject.kind=ClusterCallPolicy,involvedObject.name=web,type="+kind, "-o", "jsonpath={.items[*].message}")
	}
	event("Warning", "/a*b")
	s.set("ClusterCallPolicy", "web", "service: /web\nallow:\n- from: [/shop, /other]\n", nil)
	s.accepted("ClusterCallPolicy", "web")
	event("Normal", "in force as it is written here")

	// The audit log says who.
	found := auditOf(t, s, "kubernetes/prod/ClusterCallPolicy/web")
	if !strings.Contains(found, "resource.create") || !strings.Contains(found, "resource.change") || !strings.Contains(found, "refused") {
		t.Errorf("the audit log says %s", found)
	}

	// What is deleted is deleted, but for Revocations, which are lifted.
	s.remove("ClusterCallPolicy", "web")
	s.remove("Identity", "web")
	s.remove("Federation", "partner")
	s.gone("CallPolicy", "web")
	s.gone("Identity", "web")
	s.gone("Federation", "partner")
	s.remove("Revocation", "stolen")
	s.mustCreate("Revocation", "another", "jti: abc\n")
	s.accepted("Revocation", "another") // whatever came before is done
	if s.document("Revocation", "stolen") == "" {
		t.Error("a Revocation was lifted by the deletion of its resource")
	}
	s.mustCreate("Revocation", "stolen", "id: /stolen\nreason: stolen laptop\n")
	s.accepted("Revocation", "stolen")
	s.set("Revocation", "stolen", "id: /stolen\nreason: stolen laptop\n", map[string]string{resources.AnnotationLift: "true"})
	s.gone("Revocation", "stolen")
	s.refused("Revocation", "stolen", "Lifted")
}

// auditOf returns event and outcome of the records of an actor.
func auditOf(t *testing.T, s *scene, actor string) string {
	t.Helper()
	stream, err := s.admin.SearchAudit(s.ctx, &adminv1.SearchAuditRequest{Text: actor})
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for {
		r, err := stream.Recv()
		if err != nil {
			return strings.Join(found, "; ")
		}
		found = append(found, string(r.Json))
	}
}

// An API server that is away leaves everything as it is; what happened meanwhile is made up for.
func TestResourcesWhileTheAPIServerIsAway(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	w := newWire(t, k.kubeconfig)
	s := custom(t, ctx, k, w.kubeconfig, nil)
	s.mustCreate("ClusterCallPolicy", "stays", "service: /a\nallow:\n- from: [/b]\n")
	s.mustCreate("ClusterCallPolicy", "goes", "service: /c\nallow:\n- from: [/b]\n")
	s.accepted("ClusterCallPolicy", "stays")
	s.accepted("ClusterCallPolicy", "goes")
	w.setCut(true)
	for { // until the CA has noticed
		got, err := healthv1.NewHealthClient(s.ca.AdminConn()).Check(ctx, &healthv1.HealthCheckRequest{Service: "kubernetes/prod"})
		if err != nil {
			t.Fatal(err)
		}
		if got.Status == healthv1.HealthCheckResponse_NOT_SERVING {
			break
		}
		pause(t, ctx)
	}
	s.remove("ClusterCallPolicy", "goes")
	s.mustCreate("ClusterCallPolicy", "comes", "service: /d\nallow:\n- from: [/b]\n")
	if s.document("CallPolicy", "goes") == "" || s.document("CallPolicy", "stays") == "" {
		t.Error("documents are gone while the API server is away")
	}
	w.setCut(false)
	s.accepted("ClusterCallPolicy", "comes")
	s.gone("CallPolicy", "goes")
	if s.document("CallPolicy", "stays") == "" {
		t.Error("a document is gone that nobody deleted")
	}
}

// Who deletes definitions deletes no policy: nothing is opened or closed by it. A resource that comes back is the same again.
func TestDefinitionsDeletedUnderTheController(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	s := custom(t, ctx, k, k.kubeconfig, nil)
	specs := map[string]string{
		"Identity": "spiffeID: /web\nmatch: [unix:uid:1001]\n", "ClusterCallPolicy": "service: /web\nallow:\n- from: [/shop]\n",
		"Federation": "trustDomain: partner.example\nbundleEndpointURL: https://partner.example/bundle\nprofile: https_web\n", "Revocation": "id: /stolen\n",
	}
	for kind, spec := range specs {
		s.mustCreate(kind, "x", spec)
		s.accepted(kind, "x")
	}
	held := func(when string) {
		t.Helper()
		for kind := range specs {
			if s.document(strings.TrimPrefix(kind, "Cluster"), "x") == "" {
				t.Errorf("%s: the %s is gone", when, kind)
			}
		}
	}
	k.kubectl("delete", "-f", definitionFiles)
	held("definitions deleted")
	k.define()
	// A resource of each kind that is made now has been read, and so has the list in which the others are missing.
	for kind, spec := range specs {
		s.mustCreate(kind, "after", strings.NewReplacer("/web", "/after", "partner.example", "after.example", "/stolen", "/after").Replace(spec))
		s.accepted(kind, "after")
	}
	held("definitions made anew")
	for kind, spec := range specs {
		s.mustCreate(kind, "x", spec)
		s.accepted(kind, "x")
		s.remove(kind, "x")
	}
	for kind := range specs {
		if kind != "Revocation" { // which stays until it is lifted
			s.gone(strings.TrimPrefix(kind, "Cluster"), "x")
		}
	}
}

// Documents of operators and of custom resources do not get into each other's way.
func TestResourcesAndOperators(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	s := custom(t, ctx, k, k.kubeconfig, nil)
	s.ca.Apply("kind: CallPolicy\nname: theirs\nservice: /web\nallow:\n- from: [/ops]\n")
	s.mustCreate("ClusterCallPolicy", "theirs", "service: /web\nallow:\n- from: [/shop]\n")
	if m := s.refused("ClusterCallPolicy", "theirs", "NameTaken"); !strings.Contains(m, "applied by an operator") || !strings.Contains(m, "signet delete") {
		t.Errorf("the condition %q does not say what to do", m)
	}
	s.mustCreate("ClusterCallPolicy", "ours", "service: /web\nallow:\n- from: [/shop]\n")
	s.accepted("ClusterCallPolicy", "ours")
	apply := func(doc string, prune bool) error {
		_, err := s.admin.Apply(ctx, &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(doc), File: "a.yaml", Line: 1}}, Prune: prune, Yes: true})
		return err
	}
	if err := apply("kind: CallPolicy\nname: ours\nservice: /web\nallow:\n- from: [/ops]\n", false); err == nil || !strings.Contains(err.Error(), "kubernetes/prod/ClusterCallPolicy/ours") {
		t.Errorf("an operator's apply = %v, want a refusal that names the custom resource", err)
	}
	if err := apply("kind: CallPolicy\nname: other\nservice: /web\nallow:\n- from: [/ops]\n", true); err != nil {
		t.Fatal(err)
	}
	if s.document("CallPolicy", "ours") == "" {
		t.Error("an operator's prune deleted the custom resource's document")
	}
	// The operator's own went by it, and the name is free: the resource gets it by itself.
	s.accepted("ClusterCallPolicy", "theirs")
	if _, err := s.admin.DeleteResource(ctx, &adminv1.DeleteResourceRequest{Kind: "CallPolicy", Name: "ours"}); err == nil || !strings.Contains(err.Error(), "kubectl") {
		t.Errorf("an operator's delete = %v, want a refusal that says kubectl", err)
	}
}

// What needs --yes at the command line needs an annotation, which counts for one generation.
func TestResourcesThatNeedAYes(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	s := custom(t, ctx, k, k.kubeconfig, nil)
	s.mustCreate("Identity", "a", "spiffeID: /a\nmatch: [unix:uid:1001]\n")
	s.accepted("Identity", "a")
	s.mustCreate("Revocation", "all", "id: /**\n")
	if m := s.refused("Revocation", "all", "NeedsYes"); !strings.Contains(m, resources.AnnotationYes+"=1") {
		t.Errorf("the condition %q does not name the annotation", m)
	}
	s.set("Revocation", "all", "id: /**\nreason: really\n", map[string]string{resources.AnnotationYes: "1"})
	s.refused("Revocation", "all", "NeedsYes") // it is generation 2
	s.set("Revocation", "all", "id: /**\nreason: really\n", map[string]string{resources.AnnotationYes: "2"})
	s.accepted("Revocation", "all")
}

// A thousand resources, of which some are bad; those are refused alone.
func TestManyResources(t *testing.T) {
	const n = 1000
	ctx := bounded(t)
	k := first(t, ctx)
	s := custom(t, ctx, k, k.kubeconfig, nil)
	begin := time.Now()
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for i := worker; i < n; i += 8 {
				from := "/caller"
				if i%100 == 7 {
					from = "/a*b"
				}
				if _, err := s.create("ClusterCallPolicy", fmt.Sprintf("p%04d", i), fmt.Sprintf("service: /s%d\nallow:\n- from: [%s]\n", i, from)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	created := time.Since(begin)
	for i := range n {
		name := fmt.Sprintf("p%04d", i)
		if i%100 == 7 {
			s.refused("ClusterCallPolicy", name, "Invalid")
		} else {
			s.accepted("ClusterCallPolicy", name)
		}
	}
	t.Logf("%d resources created in %s, all judged and their status written after %s", n, created, time.Since(begin))
	out, err := s.admin.GetStatus(ctx, &adminv1.GetStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if out.Policies != n-n/100 {
		t.Errorf("the CA holds %d policies, want %d", out.Policies, n-n/100)
	}
}

// Of two replicas one reads the resources; when it ends, the other one does.
func TestOneReplicaReadsResources(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	a := custom(t, ctx, k, k.kubeconfig, nil)
	a.mustCreate("ClusterCallPolicy", "one", "service: /web\nallow:\n- from: [/shop]\n")
	a.accepted("ClusterCallPolicy", "one")
	b := custom(t, ctx, k, k.kubeconfig, nil)
	a.mustCreate("ClusterCallPolicy", "two", "service: /web\nallow:\n- from: [/shop]\n")
	a.accepted("ClusterCallPolicy", "two")
	if b.document("CallPolicy", "one") != "" || b.document("CallPolicy", "two") != "" {
		t.Error("the second replica reads resources while the first leads")
	}
	if err := a.ca.StopCA(); err != nil {
		t.Fatal(err)
	}
	b.mustCreate("ClusterCallPolicy", "three", "service: /web\nallow:\n- from: [/shop]\n")
	b.accepted("ClusterCallPolicy", "three")
	for _, name := range []string{"one", "two", "three"} {
		if b.document("CallPolicy", name) == "" {
			t.Errorf("the second replica does not hold %s after it took over", name)
		}
	}
}

// The examples of the page are what an API server and a CA take.
func TestDocumentedResources(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	s := custom(t, ctx, k, k.kubeconfig, nil)
	page, err := os.ReadFile(filepath.FromSlash("../../docs/kubernetes/resources.md"))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, block := range strings.Split(string(page), "```") {
		text, ok := strings.CutPrefix(block, "yaml\n")
		if !ok || !strings.Contains(text, "apiVersion: "+resources.Group) {
			continue
		}
		for _, doc := range strings.Split(text, "\n---\n") {
			var u unstructured.Unstructured
			if err := yaml.Unmarshal([]byte(doc), &u.Object); err != nil {
				t.Fatal(err)
			}
			if u.GetNamespace() != "" {
				continue // needs pods; TestResourcesOfANamespace has it
			}
			n++
			k.apply(doc)
			s.accepted(u.GetKind(), u.GetName())
		}
	}
	if n < 4 {
		t.Errorf("the page has %d examples", n)
	}
}
