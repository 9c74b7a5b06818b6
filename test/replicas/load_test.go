package replicas

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/signet-id/signet/test/etcdtest"
)

// cpu is the processor time that a replica has used.
func cpu(t *testing.T, r *replica) time.Duration {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", r.PID()))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+2:]))
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return time.Duration(user+system) * 10 * time.Millisecond // of USER_HZ, which is 100
}

// TestLoadIsSplit measures two replicas on etcd beside one CA with a file: signing, which each does by itself, and commits. It asserts that
// both took their share; figures are for docs/performance.md. SIGNET_REPLICAS_LOAD says how many SVIDs are minted.
func TestLoadIsSplit(t *testing.T) {
	n := 400
	if text := os.Getenv("SIGNET_REPLICAS_LOAD"); text != "" {
		var err error
		if n, err = strconv.Atoi(text); err != nil || n < 100 {
			t.Fatalf("SIGNET_REPLICAS_LOAD=%s is not a number of at least 100", text)
		}
	}
	one := newFleet(t, nil, 1, "")
	single := load(t, one, n)
	two := newFleet(t, etcdtest.Start(t, etcdtest.Config{}), 2, "")
	double := load(t, two, n)
	t.Logf("one CA with a file: %v", single)
	t.Logf("two replicas on one member of etcd: %v", double)
	for i, used := range double.cpu {
		if share := float64(used) / float64(double.cpu[0]+double.cpu[1]); share < 0.25 {
			t.Errorf("replica %d took %.0f %% of the work", i, 100*share)
		}
	}
}

type loadResult struct {
	mints   time.Duration   // wall clock for all
	cpu     []time.Duration // of each replica, for the mints
	entries time.Duration   // wall clock for as many entries, in commits of ten
	n       int
}

func (l loadResult) String() string {
	return fmt.Sprintf("%d X509-SVIDs in %v, processor time of the replicas %v; %d entries in commits of ten in %v", l.n, l.mints.Round(time.Millisecond), l.cpu, l.n, l.entries.Round(time.Millisecond))
}

func load(t *testing.T, f *fleet, n int) loadResult {
	t.Helper()
	csr := csrFor(t, "spiffe://example.org/load")
	out := loadResult{n: n}
	var before []time.Duration
	for _, r := range f.Replicas {
		before = append(before, cpu(t, r))
	}
	began := time.Now()
	share(t, f, n, func(ctx context.Context, r *replica, _ int64) error {
		_, err := svidv1.NewSVIDClient(r.Conn).MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr})
		return err
	})
	out.mints = time.Since(began)
	for i, r := range f.Replicas {
		out.cpu = append(out.cpu, cpu(t, r)-before[i])
	}
	began = time.Now()
	share(t, f, n/10, func(ctx context.Context, r *replica, i int64) error {
		var batch []*types.Entry
		for j := range 10 {
			batch = append(batch, &types.Entry{SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: fmt.Sprintf("/load/%d", i)}, ParentId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/nowhere"},
				Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", 1000+i*10+int64(j))}}})
		}
		_, err := entryv1.NewEntryClient(r.Conn).BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: batch})
		return err
	})
	out.entries = time.Since(began)
	return out
}

// share makes n calls, sixteen at a time, at the replicas in turn.
func share(t *testing.T, f *fleet, n int, call func(context.Context, *replica, int64) error) {
	t.Helper()
	var wg sync.WaitGroup
	var next atomic.Int64
	for range 16 {
		wg.Go(func() {
			for i := next.Add(1); i <= int64(n); i = next.Add(1) {
				if err := call(t.Context(), f.Replicas[int(i)%len(f.Replicas)], i); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// csrFor makes a certificate request for a SPIFFE ID.
func csrFor(t *testing.T, id string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{u}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}
