package workloadapi_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/workloadapi/peer"
)

func requireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to run workloads as other users")
	}
}

// openDir is a directory that every user can reach.
func openDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for d := dir; d != filepath.Clean(os.TempDir()) && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func asUser(uid uint32) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
}

func codeOf(err error) codes.Code { return status.Code(err) }

func statusError(c codes.Code, text string) error { return status.Error(c, text) }

// contextWithin carries the header and ends after d.
func contextWithin(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// last reads a stream to its end.
func last[M any](stream grpc.ServerStreamingClient[M], err error) error {
	for err == nil {
		_, err = stream.Recv()
	}
	return err
}

func (e *endpoint) clientOf(conn *grpc.ClientConn) workload.SpiffeWorkloadAPIClient {
	return workload.NewSpiffeWorkloadAPIClient(conn)
}

// waitWatching waits until n subscriptions are open.
func (m *memory) waitWatching(t testing.TB, n int) {
	t.Helper()
	ticker := time.NewTicker(time.Millisecond)
	defer ticker.Stop()
	timeout := time.After(10 * time.Second)
	for {
		m.mu.Lock()
		got := m.watching
		m.mu.Unlock()
		if got == n {
			return
		}
		select {
		case <-ticker.C:
		case <-timeout:
			t.Fatalf("%d subscriptions, want %d", got, n)
		}
	}
}

func newGate(perUID, total int) *peer.Gate { return peer.NewGate(perUID, total) }
