package resources

import (
	"errors"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/policy"
)

func kindOf(name string) *Kind {
	for i := range Kinds {
		if Kinds[i].Kind == name {
			return &Kinds[i]
		}
	}
	panic(name)
}

func resourceOf(t testing.TB, kind, namespace, name, spec string) *wanted {
	t.Helper()
	u := &unstructured.Unstructured{Object: map[string]any{}}
	var fields map[string]any
	if err := yaml.Unmarshal([]byte(spec), &fields); err != nil {
		t.Fatal(err)
	}
	u.SetName(name)
	u.SetNamespace(namespace)
	u.Object["spec"] = fields
	return read("prod", kindOf(kind), u)
}

// Conditions name the field of the resource, wherever in the document that is made of it the mistake is.
func TestMistakesNameTheirField(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	for spec, want := range map[string]string{
		"service: /a\nallow:\n- from: [/b, /c*]\n":                                      "spec.allow[0].from[1]: ",
		"service: [/a, 5]\nallow:\n- from: [/b]\n":                                      "spec.service[1]: ",
		"service: /a\ndeny:\n- from: [/b]\n- from: [/c]\n  http: [{paths: [/ok, x]}]\n": "spec.deny[1].http[0].paths[1]: ",
		"service: /a\nallow:\n- from: [/b]\n  unless: x\n":                              "spec.allow[0].unless: ",
	} {
		w := resourceOf(t, "ClusterCallPolicy", "", "p", spec)
		if w.err != nil {
			t.Fatal(w.err)
		}
		_, err := policy.ParsePolicy(w.doc, td)
		if err == nil {
			t.Fatalf("%q is taken", spec)
		}
		if got := explain(w, err); !strings.Contains(got, want) || strings.Contains(got, "kubernetes/prod") {
			t.Errorf("%q: explained as %q, want %q in it and no file", spec, got, want)
		}
	}
}

// Who writes a resource chooses its keys, and somebody else shows what is wrong with it on a terminal.
func TestMistakesShowNoControlCharacters(t *testing.T) {
	for _, spec := range []string{"service: /a\n\"\\e[2J\\e]0;x\\a\": 1\n", "service: /a\nallow: [{\"\\u202ex\": {y: 1}}]\n"} {
		w := resourceOf(t, "ClusterCallPolicy", "", "p", spec)
		if w.err != nil {
			t.Fatal(w.err)
		}
		_, err := policy.ParsePolicy(w.doc, spiffeid.RequireTrustDomainFromString("example.org"))
		if err == nil {
			t.Fatalf("%q is taken", spec)
		}
		if got := explain(w, err); strings.ContainsAny(got, "\x1b\a\u202e") {
			t.Errorf("%q: explained as %q", spec, got)
		}
	}
}

func TestDocumentsOfResources(t *testing.T) {
	w := resourceOf(t, "CallPolicy", "web", "p.x", "service: /a\n")
	if w.err != nil || w.ref != (registry.Ref{Kind: "CallPolicy", Name: "prod_web_p.x"}) || w.file != "kubernetes/prod/CallPolicy/web/p.x" {
		t.Errorf("read = %+v", w)
	}
	if w := resourceOf(t, "ClusterCallPolicy", "", "p", "service: /a\nname: other\n"); w.err == nil {
		t.Error("a resource names its document itself")
	}
	if w := resourceOf(t, "CallPolicy", "web", strings.Repeat("p", 200), "service: /a\n"); w.err == nil || !strings.Contains(w.err.Error(), "metadata.name") {
		t.Errorf("a name that is too long: %v", w.err)
	}
	for _, spec := range []string{"spiffeID: /a\n\"true\": [x:y]\n", "spiffeID: /a\n\"on\": [x:y]\n"} { // kubectl makes true of on
		w := resourceOf(t, "Identity", "", "i", spec)
		e, err := registry.ParseIdentity(w.doc, spiffeid.RequireTrustDomainFromString("example.org"))
		if err == nil || w.err != nil || strings.Contains(err.Error(), "true") { // it has no match
			t.Errorf("%q reads as %v, %v, %v", spec, e, err, w.err)
		}
	}
	if w := resourceOf(t, "Identity", "", "i", "spiffeID: /a\n\"true\": [x:y]\n\"on\": [x:z]\n"); w.err == nil {
		t.Error("on is taken twice")
	}
}

// FuzzSpec: whatever is in a spec, the document is one, of the kind and name of the resource, and an explanation names no file.
func FuzzSpec(f *testing.F) {
	for _, s := range []string{"service: /a", "service: [\"a\\n---\\nkind: Identity\"]", "kind: x", "? [a]\n: b", "a: &x 1\nb: *x", "a: \"\\u2028\\0\"", "true: 1"} {
		f.Add("ClusterCallPolicy", s)
	}
	f.Fuzz(func(t *testing.T, kind, spec string) {
		var fields map[string]any
		if yaml.Unmarshal([]byte(spec), &fields) != nil {
			return
		}
		k := &Kinds[len(kind)%len(Kinds)]
		u := &unstructured.Unstructured{Object: map[string]any{"spec": fields}}
		u.SetName("x")
		w := read("prod", k, u)
		if w.err != nil {
			return
		}
		if got, err := registry.KindOf(w.doc); err != nil || got != k.Document {
			t.Errorf("%q becomes a document of kind %q (%v)", spec, got, err)
		}
		if got := explain(w, errors.New(w.file+":2:1: x "+w.file+":9:9: y")); strings.Contains(got, w.file) {
			t.Errorf("explained as %q", got)
		}
	})
}
