package analyse

import (
	"slices"
	"strings"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

// maxRoutes is how many requests stand for all those to one service.
const maxRoutes = 4096

// A route is a request that stands for all that no rule tells apart from it.
type route struct {
	name    string
	request policy.Request
}

// routes returns requests for a connection, and for each combination of path, method and protocol that the rules of sets tell
// apart. Complete is false if there are more.
func routes(sets ...*policyv1.PolicySet) (out []route, complete bool) {
	var patterns []pattern
	methods := map[string]bool{"POST": true}
	requests := false
	for _, s := range sets {
		for _, p := range s.GetPolicies() {
			for _, r := range p.GetRules() {
				requests = requests || !open(r)
				for _, m := range r.GetHttp() {
					for _, method := range m.GetMethods() {
						methods[method] = true
					}
					for _, path := range m.GetPaths() {
						patterns = append(patterns, pathPattern(path))
					}
				}
				for _, g := range r.GetGrpc() {
					patterns = append(patterns, pathPattern(g))
				}
			}
		}
	}
	out = append(out, route{name: "TLS"})
	other := "GET"
	for _, m := range []string{"GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "X-OTHER"} {
		if other = m; !methods[m] {
			break
		}
	}
	if !methods[other] {
		methods[other] = true
	}
	names := make([]string, 0, len(methods))
	for m := range methods {
		names = append(names, m)
	}
	slices.Sort(names)
	paths := []string{"/" + anyone}
	seen := map[string]bool{paths[0]: true}
	complete = true
	witnesses("", patterns, func(path string) bool {
		if !seen[path] {
			seen[path] = true
			paths = append(paths, path)
		}
		complete = len(paths)*(len(names)+1) < maxRoutes
		return complete
	})
	for _, path := range paths {
		shown := strings.ReplaceAll(path, anyone, star)
		for _, m := range names {
			name := m + " " + shown
			if m == other {
				name = m + " (and methods that no rule lists) " + shown
			}
			out = append(out, route{name, policy.Request{Protocol: policy.ProtocolHTTP, Method: m, Path: path}})
		}
		if requests {
			out = append(out, route{"gRPC " + shown[1:], policy.Request{Protocol: policy.ProtocolHTTP, Method: "POST", Path: path, ContentTypes: []string{"application/grpc"}}})
		}
	}
	return out, complete
}

// witnesses says a path for each set of patterns that one path can match together: at each segment it goes on with each one
// that a pattern writes out, and with one that none does.
func witnesses(prefix string, live []pattern, say func(string) bool) bool {
	if prefix != "" && (!say(prefix) || !say(prefix+"/")) {
		return false
	}
	next := map[string]bool{}
	longer := false
	for _, p := range live {
		switch {
		case len(p.segments) > 0:
			longer = true
			if s := p.segments[0]; s != star && s != "" {
				next[s] = true
			}
		case p.rest:
			longer = true
		}
	}
	if !longer {
		return true
	}
	segments := make([]string, 0, len(next))
	for s := range next {
		segments = append(segments, s)
	}
	slices.Sort(segments)
	for _, s := range append(segments, anyone) {
		var on []pattern
		for _, p := range live {
			// What is below "**" is all alike: it needs no further segment.
			if len(p.segments) > 0 && (p.segments[0] == star || p.segments[0] == s || decoded(p.segments[0]) == decoded(s)) {
				on = append(on, pattern{segments: p.segments[1:], rest: p.rest})
			}
		}
		if !witnesses(prefix+"/"+s, on, say) {
			return false
		}
	}
	return true
}
