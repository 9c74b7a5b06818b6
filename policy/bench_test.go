package policy

import (
	"crypto/sha256"
	"fmt"
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

func BenchmarkCompile(b *testing.B) {
	s := many(10_000)
	for b.Loop() {
		compile(b, s)
	}
}
