package enforce

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"log/slog"
	"net"
	"reflect"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/internal/live"
	"github.com/signet-id/signet/spiffe"
)

// A Connection is one that a Point knows of, from below TLS.
type Connection struct {
	conn     net.Conn
	end      *live.End
	hijacked atomic.Bool
}

// Connection returns what is known of a connection below TLS.
func (p *Point) Connection(conn net.Conn) *Connection {
	c := &Connection{conn: conn, end: new(live.End)}
	if telling, ok := conn.(*live.Conn); ok {
		c.end = &telling.End
	}
	if !reflect.TypeOf(conn).Comparable() {
		return c // it cannot be found again by others
	}
	if known, found := p.connections.LoadOrStore(conn, c); found {
		return known.(*Connection)
	}
	c.end.Then(func() { p.connections.Delete(conn) })
	return c
}

// Close closes the connection without waiting for a peer that does not read, as TLS would.
func (c *Connection) Close() {
	_ = c.conn.Close() // what cannot be closed is closed
	c.end.Come()
}

// Ended says that others have closed the connection, Hijacked that others than the server use it now.
func (c *Connection) Ended()    { c.end.Come() }
func (c *Connection) Hijacked() { c.hijacked.Store(true) }

// IsHijacked says whether Hijacked was called.
func (c *Connection) IsHijacked() bool { return c.hijacked.Load() }

// Then has f called when the connection has ended.
func (c *Connection) Then(f func()) { c.end.Then(f) }

// gone says whether the connection was closed, as far as that can be told.
func (c *Connection) gone() bool {
	if !live.Closed(c.conn) {
		return false
	}
	c.end.Come()
	return true
}

// FinalTLS is the function ServerTLS with Final, whose connections end when their peers would not be admitted any more.
func (p *Point) FinalTLS(svid x509svid.Source, bundles x509bundle.Source) *tls.Config {
	return p.watchConnections(ServerTLS(svid, bundles, p.Final(), p.config.Now), live.Connection, false)
}

// watchConnections keeps the connections that c lets through. c may be changed until it is used.
func (p *Point) watchConnections(c *tls.Config, judge func(service, peer spiffeid.ID, leaf *x509.Certificate) live.Judge, parting bool) *tls.Config {
	verify := c.VerifyConnection
	c.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		own := c.Clone()
		own.GetConfigForClient = nil
		own.VerifyConnection = func(state tls.ConnectionState) error {
			if err := verify(state); err != nil {
				return err
			}
			leaf := state.PeerCertificates[0]
			id, err := spiffe.CheckX509SVIDLeaf(leaf)
			if err != nil {
				return err
			}
			return p.keep(hello.Conn, id, leaf, judge(p.config.Service, id, leaf), parting)
		}
		return own, nil
	}
	return c
}

// keep ends a connection when it would not be let through any more.
func (p *Point) keep(conn net.Conn, id spiffeid.ID, leaf *x509.Certificate, judge live.Judge, parting bool) error {
	c := p.Connection(conn)
	remove, d := p.table.Add(live.Link{Leaf: leaf, Judge: judge, Parting: parting, Gone: c.gone, Close: func(d policy.Decision) {
		c.Close()
		_ = p.Tell(context.Background(), id, d, slog.String("call", "open connection"))
	}})
	c.Then(remove)
	if !d.Allowed {
		return p.Tell(context.Background(), id, d, slog.String("call", "TLS handshake"))
	}
	return nil
}

// KeepRequest judges a request that was let through again when policies or revocations change. When it would be denied, end
// is called with the judgement, at most once; it must not block. done is called when the request has been answered. Nobody
// changes what r points to meanwhile. The error is a *policy.DeniedError if the request is denied by now.
func (p *Point) KeepRequest(ctx context.Context, r *policy.Request, end func(policy.Judgement)) (done func(), j policy.Judgement, err error) {
	call := policy.CallOf(r)
	tell := func(d policy.Decision) (policy.Judgement, error) {
		return p.tell(context.WithoutCancel(ctx), r.Peer, call, d, slog.String("method", excerpt(r.Method)), slog.String("path", excerpt(r.Path)), slog.Bool("under_way", true))
	}
	done, d := p.table.Add(live.Link{Judge: judgeAgain(r), Close: func(d policy.Decision) {
		j, _ := tell(d) // a denial
		end(j)
	}})
	if !d.Allowed {
		j, err = tell(d)
	}
	return done, j, err
}

// judgeAgain decides a request by other policies. A token that was revoked meanwhile counts for nothing; one that expired is
// good for what it began.
func judgeAgain(r *policy.Request) live.Judge {
	if r.Token == nil {
		return live.Request(r)
	}
	jti, _ := r.Token.Claims["jti"].(string)
	var issued time.Time
	if n, ok := r.Token.Claims["iat"].(json.Number); ok {
		if f, err := n.Float64(); err == nil {
			issued = time.Unix(int64(f), 0)
		}
	}
	bare := *r
	bare.Token = nil
	return func(policies *policy.Policies) policy.Decision {
		if _, found := policies.Revocations().JWTSVID(r.Token.ID, jti, issued); found {
			return policies.Decide(&bare)
		}
		return policies.Decide(r)
	}
}
