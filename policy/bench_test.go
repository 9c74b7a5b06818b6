package policy

import (
	"crypto/sha256"
	"fmt"
	"net/http"
	"strings"
	"testing"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// many is a set of n rules, a hundred for each service, for callers and paths that are all different.
func many(n int) *policyv1.PolicySet {
	s := &policyv1.PolicySet{Format: Format, TrustDomain: "example.org"}
	for i := range n {
		if i%100 == 0 {
			s.Policies = append(s.Policies, &policyv1.Policy{Name: fmt.Sprint("p", i), Services: []string{fmt.Sprintf("spiffe://example.org/service/%d", i/100)}, Mode: policyv1.Mode_MODE_ENFORCE})
		}
		p := s.Policies[len(s.Policies)-1]
		p.Rules = append(p.Rules, &policyv1.Rule{
			Effect: policyv1.Effect_EFFECT_ALLOW,
			From:   []string{fmt.Sprintf("spiffe://example.org/ns/%d/sa/*", i)},
			Http:   []*policyv1.HTTPMatch{{Methods: []string{"GET"}, Paths: []string{fmt.Sprintf("/v1/%d/**", i)}}},
		})
	}
	return s
}

// one is a set of n rules for one service and one caller.
func one(n int) *policyv1.PolicySet {
	p := &policyv1.Policy{Name: "p", Services: []string{"spiffe://example.org/service/0"}, Mode: policyv1.Mode_MODE_ENFORCE}
	for i := range n {
		p.Rules = append(p.Rules, &policyv1.Rule{
			Effect: policyv1.Effect_EFFECT_ALLOW,
			From:   []string{"spiffe://example.org/ns/0/sa/*"},
			Http:   []*policyv1.HTTPMatch{{Methods: []string{"GET"}, Paths: []string{fmt.Sprintf("/v1/%d/**", i)}}},
		})
	}
	return &policyv1.PolicySet{Format: Format, TrustDomain: "example.org", Policies: []*policyv1.Policy{p}}
}

// BenchmarkDecide prints, besides the time, how many SHA-256 sums of 64 bytes one decision costs on the same machine in
// the same run.
func BenchmarkDecide(b *testing.B) {
	reference := 0.0 // nanoseconds
	b.Run("sha256-of-64-bytes", func(b *testing.B) {
		data := make([]byte, 64)
		for b.Loop() {
			data[0] = sha256.Sum256(data)[0]
		}
		reference = float64(b.Elapsed().Nanoseconds()) / float64(b.N)
	})
	for _, shape := range []struct {
		name string
		set  func(int) *policyv1.PolicySet
	}{{"services", many}, {"one-caller", one}} {
		for _, n := range []int{10, 1_000, 100_000} {
			p := compile(b, shape.set(n))
			r := call(b, "/ns/0/sa/web", "/service/0", "GET /v1/0/documents/7")
			if !p.Decide(r).Allowed {
				b.Fatal("denied")
			}
			b.Run(fmt.Sprintf("%s/rules=%d", shape.name, n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					p.Decide(r)
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/reference, "sha256/op")
			})
		}
	}
}

// benchConditions are conditions of which benchmarks tell the cost.
var benchConditions = []struct{ name, when string }{
	{"four-terms", `peer.trust_domain == "example.org" && request.method == "GET" && request.path.startsWith("/v1/") && !("x-debug" in request.headers)`},
	{"header", `request.headers["x-tenant"] == "blue"`},
	{"claim", `jwt.trust_domain == "example.org" && jwt.claims.level >= 3`},
	{"scope", `jwt.trust_domain == "example.org" && "documents.read" in jwt.claims.scope.split(" ")`},
	{"groups", `user.issuer == "https://login.example" && user.claims.groups.exists(g, g in ["editors", "admins"])`},
}

// BenchmarkDecideWhen is BenchmarkDecide with a condition on each rule.
func BenchmarkDecideWhen(b *testing.B) {
	for _, c := range benchConditions {
		for _, n := range []int{10, 1_000, 100_000} {
			set := many(n)
			for _, p := range set.Policies {
				for _, r := range p.Rules {
					r.When = c.when
					if strings.Contains(c.when, "jwt.") {
						r.Jwt = &policyv1.JWTMatch{Audience: []string{"s"}, Subject: policyv1.SubjectBinding_SUBJECT_BINDING_PEER}
					}
				}
			}
			p := compile(b, set)
			r := call(b, "/ns/0/sa/web", "/service/0", "GET /v1/0/documents/7")
			r.Headers = http.Header{"X-Tenant": {"blue"}}
			r.Token = &Token{ID: r.Peer, Audience: []string{"s"}, Claims: claims(b, `{"level":5,"scope":"documents.write documents.read"}`)}
			r.User = &User{Issuer: "https://login.example", Claims: claims(b, `{"groups":["readers","writers","editors"]}`)}
			if d := p.Decide(r); !d.Allowed {
				b.Fatalf("%s: %s", c.name, p.Explain(r))
			}
			b.Run(fmt.Sprintf("%s/rules=%d", c.name, n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					p.Decide(r)
				}
			})
		}
	}
}

func BenchmarkCompileCondition(b *testing.B) {
	for _, c := range benchConditions {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, errs := compileCondition(c.when, false); len(errs) > 0 {
					b.Fatal(errs[0])
				}
			}
		})
	}
}

func BenchmarkCompile(b *testing.B) {
	s := many(10_000)
	for b.Loop() {
		compile(b, s)
	}
}
