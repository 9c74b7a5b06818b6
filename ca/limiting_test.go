package ca

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/test/spireclient"
)

// limitedTo is a configuration with one limit, and calls that wait for next to nothing.
func limitedTo(t *testing.T, name string, l Limit) Config {
	c := config(t.TempDir())
	c.Limits.each(func(n string, one *Limit) {
		if n == name {
			*one = l
		}
	})
	c.Limits.MaxWait = time.Millisecond
	return c
}

// from is the CA as seen from a loopback address.
func (h *harness) from(address string) spireclient.Server {
	return spireclient.Server{Addr: h.ca.Addr().String(), TrustDomain: td, Source: address}
}

// retryAfter checks that a refusal carries a hint.
func retryAfter(t *testing.T, err error) time.Duration {
	t.Helper()
	if code(err) != codes.ResourceExhausted {
		t.Fatalf("%v; want ResourceExhausted", err)
	}
	for _, d := range status.Convert(err).Details() {
		if r, ok := d.(*errdetails.RetryInfo); ok && r.RetryDelay.AsDuration() > 0 {
			return r.RetryDelay.AsDuration()
		}
	}
	t.Fatalf("no retry hint in %v", status.Convert(err).Proto())
	return 0
}

func (h *harness) flooded(name string) float64 {
	h.t.Helper()
	all, err := h.ca.metrics.registry.Gather()
	if err != nil {
		h.t.Fatal(err)
	}
	for _, f := range all {
		if f.GetName() == "signet_ca_calls_limited_total" {
			for _, m := range f.Metric {
				if m.Label[0].GetValue() == name {
					return m.Counter.GetValue()
				}
			}
		}
	}
	return 0
}

// TestFloodFromOneAddressHindersNoOther: whoever floods the CA from one address keeps no node at another one out.
func TestFloodFromOneAddressHindersNoOther(t *testing.T) {
	h := start(t, limitedTo(t, "attest", Limit{Rate: 1, Burst: 3}))
	evil := h.from("127.0.0.66")
	request := csr(t, key(t))
	ctx, end := context.WithCancel(t.Context())
	begun := time.Now()
	var flood sync.WaitGroup
	var refused, let atomic.Int64
	for range 8 {
		flood.Go(func() {
			conn, err := evil.Dial(nil, nil)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			for ctx.Err() == nil {
				_, err := spireclient.Attest(ctx, conn, spireclient.Evidence{Type: "join_token", Payload: []byte("aaaaaaaaaaaaa.aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")}, request)
				switch code(err) {
				case codes.ResourceExhausted:
					refused.Add(1)
				case codes.InvalidArgument:
					let.Add(1)
				case codes.Canceled:
				default:
					t.Errorf("the flood got %v", err)
				}
			}
		})
	}
	until(t, "the flood is refused", func() bool { return refused.Load() > 100 })
	for i := range 12 { // three nodes at each of four addresses, as many as one may let in at once
		a, err := h.from(fmt.Sprint("127.0.0.", 2+i/3)).Join(t.Context(), h.token())
		if err != nil {
			t.Fatalf("a node at another address: %v", err)
		}
		if _, err := a.Sync(t.Context()); err != nil {
			t.Errorf("its first sync: %v", err)
		}
		a.Close()
	}
	until(t, "the flood goes on", func() bool { return refused.Load() > 1000 })
	end()
	flood.Wait()
	if most := 3 + 1 + int64(time.Since(begun)/time.Second); let.Load() > most {
		t.Errorf("%d attempts of the flood were looked at, at most %d should be", let.Load(), most)
	}
	if h.flooded("attest") < 1000 {
		t.Errorf("the metric counts %v refusals", h.flooded("attest"))
	}
	// The refused ones of a flood are counted, not logged one by one.
	if n := len(h.audit("call.refused", "agent.attest")); n > int(let.Load()) {
		t.Errorf("%d audit records of a flood of which %d were looked at", n, let.Load())
	}
	conn, err := evil.Dial(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for range 4 { // the burst may have come back
		_, err = spireclient.Attest(t.Context(), conn, spireclient.Evidence{Type: "join_token", Payload: []byte("x")}, request)
	}
	if d := retryAfter(t, err); d > 2*time.Second {
		t.Errorf("to be retried after %v, at a rate of one a second", d)
	}
	if !strings.Contains(err.Error(), "limits.attest") {
		t.Errorf("%v does not say which limit", err)
	}
}

func TestConnectionFloodFromOneAddress(t *testing.T) {
	h := start(t, limitedTo(t, "connections", Limit{Rate: 1, Burst: 3}))
	bundle := func(s spireclient.Server) error {
		conn, err := s.Dial(nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, err = bundlev1.NewBundleClient(conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
		return err
	}
	refused := 0
	for range 20 {
		if bundle(h.from("127.0.0.66")) != nil {
			refused++
		}
	}
	if refused < 10 || h.flooded("connections") == 0 {
		t.Errorf("%d of 20 connections were refused", refused)
	}
	if err := bundle(h.from("127.0.0.2")); err != nil {
		t.Errorf("from another address: %v", err)
	}
}

func TestAnonymousGetBundleIsLimited(t *testing.T) {
	h := start(t, limitedTo(t, "bundle", Limit{Rate: 1, Burst: 5}))
	get := func(api bundlev1.BundleClient) (err error) {
		for range 7 {
			if _, err = api.GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil {
				return err
			}
		}
		return nil
	}
	a, err := h.from("127.0.0.2").Join(t.Context(), h.token()) // takes one
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	conn, err := h.from("127.0.0.66").Dial(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	retryAfter(t, get(bundlev1.NewBundleClient(conn)))
	// An agent has its own allowance, wherever it calls from.
	b := *a
	b.Server.Source = "127.0.0.66"
	if b.Conn, err = b.Server.Dial(b.Chain, b.Key); err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := b.FetchBundle(t.Context()); err != nil {
		t.Errorf("an agent at the address of a flood: %v", err)
	}
	// The admin socket has no limit.
	for range 3 {
		if err := get(bundlev1.NewBundleClient(h.admin)); err != nil {
			t.Errorf("on the admin socket: %v", err)
		}
	}
}

// TestSignaturesOfOneAgentAreLimited: a batch costs its length, in both RPCs that sign X509-SVIDs together.
func TestSignaturesOfOneAgentAreLimited(t *testing.T) {
	h := start(t, limitedTo(t, "x509", Limit{Rate: 1, Burst: 500}))
	a, b := h.join(), h.join()
	h.create(under(a.ID.Path(), "a", "/a", "unix:uid:1"), under(b.ID.Path(), "b", "/b", "unix:uid:1"))
	request := csr(t, key(t))
	batch := func(x *spireclient.Agent, n int) error {
		_, err := x.SVIDAPI().BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: slices.Repeat([]*svidv1.NewX509SVIDParams{{EntryId: "a", Csr: request}}, n)})
		return err
	}
	if err := batch(a, 501); code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "at most 500") {
		t.Errorf("a batch of 501: %v", err)
	}
	if err := batch(a, 400); err != nil {
		t.Errorf("a batch of 400: %v", err)
	}
	if d := retryAfter(t, batch(a, 200)); d < 80*time.Second || d > 101*time.Second {
		t.Errorf("200 when 100 or so are left: retry after %v", d)
	}
	_, err := nodev1.NewNodeClient(a.Conn).IssueX509SVIDs(t.Context(), &nodev1.IssueX509SVIDsRequest{Items: slices.Repeat([]*nodev1.IssueX509SVIDsRequest_Item{{EntryId: "a"}}, 200)})
	retryAfter(t, err)
	if err := batch(a, 50); err != nil {
		t.Errorf("50 of what is left: %v", err)
	}
	if err := batch(b, 500); err != nil {
		t.Errorf("another agent at the same address: %v", err)
	}
	if _, err := a.SVIDAPI().NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: "a", Audience: []string{"x"}}); err != nil {
		t.Errorf("JWT-SVIDs have their own limit: %v", err)
	}
}

// TestEveryCallOfAnAgentIsLimited: whatever a node may call that was stolen has a limit, or it could keep the CA busy and fill
// the audit log as fast as it can send.
func TestEveryCallOfAnAgentIsLimited(t *testing.T) {
	for method, kind := range methods() {
		if kind&(access.Agent|access.Downstream|access.Anyone) != 0 && limited[method] == "" && method != bundlev1.Bundle_PublishWITAuthority_FullMethodName {
			t.Errorf("%s has no limit", method)
		}
	}
	c := limitedTo(t, "jwt", Limit{Rate: 1, Burst: 500})
	c.WIT.Enabled = true
	h := start(t, c)
	a := h.join()
	wits := func(n int) error {
		_, err := a.SVIDAPI().BatchNewWITSVID(t.Context(), &svidv1.BatchNewWITSVIDRequest{Params: slices.Repeat([]*svidv1.NewWITSVIDParams{{EntryId: "not its own"}}, n)})
		return err
	}
	if err := wits(400); err != nil {
		t.Fatal(err)
	}
	retryAfter(t, wits(400))
	if n := len(h.audit("witsvid.refused")); n != 400 {
		t.Errorf("%d audit records of a flood, want 400", n)
	}
}

// TestLimitComesBeforeTheStore: an agent that was evicted, and calls on, costs the store no more than its allowance.
func TestLimitComesBeforeTheStore(t *testing.T) {
	h := start(t, limitedTo(t, "renew", Limit{Rate: 1, Burst: 5}))
	a := h.join()
	mustSync(t, a)
	if _, err := agentv1.NewAgentClient(h.admin).DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: pid(a.ID.Path())}); err != nil {
		t.Fatal(err)
	}
	reads := func() (n uint64) {
		all, err := h.ca.metrics.registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range all {
			if f.GetName() == "signet_ca_store_seconds" {
				for _, m := range f.Metric {
					if m.Label[0].GetValue() == "get" {
						n = m.Histogram.GetSampleCount()
					}
				}
			}
		}
		return n
	}
	before, denied := reads(), 0
	for range 100 {
		_, err := a.AgentAPI().RenewAgent(t.Context(), &agentv1.RenewAgentRequest{})
		switch code(err) {
		case codes.PermissionDenied:
			denied++
		case codes.ResourceExhausted:
		default:
			t.Fatal(err)
		}
	}
	if n := reads() - before; n > uint64(denied) || denied > 10 || denied < 5 {
		t.Errorf("100 calls of an evicted agent: %d were judged, %d reads of the store", denied, n)
	}
}

func TestLimitsConfiguration(t *testing.T) {
	base := "trust_domain: example.org\ndata_dir: /x\nseal: {key_file: /x/k}\n"
	for doc, want := range map[string]string{
		"limits: {attest: {rate: -2}}":      "limits.attest.rate",
		"limits: {x509: {burst: 499}}":      "limits.x509.burst",
		"limits: {jwt: {burst: -1}}":        "limits.jwt.burst",
		"limits: {max_wait: 9s}":            "limits.max_wait",
		"limits: {max_wait: -1s}":           "limits.max_wait",
		"limits: {attests: {rate: 1}}":      "attests",
		"limits: {attest: {rate: 1, b: 2}}": "b",
	} {
		if _, err := ReadConfig([]byte(base+doc), "ca.yaml"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want an error that names %s", doc, err, want)
		}
	}
	c, err := ReadConfig([]byte(base+"limits: {attest: {rate: 100}, renew: {rate: -1}, x509: {rate: 50}}"), "ca.yaml")
	if err != nil {
		t.Fatal(err)
	}
	l := c.Limits
	if l.Attest != (Limit{100, 100}) || l.Renew.Rate != Unlimited || l.X509SVIDs != (Limit{50, 1000}) || l.JWTSVIDs != (Limit{500, 1000}) || l.MaxWait != 5*time.Second {
		t.Errorf("%+v", l)
	}
}

// TestConnectionsThatWaitDoNotHoldTheCA: what waits for its turn when the CA is told to stop is let go.
func TestConnectionsThatWaitDoNotHoldTheCA(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c Config
		c.Limits.Connections, c.Limits.MaxWait = Limit{Rate: 1, Burst: 1}, maxMaxWait
		l := newLimiter(&CA{c: c})
		from := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1}
		if err := l.connect(from); err != nil {
			t.Fatal(err)
		}
		begun, done := time.Now(), make(chan error, 1)
		go func() { done <- l.connect(from) }()
		synctest.Wait()
		l.stop()
		if err := <-done; !errors.Is(err, context.Canceled) || time.Since(begun) != 0 {
			t.Errorf("%v after %v", err, time.Since(begun))
		}
	})
}
