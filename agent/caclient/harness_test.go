package caclient

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/goleak"

	"github.com/signet-id/signet/agent/internal/faultca"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A follower remembers what was applied.
type follower struct {
	mu       sync.Mutex
	epoch    string
	revision int64
	position *nodev1.Position
	applied  []*nodev1.FollowResponse
	refuse   error
	news     chan *nodev1.FollowResponse
}

func newFollower() *follower { return &follower{news: make(chan *nodev1.FollowResponse, 100)} }

func (f *follower) Held() (string, int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.epoch, f.revision
}

func (f *follower) Position() *nodev1.Position {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.position
}

func (f *follower) Apply(m *nodev1.FollowResponse) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.refuse != nil {
		err := f.refuse
		f.refuse = nil
		return err
	}
	f.epoch, f.revision = m.GetEpoch(), m.GetTo()
	if m.Position != nil {
		f.position = m.Position
	}
	f.applied = append(f.applied, m)
	f.news <- m
	return nil
}

func agentSVID(t testing.TB, ca *faultca.CA) *x509svid.SVID {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca.Lock()
	der, err := ca.Sign(faultca.AgentPath, key.Public(), time.Hour)
	ca.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &x509svid.SVID{ID: spiffeid.RequireFromPath(ca.TrustDomain, faultca.AgentPath), Certificates: []*x509.Certificate{cert}, PrivateKey: key}
}

// A running client with what it needs.
type fixture struct {
	t      *testing.T
	ca     *faultca.CA
	f      *follower
	client *Client
	synced chan struct{}
	lost   chan struct{}
	ended  chan error
	stop   context.CancelFunc

	mu   sync.Mutex
	svid *x509svid.SVID
}

func run(t *testing.T, ca *faultca.CA) *fixture {
	t.Helper()
	return runPolling(t, ca, 100*time.Millisecond)
}

// runPolling says how often a SPIRE server is asked.
func runPolling(t *testing.T, ca *faultca.CA, every time.Duration) *fixture {
	t.Helper()
	x := &fixture{t: t, ca: ca, f: newFollower(), svid: agentSVID(t, ca), synced: make(chan struct{}, 100), lost: make(chan struct{}, 100), ended: make(chan error, 1)}
	client, err := New(Config{
		Address: ca.Addr, TrustDomain: ca.TrustDomain, Follower: x.f, Log: slog.New(slog.DiscardHandler), PollEvery: every,
		Bundles: x509bundle.FromX509Authorities(ca.TrustDomain, []*x509.Certificate{ca.Root}),
		InSync:  func() { x.synced <- struct{}{} },
		Lost:    func() { x.lost <- struct{}{} },
		Identity: func() *x509svid.SVID {
			x.mu.Lock()
			defer x.mu.Unlock()
			return x.svid
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	x.client = client
	ctx, cancel := context.WithCancel(context.Background())
	x.stop = cancel
	go func() { x.ended <- client.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case <-x.ended:
		case <-time.After(10 * time.Second):
			t.Error("Run does not end with its context")
		}
	})
	return x
}

func wait[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(20 * time.Second):
		t.Fatalf("%s did not come", what)
	}
	panic("unreachable")
}
