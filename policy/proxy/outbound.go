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

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/internal/live"
	"github.com/signet-id/signet/spiffe"
)

// An outbound stands before a client: what comes in the clear goes on over mutual TLS, to a server that is expected.
type outbound struct {
	*listener
	id     *identity
	now    func() time.Time
	relays relays
	live   *live.Table
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

// A serverError says that a server is not one to talk to.
type serverError struct {
	id       spiffeid.ID
	decision *policy.Decision // why not, if it is expected
}

func (e *serverError) Error() string {
	switch {
	case e.decision == nil:
		return fmt.Sprintf("the server is %s, which servers does not list", e.id)
	case e.decision.Revocation != "":
		return fmt.Sprintf("the server %s is revoked by %q", e.id, e.decision.Revocation)
	}
	return fmt.Sprintf("the server %s is not talked to: %s", e.id, e.decision.Reason)
}

func newOutbound(c Outbound, l *listener, id *identity, table *live.Table, now func() time.Time) *outbound {
	out := &outbound{listener: l, id: id, live: table, now: now}
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
			return &serverError{id: id}
		}
		if len(chains) == 0 || len(chains[0]) == 0 {
			return errors.New("no verified chain of the server was handed on")
		}
		if d := out.id.Policies().DecideCallee(chains[0][0]); !d.Allowed {
			return &serverError{id: id, decision: &d}
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
	r := &relay{a: end{wire: w}, b: end{wire: to, tls: conn}, idle: c.Limits.IdleTimeout, halfClosed: c.Limits.HalfClosedTimeout}
	if out.keep(to, conn, func() { r.abort(errWithdrawn) }) != nil {
		return
	}
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
		} else if unexpected := (*serverError)(nil); errors.As(err, &unexpected) {
			out.counts.denied.Inc()
		} else {
			out.counts.handshake.Inc()
		}
		out.log.Warn("no TLS connection to the server", "address", c.Address, "err", err)
		return nil, nil, err
	}
	return w, conn, nil
}

// keep sees to it that a connection is ended when its server is revoked, or its SVID expires; at once, if that is so already.
func (out *outbound) keep(w *wire, conn *tls.Conn, end func()) error {
	id, leaf := peerOf(conn)
	withdrawn := func(d policy.Decision) {
		out.counts.withdrawn.Inc()
		out.log.Info("a connection was ended, since its server is not one to talk to any more", "spiffe_id", id.String(), "remote", w.RemoteAddr(), "decision", d)
		end()
	}
	remove, d := out.live.Add(live.Link{Leaf: leaf, Judge: live.Callee(leaf), Close: withdrawn})
	if !d.Allowed {
		withdrawn(d)
		return &serverError{id: id, decision: &d}
	}
	w.end.Then(remove)
	out.counts.passed.Inc()
	return nil
}

// stop ends what is still open when the time for draining is over.
func (out *outbound) stop() { out.relays.abort(errDrained) }
