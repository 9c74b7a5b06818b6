package jwtauth_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-id/signet/jwtauth"
	"github.com/signet-id/signet/test/signettest"
)

// A world is a real CA and agent with a workload that is this process, and counts what is fetched.
type world struct {
	*signettest.Signet
	client  atomic.Pointer[workloadapi.Client]
	fetched atomic.Int64
	// began, if it is not nil, is told of each fetch.
	began chan struct{}
	// hold, if it is not nil, keeps a fetch until it is closed.
	hold atomic.Pointer[chan struct{}]
	// ahead is how far the clock of the cache is from the machine's.
	ahead atomic.Int64
}

func (w *world) now() time.Time { return time.Now().Add(time.Duration(w.ahead.Load())) }

func (w *world) FetchJWTSVID(ctx context.Context, p jwtsvid.Params) (*jwtsvid.SVID, error) {
	w.fetched.Add(1)
	if w.began != nil {
		w.began <- struct{}{}
	}
	if gate := w.hold.Load(); gate != nil {
		select {
		case <-*gate:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return w.client.Load().FetchJWTSVID(ctx, p)
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{Signet: signettest.Start(t, signettest.Config{})}
	w.Apply(fmt.Sprintf("kind: Identity\nname: me\nspiffeID: /me\nmatch: [\"unix:uid:%d\"]\n", os.Getuid()))
	w.connect(t)
	return w
}

// connect makes a new client of the agent, which does not wait as one does that has lost its agent.
func (w *world) connect(t *testing.T) {
	t.Helper()
	client, err := workloadapi.New(t.Context(), workloadapi.WithAddr(w.WorkloadAPI()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	w.client.Store(client)
}

func (w *world) cache(t *testing.T, change func(*jwtauth.Config)) *jwtauth.Cache {
	t.Helper()
	config := jwtauth.Config{Fetcher: w, Now: w.now, Log: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&config)
	}
	c, err := jwtauth.New(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func token(t *testing.T, c *jwtauth.Cache, audience string) *jwtauth.Token {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	got, err := c.Token(ctx, audience)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// eventually waits until the cache hands out another token than old.
func eventually(t *testing.T, c *jwtauth.Cache, audience string, old *jwtauth.Token) *jwtauth.Token {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		got, err := c.Token(ctx, audience)
		if err == nil && got != old {
			return got
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("no other token came: %v", err)
		}
	}
}

func TestAThousandCallersShareOneFetch(t *testing.T) {
	w := newWorld(t)
	c := w.cache(t, nil)
	gate := make(chan struct{})
	w.hold.Store(&gate)
	var wg sync.WaitGroup
	got := make([]*jwtauth.Token, 1000)
	var started sync.WaitGroup
	for i := range got {
		started.Add(1)
		wg.Go(func() {
			started.Done()
			var err error
			if got[i], err = c.Token(t.Context(), "documents"); err != nil {
				t.Error(err)
			}
		})
	}
	started.Wait()
	// One who does not want to wait any more does not take the token from the others.
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Token(gone, "documents"); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller that is gone: %v", err)
	}
	close(gate)
	wg.Wait()
	for _, g := range got {
		if g != got[0] {
			t.Fatal("two tokens")
		}
	}
	if n := w.fetched.Load(); n != 1 {
		t.Errorf("%d fetches", n)
	}
	if g := got[0]; g.ID != w.ID("/me") || g.TokenType != "Bearer" || strings.Count(g.AccessToken, ".") != 2 {
		t.Errorf("the token is of %s", g.ID)
	}
}

func TestAValidTokenNeedsNoAgent(t *testing.T) {
	w := newWorld(t)
	c := w.cache(t, func(c *jwtauth.Config) { c.FetchTimeout = time.Second })
	first := token(t, c, "documents")
	if err := w.StopAgent(); err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel() // whoever has a valid token does not even look whether it may wait
	life := time.Until(first.Expiry)
	w.ahead.Store(int64(life * 8 / 10)) // past the time of renewal
	for range 100 {
		if got, err := c.Token(ended, "documents"); err != nil || got != first {
			t.Fatalf("with the agent away: %v", err)
		}
	}
	w.ahead.Store(int64(life)) // away for so long that it ended
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if got, err := c.Token(ctx, "documents"); err == nil {
		t.Fatalf("a token that has ended: expires %s", got.Expiry)
	}
	w.ahead.Store(0)
	if err := w.RestartAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.connect(t)
	w.ahead.Store(int64(life * 9 / 10))
	eventually(t, c, "documents", first) // it was renewed behind, without anybody who waited
}

func TestTheClockIsSet(t *testing.T) {
	w := newWorld(t)
	c := w.cache(t, nil)
	first := token(t, c, "documents")
	w.ahead.Store(-int64(24 * time.Hour))
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if got, err := c.Token(ended, "documents"); err != nil || got != first {
		t.Errorf("set back by a day, the token is kept: %v", err)
	}
	w.ahead.Store(int64(24 * time.Hour))
	if _, err := c.Token(ended, "documents"); err == nil {
		t.Error("set forward by a day, a token of yesterday is handed out")
	}
	w.ahead.Store(0)
	if got := token(t, c, "documents"); got.Expiry.Before(time.Now()) {
		t.Errorf("set right again: %s", got.Expiry)
	}
}

func TestRefusedTokensAreRenewedOnceInAWhile(t *testing.T) {
	w := newWorld(t)
	// The agent has tokens of its own, so that another one comes only for another authority: what counts here is who asks.
	c := w.cache(t, nil)
	first := token(t, c, "documents")
	before := w.fetched.Load()
	for range 50 {
		c.Refused("documents", first)
	}
	eventually(t, c, "documents", first)
	for range 50 {
		c.Refused("documents", first) // it is not the present one
	}
	c.Refused("nobody", first)
	if n := w.fetched.Load() - before; n != 1 {
		t.Errorf("%d fetches", n)
	}
}

func TestBounds(t *testing.T) {
	w := newWorld(t)
	c := w.cache(t, func(c *jwtauth.Config) { c.MaxAudiences = 2 })
	a := token(t, c, "a")
	token(t, c, "b")
	if token(t, c, "a") != a {
		t.Error("a token was not kept")
	}
	token(t, c, "c") // b makes way
	before := w.fetched.Load()
	if token(t, c, "a") != a || w.fetched.Load() != before {
		t.Error("the one that was used last made way")
	}
	token(t, c, "b")
	if w.fetched.Load() != before+1 {
		t.Error("the one that was used longest ago was kept")
	}
	for _, audience := range []string{"", strings.Repeat("a", 3000)} {
		if _, err := c.Token(t.Context(), audience); err == nil {
			t.Errorf("an audience of %d bytes", len(audience))
		}
	}
	gate := make(chan struct{})
	w.hold.Store(&gate)
	slow := w.cache(t, func(c *jwtauth.Config) { c.FetchTimeout = 50 * time.Millisecond })
	if _, err := slow.Source("x").Token(); err == nil || !strings.Contains(err.Error(), "took longer than 50ms") {
		t.Errorf("an agent that does not answer: %v", err)
	}
	w.began = make(chan struct{}, 16)
	waiting := make(chan error, 1)
	other := w.cache(t, nil)
	go func() {
		_, err := other.Token(t.Context(), "x")
		waiting <- err
	}()
	<-w.began
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-waiting; !errors.Is(err, jwtauth.ErrClosed) {
		t.Errorf("who waited when it was closed: %v", err)
	}
	if _, err := other.Token(t.Context(), "x"); !errors.Is(err, jwtauth.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestATokenDoesNotPrintItself(t *testing.T) {
	w := newWorld(t)
	got := token(t, w.cache(t, nil), "documents")
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		if s := fmt.Sprintf(verb, *got) + fmt.Sprintf(verb, got); strings.Contains(s, got.AccessToken[:10]) {
			t.Errorf("%s prints it", verb)
		}
	}
}

func TestOthersTokensAreRefused(t *testing.T) {
	w := newWorld(t)
	c := w.cache(t, func(c *jwtauth.Config) { c.Subject = spiffeid.RequireFromPath(w.TrustDomain(), "/other") })
	if _, err := c.Token(t.Context(), "documents"); err == nil {
		t.Error("a token of an identity that this process does not have")
	}
	if _, err := jwtauth.New(jwtauth.Config{}); err == nil || !strings.Contains(err.Error(), "Fetcher") {
		t.Errorf("no Fetcher: %v", err)
	}
}

func uid() string { return fmt.Sprint(os.Getuid()) }
