package httpauthz

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/internal/enforce"
)

// Protect makes server one whose every request is decided before it reaches its handler, for ServeTLS(listener, "", ""), and
// whose connections and requests end when they would not be let through any more, upgraded ones too. It sets Handler,
// TLSConfig, ConnContext and ConnState, of which it calls those that were there.
//
// A server that has Middleware and TLSConfig alone ends connections likewise, and requests as far as net/http lets it: an
// upgraded connection only when nothing of its peer's would be allowed. With Prefilter in a TLS configuration of one's own,
// connections stay open, and each request on them is decided.
func (a *Authorizer) Protect(server *http.Server, svid x509svid.Source, bundles x509bundle.Source) {
	handler := server.Handler
	if handler == nil {
		handler = http.DefaultServeMux
	}
	server.Handler = a.Middleware(handler)
	server.TLSConfig = a.TLSConfig(svid, bundles)
	connContext, connState := server.ConnContext, server.ConnState
	server.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		if connContext != nil {
			ctx = connContext(ctx, c)
		}
		return context.WithValue(ctx, connectionKey{}, a.point.Connection(below(c)))
	}
	server.ConnState = func(c net.Conn, state http.ConnState) {
		switch state {
		case http.StateClosed:
			a.point.Connection(below(c)).Ended()
		case http.StateHijacked:
			a.point.Connection(below(c)).Hijacked()
		}
		if connState != nil {
			connState(c, state)
		}
	}
}

type connectionKey struct{}

// below is the connection below TLS.
func below(c net.Conn) net.Conn {
	if t, ok := c.(*tls.Conn); ok {
		return t.NetConn()
	}
	return c
}

// serve answers a request that was let through, until it would not be any more.
func (a *Authorizer) serve(w http.ResponseWriter, r *http.Request, request *policy.Request, j policy.Judgement, next http.Handler) {
	kept := *request
	headers := r.Header.Clone() // the handler may change its own
	kept.Headers, kept.ContentTypes = headers, headers["Content-Type"]

	ctx, cancel := context.WithCancelCause(context.WithValue(r.Context(), judgementKey{}, j))
	defer cancel(nil)
	answered := &answer{w: w, http1: r.ProtoMajor == 1, cancel: cancel}
	answered.conn, _ = r.Context().Value(connectionKey{}).(*enforce.Connection)
	done, j, err := a.point.KeepRequest(r.Context(), &kept, answered.end)
	if err != nil {
		a.refuse(w, r, j)
		return
	}
	defer func() {
		if answered.conn != nil && answered.conn.IsHijacked() {
			answered.conn.Then(done) // the request lasts as long as the connection
		} else {
			done()
		}
		if answered.over() {
			panic(http.ErrAbortHandler) // what is cut off must not look complete
		}
	}()
	next.ServeHTTP(w, r.WithContext(ctx))
}

// An answer is a response that is being written.
type answer struct {
	w      http.ResponseWriter
	http1  bool
	conn   *enforce.Connection // nil: not known
	cancel context.CancelCauseFunc

	mu       sync.Mutex
	returned bool // the handler has; w must not be used any more
	ended    bool
}

// end cuts the answer off.
func (a *answer) end(j policy.Judgement) {
	a.cancel(&policy.DeniedError{Judgement: j})
	a.mu.Lock()
	defer a.mu.Unlock()
	hijacked := a.conn != nil && a.conn.IsHijacked()
	if a.returned && !hijacked {
		return
	}
	a.ended = true
	if a.conn != nil && (a.http1 || hijacked) {
		a.conn.Close()
		return
	}
	past := time.Unix(1, 0)
	control := http.NewResponseController(a.w)
	_ = control.SetReadDeadline(past) // a writer that has no deadlines finds its context ended
	_ = control.SetWriteDeadline(past)
}

// over notes that the handler has returned, and says whether its answer was cut off.
func (a *answer) over() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.returned = true
	return a.ended && (a.conn == nil || !a.conn.IsHijacked())
}
