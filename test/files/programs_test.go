package files

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-id/signet/test/signettest"
)

// run starts a program that ends with the test.
func run(t testing.TB, path string, prepare func(*exec.Cmd), args ...string) *lockedBuffer {
	t.Helper()
	out := &lockedBuffer{}
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr = out, out
	if prepare != nil {
		prepare(cmd)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		kill.Stop()
		if t.Failed() {
			t.Logf("%s said:\n%s", path, out.String())
		}
	})
	return out
}

// TestNginxReloadsUnderTraffic has a real nginx demand and show SVIDs that live for seconds, and never stops calling it:
// through all rotations no call fails.
func TestNginxReloadsUnderTraffic(t *testing.T) {
	nginx := program(t, "nginx")
	s := start(t)
	identity(s, "web", "x509TTL: 6s")
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") }))
	defer backend.Close()
	dir, address := under(t, "svid"), freeAddress(t)
	if code := fetch(t, s, "x509", "--write", dir).ends(); code != 0 { // the files are there before nginx is
		t.Fatalf("fetching once: status %d", code)
	}
	prefix := filepath.Dir(dir)
	pidFile := filepath.Join(prefix, "nginx.pid")
	conf := filepath.Join(prefix, "nginx.conf")
	text := fmt.Sprintf("pid %s;\nerror_log stderr;\ndaemon off;\nworker_processes 2;\nevents {}\nhttp {\naccess_log off;\n%s}\n", pidFile, example(t, "nginx",
		"/run/nginx-svid", dir, "127.0.0.1:8443", address, "http://127.0.0.1:8080", backend.URL))
	for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		text = strings.Replace(text, "access_log off;\n", fmt.Sprintf("access_log off;\n%s_temp_path %s/%s;\n", kind, prefix, kind), 1)
	}
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, nginx, nil, "-c", conf, "-p", prefix)
	eventually(t, "nginx listens", func() bool {
		c, err := net.Dial("tcp", address)
		if err == nil {
			c.Close()
		}
		_, perr := os.Stat(pidFile)
		return err == nil && perr == nil
	})
	h := fetch(t, s, "x509", "--write", dir, "--watch", "--signal", "HUP", "--pid-file", pidFile, "--pid-exe", nginx)

	ctx, cancel := context.WithCancel(bounded(t))
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(s.WorkloadAPI())))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	const rotations = 4
	var calls atomic.Int64
	var mu sync.Mutex
	serials := map[string]bool{}
	var traffic sync.WaitGroup
	for range 4 {
		traffic.Go(func() {
			client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(s.ID("/web")))}}
			for {
				resp, err := client.Get("https://" + address)
				if err == nil && resp.StatusCode != http.StatusOK {
					err = fmt.Errorf("status %s", resp.Status)
				}
				if err == nil {
					_, err = io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
				if err != nil {
					if ctx.Err() == nil {
						t.Errorf("call %d: %v", calls.Load(), err)
					}
					cancel()
					return
				}
				calls.Add(1)
				mu.Lock()
				serials[resp.TLS.PeerCertificates[0].SerialNumber.String()] = true
				enough := len(serials) > rotations
				mu.Unlock()
				if enough {
					return
				}
			}
		})
	}
	traffic.Wait()
	t.Logf("%d calls, of which none failed, saw %d SVIDs", calls.Load(), len(serials))
	if calls.Load() < 100 || len(serials) <= rotations {
		t.Errorf("%d calls saw %d SVIDs", calls.Load(), len(serials))
	}
	stranger := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	if resp, err := stranger.Get("https://" + address); err == nil {
		resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("a caller without an SVID is answered with %s", resp.Status)
		}
	}
	h.stop()
}

// TestPostgreSQL has a real PostgreSQL, which wants a key that belongs to its user, take over a new SVID by SIGHUP.
func TestPostgreSQL(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, who alone may give files away")
	}
	postgres, initdb := program(t, "postgres"), program(t, "initdb")
	account, err := user.Lookup("postgres")
	if err != nil {
		t.Skip(err)
	}
	uid, _ := strconv.Atoi(account.Uid)
	gid, _ := strconv.Atoi(account.Gid)
	asPostgres := func(c *exec.Cmd) {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
		c.Dir = "/"
	}
	s := start(t)
	identity(s, "db", "x509TTL: 6s")
	data := under(t, "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(data, uid, gid); err != nil {
		t.Fatal(err)
	}
	made := exec.Command(initdb, "-D", data, "-A", "trust", "--no-sync")
	asPostgres(made)
	if out, err := made.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	dir := filepath.Join(filepath.Dir(data), "svid")
	h := fetch(t, s, "x509", "--write", dir, "--watch", "--owner", "postgres", "--signal", "HUP", "--pid-file", filepath.Join(data, "postmaster.pid"))
	h.says("spiffe://example.org/db")
	host, port, _ := net.SplitHostPort(freeAddress(t))
	run(t, postgres, asPostgres, "-D", data, "-c", "listen_addresses="+host, "-p", port, "-c", "unix_socket_directories="+data, "-c", "fsync=off", "-c", "ssl=on",
		"-c", "ssl_cert_file="+dir+"/svid.pem", "-c", "ssl_key_file="+dir+"/key.pem", "-c", "ssl_ca_file="+dir+"/bundle.pem")
	serials := map[string]bool{}
	eventually(t, "PostgreSQL shows three SVIDs", func() bool {
		if serial, err := postgresSerial(net.JoinHostPort(host, port)); err == nil {
			serials[serial] = true
		}
		return len(serials) >= 3
	})
	h.stop()
}

// postgresSerial asks for TLS as PostgreSQL's protocol does it, and returns which certificate is shown.
func postgresSerial(address string) (string, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if _, err := conn.Write([]byte{0, 0, 0, 8, 4, 210, 22, 47}); err != nil {
		return "", err
	}
	if answer, err := bufio.NewReaderSize(conn, 16).Peek(1); err != nil || answer[0] != 'S' {
		return "", fmt.Errorf("PostgreSQL answers %q, %w", answer, err)
	}
	c := tls.Client(conn, &tls.Config{InsecureSkipVerify: true}) // which certificate is shown is all that is asked
	if err := c.Handshake(); err != nil {
		return "", err
	}
	return c.ConnectionState().PeerCertificates[0].SerialNumber.String(), nil
}

// TestHAProxy has a real HAProxy read the example and the combined file, and serve by it.
func TestHAProxy(t *testing.T) {
	haproxy := program(t, "haproxy")
	s := start(t)
	identity(s, "proxy")
	dir, address := under(t, "svid"), freeAddress(t)
	if code := fetch(t, s, "x509", "--write", dir, "--combined", "haproxy.pem").ends(); code != 0 {
		t.Fatalf("fetching once: status %d", code)
	}
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") }))
	defer backend.Close()
	conf := filepath.Join(filepath.Dir(dir), "haproxy.cfg")
	if err := os.WriteFile(conf, []byte("defaults\n    mode tcp\n    timeout connect 5s\n    timeout client 5s\n    timeout server 5s\n"+
		example(t, "haproxy", "/run/haproxy-svid", dir, "127.0.0.1:8443", address, "127.0.0.1:8080", backend.Listener.Addr().String())), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(haproxy, "-c", "-f", conf).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	run(t, haproxy, nil, "-db", "-f", conf)
	eventually(t, "HAProxy serves", func() bool { return call(t, s, address, "/proxy") == nil })
}

func call(t testing.TB, s *signettest.Signet, address, path string) error {
	source, err := workloadapi.NewX509Source(bounded(t), workloadapi.WithClientOptions(workloadapi.WithAddr(s.WorkloadAPI())))
	if err != nil {
		return err
	}
	defer source.Close()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(s.ID(path)))}}
	resp, err := client.Get("https://" + address)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}
