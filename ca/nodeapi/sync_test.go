package nodeapi

import (
	"log/slog"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
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
