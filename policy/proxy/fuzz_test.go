package proxy

import (
	"bufio"
	"bytes"
	"net/http"
	"net/http/httputil"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http/httpguts"
)

// FuzzForward: of whatever bytes a request is made, it is refused, or what goes on to the backend reads as one request with the target, method,
// host and headers that were judged, and nothing behind it.
func FuzzForward(f *testing.F) {
	for _, seed := range []string{
		"GET /docs/a HTTP/1.1\r\nHost: h\r\n\r\n",
		"GET /docs/%2e%2e/a?b=c?d HTTP/1.1\r\nHost: h\r\nX-A: 1\r\nX-A: 2\r\n\r\n",
		"GET //docs HTTP/1.1\r\nHost: h\r\n\r\n", "GET http://h/docs HTTP/1.1\r\nHost: i\r\n\r\n", "CONNECT h:1 HTTP/1.1\r\nHost: h\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", "GET /a?? HTTP/1.0\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"GET /a HTTP/1.1\r\nHost: h\r\nConnection: close, X-A\r\nX-A: 1\r\n\r\n",
		"GET /a HTTP/1.1\r\nHost: h\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
		"GET /a HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n\r\n",
		"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc", "POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: y\r\n\r\n",
		"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
		"GET /a HTTP/1.1\r\nHost: h\r\nSignet_Peer-Id: x\r\nX-Forwarded-For: y\r\nTE: gzip\r\n\r\n",
	} {
		f.Add([]byte(seed))
	}
	in := &inbound{}
	in.config.Store(&Inbound{HTTP: HTTP{PeerIDHeader: "X-Caller"}})
	f.Fuzz(func(t *testing.T, raw []byte) {
		if len(raw) > 64<<10 {
			return
		}
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(raw)))
		if err != nil || !httpguts.ValidHostHeader(r.Host) || in.clean(r) != nil || !forwardable(r) { // net/http refuses such a host before
			return
		}
		judged := r.Clone(t.Context())
		out := r.Clone(t.Context())
		if out.ContentLength == 0 {
			out.Body = nil
		}
		rewrite(&httputil.ProxyRequest{In: r, Out: out}, "http")
		out.RequestURI = ""
		if _, ok := out.Header["User-Agent"]; !ok {
			out.Header["User-Agent"] = []string{""}
		}
		var wire bytes.Buffer
		if out.Write(&wire) != nil {
			return // a body that breaks off, or what the transport refuses to send
		}
		sent := wire.String()
		b := bufio.NewReader(&wire)
		got, err := http.ReadRequest(b)
		if err != nil {
			t.Fatalf("%q went on as %q: %v", raw, sent, err)
		}
		if got.RequestURI != judged.RequestURI || got.Method != judged.Method || got.Host != judged.Host && judged.Host != "" {
			t.Errorf("%s %q of %q was judged, %q went on", judged.Method, judged.RequestURI, judged.Host, sent)
		}
		if _, err := got.Body.Read(make([]byte, len(raw)+1)); err == nil && judged.ContentLength == 0 {
			t.Errorf("a body came out of %q: %q", raw, sent)
		}
		for name, lines := range got.Header {
			if slices.Contains([]string{"Content-Length", "Transfer-Encoding", "Connection", "Upgrade"}, name) {
				continue
			}
			if want := judged.Header[name]; !slices.EqualFunc(lines, want, func(a, b string) bool { return strings.TrimSpace(a) == strings.TrimSpace(b) }) && !(name == "User-Agent" && len(want) == 0) {
				t.Errorf("header %s: %q was judged, %q went on", name, want, lines)
			}
			if strings.Contains(name, "_") || like(name, "X-Caller") || like(name, defaultPeerHeader) {
				t.Errorf("header %s went on", name)
			}
		}
	})
}
