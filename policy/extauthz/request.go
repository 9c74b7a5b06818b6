package extauthz

import (
	"errors"
	"fmt"
	"strings"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/spiffe"
)

// errBadPath says that it is not certain which path the service will see.
var errBadPath = errors.New("it is not certain which path the service will see")

// errContradiction says that a check says two things about one call, which no Envoy does.
var errContradiction = errors.New("the check contradicts itself")

// read fills r with the call that a check is about, but for the service and the certificate. What it could read it leaves
// in r beside an error, too, so that the answer is in the protocol of the call.
//
// Envoy's filters see the path as it goes to the service, after whatever normalisation the listener was told to do. Where
// the check has it twice, the raw header counts: the other one was made valid UTF-8 by writing "!" for each other byte.
func read(req *authv3.CheckRequest, r *policy.Request) error {
	attributes := req.GetAttributes()
	if call := attributes.GetRequest().GetHttp(); call != nil { // else it is the filter for TCP that asks
		if err := readHTTP(call, r); err != nil {
			return err
		}
	}
	var err error
	r.Peer, err = sourceID(attributes.GetSource().GetPrincipal())
	return err
}

func readHTTP(call *authv3.AttributeContext_HttpRequest, r *policy.Request) error {
	h := newHeaders(call)
	r.Protocol, r.Method, r.Path = policy.ProtocolHTTP, call.GetMethod(), call.GetPath()
	r.Headers, r.HasMethodOverride = h, h.override
	r.ContentTypes = h.Values("content-type")
	switch method := h.Values(":method"); {
	case len(method) > 1, len(method) == 1 && method[0] != r.Method && !sanitised(method[0], r.Method):
		return fmt.Errorf("%w: its method is %q, and its header :method %q", errContradiction, excerpt(r.Method), excerpt(strings.Join(method, ", ")))
	case len(method) == 1:
		r.Method = method[0]
	}
	path := h.Values(":path")
	switch {
	case len(path) > 1, len(path) == 1 && path[0] != r.Path && !sanitised(path[0], r.Path):
		return fmt.Errorf("%w: its path is %q, and its header :path %q", errContradiction, excerpt(r.Path), excerpt(strings.Join(path, ", ")))
	case len(path) == 1 && h.joined == nil:
		r.Path = path[0]
	case strings.Contains(r.Path, "!"):
		return fmt.Errorf(`%w: a "!" may stand for a byte that is not UTF-8; set encode_raw_headers: true in the ext_authz filter`, errBadPath)
	}
	return nil
}

// sourceID is the peer that the Envoy has verified. Envoy writes the first URI SAN of the certificate; where there is none,
// a DNS name or the subject, and nothing if there is no certificate.
func sourceID(principal string) (spiffeid.ID, error) {
	if principal == "" {
		return spiffeid.ID{}, errors.New("source.principal is empty: the Envoy has verified no certificate of its peer (set require_client_certificate and a validation context in the listener's TLS context)")
	}
	id, err := spiffe.ParseID(principal)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("source.principal: %w", err)
	}
	return id, nil
}

// sanitised reports whether text is raw with "!" in the place of bytes that are not UTF-8.
func sanitised(raw, text string) bool {
	if len(raw) == len(text) {
		for i := range len(raw) {
			if raw[i] != text[i] && !(raw[i] >= 0x80 && text[i] == '!') {
				return false
			}
		}
		return true
	}
	return false
}

// headers are those of a check: of a filter with encode_raw_headers each line by itself, else one line for each name, in
// which Envoy has joined several by commas. A check has the one or the other; should it have both, both count, which
// makes every comparison with a header that is in both false.
type headers struct {
	joined   map[string]string
	raw      []rawHeader
	folded   bool // some name in joined is not in lower case
	override bool
}

type rawHeader struct{ name, value string }

func newHeaders(call *authv3.AttributeContext_HttpRequest) *headers {
	h := &headers{joined: call.GetHeaders()}
	for name := range h.joined {
		h.override = h.override || policy.IsMethodOverride(name)
		h.folded = h.folded || hasUpper(name)
	}
	if lines := call.GetHeaderMap().GetHeaders(); len(lines) > 0 {
		h.raw = make([]rawHeader, 0, len(lines))
		for _, line := range lines {
			value := line.GetValue()
			if raw := line.GetRawValue(); len(raw) > 0 {
				value = string(raw)
			}
			h.override = h.override || policy.IsMethodOverride(line.GetKey())
			h.raw = append(h.raw, rawHeader{line.GetKey(), value})
		}
	}
	return h
}

// Values returns all lines of a header. See policy.Headers.
func (h *headers) Values(name string) []string {
	var values []string
	if h.folded {
		for have, value := range h.joined {
			if strings.EqualFold(have, name) {
				values = append(values, value)
			}
		}
	} else if value, found := h.joined[name]; found {
		values = append(values, value)
	}
	for i := range h.raw {
		if strings.EqualFold(h.raw[i].name, name) {
			values = append(values, h.raw[i].value)
		}
	}
	return values
}

func hasUpper(s string) bool {
	for i := range len(s) {
		if 'A' <= s[i] && s[i] <= 'Z' {
			return true
		}
	}
	return false
}

func excerpt(s string) string {
	const most = 256
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}
