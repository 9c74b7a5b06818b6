// Package envoycheck says to an ext_authz service what an Envoy says, and reads its answers as an Envoy does: which
// attributes a check has, in which form, and what an Envoy then sends to its own client. It is written from the behaviour of
// Envoy's filters for HTTP and TCP, and used by tests alone.
package envoycheck

import (
	"crypto/x509"
	"encoding/pem"
	"net/http"
	"strconv"
	"strings"
	"unicode/utf8"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// A Field is one line of a header.
type Field struct{ Name, Value string }

// A Call is what came to a listener of an Envoy, and how its filter is configured.
type Call struct {
	// Peer is the verified certificate of the client; nil if there is none. Local is the one that the Envoy showed.
	Peer, Local *x509.Certificate

	// TCP is a connection, for the network filter; the rest does not matter then.
	TCP bool

	Method, Path, Authority string
	Header                  []Field

	// RawHeaders is encode_raw_headers, NoCertificate the lack of include_peer_certificate.
	RawHeaders, NoCertificate bool

	// Extensions are context_extensions of the route.
	Extensions map[string]string
}

// Request is the check that the filter sends.
func (c Call) Request() *authv3.CheckRequest {
	attributes := &authv3.AttributeContext{
		Source:            &authv3.AttributeContext_Peer{Address: address("192.0.2.7", 49152), Principal: principal(c.Peer)},
		Destination:       &authv3.AttributeContext_Peer{Address: address("192.0.2.8", 8443), Principal: principal(c.Local)},
		ContextExtensions: c.Extensions,
		MetadataContext:   &corev3.Metadata{},
	}
	if c.Peer != nil && !c.NoCertificate {
		attributes.Source.Certificate = Certificate(c.Peer)
	}
	if !c.TCP {
		attributes.Request = &authv3.AttributeContext_Request{Time: timestamppb.Now(), Http: c.http()}
	}
	return &authv3.CheckRequest{Attributes: attributes}
}

func (c Call) http() *authv3.AttributeContext_HttpRequest {
	h := &authv3.AttributeContext_HttpRequest{
		Id: "14694682432331283469", Method: sanitise(c.Method), Path: sanitise(c.Path), Host: sanitise(c.Authority), Scheme: "https", Protocol: "HTTP/2",
	}
	fields := append([]Field{{":authority", c.Authority}, {":path", c.Path}, {":method", c.Method}, {":scheme", "https"}}, c.Header...)
	fields = inline(fields)
	fields = append(fields, Field{"x-forwarded-proto", "https"}, Field{"x-request-id", "c0ffee00-0000-4000-8000-000000000000"})
	if c.RawHeaders {
		h.HeaderMap = &corev3.HeaderMap{}
	} else {
		h.Headers = map[string]string{}
	}
	for _, f := range fields {
		name := strings.ToLower(f.Name)
		if c.RawHeaders {
			h.HeaderMap.Headers = append(h.HeaderMap.Headers, &corev3.HeaderValue{Key: name, RawValue: []byte(f.Value)})
		} else if before, found := h.Headers[name]; found {
			h.Headers[name] = before + "," + sanitise(f.Value)
		} else {
			h.Headers[name] = sanitise(f.Value)
		}
	}
	return h
}

// inline joins the lines of those headers that an Envoy has a place of its own for, whatever the filter asks for.
func inline(fields []Field) []Field {
	places := map[string]int{}
	var out []Field
	for _, f := range fields {
		name := strings.ToLower(f.Name)
		if at, found := places[name]; found {
			out[at].Value += "," + f.Value
			continue
		}
		if name == "content-type" || name == "authorization" {
			places[name] = len(out)
		}
		out = append(out, f)
	}
	return out
}

func address(ip string, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port}}}}
}

// principal is how an Envoy calls the holder of a certificate: the first URI, else the first DNS name, else the subject.
func principal(cert *x509.Certificate) string {
	switch {
	case cert == nil:
		return ""
	case len(cert.URIs) > 0:
		return sanitise(cert.URIs[0].String())
	case len(cert.DNSNames) > 0:
		return sanitise(cert.DNSNames[0])
	default:
		return sanitise(cert.Subject.String())
	}
}

// Certificate is a certificate in the form of source.certificate.
func Certificate(cert *x509.Certificate) string {
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
	return strings.NewReplacer("\n", "%0A", " ", "%20", "+", "%2B", "/", "%2F", "=", "%3D").Replace(string(text))
}

// sanitise makes text valid UTF-8.
func sanitise(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	var out strings.Builder
	for len(s) > 0 {
		r, n := utf8.DecodeRuneInString(s)
		if r == utf8.RuneError && n == 1 {
			out.WriteByte('!')
		} else {
			out.WriteString(s[:n])
		}
		s = s[n:]
	}
	return out.String()
}

// A Reply is what an Envoy does with the answer.
type Reply struct {
	// Passed says that the call goes on to the service; Removed are the headers that it goes without.
	Passed  bool
	Removed []string

	// What the client gets otherwise. GRPCStatus is set for what Envoy takes for a gRPC call.
	Status     int
	GRPCStatus codes.Code
	Header     http.Header
	Body       string
}

// Answer is what an Envoy that does not let calls through on errors makes of the service's answer to the call.
func (c Call) Answer(resp *authv3.CheckResponse, err error) Reply {
	if err == nil && resp.GetStatus().GetCode() == int32(codes.OK) {
		return Reply{Passed: true, Removed: resp.GetOkResponse().GetHeadersToRemove()}
	}
	reply := Reply{Status: http.StatusForbidden, Header: http.Header{}}
	refusal := resp.GetDeniedResponse()
	if err == nil && refusal.GetStatus().GetCode() != 0 {
		reply.Status = int(refusal.GetStatus().GetCode())
	}
	reply.Body = refusal.GetBody()
	contentType := ""
	for _, f := range inline(c.Header) {
		if strings.EqualFold(f.Name, "content-type") {
			contentType = f.Value
		}
	}
	if contentType == "application/grpc" || strings.HasPrefix(contentType, "application/grpc+") {
		// A local reply to a gRPC call is one of trailers only; the service's headers are set after those.
		reply.GRPCStatus = codes.Unknown
		switch reply.Status {
		case http.StatusUnauthorized:
			reply.GRPCStatus = codes.Unauthenticated
		case http.StatusForbidden:
			reply.GRPCStatus = codes.PermissionDenied
		case http.StatusTooManyRequests, http.StatusServiceUnavailable:
			reply.GRPCStatus = codes.Unavailable
		}
		reply.Header.Set("content-type", "application/grpc")
		reply.Header.Set("grpc-status", strconv.Itoa(int(reply.GRPCStatus)))
		reply.Header.Set("grpc-message", reply.Body)
		reply.Status, reply.Body = http.StatusOK, ""
	} else if reply.Body != "" {
		reply.Header.Set("content-type", "text/plain")
		reply.Header.Set("content-length", strconv.Itoa(len(reply.Body)))
	}
	for _, h := range refusal.GetHeaders() {
		if h.GetAppendAction() == corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD {
			reply.Header.Set(h.GetHeader().GetKey(), h.GetHeader().GetValue())
		} else {
			reply.Header.Add(h.GetHeader().GetKey(), h.GetHeader().GetValue())
		}
	}
	return reply
}
