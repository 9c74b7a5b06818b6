//go:build cgo

package keystores_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	_ "go.step.sm/crypto/kms/tpmkms"

	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/bolt"
	"github.com/signet-id/signet/test/keystores"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// A trustDomain is the authorities of one store, opened anew as often as a test wants.
type trustDomain struct {
	t     testing.TB
	dir   string
	store *bolt.Store
	ring  *keys.Ring
	set   *authority.Set
	stop  func()
}

// openTrustDomain opens the authorities in dir with keys at the URI and of the algorithm.
func openTrustDomain(t testing.TB, dir, uri string, algorithm keys.Algorithm) *trustDomain {
	t.Helper()
	d := &trustDomain{t: t, dir: dir}
	quiet := slog.New(slog.DiscardHandler)
	var err error
	if d.store, err = bolt.Open(bolt.Config{Dir: filepath.Join(dir, "store"), Reserve: 4096, Log: quiet}); err != nil {
		t.Fatal(err)
	}
	seal, err := keys.LoadOrCreateSealKey(filepath.Join(dir, "seal.key"))
	if err != nil {
		t.Fatal(err)
	}
	place, err := keys.ParsePlace(uri)
	if err != nil {
		t.Fatal(err)
	}
	choice := keys.Choice{Place: place, Algorithm: algorithm}
	d.ring = keys.NewRing(keys.RingConfig{TrustDomain: td, X509: choice, JWT: choice, Log: quiet})
	if d.set, err = authority.Open(t.Context(), authority.Config{TrustDomain: td, Store: d.store, Seal: seal, Keys: d.ring, Exclusive: true, Log: quiet}); err != nil {
		t.Fatal(err)
	}
	d.follow()
	return d
}

// follow shows the set what is committed, as the CA does.
func (d *trustDomain) follow() {
	from, err := d.store.Barrier(d.t.Context())
	if err != nil {
		d.t.Fatal(err)
	}
	watcher, err := d.store.Watch(d.t.Context(), from)
	if err != nil {
		d.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			batch, err := watcher.Next(d.t.Context())
			if err != nil {
				return // closed
			}
			if err := d.set.Observe(batch); err != nil {
				d.t.Error(err)
			}
		}
	}()
	d.stop = func() { watcher.Close(); <-done }
}

func (d *trustDomain) close() {
	d.stop()
	d.ring.Close()
	if err := d.store.Close(); err != nil {
		d.t.Error(err)
	}
}

// rotate prepares and activates a new authority of each kind.
func (d *trustDomain) rotate() {
	d.t.Helper()
	for _, use := range []keys.Use{keys.UseX509, keys.UseJWT} {
		made, err := d.set.Prepare(d.t.Context(), use)
		if err != nil {
			d.t.Fatal(err)
		}
		if _, err := d.set.Activate(d.t.Context(), use, made.ID); err != nil {
			d.t.Fatal(err)
		}
	}
}

// kinds returns where the keys of the authorities are, as the store says.
func (d *trustDomain) kinds() string {
	var kinds []string
	if _, err := d.store.List(d.t.Context(), "authority/", 0, func(item store.Item) error {
		for _, kind := range []string{"softkms", "pkcs11", "tpmkms"} {
			if strings.Contains(string(item.Value), `"kind":"`+kind+`"`) {
				kinds = append(kinds, kind)
			}
		}
		return nil
	}); err != nil {
		d.t.Fatal(err)
	}
	return strings.Join(kinds, " ")
}

// issued is an X509-SVID and a JWT-SVID.
type issued struct {
	leaf  *x509.Certificate
	token string
}

func (d *trustDomain) issue() issued {
	d.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		d.t.Fatal(err)
	}
	id := spiffeid.RequireFromPath(td, "/web")
	prepared, err := d.set.CheckX509(authority.X509Request{ID: id, PublicKey: key.Public(), DNSNames: []string{"web.internal"}})
	if err != nil {
		d.t.Fatal(err)
	}
	svid, err := d.set.SignX509(d.t.Context(), prepared)
	if err != nil {
		d.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(svid.Chain[0])
	if err != nil {
		d.t.Fatal(err)
	}
	token, err := d.set.SignJWT(d.t.Context(), authority.JWTRequest{ID: id, Audience: []string{"db"}})
	if err != nil {
		d.t.Fatal(err)
	}
	return issued{leaf: leaf, token: token.Token}
}

// check verifies both with nothing but the published bundle.
func (d *trustDomain) check(i issued) {
	d.t.Helper()
	bundle, roots := d.set.Bundle(), x509.NewCertPool()
	for _, a := range bundle.X509 {
		roots.AddCert(a.Certificate)
	}
	if _, err := i.leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: time.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		d.t.Errorf("the X509-SVID does not verify with the bundle: %v", err)
	}
	token, err := jwt.ParseSigned(i.token, []jose.SignatureAlgorithm{jose.ES256, jose.ES384, jose.RS256})
	if err != nil {
		d.t.Fatal(err)
	}
	for _, a := range bundle.JWT {
		if a.KeyID == token.Headers[0].KeyID {
			if err := token.Claims(a.PublicKey, &jwt.Claims{}); err != nil {
				d.t.Errorf("the JWT-SVID does not verify with the bundle: %v", err)
			}
			return
		}
	}
	d.t.Errorf("no key %q in the bundle", token.Headers[0].KeyID)
}

// liveThrough issues, rotates and restarts with keys at the URI. What was issued must verify throughout.
func liveThrough(t *testing.T, uri string, algorithm keys.Algorithm) {
	dir := t.TempDir()
	d := openTrustDomain(t, dir, uri, algorithm)
	first := d.issue()
	d.check(first)
	d.rotate()
	second := d.issue()
	d.check(first)
	d.check(second)
	d.close()

	d = openTrustDomain(t, dir, uri, algorithm)
	defer d.close()
	third := d.issue()
	for _, i := range []issued{first, second, third} {
		d.check(i)
	}
	if err := d.set.Health(); err != nil {
		t.Errorf("Health = %v", err)
	}
}

func TestAuthoritiesInSoftHSM(t *testing.T) {
	for _, algorithm := range []keys.Algorithm{keys.ECP256, keys.ECP384, keys.RSA2048} {
		t.Run(string(algorithm), func(t *testing.T) {
			token := keystores.SoftHSM(t)
			liveThrough(t, token.URI, algorithm)
			if n := token.Objects(t); n != 8 {
				t.Errorf("the token holds %d objects, want the 8 of 4 key pairs", n)
			}
		})
	}
}

func TestAuthoritiesInTPM(t *testing.T) {
	for _, algorithm := range []keys.Algorithm{keys.ECP256, keys.RSA2048} {
		t.Run(string(algorithm), func(t *testing.T) {
			liveThrough(t, keystores.SWTPM(t).URI, algorithm)
		})
	}
}

// TestMoveIntoTokenByRotation changes keys.uri between two starts. The authorities that there are keep their keys in the
// store, the next ones have theirs in the token, and the other way round.
func TestMoveIntoTokenByRotation(t *testing.T) {
	token, dir := keystores.SoftHSM(t), t.TempDir()
	d := openTrustDomain(t, dir, "softkms:", keys.ECP256)
	first := d.issue()
	d.close()

	d = openTrustDomain(t, dir, token.URI, keys.ECP256)
	d.check(d.issue())
	if n := token.Objects(t); n != 0 {
		t.Errorf("%d objects in the token before anything was prepared", n)
	}
	d.rotate()
	d.check(first)
	second := d.issue()
	d.check(second)
	if got, want := d.kinds(), "pkcs11 softkms pkcs11 softkms"; strings.Count(got, "pkcs11") != 2 || strings.Count(got, "softkms") != 2 {
		t.Errorf("keys are in %q, want %q in some order", got, want)
	}
	d.close()

	d = openTrustDomain(t, dir, "softkms:", keys.ECP256)
	defer d.close()
	d.check(d.issue()) // still from the token
	d.rotate()
	d.check(first)
	d.check(second)
	d.check(d.issue())
}
