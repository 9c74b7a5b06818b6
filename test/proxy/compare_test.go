package proxy

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sync/errgroup"

	"github.com/signet-id/signet/test/signettest"
)

// BenchmarkProxy compares signet-proxy with ghostunnel (GHOSTUNNEL_BIN) and nginx's stream (PATH, and NGINX_STREAM_MODULE where that is not
// where Debian has it): all before the same backend in a process of its own, with the same kind of certificates, TLS 1.3 and
// client certificates demanded, no session resumed. cpu-µs/op is what the proxy's processes used; in the clear shows what the rest costs.
//
//	connect: a new connection, a byte there and back, and its end; eight at a time
//	ping: a byte there and back on an open connection
//	upload, download: a mebibyte, on four connections at a time
func BenchmarkProxy(b *testing.B) {
	s := signettest.Start(b, signettest.Config{})
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	s.Apply(fmt.Sprintf("kind: Identity\nname: service\nspiffeID: /service\nmatch: ['unix:uid:%d']\n---\nkind: Identity\nname: caller\nspiffeID: /caller\nmatch: ['unix:path:%s']\n---\n%s",
		os.Getuid(), self, tcpPolicies))
	backend := echoProcess(b)
	config, files := identitiesOf(b, s)
	for _, c := range []struct {
		name  string
		start func(*testing.B, string, string) (address string, processes func() []int)
	}{
		{"clear", func(*testing.B, string, string) (string, func() []int) { return backend, func() []int { return nil } }},
		{"signet", func(b *testing.B, backend, _ string) (string, func() []int) {
			p := start(b, s, tcpConfig(backend, ""))
			p.waitReady()
			return p.address("in"), func() []int { return []int{p.cmd.Process.Pid} }
		}},
		{"ghostunnel", startGhostunnel},
		{"nginx", startNginx},
	} {
		b.Run(c.name, func(b *testing.B) {
			address, processes := c.start(b, backend, files)
			dial := func() (net.Conn, error) {
				if path, ok := strings.CutPrefix(address, "unix://"); ok {
					return net.Dial("unix", path)
				}
				return tls.Dial("tcp", address, config)
			}
			eventually(b, "it serves", func() bool {
				c, err := dial()
				if err != nil {
					return false
				}
				defer c.Close()
				return ping(c) == nil
			})
			measured := func(b *testing.B, f func() error) {
				pids := processes()
				before := cpu(b, pids)
				b.ResetTimer()
				err := f()
				b.StopTimer()
				if err != nil {
					b.Fatal(err)
				}
				if len(pids) > 0 {
					b.ReportMetric((cpu(b, pids)-before)*1e6/float64(b.N), "cpu-µs/op")
				}
			}
			b.Run("connect", func(b *testing.B) {
				measured(b, func() error {
					var g errgroup.Group
					g.SetLimit(8)
					for range b.N {
						g.Go(func() error {
							c, err := dial()
							if err != nil {
								return err
							}
							defer c.Close()
							return ping(c)
						})
					}
					return g.Wait()
				})
			})
			b.Run("ping", func(b *testing.B) {
				c, err := dial()
				if err != nil {
					b.Fatal(err)
				}
				defer c.Close()
				took := make([]time.Duration, b.N)
				measured(b, func() error {
					for i := range took {
						began := time.Now()
						if err := ping(c); err != nil {
							return err
						}
						took[i] = time.Since(began)
					}
					return nil
				})
				slices.Sort(took)
				b.ReportMetric(float64(took[len(took)/2])/1e3, "p50-µs")
				b.ReportMetric(float64(took[len(took)*99/100])/1e3, "p99-µs")
			})
			for name, command := range map[string]byte{"upload": 'u', "download": 'd'} {
				b.Run(name, func(b *testing.B) {
					b.SetBytes(1 << 20)
					conns := make(chan net.Conn, 4)
					for range cap(conns) {
						c, err := dial()
						if err != nil {
							b.Fatal(err)
						}
						defer c.Close()
						conns <- c
					}
					measured(b, func() error {
						var g errgroup.Group
						g.SetLimit(cap(conns))
						for range b.N {
							g.Go(func() error {
								c := <-conns
								defer func() { conns <- c }()
								return transfer(c, command, 1<<20)
							})
						}
						return g.Wait()
					})
				})
			}
		})
	}
}

var chunks = sync.Pool{New: func() any { b := make([]byte, 256<<10); return &b }}

// transfer has n bytes go to the backend, or come from it.
func transfer(c net.Conn, command byte, n int) error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := c.Write(binary.BigEndian.AppendUint32([]byte{command}, uint32(n))); err != nil {
		return err
	}
	b := chunks.Get().(*[]byte)
	defer chunks.Put(b)
	if command == 'd' {
		for n > 0 {
			m, err := c.Read((*b)[:min(n, len(*b))])
			if err != nil {
				return err
			}
			n -= m
		}
		return nil
	}
	for n > 0 {
		m, err := c.Write((*b)[:min(n, len(*b))])
		if err != nil {
			return err
		}
		n -= m
	}
	_, err := io.ReadFull(c, (*b)[:1])
	return err
}

// cpu is what processes have used, in seconds.
func cpu(b *testing.B, pids []int) float64 {
	b.Helper()
	var ticks int
	for _, pid := range pids {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			b.Fatal(err)
		}
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		for _, i := range []int{11, 12} { // utime, stime
			n, err := strconv.Atoi(fields[i])
			if err != nil {
				b.Fatal(err)
			}
			ticks += n
		}
	}
	return float64(ticks) / 100
}

// identitiesOf returns the caller's TLS configuration, and a folder with the service's certificate, key and authorities for programs that
// read files.
func identitiesOf(b *testing.B, s *signettest.Signet) (*tls.Config, string) {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), patience)
	defer cancel()
	x, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr(s.WorkloadAPI()))
	if err != nil {
		b.Fatal(err)
	}
	dir := b.TempDir()
	config := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13} // the proxies are measured, not this client
	for _, svid := range x.SVIDs {
		chain, key, err := svid.Marshal()
		if err != nil {
			b.Fatal(err)
		}
		if svid.ID.Path() == "/service" {
			bundle, err := x.Bundles.GetX509BundleForTrustDomain(s.TrustDomain())
			if err != nil {
				b.Fatal(err)
			}
			var authorities []byte
			for _, a := range bundle.X509Authorities() {
				authorities = append(authorities, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Raw})...)
			}
			for name, content := range map[string][]byte{"cert.pem": chain, "key.pem": key, "ca.pem": authorities} {
				if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
					b.Fatal(err)
				}
			}
			continue
		}
		pair, err := tls.X509KeyPair(chain, key)
		if err != nil {
			b.Fatal(err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	if len(config.Certificates) != 1 || len(x.SVIDs) != 2 {
		b.Fatalf("%d SVIDs", len(x.SVIDs))
	}
	return config, dir
}

// freeAddress is one that nobody listens on.
func freeAddress(b *testing.B) string {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// daemon runs a program until the benchmark ends.
func daemon(b *testing.B, name string, args ...string) *exec.Cmd {
	b.Helper()
	cmd := exec.Command(name, args...)
	out, err := os.Create(filepath.Join(b.TempDir(), "out"))
	if err != nil {
		b.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
		out.Close()
		if b.Failed() {
			said, _ := os.ReadFile(out.Name())
			b.Logf("%s said:\n%s", name, said)
		}
	})
	return cmd
}

func startGhostunnel(b *testing.B, backend, files string) (string, func() []int) {
	program := os.Getenv("GHOSTUNNEL_BIN")
	if program == "" {
		b.Skip("GHOSTUNNEL_BIN does not name ghostunnel")
	}
	address := freeAddress(b)
	cmd := daemon(b, program, "server", "--listen", address, "--target", "unix:"+strings.TrimPrefix(backend, "unix://"), "--quiet", "all", "--cert", filepath.Join(files, "cert.pem"),
		"--key", filepath.Join(files, "key.pem"), "--cacert", filepath.Join(files, "ca.pem"), "--allow-uri", "spiffe://example.org/caller")
	return address, func() []int { return []int{cmd.Process.Pid} }
}

func startNginx(b *testing.B, backend, files string) (string, func() []int) {
	program, err := exec.LookPath("nginx")
	if err != nil {
		program = "/usr/sbin/nginx"
	}
	module := os.Getenv("NGINX_STREAM_MODULE")
	if module == "" {
		module = "/usr/lib/nginx/modules/ngx_stream_module.so"
	}
	for _, path := range []string{program, module} {
		if _, err := os.Stat(path); err != nil {
			b.Skipf("nginx and its stream module (Debian: nginx, libnginx-mod-stream; or NGINX_STREAM_MODULE): %v", err)
		}
	}
	address, dir := freeAddress(b), b.TempDir()
	conf := fmt.Sprintf(`load_module %s;
daemon off;
user root;
worker_processes auto;
error_log %s/error.log warn;
pid %s/pid;
events { worker_connections 16384; }
stream {
  server {
    listen %s ssl;
    ssl_protocols TLSv1.3;
    ssl_certificate %s/cert.pem;
    ssl_certificate_key %s/key.pem;
    ssl_client_certificate %s/ca.pem;
    ssl_verify_client on;
    ssl_session_tickets off;
    ssl_session_cache off;
    proxy_pass unix:%s;
  }
}
`, module, dir, dir, address, files, files, files, strings.TrimPrefix(backend, "unix://"))
	file := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		b.Fatal(err)
	}
	cmd := daemon(b, program, "-p", dir, "-c", file)
	return address, func() []int {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", cmd.Process.Pid, cmd.Process.Pid))
		if err != nil {
			b.Fatal(err)
		}
		pids := []int{cmd.Process.Pid}
		for _, child := range strings.Fields(string(children)) {
			if pid, err := strconv.Atoi(child); err == nil {
				pids = append(pids, pid)
			}
		}
		return pids
	}
}
