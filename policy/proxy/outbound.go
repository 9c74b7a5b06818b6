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
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/signet-id/signet/spiffe"
)

// An outbound stands before a client: what comes in the clear goes on over mutual TLS, to a server that is expected.
type outbound struct {
	*listener
	id     *identity
	now    func() time.Time
	relays relays
	config atomic.Pointer[outboundConfig]

	front *front // of protocol http
}

// outboundConfig is the part that can change, made ready.
type outboundConfig struct {
	Outbound
	svid    svid
	tls     *tls.Config
	backend *backend
}

// An unexpectedServerError says that a server is who it should not be.
type unexpectedServerError struct {
	id      spiffeid.ID
	revoked string // the revocation, if it is expected all the same
}

func (e *unexpectedServerError) Error() string {
	if e.revoked != "" {
		return fmt.Sprintf("the server's X509-SVID, of %s, is revoked by %q", e.id, e.revoked)
	}
	return fmt.Sprintf("the server is %s, which servers does not list", e.id)
}

func newOutbound(c Outbound, l *listener, id *identity, now func() time.Time) *outbound {
	out := &outbound{listener: l, id: id, now: now}
	out.config.Store(out.ready(c))
	l.limits = func() Limits { return out.config.Load().Limits }
	l.handle = out.handle
	if c.Protocol == protocolHTTP {
		out.front = newFront(l, defaultHeaderBytes, http.HandlerFunc(out.forward), out.clean)
	}
	return out
}

// ready makes a configuration ready for use.
func (out *outbound) ready(c Outbound) *outboundConfig {
	oc := &outboundConfig{Outbound: c, svid: svid{from: out.id}}
	if c.ID != "" {
		oc.svid.id, _ = spiffe.ParseWorkloadID(c.ID) // Check has seen it
	}
	servers := ids(c.Servers)
	authorize := func(id spiffeid.ID, chains [][]*x509.Certificate) error {
		if !servers[id] {
			return &unexpectedServerError{id: id}
		}
		if len(chains) == 0 || len(chains[0]) == 0 {
			return errors.New("no verified chain of the server was handed on")
		}
		if name, found := out.id.Policies().Revocations().X509SVID(chains[0][0]); found {
			return &unexpectedServerError{id: id, revoked: name}
		}
		return nil
	}
	oc.tls = tlsconfig.MTLSClientConfig(oc.svid, out.id, authorize)
	oc.tls.VerifyPeerCertificate = nil
	oc.tls.VerifyConnection = spiffe.VerifyConnection(out.id, out.now, authorize)
	oc.tls.SessionTicketsDisabled = true
	oc.tls.DynamicRecordSizingDisabled = true
	if host, _, err := net.SplitHostPort(c.Address); err == nil && net.ParseIP(host) == nil {
		oc.tls.ServerName = host // for servers that choose by it; it verifies nothing
	}
	if c.Protocol == protocolHTTP {
		oc.tls.NextProtos = []string{"h2", "http/1.1"}
		oc.backend = out.newServer(oc)
	}
	return oc
}

func (out *outbound) handle(ctx context.Context, w *wire) {
	if out.front != nil {
		out.front.hand(w)
		return
	}
	c := out.config.Load()
	to, conn, err := out.connect(ctx, c)
	if err != nil {
		w.Reset()
		return
	}
	out.counts.passed.Inc()
	r := &relay{a: end{wire: w}, b: end{wire: to, tls: conn}, idle: c.Limits.IdleTimeout, halfClosed: c.Limits.HalfClosedTimeout}
	err = out.relays.run(r)
	out.counts.ended(r, err)
	out.log.Debug("a connection ended", "sent", r.aToB.Load(), "received", r.bToA.Load(), "err", err)
}

// connect returns a connection to the server, which is one that is expected. It counts and logs what went wrong.
func (out *outbound) connect(ctx context.Context, c *outboundConfig) (*wire, *tls.Conn, error) {
	w, err := dial(ctx, c.Address, c.Limits.ConnectTimeout)
	if err != nil {
		out.counts.backend.Inc()
		out.log.Warn("the server cannot be reached", "address", c.Address, "err", err)
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.Limits.HandshakeTimeout)
	defer cancel()
	conn := tls.Client(w, c.tls)
	if err := conn.HandshakeContext(ctx); err != nil {
		w.Reset()
		if problem := c.svid.problem(out.now()); problem != "" {
			out.counts.noIdentity.Inc()
			err = fmt.Errorf("%w (%s)", err, problem)
		} else if unexpected := (*unexpectedServerError)(nil); errors.As(err, &unexpected) {
			out.counts.denied.Inc()
		} else {
			out.counts.handshake.Inc()
		}
		out.log.Warn("no TLS connection to the server", "address", c.Address, "err", err)
		return nil, nil, err
	}
	return w, conn, nil
}

// stop ends what is still open when the time for draining is over.
func (out *outbound) stop() { out.relays.abort(errDrained) }
