// Package engines decides the same calls by the same rules with three engines: signet's, Cedar and OPA. It is a module of its
// own, since nothing else needs the other two.
package engines

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

// perService is how many rules one service has: one for each caller.
const perService = 100

// A call is what all engines are asked.
type call struct{ peer, service, method, path string }

// An engine decides a call.
type engine struct {
	name  string
	build func(tb testing.TB, rules int) func(testing.TB, call) bool
}

func peer(i int) string    { return fmt.Sprintf("spiffe://example.org/caller/%d", i) }
func service(i int) string { return fmt.Sprintf("spiffe://example.org/service/%d", i/perService) }

var engines = []engine{{"signet", signet}, {"signet with when", signetWhen}, {"cedar", cedarAll}, {"cedar by service", cedarSliced}, {"opa", opa}}

func signet(tb testing.TB, rules int) func(testing.TB, call) bool { return decide(tb, rules, "") }

// signetWhen asks for the method a second time, as a condition.
func signetWhen(tb testing.TB, rules int) func(testing.TB, call) bool {
	return decide(tb, rules, `request.method == "GET"`)
}

func decide(tb testing.TB, rules int, when string) func(testing.TB, call) bool {
	set := &policyv1.PolicySet{Format: policy.Format, TrustDomain: "example.org"}
	for i := range rules {
		if i%perService == 0 {
			set.Policies = append(set.Policies, &policyv1.Policy{Name: "p" + strconv.Itoa(i), Services: []string{service(i)}, Mode: policyv1.Mode_MODE_ENFORCE})
		}
		r := &policyv1.Rule{Effect: policyv1.Effect_EFFECT_ALLOW, From: []string{peer(i)},
			Http: []*policyv1.HTTPMatch{{Methods: []string{"GET"}, Paths: []string{fmt.Sprintf("/v1/%d/**", i)}}}}
		if when != "" {
			r.When, r.Requires = when, []string{"when"}
		}
		p := set.Policies[len(set.Policies)-1]
		p.Rules = append(p.Rules, r)
	}
	policies, err := policy.Compile(set)
	if err != nil {
		tb.Fatal(err)
	}
	ids := map[string]spiffeid.ID{}
	id := func(s string) spiffeid.ID { // an enforcement point has IDs, not strings
		if _, found := ids[s]; !found {
			ids[s] = spiffeid.RequireFromString(s)
		}
		return ids[s]
	}
	return func(tb testing.TB, c call) bool {
		return policies.Decide(&policy.Request{Service: id(c.service), Peer: id(c.peer), Protocol: policy.ProtocolHTTP, Method: c.method, Path: c.path}).Allowed
	}
}

func cedarPolicy(tb testing.TB, i int) *cedar.Policy {
	var p cedar.Policy
	if err := p.UnmarshalCedar(fmt.Appendf(nil, `permit (principal == Workload::%q, action == Action::"GET", resource == Service::%q) when { context.path like "/v1/%d/*" };`, peer(i), service(i), i)); err != nil {
		tb.Fatal(err)
	}
	return &p
}

func cedarRequest(c call) cedar.Request {
	return cedar.Request{Principal: cedar.NewEntityUID("Workload", cedar.String(c.peer)), Action: cedar.NewEntityUID("Action", cedar.String(c.method)),
		Resource: cedar.NewEntityUID("Service", cedar.String(c.service)), Context: cedar.NewRecord(cedar.RecordMap{"path": cedar.String(c.path)})}
}

// cedarAll asks all policies, as Cedar does by itself.
func cedarAll(tb testing.TB, rules int) func(testing.TB, call) bool {
	set := cedar.NewPolicySet()
	for i := range rules {
		set.Add(cedar.PolicyID("p"+strconv.Itoa(i)), cedarPolicy(tb, i))
	}
	return func(_ testing.TB, c call) bool {
		decision, _ := cedar.Authorize(set, cedar.EntityMap{}, cedarRequest(c))
		return decision == cedar.Allow
	}
}

// cedarSliced asks the policies of one service only, which its caller has to choose.
func cedarSliced(tb testing.TB, rules int) func(testing.TB, call) bool {
	sets := map[string]*cedar.PolicySet{}
	for i := range rules {
		if sets[service(i)] == nil {
			sets[service(i)] = cedar.NewPolicySet()
		}
		sets[service(i)].Add(cedar.PolicyID("p"+strconv.Itoa(i)), cedarPolicy(tb, i))
	}
	return func(_ testing.TB, c call) bool {
		if sets[c.service] == nil {
			return false
		}
		decision, _ := cedar.Authorize(sets[c.service], cedar.EntityMap{}, cedarRequest(c))
		return decision == cedar.Allow
	}
}

// opa has the rules as data by service and caller, the way its documentation advises, and a query that is prepared once.
func opa(tb testing.TB, rules int) func(testing.TB, call) bool {
	data := map[string]any{}
	for i := range rules {
		byCaller, found := data[service(i)].(map[string]any)
		if !found {
			byCaller = map[string]any{}
			data[service(i)] = byCaller
		}
		byCaller[peer(i)] = []any{map[string]any{"methods": []any{"GET"}, "prefix": fmt.Sprintf("/v1/%d/", i)}}
	}
	query, err := rego.New(rego.Query("data.calls.allow"), rego.Store(inmem.NewFromObject(map[string]any{"rules": data})), rego.Module("calls.rego", `package calls
default allow := false
allow if {
	some rule in data.rules[input.service][input.peer]
	input.method in rule.methods
	startswith(input.path, rule.prefix)
	count(input.path) > count(rule.prefix)
}`)).PrepareForEval(context.Background())
	if err != nil {
		tb.Fatal(err)
	}
	return func(tb testing.TB, c call) bool {
		results, err := query.Eval(context.Background(), rego.EvalInput(map[string]any{"service": c.service, "peer": c.peer, "method": c.method, "path": c.path}))
		if err != nil {
			tb.Fatal(err)
		}
		return results.Allowed()
	}
}

// TestEnginesAgree: what is compared is the same work.
func TestEnginesAgree(t *testing.T) {
	const rules = 300
	for _, e := range engines {
		decide, allowed := e.build(t, rules), 0
		for i := range rules {
			for _, tt := range []struct {
				call call
				want bool
			}{
				{call{peer(i), service(i), "GET", fmt.Sprintf("/v1/%d/a/b", i)}, true},
				{call{peer(i), service(i), "POST", fmt.Sprintf("/v1/%d/a/b", i)}, false},
				{call{peer(i), service(i), "GET", fmt.Sprintf("/v1/%d0/a", i)}, false},
				{call{peer(i + 1), service(i), "GET", fmt.Sprintf("/v1/%d/a", i)}, false},
				{call{peer(i), service(i + perService), "GET", fmt.Sprintf("/v1/%d/a", i)}, false},
			} {
				got := decide(t, tt.call)
				if got != tt.want {
					t.Fatalf("%s: %+v: allowed %t, want %t", e.name, tt.call, got, tt.want)
				}
				if got {
					allowed++
				}
			}
		}
		if allowed != rules {
			t.Errorf("%s: %d calls allowed, want %d", e.name, allowed, rules)
		}
	}
}

// BenchmarkDecide prints each engine's time as a multiple of signet's at the same number of rules.
func BenchmarkDecide(b *testing.B) {
	for _, rules := range []int{10, 1_000, 100_000} {
		reference := 0.0
		for _, e := range engines {
			decide := e.build(b, rules)
			i := rules / 2
			c := call{peer(i), service(i), "GET", fmt.Sprintf("/v1/%d/documents/7", i)}
			if !decide(b, c) {
				b.Fatal("denied")
			}
			b.Run(fmt.Sprintf("rules=%d/%s", rules, strings.ReplaceAll(e.name, " ", "-")), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					decide(b, c)
				}
				each := float64(b.Elapsed().Nanoseconds()) / float64(b.N)
				if reference == 0 {
					reference = each
				}
				b.ReportMetric(each/reference, "x-signet")
			})
		}
	}
}
