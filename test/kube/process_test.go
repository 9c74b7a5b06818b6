//go:build kube

package kube

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/internal/cli"
)

// asSignet makes the test binary be the signet command, so that tests run real processes of this very tree.
const asSignet = "SIGNET_TEST_AS_SIGNET"

func TestMain(m *testing.M) {
	if os.Getenv(asSignet) != "" {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		code := cli.Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
		stop()
		os.Exit(code)
	}
	os.Exit(m.Run())
}

// A process is a CA that can be killed and started again on the same files.
type process struct {
	t        *testing.T
	ctx      context.Context
	dir      string
	addr     string // of its port
	metrics  string
	disk     int // bytes of a disk of its own for its data; 0: none
	conn     *grpc.ClientConn
	admin    adminv1.AdminClient
	cmd      *exec.Cmd
	said     *said
	starting sync.Mutex
}

// said keeps what a process says.
type said struct {
	mu   sync.Mutex
	text strings.Builder
}

func (o *said) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *said) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// newProcess makes what a CA needs that works in the cluster prod, as kubernetes says, whose agents attest by k8s_psat. The
// service account of those is agent in the test's namespace. start starts it.
func (k *cluster) newProcess(kubernetes, more string) *process {
	k.t.Helper()
	p := &process{t: k.t, ctx: k.ctx, dir: shortDir(k.t), addr: free(k.t), metrics: free(k.t), said: &said{}}
	psat := fmt.Sprintf("node_attestors: {k8s_psat: {clusters: {prod: {service_accounts: ['%s:agent'], kubeconfig: %s}}}}\n", k.namespace, k.credentials("ca"))
	config := fmt.Sprintf("trust_domain: example.org\nlisten: %s\ndata_dir: %[2]s/disk/data\nadmin_socket: {path: %[2]s/ca.sock}\nseal: {key_file: %[2]s/seal.key, create: true}\nmetrics: {listen: %[3]s}\nkubernetes: {clusters: {prod: {%[4]s}}}\n%[5]s%[6]s",
		p.addr, p.dir, p.metrics, kubernetes, psat, more)
	if err := os.WriteFile(filepath.Join(p.dir, "ca.yaml"), []byte(config), 0o600); err != nil {
		k.t.Fatal(err)
	}
	if err := os.Mkdir(p.dir+"/disk", 0o700); err != nil {
		k.t.Fatal(err)
	}
	var err error
	if p.conn, err = grpc.NewClient("unix:"+p.dir+"/ca.sock", grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		k.t.Fatal(err)
	}
	p.admin = adminv1.NewAdminClient(p.conn)
	k.t.Cleanup(func() {
		p.end(syscall.SIGTERM)
		p.conn.Close()
		if k.t.Failed() {
			text := p.said.String()
			k.t.Logf("the CA said:\n%s", text[max(0, len(text)-6000):])
		}
	})
	return p
}

// edit changes the configuration before the CA is started.
func (p *process) edit(change func(config string) string) {
	p.t.Helper()
	text, err := os.ReadFile(p.dir + "/ca.yaml")
	if err == nil {
		err = os.WriteFile(p.dir+"/ca.yaml", []byte(change(string(text))), 0o600)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// start starts the CA and returns when it serves.
func (p *process) start() {
	p.t.Helper()
	args := []string{os.Args[0], "ca", "run", "--config", p.dir + "/ca.yaml"}
	if p.disk > 0 { // in a mount namespace, so that it goes with the process
		script := fmt.Sprintf(`mount -t tmpfs -o size=%d none %s/disk && exec "$0" "$@"`, p.disk, p.dir)
		args = append([]string{"unshare", "--mount", "sh", "-c", script}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), asSignet+"=1")
	cmd.Stdout, cmd.Stderr = p.said, p.said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.starting.Lock()
	p.cmd = cmd
	p.starting.Unlock()
	p.conn.ResetConnectBackoff()
	for {
		ctx, cancel := context.WithTimeout(p.ctx, 5*time.Second)
		_, err := p.admin.GetStatus(ctx, &adminv1.GetStatusRequest{}, grpc.WaitForReady(true))
		cancel()
		if err == nil {
			return
		}
		if p.ctx.Err() != nil {
			p.t.Fatalf("the CA does not serve: %v", err)
		}
		pauseFor(p.t, p.ctx, 20*time.Millisecond)
	}
}

// end ends the process by a signal and returns when it has ended.
func (p *process) end(s syscall.Signal) {
	p.starting.Lock()
	defer p.starting.Unlock()
	if p.cmd == nil {
		return
	}
	p.cmd.Process.Signal(s)
	p.cmd.Wait() // its state says how it ended
	p.cmd = nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// page returns what a page of its metrics address says, with the status before it.
func (p *process) page(path string) string {
	p.t.Helper()
	r, err := http.NewRequestWithContext(p.ctx, http.MethodGet, "http://"+p.metrics+path, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return resp.Status + "\n" + string(text)
}

// readyUntil waits until /ready is as it should be.
func (p *process) readyUntil(what string, ok func(page string) bool) string {
	p.t.Helper()
	for {
		page := p.page("/ready")
		if ok(page) {
			return page
		}
		select {
		case <-p.ctx.Done():
			p.t.Fatalf("it never comes that %s; /ready says %s", what, page)
		default:
		}
		pauseFor(p.t, p.ctx, 50*time.Millisecond)
	}
}

// apply applies documents as an operator does.
func (p *process) apply(docs string) error {
	_, err := p.admin.Apply(p.ctx, &adminv1.ApplyRequest{Yes: true, Documents: []*adminv1.Document{{Content: []byte(docs), File: "test.yaml"}}})
	return err
}

// roots are the trust domain's X.509 authorities.
func (p *process) roots() []*x509.Certificate {
	p.t.Helper()
	cmd := exec.CommandContext(p.ctx, os.Args[0], "bundle", "show", "--format", "pem", "--socket", p.dir+"/ca.sock")
	cmd.Env = append(os.Environ(), asSignet+"=1")
	out, err := cmd.Output()
	if err != nil {
		p.t.Fatalf("signet bundle show: %v", err)
	}
	var certs []*x509.Certificate
	for b, rest := pem.Decode(out); b != nil; b, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			p.t.Fatal(err)
		}
		certs = append(certs, c)
	}
	return certs
}
