package registry

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/signet-id/signet/internal/strictyaml"
)

// bulky is a CallPolicy that has about size bytes in compiled form, in half as many bytes of text as it may have for one commit.
func bulky(t *testing.T, name, service string, size int) []strictyaml.Document {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "kind: CallPolicy\nname: %s\nservice: %s\nallow:\n", name, service)
	segment := strings.Repeat("c", 250)
	for n := range max(1, size/(8*280)) {
		b.WriteString("  - from: [")
		for m := range 8 {
			fmt.Fprintf(&b, "/%s-%d-%d, ", segment, n, m)
		}
		b.WriteString("]\n")
	}
	docs, err := strictyaml.Split([]byte(b.String()), "bulk.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	return docs
}

func applyAll(t *testing.T, r *Registry, docs []strictyaml.Document) error {
	t.Helper()
	p, err := r.Plan(docs, Options{})
	if err == nil {
		_, err = r.Apply(t.Context(), p)
	}
	return err
}

const bulk = 400 << 10

// fill applies policies until a service is full, and returns how many that were.
func fill(t *testing.T, r *Registry, prefix, service string) (n int) {
	t.Helper()
	for {
		err := applyAll(t, r, bulky(t, fmt.Sprintf("%s%d", prefix, n), service, bulk))
		if errors.Is(err, ErrServiceTooLarge) {
			for _, part := range []string{fmt.Sprintf(`bulk.yaml:1: CallPolicy "%s%d"`, prefix, n), service, fmt.Sprint(MaxServiceBytes)} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("the error does not say %q: %v", part, err)
				}
			}
			return n
		}
		if err != nil {
			t.Fatal(err)
		}
		if n++; n > 2*MaxServiceBytes/bulk {
			t.Fatalf("%d policies of %d bytes for one service", n, bulk)
		}
	}
}

func TestAServiceHasABound(t *testing.T) {
	r := open(t)
	n := fill(t, r, "p", "/web")
	if n < MaxServiceBytes/bulk/2 {
		t.Errorf("%d policies of %d bytes are too much", n, bulk)
	}
	// Others are not touched by it, and it can become smaller.
	if err := applyAll(t, r, bulky(t, "other", "/other", bulk)); err != nil {
		t.Error(err)
	}
	if err := applyAll(t, r, bulky(t, "p0", "/web", bulk/2)); err != nil {
		t.Error(err)
	}
	// What speaks of it by a pattern counts, whichever comes last.
	if err := applyAll(t, r, bulky(t, "wide", "/**", bulk)); !errors.Is(err, ErrServiceTooLarge) || !strings.Contains(err.Error(), "/web") {
		t.Errorf("a pattern that makes a full service larger: %v", err)
	}
	if err := applyAll(t, r, bulky(t, "narrow", "/web/**", bulk)); err != nil {
		t.Errorf("a pattern that does not speak of it: %v", err)
	}
	// So does what one plan brings together.
	var docs []strictyaml.Document
	for i := range 3 {
		docs = append(docs, bulky(t, fmt.Sprintf("x%d", i), "/web", bulk/4)...)
	}
	if err := applyAll(t, r, docs); !errors.Is(err, ErrServiceTooLarge) {
		t.Errorf("three that are too much together: %v", err)
	}
	if p, err := r.PlanDelete(KindCallPolicy, "p1", false); err != nil {
		t.Fatal(err)
	} else if _, err := r.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if err := applyAll(t, r, docs); err != nil {
		t.Errorf("after room was made: %v", err)
	}
}

func TestPatternsHaveTheBoundTogether(t *testing.T) {
	r := open(t)
	if n := fill(t, r, "w", "/ns/*/sa/web"); n < MaxServiceBytes/bulk/2 {
		t.Errorf("only %d", n)
	}
	for _, service := range []string{"/ns/a/sa/web", "/ns/**", "/ns/a/**"} {
		if err := applyAll(t, r, bulky(t, "more", service, bulk)); !errors.Is(err, ErrServiceTooLarge) {
			t.Errorf("%s has more than it may: %v", service, err)
		}
	}
	for _, service := range []string{"/ns/a/sa/db", "/services/**", "/ns2/a/sa/web"} {
		if err := applyAll(t, r, bulky(t, "more-"+strings.NewReplacer("/", "-", "*", "x").Replace(service), service, bulk)); err != nil {
			t.Errorf("%s is another service: %v", service, err)
		}
	}
}

// TestTwoAppliesCannotFillAServiceTogether: what was planned when there was room is looked at again when it is written.
func TestTwoAppliesCannotFillAServiceTogether(t *testing.T) {
	r := open(t)
	n := fill(t, r, "p", "/web")
	p, err := r.PlanDelete(KindCallPolicy, "p0", false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	var plans []*Plan
	for i := range 4 {
		p, err := r.Plan(bulky(t, fmt.Sprintf("late%d", i), "/web", bulk), Options{})
		if err != nil {
			t.Fatal(err)
		}
		plans = append(plans, p)
	}
	errs := make([]error, len(plans))
	var wg sync.WaitGroup
	for i, p := range plans {
		wg.Go(func() { _, errs[i] = r.Apply(t.Context(), p) })
	}
	wg.Wait()
	done := 0
	for _, err := range errs {
		switch {
		case err == nil:
			done++
		case !errors.Is(err, ErrServiceTooLarge):
			t.Error(err)
		}
	}
	if done != 1 {
		t.Errorf("%d of them fit after %d", done, n-1)
	}
}

// TestACommitThatIsTooLargeIsToldApart: the operator's command sends less at once then.
func TestACommitThatIsTooLargeIsToldApart(t *testing.T) {
	r := open(t)
	docs := append(bulky(t, "a", "/a", bulk), bulky(t, "b", "/b", bulk)...)
	if _, err := r.Plan(docs, Options{}); !errors.Is(err, ErrCommitTooLarge) {
		t.Errorf("two that are too much for one commit: %v", err)
	}
	for _, doc := range docs {
		if err := applyAll(t, r, []strictyaml.Document{doc}); err != nil {
			t.Error(err)
		}
	}
}

// TestPlansLookOnlyAtWhatIsNear: what a plan is checked on does not grow with policies of other services.
func TestPlansLookOnlyAtWhatIsNear(t *testing.T) {
	r := open(t)
	var docs strings.Builder
	for i := range 90 {
		fmt.Fprintf(&docs, "---\nkind: CallPolicy\nname: p%d\nservice: /s/%d\nallow: [{from: [/c]}]\n", i, i)
	}
	docs.WriteString("---\nkind: CallPolicy\nname: any\nservice: /s/*\nallow: [{from: [/m]}]\n---\nkind: CallPolicy\nname: db\nservice: /db/**\nallow: [{from: [/m]}]\n")
	parsed, err := strictyaml.Split([]byte(docs.String()), "p.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := applyAll(t, r, parsed); err != nil {
		t.Fatal(err)
	}
	for service, want := range map[string]int{"/s/1": 2, "/s/*": 91, "/x": 0, "/**": 92, "/db/a": 1, "/s/**": 91} {
		next, err := strictyaml.Split([]byte("kind: CallPolicy\nname: new\nservice: "+service+"\nallow: [{from: [/c]}]\n"), "n.yaml", 1)
		if err != nil {
			t.Fatal(err)
		}
		all := []*resource{}
		for _, d := range next {
			x, err := r.parseResource(d)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, x)
		}
		_, view, err := r.planAll(all, Options{}, map[string]string{})
		if err != nil {
			t.Fatal(err)
		}
		if n := len(view.set.Policies); n != want {
			t.Errorf("a policy of %s is checked beside %d others, want %d", service, n, want)
		}
	}
}
