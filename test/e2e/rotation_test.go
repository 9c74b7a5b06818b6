package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
)

// rotateOn makes the next step of a rotation from wherever the last one was left, and returns the authority that it
// brought into another state.
func rotateOn(ctx context.Context, c adminv1.AdminClient, kind adminv1.AuthorityType) (*adminv1.Authority, error) {
	list, err := c.ListAuthorities(ctx, &adminv1.ListAuthoritiesRequest{Type: kind})
	if err != nil {
		return nil, err
	}
	var change *adminv1.AuthorityChange
	for _, a := range list.Authorities {
		switch a.State {
		case "tainted":
			change, err = c.RevokeAuthority(ctx, &adminv1.EndAuthorityRequest{Type: kind, Id: a.Id})
		case "old":
			change, err = c.TaintAuthority(ctx, &adminv1.EndAuthorityRequest{Type: kind, Id: a.Id})
		case "prepared":
			var s adminv1.Admin_ActivateAuthorityClient
			if s, err = c.ActivateAuthority(ctx, &adminv1.ActivateAuthorityRequest{Type: kind, Id: a.Id, Wait: true}); err != nil {
				return nil, err
			}
			for change == nil && err == nil {
				var m *adminv1.ActivateAuthorityResponse
				m, err = s.Recv()
				change = m.GetChange()
			}
			if errors.Is(err, io.EOF) {
				err = nil
			}
		default:
			continue
		}
		return change.GetAuthority(), err
	}
	change, err = c.PrepareAuthority(ctx, &adminv1.PrepareAuthorityRequest{Type: kind})
	return change.GetAuthority(), err
}

// TestKilledCAWhileRotating kills the CA with SIGKILL at random moments while two operators rotate its authorities as fast
// as the agent lets them: no step that was acknowledged is lost, exactly one authority of each kind is active, the agent
// comes back, and the next command works.
func TestKilledCAWhileRotating(t *testing.T) {
	ctx := bounded(t, 2*time.Minute)
	f := newFleet(t)
	f.up(ctx)
	f.apply(ctx, identity("web"))
	f.await(ctx, "/web")
	src, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(f.endpoint())))
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	admin := adminv1.NewAdminClient(f.admin)
	kinds := []adminv1.AuthorityType{adminv1.AuthorityType_AUTHORITY_TYPE_X509, adminv1.AuthorityType_AUTHORITY_TYPE_JWT}
	rank := map[string]int{"prepared": 1, "active": 2, "old": 3, "tainted": 4, "revoked": 5}

	var mu sync.Mutex
	acked := map[string]string{} // authority → the furthest state that an operator was told
	steps := 0
	load, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	for _, kind := range kinds {
		wg.Go(func() {
			for load.Err() == nil {
				call, done := context.WithTimeout(load, 5*time.Second)
				a, err := rotateOn(call, admin, kind)
				done()
				if err != nil || a == nil {
					continue // the CA is dead, or the agent is not back yet
				}
				mu.Lock()
				if steps++; rank[a.State] > rank[acked[a.Id]] {
					acked[a.Id] = a.State
				}
				mu.Unlock()
			}
		})
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for round := range 5 {
		pause := time.NewTimer(time.Duration(300+rnd.IntN(700)) * time.Millisecond)
		<-pause.C
		f.ca.end(syscall.SIGKILL)
		if _, err := src.GetX509SVID(); err != nil {
			t.Errorf("round %d: the workload lost its SVID: %v", round, err)
		}
		f.ca.start()
		if err := eventually(ctx, func() error {
			list, err := admin.ListAuthorities(ctx, &adminv1.ListAuthoritiesRequest{})
			if err != nil {
				return err
			}
			active := map[adminv1.AuthorityType]int{}
			for _, a := range list.Authorities {
				if a.State == "active" {
					active[a.Type]++
				}
			}
			for _, kind := range kinds {
				if active[kind] != 1 {
					t.Errorf("round %d: %d authorities of %v are active", round, active[kind], kind)
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	wg.Wait()
	list, err := admin.ListAuthorities(ctx, &adminv1.ListAuthoritiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	now := map[string]string{}
	for _, a := range list.Authorities {
		now[a.Id] = a.State
	}
	for id, state := range acked {
		if is, known := now[id]; known && rank[is] < rank[state] || !known && state != "revoked" && state != "tainted" {
			t.Errorf("authority %s was acknowledged as %s and is %q", id, state, is)
		}
	}
	t.Logf("%d steps were acknowledged", steps)
	if steps < 8 {
		t.Errorf("only %d steps were acknowledged: the load did not run", steps)
	}
	// A whole rotation by hand works, and the workload moves along.
	for _, kind := range kinds {
		for done := ""; done != "revoked"; {
			if err := eventually(ctx, func() error {
				a, err := rotateOn(ctx, admin, kind)
				done = a.GetState()
				return err
			}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := eventually(ctx, func() error {
		svid, err := src.GetX509SVID()
		if err != nil {
			return err
		}
		bundle, err := src.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
		if err != nil {
			return err
		}
		for _, a := range bundle.X509Authorities() {
			if svid.Certificates[0].CheckSignatureFrom(a) == nil {
				return nil
			}
		}
		return fmt.Errorf("the workload's SVID is of none of its %d authorities", len(bundle.X509Authorities()))
	}); err != nil {
		t.Error(err)
	}
}
