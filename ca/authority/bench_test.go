package authority

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"net/url"
	"runtime"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The benchmarks report, as "x-raw-sign", how many times the cost of one bare P-256 signature an SVID costs. Both are timed in
// turns in the same run, because absolute times on shared machines are worth little.

// turns runs f and a bare signature in turns until the benchmark is over. f makes n SVIDs.
func turns(b *testing.B, n int, f func()) {
	b.Helper()
	key := newKey(b)
	digest := sha256.Sum256([]byte("to be signed"))
	var ours, raw time.Duration
	b.ReportAllocs()
	for b.Loop() {
		start := time.Now()
		f()
		ours += time.Since(start)
		start = time.Now()
		for range n {
			if _, err := ecdsa.SignASN1(rand.Reader, key, digest[:]); err != nil {
				b.Fatal(err)
			}
		}
		raw += time.Since(start)
	}
	b.ReportMetric(float64(ours)/float64(raw), "x-raw-sign")
	b.ReportMetric(float64(ours.Nanoseconds())/float64(b.N*n), "ns/svid")
}

func benchmarkBatch(b *testing.B, n int) {
	s := openSet(b)
	public := newPublicKey(b)
	id := mustID(b, "/ns/prod/sa/web")
	batch := make([]PreparedX509, n)
	turns(b, n, func() {
		for i := range batch {
			var err error
			if batch[i], err = s.CheckX509(X509Request{ID: id, PublicKey: public}); err != nil {
				b.Fatal(err)
			}
		}
		_, errs := s.SignX509Batch(b.Context(), batch)
		for _, err := range errs {
			if err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkSignX509(b *testing.B) {
	s := openSet(b)
	public := newPublicKey(b)
	id := mustID(b, "/ns/prod/sa/web")
	turns(b, 1, func() {
		p, err := s.CheckX509(X509Request{ID: id, PublicKey: public})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := s.SignX509(b.Context(), p); err != nil {
			b.Fatal(err)
		}
	})
}

// BenchmarkSignX509Batch100OneCore spreads nothing: its ratio is CPU time.
func BenchmarkSignX509Batch100OneCore(b *testing.B) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	benchmarkBatch(b, 100)
}

func BenchmarkSignX509Batch100(b *testing.B) { benchmarkBatch(b, 100) }
func BenchmarkSignX509Batch500(b *testing.B) { benchmarkBatch(b, 500) }

// BenchmarkSignX509FromWire includes reading the public key, as the CA does for our own agents.
func BenchmarkSignX509FromWire(b *testing.B) {
	s := openSet(b)
	spki := marshalKey(b, newPublicKey(b))
	id := mustID(b, "/ns/prod/sa/web")
	turns(b, 1, func() {
		public, err := ParsePublicKey(spki)
		if err != nil {
			b.Fatal(err)
		}
		p, err := s.CheckX509(X509Request{ID: id, PublicKey: public})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := s.SignX509(b.Context(), p); err != nil {
			b.Fatal(err)
		}
	})
}

// BenchmarkSignX509FromCSR is to be compared with one signature and one verification.
func BenchmarkSignX509FromCSR(b *testing.B) {
	s := openSet(b)
	id := mustID(b, "/ns/prod/sa/web")
	csr := makeCSR(b, newKey(b), x509.CertificateRequest{URIs: []*url.URL{id.URL()}})
	turns(b, 1, func() {
		public, err := CheckCSR(csr, id)
		if err != nil {
			b.Fatal(err)
		}
		p, err := s.CheckX509(X509Request{ID: id, PublicKey: public})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := s.SignX509(b.Context(), p); err != nil {
			b.Fatal(err)
		}
	})
}

// BenchmarkRawVerify is one bare verification, for reading the one above.
func BenchmarkRawVerify(b *testing.B) {
	key := newKey(b)
	digest := sha256.Sum256([]byte("to be signed"))
	signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		b.Fatal(err)
	}
	turns(b, 1, func() {
		if !ecdsa.VerifyASN1(&key.PublicKey, digest[:], signature) {
			b.Fatal("does not verify")
		}
	})
}

func BenchmarkSignJWT(b *testing.B) {
	s := openSet(b)
	r := JWTRequest{ID: spiffeid.RequireFromString("spiffe://example.org/ns/prod/sa/web"), Audience: []string{"spiffe://example.org/db"}}
	turns(b, 1, func() {
		if _, err := s.SignJWT(b.Context(), r); err != nil {
			b.Fatal(err)
		}
	})
}
