package sds

import (
	"maps"
	"slices"
	"strings"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"

	"github.com/signet-id/signet/workloadapi"
)

// FuzzRequests sends two streams arbitrary requests while what the caller may have changes, and holds them to what holds
// always: bounds, nothing that is not the caller's or was not asked for, and in the end the client has what there is.
func FuzzRequests(f *testing.F) {
	svc := testService(f)
	full := update(f, "/web", "/db")
	small := full
	small.Identities = []workloadapi.Identity{identity(f, "/web")}
	states := []workloadapi.Update{full, small, {TrustDomain: ours, X509Bundles: full.X509Bundles}}
	f.Add("+default\n+ROOTCA\n!\n-default\n#1\n~1\n+*\n=\n!\n=\n-*")
	f.Add("\n=\n+ALL\n+spiffe://example.org/web\n#0\n#9999999999999999999999\n~2\n+\n")
	f.Fuzz(func(t *testing.T, script string) {
		s, d := &stateOfTheWorld{}, &delta{}
		at := 0
		seen := map[string]version{} // what the client of d holds
		var names []string
		for i, line := range strings.SplitN(script, "\n", 64) {
			req := &discoveryv3.DeltaDiscoveryRequest{}
			world := &discoveryv3.DiscoveryRequest{}
			arg := ""
			if len(line) > 0 {
				arg = line[1:]
			}
			switch {
			case strings.HasPrefix(line, "+"):
				req.ResourceNamesSubscribe = strings.Split(arg, " ")
				names = append(names, req.ResourceNamesSubscribe...)
			case strings.HasPrefix(line, "-"):
				req.ResourceNamesUnsubscribe = strings.Split(arg, " ")
				names = slices.DeleteFunc(names, func(n string) bool { return slices.Contains(req.ResourceNamesUnsubscribe, n) })
			case strings.HasPrefix(line, "!"):
				at = (at + 1) % len(states)
			case strings.HasPrefix(line, "#"):
				req.ResponseNonce, world.ResponseNonce = arg, arg
			case strings.HasPrefix(line, "~"):
				req.ResponseNonce, world.ResponseNonce = arg, arg
				req.ErrorDetail = &rpcstatus.Status{Message: script}
				world.ErrorDetail = req.ErrorDetail
			case strings.HasPrefix(line, "="):
				req.InitialResourceVersions = map[string]string{arg: arg}
			case strings.HasPrefix(line, "@"):
				req.TypeUrl, world.TypeUrl = arg, arg
			}
			world.ResourceNames = slices.Clone(names)
			o := svc.offer(states[at], node{spiffe: i%2 == 0})

			if _, err := s.request(world); err == nil {
				resp, err := s.respond(o)
				if err != nil {
					t.Fatal(err)
				}
				for name := range secrets(t, resp) {
					if _, ok := o.find(name); !ok || !s.wanted.has(name) && !s.wanted.all {
						t.Fatalf("%q is not the caller's, or was not asked for", name)
					}
				}
				if again, _ := s.respond(o); again != nil {
					t.Fatal("the same is sent twice")
				}
			}
			if _, err := d.request(req); err != nil {
				continue
			}
			if i == 0 {
				maps.Copy(seen, d.sent)
			}
			resp, err := d.respond(o)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range resp.GetResources() {
				if _, ok := o.find(r.Name); !ok || !d.wanted.has(r.Name) {
					t.Fatalf("%q is not the caller's, or was not asked for", r.Name)
				}
				seen[r.Name] = r.Version
			}
			for _, name := range resp.GetRemovedResources() {
				delete(seen, name)
			}
			for _, name := range d.wanted.names(o) {
				if r, ok := o.find(name); ok && seen[name] != r.version {
					t.Fatalf("the client lacks %q", name)
				} else if !ok && seen[name] != "" {
					t.Fatalf("the client still has %q", name)
				}
			}
			if again, _ := d.respond(o); again != nil {
				t.Fatal("the same is sent twice")
			}
			if len(d.sent) > 2*maxNames || len(d.wanted.named) > maxNames || len(s.wanted.named) > maxNames {
				t.Fatal("a bound does not hold")
			}
		}
	})
}

func FuzzPrintable(f *testing.F) {
	f.Add("plain")
	f.Add("\x1b]0;owned\x07\n\"quoted\" \\ \xff" + strings.Repeat("é", maxMessageBytes))
	f.Fuzz(func(t *testing.T, s string) {
		out := printable(s)
		if len(out) > 10*maxMessageBytes+3 {
			t.Fatalf("%d bytes", len(out))
		}
		for _, b := range []byte(out) {
			if b < 0x20 || b > 0x7e {
				t.Fatalf("%q has the byte %#x", out, b)
			}
		}
	})
}
