package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/signet-id/signet/agent"
	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/internal/dev"
)

// nodeLife leads a node that attests by evidence through its life: it joins, renews by attesting again, and comes back
// without a person after an evict, after an expiry, and after the CA was made anew. [DESIGN §7]
func nodeLife(t *testing.T, attestor string, configureCA func(*ca.Config), configureAgent func(*agent.Config)) {
	ctx := bounded(t, 100*time.Second)
	dir, err := os.MkdirTemp("", "signet")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	var offset atomic.Int64
	s, err := dev.Start(ctx, dev.Config{Dir: dir, Now: func() time.Time { return time.Now().Add(time.Duration(offset.Load())) },
		CA: func(c *ca.Config) {
			c.TTL.Agent, c.TTL.AgentRecovery, c.Audit.Reserve = 10*time.Second, time.Second, 1<<20
			configureCA(c)
		},
		Agent: func(c *agent.Config) {
			c.JoinTokenFile = ""
			configureAgent(c)
		}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	life := &life{t: t, ctx: ctx, s: s}

	life.apply(identity("web"))
	first := life.node()
	if !strings.HasPrefix(first.Id.Path, "/spire/agent/"+attestor+"/") || first.AttestationType != attestor || !first.CanReattest || len(first.Selectors) == 0 {
		t.Fatalf("the CA holds %v", first)
	}
	life.serves("at the start")
	if got := s.Agent().Status().Attestor; got != attestor {
		t.Errorf("the agent's status says that it attests by %q", got)
	}
	life.replaced("at half life", first)

	now := life.node()
	life.agents(func(c agentv1.AgentClient) error {
		_, err := c.DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: now.Id})
		return err
	})
	life.replaced("after an evict", now)

	if err := s.StopAgent(); err != nil {
		t.Fatal(err)
	}
	now = life.node()
	offset.Store(int64(48 * time.Hour)) // far beyond what its key alone would win back
	if err := s.RestartAgent(ctx); err != nil {
		t.Fatal(err)
	}
	life.replaced("after its SVID had expired", now)
	life.serves("after an expiry")

	if err := s.StopCA(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "ca")); err != nil {
		t.Fatal(err)
	}
	if err := s.RestartCA(ctx); err != nil { // with other authorities, in the bundle file as an operator would put them
		t.Fatal(err)
	}
	life.apply(identity("web"))
	life.replaced("after the CA was made anew", &types.Agent{})
	life.serves("after the CA was made anew")
}

type life struct {
	t   *testing.T
	ctx context.Context
	s   *dev.Instance
}

func (l *life) apply(docs string) {
	l.t.Helper()
	conn, err := l.s.Admin()
	if err != nil {
		l.t.Fatal(err)
	}
	defer conn.Close()
	if _, err := adminv1.NewAdminClient(conn).Apply(l.ctx, &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(docs), File: "t.yaml"}}}); err != nil {
		l.t.Fatal(err)
	}
}

func (l *life) agents(f func(agentv1.AgentClient) error) {
	l.t.Helper()
	conn, err := l.s.Admin()
	if err != nil {
		l.t.Fatal(err)
	}
	defer conn.Close()
	if err := f(agentv1.NewAgentClient(conn)); err != nil {
		l.t.Fatal(err)
	}
}

// node is the only agent that the CA knows, or an empty one.
func (l *life) node() *types.Agent {
	l.t.Helper()
	out := &types.Agent{}
	l.agents(func(c agentv1.AgentClient) error {
		r, err := c.ListAgents(l.ctx, &agentv1.ListAgentsRequest{})
		if err == nil && len(r.Agents) > 1 {
			err = fmt.Errorf("there are %d agents", len(r.Agents))
		}
		if err == nil && len(r.Agents) == 1 {
			out = r.Agents[0]
		}
		return err
	})
	return out
}

// replaced waits until the agent holds another SVID than before, and the CA's state.
func (l *life) replaced(when string, before *types.Agent) {
	l.t.Helper()
	if err := eventually(l.ctx, func() error {
		now, status := l.node(), l.s.Agent().Status()
		if now.X509SvidSerialNumber == "" || now.X509SvidSerialNumber == before.X509SvidSerialNumber || !status.Connected {
			return fmt.Errorf("serial %q, status %+v", now.X509SvidSerialNumber, status)
		}
		return nil
	}); err != nil {
		l.t.Fatalf("%s: no new SVID: %v", when, err)
	}
}

// serves asks for a workload's SVID until it chains to the CA's present authorities.
func (l *life) serves(when string) {
	l.t.Helper()
	client, err := workloadapi.New(l.ctx, workloadapi.WithAddr(l.s.WorkloadAPI()))
	if err != nil {
		l.t.Fatal(err)
	}
	defer client.Close()
	if err := eventually(l.ctx, func() error {
		svid, err := client.FetchX509SVID(l.ctx)
		if err != nil {
			return err
		}
		roots, err := l.s.Roots()
		if err != nil {
			return err
		}
		for _, r := range roots {
			if svid.Certificates[len(svid.Certificates)-1].CheckSignatureFrom(r) == nil {
				return nil
			}
		}
		return fmt.Errorf("the SVID of %s was issued by another CA", svid.ID)
	}); err != nil {
		l.t.Fatalf("%s: %v", when, err)
	}
}

func TestNodeLifeByX509POP(t *testing.T) {
	t.Parallel()
	rootFile, leafFile, keyFile := nodePKI(t, t.TempDir())
	nodeLife(t, "x509pop", func(c *ca.Config) { c.NodeAttestors.X509POP = &ca.X509POP{CABundlePath: rootFile} }, func(c *agent.Config) {
		c.NodeAttestation.X509POP = &agent.X509POP{CertificatePath: leafFile, PrivateKeyPath: keyFile}
	})
}

// nodePKI makes the files of a PKI of nodes: its root, and a node's certificate and key.
func nodePKI(t *testing.T, dir string) (rootFile, leafFile, keyFile string) {
	t.Helper()
	rootKey, nodeKey := p256(t), p256(t)
	root := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "nodes"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "n1"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature}
	file := func(name, typ string, der []byte, err error) string {
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	rootDER, err := x509.CreateCertificate(rand.Reader, root, root, rootKey.Public(), rootKey)
	rootFile = file("root.pem", "CERTIFICATE", rootDER, err)
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, root, nodeKey.Public(), rootKey)
	leafFile = file("node.pem", "CERTIFICATE", leafDER, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(nodeKey)
	keyFile = file("node.key", "PRIVATE KEY", keyDER, err)
	return rootFile, leafFile, keyFile
}

func p256(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}
