package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/httpauthz"
	"github.com/signet-id/signet/policy/internal/enforce"
	"github.com/signet-id/signet/policy/internal/live"
	"github.com/signet-id/signet/spiffe"
)

// point is what judgements call this kind of enforcement point.
const point = "proxy"

// An inbound stands before a service: mutual TLS comes in, and what the policies allow goes on to the backend in the clear.
type inbound struct {
	*listener
	service spiffeid.ID
	svid    svid
	tls     *tls.Config
	relays  relays
	live    *live.Table
	config  atomic.Pointer[Inbound]

	// Of protocol http.
	authz   *httpauthz.Authorizer
	front   *front
	backend atomic.Pointer[backend]
}

func newInbound(c Inbound, l *listener, id *identity, table *live.Table, now func() time.Time) (*inbound, error) {
	service, err := spiffe.ParseWorkloadID(c.Service)
	if err != nil {
		return nil, err // Check has seen it
	}
	in := &inbound{listener: l, service: service, svid: svid{id, service}, live: table}
	in.config.Store(&c)
	l.limits = func() Limits { return in.config.Load().Limits }
	l.handle = in.handle
	if c.Protocol == protocolTCP {
		p, err := enforce.New(enforce.Config{Policies: id, Service: service, Log: l.log, OnDecision: l.counts.decided, Now: now, Point: point})
		if err != nil {
			return nil, err
		}
		in.tls = enforce.ServerTLS(in.svid, id, p.Final(), now)
	} else {
		in.authz, err = httpauthz.New(httpauthz.Config{Policies: id, Service: service, JWTBundles: id, Log: l.log, OnDecision: l.counts.decided, Now: now,
			Point: point, Refuse: refuse})
		if err != nil {
			return nil, err
		}
		in.tls = in.authz.TLSConfig(in.svid, id)
		in.tls.GetConfigForClient = nil // which keeps connections until they are denied: ours are in a table of our own
		in.backend.Store(newBackend(c))
		in.front = newFront(l, c.HTTP.MaxHeaderBytes, in.authz.Middleware(http.HandlerFunc(in.forward)), in.clean)
	}
	in.tls.DynamicRecordSizingDisabled = true
	return in, nil
}

func (in *inbound) handle(ctx context.Context, w *wire) {
	conn, err := in.handshake(ctx, w)
	if err != nil {
		w.Reset()
		in.failed(w, err)
		return
	}
	if in.front != nil {
		in.serve(w, conn)
		return
	}
	in.relay(ctx, w, conn)
}

// handshake returns the connection of a peer that the policies let in.
func (in *inbound) handshake(ctx context.Context, w *wire) (*tls.Conn, error) {
	defer in.unknown()()
	ctx, cancel := context.WithTimeout(ctx, in.limits().HandshakeTimeout)
	defer cancel()
	conn := tls.Server(w, in.tls)
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	return conn, nil
}

// failed counts and logs a handshake that led to nothing. A denial was logged by who denied.
func (in *inbound) failed(w *wire, err error) {
	switch denied := (*policy.DeniedError)(nil); {
	case errors.As(err, &denied):
		in.counts.denied.Inc()
	case in.svid.problem(time.Now()) != "":
		in.counts.noIdentity.Inc()
		in.log.Warn("a caller was refused, since there is no X509-SVID to show", "remote", w.RemoteAddr(), "err", in.svid.problem(time.Now()))
	default:
		in.counts.handshake.Inc()
		in.log.Debug("a TLS handshake failed", "remote", w.RemoteAddr(), "err", err)
	}
}

// serve hands a connection to the HTTP server. Its requests are decided one by one; it ends with whatever would let none of them
// through.
func (in *inbound) serve(w *wire, conn *tls.Conn) {
	id, leaf := peerOf(conn)
	remove, d := in.live.Add(live.Link{Leaf: leaf, Judge: live.Prefiltered(in.service, id, leaf), Parting: true, Close: func(d policy.Decision) {
		in.withdrawn(w, id, d)
		_ = w.Close()
	}})
	if !d.Allowed {
		in.withdrawn(w, id, d)
		w.Reset()
		return
	}
	w.end.Then(remove)
	in.counts.passed.Inc()
	in.front.hand(conn)
}

// withdrawn logs the end of a connection that was let in.
func (in *inbound) withdrawn(w *wire, id spiffeid.ID, d policy.Decision) {
	in.counts.withdrawn.Inc()
	in.log.Info("a connection was ended, since its peer would not be let in any more", "spiffe_id", id.String(), "service", in.service.String(),
		"remote", w.RemoteAddr(), "decision", d)
}

// peerOf is the peer of a connection whose handshake is over.
func peerOf(conn *tls.Conn) (spiffeid.ID, *x509.Certificate) {
	leaf := conn.ConnectionState().PeerCertificates[0]
	id, err := spiffe.CheckX509SVIDLeaf(leaf)
	if err != nil {
		return spiffeid.ID{}, leaf // it was verified: this cannot be, and no rule is for this ID
	}
	return id, leaf
}

// relay passes on the bytes of a connection that was allowed.
func (in *inbound) relay(ctx context.Context, w *wire, conn *tls.Conn) {
	c := in.config.Load()
	to, err := dial(ctx, c.Backend, c.Limits.ConnectTimeout)
	if err == nil && c.SendProxyProtocol {
		if err = sendProxyHeader(to, w, conn, c.Limits.ConnectTimeout); err != nil {
			to.Reset()
		}
	}
	if err != nil {
		w.Reset()
		in.counts.backend.Inc()
		in.log.Warn("the backend cannot be reached; the connection was closed", "backend", c.Backend, "err", err)
		return
	}
	r := &relay{a: end{wire: w, tls: conn}, b: end{wire: to}, idle: c.Limits.IdleTimeout, halfClosed: c.Limits.HalfClosedTimeout}
	id, leaf := peerOf(conn)
	remove, d := in.live.Add(live.Link{Leaf: leaf, Judge: live.Connection(in.service, id, leaf), Close: func(d policy.Decision) {
		in.withdrawn(w, id, d)
		r.abort(errWithdrawn)
	}})
	if !d.Allowed {
		in.withdrawn(w, id, d)
		r.abort(errWithdrawn)
		return
	}
	defer remove()
	in.counts.passed.Inc()
	err = in.relays.run(r)
	in.counts.ended(r, err)
	in.log.Debug("a connection ended", "remote", w.RemoteAddr(), "received", r.aToB.Load(), "sent", r.bToA.Load(), "err", err)
}

// dial connects in the clear to what the configuration names, or over TCP to a server.
func dial(ctx context.Context, address string, timeout time.Duration) (*wire, error) {
	network, addr := split(address)
	d := net.Dialer{Timeout: timeout, KeepAliveConfig: keepAlive, Control: unacknowledged}
	c, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return newWire(c)
}

// stop ends what is still open when the time for draining is over.
func (in *inbound) stop() {
	in.relays.abort(errDrained)
}

var errDrained = fmt.Errorf("the proxy ends: %w", context.Canceled)
