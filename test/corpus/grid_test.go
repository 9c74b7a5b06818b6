package corpus

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/policy"
)

var update = flag.Bool("update", false, "write testdata/grid.yaml anew; read what changes in it")

// TestGrid keeps testdata/grid.yaml, in which callers, methods and paths meet in every combination. What it wants was
// decided once and is under review since: a changed decision shows as a changed line.
func TestGrid(t *testing.T) {
	content, err := os.ReadFile(filepath.Join("testdata", "policies.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	docs, err := strictyaml.Split(content, "policies.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	td := spiffeid.RequireTrustDomainFromString("example.org")
	set, err := policy.Check(docs, td)
	if err != nil {
		t.Fatal(err)
	}
	policies, err := policy.Compile(set)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	out.WriteString(`# Callers, methods and paths in every combination. Written by: go test ./test/corpus -run TestGrid -update
kind: PolicyTest
name: grid
trustDomain: example.org
policies: [policies.yaml]
cases:
`)
	line := func(from, to, call, more string, r policy.Request) {
		r.Service, r.Peer = spiffeid.RequireFromPath(td, to), spiffeid.RequireFromString(from)
		want := "deny"
		if policies.Decide(&r).Allowed {
			want = "allow"
		}
		fmt.Fprintf(&out, "  - {from: %q, to: %s, %s%s, want: %s}\n", from, to, call, more, want)
	}
	ids := func(paths ...string) (out []string) {
		for _, p := range paths {
			out = append(out, "spiffe://example.org"+p)
		}
		return out
	}
	for _, g := range []struct {
		to             string
		callers        []string
		methods, paths []string
	}{
		{"/documents", append(ids("/reader", "/writer", "/ns/prod/sa/archiver", "/ns/evil/sa/archiver", "/quarantine/writer", "/second"), "spiffe://partner.example/reports/a", "spiffe://partner.example/writer"),
			[]string{"GET", "HEAD", "PUT", "POST", "DELETE"}, []string{"/v1/documents", "/v1/documents/7", "/v1/documents/protected", "/archive/x", "/archive/secret/x", "/second/x"}},
		{"/anything", append(ids("/web", "/blocked", "/gateway"), "spiffe://partner.example/web"),
			[]string{"GET", "POST", "OPTIONS"}, []string{"/", "/admin", "/admin/x", "/admin%20x", "/x//y"}},
		{"/half", ids("/web", "/second"), []string{"GET", "POST"}, []string{"/now", "/later", "/second/x"}},
	} {
		for _, caller := range g.callers {
			for _, method := range g.methods {
				for _, path := range g.paths {
					line(caller, g.to, fmt.Sprintf("http: %q", method+" "+path), "", policy.Request{Protocol: policy.ProtocolHTTP, Method: method, Path: path})
				}
			}
		}
	}
	for _, caller := range ids("/web", "/json", "/any", "/other") {
		for _, method := range []string{"documents.v1.Documents/Get", "documents.v1.Documents/List", "audit.v1.Audit/Read", "audit.v1.Audit/Erase"} {
			for _, contentType := range []string{"application/grpc", "application/grpc+json", "application/json", "application/grpc-web+proto"} {
				line(caller, "/rpc", fmt.Sprintf("http: %q", "POST /"+method), ", contentType: "+contentType,
					policy.Request{Protocol: policy.ProtocolHTTP, Method: "POST", Path: "/" + method, ContentTypes: []string{contentType}})
			}
		}
	}
	for _, caller := range append(ids("/web", "/partly", "/sometimes", "/other", "/gateway"), "spiffe://partner.example/x", "spiffe://partner.example/outcast/x") {
		for _, to := range []string{"/connections", "/anything", "/documents", "/trying", "/unheard-of"} {
			line(caller, to, "tls: true", "", policy.Request{})
		}
	}
	file := filepath.Join("testdata", "grid.yaml")
	if *update {
		if err := os.WriteFile(file, out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, out.Bytes()) {
		t.Errorf("%s is not what is decided now; run: go test ./test/corpus -run TestGrid -update, and read what changes in it", file)
	}
}
