// Package observe shows that what enforcement points decide is known to operators: with real servers of the library, a real
// agent and a real CA.
package observe

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy/httpauthz"
	"github.com/signet-id/signet/policy/source"
	"github.com/signet-id/signet/test/signettest"
)

// documents are two identities that this process has, and who may call one of them.
var documents = fmt.Sprintf(`
kind: Identity
name: documents
spiffeID: /documents
match: ["unix:uid:%[1]d"]
---
kind: Identity
name: reader
spiffeID: /reader
match: ["unix:uid:%[1]d"]
---
kind: CallPolicy
name: documents
service: /documents
allow:
  - from: [/reader]
    http: [{methods: [GET], paths: [/v1/**]}]
  - from: [/reader]
    shadow: true
    http: [{methods: [PUT], paths: [/v1/**]}]
`, os.Geteuid())

const service, reader = "spiffe://example.org/documents", "spiffe://example.org/reader"

// A world is signet with a service on it.
type world struct {
	*signettest.Signet
	t        *testing.T
	ctx      context.Context
	policies *source.Source
	svids    map[string]*workloadapi.X509Source
}

func bounded(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func newWorld(t *testing.T, c signettest.Config) *world {
	t.Helper()
	w := &world{t: t, ctx: bounded(t, 90*time.Second), svids: make(map[string]*workloadapi.X509Source)}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	w.Signet = signettest.Start(t, c)
	w.Apply(documents)
	for _, id := range []string{service, reader} {
		src, err := workloadapi.NewX509Source(w.ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(w.WorkloadAPI())),
			workloadapi.WithDefaultX509SVIDPicker(func(svids []*x509svid.SVID) *x509svid.SVID {
				for _, s := range svids {
					if s.ID.String() == id {
						return s
					}
				}
				return svids[0]
			}))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { src.Close() })
		w.svids[id] = src
	}
	w.until("both identities are there", func() error {
		for id, src := range w.svids {
			if svid, err := src.GetX509SVID(); err != nil || svid.ID.String() != id {
				return fmt.Errorf("%v, %v", svid, err)
			}
		}
		return nil
	})
	w.policies = w.source()
	return w
}

func (w *world) source() *source.Source {
	w.t.Helper()
	s, err := source.New(w.ctx, source.Options{Addr: w.WorkloadAPI(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { s.Close() })
	return s
}

// until waits for what comes by itself.
func (w *world) until(what string, f func() error) {
	w.t.Helper()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-w.ctx.Done():
			w.t.Fatalf("%s: %v", what, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// serve is an HTTP service that asks the policies.
func (w *world) serve() string {
	w.t.Helper()
	config := httpauthz.Config{Policies: w.policies, Service: spiffeid.RequireFromString(service), Log: slog.New(slog.DiscardHandler)}
	authorizer, err := httpauthz.New(config)
	if err != nil {
		w.t.Fatal(err)
	}
	server := authorizer.Server(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "here you are") }), w.svids[service], w.svids[service])
	server.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); server.ServeTLS(l, "", "") }()
	w.t.Cleanup(func() { server.Close(); <-done })
	return "https://" + l.Addr().String()
}

// client calls as id.
func (w *world) client(id string) *http.Client {
	transport := &http.Transport{TLSClientConfig: tlsconfig.MTLSClientConfig(w.svids[id], w.svids[id], tlsconfig.AuthorizeID(spiffeid.RequireFromString(service)))}
	w.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// call returns the status of a call and the decision id that came with it.
func (w *world) call(c *http.Client, method, url string) (int, string) {
	w.t.Helper()
	req, err := http.NewRequestWithContext(w.ctx, method, url, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		w.t.Fatal(err)
	}
	return resp.StatusCode, resp.Header.Get(httpauthz.DecisionHeader)
}

// refusedAtTheHandshake makes a connection as id, which must not come about.
func (w *world) refusedAtTheHandshake(addr, id string) {
	w.t.Helper()
	raw, err := (&net.Dialer{}).DialContext(w.ctx, "tcp", addr)
	if err != nil {
		w.t.Fatal(err)
	}
	defer raw.Close()
	conn := tls.Client(raw, tlsconfig.MTLSClientConfig(w.svids[id], w.svids[id], tlsconfig.AuthorizeAny()))
	if err := conn.HandshakeContext(w.ctx); err == nil {
		_, err = conn.Read(make([]byte, 1)) // TLS 1.3: the refusal comes after the handshake
		if err == nil || errors.Is(err, io.EOF) {
			w.t.Fatalf("a connection as %s was not refused: %v", id, err)
		}
	}
}

func (w *world) observations() adminv1.ObservationsClient {
	return adminv1.NewObservationsClient(w.AdminConn())
}

// list returns what the CA knows.
func (w *world) list(req *adminv1.ListObservationsRequest) ([]*policyv1.Observation, error) {
	stream, err := w.observations().ListObservations(w.ctx, req)
	if err != nil {
		return nil, err
	}
	var out []*policyv1.Observation
	for {
		o, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		out = append(out, o)
	}
}

// total is the sum of the counts of what the CA knows, by a name that is given to each.
func (w *world) total(req *adminv1.ListObservationsRequest, name func(*policyv1.Observation) string) (map[string]uint64, error) {
	all, err := w.list(req)
	out := make(map[string]uint64)
	for _, o := range all {
		out[name(o)] += o.GetCount()
	}
	return out, err
}
