package registry

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/spiffe"
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

// Nor by the SPIFFE ID that an operator gave to an admin, to a CA below, to a group of nodes, or to what entries descend from: whoever
// has such an ID has those rights.
func TestACustomResourceHasNoIDWithMoreRights(t *testing.T) {
	r := open(t)
	applyOf(t, r, "kind: Identity\nname: root\nspiffeID: /ops/root\nmatch: [unix:uid:0]\nadmin: true\n", Options{})
	sel := []spiffe.Selector{{Type: "unix", Value: "uid:0"}}
	node := spiffeid.RequireFromPath(td, "/spire/agent/x509pop/one")
	for _, e := range []*Entry{
		{SPIFFEID: spiffeid.RequireFromPath(td, "/region/ca"), ParentID: node, Selectors: sel, Downstream: true},
		{SPIFFEID: spiffeid.RequireFromPath(td, "/racks/one"), ParentID: ServerID(td), Selectors: sel},
		{SPIFFEID: spiffeid.RequireFromPath(td, "/child"), ParentID: spiffeid.RequireFromPath(td, "/parent"), Selectors: sel},
	} {
		if got := r.CreateEntries(t.Context(), []*Entry{e})[0]; got.Err != nil {
			t.Fatal(got.Err)
		}
	}
	const text = "kind: Identity\nname: evil\nspiffeID: %s\nmatch: [k8s:ns:evil]\n"
	r.c.Admins = func() []spiffeid.ID { return []spiffeid.ID{spiffeid.RequireFromPath(td, "/people/alice")} }
	for id, want := range map[string]string{"/people/alice": "that of an admin by the CA's configuration", "/ops/root": "that of an admin by Identity root", "/region/ca": "that of a downstream CA", "/racks/one": "that of a group of nodes", "/parent": "the parent of other entries"} {
		_, err := planOf(r, fmt.Sprintf(text, id), Options{Owner: ofProd})
		if err == nil || !strings.Contains(err.Error(), "test.yaml:3:1: spiffeID: ") || !strings.Contains(err.Error(), want) {
			t.Errorf("%s for a custom resource: %v, want a refusal at its place that says it is %s", id, err, want)
		}
		if _, err := planOf(r, fmt.Sprintf(text, id), Options{}); err != nil {
			t.Errorf("%s for an operator: %v", id, err)
		}
	}
	// An operator who makes an admin of an ID that a custom resource has must say yes, and the resource stays as it is.
	applyOf(t, r, fmt.Sprintf(text, "/web"), Options{Owner: ofProd})
	const admin = "kind: Identity\nname: web\nspiffeID: /web\nmatch: [unix:uid:0]\nadmin: true\n"
	p, err := planOf(r, admin, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.NeedsYes(); err == nil || !strings.Contains(err.Error(), "whoever has spiffe://example.org/web by Identity evil") {
		t.Errorf("NeedsYes = %v", err)
	}
	applyOf(t, r, admin, Options{})
	if _, err := planOf(r, fmt.Sprintf(text, "/web"), Options{Owner: ofProd}); err != nil {
		t.Errorf("the resource as it is: %v", err)
	}
}

// A relationship that an operator made without a document is no custom resource's: it would say where the partner's authorities come from.
func TestACustomResourceTakesNoRelationship(t *testing.T) {
	r := open(t)
	if err := r.CreateFederation(t.Context(), &Federation{TrustDomain: spiffeid.RequireTrustDomainFromString("a.example"), URL: "https://operators.example/", Profile: ProfileWeb}, nil); err != nil {
		t.Fatal(err)
	}
	text := one[KindFederation]
	_, err := planOf(r, text, Options{Owner: ofProd})
	if _, ok := errors.AsType[*OwnedError](err); !ok || !strings.Contains(err.Error(), "\"a.example\" is an operator's, made with 'signet federation'") {
		t.Errorf("of a custom resource: %v", err)
	}
	for what, o := range map[string]Options{"an operator's document": {}, "who made it by the API": {Owner: "kubernetes/prod/spire", TakesOver: true}} {
		if p, err := planOf(r, text, o); err != nil || len(p.Changes) != 1 || p.Changes[0].Action == Create {
			t.Errorf("%s: %v, %+v", what, err, p)
		}
	}
}
