package nodeapi

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/bolt"
)

// TestNoListFromAnIndexThatLags: an agent drops what is not in the answer, so a replica that has not seen what was
// committed before the call must not answer with what it has.
func TestNoListFromAnIndexThatLags(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	st, err := bolt.Open(bolt.Config{Dir: t.TempDir(), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	td := spiffeid.RequireTrustDomainFromString("example.org")
	reg, err := registry.Open(t.Context(), registry.Config{TrustDomain: td, Store: st, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	// Nobody runs the registry, so it never sees this.
	if _, err := st.Commit(t.Context(), nil, []store.Write{{Key: "other/x", Value: []byte("y")}}); err != nil {
		t.Fatal(err)
	}
	a := New(Config{TrustDomain: td, Registry: reg, Log: log})
	a.catchUp /= 100
	if r, err := a.GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("%v, %v; want Unavailable", r, err)
	}
}

// mute is a stream of an agent that neither says nor reads anything.
type mute struct {
	grpc.ServerStream
	ctx context.Context
}

func (m mute) Context() context.Context { return m.ctx }
func (m mute) Send(*entryv1.SyncAuthorizedEntriesResponse) error {
	<-m.ctx.Done()
	return m.ctx.Err()
}
func (m mute) Recv() (*entryv1.SyncAuthorizedEntriesRequest, error) {
	<-m.ctx.Done()
	return nil, m.ctx.Err()
}

func TestSyncDoesNotWaitForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, hangUp := context.WithCancel(t.Context())
		a := New(Config{})
		begun := time.Now()
		done := make(chan error, 1)
		go func() { done <- a.SyncAuthorizedEntries(mute{ctx: ctx}) }()
		select {
		case err := <-done:
			if status.Code(err) != codes.DeadlineExceeded || time.Since(begun) != maxSync {
				t.Errorf("after %v: %v", time.Since(begun), err)
			}
		case <-time.After(10 * maxSync):
			t.Error("a stream that says nothing is held for ever")
		}
		if len(a.syncs) != 0 {
			t.Errorf("streams are still counted: %v", a.syncs)
		}
		go func() { done <- a.SyncAuthorizedEntries(mute{ctx: ctx}) }()
		synctest.Wait()
		a.Shutdown()
		if err := <-done; status.Code(err) != codes.Unavailable {
			t.Errorf("while the CA shuts down: %v", err)
		}
		hangUp() // as gRPC does when the handler returns
	})
}
