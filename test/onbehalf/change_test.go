package onbehalf

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent"
)

// playDelegate follows a workload, says what comes, and becomes the program that its input names, with the connection
// still open.
func playDelegate(socket string) int {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		fmt.Println("error", err)
		return 1
	}
	cc, err := grpc.NewClient("passthrough:agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return conn, nil }))
	if err != nil {
		fmt.Println("error", err)
		return 1
	}
	go func() {
		stream, err := delegatedv1.NewDelegatedIdentityClient(cc).SubscribeToX509SVIDs(context.Background(),
			&delegatedv1.SubscribeToX509SVIDsRequest{Selectors: []*types.Selector{{Type: "k8s", Value: "ns:shop"}}})
		for err == nil {
			var m *delegatedv1.SubscribeToX509SVIDsResponse
			if m, err = stream.Recv(); err == nil {
				fmt.Println("svids", paths(m))
			}
		}
		fmt.Println("end", status.Code(err))
	}()
	lines := bufio.NewScanner(os.Stdin)
	if !lines.Scan() {
		return 0
	}
	f, err := conn.(*net.UnixConn).File()
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_SETFD, 0) // not to be closed by exec
	}
	if err == nil {
		err = syscall.Exec(lines.Text(), []string{lines.Text()}, []string{sniffEnv + "=" + fmt.Sprint(f.Fd()), childEnv + "=1"})
	}
	fmt.Println("error", err)
	return 1
}

// sniffEnv makes this program say what comes on an inherited connection.
const sniffEnv = "SIGNET_TEST_SNIFF"

func sniff(fd string) {
	var n uintptr
	fmt.Sscan(fd, &n)
	conn, err := net.FileConn(os.NewFile(n, "inherited"))
	if err != nil {
		fmt.Println("error", err)
		return
	}
	fmt.Println("sniffing")
	read := make(chan []byte, 1)
	go func() {
		all, _ := io.ReadAll(io.LimitReader(conn, 1<<20))
		read <- all
	}()
	io.Copy(io.Discard, os.Stdin) // until the test has seen enough
	conn.SetReadDeadline(time.Now())
	fmt.Println("sniffed", strings.Contains(string(<-read), "shop"))
}

// TestDelegateThatBecomesAnotherProgram: a delegate's connection that another program inherits by exec, in the same
// process, brings that program nothing.
func TestDelegateThatBecomesAnotherProgram(t *testing.T) {
	w := newWorld(t, func(_ *world, c *agent.Config) { c.AdminSocket.AuthorizedDelegates = []string{"/speaker"} })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(w.ctx, self)
	cmd.Env = append(os.Environ(), delegateEnv+"="+w.AgentAdminSocket())
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		in.Close()
		cmd.Process.Kill()
		cmd.Wait()
	}()
	lines := bufio.NewScanner(out)
	next := func(want string) string {
		t.Helper()
		if !lines.Scan() || !strings.HasPrefix(lines.Text(), want) {
			t.Fatalf("the delegate says %q (%v), want %q", lines.Text(), lines.Err(), want)
		}
		return lines.Text()
	}
	next("svids") // none yet
	fmt.Fprintln(in, w.program)
	next("sniffing")
	w.Apply("kind: Identity\nname: shop\nspiffeID: /shop\nmatch: [\"k8s:ns:shop\"]\n")
	// The agent looks at the delegate before it sends, finds another program, and ends the call.
	w.log.await(t, "the calling process is not what it was")
	in.Close()
	next("sniffed false")
}
