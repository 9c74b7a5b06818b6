//go:build kube

package kube

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/agent/caclient"
	"github.com/signet-id/signet/agent/nodeattest"
	evidence "github.com/signet-id/signet/agent/nodeattest/k8spsat"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/test/signettest"
)

// daemon runs a program of SPIRE's until the test ends, and shows what it said if the test failed.
func daemon(t *testing.T, ctx context.Context, program, config string) {
	t.Helper()
	background(t, ctx, nil, program, "run", "-config", config)
}

// background runs a program with what is added to the environment until the test ends or stop is called.
func background(t *testing.T, ctx context.Context, env []string, program string, args ...string) (stop func()) {
	t.Helper()
	var said bytes.Buffer
	process := exec.CommandContext(ctx, program, args...)
	process.Env = append(os.Environ(), env...)
	process.Stdout, process.Stderr = &said, &said
	process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		process.Process.Kill()
		process.Wait()
	})
	t.Cleanup(func() {
		stop()
		if t.Failed() {
			t.Logf("%s said:\n%s", filepath.Base(program), said.String())
		}
	})
	return stop
}

// shortDir is a directory for Unix sockets, whose paths have at most 107 bytes.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kube")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func writeConfig(t *testing.T, dir, format string, args ...any) string {
	t.Helper()
	path := filepath.Join(dir, "spire.conf")
	if err := os.WriteFile(path, fmt.Appendf(nil, format, args...), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// An unmodified agent of SPIRE attests with the token of its pod, renews by attesting again, and serves.
func TestSPIREAgent(t *testing.T) {
	program := optional(t, "SPIRE_AGENT_BIN", "the path of SPIRE's spire-agent")
	ctx := bounded(t)
	k := first(t, ctx)
	p := k.run("agent-1", "agent")
	s := signettest.Start(t, signettest.Config{CA: func(c *ca.Config) {
		c.TTL.Agent = 20 * time.Second
		c.NodeAttestors.K8sPSAT = &ca.K8sPSAT{Clusters: map[string]ca.K8sCluster{"prod": {ServiceAccounts: []string{k.namespace + ":agent"}, Kubeconfig: k.credentials("ca")}}}
	}})
	dir := shortDir(t)
	host, port, err := net.SplitHostPort(s.CAAddr())
	if err != nil {
		t.Fatal(err)
	}
	daemon(t, ctx, program, writeConfig(t, dir, `agent {
  data_dir = %q
  server_address = %q
  server_port = %q
  socket_path = %q
  trust_domain = "example.org"
  trust_bundle_path = %q
}
plugins {
  NodeAttestor "k8s_psat" { plugin_data { cluster = "prod" token_path = %q } }
  KeyManager "memory" { plugin_data {} }
  WorkloadAttestor "unix" { plugin_data {} }
}
`, dir, host, port, dir+"/agent.sock", s.BundlePath(), p.tokenFile()))

	agents, id := agentv1.NewAgentClient(s.AdminConn()), &types.SPIFFEID{TrustDomain: "example.org", Path: "/spire/agent/k8s_psat/prod/" + p.nodeUID}
	attested := func(not string) string {
		for {
			if a, err := agents.GetAgent(ctx, &agentv1.GetAgentRequest{Id: id}); err == nil && a.X509SvidSerialNumber != not && a.CanReattest {
				return a.X509SvidSerialNumber
			}
			pause(t, ctx)
		}
	}
	serial := attested("")
	s.Apply(fmt.Sprintf("kind: Identity\nname: web\nspiffeID: /web\nmatch: ['unix:uid:%d']\non: ['k8s_psat:agent_sa:agent']\n", os.Getuid()))
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+dir+"/agent.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for {
		if svid, err := client.FetchX509SVID(ctx); err == nil && svid.ID.Path() == "/web" {
			break
		}
		pause(t, ctx)
	}
	attested(serial)
}

// startSPIREServer runs an unmodified server of SPIRE that takes the tokens of this cluster, until the test ends. It returns its
// address, its admin socket and its roots.
func startSPIREServer(t *testing.T, ctx context.Context, k *cluster, extra string) (address, socket string, roots []*x509.Certificate) {
	t.Helper()
	program := optional(t, "SPIRE_SERVER_BIN", "the path of SPIRE's spire-server")
	dir := shortDir(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address = listener.Addr().String()
	listener.Close()
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	daemon(t, ctx, program, writeConfig(t, dir, `server {
  bind_address = %q
  bind_port = %q
  socket_path = %q
  trust_domain = "example.org"
  data_dir = %q
  %s
}
plugins {
  DataStore "sql" { plugin_data { database_type = "sqlite3" connection_string = %q } }
  NodeAttestor "k8s_psat" { plugin_data { clusters = { "prod" = { service_account_allow_list = [%q] kube_config_file = %q } } } }
  KeyManager "memory" { plugin_data {} }
}
`, host, port, dir+"/api.sock", dir, extra, dir+"/db.sqlite3", k.namespace+":agent", k.credentials("ca")))
	for len(roots) == 0 {
		pause(t, ctx)
		text, err := exec.CommandContext(ctx, program, "bundle", "show", "-socketPath", dir+"/api.sock").Output()
		if block, _ := pem.Decode(text); err == nil && block != nil {
			root, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			roots = append(roots, root)
		}
	}
	return address, dir + "/api.sock", roots
}

// What our agent shows, an unmodified server of SPIRE takes.
func TestSPIREServer(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	p := k.run("agent-1", "agent")
	address, _, roots := startSPIREServer(t, ctx, k, "")

	td := spiffeid.RequireTrustDomainFromString("example.org")
	key, err := nodeattest.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := nodeattest.CSR(key)
	if err != nil {
		t.Fatal(err)
	}
	shown, err := evidence.New(evidence.Config{Cluster: "prod", TokenPath: p.tokenFile()}).Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	got, err := caclient.Attest(ctx, caclient.Attestation{Address: address, TrustDomain: td, CSR: csr, Evidence: shown, Bundle: x509bundle.FromX509Authorities(td, roots)})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(got.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	if want := "/spire/agent/k8s_psat/prod/" + p.nodeUID; leaf.URIs[0].Path != want || !got.Reattestable {
		t.Errorf("agent %s, reattestable %t; want %s, as our CA names it", leaf.URIs[0], got.Reattestable, want)
	}
}

// Our agent in a pod, under an unmodified server of SPIRE: it attests, renews by attesting again, comes back after an eviction, and
// serves what the server has registered.
func TestAgentUnderSPIREServer(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	p := k.run("agent-1", "agent")
	address, socket, roots := startSPIREServer(t, ctx, k, `agent_ttl = "20s"`)
	spire := func(args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(ctx, os.Getenv("SPIRE_SERVER_BIN"), append(args, "-socketPath", socket)...).CombinedOutput()
		if err != nil {
			t.Fatalf("spire-server %q: %v\n%s", args, err, out)
		}
		return string(out)
	}
	dir := shortDir(t)
	var pems []byte
	for _, r := range roots {
		pems = append(pems, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Raw})...)
	}
	if err := os.WriteFile(dir+"/bundle.pem", pems, 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := agent.New(agent.Config{TrustDomain: "example.org", ServerAddress: address, DataDir: dir + "/data", SocketPath: dir + "/agent.sock", AdminSocket: agent.AdminSocket{Path: shortDir(t) + "/admin.sock"},
		TrustBundlePath: dir + "/bundle.pem", PollInterval: time.Second, NodeAttestation: agent.NodeAttestation{K8sPSAT: &agent.K8sPSAT{Cluster: "prod", TokenPath: p.tokenFile()}},
		Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	running, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- a.Run(running) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	id := "spiffe://example.org/spire/agent/k8s_psat/prod/" + p.nodeUID
	spire("entry", "create", "-spiffeID", "spiffe://example.org/web", "-parentID", id, "-selector", fmt.Sprintf("unix:uid:%d", os.Getuid()))
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+dir+"/agent.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	served := func() {
		t.Helper()
		for {
			svid, err := client.FetchX509SVID(ctx)
			if err == nil && svid.ID.Path() == "/web" {
				return
			}
			pause(t, ctx)
		}
	}
	served()
	first := a.Status()
	if first.Server != "spire" || first.ID.String() != id {
		t.Errorf("the agent is %s at a server of kind %q, want %s", first.ID, first.Server, id)
	}
	for a.Status().NotAfter.Equal(first.NotAfter) { // at half life
		pause(t, ctx)
	}
	before := a.Status().NotAfter
	spire("agent", "evict", "-spiffeID", id)
	for a.Status().NotAfter.Equal(before) {
		pause(t, ctx)
	}
	served()
}
