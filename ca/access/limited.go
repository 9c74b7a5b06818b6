package access

import (
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
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
}

var errTooManyConnections = errors.New("too many new connections")

// ServerHandshake implements credentials.TransportCredentials.
func (l LimitedCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if err := l.Admit(conn.RemoteAddr()); err != nil {
		return nil, nil, fmt.Errorf("%w from %s: %w", errTooManyConnections, conn.RemoteAddr(), err)
	}
	return l.TransportCredentials.ServerHandshake(conn)
}

// Clone implements credentials.TransportCredentials.
func (l LimitedCredentials) Clone() credentials.TransportCredentials {
	return LimitedCredentials{l.TransportCredentials.Clone(), l.Admit}
}
