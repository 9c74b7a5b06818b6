package broker

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"

	"github.com/signet-id/signet/spiffe"
)

// An origin is where a connection comes from, as far as it matters for local references.
type origin int

const (
	elsewhere origin = iota
	loopback         // TCP, both ends of which are this host's loopback interface
	unixSocket
)

// A connInfo is the gRPC AuthInfo of a connection: who was at the other end at the handshake.
type connInfo struct {
	credentials.TLSInfo
	id     spiffeid.ID
	chain  []*x509.Certificate
	origin origin
}

// connFromContext returns the connInfo of the connection that a call came over.
func connFromContext(ctx context.Context) (connInfo, bool) {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return connInfo{}, false
	}
	info, ok := p.AuthInfo.(connInfo)
	return info, ok
}

// connections takes brokers' connections: bounded, by mutual TLS with X509-SVIDs on every transport.
//
// Whoever has an SVID of the trust domain and is no broker is let in as far as the answer to its first call, which says
// so; there are only a few places for that, and they are not the brokers'.
type connections struct {
	cfg    *Config
	listed func(spiffeid.ID) bool
	tls    credentials.TransportCredentials

	mu   sync.Mutex
	all  int
	each map[spiffeid.ID]int // the zero ID: all that are no broker
}

func newConnections(cfg *Config, listed func(spiffeid.ID) bool) *connections {
	c := &connections{cfg: cfg, listed: listed, each: map[spiffeid.ID]int{}}
	c.tls = credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS12,
		// For TLS 1.2; those of 1.3 are all good.
		CipherSuites: []uint16{
			tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
			tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		},
		ClientAuth: tls.RequireAnyClientCert, // VerifyConnection verifies, by SPIFFE's rules
		// Each connection is judged by the present bundle (X509-55).
		SessionTicketsDisabled: true,
		Time:                   cfg.Now,
		GetCertificate:         c.certificate,
		VerifyConnection:       spiffe.VerifyConnection(cfg.Bundles, cfg.Now, c.known),
	})
	return c
}

func (c *connections) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	svid := c.cfg.SVID()
	if svid == nil {
		return nil, errors.New("the agent has no X509-SVID yet")
	}
	cert := &tls.Certificate{PrivateKey: svid.PrivateKey}
	for _, part := range svid.Certificates {
		cert.Certificate = append(cert.Certificate, part.Raw)
	}
	return cert, nil
}

func (c *connections) known(id spiffeid.ID, _ [][]*x509.Certificate) error {
	if !id.MemberOf(c.cfg.TrustDomain) {
		return fmt.Errorf("%q is of another trust domain", id)
	}
	return nil
}

// listener bounds the connections that l takes, from before the handshake on.
func (c *connections) listener(l net.Listener) net.Listener { return &listener{Listener: l, conns: c} }

type listener struct {
	net.Listener
	conns *connections
}

// Accept closes what is more than the limit at once, and goes on.
func (l *listener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.conns.enter() {
			return &conn{Conn: raw, conns: l.conns}, nil
		}
		l.conns.cfg.Log.LogAttrs(context.Background(), slog.LevelDebug, "connection refused", slog.Int("open", maxConnections))
		raw.Close()
	}
}

func (c *connections) enter() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all >= maxConnections {
		return false
	}
	c.all++
	return true
}

// admit counts a connection of id, which is then known.
func (c *connections) admit(id spiffeid.ID) (counted spiffeid.ID, err error) {
	most := maxConnectionsEach
	if !c.listed(id) {
		id, most = spiffeid.ID{}, maxStrangers
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.each[id] >= most {
		return id, fmt.Errorf("%d connections are open, which is the limit", c.each[id])
	}
	c.each[id]++
	return id, nil
}

// A conn gives up its places when it is closed.
type conn struct {
	net.Conn
	conns *connections
	once  sync.Once

	// Guarded by conns.mu.
	admitted bool
	counted  spiffeid.ID
	closed   bool
}

// Close closes the connection. It may be called more than once.
func (c *conn) Close() error {
	err := net.ErrClosed
	c.once.Do(func() {
		err = c.Conn.Close()
		c.conns.mu.Lock()
		defer c.conns.mu.Unlock()
		c.conns.all--
		c.closed = true
		if c.admitted {
			c.conns.leave(c.counted)
		}
	})
	return err
}

// leave is called with mu held.
func (c *connections) leave(id spiffeid.ID) {
	if c.each[id]--; c.each[id] == 0 {
		delete(c.each, id)
	}
}

// took notes which place the connection holds, or gives it up if the connection is closed already.
func (c *conn) took(id spiffeid.ID) {
	c.conns.mu.Lock()
	defer c.conns.mu.Unlock()
	if c.closed {
		c.conns.leave(id)
		return
	}
	c.admitted, c.counted = true, id
}

func originOf(raw net.Conn) origin {
	if raw.LocalAddr().Network() == "unix" {
		return unixSocket
	}
	local, ok1 := raw.LocalAddr().(*net.TCPAddr)
	remote, ok2 := raw.RemoteAddr().(*net.TCPAddr)
	if ok1 && ok2 && local.IP.IsLoopback() && remote.IP.IsLoopback() {
		return loopback
	}
	return elsewhere
}

func (c *connections) credentials() credentials.TransportCredentials { return transport{c} }

type transport struct{ conns *connections }

func (t transport) Info() credentials.ProtocolInfo { return t.conns.tls.Info() }

func (t transport) Clone() credentials.TransportCredentials { return t }

func (t transport) OverrideServerName(string) error {
	return errors.New("a server name means nothing here: SPIFFE IDs count")
}

func (t transport) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for the server side alone")
}

// ServerHandshake does TLS and says who is there. gRPC bounds the time it takes.
func (t transport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	refused := func(err error) (net.Conn, credentials.AuthInfo, error) {
		t.conns.cfg.Log.LogAttrs(context.Background(), slog.LevelDebug, "connection to the Broker Endpoint refused", slog.Any("err", err))
		raw.Close()
		return nil, nil, err
	}
	own, ok := raw.(*conn)
	if !ok {
		return refused(fmt.Errorf("connection is a %T, not one of the endpoint's own listeners", raw))
	}
	secure, auth, err := t.conns.tls.ServerHandshake(raw)
	if err != nil {
		return refused(err)
	}
	info, ok := auth.(credentials.TLSInfo)
	if !ok {
		return refused(fmt.Errorf("the handshake says %T", auth))
	}
	id, err := spiffe.CheckX509SVIDLeaf(info.State.PeerCertificates[0]) // VerifyConnection has verified it
	if err != nil {
		return refused(err)
	}
	counted, err := t.conns.admit(id)
	if err != nil {
		return refused(fmt.Errorf("%q: %w", id, err))
	}
	own.took(counted)
	return secure, connInfo{TLSInfo: info, id: id, chain: info.State.PeerCertificates, origin: originOf(own.Conn)}, nil
}
