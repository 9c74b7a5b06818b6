package proxy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/signet-id/signet/jwtauth"
	"github.com/signet-id/signet/policy/httpauthz"
)

const (
	// maxIdle is how many unused connections to one backend are kept, and for how long.
	maxIdle     = 256
	maxIdleTime = time.Minute
)

// A backend is what requests are passed on to: the half of the proxy that callers do not see.
type backend struct {
	transport *http.Transport
	proxy     *httputil.ReverseProxy
}

// retire closes connections that are not in use. Requests under way go on.
func (b *backend) retire() { b.transport.CloseIdleConnections() }

func newBackend(c Inbound) *backend {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(c.HTTP.BackendProtocol == backendHTTP1)
	protocols.SetUnencryptedHTTP2(c.HTTP.BackendProtocol == backendH2C)
	b := &backend{transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dial(ctx, c.Backend, c.Limits.ConnectTimeout)
		},
		Protocols:              protocols,
		DisableCompression:     true,
		MaxIdleConnsPerHost:    maxIdle,
		IdleConnTimeout:        maxIdleTime,
		ExpectContinueTimeout:  time.Second,
		ResponseHeaderTimeout:  c.HTTP.ResponseTimeout,
		MaxResponseHeaderBytes: mostHeaderBytes,
	}}
	b.proxy = &httputil.ReverseProxy{Transport: b.transport, BufferPool: pool{}, Rewrite: func(r *httputil.ProxyRequest) {
		rewrite(r, "http")
		if !c.HTTP.TrustForwardedHeaders {
			r.SetXForwarded()
		} else {
			for _, name := range forwarding {
				if lines, ok := r.In.Header[name]; ok {
					r.Out.Header[name] = lines
				}
			}
		}
		if id, ok := httpauthz.PeerID(r.In.Context()); ok && c.HTTP.PeerIDHeader != "" {
			r.Out.Header.Set(c.HTTP.PeerIDHeader, id.String())
		}
	}}
	return b
}

// rewrite makes the request that goes on: with the same target, byte for byte, and the same host.
func rewrite(r *httputil.ProxyRequest, scheme string) {
	path, query, hasQuery := strings.Cut(r.In.RequestURI, "?")
	r.Out.URL = &url.URL{Scheme: scheme, Host: "backend", Opaque: path, RawQuery: query, ForceQuery: hasQuery}
	r.Out.Host = r.In.Host
	r.Out.Trailer = nil
}

// forwardable says whether rewrite can pass on this target as it is. Policies deny all others, but a shadow of them lets through.
func forwardable(r *http.Request) bool {
	if r.RequestURI == "*" {
		return r.Method == http.MethodOptions
	}
	return r.Method != http.MethodConnect && strings.HasPrefix(r.RequestURI, "/") && !strings.HasPrefix(r.RequestURI, "//")
}

// forward passes on a request that was allowed.
func (in *inbound) forward(w http.ResponseWriter, r *http.Request) {
	if !forwardable(r) {
		writeError(w, r, http.StatusBadRequest, "target_refused", "")
		return
	}
	c, b := in.config.Load(), in.backend.Load()
	p := *b.proxy
	p.ErrorLog = slog.NewLogLogger(in.log.Handler(), slog.LevelDebug)
	p.ErrorHandler = func(w http.ResponseWriter, r *http.Request, err error) {
		in.counts.backend.Inc()
		unreachable(in.log, w, r, c.Backend, err)
	}
	p.ServeHTTP(w, r)
}

// newServer is the server of an outbound listener as a backend.
func (out *outbound) newServer(c *outboundConfig) *backend {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	b := &backend{transport: &http.Transport{
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			w, conn, err := out.connect(ctx, c)
			if err != nil {
				return nil, err
			}
			if err := out.keep(w, conn, w.Reset); err != nil {
				return nil, err
			}
			return conn, nil
		},
		Protocols:              protocols,
		DisableCompression:     true,
		MaxIdleConnsPerHost:    maxIdle,
		IdleConnTimeout:        maxIdleTime,
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: mostHeaderBytes,
	}}
	b.proxy = &httputil.ReverseProxy{Transport: b.transport, BufferPool: pool{}, Rewrite: func(r *httputil.ProxyRequest) {
		rewrite(r, "https")
		for _, name := range forwarding { // a client's own; it is no proxy
			if lines, ok := r.In.Header[name]; ok {
				r.Out.Header[name] = lines
			}
		}
		if a, ok := r.In.Context().Value(attachedKey{}).(attached); ok {
			r.Out.Header.Set("Authorization", a.token.TokenType+" "+a.token.AccessToken)
		}
	}, ModifyResponse: func(resp *http.Response) error {
		if a, ok := resp.Request.Context().Value(attachedKey{}).(attached); ok && resp.StatusCode == http.StatusUnauthorized {
			a.cache.Refused(a.audience, a.token)
		}
		return nil
	}}
	return b
}

// attached is the token that goes with a request.
type attached struct {
	cache    *jwtauth.Cache
	audience string
	token    *jwtauth.Token
}

type attachedKey struct{}

// attach adds a token to the context of a request.
func (out *outbound) attach(c *outboundConfig, r *http.Request) (*http.Request, error) {
	cache, err := out.id.tokens(c.svid.id)
	if err != nil {
		return nil, err
	}
	token, err := cache.Token(r.Context(), c.JWTAudience)
	if err != nil {
		return nil, err
	}
	return r.WithContext(context.WithValue(r.Context(), attachedKey{}, attached{cache, c.JWTAudience, token})), nil
}

// forward passes on a client's request.
func (out *outbound) forward(w http.ResponseWriter, r *http.Request) {
	c := out.config.Load()
	if !forwardable(r) {
		writeError(w, r, http.StatusBadRequest, "target_refused", "")
		return
	}
	if c.JWTAudience != "" {
		with, err := out.attach(c, r)
		if err != nil {
			out.counts.noIdentity.Inc()
			out.log.Warn("no JWT-SVID for a request", "audience", c.JWTAudience, "err", err)
			writeError(w, r, http.StatusServiceUnavailable, "no_jwt_svid", "")
			return
		}
		r = with
	}
	p := *c.backend.proxy
	p.ErrorLog = slog.NewLogLogger(out.log.Handler(), slog.LevelDebug)
	p.ErrorHandler = func(w http.ResponseWriter, r *http.Request, err error) { unreachable(out.log, w, r, c.Address, err) }
	p.ServeHTTP(w, r)
}

// unreachable answers a request that could not be passed on, or got no answer.
func unreachable(log *slog.Logger, w http.ResponseWriter, r *http.Request, address string, err error) {
	status := http.StatusBadGateway
	switch {
	case errors.Is(err, context.Canceled):
		log.Debug("a request ended before its answer", "err", err)
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded), isTimeout(err):
		status = http.StatusGatewayTimeout
		fallthrough
	default:
		log.Warn("a request got no answer", "from", address, "err", err)
	}
	writeError(w, r, status, "no_answer", "")
}

func isTimeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}

// pool lends the relay's buffers to net/http.
type pool struct{}

// Get is httputil.BufferPool's.
func (pool) Get() []byte { return *buffers.Get().(*[]byte) }

// Put is httputil.BufferPool's.
func (pool) Put(b []byte) { buffers.Put(&b) }
