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
	"testing"
	"time"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/test/replicatest"
)

func TestMain(m *testing.M) {
	replicatest.MaySignet()
	os.Exit(m.Run())
}

// A process is a CA that can be killed and started again on the same files.
type process struct {
	*replicatest.Replica
	t       *testing.T
	ctx     context.Context
	metrics string
}

// newProcess makes what a CA needs that works in the cluster prod, as kubernetes says, whose agents attest by k8s_psat. The
// service account of those is agent in the test's namespace. start starts it.
func (k *cluster) newProcess(kubernetes, more string) *process {
	k.t.Helper()
	dir, addr := shortDir(k.t), replicatest.FreeAddress(k.t)
	p := &process{t: k.t, ctx: k.ctx, metrics: replicatest.FreeAddress(k.t)}
	psat := fmt.Sprintf("node_attestors: {k8s_psat: {clusters: {prod: {service_accounts: ['%s:agent'], kubeconfig: %s}}}}\n", k.namespace, k.credentials("ca"))
	config := fmt.Sprintf("trust_domain: example.org\nlisten: %s\ndata_dir: %[2]s/disk/data\nadmin_socket: {path: %[2]s/ca.sock}\nseal: {key_file: %[2]s/seal.key, create: true}\nmetrics: {listen: %[3]s}\nkubernetes: {clusters: {prod: {%[4]s}}}\n%[5]s%[6]s",
		addr, dir, p.metrics, kubernetes, psat, more)
	p.Replica = replicatest.New(k.t, "the CA", dir, addr, config)
	if err := os.Mkdir(dir+"/disk", 0o700); err != nil {
		k.t.Fatal(err)
	}
	return p
}

// disk gives the CA a disk of its own for its data, in a mount namespace, so that it goes with the process.
func (p *process) disk(bytes int) {
	p.Under = []string{"unshare", "--mount", "sh", "-c", fmt.Sprintf(`mount -t tmpfs -o size=%d none %s/disk && exec "$0" "$@"`, bytes, p.Dir)}
}

// edit changes the configuration before the CA is started.
func (p *process) edit(change func(config string) string) {
	p.t.Helper()
	text, err := os.ReadFile(p.Dir + "/ca.yaml")
	if err == nil {
		err = os.WriteFile(p.Dir+"/ca.yaml", []byte(change(string(text))), 0o600)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// start starts the CA and returns when it serves.
func (p *process) start() {
	p.t.Helper()
	p.Start()
	p.Answers()
}

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
	_, err := p.Admin.Apply(p.ctx, &adminv1.ApplyRequest{Yes: true, Documents: []*adminv1.Document{{Content: []byte(docs), File: "test.yaml"}}})
	return err
}

// roots are the trust domain's X.509 authorities.
func (p *process) roots() []*x509.Certificate {
	p.t.Helper()
	cmd := exec.CommandContext(p.ctx, os.Args[0], "bundle", "show", "--format", "pem", "--socket", p.Dir+"/ca.sock")
	cmd.Env = append(os.Environ(), replicatest.AsSignet+"=1")
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
