package proxy

import (
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/goleak"

	"github.com/signet-id/signet/internal/sandbox"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/internal/testca"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must come.
const patience = 20 * time.Second

const serviceID = "spiffe://example.org/service"

// A world is a trust domain with a proxy's identity, and callers.
type world struct {
	ca *testca.CA
	id *identity
	p  atomic.Pointer[policy.Policies]
}

// Policies are those of the moment.
func (w *world) Policies() *policy.Policies { return w.p.Load() }

// allowCaller lets /caller do everything, by rules that a TLS handshake satisfies.
const allowCaller = "kind: CallPolicy\nname: p\nservice: /service\nmode: enforce\nallow:\n- from: [/caller]\n"

func newWorld(t testing.TB, documents string) *world {
	t.Helper()
	w := &world{ca: testca.New(t, "example.org")}
	w.id = &identity{log: slog.New(slog.DiscardHandler), now: time.Now, changed: func() {}}
	w.give(w.ca.SVID(t, "/service", time.Hour))
	jwt := jwtbundle.NewSet(w.ca.JWT(t))
	w.id.jwt.Store(jwt)
	w.apply(t, documents)
	var source policySource = w
	w.id.policies.Store(&source)
	return w
}

func (w *world) apply(t testing.TB, documents string) { w.p.Store(testca.Policies(t, documents)) }

// give gives the proxy an SVID, as the agent would.
func (w *world) give(svids ...*x509svid.SVID) {
	w.id.x509.Store(&workloadapi.X509Context{SVIDs: svids, Bundles: x509bundle.NewSet(w.ca.X509())})
	w.id.changed()
}

// caller is the TLS configuration of a peer of this path.
func (w *world) caller(t testing.TB, path string) *tls.Config {
	t.Helper()
	return tlsconfig.MTLSClientConfig(w.ca.SVID(t, path, time.Hour), w.ca.X509(), tlsconfig.AuthorizeID(spiffeid.RequireFromString(serviceID)))
}

// server is the TLS configuration of a server of this path.
func (w *world) server(t testing.TB, path string) *tls.Config {
	t.Helper()
	return tlsconfig.MTLSServerConfig(w.ca.SVID(t, path, time.Hour), w.ca.X509(), tlsconfig.AuthorizeAny())
}

// A running proxy and how to stop it.
type running struct {
	*Proxy
	stop func() error // ends it and returns what Run returned
}

// start runs a proxy until the test ends.
func (w *world) start(t testing.TB, c Config) *running {
	t.Helper()
	c.Sandbox.Landlock = sandbox.Off
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
		if testing.Verbose() && os.Getenv("PROXY_TEST_LOG") != "" {
			c.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
		}
	}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	p, err := newProxy(c, w.id)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	r := &running{Proxy: p}
	r.stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-ended:
			return err
		case <-time.After(patience):
			return os.ErrDeadlineExceeded
		}
	})
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Errorf("the proxy ended with %v", err)
		}
	})
	return r
}

// inboundConfig is a proxy with one inbound listener.
func inboundConfig(protocol, backend string) Config {
	return Config{Inbound: []Inbound{{Name: "in", Listen: "127.0.0.1:0", Service: serviceID, Protocol: protocol, Backend: backend}}, DrainTimeout: 100 * time.Millisecond}
}

func (r *running) in() string  { return r.inbound[0].l.Addr().String() }
func (r *running) out() string { return r.outbound[0].l.Addr().String() }

// listen is a listener that ends with the test, and serves each connection with f in a goroutine that the test waits for.
func listen(t testing.TB, network, address string, f func(net.Conn)) net.Listener {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			serving.Go(func() {
				defer func() {
					c.Close()
					mu.Lock()
					delete(open, c)
					mu.Unlock()
				}()
				f(c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		serving.Wait()
	})
	return l
}

// echo sends back what comes, and the end of it.
func echo(c net.Conn) {
	_, _ = io.Copy(c, c)
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
}

// dialTLS connects or fails the test.
func dialTLS(t testing.TB, address string, c *tls.Config) *tls.Conn {
	t.Helper()
	conn, err := tls.Dial("tcp", address, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// dialPlain connects or fails the test.
func dialPlain(t testing.TB, network, address string) net.Conn {
	t.Helper()
	conn, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// socketPath is a short path for a Unix socket.
func socketPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "proxy")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// eventually waits until a condition holds that another process or goroutine brings about.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.After(patience)
	look := time.NewTicker(time.Millisecond) // between looks at a state that tells nobody of its changes
	defer look.Stop()
	for !holds() {
		select {
		case <-deadline:
			t.Fatalf("still not: %s", what)
		case <-look.C:
		}
	}
}

// clientCertificate shows one SVID.
func clientCertificate(svid *x509svid.SVID) func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return tlsconfig.GetClientCertificate(svid)
}
