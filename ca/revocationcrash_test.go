package ca

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
)

// killedVariable makes the test's program a CA on the directory that it names.
const killedVariable = "SIGNET_TEST_KILLED_CA"

// serveUntilKilled is the child's whole life.
func serveUntilKilled(dir string) {
	ca, err := New(context.Background(), config(dir))
	if err == nil {
		fmt.Println("ready")
		err = ca.Run(context.Background())
	}
	fmt.Fprintln(os.Stderr, "the CA that is to be killed ended:", err)
	os.Exit(1)
}

// TestRevocationsSurviveAKill: a CA that is killed as soon as the command has its answer, before or while agents are told, has
// revoked all the same: they hear of it from the next one, and nothing is issued.
func TestRevocationsSurviveAKill(t *testing.T) {
	dir := t.TempDir()
	h := start(t, config(dir))
	h.apply("kind: Identity\nname: web\nspiffeID: /web\nmatch: [\"unix:uid:1\"]\n")
	a := h.agent()
	f := followRevoked(t, a)
	f.until("it follows", func() bool { return f.shots == 1 })
	h.close()
	for round := range 4 {
		child := exec.CommandContext(t.Context(), os.Args[0])
		child.Env = append(os.Environ(), killedVariable+"="+dir)
		child.Stderr = os.Stderr
		child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
			t.Fatalf("the child says %q: %v", line, err)
		}
		admin, err := grpc.NewClient("unix://"+config(dir).AdminSocket.Path, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		_, err = adminv1.NewAdminClient(admin).Apply(t.Context(), &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(revocation(fmt.Sprintf("r%d", round), "id: /web")), File: "t"}}})
		if kill := child.Process.Kill(); err != nil || kill != nil {
			t.Fatalf("apply: %v; kill: %v", err, kill)
		}
		_ = child.Wait() // killed
		admin.Close()
		h = start(t, config(dir))
		a.conn = h.dial(a.chain, a.key)
		f.resume(a)
		f.until("what was revoked before the kill is there", func() bool { return f.items[fmt.Sprintf("r%d", round)] != nil })
		if len(f.items) != round+1 {
			t.Errorf("round %d: %v", round, f.items)
		}
		if _, c := x509For(t, a, "identity.web"); c.String() != "PermissionDenied" {
			t.Errorf("round %d: %v", round, c)
		}
		h.close()
	}
}
