package registry

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/signet-id/signet/internal/strictyaml"
)

const ofProd = "kubernetes/prod/resources"

func planOf(r *Registry, text string, o Options) (*Plan, error) {
	docs, err := strictyaml.Split([]byte(text), "test.yaml", 1)
	if err != nil {
		return nil, err
	}
	return r.Plan(docs, o)
}

func applyOf(t testing.TB, r *Registry, text string, o Options) {
	t.Helper()
	p, err := planOf(r, text, o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
}

// one is a document of each kind that can come from elsewhere.
var one = map[string]string{
	KindIdentity:   "kind: Identity\nname: a\nspiffeID: /a\nmatch: [unix:uid:1]\n",
	KindCallPolicy: "kind: CallPolicy\nname: a\nservice: /a\nallow:\n- from: [/b]\n",
	KindRevocation: "kind: Revocation\nname: a\nid: /a\n",
	KindFederation: "kind: Federation\nname: a\ntrustDomain: a.example\nbundleEndpointURL: https://a.example/\nprofile: https_web\n",
	KindUserIssuer: "kind: UserIssuer\nname: a\nissuer: https://a.example\naudience: [x]\njwksURL: https://a.example/keys\n",
}

func TestADocumentBelongsToWhoMadeIt(t *testing.T) {
	for kind, text := range one {
		for _, owners := range [][2]string{{ofProd, ""}, {"", ofProd}, {ofProd, "kubernetes/other/resources"}} {
			t.Run(kind+" of "+owners[0]+" against "+owners[1], func(t *testing.T) {
				r := open(t)
				ref := Ref{kind, "a"}
				applyOf(t, r, text, Options{Owner: owners[0], Definitions: map[Ref]string{ref: "uid"}})
				if d, ok := r.Owned(owners[0])[ref]; !ok || d.Document.Definition != "uid" {
					t.Fatalf("%q owns %v, with definition %q", owners[0], ok, d.Document.Definition)
				}
				_, err := planOf(r, text, Options{Owner: owners[1]})
				o, ok := errors.AsType[*OwnedError](err)
				if !ok || o.Document.Owner != owners[0] || !strings.Contains(err.Error(), "test.yaml:2:1") {
					t.Errorf("the other's document = %v, want an OwnedError that names the place", err)
				}
				p, err := planOf(r, strings.ReplaceAll(text, "name: a", "name: b"), Options{Owner: owners[1], Prune: true})
				if err == nil && slices.ContainsFunc(p.Changes, func(c PlannedChange) bool { return c.Action == Delete }) {
					t.Errorf("the other's prune deletes it: %+v", p.Changes)
				}
				if err == nil && (kind == KindIdentity || kind == KindFederation) {
					t.Error("the other's document takes its place by a prune that does not delete it")
				}
				p, err = planOf(r, "kind: PolicyDefaults\nmode: deny\n", Options{Owner: owners[1], Delete: []Ref{ref}})
				if err != nil || len(p.Changes) != 1 {
					t.Errorf("the other's deletion plans %+v, %v", p, err)
				}
			})
		}
	}
}

func TestDeletingADocumentOfACustomResource(t *testing.T) {
	for kind, text := range one {
		t.Run(kind, func(t *testing.T) {
			r := open(t)
			applyOf(t, r, text, Options{Owner: ofProd})
			if _, err := r.PlanDelete(kind, "a", false); err == nil || !strings.Contains(err.Error(), "kubectl") || !strings.Contains(err.Error(), "--yes") {
				t.Errorf("PlanDelete = %v, want a refusal that names both ways", err)
			}
			if _, err := r.PlanDelete(kind, "a", true); err != nil {
				t.Errorf("PlanDelete of any = %v", err)
			}
			// Deleted and made anew under another name by one plan, as its owner may.
			p, err := r.Plan(nil, Options{Owner: ofProd, Delete: []Ref{{kind, "a"}, {kind, "absent"}}})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := r.Apply(t.Context(), p); err != nil {
				t.Fatal(err)
			}
			if left := r.Owned(ofProd); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// A resource that was made anew after its definition was is written again: else nobody would notice that it is deleted later.
func TestAnotherDefinitionIsAChange(t *testing.T) {
	for kind, text := range one {
		t.Run(kind, func(t *testing.T) {
			r := open(t)
			ref := Ref{kind, "a"}
			applyOf(t, r, text, Options{Owner: ofProd, Definitions: map[Ref]string{ref: "first"}})
			for _, uid := range []string{"first", "second", "second"} {
				before := r.Revision()
				had := r.Owned(ofProd)[ref].Document.Definition
				applyOf(t, r, text, Options{Owner: ofProd, Definitions: map[Ref]string{ref: uid}})
				if changed := r.Revision() != before; changed != (uid != had) {
					t.Errorf("definition %s after %s: changed %v", uid, had, changed)
				}
			}
		})
	}
}

func TestACustomResourceMakesNoAdmin(t *testing.T) {
	const text = "kind: Identity\nname: a\nspiffeID: /a\nmatch: [unix:uid:1]\nadmin: true\n"
	r := open(t)
	if _, err := planOf(r, text, Options{Owner: ofProd}); err == nil || !strings.Contains(err.Error(), "test.yaml:5:1: admin is true") {
		t.Errorf("Plan = %v, want a refusal at test.yaml:5:1", err)
	}
	if _, err := planOf(r, text, Options{}); err != nil {
		t.Errorf("an operator's: %v", err)
	}
}
