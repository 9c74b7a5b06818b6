package sealed

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"syscall"
	"testing"
	"time"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// cpu is the processor time that this process has used, in the kernel too.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkRotation is the processor time that the sealed cache adds to each renewal of an X509-SVID, of 1,000 that are
// held, as a ratio to making a key and signing a CSR. At a TTL of an hour 33 are renewed between two writes.
func BenchmarkRotation(b *testing.B) {
	const held = 1000
	const together = int(later / (30 * time.Minute / held))
	newKey := func() []byte {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key); err != nil {
			b.Fatal(err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			b.Fatal(err)
		}
		return der
	}
	r := newRig(b, File{})
	s, _ := r.open()
	m := snapshot(1)
	for i := range held {
		id := fmt.Sprintf("entry-%d", i)
		m.Entries = append(m.Entries, &nodev1.Entry{Id: id, Revision: 1, SpiffeId: "spiffe://example.org/" + id, Selectors: []string{"unix:uid:1"}})
	}
	s.Applied(m)
	s.InContact(true)
	chain := make([]byte, 700)
	for i := range held {
		rand.Read(chain)
		s.Hold(fmt.Sprintf("entry-%d", i), 1, true, chain, newKey())
	}
	r.write(s)
	var keys, cache time.Duration
	n := 0
	for b.Loop() {
		began := cpu(b)
		made := make([][]byte, together)
		for i := range made {
			made[i] = newKey()
		}
		between := cpu(b)
		for _, key := range made {
			s.Hold(fmt.Sprintf("entry-%d", n%held), int64(n), true, chain, key)
			n++
		}
		r.write(s)
		keys, cache = keys+between-began, cache+cpu(b)-between
	}
	b.ReportMetric(float64(cache.Microseconds())/float64(n), "µs-cache/svid")
	b.ReportMetric(float64(keys.Microseconds())/float64(n), "µs-key/svid")
	b.ReportMetric(float64(cache+keys)/float64(keys), "ratio")
}
