package brokerclient_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/signet-id/signet/workloadapi/broker/brokerclient"
	"github.com/signet-id/signet/workloadapi/broker/internal/brokertest"
)

func TestMain(m *testing.M) {
	if os.Getenv(brokertest.ChildEnv) != "" {
		os.Exit(brokertest.Child())
	}
	goleak.VerifyTestMain(m)
}

// An svidSource is a broker's own SVID, which tests renew.
type svidSource struct{ svid atomic.Pointer[x509svid.SVID] }

func (s *svidSource) GetX509SVID() (*x509svid.SVID, error) {
	if svid := s.svid.Load(); svid != nil {
		return svid, nil
	}
	return nil, errors.New("none")
}

func newSVIDSource(svid *x509svid.SVID) *svidSource {
	s := &svidSource{}
	s.svid.Store(svid)
	return s
}

// newClient is one with short pauses and no jitter.
func newClient(t testing.TB, a *brokertest.Authority, addr string, change ...func(*brokerclient.Config)) *brokerclient.Client {
	t.Helper()
	cfg := brokerclient.Config{
		Addr: addr, SVID: newSVIDSource(a.SVID(t, brokertest.BrokerPath, time.Hour)), Bundles: a.Bundle(),
		Server:   brokerclient.ServerID(spiffeid.RequireFromPath(a.TD, brokertest.ServerPath)),
		RetryMin: 10 * time.Millisecond, RetryMax: 50 * time.Millisecond, Jitter: -1,
	}
	for _, f := range change {
		f(&cfg)
	}
	c, err := brokerclient.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func limited(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// A keeper tells what it is told.
type keeper[T any] struct {
	brokerclient.Keeper[T]
	events chan string // "take" or "drop"
}

func watched[T any](k brokerclient.Keeper[T]) *keeper[T] {
	return &keeper[T]{k, make(chan string, 1000)}
}

func (k *keeper[T]) Take(x T) error {
	err := k.Keeper.Take(x)
	k.events <- "take"
	return err
}

func (k *keeper[T]) Drop() {
	k.Keeper.Drop()
	k.events <- "drop"
}

func (k *keeper[T]) want(t testing.TB, event string) {
	t.Helper()
	select {
	case got := <-k.events:
		if got != event {
			t.Fatalf("the keeper was told to %s, want %s", got, event)
		}
	case <-time.After(20 * time.Second):
		t.Fatalf("the keeper was not told to %s", event)
	}
}

// follow keeps the SVIDs of a reference until it ends; the channel says why.
func follow(t testing.TB, c *brokerclient.Client, r brokerclient.Reference, keep brokerclient.Keeper[brokerclient.X509]) (*keeper[brokerclient.X509], <-chan error) {
	t.Helper()
	k, done := watched(keep), make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		done <- c.FollowX509SVIDs(ctx, r, k)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return k, done
}

func why(t testing.TB, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(20 * time.Second):
		t.Fatal("the call does not end")
		return nil
	}
}

func selector(w *brokertest.Workload) string { return "test:pid:" + itoa(w.PID) }

func itoa(n int32) string {
	if n < 10 {
		return string(rune('0' + n))
	}
	return itoa(n/10) + string(rune('0'+n%10))
}

// twoWorkloads has an endpoint and two processes, /a and /b; /b federates with partner.example.
func twoWorkloads(t testing.TB) (*brokertest.Authority, *brokertest.Source, *brokertest.Endpoint, [2]*brokertest.Workload) {
	t.Helper()
	a, partner := brokertest.NewAuthority(t, "example.org"), brokertest.NewAuthority(t, "partner.example")
	w := [2]*brokertest.Workload{brokertest.Start(t), brokertest.Start(t)}
	second := a.Identity(t, "/b")
	second.FederatesWith = []spiffeid.TrustDomain{partner.TD}
	src := brokertest.NewSource(a, brokertest.Entry{Selector: selector(w[0]), Identity: a.Identity(t, "/a")}, brokertest.Entry{Selector: selector(w[1]), Identity: second})
	src.Bundles[partner.TD] = partner
	return a, src, brokertest.Serve(t, src), w
}

type countingSource struct {
	*svidSource
	asked chan struct{}
}

func (s *countingSource) GetX509SVID() (*x509svid.SVID, error) {
	s.asked <- struct{}{}
	return s.svidSource.GetX509SVID()
}

type toChannel[T any] chan T

func (c toChannel[T]) Take(x T) error {
	c <- x
	return nil
}

func (toChannel[T]) Drop() {}

// A script is a server whose answers tests choose, with real TLS.
type script struct {
	brokerpb.UnimplementedAPIServer
	addr string

	mu     sync.Mutex
	calls  int
	serial []string // of the callers' SVIDs
	header []string
	stream func(n int, ss grpc.ServerStreamingServer[brokerpb.SubscribeToX509SVIDResponse]) error
	jwt    func(n int) (*brokerpb.FetchJWTSVIDResponse, error)
}

func newScript(t testing.TB, a *brokertest.Authority) *script {
	t.Helper()
	s := &script{addr: filepath.Join(t.TempDir(), "s.sock")}
	l, err := net.Listen("unix", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	svid := a.SVID(t, brokertest.ServerPath, time.Hour)
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{ClientAuth: tls.RequireAnyClientCert, SessionTicketsDisabled: true,
		Certificates: []tls.Certificate{{Certificate: [][]byte{svid.Certificates[0].Raw}, PrivateKey: svid.PrivateKey}}})))
	brokerpb.RegisterAPIServer(server, s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(l)
	}()
	t.Cleanup(func() {
		server.Stop()
		<-done
	})
	return s
}

func (s *script) note(ctx context.Context) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
	md, _ := metadata.FromIncomingContext(ctx)
	s.header = append(s.header, strings.Join(md.Get("broker.spiffe.io"), ","))
	s.serial = append(s.serial, serialOf(ctx))
	return s.calls
}

func (s *script) SubscribeToX509SVID(_ *brokerpb.SubscribeToX509SVIDRequest, ss grpc.ServerStreamingServer[brokerpb.SubscribeToX509SVIDResponse]) error {
	return s.stream(s.note(ss.Context()), ss)
}

func (s *script) FetchJWTSVID(ctx context.Context, _ *brokerpb.FetchJWTSVIDRequest) (*brokerpb.FetchJWTSVIDResponse, error) {
	return s.jwt(s.note(ctx))
}

func (s *script) seen() (calls int, serials, headers []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls, slices.Clone(s.serial), slices.Clone(s.header)
}

// message is one for an identity, as the server would send it.
func message(t testing.TB, a *brokertest.Authority, path string, federated map[string][]byte) *brokerpb.SubscribeToX509SVIDResponse {
	t.Helper()
	i := a.Identity(t, path)
	return &brokerpb.SubscribeToX509SVIDResponse{FederatedBundles: federated,
		Svids: []*brokerpb.X509SVID{{SpiffeId: i.ID.String(), X509Svid: i.Chain, X509SvidKey: i.Key, Bundle: a.Root.Raw}}}
}

func serialOf(ctx context.Context) string {
	p, _ := peer.FromContext(ctx)
	return p.AuthInfo.(credentials.TLSInfo).State.PeerCertificates[0].SerialNumber.String()
}
