package policy

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// A route is a handler of a ServeMux and the pattern of the policy that stands for it.
type route struct {
	pattern string
	deny    bool
}

func (route) ServeHTTP(http.ResponseWriter, *http.Request) {}

// muxPatterns writes a pattern as ServeMux does. What a deny covers beside the pattern is registered too: a service has
// handlers there.
func muxPatterns(r route) []string {
	segments := strings.Split(r.pattern[1:], "/")
	tree := false
	for i, s := range segments {
		switch {
		case s == starStar:
			segments[i], tree = "{rest...}", true
		case s == star:
			segments[i] = fmt.Sprintf("{x%d}", i)
		case s == "" && i == len(segments)-1:
			segments[i] = "{$}"
		}
	}
	patterns := []string{"/" + strings.Join(segments, "/")}
	if tree && r.deny && len(segments) > 1 {
		patterns = append(patterns, "/"+strings.Join(segments[:len(segments)-1], "/"))
	}
	if last := len(segments) - 1; r.deny && !tree && segments[last] == "{$}" && last > 0 {
		patterns = append(patterns, "/"+strings.Join(segments[:last], "/"))
	}
	return patterns
}

// register adds a route unless it is ambiguous beside the ones that are there, at which ServeMux panics.
func register(mux *http.ServeMux, r route) {
	for _, pattern := range muxPatterns(r) {
		func() {
			defer func() { _ = recover() }()
			mux.Handle(pattern, r)
		}()
	}
}

// checkRouting holds that a request which the policies let through is routed to a handler that an allow is for and no
// deny.
func checkRouting(t *testing.T, seed uint64, method, target string) (allowed bool) {
	t.Helper()
	request, err := http.ReadRequest(bufio.NewReader(strings.NewReader(method + " " + target + " HTTP/1.1\r\nHost: h\r\n\r\n")))
	if err != nil {
		return false // net/http would not serve it
	}
	d := dice{rand.New(rand.NewPCG(seed, 3))}
	mux := http.NewServeMux()
	allow := &policyv1.Rule{Effect: policyv1.Effect_EFFECT_ALLOW, From: []string{"spiffe://example.org/a"}, Http: []*policyv1.HTTPMatch{{}}}
	deny := &policyv1.Rule{Effect: policyv1.Effect_EFFECT_DENY, From: []string{"spiffe://example.org/a"}, Http: []*policyv1.HTTPMatch{{}}}
	var routes []route
	for range 1 + d.IntN(4) {
		routes = append(routes, route{d.pathPattern(true), false})
	}
	for range 1 + d.IntN(3) {
		routes = append(routes, route{d.pathPattern(true), true})
	}
	d.Shuffle(len(routes), func(i, j int) { routes[i], routes[j] = routes[j], routes[i] })
	for _, r := range routes {
		register(mux, r)
		rule := allow
		if r.deny {
			rule = deny
		}
		rule.Http[0].Paths = append(rule.Http[0].Paths, r.pattern)
	}
	p := compile(t, &policyv1.PolicySet{Format: Format, TrustDomain: "example.org", Policies: []*policyv1.Policy{{
		Name: "x", Services: []string{"spiffe://example.org/s"}, Mode: policyv1.Mode_MODE_ENFORCE, Rules: []*policyv1.Rule{allow, deny},
	}}})
	r := &Request{Service: id(t, "/s"), Peer: id(t, "/a"), Protocol: ProtocolHTTP, Method: request.Method, Path: request.RequestURI}
	if !p.Decide(r).Allowed {
		return false
	}
	path, _, _ := strings.Cut(request.RequestURI, "?")
	handler, pattern := mux.Handler(request)
	switch got := handler.(type) {
	case route:
		if got.deny {
			t.Fatalf("%q is let through and routed to %q, which a deny names\nroutes %+v", target, pattern, routes)
		}
		// The decoded comparison, because ServeMux decodes: two allows may differ in their escapes only.
		if !refPathMatches(got.pattern, path, true) {
			t.Fatalf("%q is let through and routed to %q\nroutes %+v", target, pattern, routes)
		}
	default: // not found, or a redirect that is judged in its turn
	}
	return true
}

func TestRoutingNeverReachesADeniedHandler(t *testing.T) {
	allowed := 0
	for seed := range uint64(4_000) {
		d := dice{rand.New(rand.NewPCG(seed, 4))}
		if checkRouting(t, seed, pick(d, "GET", "HEAD", "POST", "OPTIONS", "CONNECT"), d.target()) {
			allowed++
		}
	}
	if allowed < 200 {
		t.Errorf("only %d of 4000 requests were let through: the test proves little", allowed)
	}
}

func FuzzRouting(f *testing.F) {
	for i, target := range []string{"/a/b", "/a/../b", "//a", "/%61", "/a%2fb", "/caf%C3%A9/", "http://h/a", "/a/.", "/a;b", "/a?b", "/!/%21"} {
		f.Add(uint64(i), "GET", target)
	}
	f.Fuzz(func(t *testing.T, seed uint64, method, target string) { checkRouting(t, seed, method, target) })
}
