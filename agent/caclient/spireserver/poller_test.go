package spireserver

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// TestPollTellsWhatIsNew goes through the life of entries, in each of the ways in which a server tells them: all at once, in
// pages of revisions, and at a server that knows only GetAuthorizedEntries.
func TestPollTellsWhatIsNew(t *testing.T) {
	for name, change := range map[string]func(*server){
		"all at once": func(*server) {},
		"in pages":    func(s *server) { s.page = 2 },
		"old server":  func(s *server) { s.old = true },
	} {
		t.Run(name, func(t *testing.T) {
			s, p, f := startServer(t), newPoller(), newFollower(t)
			change(s)
			s.set(entryOf("a", 0), entryOf("b", 3), entryOf("c", 0), entryOf("d", 0), entryOf("e", 0))
			if m := f.poll(p, s); !m.GetSnapshot() || len(m.GetBundles()) != 1 || !slices.Equal(f.ids(), []string{"a", "b", "c", "d", "e"}) {
				t.Fatalf("the first message: snapshot %t, entries %q", m.GetSnapshot(), f.ids())
			}
			if e := f.entries["b"]; e.SpiffeId != "spiffe://example.org/b" || e.CreatedAt != 1_700_000_000 || !slices.Equal(e.Selectors, []string{"unix:uid:1"}) {
				t.Errorf("entry %v", e)
			}
			s.asked = nil
			if m := f.poll(p, s); m != nil {
				t.Errorf("nothing has changed, and %v comes", m)
			}
			s.set(entryOf("b", 4), entryOf("f", 0))
			s.drop("a", "e")
			m := f.poll(p, s)
			if m.GetSnapshot() || len(m.GetEntries()) != 2 || len(m.GetBundles()) != 0 || !slices.Equal(f.ids(), []string{"b", "c", "d", "f"}) {
				t.Errorf("the differences are %v; held %q", m, f.ids())
			}
			if name == "in pages" && !slices.Equal(s.asked, []string{"b", "f"}) {
				t.Errorf("%q are asked for in full, want what has changed", s.asked)
			}
			// Another of the same id, whose revisions begin anew.
			again := entryOf("b", 0)
			again.CreatedAt++
			s.set(again)
			if m := f.poll(p, s); len(m.GetEntries()) != 1 {
				t.Errorf("after an entry was made anew: %v", m)
			}
			s.set(entryOf("b", 0)) // the server's store is an older one
			if m := f.poll(p, s); len(m.GetEntries()) != 1 {
				t.Errorf("after the server went back: %v", m)
			}
			s.drop("b", "c", "d", "f")
			if f.poll(p, s); len(f.entries) != 0 {
				t.Errorf("all are deleted, and %q are held", f.ids())
			}
		})
	}
}

// TestPollStartsOver sends a snapshot whenever the follower does not hold what the last message brought.
func TestPollStartsOver(t *testing.T) {
	s, p, f := startServer(t), newPoller(), newFollower(t)
	s.page = 2
	s.set(entryOf("a", 0), entryOf("b", 0), entryOf("c", 0))
	f.poll(p, s)
	s.set(entryOf("a", 1))
	if _, err := p.Poll(t.Context(), s.conn, f.epoch, f.revision); err != nil { // and the follower refuses it
		t.Fatal(err)
	}
	if m := f.poll(p, s); !m.GetSnapshot() || len(f.entries) != 3 {
		t.Errorf("after a refusal: snapshot %t, %d entries", m.GetSnapshot(), len(f.entries))
	}
	f.epoch, f.revision = "of signet", 99 // another CA was followed in between
	if m := f.poll(p, s); !m.GetSnapshot() || len(f.entries) != 3 {
		t.Errorf("after another CA: snapshot %t, %d entries", m.GetSnapshot(), len(f.entries))
	}
	p = newPoller() // the agent was started again, and its cache knows what it held
	if m := f.poll(p, s); !m.GetSnapshot() || len(f.entries) != 3 {
		t.Errorf("after a start: snapshot %t, %d entries", m.GetSnapshot(), len(f.entries))
	}
	if m := f.poll(p, s); m != nil {
		t.Errorf("nothing has changed, and %v comes", m)
	}
	revision := f.entries["a"].Revision
	p = newPoller()
	if f.poll(p, s); f.entries["a"].Revision != revision {
		t.Error("the same state of an entry has another revision after a start")
	}
}

func TestPollBetweenRevisionsAndEntries(t *testing.T) {
	s, p, f := startServer(t), newPoller(), newFollower(t)
	s.page = 2
	s.set(entryOf("a", 0), entryOf("b", 0), entryOf("c", 0))
	f.poll(p, s)
	s.set(entryOf("a", 1), entryOf("b", 1))
	s.between = func() {
		s.set(entryOf("a", 2)) // once more
		s.drop("b")
	}
	if f.poll(p, s); !slices.Equal(f.ids(), []string{"a", "c"}) || f.entries["a"].Revision != (stamp{2, 1_700_000_000}).order() {
		t.Errorf("held %q, a at %d", f.ids(), f.entries["a"].GetRevision())
	}
	s.between = nil
	if m := f.poll(p, s); m != nil {
		t.Errorf("nothing has changed, and %v comes", m)
	}
}

func TestPollBundles(t *testing.T) {
	s, p, f := startServer(t), newPoller(), newFollower(t)
	s.set(entryOf("a", 0, "b.example", "c.example", "example.org", "Bad Name"), entryOf("b", 0, "b.example"))
	s.foreign["b.example"] = bundleOf("b.example", 7)
	f.poll(p, s)
	if got := f.bundles["b.example"]; got.GetSequenceNumber() != 7 || f.bundles["c.example"] != nil || len(f.bundles) != 2 {
		t.Fatalf("bundles %v", f.bundles)
	}
	held := func(m *nodev1.FollowResponse, what string, changed ...string) {
		t.Helper()
		var got []string
		for _, b := range m.GetBundles() {
			got = append(got, b.TrustDomain)
			if b.Revision != m.To {
				t.Errorf("%s: the bundle of %q has revision %d in the message to %d", what, b.TrustDomain, b.Revision, m.To)
			}
		}
		if slices.Sort(got); !slices.Equal(got, changed) {
			t.Errorf("%s: bundles of %q come, want %q", what, got, changed)
		}
	}
	s.bundle.X509Authorities[0].Tainted = true
	m := f.poll(p, s)
	held(m, "tainted", "example.org")
	if a := m.GetBundles()[0].X509Authorities[0]; a.State != nodev1.AuthorityState_AUTHORITY_STATE_TAINTED {
		t.Errorf("state %v", a.State)
	}
	s.foreign["c.example"] = bundleOf("c.example", 1)
	held(f.poll(p, s), "a new one", "c.example")

	// What goes wrong with a foreign one leaves the last one standing, and never touches another.
	s.refuse["b.example"] = status.Error(codes.Internal, "broken")
	s.foreign["c.example"] = bundleOf(td.Name(), 99)
	if m := f.poll(p, s); m != nil || f.bundles[td.Name()].SequenceNumber == 99 {
		t.Errorf("a broken and a lying answer change %v", m)
	}
	s.foreign["c.example"] = &types.Bundle{TrustDomain: "c.example", X509Authorities: make([]*types.X509Certificate, maxAuthorities+1)}
	for i := range s.foreign["c.example"].X509Authorities {
		s.foreign["c.example"].X509Authorities[i] = &types.X509Certificate{}
	}
	if m := f.poll(p, s); m != nil {
		t.Errorf("a huge answer changes %v", m)
	}
	delete(s.refuse, "b.example")
	delete(s.foreign, "b.example")
	s.foreign["c.example"] = bundleOf("c.example", 1)
	if m := f.poll(p, s); !slices.Equal(m.GetRemovedBundles(), []string{"b.example"}) {
		t.Errorf("the server has it no more: %v", m)
	}
	s.set(entryOf("a", 1))
	if m := f.poll(p, s); !slices.Equal(m.GetRemovedBundles(), []string{"c.example"}) {
		t.Errorf("nobody federates with it: %v", m)
	}

	s.set(entryOf("a", 2, "d.example"))
	s.refuse["d.example"] = status.Error(codes.PermissionDenied, "who are you?")
	if _, err := p.Poll(t.Context(), s.conn, f.epoch, f.revision); status.Code(err) != codes.PermissionDenied {
		t.Errorf("the server refuses this agent: %v", err)
	}
	delete(s.refuse, "d.example")
	s.bundle.TrustDomain = "other.example"
	if _, err := p.Poll(t.Context(), s.conn, f.epoch, f.revision); err == nil || !strings.Contains(err.Error(), `"other.example"`) {
		t.Errorf("the own bundle of another trust domain: %v", err)
	}
	s.bundle.TrustDomain = td.Name()
	if m := f.poll(p, s); m.GetSnapshot() || len(m.GetEntries()) != 1 {
		t.Errorf("what a failed poll has seen is lost: %v", m)
	}
}

// TestPollLeavesOutWhatIsOfNoUse drops entries that would match what they do not mean, and keeps the rest.
func TestPollLeavesOutWhatIsOfNoUse(t *testing.T) {
	colon, stored, negative := entryOf("colon", 0), entryOf("stored", 0), entryOf("negative", -1)
	colon.Selectors[0].Type = "unix:uid"
	stored.StoreSvid = true
	for _, page := range []int{500, 2} {
		t.Run(fmt.Sprint("page ", page), func(t *testing.T) {
			s, p, f := startServer(t), newPoller(), newFollower(t)
			s.page = page
			s.set(colon, stored, negative, entryOf("good", 0), entryOf("turns", 0, "b.example"))
			s.foreign["b.example"] = bundleOf("b.example", 1)
			if f.poll(p, s); !slices.Equal(f.ids(), []string{"good", "turns"}) {
				t.Errorf("held %q", f.ids())
			}
			if m := f.poll(p, s); m != nil {
				t.Errorf("nothing has changed, and %v comes", m)
			}
			bad := entryOf("turns", 1, "b.example")
			bad.StoreSvid = true
			s.set(bad)
			if m := f.poll(p, s); !slices.Equal(m.GetRemovedEntryIds(), []string{"turns"}) || !slices.Equal(m.GetRemovedBundles(), []string{"b.example"}) {
				t.Errorf("an entry that turned bad: %v", m)
			}
			s.drop("turns")
			if m := f.poll(p, s); m != nil {
				t.Errorf("one that was left out is deleted, and %v comes", m)
			}
		})
	}
}

// TestPollRefusesNonsense learns nothing from a server that does not keep to the protocol.
func TestPollRefusesNonsense(t *testing.T) {
	type response = entryv1.SyncAuthorizedEntriesResponse
	revision := func(ids ...string) (out []*entryv1.EntryRevision) {
		for _, id := range ids {
			out = append(out, &entryv1.EntryRevision{Id: id, CreatedAt: 1})
		}
		return out
	}
	for name, tt := range map[string]struct {
		say  []*response
		want string
	}{
		"a part without revisions":     {[]*response{{Entries: []*types.Entry{entryOf("a", 0)}, More: true}}, "a part of the registration entries"},
		"nothing":                      {nil, "before it was complete"},
		"half of the revisions":        {[]*response{{EntryRevisions: revision("a"), More: true}}, "before it was complete"},
		"revisions and entries":        {[]*response{{EntryRevisions: revision("a"), More: true}, {EntryRevisions: revision("b"), Entries: []*types.Entry{entryOf("b", 0)}}}, "mixed"},
		"the same twice":               {[]*response{{Entries: []*types.Entry{entryOf("a", 0), entryOf("a", 1)}}}, "twice"},
		"the same revision twice":      {[]*response{{EntryRevisions: revision("a", "a")}}, "twice"},
		"an entry nobody asked for":    {[]*response{{EntryRevisions: revision("a")}, {Entries: []*types.Entry{entryOf("b", 0)}}}, "not asked for"},
		"an entry twice":               {[]*response{{EntryRevisions: revision("a")}, {Entries: []*types.Entry{entryOf("a", 0)}, More: true}, {Entries: []*types.Entry{entryOf("a", 0)}}}, "not asked for"},
		"half of the entries":          {[]*response{{EntryRevisions: revision("a")}, {More: true}}, "before it was complete"},
		"a message too large for gRPC": {[]*response{{Entries: []*types.Entry{{Id: "a", Hint: strings.Repeat("x", 17<<20)}}}}, "larger than max"},
	} {
		t.Run(name, func(t *testing.T) {
			s, p, f := startServer(t), newPoller(), newFollower(t)
			s.set(entryOf("good", 0))
			f.poll(p, s)
			s.script = func(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
				for _, m := range tt.say {
					if err := stream.Send(m); err != nil {
						return err
					}
				}
				return nil
			}
			if _, err := p.Poll(t.Context(), s.conn, f.epoch, f.revision); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
			s.script = nil
			if m := f.poll(p, s); m != nil || !slices.Equal(f.ids(), []string{"good"}) {
				t.Errorf("afterwards %v comes", m)
			}
		})
	}
}

func TestPollEntriesWithoutIDs(t *testing.T) {
	s, p, f := startServer(t), newPoller(), newFollower(t)
	s.set(entryOf("", 0), entryOf("a", 0))
	for range 2 {
		if f.poll(p, s); !slices.Equal(f.ids(), []string{"a"}) {
			t.Errorf("held %q", f.ids())
		}
	}
}

func TestStampOrder(t *testing.T) {
	rising := []stamp{{0, 0}, {1, 0}, {0, 1}, {1, 1}, {1 << 40, 1}, {0, 2}, {5, 1_700_000_000}, {0, 1_700_000_001}, {0, 4_000_000_000}}
	for i := range rising[1:] {
		if a, b := rising[i].order(), rising[i+1].order(); a >= b || b < 0 {
			t.Errorf("%v has order %d, and %v has %d", rising[i], a, rising[i+1], b)
		}
	}
	if o := (stamp{1, -5}).order(); o < 0 {
		t.Errorf("order %d", o)
	}
}
