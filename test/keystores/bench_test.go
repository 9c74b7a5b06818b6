//go:build cgo

package keystores_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.step.sm/crypto/kms"
	"go.step.sm/crypto/kms/apiv1"

	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/test/keystores"
)

// BenchmarkSign compares signatures through package keys, each of them verified and under a deadline, with the driver called
// directly in the same run, turn about. ratio is the one by the other.
func BenchmarkSign(b *testing.B) {
	b.Run("softhsm", func(b *testing.B) {
		token := keystores.SoftHSM(b)
		benchmarkSign(b, token.URI, "pkcs11:id=6265;object=bench")
	})
	b.Run("tpm", func(b *testing.B) {
		benchmarkSign(b, keystores.SWTPM(b).URI, "tpmkms:name=bench")
	})
}

func benchmarkSign(b *testing.B, uri, name string) {
	place, err := keys.ParsePlace(uri)
	if err != nil {
		b.Fatal(err)
	}
	bare, err := kms.New(b.Context(), apiv1.Options{URI: uri})
	if err != nil {
		b.Fatal(err)
	}
	defer bare.Close()
	if _, err := bare.CreateKey(&apiv1.CreateKeyRequest{Name: name, SignatureAlgorithm: apiv1.ECDSAWithSHA256}); err != nil {
		b.Fatal(err)
	}
	device, err := bare.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: name})
	if err != nil {
		b.Fatal(err)
	}
	ring := keys.NewRing(keys.RingConfig{TrustDomain: td, X509: keys.Choice{Place: place, Algorithm: keys.ECP256}})
	defer ring.Close()
	ours, err := ring.Create(b.Context(), ring.Intend(keys.UseX509, 1))
	if err != nil {
		b.Fatal(err)
	}
	digest := sha256.Sum256([]byte("to be signed"))
	// spent signs n times with each of the given number of callers, and returns how long that took.
	spent := func(signer crypto.Signer, n, callers int) time.Duration {
		var left atomic.Int64
		left.Store(int64(n))
		var wg sync.WaitGroup
		begin := time.Now()
		for range callers {
			wg.Go(func() {
				for left.Add(-1) >= 0 {
					if _, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		return time.Since(begin)
	}
	for _, callers := range []int{1, 8} {
		name := map[int]string{1: "callers=1", 8: "callers=8"}[callers]
		b.Run(name, func(b *testing.B) {
			const turn = 20
			var direct, through time.Duration
			n := 0
			for b.Loop() {
				direct += spent(device, turn, callers)
				through += spent(ours, turn, callers)
				n += turn
			}
			b.ReportMetric(float64(n)/direct.Seconds(), "device/s")
			b.ReportMetric(float64(n)/through.Seconds(), "signet/s")
			b.ReportMetric(direct.Seconds()/through.Seconds(), "ratio")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkSVIDs signs X509-SVIDs in batches of 100, as agents ask for them, with the authority's key in a SoftHSM token and
// in the process.
func BenchmarkSVIDs(b *testing.B) {
	for _, where := range []string{"softkms", "softhsm"} {
		b.Run(where, func(b *testing.B) {
			uri := "softkms:"
			if where == "softhsm" {
				uri = keystores.SoftHSM(b).URI
			}
			d := openTrustDomain(b, b.TempDir(), uri, keys.ECP256)
			defer d.close()
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				b.Fatal(err)
			}
			prepared, err := d.set.CheckX509(authority.X509Request{ID: spiffeid.RequireFromPath(td, "/web"), PublicKey: key.Public()})
			if err != nil {
				b.Fatal(err)
			}
			batch := make([]authority.PreparedX509, 100)
			for i := range batch {
				batch[i] = prepared
			}
			n := 0
			begin := time.Now()
			for b.Loop() {
				_, errs := d.set.SignX509Batch(b.Context(), batch)
				for _, err := range errs {
					if err != nil {
						b.Fatal(err)
					}
				}
				n += len(batch)
			}
			b.ReportMetric(float64(n)/time.Since(begin).Seconds(), "svids/s")
			b.ReportMetric(0, "ns/op")
		})
	}
}
