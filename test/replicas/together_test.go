package replicas

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent/nodeattest"
	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/test/etcdtest"
)

// TestReplicas has three replicas be one CA: what is done at one holds at all.
func TestReplicas(t *testing.T) {
	f := newFleet(t, etcdtest.Start(t, etcdtest.Config{}), 3, "crl: {enabled: true}\nauthorities: {rotate: manual}\n")
	a, b, c := f.Replicas[0], f.Replicas[1], f.Replicas[2]
	a.Apply(identity())
	nodes := []*node{f.node(a.Addr, c.Token()), f.node(b.Addr, a.Token()), f.node(c.Addr, b.Token())}
	stop := f.traffic(nodes)
	defer stop()

	t.Run("OneBundleAndEpoch", func(t *testing.T) { oneBundle(t, f) })
	t.Run("ReadsSeeWritesOfOthers", func(t *testing.T) { readsSeeWrites(t, f) })
	t.Run("EntriesReachAgentsOfOthers", func(t *testing.T) {
		for i := range 5 {
			began := time.Now()
			f.Replicas[i%3].Apply(fmt.Sprintf("kind: Identity\nname: n%d\nspiffeID: /n%d\nmatch: [%q]\n", i, i, fmt.Sprint("unix:uid:", os.Getuid())))
			n := nodes[(i+1)%3]
			// The caller has an identity already, so that no call waits for one more.
			eventually(t, "the new identity at a node of another replica", func() error {
				ids, err := n.ids(t.Context())
				if err == nil && !ids[fmt.Sprintf("/n%d", i)] {
					err = fmt.Errorf("%v", ids)
				}
				return err
			})
			t.Logf("apply at %s to the SVID at an agent of another replica: %v", f.Replicas[i%3].Name, time.Since(began).Round(time.Millisecond))
		}
	})
	t.Run("TokenAtTwoReplicasAtOnce", func(t *testing.T) { tokenAtTwo(t, f) })
	t.Run("RotationWaitsForAgentsOfAll", func(t *testing.T) { rotation(t, f) })
	t.Run("RevocationsReachAgentsOfOthers", func(t *testing.T) {
		for i, n := range nodes {
			name := fmt.Sprintf("n%d", i)
			began := time.Now()
			f.Replicas[(i+1)%3].Apply(fmt.Sprintf("kind: Revocation\nname: %s\nid: /%s\nreason: test\n", name, name))
			eventually(t, "the revocation", func() error {
				ids, err := n.ids(t.Context())
				if err == nil && ids["/"+name] {
					return errors.New("the SVID is still served")
				}
				return err
			})
			t.Logf("revocation at %s to an agent of another replica: %v", f.Replicas[(i+1)%3].Name, time.Since(began).Round(time.Millisecond))
		}
	})
	t.Run("BanEndsFollowAtOthers", func(t *testing.T) { ban(t, f, nodes) })
}

func oneBundle(t *testing.T, f *fleet) {
	var ids []string
	for _, r := range f.Replicas {
		list, err := r.Admin.ListAuthorities(t.Context(), &adminv1.ListAuthoritiesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		var all []string
		for _, x := range list.Authorities {
			all = append(all, x.Id+" "+x.State)
		}
		ids = append(ids, strings.Join(all, ", "))
	}
	if ids[0] != ids[1] || ids[1] != ids[2] || ids[0] == "" {
		t.Errorf("the replicas have different authorities: %q", ids)
	}
}

// readsSeeWrites: an operator who wrote at one replica finds it at any other at once, whichever API is used.
func readsSeeWrites(t *testing.T, f *fleet) {
	for i := range 60 {
		at, then := f.Replicas[i%3], f.Replicas[(i+1)%3]
		made, err := entryv1.NewEntryClient(at.Conn).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: fmt.Sprintf("/read/%d", i)},
			ParentId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/nowhere"}, Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprint("uid:", 100_000+i)}}}}})
		if err != nil || made.Results[0].Status.Code != int32(codes.OK) {
			t.Fatalf("creating an entry at %s: %v, %v", at.Name, made, err)
		}
		id := made.Results[0].Entry.Id
		if _, err := entryv1.NewEntryClient(then.Conn).GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: id}); err != nil {
			t.Errorf("%s does not have what %s just acknowledged: %v", then.Name, at.Name, err)
		}
		gone, err := entryv1.NewEntryClient(then.Conn).BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{id}})
		if err != nil || gone.Results[0].Status.Code != int32(codes.OK) {
			t.Fatalf("deleting it at %s: %v, %v", then.Name, gone, err)
		}
		if _, err := entryv1.NewEntryClient(at.Conn).GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: id}); status.Code(err) != codes.NotFound {
			t.Errorf("%s still has what %s deleted: %v", at.Name, then.Name, err)
		}
	}
}

// tokenAtTwo: of two nodes that show one token to two replicas at the same moment, exactly one is let in.
func tokenAtTwo(t *testing.T, f *fleet) {
	for round := range 6 {
		token := f.Replicas[round%3].Token()
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var in atomic.Int64
		decided := make(chan struct{}, 2)
		for i := range 2 {
			a := f.newAgent(f.Replicas[(round+i)%3].Addr, token)
			wg.Go(func() {
				done := make(chan error, 1)
				go func() { done <- a.Run(ctx) }()
				select {
				case <-a.Ready():
					in.Add(1)
					decided <- struct{}{}
					<-done
				case <-done:
					decided <- struct{}{}
				case <-ctx.Done():
					<-done
				}
			})
		}
		<-decided // one is in, or refused for good
		// The other has been refused, or is: its token is used up for everybody but the winner's key. It never gets in.
		select {
		case <-decided:
		case <-time.After(time.Second):
		}
		cancel()
		wg.Wait()
		if n := in.Load(); n != 1 {
			t.Errorf("round %d: %d nodes got in with one token", round, n)
		}
	}
	list, err := agentv1.NewAgentClient(f.Replicas[0].Conn).ListAgents(t.Context(), &agentv1.ListAgentsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(list.Agents) != 3+6 {
		t.Errorf("%d agents are attested, want 3 and one for each of 6 tokens", len(list.Agents))
	}
	forget(t, f, 3)
}

// forget evicts the agents that are connected nowhere: a rotation would wait for them.
func forget(t *testing.T, f *fleet, left int) {
	t.Helper()
	eventually(t, "the agents that have ended to be gone", func() error {
		connected := map[string]bool{}
		all := map[string]bool{}
		for _, r := range f.Replicas {
			list, err := r.Admin.ListAgentStatus(t.Context(), &adminv1.ListAgentStatusRequest{})
			if err != nil {
				return err
			}
			for _, a := range list.Agents {
				all[a.AgentId] = true
				connected[a.AgentId] = connected[a.AgentId] || a.Connected
			}
		}
		n := 0
		for id := range all {
			if connected[id] {
				n++
			}
		}
		if n != left {
			return fmt.Errorf("%d agents follow, want %d", n, left)
		}
		for id := range all {
			if !connected[id] {
				if _, err := agentv1.NewAgentClient(f.Replicas[0].Conn).DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: &types.SPIFFEID{TrustDomain: "example.org", Path: spiffeid.RequireFromString(id).Path()}}); err != nil && status.Code(err) != codes.NotFound {
					return err
				}
			}
		}
		return nil
	})
}

// rotation: two replicas that prepare at once prepare one authority; it is activated by a replica that no agent needs to follow, once
// the agents of all of them have handed it on; and then the old one is tainted, replaced everywhere and revoked.
func rotation(t *testing.T, f *fleet) {
	for _, kind := range []adminv1.AuthorityType{adminv1.AuthorityType_AUTHORITY_TYPE_X509, adminv1.AuthorityType_AUTHORITY_TYPE_JWT} {
		before := authorities(t, f.Replicas[0], kind, "active")
		if len(before) != 1 {
			t.Fatalf("%d active authorities", len(before))
		}
		var wg sync.WaitGroup
		for _, r := range f.Replicas {
			wg.Go(func() {
				_, err := r.Admin.PrepareAuthority(t.Context(), &adminv1.PrepareAuthorityRequest{Type: kind})
				if code := status.Code(err); err != nil && code != codes.Aborted && code != codes.FailedPrecondition && code != codes.AlreadyExists && code != codes.Unavailable {
					t.Errorf("preparing at %s: %v", r.Name, err)
				}
			})
		}
		wg.Wait()
		prepared := authorities(t, f.Replicas[1], kind, "prepared")
		if len(prepared) != 1 {
			t.Fatalf("three replicas that prepared at once prepared %d authorities", len(prepared))
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		stream, err := f.Replicas[2].Admin.ActivateAuthority(ctx, &adminv1.ActivateAuthorityRequest{Type: kind, Id: prepared[0].Id, Wait: true})
		for err == nil {
			_, err = stream.Recv()
		}
		cancel()
		if !errors.Is(err, io.EOF) {
			t.Fatalf("activating: %v", err)
		}
		for _, r := range f.Replicas {
			if now := authorities(t, r, kind, "active"); len(now) != 1 || now[0].Id != prepared[0].Id {
				t.Errorf("%s has %v active, want %s", r.Name, now, prepared[0].Id)
			}
		}
		if _, err := f.Replicas[0].Admin.TaintAuthority(t.Context(), &adminv1.EndAuthorityRequest{Type: kind, Id: before[0].Id}); err != nil {
			t.Fatalf("tainting: %v", err)
		}
		eventually(t, "the wave", func() error {
			using := int64(0)
			for _, r := range f.Replicas {
				for _, a := range authorities(t, r, kind, "tainted") {
					using += int64(a.AgentsUsing)
				}
			}
			if using > 0 {
				return fmt.Errorf("%d agents use the tainted authority", using)
			}
			return nil
		})
		// The calls between the nodes go on until the test's end, and none of them may fail: so the old one stays trusted until
		// workloads have what replaced it, which the wave says of their agents.
	}
}

func authorities(t *testing.T, r *replica, kind adminv1.AuthorityType, state string) []*adminv1.Authority {
	t.Helper()
	list, err := r.Admin.ListAuthorities(t.Context(), &adminv1.ListAuthoritiesRequest{Type: kind})
	if err != nil {
		t.Fatal(err)
	}
	var out []*adminv1.Authority
	for _, a := range list.Authorities {
		if a.State == state {
			out = append(out, a)
		}
	}
	return out
}

// ban: an agent that follows one replica is banned at another, and learns it there and everywhere.
func ban(t *testing.T, f *fleet, nodes []*node) {
	token := f.Replicas[1].Token()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	a := f.newAgent(f.Replicas[1].Addr, token)
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	select {
	case <-a.Ready():
	case err := <-done:
		t.Fatal(err)
	case <-time.After(patience):
		t.Fatal("the agent did not become ready")
	}
	defer func() { cancel(); <-done }()
	id := "/spire/agent/join_token/" + tokenID(token)
	following := func(r *replica) (bool, error) {
		list, err := r.Admin.ListAgentStatus(t.Context(), &adminv1.ListAgentStatusRequest{})
		if err != nil {
			return false, err
		}
		for _, s := range list.Agents {
			if strings.HasSuffix(s.AgentId, id) {
				return s.Connected, nil
			}
		}
		return false, fmt.Errorf("no agent %s", id)
	}
	eventually(t, "the agent to follow", func() error {
		is, err := following(f.Replicas[1])
		if err == nil && !is {
			err = errors.New("it does not")
		}
		return err
	})
	began := time.Now()
	if _, err := agentv1.NewAgentClient(f.Replicas[0].Conn).BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: &types.SPIFFEID{TrustDomain: "example.org", Path: id}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the ban to end the stream at another replica", func() error {
		is, err := following(f.Replicas[1])
		if err == nil && is {
			err = errors.New("it still follows")
		}
		return err
	})
	t.Logf("ban at ca0 to the end of the stream at ca1: %v", time.Since(began).Round(time.Millisecond))
}

func tokenID(s nodeattest.Secret) string {
	id, _, _ := strings.Cut(string(s), ".")
	return id
}
