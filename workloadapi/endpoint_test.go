package workloadapi_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	spiffeapi "github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/signet-id/signet/api/signet/policy/v1/policyapi"
	"github.com/signet-id/signet/workloadapi"
	"github.com/signet-id/signet/workloadapi/peer"
)

// every RPC that demands the header, as a plain call that returns the first answer's error.
func everyRPC(conn *grpc.ClientConn) map[string]func(context.Context) error {
	c := workload.NewSpiffeWorkloadAPIClient(conn)
	return map[string]func(context.Context) error{
		"FetchX509SVID":    func(ctx context.Context) error { return first(c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})) },
		"FetchX509Bundles": func(ctx context.Context) error { return first(c.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})) },
		"FetchJWTBundles":  func(ctx context.Context) error { return first(c.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})) },
		"FetchWITSVID":     func(ctx context.Context) error { return first(c.FetchWITSVID(ctx, &workload.WITSVIDRequest{})) },
		"FetchWITBundles":  func(ctx context.Context) error { return first(c.FetchWITBundles(ctx, &workload.WITBundlesRequest{})) },
		"FetchJWTSVID": func(ctx context.Context) error {
			_, err := c.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
			return err
		},
		"ValidateJWTSVID": func(ctx context.Context) error {
			_, err := c.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "x"})
			return err
		},
		"Policies.Watch": func(ctx context.Context) error {
			return first(policyapi.NewPoliciesClient(conn).Watch(ctx, &policyapi.WatchRequest{Format: 1}))
		},
		"reflection": func(ctx context.Context) error {
			stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
			if err != nil {
				return err
			}
			_, err = stream.Recv()
			return err
		},
		"no such method": func(ctx context.Context) error {
			return conn.Invoke(ctx, "/SpiffeWorkloadAPI/FetchEverything", &workload.JWTSVIDRequest{}, &workload.JWTSVIDResponse{})
		},
		"no such service": func(ctx context.Context) error {
			return conn.Invoke(ctx, "/example.Custom/Get", &workload.JWTSVIDRequest{}, &workload.JWTSVIDResponse{})
		},
	}
}

func first[M any](stream grpc.ServerStreamingClient[M], err error) error {
	if err != nil {
		return err
	}
	_, err = stream.Recv()
	return err
}

func recv[M any](t testing.TB, stream grpc.ServerStreamingClient[M]) *M {
	t.Helper()
	m, err := stream.Recv()
	if err != nil {
		t.Fatalf("the stream ended: %v", err)
	}
	return m
}

// countingAttestor counts attestations.
type countingAttestor struct{ n atomic.Int32 }

func (c *countingAttestor) Attest(ctx context.Context, p *peer.Process) (workloadapi.Caller, error) {
	c.n.Add(1)
	return byState{}.Attest(ctx, p)
}

func TestWEP_07_V138_HeaderDemandedExactly(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	attestor := &countingAttestor{}
	e := serve(t, newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")}), func(c *workloadapi.Config) { c.Attestor = attestor })
	conn := e.dial(t)
	for name, call := range everyRPC(conn) {
		for _, values := range [][]string{nil, {"True"}, {"TRUE"}, {"1"}, {""}, {"true,false"}, {"true", "true"}, {"true", "false"}, {" true x"}} {
			t.Run(fmt.Sprintf("%s %q", name, values), func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				for _, v := range values {
					ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", v)
				}
				wantCode(t, call(ctx), codes.InvalidArgument, "workload.spiffe.io: true")
			})
		}
	}
	if n := attestor.n.Load(); n != 0 {
		t.Errorf("%d callers were attested before their header was checked (WEP-08)", n)
	}
}

func TestWEP_08_HeaderCoversEveryService(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")})
	check := func(t *testing.T, e *endpoint) error {
		_, err := healthpb.NewHealthClient(e.dial(t)).Check(t.Context(), &healthpb.HealthCheckRequest{Service: "SpiffeWorkloadAPI"})
		return err
	}
	// DEC-20: health, SDS and ext_authz are exempt unless the switch is on.
	e := serve(t, src)
	if err := check(t, e); err != nil {
		t.Errorf("health without header: %v, want it to work", err)
	}
	for _, method := range []string{"/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets", "/envoy.service.auth.v3.Authorization/Check"} {
		err := e.dial(t).Invoke(t.Context(), method, &workload.JWTSVIDRequest{}, &workload.JWTSVIDResponse{})
		wantCode(t, err, codes.Unimplemented) // not InvalidArgument
	}
	strict := serve(t, src, func(c *workloadapi.Config) { c.RequireHeaderEverywhere = true })
	wantCode(t, check(t, strict), codes.InvalidArgument, "workload.spiffe.io")
}

func TestWEP_03_WEP_09_WEP_18_GoSpiffeClientConnects(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	e := serve(t, newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")}))
	svid, err := spiffeapi.FetchX509SVID(t.Context(), spiffeapi.WithAddr(e.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	if got := svid.ID.String(); got != "spiffe://example.org/web" {
		t.Errorf("ID %q", got)
	}
	if !strings.HasPrefix(e.Addr(), "unix:///") { // WEP-01, WEP-04
		t.Errorf("Addr() = %q, want a Unix socket", e.Addr())
	}
}

func TestWEP_02_WEP_05_NoTCP(t *testing.T) {
	for _, path := range []string{"tcp://0.0.0.0:8000", "tcp://127.0.0.1:8000", "unix:///run/a.sock"} {
		_, err := workloadapi.New(workloadapi.Config{Source: newMemory(newAuthority(t, "example.org", "k")), Attestor: byState{}, SocketPath: path})
		if err == nil || !strings.Contains(err.Error(), "path of a Unix socket alone") {
			t.Errorf("New(%q) = %v, want it refused with a reason", path, err)
		}
	}
}

func TestWEP_19_WEP_20_CallersToldApartByTheKernel(t *testing.T) {
	requireRoot(t)
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a,
		entry{match: having("unix:uid:23001"), identity: a.identity(t, "/one")},
		entry{match: having("unix:uid:23002"), identity: a.identity(t, "/two")})
	e := serveAt(t, filepath.Join(openDir(t), "agent.sock"), src)
	exe := copyOfSelf(t, "workload")
	startChild(t, exe, asUser(23001), "fetch", e.path).want(t, "svid spiffe://example.org/one")
	startChild(t, exe, asUser(23002), "fetch", e.path).want(t, "svid spiffe://example.org/two")
	startChild(t, exe, asUser(23003), "fetch", e.path).want(t, "end PermissionDenied no identity issued")
}

func TestWEP_24_WAPI_17_ShutdownIsUnavailableAndSourcesRecover(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")})
	e := serve(t, src)
	source, err := spiffeapi.NewX509Source(t.Context(), spiffeapi.WithClientOptions(spiffeapi.WithAddr(e.Addr())))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	conn := e.dial(t)
	ends := map[string]chan error{}
	for name, call := range map[string]func(context.Context) error{
		"x509 svid": func(ctx context.Context) error {
			return last(e.clientOf(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{}))
		},
		"x509 bundles": func(ctx context.Context) error {
			return last(e.clientOf(conn).FetchX509Bundles(ctx, &workload.X509BundlesRequest{}))
		},
		"jwt bundles": func(ctx context.Context) error {
			return last(e.clientOf(conn).FetchJWTBundles(ctx, &workload.JWTBundlesRequest{}))
		},
		"policies": func(ctx context.Context) error {
			return last(policyapi.NewPoliciesClient(conn).Watch(ctx, &policyapi.WatchRequest{Format: 1}))
		},
		"health": func(ctx context.Context) error {
			return last(healthpb.NewHealthClient(conn).Watch(ctx, &healthpb.HealthCheckRequest{}))
		},
	} {
		end := make(chan error, 1)
		ends[name] = end
		ctx := spiffeCtx(t)
		go func() { end <- call(ctx) }()
	}
	src.waitWatching(t, 5)
	start := time.Now()
	e.stop()
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("stopping took %s", took)
	}
	for name, end := range ends {
		if err := within(t, "the end of "+name, end); codeOf(err) != codes.Unavailable {
			t.Errorf("%s ended with %v, want Unavailable", name, err)
		}
	}
	if _, err := os.Lstat(e.path); !os.IsNotExist(err) {
		t.Errorf("the socket is still there after Run: %v", err)
	}

	renewed := a.identity(t, "/web")
	src.change(func() { src.entries[0].identity = renewed })
	serveAt(t, e.path, src)
	for {
		svid, err := source.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		if slices.Equal(svid.Certificates[0].Raw, renewed.Chain) {
			return
		}
		select {
		case <-source.Updated():
		case <-time.After(15 * time.Second):
			t.Fatal("the source did not come back after the restart")
		}
	}
}

func TestWEP_25_V144_NotSynchronisedIsUnavailable(t *testing.T) {
	src := newMemory(newAuthority(t, "example.org", "k1"))
	src.err = fmt.Errorf("cache: %w", workloadapi.ErrNotReady)
	e := serve(t, src)
	for name, call := range everyRPC(e.dial(t)) {
		switch name {
		case "FetchWITSVID", "FetchWITBundles", "no such method", "no such service", "reflection":
			continue
		}
		t.Run(name, func(t *testing.T) { wantCode(t, call(spiffeCtx(t)), codes.Unavailable, "not synchronised") })
	}
}

func TestWEP_24_NoPassingConditionEndsAWatchForGood(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	// What a source may return by accident: its own ended context, and what a CA said about something else.
	for name, err := range map[string]error{
		"canceled": context.Canceled, "deadline": fmt.Errorf("asking the CA: %w", context.DeadlineExceeded),
		"status": statusError(codes.InvalidArgument, "secret detail"), "wrapped": fmt.Errorf("ca: %w", statusError(codes.Canceled, "secret detail")),
		"unknown": errors.New("secret detail"),
	} {
		src := newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")})
		src.err = err
		e := serve(t, src)
		for rpc, call := range everyRPC(e.dial(t)) {
			switch rpc {
			case "FetchWITSVID", "FetchWITBundles", "no such method", "no such service", "reflection":
				continue
			}
			got := call(spiffeCtx(t))
			if code := codeOf(got); code != codes.Unavailable && code != codes.Internal {
				t.Errorf("%s, source error %q: %v, want Unavailable or Internal", rpc, name, got)
			}
			if strings.Contains(got.Error(), "secret") {
				t.Errorf("%s: the status tells the caller what was inside: %v", rpc, got)
			}
		}
	}
}

func TestWEP_27_V139_NoEntryIsPermissionDenied(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	e := serve(t, newMemory(a))
	for name, call := range everyRPC(e.dial(t)) {
		switch name {
		case "FetchWITSVID", "FetchWITBundles", "no such method", "no such service", "reflection":
			continue
		}
		t.Run(name, func(t *testing.T) {
			wantCode(t, call(spiffeCtx(t)), codes.PermissionDenied, "no identity issued", "signet why ", fmt.Sprintf("process %d", os.Getpid()))
		})
	}
}

func TestWEP_29_WAPI_70_V143_WITUnimplemented(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	e := serve(t, newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")}))
	calls := everyRPC(e.dial(t))
	for _, name := range []string{"FetchWITSVID", "FetchWITBundles", "no such method", "no such service"} {
		wantCode(t, calls[name](spiffeCtx(t)), codes.Unimplemented)
	}
}

func TestWEP_30_WEP_31_WEP_32_ReflectionShowsTheStandardService(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	e := serve(t, newMemory(a))
	stream, err := reflectionpb.NewServerReflectionClient(e.dial(t)).ServerReflectionInfo(spiffeCtx(t))
	if err != nil {
		t.Fatal(err)
	}
	ask := func(req *reflectionpb.ServerReflectionRequest) *reflectionpb.ServerReflectionResponse {
		if err := stream.Send(req); err != nil {
			t.Fatal(err)
		}
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	var names []string
	for _, s := range ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}).GetListServicesResponse().GetService() {
		names = append(names, s.Name)
	}
	for _, want := range []string{"SpiffeWorkloadAPI", "signet.policy.v1.Policies", "grpc.health.v1.Health"} {
		if !slices.Contains(names, want) {
			t.Errorf("services %q, want %q among them", names, want)
		}
	}
	files := ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "SpiffeWorkloadAPI"}})
	want := protodesc.ToFileDescriptorProto(workload.File_workload_proto)
	for _, raw := range files.GetFileDescriptorResponse().GetFileDescriptorProto() {
		var got descriptorpb.FileDescriptorProto
		if err := proto.Unmarshal(raw, &got); err != nil {
			t.Fatal(err)
		}
		if got.GetName() == want.GetName() {
			if !proto.Equal(&got, want) {
				t.Errorf("the served descriptor differs from the standard's")
			}
			return
		}
	}
	t.Error("reflection does not know SpiffeWorkloadAPI")
}

func TestPerUserStreamLimit(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")})
	ends := make(chan workloadapi.CallEnd, 16)
	e := serve(t, src, func(c *workloadapi.Config) {
		c.MaxStreamsPerUID = 3
		c.OnCall = func(end workloadapi.CallEnd) { ends <- end }
	})
	client := e.client(t)
	ctx, cancel := context.WithCancel(spiffeCtx(t))
	for range 3 {
		stream, err := client.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err != nil {
			t.Fatal(err)
		}
		recv(t, stream)
	}
	wantCode(t, first(client.FetchX509SVID(spiffeCtx(t), &workload.X509SVIDRequest{})), codes.Unavailable, "too many calls")
	if end := within(t, "the call's end", ends); end.Code != codes.Unavailable || end.Method != workload.SpiffeWorkloadAPI_FetchX509SVID_FullMethodName {
		t.Errorf("OnCall got %+v", end)
	}
	cancel()
	for range 3 {
		if end := within(t, "the call's end", ends); end.Code != codes.Canceled {
			t.Errorf("a stream that the client gave up ended with %v", end.Code)
		}
	}
	if err := first(client.FetchX509SVID(spiffeCtx(t), &workload.X509SVIDRequest{})); err != nil {
		t.Errorf("after the others have ended: %v", err)
	}
}

func TestFloodOfOneUserLeavesDescriptorsToOthers(t *testing.T) {
	requireRoot(t)
	a := newAuthority(t, "example.org", "k1")
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	few := before
	few.Cur = 400
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
			t.Error(err)
		}
	})
	exe := copyOfSelf(t, "workload")
	e := serveAt(t, filepath.Join(openDir(t), "agent.sock"), newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")}))
	w := startChild(t, exe, asUser(23001), "flood", e.path, "600")
	w.want(t, "flooded")
	ctx := contextWithin(t, 5*time.Second) // before the silent connections of the flood are closed
	if _, err := e.client(t).FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}}); err != nil {
		t.Errorf("another user during the flood: %v", err)
	}
	if !strings.Contains(e.log.String(), "max_streams") {
		t.Errorf("that max_streams is more than the descriptors allow was not logged:\n%s", e.log)
	}
}

func TestConnectionLimit(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	e := serve(t, newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")}), func(c *workloadapi.Config) { c.MaxStreamsPerUID = 2 })
	for range 2 {
		if err := first(e.client(t).FetchX509SVID(spiffeCtx(t), &workload.X509SVIDRequest{})); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := net.Dial("unix", e.path)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	raw.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := raw.Read(make([]byte, 1)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the third connection read %d bytes, %v; want it closed", n, err)
	}
}

func TestOversizedRequestRefused(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	e := serve(t, newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")}))
	_, err := e.client(t).ValidateJWTSVID(spiffeCtx(t), &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: strings.Repeat("x", 1<<20)})
	wantCode(t, err, codes.ResourceExhausted)
}

func TestOneDescriptorPerProcess(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	e := serve(t, newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")}))
	if err := first(e.client(t).FetchX509SVID(spiffeCtx(t), &workload.X509SVIDRequest{})); err != nil {
		t.Fatal(err)
	}
	before := pidfds(t)
	var wg sync.WaitGroup
	for range 8 {
		client := e.client(t)
		wg.Go(func() {
			if err := first(client.FetchX509SVID(spiffeCtx(t), &workload.X509SVIDRequest{})); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if after := pidfds(t); after != before || before == 0 {
		t.Errorf("%d pidfds with one connection, %d with nine of the same process", before, after)
	}
}

// pidfds counts the pidfds that this process has open.
func pidfds(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, fd := range fds {
		if link, _ := os.Readlink("/proc/self/fd/" + fd.Name()); strings.Contains(link, "pidfd") {
			n++
		}
	}
	return n
}

func TestSecretsStayOutOfTheLog(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	identity := a.identity(t, "/web")
	src := newMemory(a, entry{match: everyone, identity: identity})
	e := serve(t, src)
	conn := e.dial(t)
	token, err := a.token(map[string]any{"sub": "spiffe://example.org/web", "aud": "other", "exp": time.Now().Add(time.Minute).Unix()})
	if err != nil {
		t.Fatal(err)
	}
	_, err = e.clientOf(conn).ValidateJWTSVID(spiffeCtx(t), &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: token})
	wantCode(t, err, codes.InvalidArgument)
	for _, call := range everyRPC(conn) {
		_ = call(t.Context()) // refused, hence logged
	}
	src.change(func() { src.x509 = nil }) // held back, hence logged
	if err := first(e.clientOf(conn).FetchX509SVID(contextWithin(t, 200*time.Millisecond), &workload.X509SVIDRequest{})); err == nil {
		t.Error("a message without a bundle was sent")
	}
	log := e.log.String()
	if !strings.Contains(log, "call refused") || !strings.Contains(log, "held back") {
		t.Errorf("the log lacks the refusals:\n%s", log)
	}
	if parts := strings.Split(token, "."); strings.Contains(log, parts[2]) || strings.Contains(err.Error(), parts[2]) {
		t.Error("the token's signature is in the log or in the answer")
	}
}
