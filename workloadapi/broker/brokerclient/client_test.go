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
	"testing"
	"time"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi/broker/brokerclient"
	"github.com/signet-id/signet/workloadapi/broker/internal/brokertest"
)

func TestBEP_06_07_08_Address(t *testing.T) {
	a, _, e, w := twoWorkloads(t)
	t.Setenv("SPIFFE_BROKER_SOCKET", "unix://"+e.Path)
	c := newClient(t, a, "")
	if svids, err := c.FetchJWTSVIDs(limited(t), brokerclient.Process(w[0].PID), spiffeid.ID{}, "x"); err != nil || len(svids) != 1 {
		t.Errorf("by the environment: %d, %v", len(svids), err)
	}
	t.Setenv("SPIFFE_BROKER_SOCKET", "unix:///nowhere/at/all.sock")
	c = newClient(t, a, "unix:"+e.Path) // what is given explicitly wins
	if _, err := c.FetchJWTSVIDs(limited(t), brokerclient.Process(w[0].PID), spiffeid.ID{}, "x"); err != nil {
		t.Errorf("by an explicit address: %v", err)
	}
	t.Setenv("SPIFFE_BROKER_SOCKET", "")
	for addr, row := range map[string]string{"": "BEP-06", "unix://tmp/b.sock": "WEP-12", "tcp://broker.example.com:8443/": "BEP-08", e.Path: "WEP-11"} {
		_, err := brokerclient.New(brokerclient.Config{Addr: addr, SVID: newSVIDSource(nil), Bundles: a.Bundle(), Server: brokerclient.AnyAgent(a.TD)})
		if spiffe.RowOf(err) != row {
			t.Errorf("New with the address %q = %v, want the row %s", addr, err, row)
		}
	}
}

// TestBEP_10_ServerIDIsChecked: a server of the trust domain with another ID is refused, and who posed so gets nothing.
func TestBEP_10_ServerIDIsChecked(t *testing.T) {
	a, src, e, w := twoWorkloads(t)
	agent := spiffeid.RequireFromPath(a.TD, brokertest.ServerPath)
	for _, tt := range []struct {
		name   string
		serves string
		expect func(spiffeid.ID) error
		ok     bool
	}{
		{"the exact ID", brokertest.ServerPath, brokerclient.ServerID(agent), true},
		{"another agent", "/spire/agent/join_token/n2", brokerclient.ServerID(agent), false},
		{"a workload", "/a", brokerclient.ServerID(agent), false},
		{"any agent", "/spire/agent/join_token/n2", brokerclient.AnyAgent(a.TD), true},
		{"any agent: a workload", "/a", brokerclient.AnyAgent(a.TD), false},
		{"any agent: the CA", "/spire/server", brokerclient.AnyAgent(a.TD), false},
		{"any agent: a look-alike", "/spire/agents/n2", brokerclient.AnyAgent(a.TD), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e.Server.Store(a.SVID(t, tt.serves, time.Hour))
			src.Change(func() { src.Seen = nil })
			c := newClient(t, a, "unix:"+e.Path, func(c *brokerclient.Config) { c.Server = tt.expect })
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			if tt.ok {
				ctx = limited(t)
			}
			defer cancel()
			_, err := c.FetchJWTSVIDs(ctx, brokerclient.Process(w[0].PID), spiffeid.ID{}, "x")
			if (err == nil) != tt.ok {
				t.Errorf("FetchJWTSVIDs = %v, want success %t", err, tt.ok)
			}
			src.Look(func() {
				if (len(src.Seen) > 0) != tt.ok {
					t.Errorf("%d requests reached the server", len(src.Seen))
				}
			})
		})
	}
}

// TestBEP_03_HeaderOnEveryCall: on streams and on unary calls, exactly once.
func TestBEP_03_HeaderOnEveryCall(t *testing.T) {
	a := brokertest.NewAuthority(t, "example.org")
	s := newScript(t, a)
	s.stream = func(int, grpc.ServerStreamingServer[brokerpb.SubscribeToX509SVIDResponse]) error {
		return status.Error(codes.NotFound, "")
	}
	s.jwt = func(int) (*brokerpb.FetchJWTSVIDResponse, error) { return nil, status.Error(codes.NotFound, "") }
	c := newClient(t, a, "unix:"+s.addr)
	if _, err := c.FetchJWTSVIDs(limited(t), brokerclient.Process(1), spiffeid.ID{}, "x"); !errors.Is(err, brokerclient.ErrGone) {
		t.Error(err)
	}
	if err := c.FollowX509SVIDs(limited(t), brokerclient.Process(1), &brokerclient.Memory{}); !errors.Is(err, brokerclient.ErrGone) {
		t.Error(err)
	}
	if _, _, headers := s.seen(); !slices.Equal(headers, []string{"true", "true"}) {
		t.Errorf("headers were %q", headers)
	}
}

// TestBEP_12_UnauthenticatedNeedsAnotherSVID: nothing is tried again with the SVID that was not taken; with a renewed one
// it is, over a new connection.
func TestBEP_12_UnauthenticatedNeedsAnotherSVID(t *testing.T) {
	a := brokertest.NewAuthority(t, "example.org")
	s := newScript(t, a)
	first := a.SVID(t, brokertest.BrokerPath, time.Hour)
	refused := make(chan struct{}, 10)
	s.stream = func(n int, ss grpc.ServerStreamingServer[brokerpb.SubscribeToX509SVIDResponse]) error {
		if _, serials, _ := s.seen(); serials[n-1] == first.Certificates[0].SerialNumber.String() {
			refused <- struct{}{}
			return status.Error(codes.Unauthenticated, "")
		}
		if err := ss.Send(message(t, a, "/a", nil)); err != nil {
			return err
		}
		<-ss.Context().Done()
		return nil
	}
	own := newSVIDSource(first)
	asked := &countingSource{svidSource: own, asked: make(chan struct{}, 1000)}
	c := newClient(t, a, "unix:"+s.addr, func(c *brokerclient.Config) { c.SVID = asked })
	k, _ := follow(t, c, brokerclient.Process(1), &brokerclient.Memory{})
	<-refused
	for range 6 { // it looks for another SVID, several times
		<-asked.asked
	}
	if calls, _, _ := s.seen(); calls != 1 {
		t.Errorf("%d calls with the SVID that was refused, want 1", calls)
	}
	own.svid.Store(a.SVID(t, brokertest.BrokerPath, time.Hour))
	k.want(t, "take")
	if calls, serials, _ := s.seen(); calls != 2 || serials[0] == serials[1] {
		t.Errorf("%d calls, with the SVIDs %q; want one more with the renewed one", calls, serials)
	}
}

// TestBEP_13_BEP_14_BAPI_20_WhatIsTriedAgain: each bare status code, without any detail, has its consequence (DEC-14).
func TestBEP_13_BEP_14_BAPI_20_WhatIsTriedAgain(t *testing.T) {
	a := brokertest.NewAuthority(t, "example.org")
	for _, tt := range []struct {
		name   string
		code   codes.Code
		change func(*brokerclient.Config)
		want   error // nil: it is tried again, until it works
	}{
		{"not found", codes.NotFound, nil, brokerclient.ErrGone},
		{"denied", codes.PermissionDenied, nil, brokerclient.ErrDenied},
		{"denied, to be tried again", codes.PermissionDenied, func(c *brokerclient.Config) { c.RetryDenied = true }, nil},
		{"bad request", codes.InvalidArgument, nil, brokerclient.ErrRequest},
		{"not implemented", codes.Unimplemented, nil, brokerclient.ErrRequest},
		{"unavailable", codes.Unavailable, nil, nil},
		{"exhausted", codes.ResourceExhausted, nil, nil},
		{"internal", codes.Internal, nil, nil},
		{"unknown", codes.Unknown, nil, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScript(t, a)
			const failures = 4
			s.stream = func(n int, ss grpc.ServerStreamingServer[brokerpb.SubscribeToX509SVIDResponse]) error {
				if n > failures {
					if err := ss.Send(message(t, a, "/a", nil)); err != nil {
						return err
					}
					<-ss.Context().Done()
					return nil
				}
				return status.Error(tt.code, "because")
			}
			var change []func(*brokerclient.Config)
			if tt.change != nil {
				change = append(change, tt.change)
			}
			c := newClient(t, a, "unix:"+s.addr, change...)
			k, done := follow(t, c, brokerclient.Process(1), &brokerclient.Memory{})
			if tt.want != nil {
				err := why(t, done)
				if !errors.Is(err, tt.want) || status.Code(err) != tt.code || brokerclient.Reason(err) != "" {
					t.Errorf("FollowX509SVIDs = %v, want %v with the code %v", err, tt.want, tt.code)
				}
				if calls, _, _ := s.seen(); calls != 1 {
					t.Errorf("%d calls, want 1", calls)
				}
				return
			}
			if tt.code == codes.PermissionDenied {
				for range failures {
					k.want(t, "drop")
				}
			}
			k.want(t, "take")
			if calls, _, _ := s.seen(); calls != failures+1 {
				t.Errorf("%d calls, want %d", calls, failures+1)
			}
		})
	}
}

// TestBAPI_08_LocalReferencesStayHere: a process id is not sent to another host.
func TestBAPI_08_LocalReferencesStayHere(t *testing.T) {
	a := brokertest.NewAuthority(t, "example.org")
	for addr, local := range map[string]bool{"tcp://192.0.2.7:8443": false, "tcp://broker.example.com:8443": false, "tcp://127.0.0.1:1": true, "tcp://[::1]:1": true, "tcp://localhost:1": true} {
		c := newClient(t, a, addr)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := c.FetchJWTSVIDs(ctx, brokerclient.Process(1), spiffeid.ID{}, "x")
		if (err != nil && strings.Contains(err.Error(), "not sent to")) == local {
			t.Errorf("%s: %v", addr, err)
		}
		if _, err := c.FetchJWTSVIDs(ctx, brokerclient.Pod("shop", "cart", ""), spiffeid.ID{}, "x"); err != nil && strings.Contains(err.Error(), "not sent to") {
			t.Errorf("%s: a pod: %v", addr, err)
		}
	}
	c := newClient(t, a, "unix:///b.sock")
	for name, r := range map[string]brokerclient.Reference{"process 0": brokerclient.Process(0), "no pod": brokerclient.Pod("", "", ""), "half a name": brokerclient.Pod("shop", "", ""), "nothing": {}} {
		if err := c.FollowX509SVIDs(limited(t), r, &brokerclient.Memory{}); err == nil || errors.Is(err, brokerclient.ErrRequest) {
			t.Errorf("%s: %v, want a refusal before anything is sent", name, err)
		}
	}
}

// TestBAPI_23_BAPI_24_WorkloadsAreKeptApart: one client, two workloads; each side of a connection between them uses its own
// SVID and its own bundles.
func TestBAPI_23_BAPI_24_WorkloadsAreKeptApart(t *testing.T) {
	a, _, e, w := twoWorkloads(t)
	c := newClient(t, a, "unix:"+e.Path)
	var m [2]brokerclient.Memory
	for i := range m {
		k, _ := follow(t, c, brokerclient.Process(w[i].PID), &m[i])
		k.want(t, "take")
	}
	partner := spiffeid.RequireTrustDomainFromString("partner.example")
	for i, want := range []bool{false, true} {
		if _, err := m[i].GetX509BundleForTrustDomain(partner); (err == nil) != want {
			t.Errorf("workload %d and the partner's bundle: %v, want %t", i, err, want)
		}
	}
	x, y := net.Pipe()
	defer x.Close()
	defer y.Close()
	server := tls.Server(x, tlsconfig.MTLSServerConfig(&m[1], &m[1], tlsconfig.AuthorizeID(spiffeid.RequireFromPath(a.TD, "/a"))))
	client := tls.Client(y, tlsconfig.MTLSClientConfig(&m[0], &m[0], tlsconfig.AuthorizeID(spiffeid.RequireFromPath(a.TD, "/b"))))
	done := make(chan error, 1)
	go func() { done <- server.Handshake() }()
	if err := errors.Join(client.Handshake(), <-done); err != nil {
		t.Errorf("/a calls /b: %v", err)
	}
}

// TestBAPI_27_RedactionAndBrokenMessages: what a message does not have is gone, and one in which something mandatory is
// missing changes nothing.
func TestBAPI_27_RedactionAndBrokenMessages(t *testing.T) {
	a, partner := brokertest.NewAuthority(t, "example.org"), brokertest.NewAuthority(t, "partner.example")
	s := newScript(t, a)
	next := make(chan *brokerpb.SubscribeToX509SVIDResponse)
	s.stream = func(_ int, ss grpc.ServerStreamingServer[brokerpb.SubscribeToX509SVIDResponse]) error {
		for {
			select {
			case m := <-next:
				if err := ss.Send(m); err != nil {
					return err
				}
			case <-ss.Context().Done():
				return nil
			}
		}
	}
	var m brokerclient.Memory
	k, _ := follow(t, newClient(t, a, "unix:"+s.addr), brokerclient.Process(1), &m)
	next <- message(t, a, "/a", map[string][]byte{"spiffe://partner.example": partner.Root.Raw})
	k.want(t, "take")
	if _, err := m.GetX509BundleForTrustDomain(partner.TD); err != nil {
		t.Fatal(err)
	}
	broken := map[string]func(*brokerpb.SubscribeToX509SVIDResponse){
		"no svids":       func(m *brokerpb.SubscribeToX509SVIDResponse) { m.Svids = nil },
		"no id":          func(m *brokerpb.SubscribeToX509SVIDResponse) { m.Svids[0].SpiffeId = "" },
		"no SVID":        func(m *brokerpb.SubscribeToX509SVIDResponse) { m.Svids[0].X509Svid = nil },
		"no key":         func(m *brokerpb.SubscribeToX509SVIDResponse) { m.Svids[0].X509SvidKey = nil },
		"no bundle":      func(m *brokerpb.SubscribeToX509SVIDResponse) { m.Svids[0].Bundle = nil },
		"another's SVID": func(m *brokerpb.SubscribeToX509SVIDResponse) { m.Svids[0].SpiffeId = "spiffe://example.org/b" },
		"another's key":  func(m *brokerpb.SubscribeToX509SVIDResponse) { m.Svids[0].X509SvidKey = a.Identity(t, "/a").Key },
		"bad federation": func(m *brokerpb.SubscribeToX509SVIDResponse) {
			m.FederatedBundles = map[string][]byte{"partner.example": partner.Root.Raw}
		},
	}
	for name, spoil := range broken {
		bad := message(t, a, "/spoilt", nil)
		bad.Svids[0].SpiffeId = "spiffe://example.org/spoilt"
		spoil(bad)
		next <- bad
		if svid, err := m.GetX509SVID(); err != nil || svid.ID.Path() != "/a" {
			t.Errorf("after a message with %s: %v, %v", name, svid, err)
		}
	}
	next <- message(t, a, "/c", nil)
	k.want(t, "take") // and none of the broken ones was taken
	if svid, err := m.GetX509SVID(); err != nil || svid.ID.Path() != "/c" {
		t.Errorf("after the good message: %v, %v", svid, err)
	}
	if _, err := m.GetX509BundleForTrustDomain(partner.TD); err == nil {
		t.Error("the bundle that the last message does not have is there still")
	}
}

// TestBAPI_29_BAPI_31_OneWorkloadIsDropped: with the end of a workload, or of its entitlement, its data is dropped, files
// too, and that of the other stays and is kept fresh.
func TestBAPI_29_BAPI_31_OneWorkloadIsDropped(t *testing.T) {
	for name, tt := range map[string]struct {
		stop func(*brokertest.Source, *brokertest.Workload)
		want error
	}{
		"it ends":            {func(_ *brokertest.Source, w *brokertest.Workload) { w.Kill() }, brokerclient.ErrGone},
		"it loses its entry": {func(s *brokertest.Source, _ *brokertest.Workload) { s.Change(func() { s.Entries = s.Entries[1:] }) }, brokerclient.ErrDenied},
	} {
		t.Run(name, func(t *testing.T) {
			a, src, e, w := twoWorkloads(t)
			c := newClient(t, a, "unix:"+e.Path)
			var other brokerclient.Memory
			files := brokerclient.Dir(filepath.Join(t.TempDir(), "a"))
			one, done := follow(t, c, brokerclient.Process(w[0].PID), files)
			two, _ := follow(t, c, brokerclient.Process(w[1].PID), &other)
			one.want(t, "take")
			two.want(t, "take")
			if _, err := tls.LoadX509KeyPair(filepath.Join(string(files), "svid.pem"), filepath.Join(string(files), "svid.key")); err != nil {
				t.Errorf("the files: %v", err)
			}
			tt.stop(src, w[0])
			if err := why(t, done); !errors.Is(err, tt.want) {
				t.Errorf("FollowX509SVIDs = %v, want %v", err, tt.want)
			}
			one.want(t, "drop")
			if _, err := os.Stat(string(files)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the files are there still: %v", err)
			}
			if _, err := other.GetX509SVID(); err != nil {
				t.Errorf("the other workload's SVID: %v", err)
			}
			before, _ := other.GetX509SVID()
			src.Change(func() {
				last := len(src.Entries) - 1
				src.Entries[last].Identity = a.Identity(t, "/b")
			})
			two.want(t, "take")
			if after, err := other.GetX509SVID(); err != nil || after.Certificates[0].Equal(before.Certificates[0]) {
				t.Errorf("the other workload's SVID is not kept fresh: %v", err)
			}
		})
	}
}

// TestBAPI_36_DefaultAndHints: the first identity is the default, and others are known by their hints.
func TestBAPI_36_DefaultAndHints(t *testing.T) {
	a, src, e, w := twoWorkloads(t)
	src.Change(func() {
		for _, hint := range []string{"internal", "external"} {
			i := a.Identity(t, "/"+hint)
			i.Hint = hint
			src.Entries = append(src.Entries, brokertest.Entry{Selector: selector(w[0]), Identity: i})
		}
	})
	var m brokerclient.Memory
	dir := filepath.Join(t.TempDir(), "a")
	c := newClient(t, a, "unix:"+e.Path)
	k, _ := follow(t, c, brokerclient.Process(w[0].PID), &m)
	k.want(t, "take")
	files, _ := follow(t, c, brokerclient.Process(w[0].PID), brokerclient.Dir(dir))
	files.want(t, "take")
	x, err := m.Get()
	if err != nil || len(x.SVIDs) != 3 || x.Default().ID.Path() != "/a" || x.SVIDs[1].Hint != "internal" || x.SVIDs[2].Hint != "external" {
		t.Errorf("the identities are %v, %v", x.SVIDs, err)
	}
	for file, want := range map[string]string{"svid.pem": "/a", "svid-internal.pem": "/internal", "svid-external.pem": "/external"} {
		svid, err := x509svid.Load(filepath.Join(dir, file), filepath.Join(dir, strings.TrimSuffix(file, ".pem")+".key"))
		if err != nil || svid.ID.Path() != want {
			t.Errorf("%s: %v, %v", file, svid, err)
		}
	}
	// One goes; its files go too.
	src.Change(func() { src.Entries = slices.Delete(src.Entries, 2, 3) })
	files.want(t, "take")
	for _, file := range []string{"svid-internal.pem", "svid-internal.key", "bundle-internal.pem"} {
		if _, err := os.Stat(filepath.Join(dir, file)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is there still: %v", file, err)
		}
	}
}

// TestServerRestart: the client comes back by itself, and keeps what it has meanwhile.
func TestServerRestart(t *testing.T) {
	a, src, e, w := twoWorkloads(t)
	var m brokerclient.Memory
	k, _ := follow(t, newClient(t, a, "unix:"+e.Path), brokerclient.Process(w[0].PID), &m)
	k.want(t, "take")
	e.Stop()
	if _, err := m.GetX509SVID(); err != nil {
		t.Errorf("while the server is away: %v", err)
	}
	src.Change(func() { src.Entries[0].Identity = a.Identity(t, "/again") })
	brokertest.ServeAt(t, e.Path, src)
	k.want(t, "take")
	if svid, err := m.GetX509SVID(); err != nil || svid.ID.Path() != "/again" {
		t.Errorf("after the restart: %v, %v", svid, err)
	}
}

// TestBundlesAndTokens: the other calls, against the real endpoint.
func TestBundlesAndTokens(t *testing.T) {
	a, _, e, w := twoWorkloads(t)
	c := newClient(t, a, "unix:"+e.Path)
	ctx, cancel := context.WithCancel(limited(t))
	xs, js := make(chan brokerclient.X509Bundles, 1), make(chan brokerclient.JWTBundles, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		c.FollowX509Bundles(ctx, brokerclient.Process(w[1].PID), toChannel[brokerclient.X509Bundles](xs))
	})
	wg.Go(func() {
		c.FollowJWTBundles(ctx, brokerclient.Process(w[1].PID), toChannel[brokerclient.JWTBundles](js))
	})
	if x := <-xs; x.Set.Len() != 2 {
		t.Errorf("%d X.509 bundles, want 2", x.Set.Len())
	}
	if j := <-js; j.Set.Len() != 2 {
		t.Errorf("%d JWT bundles, want 2", j.Set.Len())
	}
	cancel()
	wg.Wait()
	svids, err := c.FetchJWTSVIDs(limited(t), brokerclient.Process(w[1].PID), spiffeid.RequireFromPath(a.TD, "/b"), "y", "x")
	if err != nil || len(svids) != 1 || svids[0].ID.Path() != "/b" || !slices.Equal(svids[0].Audience, []string{"y", "x"}) {
		t.Errorf("FetchJWTSVIDs = %v, %v", svids, err)
	}
	if _, err := c.FetchJWTSVIDs(limited(t), brokerclient.Process(w[1].PID), spiffeid.RequireFromPath(a.TD, "/a"), "x"); !errors.Is(err, brokerclient.ErrDenied) || brokerclient.Reason(err) != "WORKLOAD_NOT_ENTITLED" {
		t.Errorf("for another's ID: %v", err)
	}
	if _, err := c.FetchJWTSVIDs(limited(t), brokerclient.Process(w[1].PID), spiffeid.ID{}); !errors.Is(err, brokerclient.ErrRequest) {
		t.Errorf("without an audience: %v", err)
	}
}

// TestForeignAnswersAreNotTaken: tokens for somebody else, or for another audience, are no answer.
func TestForeignAnswersAreNotTaken(t *testing.T) {
	a, _, e, w := twoWorkloads(t)
	real := newClient(t, a, "unix:"+e.Path)
	good, err := real.FetchJWTSVIDs(limited(t), brokerclient.Process(w[0].PID), spiffeid.ID{}, "x", "y")
	if err != nil {
		t.Fatal(err)
	}
	s := newScript(t, a)
	c := newClient(t, a, "unix:"+s.addr)
	for name, svid := range map[string]*brokerpb.JWTSVID{
		"no token":         {SpiffeId: "spiffe://example.org/a"},
		"another's name":   {SpiffeId: "spiffe://example.org/b", Svid: good[0].Marshal()},
		"another audience": {SpiffeId: "spiffe://example.org/a", Svid: good[0].Marshal()},
	} {
		s.jwt = func(int) (*brokerpb.FetchJWTSVIDResponse, error) {
			return &brokerpb.FetchJWTSVIDResponse{Svids: []*brokerpb.JWTSVID{svid}}, nil
		}
		if svids, err := c.FetchJWTSVIDs(limited(t), brokerclient.Process(1), spiffeid.ID{}, "x"); err == nil {
			t.Errorf("%s: %v is taken", name, svids)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	a := brokertest.NewAuthority(t, "example.org")
	for name, change := range map[string]func(*brokerclient.Config){
		"no SVID":    func(c *brokerclient.Config) { c.SVID = nil },
		"no bundles": func(c *brokerclient.Config) { c.Bundles = nil },
		"no server":  func(c *brokerclient.Config) { c.Server = nil },
		"negative":   func(c *brokerclient.Config) { c.RetryMin = -1 },
		"max < min":  func(c *brokerclient.Config) { c.RetryMin, c.RetryMax = time.Second, time.Millisecond },
	} {
		cfg := brokerclient.Config{Addr: "unix:///b.sock", SVID: newSVIDSource(nil), Bundles: a.Bundle(), Server: brokerclient.AnyAgent(a.TD)}
		change(&cfg)
		if _, err := brokerclient.New(cfg); err == nil {
			t.Errorf("%s: New takes it", name)
		}
	}
}
