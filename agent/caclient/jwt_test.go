package caclient

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent/internal/faultca"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// An issuer is a queue's CA that answers when it is let.
type issuer struct {
	gate chan struct{} // an answer for each value; closed: all

	mu      sync.Mutex
	batches []int
}

func (i *issuer) issue(_ context.Context, batch []*jwtRequest) ([]jwtAnswer, error) {
	i.mu.Lock()
	i.batches = append(i.batches, len(batch))
	i.mu.Unlock()
	<-i.gate
	answers := make([]jwtAnswer, len(batch))
	for n, r := range batch {
		answers[n].svid.Token = r.entryID + " for " + strings.Join(r.audience, "+")
	}
	return answers, nil
}

func (i *issuer) sizes() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return fmt.Sprint(i.batches)
}

// asked is what became of a request.
type asked struct {
	token string
	err   error
}

func ask(ctx context.Context, q *jwtQueue, entryID string) <-chan asked {
	c := make(chan asked, 1)
	go func() {
		svid, err := q.ask(ctx, entryID, []string{"x", "y"})
		c <- asked{svid.Token, err}
	}()
	return c
}

// A waiter that spins would keep synctest.Wait from returning.
func TestJWTRequestsShareCallsAndWaitInPeace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := &issuer{gate: make(chan struct{})}
		q := newJWTQueue(ca.issue)
		var all []<-chan asked
		for i := range maxJWTFlight {
			all = append(all, ask(t.Context(), q, fmt.Sprint(i)))
			synctest.Wait()
		}
		for i := range MaxBatch + 1 {
			all = append(all, ask(t.Context(), q, fmt.Sprint(maxJWTFlight+i)))
		}
		synctest.Wait()
		ca.gate <- struct{}{} // one call ends: what has gathered shares the next
		synctest.Wait()
		close(ca.gate)
		for i, c := range all {
			if a := <-c; a.err != nil || a.token != fmt.Sprint(i)+" for x+y" {
				t.Errorf("request %d got %q, %v", i, a.token, a.err)
			}
		}
		if got, want := ca.sizes(), fmt.Sprint([]int{1, 1, MaxBatch, 1}); got != want {
			t.Errorf("the calls carried %s, want %s", got, want)
		}
		// Requests that come together, while there is room for more calls, do not spin for it either.
		ca.gate = make(chan struct{})
		a, b := ask(t.Context(), q, "a"), ask(t.Context(), q, "b")
		synctest.Wait()
		close(ca.gate)
		if (<-a).err != nil || (<-b).err != nil {
			t.Error("one of two requests that came together failed")
		}
	})
}

func TestJWTLeaderThatGoesLeavesTheBatchBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := &issuer{gate: make(chan struct{})}
		q := newJWTQueue(ca.issue)
		ctx, cancel := context.WithCancel(t.Context())
		leaders := []<-chan asked{ask(ctx, q, "0"), ask(ctx, q, "1")}
		synctest.Wait()
		waiting := ask(t.Context(), q, "waiting") // waits for a place
		gone := ask(ctx, q, "gone")
		synctest.Wait()
		cancel()
		for _, c := range append(leaders, gone) {
			select {
			case a := <-c:
				if !errors.Is(a.err, context.Canceled) {
					t.Errorf("a caller that went got %v", a.err)
				}
			case <-time.After(time.Second):
				t.Error("a caller that went waits for the CA")
			}
		}
		close(ca.gate)
		if a := <-waiting; a.err != nil {
			t.Errorf("the caller that stayed got %v", a.err)
		}
		synctest.Wait()
		if got := ca.sizes(); got != "[1 1 1]" && got != "[2 1]" {
			t.Errorf("the calls carried %s: who went is still asked for", got)
		}
		if len(q.flight) != 0 || len(q.waiting) != 0 {
			t.Errorf("%d places and %d requests are left over", len(q.flight), len(q.waiting))
		}
	})
}

func TestJWTQueueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := &issuer{gate: make(chan struct{})}
		q := newJWTQueue(ca.issue)
		var all []<-chan asked
		for i := range maxJWTFlight {
			all = append(all, ask(t.Context(), q, fmt.Sprint(i)))
			synctest.Wait()
		}
		for i := range maxJWTQueue {
			all = append(all, ask(t.Context(), q, fmt.Sprint(i)))
		}
		synctest.Wait()
		if a := <-ask(t.Context(), q, "too many"); status.Code(a.err) != codes.Unavailable {
			t.Errorf("one request beyond %d: %v, want Unavailable", maxJWTQueue, a.err)
		}
		close(ca.gate)
		for _, c := range all {
			if a := <-c; a.err != nil {
				t.Fatal(a.err)
			}
		}
		if a := <-ask(t.Context(), q, "again"); a.err != nil {
			t.Errorf("after the queue has emptied: %v", a.err)
		}
	})
}

func TestJWTBatchWithABadItem(t *testing.T) {
	ca := faultca.Start(t, "/spire/server")
	hold := make(chan struct{})
	entered := make(chan int, 1000)
	ca.IssueJWT = func(_ context.Context, r *nodev1.IssueJWTSVIDsRequest) (*nodev1.IssueJWTSVIDsResponse, error) {
		entered <- len(r.GetItems())
		<-hold
		response := &nodev1.IssueJWTSVIDsResponse{}
		for _, item := range r.GetItems() {
			result := &nodev1.IssueJWTSVIDsResponse_Result{Token: "token of " + item.GetEntryId(), IssuedAt: 10, ExpiresAt: 20}
			switch item.GetEntryId() {
			case "refused":
				result = &nodev1.IssueJWTSVIDsResponse_Result{Code: int32(codes.NotFound), Message: "no such entry"}
			case "empty":
				result.Token = ""
			case "backwards":
				result.ExpiresAt = 9
			}
			response.Results = append(response.Results, result)
		}
		return response, nil
	}
	x := run(t, ca)
	wait(t, "sync", x.synced)
	first := []<-chan asked{ask(t.Context(), x.client.jwt, "0"), ask(t.Context(), x.client.jwt, "1")}
	for n := 0; n < len(first); {
		n += wait(t, "the first calls", entered)
	}
	names := []string{"good", "refused", "empty", "backwards", "fine"}
	var all []<-chan asked
	for _, name := range names {
		all = append(all, ask(t.Context(), x.client.jwt, name))
	}
	close(hold)
	for i, c := range all {
		a := wait(t, "the answer for "+names[i], c)
		switch names[i] {
		case "good", "fine":
			if a.err != nil || a.token != "token of "+names[i] {
				t.Errorf("%s: %q, %v", names[i], a.token, a.err)
			}
		case "refused":
			if status.Code(a.err) != codes.NotFound {
				t.Errorf("refused: %v, want NotFound", a.err)
			}
		default:
			if a.err == nil || !strings.Contains(a.err.Error(), "unusable") {
				t.Errorf("%s: %q, %v", names[i], a.token, a.err)
			}
		}
	}
	for _, c := range first {
		wait(t, "the first answers", c)
	}
	ca.Lock()
	ca.IssueJWT = func(context.Context, *nodev1.IssueJWTSVIDsRequest) (*nodev1.IssueJWTSVIDsResponse, error) {
		return &nodev1.IssueJWTSVIDsResponse{}, nil
	}
	ca.Unlock()
	if _, err := x.client.NewJWTSVID(t.Context(), "1", []string{"x"}); err == nil || !strings.Contains(err.Error(), "1 items with 0 results") {
		t.Errorf("an answer without results: %v", err)
	}
}

func TestJWTCallersHearOfACAThatGoesMidCall(t *testing.T) {
	ca := faultca.Start(t, "/spire/server")
	entered := make(chan int, 1000)
	ca.IssueJWT = func(ctx context.Context, r *nodev1.IssueJWTSVIDsRequest) (*nodev1.IssueJWTSVIDsResponse, error) {
		entered <- len(r.GetItems())
		<-ctx.Done()
		return nil, ctx.Err()
	}
	x := run(t, ca)
	wait(t, "sync", x.synced)
	var all []<-chan asked
	for i := range 20 {
		all = append(all, ask(t.Context(), x.client.jwt, fmt.Sprint(i)))
	}
	wait(t, "the first call", entered)
	ca.Stop()
	for _, c := range all {
		if a := wait(t, "an answer", c); a.err == nil || errors.Is(a.err, context.DeadlineExceeded) {
			t.Errorf("the CA is gone and the answer is %q, %v", a.token, a.err)
		}
	}
	wait(t, "the loss of contact", x.lost)
	if _, err := x.client.NewJWTSVID(t.Context(), "1", []string{"x"}); !errors.Is(err, ErrUnreachable) && status.Code(err) != codes.Unavailable {
		t.Errorf("without a CA: %v", err)
	}
}

func TestLostIsToldOncePerContact(t *testing.T) {
	ca := faultca.Start(t, "/spire/server")
	cut := make(chan struct{})
	ca.Follow = func(s nodev1.Node_FollowServer, _ string) error {
		answered := make(chan error, 1)
		go func() { answered <- ca.Answer(s) }()
		select {
		case err := <-answered:
			return err
		case <-cut:
			return status.Error(codes.Unavailable, "cut")
		}
	}
	x := run(t, ca)
	wait(t, "sync", x.synced)
	next := agentSVID(t, ca)
	x.mu.Lock()
	x.svid = next
	x.mu.Unlock()
	x.client.Reconnect()
	wait(t, "sync over the new connection", x.synced)
	if len(x.lost) != 0 {
		t.Error("a connection that another takes the place of counts as a loss")
	}
	cut <- struct{}{}
	wait(t, "the loss", x.lost)
	wait(t, "sync after the loss", x.synced)
	ca.Stop()
	wait(t, "the second loss", x.lost)
}
