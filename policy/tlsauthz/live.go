package tlsauthz

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/internal/live"
	"github.com/signet-id/signet/spiffe"
)

// Listen returns a listener for the connections of inner, by ServerConfig. It is the shortest way to get all parts right:
// a connection that would not be let through any more is closed, and one that ends is forgotten at once.
func Listen(inner net.Listener, c Config, svid x509svid.Source, bundles x509bundle.Source) (net.Listener, error) {
	config, err := ServerConfig(c, svid, bundles)
	if err != nil {
		return nil, err
	}
	return tls.NewListener(live.Listener(inner), config), nil
}

// A Client connects to servers, none of which is revoked, and closes the connection to one that is revoked later or whose
// X509-SVID expires. Rules of policies are about callers: of servers, Authorize decides. The fields are not changed after
// the first use.
type Client struct {
	// Policies have the revocations. Where they are not known, or too old to be relied on, there is no connection. Required.
	Policies Source
	// SVID is the client's own. Required.
	SVID x509svid.Source
	// Bundles verify servers. Required.
	Bundles x509bundle.Source
	// Authorize says which servers are the right ones, such as tlsconfig.AuthorizeID. Required.
	Authorize tlsconfig.Authorizer
	// NextProtos are offered to the server, such as h2. Nil means none.
	NextProtos []string
	// Log gets what is refused and closed. Nil means slog.Default.
	Log *slog.Logger
	// Now is the clock for validity. Nil means time.Now.
	Now func() time.Time

	once  sync.Once
	table *live.Table
}

// DialContext connects to a server. The connection is a *tls.Conn whose handshake is done. It is a DialTLSContext of
// http.Transport.
func (c *Client) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	raw, err := (&net.Dialer{}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return c.Handshake(ctx, raw)
}

// Handshake makes a TLS connection of one to a server, which it closes if that fails.
func (c *Client) Handshake(ctx context.Context, raw net.Conn) (*tls.Conn, error) {
	if c.Policies == nil || c.SVID == nil || c.Bundles == nil || c.Authorize == nil {
		_ = raw.Close()
		return nil, errors.New("a tlsauthz.Client needs Policies, SVID, Bundles and Authorize")
	}
	c.once.Do(func() { c.table = live.New(live.Config{Policies: c.Policies, Now: c.Now}) })
	below := &live.Conn{Conn: raw}
	config := tlsconfig.MTLSClientConfig(c.SVID, c.Bundles, c.Authorize)
	config.NextProtos = c.NextProtos
	config.VerifyPeerCertificate = nil
	verify := spiffe.VerifyConnection(c.Bundles, c.Now, c.Authorizer())
	config.VerifyConnection = func(state tls.ConnectionState) error {
		if err := verify(state); err != nil {
			return err
		}
		return c.keep(below, state.PeerCertificates[0])
	}
	conn := tls.Client(below, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		_ = below.Close()
		return nil, err
	}
	return conn, nil
}

// keep closes a connection when its server is revoked.
func (c *Client) keep(conn *live.Conn, leaf *x509.Certificate) error {
	remove, d := c.table.Add(live.Link{Leaf: leaf, Judge: live.Callee(leaf), Gone: func() bool { return live.Closed(conn) }, Close: func(d policy.Decision) {
		_ = conn.Close()
		c.log().Info("connection to a server closed", "spiffe_id", uriOf(leaf), "decision", d)
	}})
	conn.End.Then(remove)
	if !d.Allowed {
		return refusedServer(leaf, d)
	}
	return nil
}

// Authorizer is Authorize for go-spiffe's configurations that refuses revoked servers too. Only Handshake and DialContext
// close connections when a server is revoked later.
func (c *Client) Authorizer() tlsconfig.Authorizer {
	return func(id spiffeid.ID, chains [][]*x509.Certificate) error {
		if c.Policies == nil || c.Authorize == nil || len(chains) == 0 || len(chains[0]) == 0 {
			return errors.New("a tlsauthz.Client needs Policies, Authorize and a verified chain of the server")
		}
		if err := c.Authorize(id, chains); err != nil {
			return err
		}
		if d := c.Policies.Policies().DecideCallee(chains[0][0]); !d.Allowed {
			c.log().Info("server refused", "spiffe_id", id.String(), "decision", d)
			return refusedServer(chains[0][0], d)
		}
		return nil
	}
}

func refusedServer(leaf *x509.Certificate, d policy.Decision) error {
	if d.Revocation != "" {
		return fmt.Errorf("the server %s is revoked by %q", uriOf(leaf), d.Revocation)
	}
	return fmt.Errorf("the server %s is refused: %s", uriOf(leaf), d.Reason)
}

func uriOf(leaf *x509.Certificate) string {
	if len(leaf.URIs) == 0 {
		return ""
	}
	return leaf.URIs[0].String()
}

func (c *Client) log() *slog.Logger {
	if c.Log == nil {
		return slog.Default()
	}
	return c.Log
}
