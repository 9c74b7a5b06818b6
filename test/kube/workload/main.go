// Workload is what the pods of test/kube run, as a user of go-spiffe: it asks the agent at SPIFFE_ENDPOINT_SOCKET who it is, and
// calls others by what it gets.
//
//	workload who            prints "ids: " and the SPIFFE IDs that this process gets, or "ids: none", and waits
//	workload who once       the same, and ends
//	workload first          asks once, as its first deed, and prints "first: " and the SPIFFE IDs in order, or why there are none; then
//	                        it holds a stream. SIGTERM does not end it, so that it lives for as long as it is let
//	workload hold           holds a stream, and prints "svid: " with SPIFFE ID and serial number at each update
//	workload starts         prints "started: " and the time in nanoseconds of Unix as soon as it runs, and waits
//	workload svid           the same, and "svid: " and the time of its first X509-SVID, whose stream it holds
//	workload serve ADDR     serves HTTPS with mutual TLS to whoever is of its trust domain, and prints "serving"
//	workload call ADDR      calls that, over connections new and old, and asks the agent anew, all the time; prints every second
//	                        "calls: N failed: M fetches: N failed: M", and why one failed
//
// With SVID_FILES, a folder, serve and call ask no agent: they read credentials.pem (key and chain) and bundle.pem there at each
// handshake, and print "svid: " with SPIFFE ID and serial number whenever that is another.
//
//	workload private CMD... runs a command in a cgroup namespace of its own
//	workload plain ADDR     serves HTTP, knowing nothing of SPIFFE
//	workload get URL        gets that once, knowing nothing of SPIFFE, and prints "got: " with the status and what was answered
//	workload wait           waits
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "workload: error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch {
	case slices.Equal(args, []string{"starts"}), slices.Equal(args, []string{"svid"}):
		fmt.Println("started:", time.Now().UnixNano())
		if args[0] == "svid" {
			return firstSVID(ctx)
		}
		<-ctx.Done()
		return nil
	case slices.Equal(args, []string{"wait"}):
		<-ctx.Done()
		return nil
	case slices.Equal(args, []string{"who"}), slices.Equal(args, []string{"who", "once"}):
		ids, err := who(ctx)
		if err != nil {
			return err
		}
		fmt.Println("ids:", strings.Join(ids, " "))
		if len(args) == 1 {
			<-ctx.Done()
		}
		return nil
	case slices.Equal(args, []string{"hold"}):
		return hold(ctx)
	case slices.Equal(args, []string{"first"}):
		ctx := context.WithoutCancel(ctx)
		began := time.Now()
		ids, err := askOnce(ctx)
		fmt.Println("first:", strings.Join(ids, " "), errorText(err))
		fmt.Println("took:", time.Since(began).Round(time.Millisecond))
		return hold(ctx)
	case len(args) == 2 && args[0] == "serve":
		return serve(ctx, args[1])
	case len(args) == 2 && args[0] == "call":
		return call(ctx, args[1])
	case len(args) == 2 && args[0] == "plain":
		return plain(ctx, args[1])
	case len(args) == 2 && args[0] == "get":
		return getOnce(ctx, args[1])
	case len(args) > 1 && args[0] == "private":
		if err := syscall.Unshare(syscall.CLONE_NEWCGROUP); err != nil {
			return fmt.Errorf("a cgroup namespace (CAP_SYS_ADMIN is needed): %w", err)
		}
		return syscall.Exec(args[1], args[1:], os.Environ())
	}
	return errors.New("want who, who once, first, hold, starts, svid, serve ADDR, call ADDR, plain ADDR, get URL, private CMD... or wait")
}

// who asks until there is an answer. That there is no identity is one.
func who(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	client, err := workloadapi.New(ctx)
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
		if !wait(ctx, 200*time.Millisecond) {
			return nil, fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}

// askOnce returns the SPIFFE IDs of one answer in their order.
func askOnce(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	client, err := workloadapi.New(ctx)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	svids, err := client.FetchX509SVIDs(ctx)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, s := range svids {
		ids = append(ids, s.ID.Path())
	}
	return ids, nil
}

func errorText(err error) string {
	if err == nil {
		return "ok"
	}
	return "failed: " + err.Error()
}

// wait reports whether ctx lasted for so long.
func wait(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

func hold(ctx context.Context) error {
	client, err := workloadapi.New(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	err = client.WatchX509Context(ctx, &printer{})
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// firstSVID holds a stream from its first answer on. Before that it asks again all the time, as somebody in a hurry would.
func firstSVID(ctx context.Context) error {
	client, err := workloadapi.New(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	for {
		svid, err := client.FetchX509SVID(ctx)
		if err == nil {
			fmt.Println("svid:", time.Now().UnixNano(), svid.ID.Path())
			break
		}
		fmt.Println("none:", time.Now().UnixNano(), err)
		if !wait(ctx, 10*time.Millisecond) {
			return nil
		}
	}
	err = client.WatchX509Context(ctx, &printer{})
	if ctx.Err() != nil {
		return nil
	}
	return err
}

type printer struct{ mu sync.Mutex }

func (p *printer) OnX509ContextUpdate(c *workloadapi.X509Context) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range c.SVIDs {
		fmt.Printf("svid: %s %x\n", s.ID.Path(), s.Certificates[0].SerialNumber)
	}
}

func (p *printer) OnX509ContextWatchError(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Println("watch:", status.Code(err), err)
}
