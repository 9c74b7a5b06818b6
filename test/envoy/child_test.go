package envoy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// childEnv makes the test binary be an SDS client that changes its user while its stream is open.
const childEnv = "SIGNET_TEST_SDS_CLIENT"

const otherUID = 4321

// child subscribes to everything, prints the names of each response on a line, and takes on another effective user when it
// reads a line.
func child(socket string) int {
	err := func() error {
		conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		defer conn.Close()
		stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(context.Background())
		if err != nil {
			return err
		}
		if err := stream.Send(&discoveryv3.DiscoveryRequest{}); err != nil {
			return err
		}
		in := bufio.NewScanner(os.Stdin)
		for {
			resp, err := stream.Recv()
			if err != nil {
				return err
			}
			var names []string
			for _, r := range resp.Resources {
				var secret tlsv3.Secret
				if err := r.UnmarshalTo(&secret); err != nil {
					return err
				}
				names = append(names, secret.Name)
			}
			fmt.Println(strings.Join(names, " "))
			if !in.Scan() {
				return nil
			}
			if err := syscall.Seteuid(otherUID); err != nil {
				return err
			}
			if err := stream.Send(&discoveryv3.DiscoveryRequest{ResponseNonce: resp.Nonce, ResourceNames: []string{"*", "default"}}); err != nil {
				return err
			}
		}
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		return 1
	}
	return 0
}

// TestWAPI_16_EachPushLooksAgain: a process that becomes another user while its stream is open is sent what the other user
// may have, and nothing more of what it was.
func TestWAPI_16_EachPushLooksAgain(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to have a process that changes its user")
	}
	n := start(t)
	n.Apply(document("as-root", 0))
	n.Apply(document("as-other", otherUID))
	cmd := exec.CommandContext(bounded(t), os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+n.AgentSocket())
	cmd.Stderr = os.Stderr
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
	lines := bufio.NewScanner(out)
	for i, want := range []string{"spiffe://example.org spiffe://example.org/as-root", "default spiffe://example.org spiffe://example.org/as-other"} {
		if !lines.Scan() || lines.Text() != want {
			t.Errorf("response %d has %q (%v), want %q", i, lines.Text(), lines.Err(), want)
		}
		if i == 0 {
			if _, err := fmt.Fprintln(in); err != nil {
				t.Fatal(err)
			}
		}
	}
	in.Close()
	if err := cmd.Wait(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
}
