package corpus

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/internal/sandbox"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/proxy"
)

// proxied are the inbound listeners of one proxy that stands before all services: for requests, to backends that speak
// HTTP/1.1 and HTTP/2, and for connections.
func (f *fleet) proxied(t *testing.T, services []spiffeid.ID, service *backend) []point {
	plain := &http.Server{Handler: service, Protocols: new(http.Protocols), DisableGeneralOptionsHandler: true, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	plain.Protocols.SetHTTP1(true)
	plain.Protocols.SetUnencryptedHTTP2(true)
	web := background(t, func(l net.Listener) { plain.Serve(l) }, func() { plain.Close() })
	greeter := background(t, greet, func() {})

	config := proxy.Config{AgentSocket: f.WorkloadAPI(), DrainTimeout: 100 * time.Millisecond, Log: slog.New(slog.DiscardHandler),
		Sandbox: proxy.Sandbox{Landlock: sandbox.Off}, Sockets: map[string]*os.File{}}
	addr := map[string]string{}
	for i, id := range services {
		for kind, in := range map[string]proxy.Inbound{
			"http1": {Protocol: "http", Backend: web, HTTP: proxy.HTTP{BackendProtocol: "http1"}},
			"h2c":   {Protocol: "http", Backend: web, HTTP: proxy.HTTP{BackendProtocol: "h2c"}},
			"tcp":   {Protocol: "tcp", Backend: greeter},
		} {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			file, err := l.(*net.TCPListener).File()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { file.Close() })
			l.Close()
			in.Name, in.Listen, in.Service = kind+"-"+strconv.Itoa(i), l.Addr().String(), id.String()
			config.Inbound = append(config.Inbound, in)
			config.Sockets[in.Name] = file
			addr[kind+" "+id.String()] = l.Addr().String()
		}
	}
	p, err := proxy.New(config)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the proxy ended with %v", err)
		}
	})
	select {
	case <-p.Ready():
	case <-time.After(within):
		t.Fatal("the proxy does not become ready")
	}
	at := func(kind string, c *policy.TestCase) string { return addr[kind+" "+c.Request.Service.String()] }
	return []point{
		{"proxy from HTTP/1.1 to HTTP/1.1", isHTTP, func(t *testing.T, c *policy.TestCase) answer {
			return http1(t, at("http1", c), f.client(t, c.Request.Peer, "http/1.1"), &c.Request, f.fields(t, c))
		}},
		{"proxy from HTTP/2 to HTTP/1.1", isHTTP, func(t *testing.T, c *policy.TestCase) answer {
			return http2Call(t, at("http1", c), f.client(t, c.Request.Peer, "h2"), &c.Request, f.fields(t, c))
		}},
		{"proxy from HTTP/2 to HTTP/2", isHTTP, func(t *testing.T, c *policy.TestCase) answer {
			return http2Call(t, at("h2c", c), f.client(t, c.Request.Peer, "h2"), &c.Request, f.fields(t, c))
		}},
		{"proxy of connections", isTLS, func(t *testing.T, c *policy.TestCase) answer {
			return greeted(at("tcp", c), f.client(t, c.Request.Peer))
		}},
	}
}

// background serves on an address of its own until the test ends.
func background(t *testing.T, serve func(net.Listener), stop func()) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		serve(l)
	}()
	t.Cleanup(func() { stop(); l.Close(); <-done })
	return l.Addr().String()
}

// greet greets every connection until the listener is closed.
func greet(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		conn.SetDeadline(time.Now().Add(within))
		io.WriteString(conn, greeting)
		conn.Close()
	}
}
