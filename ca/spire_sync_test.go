package ca

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/test/spireclient"
)

// What SPIRE's agents are told of their entries, over the real port. [SPIRE-PROTOCOL §5, §17.3]

// join attests as a SPIRE agent does.
func (h *harness) join(groups ...string) *spireclient.Agent {
	h.t.Helper()
	a, err := spireclient.Server{Addr: h.ca.Addr().String(), TrustDomain: td, Now: h.ca.c.Now}.Join(h.t.Context(), h.token(groups...))
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { a.Close() })
	return a
}

func under(parent string, id, path string, selectors ...string) *types.Entry {
	return &types.Entry{Id: id, SpiffeId: pid(path), ParentId: pid(parent), Selectors: sels(selectors...)}
}

func mustSync(t *testing.T, a *spireclient.Agent) *spireclient.Synced {
	t.Helper()
	s, err := a.Sync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func held(a *spireclient.Agent) []string { return slices.Sorted(maps.Keys(a.Entries)) }

func TestSPIRESyncInPages(t *testing.T) {
	c := config(t.TempDir())
	c.SyncPage = 2
	h := start(t, c)
	a := h.join()
	if s := mustSync(t, a); s.Revisions != 0 || len(a.Entries) != 0 {
		t.Errorf("an agent without entries: %+v", s)
	}
	var ids []string
	for i := range 5 {
		ids = append(ids, fmt.Sprint("e", i))
		h.create(under(a.ID.Path(), ids[i], fmt.Sprint("/w/", i), "unix:uid:1"))
		want := spireclient.Synced{Revisions: (i + 2) / 2, Requests: 1, Pages: 1, Asked: ids[i:]}
		if i < 2 { // what fits one page comes whole, without revisions
			want = spireclient.Synced{Pages: 1}
		}
		if s := mustSync(t, a); fmt.Sprint(*s) != fmt.Sprint(want) || !slices.Equal(held(a), ids) {
			t.Errorf("%d entries: %+v, holds %v; want %+v and %v", i+1, *s, held(a), want, ids)
		}
	}
	// A new agent, as after a restart, asks for everything, a page at a time.
	a.Entries = map[string]*types.Entry{}
	if s := mustSync(t, a); s.Revisions != 3 || s.Requests != 3 || s.Pages != 3 || !slices.Equal(held(a), ids) {
		t.Errorf("from nothing: %+v, holds %v", s, held(a))
	}
	if s := mustSync(t, a); len(s.Asked) != 0 || len(s.Dropped) != 0 {
		t.Errorf("nothing changed: %+v", s)
	}
	// One changed: only that one is asked for again.
	before := a.Entries["e3"].RevisionNumber
	if _, err := entryv1.NewEntryClient(h.admin).BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{{Id: "e3", Hint: "new"}}, InputMask: &types.EntryMask{Hint: true}}); err != nil {
		t.Fatal(err)
	}
	if s := mustSync(t, a); !slices.Equal(s.Asked, []string{"e3"}) || a.Entries["e3"].Hint != "new" || a.Entries["e3"].RevisionNumber <= before {
		t.Errorf("one changed: %+v, %v", s, a.Entries["e3"])
	}
	// One deleted: dropped, nothing asked for.
	del := func(id string) {
		t.Helper()
		if r, err := entryv1.NewEntryClient(h.admin).BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{id}}); err != nil || r.Results[0].Status.Code != 0 {
			t.Fatal(r, err)
		}
	}
	del("e1")
	if s := mustSync(t, a); len(s.Asked) != 0 || !slices.Equal(s.Dropped, []string{"e1"}) {
		t.Errorf("one deleted: %+v", s)
	}
	// Made anew under its old ID: asked for.
	del("e4")
	h.create(under(a.ID.Path(), "e4", "/other", "unix:uid:1"))
	if s := mustSync(t, a); !slices.Equal(s.Asked, []string{"e4"}) || a.Entries["e4"].SpiffeId.Path != "/other" {
		t.Errorf("one made anew: %+v", s)
	}
	// What an agent sees of an entry is what it asked to see, and its ID.
	if e := a.Entries["e0"]; e.ParentId != nil || e.X509SvidTtl != 0 || e.CreatedAt == 0 || e.RevisionNumber == 0 {
		t.Errorf("fields of the agent's mask: %v", e)
	}
}

// TestSPIRESyncDefaultPage: 500 entries come at once, 501 as revisions in a page of 500 and one of 1.
func TestSPIRESyncDefaultPage(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a := h.join()
	var all []*types.Entry
	for i := range 500 {
		all = append(all, under(a.ID.Path(), "", fmt.Sprint("/w/", i), "unix:uid:1"))
	}
	h.create(all...)
	if s := mustSync(t, a); s.Revisions != 0 || len(a.Entries) != 500 {
		t.Errorf("500 entries: %+v, holds %d", s, len(a.Entries))
	}
	h.create(under(a.ID.Path(), "last", "/last", "unix:uid:1"))
	if s := mustSync(t, a); s.Revisions != 2 || !slices.Equal(s.Asked, []string{"last"}) || len(a.Entries) != 501 {
		t.Errorf("501 entries: %+v, holds %d", s, len(a.Entries))
	}
}

// TestSPIRESyncLargeEntries: entries that are few but do not fit a message that SPIRE's agents take.
func TestSPIRESyncLargeEntries(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a := h.join()
	h.create(heavy(130, a.ID.Path())...)
	if s := mustSync(t, a); s.Revisions != 1 || s.Requests != 1 || s.Pages < 2 || len(a.Entries) != 130 {
		t.Errorf("%+v, holds %d entries, want 130 in several messages", s, len(a.Entries))
	}
	if _, err := a.EntryAPI().GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{}); code(err) != codes.ResourceExhausted {
		t.Errorf("all at once: %v", err)
	}
	r, err := a.EntryAPI().GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{OutputMask: &types.EntryMask{SpiffeId: true}})
	if err != nil || len(r.Entries) != 130 || r.Entries[0].SpiffeId == nil || r.Entries[0].Selectors != nil || r.Entries[0].RevisionNumber != 0 {
		t.Errorf("all at once, their IDs only: %v", err)
	}
}

func TestSPIREScope(t *testing.T) {
	now := time.Now()
	c := config(t.TempDir())
	c.Now = func() time.Time { return now }
	h := start(t, c)
	a, b := h.join("backend", "eu"), h.join("front")
	ended := under(a.ID.Path(), "ended", "/ended", "unix:uid:1")
	ended.ExpiresAt = now.Add(time.Minute).Unix()
	h.create(
		under("/spire/server", "alias", "/nodes/backend", "node:group:backend"),
		under("/spire/server", "alias-both", "/nodes/both", "node:group:backend", "node:group:eu"),
		under("/spire/server", "alias-none", "/nodes/none", "node:group:backend", "node:group:us"),
		under(a.ID.Path(), "own", "/own", "unix:uid:1"),
		under("/own", "child", "/child", "unix:uid:2"),
		under("/child", "grandchild", "/own/grandchild", "unix:uid:3"),
		under("/own/grandchild", "cycle", "/own", "unix:uid:4"),
		under("/nodes/backend", "by-alias", "/by-alias", "unix:uid:5"),
		under("/nodes/both", "by-both", "/by-both", "unix:uid:6"),
		under("/nodes/none", "by-none", "/by-none", "unix:uid:7"),
		under(b.ID.Path(), "other", "/other", "unix:uid:8"),
		ended,
	)
	h.apply("kind: Identity\nname: any\nspiffeID: /any\nmatch: [\"unix:uid:9\"]\n")
	both := []string{"by-alias", "by-both", "child", "cycle", "ended", "grandchild", "identity.any", "own"}
	mustSync(t, a)
	if !slices.Equal(held(a), both) {
		t.Errorf("holds %v, want %v", held(a), both)
	}
	mustSync(t, b)
	if want := []string{"identity.any", "other"}; !slices.Equal(held(b), want) {
		t.Errorf("the other one holds %v, want %v", held(b), want)
	}
	r, err := a.EntryAPI().GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	if err != nil || len(r.Entries) != len(both) {
		t.Errorf("GetAuthorizedEntries: %d entries, %v", len(r.Entries), err)
	}
	now = now.Add(2 * time.Minute)
	if s := mustSync(t, a); !slices.Equal(s.Dropped, []string{"ended"}) {
		t.Errorf("after the end of an entry: %+v", s)
	}
}

func TestSPIRESyncHostile(t *testing.T) {
	c := config(t.TempDir())
	c.SyncPage = 2
	h := start(t, c)
	a := h.join()
	for i := range 5 {
		h.create(under(a.ID.Path(), fmt.Sprint("e", i), fmt.Sprint("/w/", i), "unix:uid:1"))
	}
	type message = entryv1.SyncAuthorizedEntriesRequest
	open := func() entryv1.Entry_SyncAuthorizedEntriesClient {
		t.Helper()
		s, err := a.EntryAPI().SyncAuthorizedEntries(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.CloseSend() })
		return s
	}
	for name, first := range map[string]*message{
		"ids at once":                    {Ids: []string{"e1"}},
		"a mask without revision":        {OutputMask: &types.EntryMask{SpiffeId: true}},
		"an empty mask is one, too":      {OutputMask: &types.EntryMask{}},
		"ids and a mask that forbids it": {OutputMask: &types.EntryMask{}, Ids: []string{"x"}},
	} {
		s := open()
		s.Send(first)
		if _, err := s.Recv(); code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Revisions are there whatever the mask hides; then ids that are unknown, foreign, repeated or nonsense.
	s := open()
	s.Send(&message{OutputMask: &types.EntryMask{RevisionNumber: true}})
	for range 3 {
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	for _, ids := range [][]string{{"nobody", "\x00"}, {}, {""}} {
		s.Send(&message{Ids: ids})
		if r, err := s.Recv(); err != nil || len(r.Entries)+len(r.EntryRevisions) != 0 || r.More {
			t.Errorf("ids %q: %v %v; want one empty last page", ids, r, err)
		}
	}
	s.Send(&message{Ids: []string{"e1", "e1"}})
	if r, err := s.Recv(); err != nil || len(r.Entries) != 1 || r.More {
		t.Errorf("one ID twice: %v %v", r, err)
	}
	// The same again and again: bounded.
	n := 0
	for err := error(nil); err == nil && n < 100; n++ {
		s.Send(&message{Ids: []string{"e1"}})
		_, err = s.Recv()
		if err != nil && code(err) != codes.ResourceExhausted {
			t.Errorf("asking for more than there is: %v", err)
		}
	}
	if n > 7 {
		t.Errorf("one entry was to be had %d times on one stream of an agent with 5", n)
	}
	s = open()
	s.Send(&message{})
	for range 3 {
		s.Recv()
	}
	s.Send(&message{Ids: slices.Repeat([]string{"e1"}, 10_000)})
	if _, err := s.Recv(); code(err) != codes.ResourceExhausted {
		t.Errorf("10,000 ids: %v", err)
	}
	// A ban takes effect on a stream that is open.
	s = open()
	s.Send(&message{})
	for range 3 {
		s.Recv()
	}
	if _, err := agentv1.NewAgentClient(h.admin).BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: pid(a.ID.Path())}); err != nil {
		t.Fatal(err)
	}
	s.Send(&message{Ids: []string{"e1"}})
	_, err := s.Recv()
	if det := status.Convert(err).Details(); code(err) != codes.PermissionDenied || len(det) != 1 || det[0].(*types.PermissionDeniedDetails).Reason != types.PermissionDeniedDetails_AGENT_BANNED {
		t.Errorf("after a ban: %v %v", err, det)
	}
	if _, err := a.Sync(t.Context()); code(err) != codes.PermissionDenied {
		t.Errorf("a new stream after a ban: %v", err)
	}
}

// TestSPIRESyncStreamsAreBounded: an agent cannot pile up streams that hold what they were told.
func TestSPIRESyncStreamsAreBounded(t *testing.T) {
	c := config(t.TempDir())
	c.SyncPage = 1
	h := start(t, c)
	a := h.join()
	h.create(under(a.ID.Path(), "e0", "/w/0", "unix:uid:1"), under(a.ID.Path(), "e1", "/w/1", "unix:uid:1"))
	var open []entryv1.Entry_SyncAuthorizedEntriesClient
	for range 4 {
		s, err := a.EntryAPI().SyncAuthorizedEntries(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		s.Send(&entryv1.SyncAuthorizedEntriesRequest{})
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		open = append(open, s)
	}
	if _, err := a.Sync(t.Context()); code(err) != codes.ResourceExhausted {
		t.Errorf("a fifth stream: %v", err)
	}
	for _, s := range open {
		s.CloseSend()
		for err := error(nil); err == nil; {
			_, err = s.Recv()
		}
	}
	mustSync(t, a)
}
