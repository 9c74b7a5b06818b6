package replicas

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent/nodeattest"
	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/test/etcdtest"
)

// rounds is how many processes are killed; SIGNET_REPLICAS_ROUNDS makes it more.
func rounds(t *testing.T, otherwise int) int {
	t.Helper()
	text := os.Getenv("SIGNET_REPLICAS_ROUNDS")
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("SIGNET_REPLICAS_ROUNDS=%s is not a positive number", text)
	}
	return n
}

// wait lets time go by under load; nothing waits for it.
func wait(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// try makes a change at replicas, any that answers, until one acknowledges it.
func (f *fleet) try(ctx context.Context, rnd *rand.Rand, what string, change func(*replica) error) bool {
	for ctx.Err() == nil {
		err := change(f.Replicas[rnd.IntN(len(f.Replicas))])
		switch status.Code(err) {
		case codes.OK:
			return true
		case codes.Unavailable, codes.Aborted, codes.DeadlineExceeded, codes.Canceled:
			wait(ctx, 20*time.Millisecond)
		default:
			f.t.Errorf("%s: %v", what, err)
			return false
		}
	}
	return false
}

// TestKilledAtRandomMoments kills, stops and restarts replicas and members of etcd while operators apply, revoke and rotate at whichever
// replica answers, nodes show one token at two, and workloads call each other: nothing that was acknowledged is lost, nobody is in who
// should not be, and no call fails.
func TestKilledAtRandomMoments(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	cluster := etcdtest.Start(t, etcdtest.Config{Members: 3})
	f := newFleet(t, cluster, 3, "authorities: {rotate: manual}\nttl: {x509: 1m, agent: 1m}\n")
	f.Replicas[0].Apply(identity())
	var nodes []*node
	for i := range 3 {
		nodes = append(nodes, f.node(f.Front.Addr(), f.Replicas[i].Token()))
	}
	stop := f.traffic(nodes)
	ctx, cancel := context.WithCancel(t.Context())
	var operators sync.WaitGroup

	// One applies and, of every second Identity, revokes the ID.
	var mu sync.Mutex
	acked, revoked := map[string]bool{}, map[string]bool{}
	operators.Go(func() {
		rnd := rand.New(rand.NewPCG(seed, 1))
		for n := 0; ctx.Err() == nil; n++ {
			name := fmt.Sprintf("k%d", n)
			apply := func(doc string) bool {
				return f.try(ctx, rnd, "apply", func(r *replica) error {
					rctx, cancel := context.WithTimeout(ctx, 5*time.Second)
					defer cancel()
					_, err := r.Admin.Apply(rctx, &adminv1.ApplyRequest{Yes: true, Documents: []*adminv1.Document{{Content: []byte(doc), File: "t.yaml"}}})
					return err
				})
			}
			if !apply(fmt.Sprintf("kind: Identity\nname: %s\nspiffeID: /%s\nmatch: [\"unix:uid:4000000000\"]\n", name, name)) {
				return
			}
			mu.Lock()
			acked[name] = true
			mu.Unlock()
			if n%2 == 0 && apply(fmt.Sprintf("kind: Revocation\nname: %s\nid: /%s\nreason: test\n", name, name)) {
				mu.Lock()
				revoked[name] = true
				mu.Unlock()
			}
			wait(ctx, 30*time.Millisecond)
		}
	})
	// One rotates, and is content with whatever succeeds.
	var rotated atomic.Int64
	operators.Go(func() {
		rnd := rand.New(rand.NewPCG(seed, 2))
		for ctx.Err() == nil {
			for _, kind := range []adminv1.AuthorityType{adminv1.AuthorityType_AUTHORITY_TYPE_X509, adminv1.AuthorityType_AUTHORITY_TYPE_JWT} {
				r := f.Replicas[rnd.IntN(3)]
				rctx, rcancel := context.WithTimeout(ctx, 20*time.Second)
				_, _ = r.Admin.PrepareAuthority(rctx, &adminv1.PrepareAuthorityRequest{Type: kind})
				list, err := f.Replicas[rnd.IntN(3)].Admin.ListAuthorities(rctx, &adminv1.ListAuthoritiesRequest{Type: kind})
				if err == nil {
					for _, a := range list.Authorities {
						if a.State != "prepared" {
							continue
						}
						stream, err := f.Replicas[rnd.IntN(3)].Admin.ActivateAuthority(rctx, &adminv1.ActivateAuthorityRequest{Type: kind, Id: a.Id, Wait: true})
						for err == nil {
							_, err = stream.Recv()
						}
						if err.Error() == "EOF" {
							rotated.Add(1)
						}
					}
				}
				rcancel()
				wait(ctx, 500*time.Millisecond)
			}
		}
	})
	// Pairs of nodes with one token each.
	type pair struct{ in atomic.Int64 }
	var pairs []*pair
	var tokens []string
	join := func() {
		p := &pair{}
		pairs = append(pairs, p)
		var token *adminv1.CreateJoinTokenResponse
		if !f.try(ctx, rnd, "token", func(r *replica) (err error) {
			rctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			token, err = r.Admin.CreateJoinToken(rctx, &adminv1.CreateJoinTokenRequest{})
			return err
		}) {
			return
		}
		tokens = append(tokens, token.Token)
		first := rnd.IntN(3)
		for i := range 2 {
			a := f.newAgent(f.Replicas[(first+i)%3].Addr, nodeattest.Secret(token.Token))
			operators.Go(func() {
				done := make(chan error, 1)
				go func() { done <- a.Run(ctx) }()
				select {
				case <-a.Ready():
					p.in.Add(1)
					<-done
				case <-done: // refused, or the test is over
				}
			})
		}
	}

	for range rounds(t, 5) {
		join()
		wait(ctx, time.Duration(rnd.IntN(600))*time.Millisecond)
		switch victim := rnd.IntN(3); rnd.IntN(4) {
		case 0:
			m := cluster.Members[victim]
			m.Kill()
			wait(ctx, time.Duration(rnd.IntN(1000))*time.Millisecond)
			m.Start(t)
			m.WaitHealthy(t)
		case 1: // as an upgrade does it
			for _, r := range f.Replicas {
				r.End(syscall.SIGTERM)
				r.Start()
				r.Answers()
			}
		default:
			r := f.Replicas[victim]
			r.End(syscall.SIGKILL)
			wait(ctx, time.Duration(rnd.IntN(1000))*time.Millisecond)
			r.Start()
			r.Answers()
		}
	}
	wait(ctx, 2*time.Second)
	cancel()
	operators.Wait()
	stop()

	t.Logf("%d Identities and %d Revocations acknowledged, %d rotations, %d tokens shown twice", len(acked), len(revoked), rotated.Load(), len(tokens))
	if len(acked) < 5 {
		t.Errorf("only %d applies were acknowledged: the test did not test", len(acked))
	}
	for i, p := range pairs {
		if n := p.in.Load(); n > 1 {
			t.Errorf("token %d let %d nodes in", i, n)
		}
	}
	var states []string
	for _, r := range f.Replicas {
		for _, kind := range []string{"Identity", "Revocation"} {
			want := acked
			if kind == "Revocation" {
				want = revoked
			}
			got, err := r.Admin.GetResources(t.Context(), &adminv1.GetResourcesRequest{Kind: kind})
			if err != nil {
				t.Fatal(err)
			}
			have := map[string]bool{}
			for _, x := range got.Resources {
				have[x.Name] = true
			}
			for name := range want {
				if !have[name] {
					t.Errorf("%s lost the %s %s, which was acknowledged", r.Name, kind, name)
				}
			}
		}
		list, err := r.Admin.ListAuthorities(t.Context(), &adminv1.ListAuthoritiesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		agents, err := agentv1.NewAgentClient(r.Conn).ListAgents(t.Context(), &agentv1.ListAgentsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		var all []string
		for _, a := range list.Authorities {
			all = append(all, a.Id+" "+a.State)
		}
		slices.Sort(all)
		states = append(states, fmt.Sprint(strings.Join(all, ","), len(agents.Agents)))
		if n := len(agents.Agents); n > len(nodes)+len(tokens) {
			t.Errorf("%s has %d agents, from %d tokens", r.Name, n, len(nodes)+len(tokens))
		}
	}
	if states[0] != states[1] || states[1] != states[2] {
		t.Errorf("the replicas ended in different states: %q", states)
	}
	for i, n := range nodes {
		ids, err := n.ids(t.Context())
		if err != nil || !ids["/me"] {
			t.Errorf("node %d ends with %v, %v", i, ids, err)
		}
	}
}

// TestWithoutEtcd takes etcd away from running replicas: workloads notice nothing, new ones on known nodes get their identities, and what
// needs a commit waits. Then it comes back from a snapshot: the replicas end, and started again bring every agent to the state there is.
func TestWithoutEtcd(t *testing.T) {
	cluster := etcdtest.Start(t, etcdtest.Config{})
	f := newFleet(t, cluster, 2, "")
	f.Replicas[0].Apply(identity())
	f.Replicas[0].Apply(fmt.Sprintf("kind: Identity\nname: before\nspiffeID: /before\nmatch: [%q]\n", fmt.Sprint("unix:uid:", os.Getuid())))
	nodes := []*node{f.node(f.Front.Addr(), f.Replicas[0].Token()), f.node(f.Front.Addr(), f.Replicas[1].Token())}
	snapshot := cluster.Snapshot(t)
	f.Replicas[1].Apply(fmt.Sprintf("kind: Identity\nname: after\nspiffeID: /after\nmatch: [%q]\n", fmt.Sprint("unix:uid:", os.Getuid())))
	for _, n := range nodes {
		eventually(t, "the later identity", func() error {
			ids, err := n.ids(t.Context())
			if err == nil && !ids["/after"] {
				err = fmt.Errorf("%v", ids)
			}
			return err
		})
	}
	stop := f.traffic(nodes)

	cluster.Members[0].Kill()
	for i, n := range nodes {
		if ids, err := n.ids(t.Context()); err != nil || !ids["/me"] || !ids["/after"] {
			t.Errorf("without etcd node %d has %v, %v", i, ids, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := f.Replicas[0].Admin.CreateJoinToken(ctx, &adminv1.CreateJoinTokenRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("a token without etcd = %v, want Unavailable", err)
	}
	if list, err := f.Replicas[0].Admin.GetResources(ctx, &adminv1.GetResourcesRequest{Kind: "Identity"}); err != nil || len(list.Resources) != 3 {
		t.Errorf("an operator who looks without etcd gets %v, %v", list, err)
	}
	cluster.Restore(t, snapshot)
	// Both end by themselves, for they know better, and are started again as a service manager does.
	for _, r := range f.Replicas {
		r.Ended()
		if s := r.Out.String(); !strings.Contains(s, "etcd went back to an earlier state") {
			t.Errorf("%s ended without saying that etcd was restored", r.Name)
		}
	}
	for _, r := range f.Replicas {
		r.Start()
	}
	for _, r := range f.Replicas {
		r.Answers()
	}
	for _, n := range nodes {
		eventually(t, "the state of the snapshot", func() error {
			ids, err := n.ids(t.Context())
			if err == nil && (ids["/after"] || !ids["/before"]) {
				err = fmt.Errorf("%v", ids)
			}
			return err
		})
	}
	stop()
	f.Replicas[1].Apply("kind: Identity\nname: again\nspiffeID: /again\nmatch: [\"unix:uid:4000000000\"]\n")
}
