package tlsauthz_test

import (
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/internal/testca"
	"github.com/signet-id/signet/policy/tlsauthz"
)

const documents = `
kind: CallPolicy
name: db
service: /db
allow:
  - from: [/web, /half, /out]
  - from: [/http]
    http: [{methods: [GET]}]
  - from: [/token]
    jwt: {audience: [db]}
deny:
  - from: [/half]
    http: [{methods: [DELETE]}]
  - from: [/out]
`

func TestFinalDecidesConnections(t *testing.T) {
	ca := testca.New(t, "example.org")
	svid := ca.SVID(t, "/db", time.Hour)
	p := testca.Policies(t, documents)
	var judged []policy.Judgement
	c := tlsauthz.Config{Policies: testca.Fixed{P: p}, Service: svid.ID, Log: slog.New(slog.DiscardHandler), OnDecision: func(j policy.Judgement) { judged = append(judged, j) }}
	own, err := tlsauthz.ServerConfig(c, svid, ca.X509())
	if err != nil {
		t.Fatal(err)
	}
	for name, server := range map[string]*tls.Config{
		"with go-spiffe": withoutTickets(tlsconfig.MTLSServerConfig(svid, ca.X509(), tlsauthz.Final(testca.Fixed{P: p}, svid.ID))),
		"strict":         own,
	} {
		for path, want := range map[string]bool{"/web": true, "/half": false, "/out": false, "/http": false, "/token": false, "/none": false} {
			judged = nil
			err := handshake(t, server, tlsconfig.MTLSClientConfig(ca.SVID(t, path, time.Hour), ca.X509(), tlsconfig.AuthorizeAny()))
			if (err == nil) != want {
				t.Errorf("%s: connection from %s: %v, want allowed %t", name, path, err, want)
			}
			if name == "strict" && (len(judged) != 1 || judged[0].Decision.Allowed != want || judged[0].Peer.Path() != path || judged[0].ID == "") {
				t.Errorf("%s: %s was reported as %+v", name, path, judged)
			}
			var denied *policy.DeniedError
			if !want && (!errors.As(err, &denied) || denied.Judgement.Decision.Allowed) {
				t.Errorf("%s: %s: the error is %T %v", name, path, err, err)
			}
		}
	}
}

func withoutTickets(c *tls.Config) *tls.Config {
	c.SessionTicketsDisabled = true
	return c
}

// X509-55: a ticket of an earlier session must not get around a decision.
func TestResumedSessionsAreDecided(t *testing.T) {
	ca := testca.New(t, "example.org")
	svid := ca.SVID(t, "/db", time.Hour)
	source := &testca.Changing{}
	own, err := tlsauthz.ServerConfig(tlsauthz.Config{Policies: source, Service: svid.ID, Log: slog.New(slog.DiscardHandler)}, svid, ca.X509())
	if err != nil {
		t.Fatal(err)
	}
	const danger = "with tickets: what the comment of Final warns of"
	for name, server := range map[string]*tls.Config{
		danger:                         tlsconfig.MTLSServerConfig(svid, ca.X509(), tlsauthz.Final(source, svid.ID)),
		"as the comment of Final says": withoutTickets(tlsconfig.MTLSServerConfig(svid, ca.X509(), tlsauthz.Final(source, svid.ID))),
		"ServerConfig":                 own,
	} {
		source.Set(testca.Policies(t, documents))
		client := tlsconfig.MTLSClientConfig(ca.SVID(t, "/web", time.Hour), ca.X509(), tlsconfig.AuthorizeAny())
		client.ServerName = "db" // sessions are kept by it
		client.ClientSessionCache = tls.NewLRUClientSessionCache(1)
		if err := handshake(t, server, client); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		source.Set(nil)
		if err := handshake(t, server, client); (err == nil) != (name == danger) {
			t.Errorf("%s: a peer that is denied by now: %v", name, err)
		}
	}
}

// handshake returns the server's view of a handshake.
func handshake(t *testing.T, server, client *tls.Config) error {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := tls.Dial("tcp", l.Addr().String(), client)
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = io.Copy(io.Discard, conn) // until the server hangs up
	}()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	err = conn.(*tls.Conn).HandshakeContext(t.Context())
	conn.Close()
	<-done
	return err
}

func TestFinalWithoutWhatItNeedsDenies(t *testing.T) {
	ca := testca.New(t, "example.org")
	web := ca.SVID(t, "/web", time.Hour).ID
	if err := tlsauthz.Final(nil, web)(web, nil); err == nil {
		t.Error("no policies: allowed")
	}
	if err := tlsauthz.Final(testca.Fixed{}, web)(web, nil); err == nil {
		t.Error("nil policies: allowed")
	}
	if err := tlsauthz.Final(testca.Fixed{P: testca.Policies(t, "{kind: PolicyDefaults, mode: shadow}")}, spiffeid.ID{})(web, nil); err == nil {
		t.Error("no service: allowed")
	}
	if _, err := tlsauthz.New(tlsauthz.Config{}); err == nil {
		t.Error("New of an empty Config succeeded")
	}
}
