package workloadapi

import (
	"net"

	"google.golang.org/grpc/credentials"
)

// greeting are the peer's credentials for connections of an acceptor, which hears of each handshake.
type greeting struct {
	credentials.TransportCredentials
}

// ServerHandshake asks the kernel who opened the connection.
func (g greeting) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if c, ok := raw.(*accepted); ok {
		raw = c.greet()
	}
	return g.TransportCredentials.ServerHandshake(raw)
}

// Clone returns the same.
func (g greeting) Clone() credentials.TransportCredentials {
	return greeting{g.TransportCredentials.Clone()}
}
