package proxy

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/textproto"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"
)

// A front is the HTTP server of a listener: the half of it that callers see.
type front struct {
	*handed
	server *http.Server
}

// newFront returns a front whose every request goes through clean, and on to next if that lets it.
func newFront(l *listener, maxHeaderBytes int, next http.Handler, clean func(*http.Request) *refusal) *front {
	limits := l.limits()
	f := &front{handed: newHanded(l.l.Addr())}
	f.server = &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if refused := clean(r); refused != nil {
				l.counts.request(refused.status)
				refused.answer(w, r)
				return
			}
			watched := watch(w, r, l.limits().IdleTimeout)
			defer watched.stop()
			defer func() { l.counts.request(watched.status) }()
			next.ServeHTTP(watched, watched.request)
		}),
		ReadHeaderTimeout: limits.HeaderTimeout,
		IdleTimeout:       limits.IdleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(l.log.Handler(), slog.LevelDebug),
		// OPTIONS * is for the policies and the backend, as all else.
		DisableGeneralOptionsHandler: true,
		Protocols:                    new(http.Protocols),
	}
	f.server.Protocols.SetHTTP1(true)
	f.server.Protocols.SetHTTP2(true)
	f.server.Protocols.SetUnencryptedHTTP2(true) // for clients of outbound listeners; what comes by TLS has agreed on its protocol
	return f
}

// run serves until drain is called.
func (f *front) run() error {
	if err := f.server.Serve(f); err != http.ErrServerClosed {
		return err
	}
	return nil
}

// drain lets requests end, until ctx does.
func (f *front) drain(ctx context.Context) {
	if f.server.Shutdown(ctx) != nil {
		_ = f.server.Close() // what did not end by itself is cut off
	}
	_ = f.handed.Close() // it never fails, and has been closed already if the server got as far as to use it
}

// A refusal is a request that is not even judged: what the backend would see of it is not sure.
type refusal struct {
	status int
	reason string
}

func (f *refusal) answer(w http.ResponseWriter, r *http.Request) {
	writeError(w, r, f.status, f.reason, "")
}

// forwarding are headers that say who called before. Backends believe them, so callers cannot set them.
var forwarding = []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Client-Cert"}

// hop are headers that are meant for the proxy and end here.
var hop = []string{"Keep-Alive", "Proxy-Connection", "Proxy-Authenticate", "Proxy-Authorization", "Trailer"}

// defaultPeerHeader is always taken from what callers send.
const defaultPeerHeader = "Signet-Peer-Id"

// reservedHeader says whether a header is HTTP's own, so that the caller's ID cannot be in it.
func reservedHeader(name string) bool {
	name = textproto.CanonicalMIMEHeaderKey(name)
	return slices.Contains(hop, name) || slices.Contains(forwarding, name) || slices.Contains([]string{"Connection", "Upgrade", "Te", "Transfer-Encoding",
		"Content-Length", "Content-Type", "Host", "Authorization", "Cookie", "Expect", "User-Agent", "Signet-Decision-Id"}, name)
}

// cleanTarget refuses requests whose target or framing a backend could understand in another way, and takes from the others what
// is meant for this connection alone. Whatever is left of the headers is what the backend will get.
func cleanTarget(r *http.Request) *refusal {
	switch {
	case r.Method == "PRI":
		return &refusal{http.StatusBadRequest, "method_refused"} // the beginning of HTTP/2 where HTTP/1 was agreed on
	case len(r.Header["Host"]) > 1 || len(r.Header["Host"]) == 1 && r.Header["Host"][0] != r.Host:
		return &refusal{http.StatusBadRequest, "host_refused"} // HTTP/2 has the host twice, and differently
	}
	if len(r.Trailer) > 0 {
		// There are no rules for them, and they would come after the decision.
		return &refusal{http.StatusBadRequest, "trailers_refused"}
	}
	delete(r.Header, "Host")
	for _, line := range r.Header["Connection"] {
		for option := range strings.SplitSeq(line, ",") {
			switch strings.ToLower(textproto.TrimString(option)) {
			case "", "close", "keep-alive", "upgrade", "te", "http2-settings":
			default:
				// A header that is listed there would be gone when the backend gets the request.
				return &refusal{http.StatusBadRequest, "connection_header_refused"}
			}
		}
	}
	for _, name := range hop {
		delete(r.Header, name)
	}
	if httpguts.HeaderValuesContainsToken(r.Header["Te"], "trailers") {
		r.Header["Te"] = []string{"trailers"}
	} else {
		delete(r.Header, "Te")
	}
	return nil
}

// cleanUpgrade lets WebSockets through. Anything else that a connection could become would not be judged.
func cleanUpgrade(r *http.Request, forgetH2C bool) *refusal {
	upgrade := r.Header["Upgrade"]
	_, settings := r.Header["Http2-Settings"]
	asked := httpguts.HeaderValuesContainsToken(r.Header["Connection"], "upgrade")
	switch {
	case len(upgrade) == 0 && !settings && !asked:
		delete(r.Header, "Connection")
		return nil
	case forgetH2C && (settings || len(upgrade) == 1 && strings.EqualFold(upgrade[0], "h2c")):
		// A client that would like HTTP/2 takes HTTP/1 as well.
		delete(r.Header, "Upgrade")
		delete(r.Header, "Http2-Settings")
		delete(r.Header, "Connection")
		return nil
	case settings, len(upgrade) != 1, !asked, !strings.EqualFold(upgrade[0], "websocket"), r.Method != http.MethodGet, r.ProtoMajor != 1 || r.ProtoMinor != 1,
		r.ContentLength != 0:
		return &refusal{http.StatusBadRequest, "upgrade_refused"}
	}
	return nil
}

// clean prepares a request for the decision, or refuses it.
func (in *inbound) clean(r *http.Request) *refusal {
	c := in.config.Load()
	if refused := cleanTarget(r); refused != nil {
		return refused
	}
	if refused := cleanUpgrade(r, false); refused != nil {
		return refused
	}
	if !c.HTTP.AllowUnderscores {
		for name := range r.Header {
			if strings.Contains(name, "_") {
				return &refusal{http.StatusBadRequest, "header_name_refused"}
			}
		}
	}
	if !c.HTTP.TrustForwardedHeaders {
		for _, name := range forwarding {
			delete(r.Header, name)
		}
	}
	for name := range r.Header {
		if like(name, defaultPeerHeader) || like(name, c.HTTP.PeerIDHeader) {
			delete(r.Header, name)
		}
	}
	return nil
}

// like says whether programs that take "_" for "-" could take one header for the other.
func like(name, other string) bool {
	return len(name) == len(other) && strings.EqualFold(strings.ReplaceAll(name, "_", "-"), other)
}

// clean prepares a client's request for the server.
func (out *outbound) clean(r *http.Request) *refusal {
	if refused := cleanTarget(r); refused != nil {
		return refused
	}
	return cleanUpgrade(r, true)
}

// writeError answers with an error of the proxy's own: as JSON, and to gRPC as gRPC does. id is that of the decision, if it was one.
func writeError(w http.ResponseWriter, r *http.Request, status int, reason, id string) {
	if isGRPC(r) {
		writeGRPCError(w, status, reason, id)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("X-Content-Type-Options", "nosniff")
	body, err := json.Marshal(struct {
		DecisionID string `json:"decision_id,omitempty"`
		Reason     string `json:"reason"`
	}{id, reason})
	if err != nil { // two strings always have a JSON form
		body = nil
	}
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n')) // a caller that is gone needs no answer
}

// noTime is a deadline that is over.
var noTime = time.Unix(1, 0)
