package access

import (
	"crypto/x509"
	"net"

	"google.golang.org/grpc/credentials"
)

// Credentials are the transport of the port. They remember of each connection how the client's SVID leads to
// authorities, so that every RPC can be refused once they are revoked.
func (g *Guard) Credentials() credentials.TransportCredentials {
	return tlsCredentials{TransportCredentials: credentials.NewTLS(g.tlsConfig(func([][]*x509.Certificate) {})), guard: g}
}

// tlsInfo is what is known of a connection.
type tlsInfo struct {
	credentials.TLSInfo
	chains [][]*x509.Certificate // at least one if there is a client certificate
}

// tlsCredentials are gRPC's for TLS, with a configuration for each connection.
type tlsCredentials struct {
	credentials.TransportCredentials
	guard *Guard
}

// ServerHandshake implements credentials.TransportCredentials.
func (t tlsCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	var chains [][]*x509.Certificate
	conn, info, err := credentials.NewTLS(t.guard.tlsConfig(func(c [][]*x509.Certificate) { chains = c })).ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	return conn, tlsInfo{TLSInfo: info.(credentials.TLSInfo), chains: chains}, nil
}

// Clone implements credentials.TransportCredentials.
func (t tlsCredentials) Clone() credentials.TransportCredentials {
	return tlsCredentials{TransportCredentials: t.TransportCredentials.Clone(), guard: t.guard}
}
