package workloadapi_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"

	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi"
	"github.com/signet-id/signet/workloadapi/peer"
)

// A gradual attestor finds out more after a while, or fails.
type gradual struct {
	all, fails atomic.Bool
	asked      chan struct{}
}

func (g *gradual) Attest(ctx context.Context, p *peer.Process) (workloadapi.Caller, error) {
	select {
	case g.asked <- struct{}{}:
	default:
	}
	c, err := byState{}.Attest(ctx, p)
	switch {
	case g.fails.Load():
		return workloadapi.Caller{}, errors.New("the kubelet is away")
	case g.all.Load():
		c.Selectors = append(c.Selectors, spiffe.Selector{Type: "test", Value: "container:web"})
	default:
		c.Provisional = true
	}
	return c, err
}

// A provisional caller is answered at once. Its stream is told what it has by what is found out later, also for an entry that came
// meanwhile; and while that cannot be found out it keeps what it has.
func TestProvisionalCallers(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a, entry{match: everyone, identity: a.identity(t, "/pod")})
	g := &gradual{asked: make(chan struct{}, 1)}
	e := serve(t, src, func(c *workloadapi.Config) { c.Attestor = g })
	client := e.client(t)
	stream, err := client.FetchX509SVID(spiffeCtx(t), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got := recv(t, stream); len(got.Svids) != 1 {
		t.Fatalf("the first message has %d SVIDs, want one", len(got.Svids))
	}
	if got, err := client.FetchJWTSVID(spiffeCtx(t), &workload.JWTSVIDRequest{Audience: []string{"x"}}); err != nil || len(got.Svids) != 1 {
		t.Errorf("a unary call has %v, %v", got, err)
	}

	src.change(func() {
		src.entries = append(src.entries, entry{match: having("test:container:web"), identity: a.identity(t, "/container")})
	})
	g.fails.Store(true)
	for range 2 { // one of them began after it
		within(t, "another look", g.asked)
	}
	g.fails.Store(false)
	g.all.Store(true)
	if got := recv(t, stream); len(got.Svids) != 2 {
		t.Errorf("once all is known there are %d SVIDs, want two", len(got.Svids))
	}
	src.change(func() { src.entries = src.entries[1:] })
	if got := recv(t, stream); len(got.Svids) != 1 {
		t.Errorf("then there are %d SVIDs, want one", len(got.Svids))
	}
}
