package agent

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent/internal/faultca"
	"github.com/signet-id/signet/agent/nodeattest"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/internal/x509pop"
)

// useEvidence makes the agent attest by x509pop, and the CA take it; the returned counter is that of attestations.
func (r *rig) useEvidence() *atomic.Int32 {
	r.t.Helper()
	dir := r.t.TempDir()
	key, err := nodeattest.NewKey()
	if err != nil {
		r.t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "n1"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		r.t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		r.t.Fatal(err)
	}
	file := func(name, typ string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}), 0o600); err != nil {
			r.t.Fatal(err)
		}
		return path
	}
	r.config.JoinToken = ""
	r.config.TrustBundlePath = file("bundle.pem", "CERTIFICATE", r.ca.Root.Raw)
	r.config.NodeAttestation.X509POP = &X509POP{CertificatePath: file("node.pem", "CERTIFICATE", der), PrivateKeyPath: file("node.key", "PRIVATE KEY", keyDER)}
	count := new(atomic.Int32)
	r.ca.Reattestable = true
	r.ca.Judge = func(kind string, _ []byte, challenge func([]byte) ([]byte, error)) error {
		c, err := x509pop.NewChallenge(key.Public())
		if err != nil {
			return err
		}
		question, err := json.Marshal(c)
		if err != nil {
			return err
		}
		answer, err := challenge(question)
		if err != nil {
			return err
		}
		response, err := x509pop.ParseResponse(answer)
		if err != nil {
			return err
		}
		if kind != x509pop.Attestor || x509pop.Verify(key.Public(), c, response) != nil {
			r.t.Errorf("evidence of kind %s does not convince", kind)
		}
		count.Add(1)
		return nil
	}
	return count
}

func TestReattestsInsteadOfRenewing(t *testing.T) {
	r := newRig(t)
	count := r.useEvidence()
	r.ca.AgentTTL = 4 * time.Second
	serials := make(chan string, 100)
	r.ca.Follow = func(s nodev1.Node_FollowServer, serial string) error {
		serials <- serial
		return r.ca.Answer(s)
	}
	_, stop := r.run()
	for range 3 {
		select {
		case <-serials:
		case <-time.After(20 * time.Second):
			t.Fatal("the SVID was not replaced")
		}
	}
	stop()
	r.ca.Lock()
	defer r.ca.Unlock()
	if r.ca.Renewals != 0 || count.Load() < 3 {
		t.Errorf("%d renewals and %d attestations", r.ca.Renewals, count.Load())
	}
}

// TestOneAttestationIsEnough: the CA ends the stream of the old SVID before the answer with the new one has arrived. That
// is no reason to attest once more.
func TestOneAttestationIsEnough(t *testing.T) {
	r := newRig(t)
	count := r.useEvidence()
	r.ca.AgentTTL = 6 * time.Second
	superseded, ended := make(chan struct{}), make(chan struct{})
	var streams atomic.Int32
	later := make(chan struct{}, 10)
	r.ca.Follow = func(s nodev1.Node_FollowServer, _ string) error {
		if streams.Add(1) > 1 {
			later <- struct{}{}
			return r.ca.Answer(s)
		}
		answered := make(chan error, 1)
		go func() { answered <- r.ca.Answer(s) }()
		select {
		case <-superseded:
			close(ended)
			return faultca.Denied(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
		case err := <-answered:
			return err
		}
	}
	judge := r.ca.Judge
	r.ca.Judge = func(kind string, payload []byte, challenge func([]byte) ([]byte, error)) error {
		if err := judge(kind, payload, challenge); err != nil || count.Load() != 2 {
			return err
		}
		close(superseded)
		<-ended
		r.log.await(t, "refuses the SVID that it has just issued") // the agent has heard of it
		return nil
	}
	r.run()
	select {
	case <-later:
	case <-time.After(20 * time.Second):
		t.Fatal("the agent did not come back")
	}
	if n := count.Load(); n != 2 {
		t.Errorf("%d attestations, want the first and one more", n)
	}
}

func TestEndlessChallenge(t *testing.T) {
	r := newRig(t)
	r.useEvidence()
	judge := r.ca.Judge
	asked := new(atomic.Int32)
	r.ca.Judge = func(kind string, payload []byte, challenge func([]byte) ([]byte, error)) error {
		for {
			if err := judge(kind, payload, func(q []byte) ([]byte, error) { asked.Add(1); return challenge(q) }); err != nil {
				return err
			}
		}
	}
	a, _ := r.run()
	r.log.await(t, "asked more than 16 challenges")
	if n := asked.Load(); n > 18 || a.Status().State != Attesting {
		t.Errorf("%d challenges, status %+v", n, a.Status())
	}
	r.ca.Lock()
	r.ca.Judge = judge
	r.ca.Unlock()
	r.ready(a) // it has not given up
}

// TestEvidenceIsForTheRightCAOnly: a CA that neither the held bundle nor trust_bundle_path verifies never sees evidence.
func TestEvidenceIsForTheRightCAOnly(t *testing.T) {
	r := newRig(t)
	r.useEvidence()
	r.ca.AgentTTL = 2 * time.Second
	a, stop := r.run()
	r.ready(a)
	stop()
	rogue := faultca.Start(t, "/spire/server")
	rogue.Judge = func(string, []byte, func([]byte) ([]byte, error)) error {
		t.Error("a CA that nothing verifies was shown evidence")
		return status.Error(codes.PermissionDenied, "no")
	}
	r.config.ServerAddress = rogue.Addr
	r.run()
	line := r.log.await(t, "was not renewed")
	if !strings.Contains(line, "authority") && !strings.Contains(line, "certificate") {
		t.Errorf("the log says %q", line)
	}
}

// TestEvidenceThatCountsOnceAfterTheCAWasMadeAnew: the new CA knows nothing of the node, and only trust_bundle_path verifies
// it. The node's key is worth nothing there, its evidence is.
func TestEvidenceThatCountsOnceAfterTheCAWasMadeAnew(t *testing.T) {
	r := newRig(t)
	first := r.useEvidence()
	r.ca.Reattestable, r.ca.AgentTTL = false, 6*time.Second
	a, stop := r.run()
	r.ready(a)
	stop()
	anew := faultca.Start(t, "/spire/server")
	count := new(atomic.Int32)
	judge := r.ca.Judge
	anew.Judge = func(kind string, payload []byte, challenge func([]byte) ([]byte, error)) error {
		if kind != x509pop.Attestor {
			return status.Error(codes.PermissionDenied, "failed to attest: no such node, or not its key")
		}
		count.Add(1)
		return judge(kind, payload, challenge)
	}
	r.config.ServerAddress = anew.Addr
	if err := os.WriteFile(r.config.TrustBundlePath, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: anew.Root.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	a, _ = r.run()
	r.ready(a)
	if first.Load() != 2 || count.Load() != 1 {
		t.Errorf("%d attestations in all, %d at the new CA", first.Load(), count.Load())
	}
}

func TestNodeAttestationConfig(t *testing.T) {
	pop := func() *X509POP { return &X509POP{CertificatePath: "/c", PrivateKeyPath: "/k"} }
	for _, tt := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"good", func(c *Config) { c.NodeAttestation.X509POP = pop() }, ""},
		{"a Workload API", func(c *Config) { c.NodeAttestation.X509POP = &X509POP{SPIFFEEndpointSocket: "unix:///s"} }, ""},
		{"no bundle", func(c *Config) { c.NodeAttestation.X509POP, c.TrustBundlePath = pop(), "" }, "trust_bundle_path: missing; with node_attestation.x509pop"},
		{"a token besides", func(c *Config) { c.NodeAttestation.X509POP, c.JoinToken = pop(), pinned }, "node_attestation.x509pop: excludes join_token"},
		{"two ways", func(c *Config) { c.NodeAttestation.X509POP, c.NodeAttestation.TPM = pop(), &TPM{} }, "node_attestation.tpm: excludes x509pop"},
		{"no certificate", func(c *Config) { c.NodeAttestation.X509POP = &X509POP{PrivateKeyPath: "/k"} }, "node_attestation.x509pop.certificate_path: missing"},
		{"relative key", func(c *Config) { c.NodeAttestation.X509POP = &X509POP{CertificatePath: "/c", PrivateKeyPath: "k"} }, `node_attestation.x509pop.private_key_path: "k" must be absolute`},
		{"files and a Workload API", func(c *Config) {
			c.NodeAttestation.X509POP = pop()
			c.NodeAttestation.X509POP.SPIFFEEndpointSocket = "unix:///s"
		}, "node_attestation.x509pop.spiffe_endpoint_socket: excludes"},
		{"a relative device", func(c *Config) { c.NodeAttestation.TPM = &TPM{Device: "tpm0"} }, `node_attestation.tpm.device: "tpm0" must be absolute`},
	} {
		c := goodConfig()
		c.JoinToken, c.TrustBundlePath = "", "/b.pem"
		tt.change(&c)
		if err := c.Check(); (err != nil) != (tt.want != "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}
