package workloadapi_test

import (
	"context"
	"crypto"
	"encoding/json"
	"fmt"
	"os"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"github.com/signet-id/signet/workloadapi"
)

// A witMemory is a memory with a WIT-SVID for each identity whose hint is not "slow", and WIT bundles.
type witMemory struct {
	*memory
	wit map[spiffeid.TrustDomain]map[string]crypto.PublicKey
	n   int // of the WIT-SVIDs
}

func (m *witMemory) Watch(ctx context.Context, c workloadapi.Caller) (<-chan workloadapi.Update, error) {
	return m.with(ctx, c, func(u *workloadapi.Update) {})
}

func (m *witMemory) WatchWIT(ctx context.Context, c workloadapi.Caller) (<-chan workloadapi.Update, error) {
	return m.with(ctx, c, func(u *workloadapi.Update) {
		var ready []workloadapi.Identity
		for _, i := range u.Identities {
			if i.Hint == "slow" {
				u.Pending = true
				continue
			}
			i.WIT = &workloadapi.WITSVID{Token: fmt.Sprintf("token %d of %s", m.n, i.ID), Key: `{"kty":"EC"}`}
			ready = append(ready, i)
		}
		u.Identities = ready
	})
}

func (m *witMemory) with(ctx context.Context, c workloadapi.Caller, change func(*workloadapi.Update)) (<-chan workloadapi.Update, error) {
	in, err := m.memory.Watch(ctx, c)
	if err != nil {
		return nil, err
	}
	out := make(chan workloadapi.Update)
	go func() {
		defer close(out)
		for u := range in {
			m.mu.Lock()
			u.WITBundles = m.wit
			change(&u)
			m.mu.Unlock()
			select {
			case out <- u:
			case <-ctx.Done():
			}
		}
	}()
	return out, nil
}

// serveWIT serves two identities to everyone, /a and /b, of which /b federates with other.example.
func serveWIT(t *testing.T, change func(*witMemory)) (*witMemory, workload.SpiffeWorkloadAPIClient) {
	t.Helper()
	own, other := newAuthority(t, "example.org", "k1"), newAuthority(t, "other.example", "k2")
	a, b := own.identity(t, "/a"), own.identity(t, "/b")
	b.FederatesWith = []spiffeid.TrustDomain{other.td}
	b.Hint = "internal"
	m := &witMemory{memory: newMemory(own, entry{match: everyone, identity: a}, entry{match: everyone, identity: b}), wit: map[spiffeid.TrustDomain]map[string]crypto.PublicKey{
		own.td: {"w1": newKey(t).Public(), "": newKey(t).Public()}, other.td: {"w2": newKey(t).Public()},
		spiffeid.RequireTrustDomainFromString("stranger.example"): {"w3": newKey(t).Public()},
	}}
	if change != nil {
		change(m)
	}
	e := serve(t, m, func(c *workloadapi.Config) { c.WIT = m })
	return m, e.client(t)
}

func TestWAPI_72_WAPI_73_AllWITsOrTheOneAskedFor(t *testing.T) {
	m, c := serveWIT(t, nil)
	stream, err := c.FetchWITSVID(spiffeCtx(t), &workload.WITSVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	got, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Svids) != 2 || got.Svids[0].SpiffeId != "spiffe://example.org/a" || got.Svids[1].Hint != "internal" {
		t.Fatalf("the first message is %v", got)
	}
	for _, s := range got.Svids {
		if s.WitSvid == "" || s.WitSvidKey == "" {
			t.Errorf("%s lacks its token or key", s.SpiffeId)
		}
	}
	m.change(func() { m.n = 1 })
	if got, err = stream.Recv(); err != nil || got.Svids[0].WitSvid != "token 1 of spiffe://example.org/a" {
		t.Errorf("after a renewal: %v (%v)", got, err)
	}

	one, err := c.FetchWITSVID(spiffeCtx(t), &workload.WITSVIDRequest{SpiffeId: "spiffe://example.org/b"})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := one.Recv(); err != nil || len(got.Svids) != 1 || got.Svids[0].SpiffeId != "spiffe://example.org/b" {
		t.Errorf("asked for /b: %v (%v)", got, err)
	}
	m.change(func() { m.entries = m.entries[:1] })
	_, err = one.Recv()
	wantCode(t, err, codes.PermissionDenied)
}

func TestWAPI_75_WITsOfOthers(t *testing.T) {
	m, c := serveWIT(t, nil)
	ask := func(id string) error {
		stream, err := c.FetchWITSVID(spiffeCtx(t), &workload.WITSVIDRequest{SpiffeId: id})
		if err != nil {
			return err
		}
		_, err = stream.Recv()
		return err
	}
	wantCode(t, ask("spiffe://example.org/c"), codes.PermissionDenied)
	wantCode(t, ask("spiffe://example.org/"), codes.InvalidArgument, "spiffe_id")
	m.change(func() { m.entries = nil })
	wantCode(t, ask(""), codes.PermissionDenied)
	bundles, err := c.FetchWITBundles(spiffeCtx(t), &workload.WITBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = bundles.Recv()
	wantCode(t, err, codes.PermissionDenied)
}

// TestWITOnItsWay: an identity whose WIT-SVID is not there yet is no reason to say no.
func TestWITOnItsWay(t *testing.T) {
	m, c := serveWIT(t, func(m *witMemory) { m.entries[1].identity.Hint = "slow" })
	stream, err := c.FetchWITSVID(spiffeCtx(t), &workload.WITSVIDRequest{SpiffeId: "spiffe://example.org/b"})
	if err != nil {
		t.Fatal(err)
	}
	m.change(func() { m.n++ }) // an update without it
	m.change(func() { m.entries[1].identity.Hint = "" })
	if got, err := stream.Recv(); err != nil || len(got.Svids) != 1 {
		t.Errorf("%v (%v)", got, err)
	}
}

func TestWAPI_76_WAPI_77_WITBundles(t *testing.T) {
	_, c := serveWIT(t, nil)
	stream, err := c.FetchWITBundles(spiffeCtx(t), &workload.WITBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	got, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Bundles) != 2 {
		t.Fatalf("the bundles are %v, want the own and the one that an identity federates with", got.Bundles)
	}
	for td, kid := range map[string]string{"spiffe://example.org": "w1", "spiffe://other.example": "w2"} {
		var set struct{ Keys []map[string]string }
		if err := json.Unmarshal([]byte(got.Bundles[td]), &set); err != nil {
			t.Fatalf("%s: %v", td, err)
		}
		if len(set.Keys) != 1 || set.Keys[0]["kid"] != kid || set.Keys[0]["use"] != "wit-svid" {
			t.Errorf("the bundle of %s is %s", td, got.Bundles[td])
		}
	}
}

func TestWITProfileIsPinnedLikeTheOthers(t *testing.T) {
	m, _ := serveWIT(t, nil)
	m.change(func() {
		m.entries[0].match = having(fmt.Sprintf("unix:uid:%d", os.Geteuid()+1))
		m.entries = m.entries[:1]
	})
	e := serve(t, m, func(c *workloadapi.Config) { c.WIT = m })
	stream, err := e.client(t).FetchWITSVID(spiffeCtx(t), &workload.WITSVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	wantCode(t, err, codes.PermissionDenied, "no identity issued")
}
