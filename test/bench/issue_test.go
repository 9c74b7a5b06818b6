// Package bench measures the CA from outside: a CA in a process of its own, an agent's connection over mTLS, and the
// CPU time that the CA's process used, as a multiple of one P-256 signature made in the same run.
package bench

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/test/spireclient"
)

const caDir = "SIGNET_BENCH_CA_DIR"

// TestMain is also the CA's process: the benchmark starts its own binary again.
func TestMain(m *testing.M) {
	dir := os.Getenv(caDir)
	if dir == "" {
		os.Exit(m.Run())
	}
	off := ca.Limit{Rate: ca.Unlimited} // what is measured is more than anybody needs
	c, err := ca.New(context.Background(), ca.Config{Limits: ca.Limits{X509SVIDs: off, JWTSVIDs: off},
		TrustDomain: "example.org", Listen: "127.0.0.1:0", DataDir: dir, AdminSocket: ca.AdminSocket{Path: filepath.Join(dir, "admin", "ca.sock")},
		Seal: ca.Seal{KeyFile: filepath.Join(dir, "seal.key"), Create: true}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if pf := os.Getenv("CA_PROF"); pf != "" {
		f, _ := os.Create(pf)
		pprof.StartCPUProfile(f)
		defer f.Close()
		defer pprof.StopCPUProfile()
	}
	fmt.Println(c.Addr())
	ctx, cancel := context.WithCancel(context.Background())
	go func() { // ends with its parent
		os.Stdin.Read(make([]byte, 1))
		cancel()
	}()
	if err := c.Run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// A target is a CA process and an attested agent's connection to it.
type target struct {
	pid   int
	admin *grpc.ClientConn
	agent *grpc.ClientConn
}

func startCA(b *testing.B) *target {
	b.Helper()
	dir, err := os.MkdirTemp("", "signet")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), caDir+"="+dir)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { in.Close(); cmd.Wait() })
	addr, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	t := &target{pid: cmd.Process.Pid}
	if t.admin, err = grpc.NewClient("unix://"+filepath.Join(dir, "admin", "ca.sock"), grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { t.admin.Close() })
	t.attest(b, strings.TrimSpace(addr))
	return t
}

func (t *target) attest(b *testing.B, addr string) {
	dial := func(certs ...tls.Certificate) *grpc.ClientConn {
		// The benchmark measures; who the server is, is checked in the CA's tests.
		conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, Certificates: certs})),
			grpc.WithContextDialer(func(ctx context.Context, a string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "tcp", a)
			}))
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { conn.Close() })
		return conn
	}
	tok, err := adminv1.NewAdminClient(t.admin).CreateJoinToken(b.Context(), &adminv1.CreateJoinTokenRequest{})
	if err != nil {
		b.Fatal(err)
	}
	key := newKey(b)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		b.Fatal(err)
	}
	s, err := agentv1.NewAgentClient(dial()).AttestAgent(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	if err := s.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &types.AttestationData{Type: "join_token", Payload: []byte(tok.Token)}, Params: &agentv1.AgentX509SVIDParams{Csr: csr}}}}); err != nil {
		b.Fatal(err)
	}
	r, err := s.Recv()
	if err != nil {
		b.Fatal(err)
	}
	t.agent = dial(tls.Certificate{Certificate: r.GetResult().Svid.CertChain, PrivateKey: key})
}

func newKey(b *testing.B) *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	return k
}

func (t *target) entries(b *testing.B, n int) []string {
	b.Helper()
	var ids []string
	for i := range n {
		ids = append(ids, fmt.Sprintf("identity.e%d", i))
	}
	for from := 0; from < n; from += 100 {
		var docs strings.Builder
		for i := from; i < min(n, from+100); i++ {
			fmt.Fprintf(&docs, "---\nkind: Identity\nname: e%d\nspiffeID: /ns/default/sa/e%d\nmatch: [\"unix:uid:%d\"]\n", i, i, i)
		}
		if _, err := adminv1.NewAdminClient(t.admin).Apply(b.Context(), &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(docs.String()), File: "b.yaml"}}}); err != nil {
			b.Fatal(err)
		}
	}
	return ids
}

// cpu returns the CPU time that a process has used.
func cpu(b *testing.B, pid int) time.Duration {
	b.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	user, _ := strconv.ParseInt(f[11], 10, 64)
	system, _ := strconv.ParseInt(f[12], 10, 64)
	const ticks = 100 // USER_HZ, which is 100 on every Linux
	return time.Duration(user+system) * time.Second / ticks
}

// threadCPU returns the CPU time of the calling thread.
func threadCPU(b *testing.B) time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts); err != nil {
		b.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

// signature measures the CPU time of one P-256 signature.
func signature(b *testing.B) time.Duration {
	k := newKey(b)
	h := sha256.Sum256([]byte("x"))
	const n = 2000
	start := threadCPU(b)
	for range n {
		if _, err := k.Sign(rand.Reader, h[:], crypto.SHA256); err != nil {
			b.Fatal(err)
		}
	}
	return (threadCPU(b) - start) / n
}

// BenchmarkX509SVID reports the CA's CPU time per SVID as a multiple of one signature, and SVIDs a second end to end.
func BenchmarkX509SVID(b *testing.B) {
	for _, size := range []int{1, 10, 100, 500} {
		b.Run(fmt.Sprintf("batch=%d", size), func(b *testing.B) {
			t := startCA(b)
			ids := t.entries(b, size)
			spki, err := x509.MarshalPKIXPublicKey(newKey(b).Public())
			if err != nil {
				b.Fatal(err)
			}
			req := &nodev1.IssueX509SVIDsRequest{}
			for _, id := range ids {
				req.Items = append(req.Items, &nodev1.IssueX509SVIDsRequest_Item{EntryId: id, PublicKey: spki})
			}
			call := func() error {
				r, err := nodev1.NewNodeClient(t.agent).IssueX509SVIDs(b.Context(), req)
				if err == nil && r.Results[size-1].Code != 0 {
					err = fmt.Errorf("%s", r.Results[size-1].Message)
				}
				return err
			}
			if err := call(); err != nil {
				b.Fatal(err)
			}
			sig := signature(b)
			before := cpu(b, t.pid)
			n := 0
			for b.Loop() {
				if err := call(); err != nil {
					b.Fatal(err)
				}
				n++
			}
			used := cpu(b, t.pid) - before
			sig = (sig + signature(b)) / 2
			b.ReportMetric(float64(used)/float64(n*size)/float64(sig), "signatures/SVID")
			b.ReportMetric(float64(n*size)/b.Elapsed().Seconds(), "SVIDs/s")
			b.ReportMetric(float64(used)/float64(b.Elapsed()), "cores")
		})
	}
}

// fromCSR measures the CPU time of what nobody can do without who signs from a CSR: reading one, verifying it, and one
// signature, each by Go's standard library.
func fromCSR(b *testing.B, der []byte) time.Duration {
	k := newKey(b)
	h := sha256.Sum256([]byte("x"))
	const n = 1000
	start := threadCPU(b)
	for range n {
		csr, err := x509.ParseCertificateRequest(der)
		if err == nil {
			err = csr.CheckSignature()
		}
		if err == nil {
			_, err = k.Sign(rand.Reader, h[:], crypto.SHA256)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	return (threadCPU(b) - start) / n
}

// BenchmarkBatchNewX509SVID reports the CA's CPU time per X509-SVID by SPIRE's RPC as a multiple of reading and verifying
// one CSR and one signature, and SVIDs a second end to end: one caller at a time, and as many as a busy CA has.
func BenchmarkBatchNewX509SVID(b *testing.B) {
	for _, bench := range []struct{ size, callers int }{{1, 1}, {1, 16}, {10, 1}, {100, 1}, {500, 1}} {
		b.Run(fmt.Sprintf("batch=%d/callers=%d", bench.size, bench.callers), func(b *testing.B) {
			t := startCA(b)
			req := &svidv1.BatchNewX509SVIDRequest{}
			for i, id := range t.entries(b, bench.size) {
				csr, err := spireclient.CSR(newKey(b), fmt.Sprint("spiffe://example.org/ns/default/sa/e", i))
				if err != nil {
					b.Fatal(err)
				}
				req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: id, Csr: csr})
			}
			call := func() error {
				r, err := svidv1.NewSVIDClient(t.agent).BatchNewX509SVID(b.Context(), req)
				if err == nil && r.Results[bench.size-1].Status.Code != 0 {
					err = fmt.Errorf("%s", r.Results[bench.size-1].Status.Message)
				}
				return err
			}
			if err := call(); err != nil {
				b.Fatal(err)
			}
			unit := fromCSR(b, req.Params[0].Csr)
			before := cpu(b, t.pid)
			n := 0
			for b.Loop() {
				var wg sync.WaitGroup
				for range bench.callers {
					wg.Go(func() {
						for range 10 {
							if err := call(); err != nil {
								b.Error(err)
							}
						}
					})
				}
				wg.Wait()
				n += 10 * bench.callers * bench.size
			}
			used := cpu(b, t.pid) - before
			unit = (unit + fromCSR(b, req.Params[0].Csr)) / 2
			b.ReportMetric(float64(used)/float64(n)/float64(unit), "CSRs/SVID")
			b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "SVIDs/s")
			b.ReportMetric(float64(used)/float64(b.Elapsed()), "cores")
			b.ReportMetric(float64(unit.Microseconds()), "µs/CSR")
		})
	}
}

// BenchmarkJWTSVID reports the CA's CPU time per JWT-SVID as a multiple of one ES256 signature: by SPIRE's RPC, one a
// call, and by signet's, in which agents gather what is asked for at one time.
func BenchmarkJWTSVID(b *testing.B) {
	measure := func(b *testing.B, size int, call func(t *target, id string) error) {
		t := startCA(b)
		id := t.entries(b, 1)[0]
		sig := signature(b)
		before := cpu(b, t.pid)
		n := 0
		for b.Loop() {
			if err := call(t, id); err != nil {
				b.Fatal(err)
			}
			n += size
		}
		used := cpu(b, t.pid) - before
		sig = (sig + signature(b)) / 2
		b.ReportMetric(float64(used)/float64(n)/float64(sig), "signatures/SVID")
		b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "SVIDs/s")
	}
	b.Run("NewJWTSVID", func(b *testing.B) {
		measure(b, 1, func(t *target, id string) error {
			_, err := svidv1.NewSVIDClient(t.agent).NewJWTSVID(b.Context(), &svidv1.NewJWTSVIDRequest{EntryId: id, Audience: []string{"db"}})
			return err
		})
	})
	for _, size := range []int{1, 10, 100} {
		b.Run(fmt.Sprintf("IssueJWTSVIDs/batch=%d", size), func(b *testing.B) {
			measure(b, size, func(t *target, id string) error {
				req := &nodev1.IssueJWTSVIDsRequest{}
				for range size {
					req.Items = append(req.Items, &nodev1.IssueJWTSVIDsRequest_Item{EntryId: id, Audience: []string{"db"}})
				}
				r, err := nodev1.NewNodeClient(t.agent).IssueJWTSVIDs(b.Context(), req)
				if err == nil && r.Results[size-1].Code != 0 {
					err = fmt.Errorf("%s", r.Results[size-1].Message)
				}
				return err
			})
		})
	}
}

// BenchmarkCreateEntries reports entries created a second below one parent, in batches of 50 from 8 clients, and how
// the rate at the end compares with the rate at the beginning.
func BenchmarkCreateEntries(b *testing.B) {
	t := startCA(b)
	const clients, batch = 8, 50
	n := 0
	create := func(rounds int) time.Duration {
		start := time.Now()
		var wg sync.WaitGroup
		for c := range clients {
			base := n + c*rounds*batch
			wg.Go(func() {
				for r := range rounds {
					req := &entryv1.BatchCreateEntryRequest{}
					for i := range batch {
						req.Entries = append(req.Entries, &types.Entry{SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: fmt.Sprintf("/w/%d", base+r*batch+i)},
							ParentId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/node"}, Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}}})
					}
					resp, err := entryv1.NewEntryClient(t.admin).BatchCreateEntry(b.Context(), req)
					if err != nil || resp.Results[batch-1].Status.Code != 0 {
						b.Error(err, resp)
						return
					}
				}
			})
		}
		wg.Wait()
		n += clients * rounds * batch
		return time.Since(start)
	}
	first := create(5)
	for b.Loop() {
		create(5)
	}
	last := create(5)
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "entries/s")
	b.ReportMetric(float64(last)/float64(first), "last/first")
	b.ReportMetric(float64(n), "entries")
}
