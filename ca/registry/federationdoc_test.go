package registry

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/spiffe"
)

var partner = spiffeid.RequireTrustDomainFromString("partner.example")

func indented(t testing.TB, file string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		t.Fatal(err)
	}
	return "  " + strings.ReplaceAll(strings.TrimSpace(string(b)), "\n", "\n  ") + "\n"
}

func federationText(name, trustDomain, url, rest string) string {
	return fmt.Sprintf("kind: Federation\nname: %s\ntrustDomain: %s\nbundleEndpointURL: %s\n%s", name, trustDomain, url, rest)
}

const web = "profile: https_web\n"

func TestPublishedSchemas(t *testing.T) {
	for _, kind := range []string{KindFederation, KindIdentity} {
		want, err := Schema(kind)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join("..", "..", "docs", "reference", "schemas", kind+".json")
		if flag.Lookup("update").Value.String() == "true" {
			if err := os.WriteFile(file, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not what the code says; run go test ./ca/registry -run Schema -update (%v)", file, err)
		}
	}
	if _, err := Schema("CallPolicy"); err == nil {
		t.Error("a schema for CallPolicy")
	}
}

// The bundle of a document is the one to begin with: what was fetched since stays, until the operator writes another one.
func TestBundleOfAFederationIsTheOneToBeginWith(t *testing.T) {
	r := replica(t, newStore(t), newClock().now)
	text := func(url, bundle string) string {
		return federationText("partner", "partner.example", url, "profile: https_spiffe\nendpointSPIFFEID: spiffe://partner.example/b\nbundle: |\n"+bundle)
	}
	sequence := func() uint64 {
		t.Helper()
		b, err := r.Bundle(partner)
		if err != nil {
			t.Fatal(err)
		}
		parsed, _, err := spiffe.ParseBundle(partner, b.Content)
		if err != nil {
			t.Fatal(err)
		}
		n, _ := parsed.SequenceNumber()
		return n
	}
	first := indented(t, "partner.json") // sequence 3
	apply(t, r, text("https://127.0.0.1:1/", first))
	if sequence() != 3 {
		t.Fatalf("begins with %d", sequence())
	}
	f, err := r.Federation(partner)
	if err != nil {
		t.Fatal(err)
	}
	have, err := r.Bundle(partner)
	if err != nil {
		t.Fatal(err)
	}
	fetched := bytes.Replace(have.Content, []byte(`"spiffe_sequence":3`), []byte(`"spiffe_sequence":7`), 1)
	if err := r.StoreFetched(t.Context(), f, have, fetched); err != nil {
		t.Fatal(err)
	}
	if p := plan(t, r, text("https://127.0.0.1:1/", first)); p.Changes[0].Action != Unchanged {
		t.Errorf("the same document again is %+v", p.Changes[0])
	}
	apply(t, r, text("https://127.0.0.1:2/", first))
	if sequence() != 7 {
		t.Errorf("another URL took the fetched bundle away: %d", sequence())
	}
	p := plan(t, r, text("https://127.0.0.1:2/", indented(t, "partner.pem")))
	if want := "bundle: another one to begin with"; len(p.Changes[0].Differences) != 1 || p.Changes[0].Differences[0] != want {
		t.Errorf("differences %q, want %q", p.Changes[0].Differences, want)
	}
	if _, err := r.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if sequence() != 0 {
		t.Errorf("another bundle to begin with did not replace the one that is there: %d", sequence())
	}
	if _, err := r.Apply(t.Context(), mustDelete(t, r, "partner")); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Bundle(partner); !errors.Is(err, ErrNotFound) {
		t.Errorf("the bundle outlived the relationship: %v", err)
	}
}

func mustDelete(t *testing.T, r *Registry, name string) *Plan {
	t.Helper()
	p, err := r.PlanDelete(KindFederation, name, false)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// A relationship that the API made keeps the bundle that was fetched for it when a document takes it over, which then owns it.
func TestFederationTakesOver(t *testing.T) {
	r := replica(t, newStore(t), newClock().now)
	content := []byte(strings.TrimSpace(indented(t, "partner.json")))
	if err := r.CreateFederation(t.Context(), &Federation{TrustDomain: partner, URL: "https://127.0.0.1:1/", Profile: ProfileWeb}, bytes.Replace(content, []byte(`"spiffe_sequence":3`), []byte(`"spiffe_sequence":9`), 1)); err != nil {
		t.Fatal(err)
	}
	made, err := r.Federation(partner)
	if err != nil {
		t.Fatal(err)
	}
	apply(t, r, federationText("p", "partner.example", "https://127.0.0.1:1/", web+"bundle: |\n"+indented(t, "partner.json")))
	if b, err := r.Bundle(partner); err != nil || !bytes.Contains(b.Content, []byte(`"spiffe_sequence":9`)) {
		t.Errorf("the bundle that was there is gone: %v", err)
	}
	taken, err := r.Federation(partner)
	if err != nil || taken.Document == nil || taken.Document.Name != "p" || !taken.CreatedAt.Equal(made.CreatedAt) {
		t.Fatalf("taken over: %+v %v", taken, err)
	}
	// The API: a call that changes nothing goes well, a bundle is taken as by hand, all else is refused.
	if _, err := r.UpdateFederation(t.Context(), partner, func(f *Federation) error { f.URL = taken.URL; return nil }, nil); err != nil {
		t.Error(err)
	}
	_, err = r.UpdateFederation(t.Context(), partner, func(f *Federation) error { f.URL = "https://127.0.0.1:2/"; return nil }, content)
	if v, ok := errors.AsType[*ValidationError](err); !ok || !strings.Contains(v.Problem, `belongs to Federation "p"`) {
		t.Errorf("changed through the API: %v", err)
	}
	if err := r.DeleteFederation(t.Context(), partner); err == nil || !strings.Contains(err.Error(), `belongs to Federation "p"`) {
		t.Errorf("deleted through the API: %v", err)
	}
	if _, err := r.UpdateFederation(t.Context(), partner, func(*Federation) error { return nil }, content); err != nil {
		t.Error(err)
	}
	if b, err := r.Bundle(partner); err != nil || !bytes.Contains(b.Content, []byte(`"spiffe_sequence":3`)) {
		t.Errorf("a bundle through the API: %v", err)
	}
}

// Endpoints may vouch for each other within one apply; circles without a beginning are refused.
func TestFederationsOfOneApplyKnowEachOther(t *testing.T) {
	spiffeOf := func(name, by string) string {
		return federationText(name, name+".example", "https://127.0.0.1:1/", "profile: https_spiffe\nendpointSPIFFEID: spiffe://"+by+".example/b\n")
	}
	r := replica(t, newStore(t), newClock().now)
	if _, err := tryPlan(r, spiffeOf("a", "b")+"---\n"+spiffeOf("b", "a")); err == nil || !strings.Contains(err.Error(), "in a circle") || !strings.Contains(err.Error(), "t.yaml:6:1") {
		t.Errorf("a circle: %v", err)
	}
	apply(t, r, spiffeOf("a", "b")+"---\n"+federationText("b", "b.example", "https://127.0.0.1:1/", web))
	if n := len(r.Federations()); n != 2 {
		t.Errorf("%d relationships", n)
	}
}

func TestFederationNames(t *testing.T) {
	r := replica(t, newStore(t), newClock().now)
	one := federationText("one", "one.example", "https://127.0.0.1:1/", web)
	apply(t, r, one)
	refused := func(text, want string) {
		t.Helper()
		if _, err := tryPlan(r, text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	refused(strings.Replace(one, "one.example", "two.example", 1), "cannot be changed")
	refused(strings.Replace(one, "name: one", "name: two", 1), `belongs to Federation "one"`)
	refused(one+"---\n"+strings.Replace(one, "name: one", "name: two", 1), `a Federation with "one.example" is in t.yaml:2:1 already`)
	refused(federationText("x", "x.example", "https://127.0.0.1:1/", web)+"---\n"+federationText("x", "y.example", "https://127.0.0.1:1/", web), `two Federations "x"`)
	// Two operators with one name at the same moment: one of them is told.
	a, b := plan(t, r, federationText("x", "x.example", "https://127.0.0.1:1/", web)), plan(t, r, federationText("x", "y.example", "https://127.0.0.1:1/", web))
	if _, err := r.Apply(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Apply(t.Context(), b); !errors.Is(err, ErrConflict) {
		t.Errorf("a second Federation of the name: %v", err)
	}
	// With prune, a new name is a change, and what nobody names goes.
	docs, err := strictyaml.Split([]byte(strings.Replace(one, "name: one", "name: uno", 1)), "t.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	p, err := r.Plan(docs, Options{Prune: true})
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Changes) != 2 || p.Changes[0].Action != Change || p.Changes[0].Differences[0] != "name: one -> uno" || p.Changes[1].Action != Delete || p.Changes[1].Name != "x" {
		t.Errorf("with prune: %+v", p.Changes)
	}
	if _, err := r.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if got, err := r.Resources(KindFederation, ""); err != nil || len(got) != 1 || got[0].Document.Name != "uno" {
		t.Errorf("left: %+v %v", got, err)
	}
}

// A hundred documents with bundles are more than one commit takes, which is said in a way that signet apply understands.
func TestManyFederationsAreTooMuchForOneCommit(t *testing.T) {
	r := replica(t, newStore(t), newClock().now)
	var all []string
	for i := range MaxDocuments {
		all = append(all, federationText(fmt.Sprint("f", i), fmt.Sprintf("f%d.example", i), "https://127.0.0.1:1/", web+"bundle: |\n"+indented(t, "partner.pem")))
	}
	if _, err := tryPlan(r, strings.Join(all, "---\n")); !errors.Is(err, ErrCommitTooLarge) {
		t.Errorf("100 with bundles: %v", err)
	}
	apply(t, r, strings.Join(all[:MaxDocuments/2], "---\n"))
}

// FuzzFederation: what parses holds what a relationship must, and its bundle can be read.
func FuzzFederation(f *testing.F) {
	for _, rest := range []string{web, web + "bundle: |\n" + indented(f, "partner.json"), web + "bundle: |\n" + indented(f, "partner.pem"), "profile: https_spiffe\nendpointSPIFFEID: spiffe://partner.example/b\n", "bundle: [x]\n"} {
		f.Add(federationText("partner", "partner.example", "https://partner.example/", rest))
	}
	f.Fuzz(func(t *testing.T, s string) {
		docs, err := strictyaml.Split([]byte(s), "f.yaml", 1)
		if err != nil {
			return
		}
		for _, doc := range docs {
			got, bundle, err := ParseFederation(doc, td)
			if err != nil {
				if _, ok := errors.AsType[strictyaml.Errors](err); !ok {
					t.Fatalf("an error without a place: %v", err)
				}
				continue
			}
			if err := got.validate(td); err != nil {
				t.Errorf("%q is taken, but %v", s, err)
			}
			if bundle != nil {
				if b, _, err := spiffe.ParseBundle(got.TrustDomain, bundle); err != nil || b.Empty() {
					t.Errorf("the bundle of %q: %v", s, err)
				}
			}
		}
	})
}
