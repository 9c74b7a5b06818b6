package live

import (
	"crypto/x509"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/internal/testca"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const documents = `
kind: CallPolicy
name: db
service: /db
allow:
  - from: [/web, /app/*]
  - from: [/http]
    http: [{methods: [GET], paths: [/read]}]
`

var (
	td = spiffeid.RequireTrustDomainFromString("example.org")
	db = spiffeid.RequireFromPath(td, "/db")
)

// policies is a source that changes.
type policies struct {
	current atomic.Pointer[policy.Policies]
	mu      sync.Mutex
	readers map[chan struct{}]struct{}
}

func newPolicies(t testing.TB) *policies {
	p := &policies{readers: make(map[chan struct{}]struct{})}
	p.current.Store(testca.Policies(t, documents))
	return p
}

func (p *policies) Policies() *policy.Policies { return p.current.Load() }

func (p *policies) Subscribe() (<-chan struct{}, func()) {
	c := make(chan struct{}, 1)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.readers[c] = struct{}{}
	return c, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.readers, c)
	}
}

func (p *policies) set(n *policy.Policies) {
	p.current.Store(n)
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.readers {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// revoke adds revocations of IDs to the policies.
func (p *policies) revoke(patterns ...string) {
	set := &policyv1.RevocationSet{}
	for _, id := range patterns {
		set.Revocations = append(set.Revocations, &policyv1.Revocation{Name: "r-" + id, Target: &policyv1.Revocation_SpiffeId{SpiffeId: "spiffe://example.org" + id}})
	}
	p.set(p.Policies().WithRevocations(policy.CompileRevocations(set, td)))
}

func leafOf(notAfter time.Time) *x509.Certificate { return &x509.Certificate{NotAfter: notAfter} }

// link is one of a peer at a path that notes how it was closed.
func link(path string, leaf *x509.Certificate, closed chan policy.Decision) Link {
	peer := spiffeid.RequireFromPath(td, path)
	return Link{Leaf: leaf, Judge: Connection(db, peer, nil), Close: func(d policy.Decision) { closed <- d }}
}

func TestRevokedPeersAreClosed(t *testing.T) {
	p := newPolicies(t)
	table := New(Config{Policies: p})
	closed := make(chan policy.Decision, 2)
	other := make(chan policy.Decision, 2)
	_, d := table.Add(link("/web", leafOf(time.Now().Add(time.Hour)), closed))
	if !d.Allowed {
		t.Fatalf("Add = %+v", d)
	}
	remove, _ := table.Add(link("/app/a", leafOf(time.Now().Add(time.Hour)), other))
	p.revoke("/web")
	if d := <-closed; d.Reason != policy.ReasonRevoked || d.Revocation != "r-/web" {
		t.Errorf("closed by %+v", d)
	}
	if n := table.Len(); n != 1 {
		t.Errorf("%d links after one of two was closed", n)
	}
	if _, d := table.Add(link("/web", leafOf(time.Now().Add(time.Hour)), closed)); d.Allowed || d.Reason != policy.ReasonRevoked {
		t.Errorf("a link of a revoked peer: %+v", d)
	}
	p.set(nil)
	if d := <-other; d.Reason != policy.ReasonUnknownPolicy {
		t.Errorf("closed by %+v", d)
	}
	remove()
	if n := table.Len(); n != 0 {
		t.Errorf("%d links at the end", n)
	}
}

func TestWhatThePoliciesNoLongerAllowIsClosed(t *testing.T) {
	p := newPolicies(t)
	table := New(Config{Policies: p})
	web, http := spiffeid.RequireFromPath(td, "/web"), spiffeid.RequireFromPath(td, "/http")
	leaf := testca.New(t, "example.org").SVID(t, "/http", time.Hour).Certificates[0]
	closed := make(chan string, 8)
	add := func(name string, judge Judge) {
		t.Helper()
		if _, d := table.Add(Link{Judge: judge, Close: func(d policy.Decision) { closed <- name + " " + d.Reason.String() }}); !d.Allowed {
			t.Fatalf("%s: %+v", name, d)
		}
	}
	add("connection", Connection(db, web, nil))
	p.set(testca.Policies(t, "{kind: CallPolicy, name: db, service: /db, allow: [{from: [/http], http: [{methods: [GET]}]}]}"))
	if got := <-closed; got != "connection no_allow" {
		t.Errorf("closed %q", got)
	}
	add("prefiltered", Prefiltered(db, http, leaf))
	add("request", Request(&policy.Request{Service: db, Peer: http, Protocol: policy.ProtocolHTTP, Method: "GET", Path: "/write"}))
	p.set(testca.Policies(t, documents)) // the peer may still read
	if got := <-closed; got != "request no_allow" {
		t.Errorf("closed %q", got)
	}
	p.set(testca.Policies(t, "{kind: CallPolicy, name: db, service: /db, allow: [{from: [/web]}]}"))
	if got := <-closed; got != "prefiltered no_allow" {
		t.Errorf("closed %q", got)
	}
	add("callee", Callee(leaf))
	p.revoke("/http")
	if got := <-closed; got != "callee revoked" {
		t.Errorf("closed %q", got)
	}
}

// quiet is a source that tells nobody of its changes.
type quiet struct{ p *policies }

func (q quiet) Policies() *policy.Policies { return q.p.Policies() }

func TestASourceThatTellsNobodyIsLookedAt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPolicies(t)
		table := New(Config{Policies: quiet{p}})
		closed := make(chan policy.Decision, 1)
		table.Add(link("/web", leafOf(time.Now().Add(time.Hour)), closed))
		time.Sleep(10 * time.Minute)
		p.revoke("/web")
		since := time.Now()
		<-closed
		if took := time.Since(since); took > tick {
			t.Errorf("closed after %v", took)
		}
	})
}

func TestLinksEndWithTheirSVIDs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := New(Config{Policies: newPolicies(t)})
		began := time.Now()
		closed := make(chan policy.Decision, 4)
		ends := []time.Duration{3 * time.Hour, time.Hour, 2*time.Hour + 300*time.Millisecond}
		for _, end := range ends {
			table.Add(link("/web", leafOf(began.Add(end)), closed))
		}
		for _, want := range []time.Duration{ends[1], ends[2], ends[0]} {
			d := <-closed
			took := time.Since(began)
			if d.Reason != policy.ReasonInvalidSVID || took <= want || took > want+10*time.Millisecond {
				t.Errorf("closed after %v by %v, want just after %v", took, d.Reason, want)
			}
		}
		if _, d := table.Add(link("/web", leafOf(began), closed)); d.Allowed || d.Reason != policy.ReasonInvalidSVID {
			t.Errorf("a link of an expired SVID: %+v", d)
		}
	})
}

// A wall clock that is set forward, or a machine that slept, is noticed within a second; one that is set back closes nothing.
func TestClockJumps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var offset atomic.Int64
		table := New(Config{Policies: newPolicies(t), Now: func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }})
		closed := make(chan policy.Decision, 1)
		table.Add(link("/web", leafOf(time.Now().Add(time.Hour)), closed))
		offset.Store(int64(-48 * time.Hour))
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		if table.Len() != 1 {
			t.Error("a clock that was set back closed a link")
		}
		offset.Store(0)
		since := time.Now()
		<-closed
		if took := time.Since(since); took > tick {
			t.Errorf("closed %v after the clock was set", took)
		}
	})
}

func TestRequestsAreToldBeforeTheirConnectionEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPolicies(t)
		table := New(Config{Policies: p})
		connection, request := make(chan policy.Decision, 1), make(chan policy.Decision, 1)
		l := link("/web", leafOf(time.Now().Add(time.Hour)), connection)
		l.Parting = true
		table.Add(l)
		table.Add(link("/web", nil, request))
		p.revoke("/web")
		<-request
		since := time.Now()
		<-connection
		if took := time.Since(since); took != parting {
			t.Errorf("the connection ended %v after the request, want %v", took, parting)
		}
	})
}

// The goroutine of a table ends with its last link; bubbles and goleak fail if it does not.
func TestEmptyTablesCostNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPolicies(t)
		table := New(Config{Policies: p})
		for range 3 {
			remove, _ := table.Add(link("/web", leafOf(time.Now().Add(time.Hour)), nil))
			remove()
			remove()
			synctest.Wait()
			p.mu.Lock()
			if len(p.readers) != 0 {
				t.Error("an empty table is still subscribed")
			}
			p.mu.Unlock()
		}
	})
}

func TestFullTablesRefuse(t *testing.T) {
	table := New(Config{Policies: newPolicies(t), MaxLinks: 1})
	remove, _ := table.Add(link("/web", nil, nil))
	if _, d := table.Add(link("/web", nil, nil)); d.Allowed || d.Reason != policy.ReasonTooManyLinks {
		t.Errorf("one more than MaxLinks: %+v", d)
	}
	remove()
	remove, d := table.Add(link("/web", nil, nil))
	if !d.Allowed {
		t.Errorf("with room again: %+v", d)
	}
	remove()
}

func TestConnectionsThatCloseWithoutAWordLeave(t *testing.T) {
	client, server := pair(t)
	defer client.Close()
	table := New(Config{Policies: newPolicies(t)})
	left := make(chan struct{})
	l := link("/web", leafOf(time.Now().Add(time.Hour)), nil)
	l.Gone = func() bool {
		if Closed(server) {
			close(left)
			return true
		}
		return false
	}
	table.Add(l)
	server.Close()
	<-left
	for table.Len() != 0 { // the goroutine that closed left removes it next
		<-time.After(time.Millisecond)
	}
}

// Links come and go while the policies change: each is closed by its owner or by the table, and none stays.
func TestRaces(t *testing.T) {
	p := newPolicies(t)
	table := New(Config{Policies: p})
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for n := range 60 {
				client, server := pair(t)
				c := &Conn{Conn: server}
				peer := spiffeid.RequireFromPath(td, fmt.Sprintf("/app/%d", n%4))
				remove, d := table.Add(Link{Leaf: leafOf(time.Now().Add(time.Hour)), Judge: Connection(db, peer, nil), Parting: n%2 == 0,
					Close: func(policy.Decision) { c.Close() }})
				c.End.Then(remove)
				if !d.Allowed || n%3 == 0 {
					c.Close()
				}
				if n%3 == 1 {
					p.revoke(fmt.Sprintf("/app/%d", n%4)) // until another takes its place
				}
				client.Close()
			}
		})
	}
	group.Wait()
	p.revoke("/app/*")
	for table.Len() != 0 {
		<-time.After(time.Millisecond)
	}
}

// pair returns both ends of a TCP connection.
func pair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return client, server
}

func TestListenerTellsOfTheEnd(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := Listener(inner)
	defer l.Close()
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c := conn.(*Conn)
	ended := 0
	c.End.Then(func() { ended++ })
	if Closed(c) || ended != 0 {
		t.Error("an open connection counts as closed")
	}
	c.Close()
	c.Close()
	c.End.Then(func() { ended++ })
	if !Closed(c) || ended != 2 {
		t.Errorf("closed: %t, told %d times, want twice", Closed(c), ended)
	}
	if Closed(struct{ net.Conn }{c}) {
		t.Error("a connection of which nothing is known counts as closed")
	}
}

// BenchmarkSweep: what a change costs with many links of which none ends, and what adding and removing one costs then.
func BenchmarkSweep(b *testing.B) {
	for _, n := range []int{2000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			p := newPolicies(b)
			table := New(Config{Policies: p})
			var removes []func()
			for i := range n {
				remove, _ := table.Add(link(fmt.Sprintf("/app/%d", i), leafOf(time.Now().Add(time.Hour)), nil))
				removes = append(removes, remove)
			}
			b.Run("change", func(b *testing.B) {
				for range b.N {
					table.sweep(p.Policies())
				}
			})
			b.Run("add", func(b *testing.B) {
				b.ReportAllocs()
				l := link("/app/x", leafOf(time.Now().Add(time.Hour)), nil)
				for range b.N {
					remove, _ := table.Add(l)
					remove()
				}
			})
			for _, remove := range removes {
				remove()
			}
		})
	}
}
