package access

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/signet-id/signet/spiffe"
)

// Limited returns ResourceExhausted. retryAfter, unless it is zero, goes with it as google.rpc.RetryInfo: when it is
// worth it to call again.
func Limited(retryAfter time.Duration, format string, args ...any) error {
	st := status.Newf(codes.ResourceExhausted, format, args...)
	if retryAfter > 0 {
		if with, err := st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(retryAfter)}); err == nil {
			st = with
		}
	}
	return st.Err()
}

// LimitedCredentials are transport credentials whose server asks Admit before each handshake, of which every one costs
// a signature.
type LimitedCredentials struct {
	credentials.TransportCredentials
	// Admit waits or returns an error, with which the connection is closed.
	Admit func(net.Addr) error
	// Enter counts a connection of a caller, whose ID is zero if no certificate was shown, or returns an error, with which it
	// is closed. leave is called once at its end.
	Enter func(id spiffeid.ID, from net.Addr) (leave func(), err error)
	// StrangerLife is how long a connection without a certificate lasts. It is cut then, whatever is under way: what such a
	// caller does not read would be kept for it, and it can come back.
	StrangerLife time.Duration
}

var errTooManyConnections = errors.New("too many new connections")

// ServerHandshake implements credentials.TransportCredentials.
func (l LimitedCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if err := l.Admit(conn.RemoteAddr()); err != nil {
		return nil, nil, fmt.Errorf("%w from %s: %w", errTooManyConnections, conn.RemoteAddr(), err)
	}
	secured, info, err := l.TransportCredentials.ServerHandshake(conn)
	if err != nil {
		return nil, nil, err
	}
	id := idOf(info)
	leave, err := l.Enter(id, conn.RemoteAddr())
	if err != nil {
		secured.Close()
		return nil, nil, err
	}
	if id.IsZero() {
		timer := time.AfterFunc(l.StrangerLife, func() { conn.Close() })
		counted := leave
		leave = func() { timer.Stop(); counted() }
	}
	return &countedConn{Conn: secured, leave: sync.OnceFunc(leave)}, info, nil
}

// idOf is the ID of the certificate that was shown, which is one that verified.
func idOf(info credentials.AuthInfo) spiffeid.ID {
	t, ok := info.(tlsInfo)
	if !ok || len(t.State.PeerCertificates) == 0 {
		return spiffeid.ID{}
	}
	id, err := spiffe.IDFromCertificate(t.State.PeerCertificates[0])
	if err != nil {
		return spiffeid.ID{}
	}
	return id
}

// A countedConn counts until it is closed.
type countedConn struct {
	net.Conn
	leave func()
}

func (c *countedConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}

// Clone implements credentials.TransportCredentials.
func (l LimitedCredentials) Clone() credentials.TransportCredentials {
	return LimitedCredentials{l.TransportCredentials.Clone(), l.Admit, l.Enter, l.StrangerLife}
}
