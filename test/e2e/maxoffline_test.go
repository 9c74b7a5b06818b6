package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent"
	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/internal/dev"
	"github.com/signet-id/signet/policy/source"
	"github.com/signet-id/signet/test/keystores"
)

// An outage is a CA and an agent in this process, whose clock the test moves. The agent is started and stopped alone.
type outage struct {
	*dev.Instance
	t      *testing.T
	ctx    context.Context
	offset atomic.Int64
	config agent.Config // the agent's
	agent  *agent.Agent
	stop   func()
}

func (o *outage) now() time.Time { return time.Now().Add(time.Duration(o.offset.Load())) }

func (o *outage) pass(d time.Duration) { o.offset.Add(int64(d)) }

func newOutage(t *testing.T, change func(*agent.Config), docs string) *outage {
	t.Helper()
	dir, err := os.MkdirTemp("", "signet")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	o := &outage{t: t, ctx: bounded(t, 90*time.Second)}
	o.Instance, err = dev.Start(o.ctx, dev.Config{Dir: dir, Now: o.now, CA: func(c *ca.Config) { c.Audit.Reserve = 1 << 20 }, Agent: func(c *agent.Config) {
		change(c)
		o.config = *c
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Instance.Close() })
	conn, err := o.Admin()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := adminv1.NewAdminClient(conn).Apply(o.ctx, &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(docs), File: "t.yaml"}}}); err != nil {
		t.Fatal(err)
	}
	if err := eventually(o.ctx, func() error { _, err := o.fetch(); return err }); err != nil {
		t.Fatal(err)
	}
	if err := o.StopAgent(); err != nil { // everything is on its disk
		t.Fatal(err)
	}
	return o
}

// start starts the agent again, by itself.
func (o *outage) start() {
	o.t.Helper()
	a, err := agent.New(o.config)
	if err != nil {
		o.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	var once sync.Once
	o.agent, o.stop = a, func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				o.t.Error(err)
			}
		})
	}
	o.t.Cleanup(o.stop)
}

// fetch returns the path of this process's ID.
func (o *outage) fetch() (string, error) {
	svid, err := workloadapi.FetchX509SVID(o.ctx, workloadapi.WithAddr(o.WorkloadAPI()))
	if err != nil {
		return "", err
	}
	return svid.ID.Path(), nil
}

func (o *outage) wantServed(what string) {
	o.t.Helper()
	if id, err := o.fetch(); err != nil || id != "/web" {
		o.t.Errorf("%s: %q, %v; want /web", what, id, err)
	}
}

func (o *outage) wantNothing(what string) {
	o.t.Helper()
	if id, err := o.fetch(); status.Code(err) != codes.Unavailable {
		o.t.Errorf("%s: %q, %v; want Unavailable", what, id, err)
	}
}

// longLived is an identity whose SVIDs outlast max_offline.
var longLived = strings.Replace(identity("web"), "match:", "x509TTL: 12h\nmatch:", 1) + outagePolicies

// TestMaxOffline moves the clock past max_offline of two hours, of SVIDs that live for twelve: policies deny, what was
// restored is not served, and an agent that is started does not take the cache. With the CA everything is as before.
func TestMaxOffline(t *testing.T) {
	t.Parallel()
	o := newOutage(t, func(c *agent.Config) { c.MaxOffline = 2 * time.Hour }, longLived)
	if err := o.StopCA(); err != nil {
		t.Fatal(err)
	}
	o.pass(time.Hour)
	o.start()
	o.wantServed("an hour without a CA")
	policies, err := source.New(o.ctx, source.Options{Addr: o.WorkloadAPI(), Now: o.now})
	if err != nil {
		t.Fatal(err)
	}
	defer policies.Close()
	if !decide(t, policies.Policies(), "/caller") {
		t.Error("an hour without a CA: a call that the policy allows is denied")
	}
	if s := o.agent.Status(); s.RestoredAt.IsZero() || !strings.Contains(s.Detail, "serving from the sealed cache") || o.now().Sub(s.OfflineSince) < time.Hour {
		t.Errorf("status %+v", s)
	}
	o.pass(time.Hour + time.Minute)
	if decide(t, policies.Policies(), "/caller") {
		t.Error("past max_offline a call is allowed by the old policy")
	}
	o.wantNothing("past max_offline, what was restored")
	o.stop()
	o.start()
	o.wantNothing("an agent that is started past max_offline")
	if s := o.agent.Status(); s.Revision != 0 {
		t.Errorf("status %+v", s)
	}
	if err := o.RestartCA(o.ctx); err != nil {
		t.Fatal(err)
	}
	if err := eventually(o.ctx, func() error {
		if id, err := o.fetch(); err != nil || id != "/web" {
			return fmt.Errorf("with the CA back: %q, %w", id, err)
		}
		if !decide(t, policies.Policies(), "/caller") {
			return fmt.Errorf("with the CA back the policy's caller is denied")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// TestOutageHours is docs/operate/outages.md, hour by hour, for an agent that runs on: SVIDs of an hour and of twelve,
// policies until max_offline.
func TestOutageHours(t *testing.T) {
	t.Parallel()
	o := newOutage(t, func(c *agent.Config) {}, longLived+identity("hourly"))
	o.start()
	<-o.agent.Synced()
	client, err := workloadapi.New(o.ctx, workloadapi.WithAddr(o.WorkloadAPI()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	has := func(want int) {
		t.Helper()
		if err := eventually(o.ctx, func() error {
			svids, err := client.FetchX509SVIDs(o.ctx)
			if err == nil && len(svids) != want {
				err = fmt.Errorf("%d SVIDs, want %d", len(svids), want)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
	}
	has(2)
	policies, err := source.New(o.ctx, source.Options{Addr: o.WorkloadAPI(), Now: o.now})
	if err != nil {
		t.Fatal(err)
	}
	defer policies.Close()
	if err := o.StopCA(); err != nil {
		t.Fatal(err)
	}
	<-policies.Updated() // the first set
	told := func() error {
		if o.agent.Status().OfflineSince.IsZero() {
			return fmt.Errorf("the agent does not know that the CA is away")
		}
		return nil
	}
	if err := eventually(o.ctx, told); err != nil {
		t.Fatal(err)
	}
	select {
	case <-policies.Updated(): // that it is offline
	case <-o.ctx.Done():
		t.Fatal("workloads are not told that the CA is away")
	}
	has(2)
	o.pass(61 * time.Minute)
	has(1) // the SVID of an hour has ended
	o.pass(9 * time.Hour)
	has(1)
	if !decide(t, policies.Policies(), "/caller") {
		t.Error("after ten hours a call that the policy allows is denied")
	}
	o.pass(3 * time.Hour)
	o.wantNothing("past the end of an SVID of twelve hours")
	o.pass(12 * time.Hour)
	if decide(t, policies.Policies(), "/caller") {
		t.Error("after 25 hours a call is allowed by the old policy")
	}
}

// TestClockSetBackOverARestart: an SVID does not come back to life because the clock was set back while the agent was down.
func TestClockSetBackOverARestart(t *testing.T) {
	t.Parallel()
	o := newOutage(t, func(c *agent.Config) { c.MaxOffline = 48 * time.Hour }, identity("web"))
	if err := o.StopCA(); err != nil {
		t.Fatal(err)
	}
	o.pass(30 * time.Minute)
	o.start()
	o.wantServed("half an hour without a CA")
	o.pass(31 * time.Minute)
	o.wantNothing("past the SVID's end")
	o.stop() // with the clock as it is
	o.pass(-time.Hour)
	o.start()
	o.wantNothing("past the SVID's end, with the clock set back")
}

// TestKindsOfKeys restarts an agent without its CA with each kind of key.
func TestKindsOfKeys(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"file", "tpm"} {
		t.Run(kind, func(t *testing.T) {
			var sw *keystores.TPM
			o := newOutage(t, func(c *agent.Config) {
				c.SealedCache.Key = kind
				if kind == "tpm" {
					if sw == nil {
						sw = keystores.SWTPM(t)
					}
					c.SealedCache.TPMDevice = sw.Socket
				}
			}, identity("web"))
			old, err := os.ReadDir(filepath.Join(o.config.DataDir, "cache"))
			if err != nil || len(old) != 2 {
				t.Fatalf("the cache: %v, %v", old, err)
			}
			if err := o.StopCA(); err != nil {
				t.Fatal(err)
			}
			earlier := filepath.Join(t.TempDir(), "cache")
			if err := os.CopyFS(earlier, os.DirFS(filepath.Join(o.config.DataDir, "cache"))); err != nil {
				t.Fatal(err)
			}
			o.start()
			o.wantServed("after a restart")
			o.stop()
			// Whoever has the disk puts the cache of the run before back.
			if err := os.RemoveAll(filepath.Join(o.config.DataDir, "cache")); err != nil {
				t.Fatal(err)
			}
			if err := os.CopyFS(filepath.Join(o.config.DataDir, "cache"), os.DirFS(earlier)); err != nil {
				t.Fatal(err)
			}
			private(t, filepath.Join(o.config.DataDir, "cache"))
			o.start()
			if kind == "tpm" {
				o.wantNothing("from a cache that was put back")
			} else {
				o.wantServed("from a cache that was put back, which a file as key cannot detect")
			}
		})
	}
}

// private gives a copied folder the modes of the original.
func private(t *testing.T, dir string) {
	t.Helper()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := os.Chmod(filepath.Join(dir, f.Name()), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
