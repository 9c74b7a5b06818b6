package policy

import (
	"fmt"
	"maps"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"testing"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// conditional is a set of rules with these conditions, all for one service.
func conditional(whens ...string) *policyv1.PolicySet {
	s := one(len(whens))
	for i, r := range s.Policies[0].Rules {
		r.When = whens[i]
	}
	return s
}

// tenant is a condition that differs from that of every other i.
func tenant(i int) string { return fmt.Sprintf(`request.headers["x-tenant"] == "t%d"`, i) }

func TestConditionsAreCompiledOnceOverChanges(t *testing.T) {
	const broken = `request.headers["x-tenant"] ==`
	first := compile(t, conditional(tenant(0), tenant(1), tenant(1), broken))
	if got, want := len(first.conditions), 3; got != want {
		t.Fatalf("%d conditions for %d expressions: %v", got, want, slices.Collect(maps.Keys(first.conditions)))
	}
	second, err := CompileAfter(first.WithRevocations(nil).Stale(), conditional(tenant(2), tenant(1), broken))
	if err != nil {
		t.Fatal(err)
	}
	for _, when := range []string{tenant(1), broken} {
		if a, b := first.conditions[written{when, false}], second.conditions[written{when, false}]; a == nil || a != b {
			t.Errorf("%s: %p before and %p after; it was compiled again", when, a, b)
		}
	}
	if len(second.conditions) != 3 || second.conditions[written{tenant(0), false}] != nil {
		t.Errorf("what no rule has any more is kept: %v", slices.Collect(maps.Keys(second.conditions)))
	}
	if len(first.conditions) != 3 {
		t.Errorf("compiling what came after has changed what was before: %v", slices.Collect(maps.Keys(first.conditions)))
	}
}

// An allow and a deny of the same words differ: an error is false in one and true in the other.
func TestADenyDoesNotTakeOverTheConditionOfAnAllow(t *testing.T) {
	first := compile(t, conditional(tenant(0)))
	set := conditional(tenant(0))
	set.Policies[0].Rules[0].Effect = policyv1.Effect_EFFECT_DENY
	second, err := CompileAfter(first, set)
	if err != nil {
		t.Fatal(err)
	}
	if a, b := first.conditions[written{tenant(0), false}], second.conditions[written{tenant(0), true}]; b == nil || a == b {
		t.Errorf("the allow has %p, the deny %p", a, b)
	}
}

// Whatever was compiled before, a set decides alike.
func TestWhatWasBeforeDecidesNothing(t *testing.T) {
	sets := []*policyv1.PolicySet{
		conditional(tenant(0), tenant(1)), conditional(tenant(1), `peer.id == "x" ||`, tenant(0)), set(t, latterDocuments), conditional(),
		conditional(`request.path == "/v1/0/a"`),
	}
	for i, before := range sets {
		for j, now := range sets {
			after, err := CompileAfter(compile(t, before), now)
			if err != nil {
				t.Fatal(err)
			}
			anew := compile(t, now)
			for _, path := range []string{"GET /v1/0/a", "GET /v1/1/a"} {
				for _, value := range []string{"t0", "t1", ""} {
					r := call(t, "/ns/0/sa/web", "/service/0", path)
					r.Headers = http.Header{"X-Tenant": {value}}
					if a, b := after.Decide(r), anew.Decide(r); a != b {
						t.Errorf("%d after %d, %s with %q: %+v, and %+v anew", j, i, path, value, a, b)
					}
				}
			}
		}
	}
}

// A holder that compiles each set after the last one holds the conditions of the last one, and no chain of sets.
func TestNothingElseOfOldPoliciesIsKept(t *testing.T) {
	old := compile(t, conditional(tenant(0)))
	gone := make(chan struct{})
	runtime.AddCleanup(old, func(gone chan struct{}) { close(gone) }, gone)
	p, err := CompileAfter(old, conditional(tenant(0), tenant(1)))
	if err != nil {
		t.Fatal(err)
	}
	old = nil
	for range 100 {
		runtime.GC()
		select {
		case <-gone:
			runtime.KeepAlive(p)
			return
		default:
			runtime.Gosched()
		}
	}
	t.Error("the policies that were compiled before are still held")
}

// BenchmarkCompileConditions is a change of one condition among many that are all different: compiled with nothing to go by,
// and after what was there before.
func BenchmarkCompileConditions(b *testing.B) {
	whens := make([]string, 1000)
	for i := range whens {
		whens[i] = tenant(i)
	}
	before := compile(b, conditional(whens...))
	whens[0] = strings.Replace(whens[0], "==", "!=", 1)
	changed := conditional(whens...)
	for _, c := range []struct {
		name string
		old  *Policies
	}{{"anew", nil}, {"after", before}} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				if _, err := CompileAfter(c.old, changed); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
