package source

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/api/signet/policy/v1/policyapi"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/spiffe"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// An agent serves signet.policy.v1 on a socket that can go and come back.
type agent struct {
	policyapi.UnimplementedPoliciesServer
	addr string

	mu      sync.Mutex
	now     *policyapi.WatchResponse // nil: nothing yet
	change  chan struct{}            // closed when now changes
	refuse  error
	calls   int
	reports reported
	header  []string
	server  *grpc.Server
	done    chan struct{}
}

func newAgent(t *testing.T) *agent {
	a := &agent{addr: "unix://" + filepath.Join(t.TempDir(), "agent.sock"), change: make(chan struct{})}
	a.start(t)
	t.Cleanup(a.stop)
	return a
}

func (a *agent) start(t *testing.T) {
	t.Helper()
	l, err := net.Listen("unix", strings.TrimPrefix(a.addr, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	server, done := grpc.NewServer(), make(chan struct{})
	policyapi.RegisterPoliciesServer(server, a)
	a.mu.Lock()
	a.server, a.done = server, done
	a.mu.Unlock()
	go func() { defer close(done); server.Serve(l) }()
}

func (a *agent) stop() {
	a.server.Stop()
	<-a.done
}

func (a *agent) Watch(r *policyapi.WatchRequest, s policyapi.Policies_WatchServer) error {
	md, _ := metadata.FromIncomingContext(s.Context())
	a.mu.Lock()
	a.calls++
	a.header = md["workload.spiffe.io"]
	refuse := a.refuse
	a.mu.Unlock()
	if refuse != nil {
		return refuse
	}
	for {
		a.mu.Lock()
		now, change := a.now, a.change
		a.mu.Unlock()
		if now != nil {
			if err := s.Send(now); err != nil {
				return err
			}
		}
		select {
		case <-s.Context().Done():
			return status.FromContextError(s.Context().Err()).Err()
		case <-change:
		}
	}
}

func response(revision int64) *policyapi.WatchResponse {
	return &policyapi.WatchResponse{ServiceIds: []string{"spiffe://example.org/docs", "spiffe://example.org/second"}, Policies: &policyv1.PolicySet{
		Format: policy.Format, TrustDomain: "example.org", Revision: revision, Defaults: policyv1.DefaultsMode_DEFAULTS_MODE_SHADOW,
	}}
}

// send makes r what every stream gets, now and when it begins.
func (a *agent) send(r *policyapi.WatchResponse) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.now = r
	close(a.change)
	a.change = make(chan struct{})
}

// clock is a settable time.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func revision(s *Source) int64 {
	_, r := s.Policies().Revision()
	return r
}

// decided says why a call to the service is let through or denied.
func decided(t *testing.T, s *Source) policy.Reason {
	t.Helper()
	web, err := spiffe.ParseWorkloadID("spiffe://example.org/web")
	if err != nil {
		t.Fatal(err)
	}
	return s.Policies().Decide(&policy.Request{Service: s.ServiceID(), Peer: web}).Reason
}

func newSource(t *testing.T, a *agent, c *clock) *Source {
	t.Helper()
	a.send(response(1))
	o := Options{Addr: a.addr, Log: slog.New(slog.DiscardHandler)}
	if c != nil {
		o.Now = c.Now
	}
	s, err := New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	<-s.Updated()
	return s
}

func TestNewWaitsForTheFirstSet(t *testing.T) {
	a := newAgent(t)
	s := newSource(t, a, nil)
	if revision(s) != 1 || s.ServiceID().Path() != "/docs" || len(s.ServiceIDs()) != 2 {
		t.Errorf("revision %d, services %v", revision(s), s.ServiceIDs())
	}
	if len(a.header) != 1 || a.header[0] != "true" {
		t.Errorf("security header %q", a.header)
	}
	a.send(response(2))
	<-s.Updated()
	if revision(s) != 2 {
		t.Errorf("revision %d after an update to 2", revision(s))
	}
}

func TestNewFromTheEnvironment(t *testing.T) {
	a := newAgent(t)
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", a.addr)
	a.send(response(3))
	s, err := New(t.Context(), Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil || revision(s) != 3 {
		t.Errorf("revision %d, %v", revision(s), err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("closed twice: %v", err)
	}
}

func TestNewSaysWhatWentWrong(t *testing.T) {
	a := newAgent(t)
	a.refuse = status.Error(codes.PermissionDenied, "no identity issued")
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err := New(ctx, Options{Addr: a.addr, Log: slog.New(slog.DiscardHandler)})
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no identity issued") {
		t.Errorf("got %v", err)
	}
	for _, o := range []Options{{Addr: "agent.sock"}, {Addr: a.addr, MaxOffline: -1}} {
		if _, err := New(t.Context(), o); err == nil {
			t.Errorf("New(%+v) succeeded", o)
		}
	}
}

func TestNewerFormat(t *testing.T) {
	a := newAgent(t)
	newer := response(9)
	newer.Policies.Format = policy.Format + 1
	a.send(newer)
	if _, err := New(t.Context(), Options{Addr: a.addr, Log: slog.New(slog.DiscardHandler)}); !errors.Is(err, policy.ErrFormat) {
		t.Fatalf("a first set of a newer format: %v", err)
	}

	refused := make(refusals, 8)
	a.send(response(1))
	s, err := New(t.Context(), Options{Addr: a.addr, Log: slog.New(refused)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	<-s.Updated()
	a.send(newer)
	<-refused
	if revision(s) != 1 || decided(t, s) != policy.ReasonDefaultShadow {
		t.Errorf("revision %d, want the last good one kept", revision(s))
	}
	a.send(response(2))
	<-s.Updated()
	if revision(s) != 2 {
		t.Errorf("revision %d, want the next set that can be read", revision(s))
	}
}

// What was taken back on the CA must not hold for ever where the new policies cannot be read.
func TestRefusedPoliciesDoNotKeepTheOldOnesForEver(t *testing.T) {
	a := newAgent(t)
	c := &clock{now: time.Now()}
	refused := make(refusals, 8)
	a.send(response(1))
	s, err := New(t.Context(), Options{Addr: a.addr, Log: slog.New(refused), Now: c.Now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	<-s.Updated()
	newer := response(2)
	newer.Policies.Format = policy.Format + 1
	for range 2 { // the second refusal must not begin the time anew
		a.send(newer)
		<-refused
		await(t, "the refusal", func() bool { return !s.current.Load().refused.IsZero() })
		if r := decided(t, s); r != policy.ReasonDefaultShadow {
			t.Errorf("within MaxOffline: %v", r)
		}
		c.advance(DefaultMaxOffline / 2)
	}
	c.advance(time.Second)
	if r := decided(t, s); r != policy.ReasonStalePolicy {
		t.Errorf("policies that were replaced longer than MaxOffline ago: %v", r)
	}
	a.send(response(3))
	<-s.Updated()
	if r := decided(t, s); r != policy.ReasonDefaultShadow {
		t.Errorf("readable ones again: %v", r)
	}
}

// refusals is told of each error in the log.
type refusals chan struct{}

func (r refusals) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelError }
func (r refusals) Handle(context.Context, slog.Record) error    { r <- struct{}{}; return nil }
func (r refusals) WithAttrs([]slog.Attr) slog.Handler           { return r }
func (r refusals) WithGroup(string) slog.Handler                { return r }

func TestKeepsTheLastPoliciesAndDeniesPastMaxOffline(t *testing.T) {
	a := newAgent(t)
	c := &clock{now: time.Now()}
	s := newSource(t, a, c)
	c.advance(48 * time.Hour)
	if r := decided(t, s); r != policy.ReasonDefaultShadow {
		t.Errorf("idle but in contact for two days: %v", r)
	}
	a.stop()
	waitLost(t, s)
	c.advance(DefaultMaxOffline)
	if r := decided(t, s); r != policy.ReasonDefaultShadow || revision(s) != 1 {
		t.Errorf("offline for MaxOffline: %v, revision %d", r, revision(s))
	}
	c.advance(time.Second)
	if r := decided(t, s); r != policy.ReasonStalePolicy {
		t.Errorf("offline for longer: %v", r)
	}
	a.send(response(2))
	a.start(t)
	<-s.Updated()
	if r := decided(t, s); r != policy.ReasonDefaultShadow || revision(s) != 2 {
		t.Errorf("back again: %v, revision %d", r, revision(s))
	}
}

func TestDeniesWhenTheAgentIsWithoutItsCAPastMaxOffline(t *testing.T) {
	a := newAgent(t)
	c := &clock{now: time.Now()}
	s := newSource(t, a, c)
	lost := c.Now()
	offline := func(revision int64) *policyapi.WatchResponse {
		r := response(revision)
		r.OfflineSince = lost.Unix()
		return r
	}
	want := func(when string, want policy.Reason) {
		t.Helper()
		if r := decided(t, s); r != want {
			t.Errorf("%s: %v, want %v", when, r, want)
		}
	}
	a.send(offline(1))
	<-s.Updated()
	want("the CA just lost", policy.ReasonDefaultShadow)
	c.advance(DefaultMaxOffline - time.Second)
	want("a second before the limit", policy.ReasonDefaultShadow)
	c.advance(3 * time.Second)
	want("past the limit", policy.ReasonStalePolicy)

	// The agent that goes away meanwhile does not start the time anew, nor does one that comes back without its CA.
	a.stop()
	waitLost(t, s)
	want("past the limit and without the agent", policy.ReasonStalePolicy)
	c.advance(-2 * DefaultMaxOffline) // a clock that is put back does no harm but for its own
	want("before the loss", policy.ReasonDefaultShadow)
	c.advance(2 * DefaultMaxOffline)
	a.start(t)
	<-s.Updated()
	want("with the agent and without its CA", policy.ReasonStalePolicy)

	// A set that cannot be read still says that the CA is back.
	unreadable := response(2)
	unreadable.Policies.Format = policy.Format + 1
	a.send(unreadable)
	await(t, "the return of the CA", func() bool { return s.current.Load().offline.IsZero() })
	want("the CA is back with a newer format", policy.ReasonDefaultShadow)
	for _, since := range []int64{-1, 1} {
		r := response(3)
		r.OfflineSince = since
		a.send(r)
		<-s.Updated()
		want("an agent that was never in contact", policy.ReasonStalePolicy)
	}
	a.send(response(4))
	<-s.Updated()
	want("contact", policy.ReasonDefaultShadow)
}

// waitLost waits until the source has noticed the loss of its agent.
func waitLost(t *testing.T, s *Source) {
	t.Helper()
	await(t, "the loss of the agent", func() bool { return !s.current.Load().lost.IsZero() })
}

// await waits until something is noticed that is not reported.
func await(t *testing.T, what string, noticed func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !noticed() {
		select {
		case <-deadline:
			t.Fatal(what + " goes unnoticed")
		case <-tick.C:
		}
	}
}
