package access

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"net/url"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/credentials"
)

// shaken is a transport whose handshake is done.
type shaken struct {
	credentials.TransportCredentials
	info tlsInfo
}

func (s shaken) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c, s.info, nil
}

func TestConnectionsOfStrangersEnd(t *testing.T) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/x"}}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	svid, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	known := tlsInfo{TLSInfo: credentials.TLSInfo{State: tls.ConnectionState{PeerCertificates: []*x509.Certificate{svid}}}}
	for name, tt := range map[string]struct {
		info tlsInfo
		ends bool
	}{"a stranger": {tlsInfo{}, true}, "who shows an SVID": {known, false}} {
		synctest.Test(t, func(t *testing.T) {
			mine, theirs := net.Pipe()
			defer mine.Close()
			entered, left := 0, 0
			l := LimitedCredentials{TransportCredentials: shaken{info: tt.info}, StrangerLife: time.Minute, Admit: func(net.Addr) error { return nil },
				Enter: func(spiffeid.ID, net.Addr) (func(), error) { entered++; return func() { left++ }, nil }}
			conn, _, err := l.ServerHandshake(theirs)
			if err != nil {
				t.Fatal(err)
			}
			begun := time.Now()
			if err := conn.SetReadDeadline(begun.Add(time.Hour)); err != nil {
				t.Fatal(err)
			}
			_, err = conn.Read(make([]byte, 1))
			if after := time.Since(begun); err == nil || (after == time.Minute) != tt.ends {
				t.Errorf("%s: cut after %v: %v", name, after, err)
			}
			conn.Close()
			conn.Close()
			if entered != 1 || left != 1 {
				t.Errorf("%s: entered %d times, left %d times", name, entered, left)
			}
		})
	}
}
