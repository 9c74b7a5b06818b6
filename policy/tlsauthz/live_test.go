package tlsauthz_test

import (
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/internal/testca"
	"github.com/signet-id/signet/policy/tlsauthz"
)

// serve accepts connections and sends a byte on each, until the test ends.
func serve(t *testing.T, l net.Listener) {
	t.Helper()
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				if _, err := conn.Write([]byte("x")); err == nil {
					_, _ = io.Copy(io.Discard, conn)
				}
			}()
		}
	}()
}

func greeted(t *testing.T, conn net.Conn) {
	t.Helper()
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
}

// closed waits until the other side, or the library below us, has closed the connection.
func closed(t *testing.T, conn net.Conn) {
	t.Helper()
	_, err := conn.Read(make([]byte, 1))
	if timeout := net.Error(nil); err == nil || errors.As(err, &timeout) && timeout.Timeout() {
		t.Errorf("the connection is open: %v", err)
	}
}

func TestConnectionsOfPeersThatAreDeniedByNowAreClosed(t *testing.T) {
	ca := testca.New(t, "example.org")
	svid := ca.SVID(t, "/db", time.Hour)
	for name, own := range map[string]bool{"Listen": true, "a listener of one's own": false} {
		t.Run(name, func(t *testing.T) {
			source := &testca.Changing{}
			source.Set(testca.Policies(t, documents))
			denials := make(chan policy.Judgement, 8)
			c := tlsauthz.Config{Policies: source, Service: svid.ID, Log: slog.New(slog.DiscardHandler), OnDecision: func(j policy.Judgement) {
				if !j.Decision.Allowed {
					denials <- j
				}
			}}
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			address := l.Addr().String()
			if own {
				l, err = tlsauthz.Listen(l, c, svid, ca.X509())
			} else {
				var config *tls.Config
				config, err = tlsauthz.ServerConfig(c, svid, ca.X509())
				l = tls.NewListener(l, config)
			}
			if err != nil {
				t.Fatal(err)
			}
			serve(t, l)
			dial := func(ttl time.Duration) net.Conn {
				t.Helper()
				conn, err := tls.Dial("tcp", address, tlsconfig.MTLSClientConfig(ca.SVID(t, "/web", ttl), ca.X509(), tlsconfig.AuthorizeAny()))
				if err != nil {
					t.Fatal(err)
				}
				greeted(t, conn)
				return conn
			}
			conn := dial(time.Hour)
			source.Revoke("/web")
			closed(t, conn)
			if j := <-denials; j.Decision.Reason != policy.ReasonRevoked || j.Peer.Path() != "/web" || j.ID == "" {
				t.Errorf("judgement %+v", j)
			}
			source.Revoke()
			conn = dial(time.Hour)
			source.Set(testca.Policies(t, "{kind: CallPolicy, name: db, service: /db, allow: [{from: [/other]}]}"))
			closed(t, conn)
			if j := <-denials; j.Decision.Reason != policy.ReasonNoAllow {
				t.Errorf("judgement %+v", j)
			}
			source.Set(testca.Policies(t, documents))
			closed(t, dial(2*time.Second))
			if j := <-denials; j.Decision.Reason != policy.ReasonInvalidSVID {
				t.Errorf("judgement %+v", j)
			}
		})
	}
}

func TestClientLeavesRevokedServers(t *testing.T) {
	ca := testca.New(t, "example.org")
	svid := ca.SVID(t, "/db", time.Hour)
	l, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(svid, ca.X509(), tlsconfig.AuthorizeAny()))
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l)
	source := &testca.Changing{}
	source.Set(testca.Policies(t, documents))
	client := &tlsauthz.Client{Policies: source, SVID: ca.SVID(t, "/web", time.Hour), Bundles: ca.X509(), Authorize: tlsconfig.AuthorizeID(svid.ID), Log: slog.New(slog.DiscardHandler)}
	dial := func() (net.Conn, error) { return client.DialContext(t.Context(), "tcp", l.Addr().String()) }
	conn, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	greeted(t, conn)
	source.Revoke("/web", "/db")
	closed(t, conn)
	if _, err := dial(); err == nil || !strings.Contains(err.Error(), `revoked by "revoked/db"`) {
		t.Errorf("a revoked server: %v", err)
	}
	source.Set(nil)
	if _, err := dial(); err == nil || !strings.Contains(err.Error(), "unknown_policy") {
		t.Errorf("without revocations: %v", err)
	}
	source.Set(testca.Policies(t, documents).Stale())
	if _, err := dial(); err == nil || !strings.Contains(err.Error(), "stale_policy") {
		t.Errorf("with revocations that are too old: %v", err)
	}
	source.Set(testca.Policies(t, documents))
	client.Authorize = tlsconfig.AuthorizeID(ca.SVID(t, "/other", time.Hour).ID)
	if _, err := dial(); err == nil {
		t.Error("another server than the one that is expected was taken")
	}
	if _, err := (&tlsauthz.Client{}).DialContext(t.Context(), "tcp", l.Addr().String()); err == nil {
		t.Error("an empty Client connects")
	}
}
