//go:build cgo

package keystores_test

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/test/keystores"
)

// writeRoot writes the self-signed certificate of the CA whose key is in a key store.
func writeRoot(t *testing.T, path, uri string) *x509.Certificate {
	t.Helper()
	name, err := keys.ParseKeyURI(uri)
	if err != nil {
		t.Fatal(err)
	}
	ring := keys.NewRing(keys.RingConfig{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Log: slog.New(slog.DiscardHandler)})
	defer ring.Close()
	key, err := ring.Existing(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	if !key.External() {
		t.Error("the key is in this process")
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Example Root"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), crypto.Signer(key))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// TestUpstreamKeyInSoftHSM starts a CA below one whose key is in a token. Its workloads hold the root and get the
// intermediate; while the token is away the CA goes on, and needs it for new intermediates only.
func TestUpstreamKeyInSoftHSM(t *testing.T) {
	token, dir := keystores.SoftHSM(t), short(t)
	uri, other := token.SigningKey(t, "root"), token.SigningKey(t, "other")
	file := filepath.Join(t.TempDir(), "root.pem")
	root := writeRoot(t, file, uri)
	objects := token.Objects(t)
	ttl := 72 * time.Hour
	i := start(t, dir, func(c *ca.Config) {
		c.Upstream = ca.Upstream{TTL: ttl, Disk: &ca.UpstreamDisk{CertificateFile: file, KMS: uri}}
		c.Keys.Timeout = 2 * time.Second
	})
	c := client(t, i)
	fetch(t, c, "a")
	x, err := c.FetchX509Context(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	chain := x.DefaultSVID().Certificates
	if len(chain) != 2 || chain[1].CheckSignatureFrom(root) != nil {
		t.Fatalf("the chain has %d certificates, or the token's key has not signed the second", len(chain))
	}
	if bundle, ok := x.Bundles.Get(i.TrustDomain()); !ok || len(bundle.X509Authorities()) != 1 || !bundle.X509Authorities()[0].Equal(root) {
		t.Error("the bundle is not the root")
	}
	if n := token.Objects(t); n != objects {
		t.Errorf("the token holds %d objects, not %d as before: an upstream's key is used, and none is made", n, objects)
	}

	// Without the token the CA starts, since it has its intermediate, and issues.
	token.Unplug(t)
	if err := i.RestartCA(t.Context()); err != nil {
		t.Fatal(err)
	}
	fetch(t, c, "b")
	token.Plug(t)

	// Another key of the token under the configured name is not used.
	uri = other
	if err := i.StopCA(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "ca")); err != nil { // a new CA, which needs an intermediate at once
		t.Fatal(err)
	}
	err = i.RestartCA(t.Context())
	if err == nil || !strings.Contains(err.Error(), "is another key than that of certificate_file") || strings.Contains(err.Error(), token.PIN) {
		t.Errorf("with the name of another key: %v", err)
	}

	// One that is not there is named.
	uri = strings.Replace(uri, "object=other", "object=none", 1)
	if err = i.RestartCA(t.Context()); err == nil || !strings.Contains(err.Error(), "upstream.disk.kms") || !strings.Contains(err.Error(), "object=none") {
		t.Errorf("with the name of no key: %v", err)
	}
}
