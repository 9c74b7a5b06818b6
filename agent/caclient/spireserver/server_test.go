package spireserver

import (
	"context"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("example.org")

// A server answers as a SPIRE server does, from what tests set, over a real connection. What it sends can be replaced.
type server struct {
	entryv1.UnimplementedEntryServer
	bundlev1.UnimplementedBundleServer

	mu      sync.Mutex
	entries map[string]*types.Entry
	page    int
	bundle  *types.Bundle
	foreign map[string]*types.Bundle
	refuse  map[string]error // by trust domain
	old     bool             // without SyncAuthorizedEntries
	asked   []string         // ids that were asked for in full
	// script replaces the answers of SyncAuthorizedEntries.
	script func(entryv1.Entry_SyncAuthorizedEntriesServer) error
	// between is called between the revisions and the entries.
	between func()

	conn *grpc.ClientConn
}

func startServer(t testing.TB) *server {
	t.Helper()
	s := &server{entries: map[string]*types.Entry{}, page: 500, bundle: bundleOf(td.Name(), 1), foreign: map[string]*types.Bundle{}, refuse: map[string]error{}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	entryv1.RegisterEntryServer(g, s)
	bundlev1.RegisterBundleServer(g, s)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	if s.conn, err = grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.conn.Close()
		g.Stop()
		<-served
	})
	return s
}

func bundleOf(name string, sequence uint64) *types.Bundle {
	return &types.Bundle{TrustDomain: name, SequenceNumber: sequence, X509Authorities: []*types.X509Certificate{{Asn1: []byte("root of " + name)}},
		JwtAuthorities: []*types.JWTKey{{KeyId: "k1", PublicKey: []byte("key")}}}
}

func entryOf(id string, revision int64, federates ...string) *types.Entry {
	return &types.Entry{Id: id, RevisionNumber: revision, CreatedAt: 1_700_000_000, SpiffeId: &types.SPIFFEID{TrustDomain: td.Name(), Path: "/" + id},
		Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}}, FederatesWith: federates}
}

// set puts entries into the server.
func (s *server) set(entries ...*types.Entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range entries {
		s.entries[e.Id] = e
	}
}

func (s *server) drop(ids ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ids {
		delete(s.entries, id)
	}
}

func (s *server) all() (ids []string, entries []*types.Entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ids = slices.Sorted(maps.Keys(s.entries))
	for _, id := range ids {
		entries = append(entries, proto.Clone(s.entries[id]).(*types.Entry))
	}
	return ids, entries
}

func (s *server) SyncAuthorizedEntries(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
	s.mu.Lock()
	old, script, between := s.old, s.script, s.between
	s.mu.Unlock()
	if old {
		return status.Error(codes.Unimplemented, "unknown method SyncAuthorizedEntries")
	}
	if script != nil {
		return script(stream)
	}
	r, err := stream.Recv()
	if err != nil {
		return err
	}
	if len(r.Ids) > 0 || !r.OutputMask.GetRevisionNumber() || !r.OutputMask.GetCreatedAt() || r.OutputMask.GetParentId() {
		return status.Errorf(codes.InvalidArgument, "mask %v", r.OutputMask)
	}
	ids, entries := s.all()
	if len(ids) <= s.page {
		return stream.Send(&entryv1.SyncAuthorizedEntriesResponse{Entries: entries})
	}
	for chunk := range slices.Chunk(entries, s.page) {
		m := &entryv1.SyncAuthorizedEntriesResponse{More: chunk[len(chunk)-1].Id != ids[len(ids)-1]}
		for _, e := range chunk {
			m.EntryRevisions = append(m.EntryRevisions, &entryv1.EntryRevision{Id: e.Id, RevisionNumber: e.RevisionNumber, CreatedAt: e.CreatedAt})
		}
		if err := stream.Send(m); err != nil {
			return err
		}
	}
	if between != nil {
		between()
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			return nil
		}
		if len(r.Ids) > s.page || !slices.IsSorted(r.Ids) {
			return status.Errorf(codes.InvalidArgument, "%d ids, sorted %t", len(r.Ids), slices.IsSorted(r.Ids))
		}
		s.mu.Lock()
		s.asked = append(s.asked, r.Ids...)
		m := &entryv1.SyncAuthorizedEntriesResponse{}
		for _, id := range r.Ids {
			if e := s.entries[id]; e != nil {
				m.Entries = append(m.Entries, proto.Clone(e).(*types.Entry))
			}
		}
		s.mu.Unlock()
		if err := stream.Send(m); err != nil {
			return err
		}
	}
}

func (s *server) GetAuthorizedEntries(context.Context, *entryv1.GetAuthorizedEntriesRequest) (*entryv1.GetAuthorizedEntriesResponse, error) {
	if s.mu.Lock(); !s.old {
		s.mu.Unlock()
		return nil, status.Error(codes.Internal, "the server knows SyncAuthorizedEntries")
	}
	s.mu.Unlock()
	_, entries := s.all()
	return &entryv1.GetAuthorizedEntriesResponse{Entries: entries}, nil
}

func (s *server) GetBundle(context.Context, *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return proto.Clone(s.bundle).(*types.Bundle), nil
}

func (s *server) GetFederatedBundle(_ context.Context, r *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.refuse[r.TrustDomain]; err != nil {
		return nil, err
	}
	if b := s.foreign[r.TrustDomain]; b != nil {
		return proto.Clone(b).(*types.Bundle), nil
	}
	return nil, status.Error(codes.NotFound, "bundle not found")
}

// A follower holds what messages say, by the rules of Follow.
type follower struct {
	t        testing.TB
	epoch    string
	revision int64
	entries  map[string]*nodev1.Entry
	bundles  map[string]*nodev1.Bundle
}

func newFollower(t testing.TB) *follower {
	return &follower{t: t, entries: map[string]*nodev1.Entry{}, bundles: map[string]*nodev1.Bundle{}}
}

// poll asks and applies; it returns the message.
func (f *follower) poll(p *Poller, s *server) *nodev1.FollowResponse {
	f.t.Helper()
	m, err := p.Poll(f.t.Context(), s.conn, f.epoch, f.revision)
	if err != nil {
		f.t.Fatal(err)
	}
	f.apply(m)
	return m
}

func (f *follower) apply(m *nodev1.FollowResponse) {
	f.t.Helper()
	if m == nil {
		return
	}
	switch {
	case m.Epoch != Epoch || m.To <= f.revision && f.epoch == Epoch:
		f.t.Errorf("message of epoch %q to %d, and %d is held", m.Epoch, m.To, f.revision)
	case m.Snapshot != m.Complete:
		f.t.Errorf("snapshot %t, complete %t", m.Snapshot, m.Complete)
	case !m.Snapshot && (f.epoch != Epoch || m.From != f.revision):
		f.t.Errorf("differences from %d, and %q/%d is held", m.From, f.epoch, f.revision)
	case m.PolicyDefaults != nil || len(m.Policies) > 0:
		f.t.Error("the message has policies")
	}
	if m.Snapshot {
		f.entries, f.bundles = map[string]*nodev1.Entry{}, map[string]*nodev1.Bundle{}
	}
	for _, id := range m.RemovedEntryIds {
		if f.entries[id] == nil {
			f.t.Errorf("entry %q is removed and not held", id)
		}
		delete(f.entries, id)
	}
	for _, e := range m.Entries {
		if old := f.entries[e.Id]; old != nil && old.Revision >= e.Revision {
			f.t.Errorf("entry %q goes from revision %d to %d", e.Id, old.Revision, e.Revision)
		}
		f.entries[e.Id] = e
	}
	for _, name := range m.RemovedBundles {
		if f.bundles[name] == nil {
			f.t.Errorf("the bundle of %q is removed and not held", name)
		}
		delete(f.bundles, name)
	}
	for _, b := range m.Bundles {
		f.bundles[b.TrustDomain] = b
	}
	f.epoch, f.revision = m.Epoch, m.To
}

func (f *follower) ids() []string { return slices.Sorted(maps.Keys(f.entries)) }

func newPoller() *Poller { return &Poller{TrustDomain: td, Log: slog.New(slog.DiscardHandler)} }
