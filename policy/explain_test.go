package policy

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestExplain(t *testing.T) {
	p := compile(t, set(t, documents))
	for _, tt := range []struct {
		name, from, call string
		want             string
	}{
		{"allowed", "/trusty-service", "GET /v1/documents/7", `allowed: p.yaml:6: documents allows it
  from      spiffe://example.org/trusty-service
  to        spiffe://example.org/documents-service
  call      HTTP "GET" "/v1/documents/7"
  revision  7
considered:
  p.yaml:6: documents: allow: matches
  p.yaml:8: documents: allow: the caller spiffe://example.org/trusty-service is not among "spiffe://example.org/ns/*/sa/archiver"
  p.yaml:11: documents: deny: the caller spiffe://example.org/trusty-service is not among "spiffe://example.org/quarantine/**"
`},
		{"the nearest rule first", "/ns/a/sa/archiver", "grpc documents.v1.Other/Get", `denied: no rule allows it
  from      spiffe://example.org/ns/a/sa/archiver
  to        spiffe://example.org/documents-service
  call      gRPC "/documents.v1.Other/Get"
  revision  7
considered:
  p.yaml:8: documents: allow: the gRPC method "documents.v1.Other/Get" is not among "documents.v1.Documents/*"
  p.yaml:6: documents: allow: the caller spiffe://example.org/ns/a/sa/archiver is not among "spiffe://example.org/trusty-service", "spiffe://partner.example/reports/**"
  p.yaml:11: documents: deny: the caller spiffe://example.org/ns/a/sa/archiver is not among "spiffe://example.org/quarantine/**"
`},
		{"the method", "/trusty-service", "PUT /v1/documents/7", `p.yaml:6: documents: allow: the method "PUT" is not among "GET"`},
		{"the path", "/trusty-service", "GET /v1", `p.yaml:6: documents: allow: the path "/v1" is not among "/v1/documents/**"`},
		{"the protocol", "/trusty-service", "tls", `p.yaml:6: documents: allow: it is for requests, and of a connection only the caller is known`},
		{"a refused path", "/trusty-service", "GET /v1/documents/../x", `denied: the path is refused whatever the rules say: has a "." or ".." segment`},
		{"a deny", "/quarantine/x", "tls", "denied: p.yaml:11: documents denies it"},
	} {
		e := p.Explain(call(t, tt.from, "/documents-service", tt.call))
		if got := e.String(); !strings.Contains(got, tt.want) {
			t.Errorf("%s:\n%s\nwant\n%s", tt.name, got, tt.want)
		}
		data, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		var back struct {
			Decision struct {
				Allowed bool
				Reason  string
			}
			Considered []struct{ Rule Rule }
		}
		if err := json.Unmarshal(data, &back); err != nil || back.Decision.Reason != e.Decision.Reason.String() || back.Decision.Allowed != e.Decision.Allowed || len(back.Considered) != 3 {
			t.Errorf("%s: JSON %s: %v", tt.name, data, err)
		}
	}
}

func TestExplainNeverMovesTheCursor(t *testing.T) {
	docs := set(t, documents)
	docs.Policies[0].File = "a\x1b[2J\nb"
	p := compile(t, docs)
	r := call(t, "/trusty-service", "/documents-service", "tls")
	r.Protocol, r.Method, r.Path = ProtocolHTTP, "GET\x1b[1A", "/\x1b]0;x\x07"
	r.Token = &Token{ID: r.Peer, Audience: []string{"\x1b"}}
	if s := p.Explain(r).String(); strings.ContainsAny(s, "\x1b\x07\r") {
		t.Errorf("control bytes in %q", s)
	}
}

func TestExplainListsFewRules(t *testing.T) {
	p := compile(t, one(100))
	e := p.Explain(call(t, "/ns/0/sa/web", "/service/0", "GET /"))
	if len(e.Considered) != maxConsidered || e.Omitted != 100-maxConsidered {
		t.Errorf("%d rules and %d omitted", len(e.Considered), e.Omitted)
	}
}

func TestExplainWithoutPolicies(t *testing.T) {
	for _, p := range []*Policies{nil, compile(t, set(t, documents)).Stale()} {
		if e := p.Explain(call(t, "/a", "/documents-service", "tls")); e.Decision.Allowed || !strings.HasPrefix(e.String(), "denied: ") {
			t.Errorf("%s", e)
		}
	}
}
