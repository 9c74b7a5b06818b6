package e2e

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/source"
	"github.com/signet-id/signet/policy/tlsauthz"
	"github.com/signet-id/signet/test/signettest"
)

// TestRevocationEndsConnectionsAndSurvivesOutages: from the document at the CA to the end of a TLS connection, through a real
// agent and the Go library; and neither the CA's absence nor an agent that is restarted in it revives the peer.
func TestRevocationEndsConnectionsAndSurvivesOutages(t *testing.T) {
	var config agent.Config
	s := signettest.Start(t, signettest.Config{Agent: func(c *agent.Config) { config = *c }})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	self := fmt.Sprint("unix:uid:", os.Getuid())
	s.Apply(fmt.Sprintf("kind: Identity\nname: db\nspiffeID: /db\nmatch: [%q]\n---\nkind: Identity\nname: web\nspiffeID: /web\nmatch: [%q]\n---\n"+
		"kind: CallPolicy\nname: db\nservice: /db\nallow: [{from: [/web]}]\n", self, self))
	c, err := workloadapi.New(ctx, workloadapi.WithAddr(s.WorkloadAPI()))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	x, err := c.FetchX509Context(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var db, web *x509svid.SVID
	for _, one := range x.SVIDs {
		switch one.ID.Path() {
		case "/db":
			db = one
		case "/web":
			web = one
		}
	}
	if db == nil || web == nil {
		t.Fatalf("SVIDs %v", x.SVIDs)
	}
	src, err := source.New(ctx, source.Options{Addr: s.WorkloadAPI(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := tlsauthz.Listen(inner, tlsauthz.Config{Policies: src, Service: db.ID, Log: slog.New(slog.DiscardHandler)}, db, x.Bundles)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
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
	connect := func() (net.Conn, error) {
		conn, err := tls.Dial("tcp", l.Addr().String(), tlsconfig.MTLSClientConfig(web, x.Bundles, tlsconfig.AuthorizeID(db.ID)))
		if err != nil {
			return nil, err
		}
		conn.SetDeadline(time.Now().Add(30 * time.Second))
		_, err = io.ReadFull(conn, make([]byte, 1))
		return conn, err
	}
	await := func(what string, f func() bool) {
		t.Helper()
		changed, stop := src.Subscribe()
		defer stop()
		for !f() {
			select {
			case <-changed:
			case <-time.After(50 * time.Millisecond): // what the source does not tell of
			case <-ctx.Done():
				t.Fatalf("not yet: %s", what)
			}
		}
	}
	decided := func() policy.Reason {
		return src.Policies().Decide(&policy.Request{Service: db.ID, Peer: web.ID, Certificate: web.Certificates[0]}).Reason
	}
	await("the policy", func() bool { return decided() == policy.ReasonAllowed })
	conn, err := connect()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s.Apply("kind: Revocation\nname: leak\nid: /web\nreason: a test\n")
	if _, err := conn.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Fatalf("the connection of a revoked peer: %v", err)
	}
	if _, err := connect(); err == nil {
		t.Error("a revoked peer connects")
	}
	if svids, err := c.FetchX509SVIDs(ctx); err != nil || len(svids) != 1 || svids[0].ID != db.ID {
		t.Errorf("the agent serves %v, %v; want /db alone", svids, err)
	}

	if err := s.StopCA(); err != nil {
		t.Fatal(err)
	}
	if err := s.StopAgent(); err != nil {
		t.Fatal(err)
	}
	again, err := agent.New(config)
	if err != nil {
		t.Fatal(err)
	}
	running, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- again.Run(running) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	later, err := source.New(ctx, source.Options{Addr: s.WorkloadAPI(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer later.Close()
	for name, src := range map[string]*source.Source{"a source that was there": src, "a source of the restarted agent": later} {
		if d := src.Policies().Decide(&policy.Request{Service: db.ID, Peer: web.ID, Certificate: web.Certificates[0]}); d.Reason != policy.ReasonRevoked || d.Revocation != "leak" {
			t.Errorf("%s, with the CA away: %+v", name, d)
		}
	}
}
