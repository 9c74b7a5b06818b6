package interop

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A pki is an organisation's own, whose certificates nodes show.
type pki struct {
	t    *testing.T
	dir  string
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newPKI(t *testing.T) *pki {
	p := &pki{t: t, dir: shortDir(t)}
	p.key = must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	p.cert = p.sign(&x509.Certificate{Subject: pkix.Name{CommonName: "hosts"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, p.key.Public())
	p.write("ca.pem", "CERTIFICATE", p.cert.Raw)
	return p
}

func (p *pki) sign(c *x509.Certificate, public crypto.PublicKey) *x509.Certificate {
	p.t.Helper()
	c.SerialNumber = must[*big.Int](p.t)(rand.Int(rand.Reader, big.NewInt(1<<62)))
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	parent := p.cert
	if parent == nil {
		parent = c
	}
	der := must[[]byte](p.t)(x509.CreateCertificate(rand.Reader, c, parent, public, p.key))
	return must[*x509.Certificate](p.t)(x509.ParseCertificate(der))
}

func (p *pki) write(name, kind string, der []byte) string {
	return writeFile(p.t, p.dir+"/"+name, string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})))
}

// A host is a node with a certificate of the pki.
type host struct{ name, cert, key, agentID string }

func (p *pki) host(name string, key crypto.Signer) host {
	p.t.Helper()
	cert := p.sign(&x509.Certificate{Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageDigitalSignature}, key.Public())
	der := must[[]byte](p.t)(x509.MarshalPKCS8PrivateKey(key))
	return host{name: name, cert: p.write(name+".pem", "CERTIFICATE", cert.Raw), key: p.write(name+".key", "PRIVATE KEY", der),
		agentID: fmt.Sprintf("spiffe://%s/spire/agent/x509pop/%x", trustDomain, sha1.Sum(cert.Raw))}
}

func (p *pki) ec(name string) host {
	return p.host(name, must[*ecdsa.PrivateKey](p.t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)))
}

// attestor is the block of SPIRE's configuration.
func (h host) attestor() string {
	return fmt.Sprintf(`NodeAttestor "x509pop" { plugin_data { private_key_path = %q certificate_path = %q } }`, h.key, h.cert)
}

// accepts is the section of our CA's configuration.
func (p *pki) accepts() string {
	return fmt.Sprintf("node_attestors: {x509pop: {ca_bundle_path: %s/ca.pem}}\n", p.dir)
}

// spireAccepts is the block of the SPIRE server's configuration.
func (p *pki) spireAccepts() string {
	return fmt.Sprintf(`NodeAttestor "x509pop" { plugin_data { ca_bundle_path = %q } }`, p.dir+"/ca.pem")
}

// TestAgentByX509POP lets SPIRE agents in by their host's certificate, with each kind of key, and has them attest again: at
// half life, after an eviction, and with a stale SVID. A banned one ends.
func TestAgentByX509POP(t *testing.T) {
	foreign(t, envServer)
	for _, tt := range []struct {
		name string
		key  func(*testing.T) crypto.Signer
	}{
		{"EC", func(t *testing.T) crypto.Signer {
			return must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
		}},
		{"RSA", func(t *testing.T) crypto.Signer { return must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048)) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx := bounded(t, 4*time.Minute)
			p := newPKI(t)
			ca := startCA(t, ctx, p.accepts()+"ttl: {agent: 1m}\n")
			h := p.host("node7", tt.key(t))
			a := newSPIREAgent(t, agentConfig{server: ca, attestor: h.attestor(), bundle: ca.bundleFile(ctx)})
			a.start()
			ca.spireJSON(t, ctx, "entry", "create", "-node", "-spiffeID", full("/node"), "-selector", "x509pop:subject:cn:node7")
			ca.entry(ctx, "/web", "/node")
			ca.entry(ctx, "/direct", h.agentID)
			a.serves(ctx, "/web", "/direct")
			out := must[string](t)(ca.spire(ctx, "agent", "show", "-spiffeID", h.agentID))
			for _, want := range []string{"Can re-attest     : true", "x509pop:subject:cn:node7", fmt.Sprintf("x509pop:ca:fingerprint:%x", sha1.Sum(p.cert.Raw))} {
				if !strings.Contains(out, want) {
					t.Errorf("agent show lacks %q:\n%s", want, out)
				}
			}
			// At half life it attests again instead of renewing.
			old := shortDir(t)
			if err := os.CopyFS(old, os.DirFS(a.dir+"/data")); err != nil {
				t.Fatal(err)
			}
			first := agentSerial(t, ctx, ca, h.agentID)
			awaitOtherSerial(t, ctx, ca, h.agentID, first)
			// A file restored from a backup: the SVID in it is not the active one.
			a.end(syscall.SIGTERM)
			if err := errors.Join(os.RemoveAll(a.dir+"/data"), os.CopyFS(a.dir+"/data", os.DirFS(old))); err != nil {
				t.Fatal(err)
			}
			stale := agentSerial(t, ctx, ca, h.agentID)
			a.startAnew(ctx)
			a.serves(ctx, "/web")
			awaitOtherSerial(t, ctx, ca, h.agentID, stale)
			// Evicted, it comes back by itself.
			if _, err := ca.spire(ctx, "agent", "evict", "-spiffeID", h.agentID); err != nil {
				t.Fatal(err)
			}
			if err := eventually(ctx, func() error {
				_, err := ca.spire(ctx, "agent", "show", "-spiffeID", h.agentID)
				return err
			}); err != nil {
				t.Fatalf("the evicted agent did not attest again: %v", err)
			}
			ca.entry(ctx, "/after", "/node")
			a.serves(ctx, "/after")
			// Banned, it does not.
			if _, err := ca.spire(ctx, "agent", "ban", "-spiffeID", h.agentID); err != nil {
				t.Fatal(err)
			}
			if err := a.ends(ctx); err != nil {
				t.Errorf("banned: %v", err)
			}
		})
	}
}

func awaitOtherSerial(t *testing.T, ctx context.Context, s *server, agentID, serial string) {
	t.Helper()
	if err := eventually(ctx, func() error {
		if now := agentSerial(t, ctx, s, agentID); now == serial {
			return errors.New("the agent's SVID was not replaced")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
