// Podagent is what the pods of test/kube run: a real agent, with a CA beside it, and workloads that ask it who they are.
//
//	podagent agent FILE     serves /run/signet-kube/agent.sock, with the Identities of a file, and prints "ready"; CGROUP_ROOTS in the
//	                        environment are the agent's cgroup_roots
//	podagent who            prints "ids: " and the SPIFFE IDs that this process gets, and waits
//	podagent who once       the same, and ends
//	podagent layouts        prints the cgroups of all that run this program, as the corpus of package container has them
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent"
	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/internal/dev"
)

const socket = "/run/signet-kube/agent.sock"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "podagent: error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch {
	case len(args) == 2 && args[0] == "agent":
		return serve(ctx, args[1])
	case len(args) > 0 && args[0] == "who":
		ids, err := who(ctx)
		if err != nil {
			return err
		}
		fmt.Println("ids:", strings.Join(ids, " "))
		if len(args) == 1 {
			<-ctx.Done()
		}
		return nil
	}
	if len(args) == 1 && args[0] == "layouts" {
		return layouts()
	}
	return errors.New("want agent FILE, who, who once, or layouts")
}

func serve(ctx context.Context, file string) error {
	documents, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	i, err := dev.Start(ctx, dev.Config{Dir: "/state/signet", Log: slog.New(slog.NewTextHandler(os.Stderr, nil)), Agent: func(c *agent.Config) {
		c.SocketPath = socket
		c.WorkloadAttestation.K8s = &agent.K8sAttestation{NodeNameEnv: "NODE_NAME", NamespaceLabels: []string{"team"}, CgroupRoots: strings.Fields(os.Getenv("CGROUP_ROOTS"))}
	}})
	if err != nil {
		return err
	}
	conn, err := i.Admin()
	if err == nil {
		_, err = adminv1.NewAdminClient(conn).Apply(ctx, &adminv1.ApplyRequest{Yes: true, Documents: []*adminv1.Document{{Content: documents, File: file}}})
		_ = conn.Close() // nothing more is asked
	}
	if err == nil {
		fmt.Println("ready")
		<-ctx.Done()
	}
	return errors.Join(err, i.Close())
}

func layouts() error {
	files, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		return err
	}
	for _, f := range append(files, "/proc/1/exe") {
		program, err := os.Readlink(f)
		dir := filepath.Dir(f)
		if dir != "/proc/1" && (err != nil || program != "/podagent") {
			continue // it has ended, or is somebody else's
		}
		cgroup, err := os.ReadFile(dir + "/cgroup")
		if err != nil {
			continue
		}
		args, _ := os.ReadFile(dir + "/cmdline") // it may have ended by now
		fmt.Printf("%s %s\n%s", dir, bytes.ReplaceAll(args, []byte{0}, []byte{' '}), cgroup)
	}
	return nil
}

// who asks until there is an answer. That there is no identity is one.
func who(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		return nil, err
	}
	defer client.Close()
	for {
		svids, err := client.FetchX509SVIDs(ctx)
		if status.Code(err) == codes.PermissionDenied {
			return []string{"none"}, nil
		}
		if err == nil {
			var ids []string
			for _, s := range svids {
				ids = append(ids, s.ID.Path())
			}
			slices.Sort(ids)
			return ids, nil
		}
		timer := time.NewTimer(200 * time.Millisecond)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil, fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case <-timer.C:
		}
	}
}
