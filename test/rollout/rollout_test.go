// Package rollout tests staged roll-outs of call policies on a real CA and agent: over restarts of both, and rolled back by
// calls that a real service denies.
package rollout

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/httpauthz"
	"github.com/signet-id/signet/policy/source"
	"github.com/signet-id/signet/test/signettest"
)

const (
	identities = "kind: Identity\nname: documents\nspiffeID: /documents\nmatch: [unix:uid:%[1]d]\n---\nkind: Identity\nname: reader\nspiffeID: /reader\nmatch: [unix:uid:%[1]d]\n"
	before     = "kind: CallPolicy\nname: documents\nservice: /documents\nallow:\n  - from: [/reader]\n  - from: [/other]\n"
	after      = "kind: CallPolicy\nname: documents\nservice: /documents\nallow:\n  - from: [/other]\n"
	within     = time.Minute
)

type world struct {
	*signettest.Signet
	t        *testing.T
	ctx      context.Context
	policies *source.Source
	rollouts adminv1.RolloutsClient
}

func start(t *testing.T) *world {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	t.Cleanup(cancel)
	w := &world{Signet: signettest.Start(t, signettest.Config{Log: slog.New(slog.DiscardHandler)}), t: t, ctx: ctx}
	w.Apply(fmt.Sprintf(identities, os.Getuid()))
	w.Apply(before)
	var err error
	if w.policies, err = source.New(ctx, source.Options{Addr: w.WorkloadAPI(), Log: slog.New(slog.DiscardHandler)}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.policies.Close() })
	w.rollouts = adminv1.NewRolloutsClient(w.AdminConn())
	w.decided("before any roll-out", true, "")
	return w
}

// until waits for what comes by itself.
func (w *world) until(what string, f func() error) {
	w.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-w.ctx.Done():
			w.t.Fatalf("%s: %v", what, err)
		case <-tick.C:
		}
	}
}

func (w *world) decide() policy.Decision {
	return w.policies.Policies().Decide(&policy.Request{Service: w.ID("/documents"), Peer: w.ID("/reader")})
}

// decided waits until calls of the reader are decided so, and a denial names the roll-out that is to blame.
func (w *world) decided(what string, allowed bool, rollout string) {
	w.t.Helper()
	w.until(what, func() error {
		if d := w.decide(); d.Allowed != allowed || d.Rollout != rollout || d.FormerlyAllowed != (rollout != "") {
			return fmt.Errorf("decided %+v, want allowed %t and roll-out %q", d, allowed, rollout)
		}
		return nil
	})
}

func (w *world) state(name string) *adminv1.Rollout {
	w.t.Helper()
	r, err := w.rollouts.ListRollouts(w.ctx, &adminv1.ListRolloutsRequest{Name: name})
	if err != nil || len(r.GetRollouts()) != 1 {
		w.t.Fatalf("roll-out %q: %v, %v", name, r, err)
	}
	return r.GetRollouts()[0]
}

// begin starts roll-outs of the stricter policy until the agent is on the wanted side of one.
func (w *world) begin(first bool) (name string) {
	w.t.Helper()
	for i := range 60 {
		name = fmt.Sprintf("try-%t-%d", first, i)
		if _, err := w.rollouts.StartRollout(w.ctx, &adminv1.StartRolloutRequest{Name: name, Steps: []int32{50}, Bake: 3600, MaxDenials: 0, Yes: true,
			Documents: []*adminv1.Document{{Content: []byte(after), File: "test.yaml"}}}); err != nil {
			w.t.Fatal(err)
		}
		if (w.state(name).GetFirstAgents() == 1) == first {
			return name
		}
		if _, err := w.rollouts.AbortRollout(w.ctx, &adminv1.AbortRolloutRequest{Name: name}); err != nil {
			w.t.Fatal(err)
		}
	}
	w.t.Fatal("the agent never is on that side")
	return ""
}

// TestRestartsInTheMiddle: an agent and a CA that are restarted during a roll-out leave every agent on its side.
func TestRestartsInTheMiddle(t *testing.T) {
	for _, first := range []bool{true, false} {
		t.Run(fmt.Sprintf("among the first %t", first), func(t *testing.T) {
			w := start(t)
			name := w.begin(first)
			blamed := ""
			if first {
				blamed = name
			}
			w.decided("in the roll-out", !first, blamed)
			restart := func(what string, do func(context.Context) error) {
				t.Helper()
				if err := do(w.ctx); err != nil {
					t.Fatal(err)
				}
				// What arrives after the restart is shown by a change that has nothing to do with it.
				revision := w.Apply(fmt.Sprintf("kind: CallPolicy\nname: other\nservice: /documents\nallow:\n  - from: [/after-%s]\n", what))
				w.until("a change after the restart of the "+what, func() error {
					if _, have := w.policies.Policies().Revision(); have < revision {
						return fmt.Errorf("revision %d, want %d", have, revision)
					}
					return nil
				})
				w.decided("after the restart of the "+what, !first, blamed)
			}
			restart("agent", func(ctx context.Context) error { return errors.Join(w.StopAgent(), w.RestartAgent(ctx)) })
			restart("ca", func(ctx context.Context) error { return errors.Join(w.StopCA(), w.RestartCA(ctx)) })
			if r := w.state(name); r.GetState() != "running" || r.GetPercent() != 50 {
				t.Errorf("the roll-out is %v", r)
			}
			if _, err := w.rollouts.PromoteRollout(w.ctx, &adminv1.PromoteRolloutRequest{Name: name, All: true}); err != nil {
				t.Fatal(err)
			}
			w.decided("everywhere", false, "")
		})
	}
}

// TestDenialsRollBack: a service whose calls are denied by the new version brings the former one back.
func TestDenialsRollBack(t *testing.T) {
	w := start(t)
	svids, err := workloadapi.NewX509Source(w.ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(w.WorkloadAPI())))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { svids.Close() })
	as := func(path string) x509svid.Source {
		return pick{svids, w.ID(path).String(), w.WorkloadAPI(), w.ctx}
	}
	authorizer, err := httpauthz.New(httpauthz.Config{Policies: w.policies, Service: w.ID("/documents"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	server := authorizer.Server(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), as("/documents"), svids)
	server.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.ServeTLS(l, "", "")
	}()
	t.Cleanup(func() { server.Close(); <-done })
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: tlsconfig.MTLSClientConfig(as("/reader"), svids, tlsconfig.AuthorizeID(w.ID("/documents")))}}
	get := func() error {
		request, err := http.NewRequestWithContext(w.ctx, http.MethodGet, "https://"+l.Addr().String()+"/", nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return errors.New(response.Status)
		}
		return nil
	}
	if err := get(); err != nil {
		t.Fatal(err)
	}
	name := w.begin(true)
	w.until("a denied call", func() error {
		if get() == nil {
			return errors.New("it is allowed")
		}
		return nil
	})
	w.until("the roll-back", func() error {
		if r := w.state(name); r.GetState() != "rolled_back" || r.GetDenials() == 0 {
			return fmt.Errorf("the roll-out is %v", r)
		}
		return nil
	})
	w.until("calls as before", get)
	w.decided("after the roll-back", true, "")
}

// pick is one of several identities.
type pick struct {
	*workloadapi.X509Source
	id, addr string
	ctx      context.Context
}

// GetX509SVID returns the SVID of the ID.
func (p pick) GetX509SVID() (*x509svid.SVID, error) {
	all, err := workloadapi.FetchX509SVIDs(p.ctx, workloadapi.WithAddr(p.addr))
	if err != nil {
		return nil, err
	}
	for _, s := range all {
		if s.ID.String() == p.id {
			return s, nil
		}
	}
	return nil, errors.New("no such SVID")
}
