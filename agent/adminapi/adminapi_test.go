package adminapi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
	"github.com/signet-id/signet/internal/adminsocket"
	"github.com/signet-id/signet/workloadapi/peer"
)

const childSocket = "SIGNET_TEST_ADMIN_SOCKET"

func TestMain(m *testing.M) {
	if path := os.Getenv(childSocket); path != "" {
		os.Exit(child(path))
	}
	goleak.VerifyTestMain(m)
}

// child asks as another user: for the status, and a service that judges its callers itself.
func child(path string) int {
	conn, err := dial(path)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, err = agentv1.NewAgentClient(conn).GetStatus(ctx, &agentv1.GetStatusRequest{})
	fmt.Println("status", status.Code(err))
	_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: fmt.Sprint(os.Getpid())})
	fmt.Println("own", status.Code(err))
	return 0
}

func dial(path string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// judging stands for a service that decides by itself whom it answers: whoever knows its own process id.
type judging struct {
	healthpb.UnimplementedHealthServer
	watching chan struct{}
}

func (j judging) Check(ctx context.Context, req *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	p, err := peer.FromContext(ctx)
	if err != nil {
		return nil, err
	}
	if fmt.Sprint(p.PID) != req.GetService() {
		return nil, status.Errorf(codes.PermissionDenied, "process %d is not %s", p.PID, req.GetService())
	}
	return &healthpb.HealthCheckResponse{}, nil
}

// Watch goes on until its context ends, as a delegate's streams do.
func (j judging) Watch(_ *healthpb.HealthCheckRequest, ss healthpb.Health_WatchServer) error {
	close(j.watching)
	<-ss.Context().Done()
	return context.Cause(ss.Context())
}

// List fails with what must not be told.
func (j judging) List(context.Context, *healthpb.HealthListRequest) (*healthpb.HealthListResponse, error) {
	return nil, fmt.Errorf("a secret: %w", status.Error(codes.NotFound, "from elsewhere"))
}

// openDir is a directory that every user can reach, with a path that is short enough for a socket.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "signet")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func serve(t *testing.T, c adminsocket.Config) (path string, watching chan struct{}, stop func()) {
	t.Helper()
	watching = make(chan struct{})
	s, err := New(Config{
		Socket: c,
		Status: func(context.Context) *agentv1.GetStatusResponse { return &agentv1.GetStatusResponse{State: "in sync"} },
		Explain: func(context.Context, *peer.Process, *peer.Table, *agentv1.ExplainRequest) (*agentv1.ExplainResponse, error) {
			return &agentv1.ExplainResponse{}, nil
		},
		Services: []func(grpc.ServiceRegistrar){func(r grpc.ServiceRegistrar) { healthpb.RegisterHealthServer(r, judging{watching: watching}) }},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	ended := false
	stop = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	t.Cleanup(stop)
	return s.Path(), watching, stop
}

// TestWhoIsAdmin asks as other users, over a socket that lets everybody connect and over one that does not.
func TestWhoIsAdmin(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to be other users; CI runs as root")
	}
	program := filepath.Join(openDir(t), "test")
	b, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, b, 0o755); err != nil {
		t.Fatal(err)
	}
	const connects, cannot = "own OK", "own Unavailable"
	for _, tt := range []struct {
		name        string
		socket      adminsocket.Config
		uid, gid    uint32
		groups      []uint32
		status, own string
	}{
		{"root", adminsocket.Config{}, 0, 0, nil, "status OK", connects},
		{"a named user", adminsocket.Config{UIDs: []uint32{4711}}, 4711, 4711, nil, "status OK", connects},
		{"another user cannot even connect", adminsocket.Config{UIDs: []uint32{4711}}, 4712, 4712, nil, "status Unavailable", cannot},
		{"the named group", adminsocket.Config{Group: "4713"}, 4711, 4713, nil, "status OK", connects},
		{"a supplementary group", adminsocket.Config{Group: "4713"}, 4711, 4711, []uint32{4713}, "status OK", connects},
		{"open to all, admin to few", adminsocket.Config{Open: true, UIDs: []uint32{4711}}, 4712, 4712, nil, "status PermissionDenied", connects},
		{"open, the admin", adminsocket.Config{Open: true, UIDs: []uint32{4711}}, 4711, 4711, nil, "status OK", connects},
		{"the overflow uid", adminsocket.Config{Open: true, Group: "4713"}, adminsocket.OverflowUID, 4713, nil, "status PermissionDenied", connects},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := openDir(t)
			tt.socket.Path = filepath.Join(dir, "admin", "a.sock")
			path, _, _ := serve(t, tt.socket)
			cmd := exec.Command(program)
			cmd.Env = append(os.Environ(), childSocket+"="+path)
			cmd.Dir = "/"
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: tt.uid, Gid: tt.gid, Groups: tt.groups}}
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			for _, want := range []string{tt.status, tt.own} {
				if !strings.Contains(string(out), want+"\n") {
					t.Errorf("%q is not in:\n%s", want, out)
				}
			}
			mode, dirMode := fs.FileMode(0o660), fs.FileMode(0o750)
			if tt.socket.Open {
				mode, dirMode = 0o666, 0o755
			}
			for path, want := range map[string]fs.FileMode{path: mode, filepath.Dir(path): dirMode} {
				if st, err := os.Stat(path); err != nil || st.Mode().Perm() != want {
					t.Errorf("%s: %v %v, want %v", path, st.Mode(), err, want)
				}
			}
		})
	}
	if _, err := New(Config{Status: func(context.Context) *agentv1.GetStatusResponse { return nil }, Explain: func(context.Context, *peer.Process, *peer.Table, *agentv1.ExplainRequest) (*agentv1.ExplainResponse, error) {
		return nil, nil
	}, Socket: adminsocket.Config{Path: filepath.Join(openDir(t), "a.sock"), Group: "no-such-group"}}); err == nil {
		t.Error("a group that does not exist is taken")
	}
}

// TestShutdown ends a stream that would go on for ever with Unavailable, and removes the socket.
func TestShutdown(t *testing.T) {
	path, watching, stop := serve(t, adminsocket.Config{Path: filepath.Join(openDir(t), "a.sock")})
	conn, err := dial(path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stream, err := healthpb.NewHealthClient(conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	<-watching
	stop()
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), ErrStopping.Error()) {
		t.Errorf("the stream ended with %v, want Unavailable: %v", err, ErrStopping)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

// TestErrorsStayInside: what a service wraps does not leave, whatever status it has.
func TestErrorsStayInside(t *testing.T) {
	path, _, _ := serve(t, adminsocket.Config{Path: filepath.Join(openDir(t), "a.sock")})
	conn, err := dial(path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, err = healthpb.NewHealthClient(conn).List(t.Context(), &healthpb.HealthListRequest{})
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "elsewhere") {
		t.Errorf("got %v, want Internal without details", err)
	}
}

// TestSocketIsTaken: a socket that is in use, or a file that is none, is left alone; one that is left over is replaced.
func TestSocketIsTaken(t *testing.T) {
	dir := openDir(t)
	path, _, _ := serve(t, adminsocket.Config{Path: filepath.Join(dir, "a.sock")})
	if _, err := adminsocket.Listen(adminsocket.Config{Path: path}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a socket in use: %v", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := adminsocket.Listen(adminsocket.Config{Path: file}); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("a file: %v", err)
	}
	stale := filepath.Join(dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	again, err := adminsocket.Listen(adminsocket.Config{Path: stale})
	if err != nil {
		t.Fatalf("a socket that is left over: %v", err)
	}
	// What takes its place meanwhile is not removed.
	if err := os.Remove(stale); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(stale, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(stale); err != nil {
		t.Errorf("somebody else's file was removed: %v", err)
	}
}
