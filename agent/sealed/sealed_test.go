package sealed

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	td    = spiffeid.RequireTrustDomainFromString("example.org")
	agent = spiffeid.RequireFromString("spiffe://example.org/spire/agent/join_token/n1")
)

// A rig is a data directory with what an agent says of itself.
type rig struct {
	t      testing.TB
	config Config
	log    bytes.Buffer
}

func newRig(t testing.TB, key Key) *rig {
	t.Helper()
	r := &rig{t: t}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	r.config = Config{Dir: dir, TrustDomain: td, Agent: agent, Key: key, MaxOffline: time.Hour, Log: slog.New(slog.NewTextHandler(&r.log, nil))}
	return r
}

func (r *rig) open() (*Store, *Contents) {
	s, c := Open(r.t.Context(), r.config)
	r.t.Cleanup(s.closeLog)
	return s, c
}

func (r *rig) write(s *Store) {
	r.t.Helper()
	if err := s.attempt(r.t.Context()); err != nil {
		r.t.Fatalf("writing: %v", err)
	}
}

// path is a file of the cache.
func (r *rig) path(name string) string { return filepath.Join(r.config.Dir, cacheDir, name) }

// logFile is the one log there is.
func (r *rig) logFile() string {
	r.t.Helper()
	found, err := filepath.Glob(r.path(logPrefix + "*"))
	if err != nil || len(found) != 1 {
		r.t.Fatalf("logs: %v, %v; want one", found, err)
	}
	return found[0]
}

// refused are the caches that were set aside.
func (r *rig) refused() []string {
	found, err := filepath.Glob(filepath.Join(r.config.Dir, cacheDir+".refused.*"))
	if err != nil {
		r.t.Fatal(err)
	}
	return found
}

func snapshot(to int64, ids ...string) *nodev1.FollowResponse {
	deny := policyv1.DefaultsMode_DEFAULTS_MODE_DENY
	m := &nodev1.FollowResponse{Format: 1, Epoch: "e1", To: to, Snapshot: true, Complete: true, PolicyDefaults: &deny,
		Bundles:  []*nodev1.Bundle{{TrustDomain: "example.org", Revision: to}, {TrustDomain: "partner.example"}},
		Policies: []*policyv1.Policy{{Name: "web", Services: []string{"spiffe://example.org/web"}}}}
	for _, id := range ids {
		m.Entries = append(m.Entries, &nodev1.Entry{Id: id, Revision: to, SpiffeId: "spiffe://example.org/" + id, Selectors: []string{"unix:uid:1"}})
	}
	return m
}

// sorted brings a snapshot into an order in which it can be compared.
func sorted(m *nodev1.FollowResponse) *nodev1.FollowResponse {
	m = proto.Clone(m).(*nodev1.FollowResponse)
	slices.SortFunc(m.Entries, func(a, b *nodev1.Entry) int { return strings.Compare(a.Id, b.Id) })
	slices.SortFunc(m.Bundles, func(a, b *nodev1.Bundle) int { return strings.Compare(a.TrustDomain, b.TrustDomain) })
	slices.SortFunc(m.Policies, func(a, b *policyv1.Policy) int { return strings.Compare(a.Name, b.Name) })
	return m
}

// fill brings a store to a state with everything in it.
func (r *rig) fill(s *Store) *nodev1.FollowResponse {
	r.t.Helper()
	m := snapshot(5, "a", "b")
	s.Applied(m)
	s.InContact(true)
	s.Hold("a", 5, true, []byte("chain of a"), []byte("secret of a"))
	s.Hold("b", 5, false, []byte("chain of b"), []byte("secret of b"))
	r.write(s)
	return m
}

func (r *rig) mustRestore() (*Store, *Contents) {
	r.t.Helper()
	s, c := r.open()
	if c == nil {
		r.t.Fatalf("nothing was found; the log says:\n%s", r.log.String())
	}
	return s, c
}

func TestKeepsStateAndSVIDs(t *testing.T) {
	r := newRig(t, File{})
	before := time.Now()
	s, c := r.open()
	if c != nil {
		t.Fatal("something was found where nothing was")
	}
	m := r.fill(s)

	_, c = r.mustRestore()
	if !proto.Equal(sorted(c.State), sorted(m)) {
		t.Errorf("the state is %v, want %v", sorted(c.State), sorted(m))
	}
	slices.SortFunc(c.SVIDs, func(a, b SVID) int { return strings.Compare(a.EntryID, b.EntryID) })
	want := []SVID{{"a", 5, true, []byte("chain of a"), []byte("secret of a")}, {"b", 5, false, []byte("chain of b"), []byte("secret of b")}}
	if fmt.Sprint(c.SVIDs) != fmt.Sprint(want) {
		t.Errorf("the SVIDs are %v, want %v", c.SVIDs, want)
	}
	if c.Contact.Before(before) || c.Contact.After(time.Now()) || c.Seen.Before(c.Contact) || !c.Continues {
		t.Errorf("contact %s, seen %s, continues %t", c.Contact, c.Seen, c.Continues)
	}
}

// Differences and renewals are appended; what was removed stays removed.
func TestKeepsDifferences(t *testing.T) {
	r := newRig(t, File{})
	s, _ := r.open()
	r.fill(s)
	log := r.logFile()
	s.Applied(&nodev1.FollowResponse{Format: 1, Epoch: "e1", From: 5, To: 9, RemovedEntryIds: []string{"a"}, RemovedPolicies: []string{"web"},
		RemovedBundles: []string{"partner.example"}, Entries: []*nodev1.Entry{{Id: "c", Revision: 9}}})
	s.Drop("a")
	s.Hold("b", 6, true, []byte("next chain"), []byte("next key"))
	r.write(s)
	if r.logFile() != log {
		t.Error("a new log was begun for a few changes")
	}
	_, c := r.mustRestore()
	got := sorted(c.State)
	if got.To != 9 || len(got.Entries) != 2 || got.Entries[0].Id != "b" || got.Entries[1].Id != "c" || len(got.Policies) != 0 || len(got.Bundles) != 1 ||
		got.PolicyDefaults == nil || *got.PolicyDefaults != policyv1.DefaultsMode_DEFAULTS_MODE_DENY {
		t.Errorf("the state is %v", got)
	}
	if len(c.SVIDs) != 1 || c.SVIDs[0].EntryID != "b" || string(c.SVIDs[0].Chain) != "next chain" || !c.SVIDs[0].Used {
		t.Errorf("the SVIDs are %v", c.SVIDs)
	}
}

// A snapshot replaces what it does not name, also what the run before had left.
func TestSnapshotReplaces(t *testing.T) {
	r := newRig(t, File{})
	s, _ := r.open()
	r.fill(s)
	s, _ = r.mustRestore()
	s.Applied(&nodev1.FollowResponse{Format: 1, Epoch: "e1", From: 5, To: 6, Entries: []*nodev1.Entry{{Id: "short", Revision: 6}}})
	s.Applied(snapshot(20, "b"))
	r.write(s)
	_, c := r.mustRestore()
	if got := c.State; got.To != 20 || len(got.Entries) != 1 || got.Entries[0].Id != "b" {
		t.Errorf("the state is %v", got)
	}
}

// The position that the agent was told last stays over restarts, also when later messages are silent about it.
func TestKeepsThePosition(t *testing.T) {
	r := newRig(t, File{})
	s, _ := r.open()
	m := snapshot(5, "a")
	m.Position = &nodev1.Position{Cluster: "prod", Versions: map[string]uint64{"pods": 7}}
	s.Applied(m)
	s.Applied(&nodev1.FollowResponse{Format: 1, Epoch: m.Epoch, From: 5, To: 6})
	s.InContact(true)
	r.write(s)
	s, c := r.mustRestore()
	if !proto.Equal(c.State.Position, m.Position) {
		t.Errorf("position %v, want %v", c.State.Position, m.Position)
	}
	s.Applied(&nodev1.FollowResponse{Format: 1, Epoch: m.Epoch, From: 6, To: 7, Entries: []*nodev1.Entry{{Id: "b", Revision: 7}}})
	r.write(s)
	if _, c = r.mustRestore(); !proto.Equal(c.State.Position, m.Position) || c.State.To != 7 {
		t.Errorf("after another start position %v at revision %d", c.State.Position, c.State.To)
	}
}

// Fields of entries that this program does not know are kept, for one that does.
func TestKeepsUnknownFields(t *testing.T) {
	r := newRig(t, File{})
	s, _ := r.open()
	m := snapshot(5, "a")
	unknown := protowire.AppendString(protowire.AppendTag(nil, 9999, protowire.BytesType), "later")
	m.Entries[0].ProtoReflect().SetUnknown(unknown)
	s.Applied(m)
	s.InContact(true)
	r.write(s)
	_, c := r.mustRestore()
	if !bytes.Equal(c.State.Entries[0].ProtoReflect().GetUnknown(), unknown) {
		t.Error("an unknown field was lost")
	}
}

// What Follow carries must be kept as a whole: a field that is added there has to be added to fold and unfold, too.
func TestFoldKnowsAllOfFollow(t *testing.T) {
	// unknown_entry_prefixes never comes here: svidcache completes such a snapshot by what it holds, and tells that.
	known := []string{"unknown_entry_prefixes", "format", "epoch", "from", "to", "snapshot", "complete", "sync_ids", "entries", "removed_entry_ids", "policies", "removed_policies",
		"policy_defaults", "bundles", "removed_bundles", "revocations", "removed_revocations", "crls", "removed_crls", "user_issuers", "removed_user_issuers", "position"}
	fields := (&nodev1.FollowResponse{}).ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		if name := string(fields.Get(i).Name()); !slices.Contains(known, name) {
			t.Errorf("FollowResponse has a field %q, which the sealed cache does not keep: extend fold and unfold, and this list", name)
		}
	}
}

func TestTooOld(t *testing.T) {
	r := newRig(t, File{})
	s, _ := r.open()
	r.fill(s)
	for _, tt := range []struct {
		name  string
		after time.Duration
		found bool
	}{{"just within max_offline", 59 * time.Minute, true}, {"past max_offline", 61 * time.Minute, false}} {
		now := time.Now().Add(tt.after)
		r.config.Now = func() time.Time { return now }
		if _, c := r.open(); (c != nil) != tt.found {
			t.Errorf("%s: found %t, want %t", tt.name, c != nil, tt.found)
		}
		if len(r.refused()) != 0 {
			t.Errorf("%s: a sound cache was set aside", tt.name)
		}
	}
}

// A clock that is set back between two runs does not make the cache younger.
func TestClockSetBack(t *testing.T) {
	r := newRig(t, File{})
	now := time.Now()
	r.config.Now = func() time.Time { return now }
	s, _ := r.open()
	r.fill(s)
	contact := now
	s.InContact(false)
	now = now.Add(50 * time.Minute)
	r.write(s) // as the heartbeat does
	now = now.Add(-24 * time.Hour)
	s, c := r.mustRestore()
	if !c.Contact.Equal(contact) || !c.Seen.Equal(contact.Add(50*time.Minute)) {
		t.Errorf("contact %s, seen %s", c.Contact.Sub(contact), c.Seen.Sub(contact))
	}
	r.write(s)
	if _, c = r.mustRestore(); !c.Seen.Equal(contact.Add(50 * time.Minute)) {
		t.Errorf("after a run with the clock set back: seen %s", c.Seen.Sub(contact))
	}
	now = contact.Add(59 * time.Minute)
	s, _ = r.mustRestore()
	now = contact.Add(61 * time.Minute)
	r.write(s)
	now = contact.Add(-time.Hour)
	if _, c = r.open(); c != nil {
		t.Error("a cache that had passed max_offline was used after the clock was set back")
	}
}

// The log does not grow without bound, however often things change.
func TestLogIsBegunAnew(t *testing.T) {
	r := newRig(t, File{})
	s, _ := r.open()
	r.fill(s)
	first, largest := r.logFile(), int64(0)
	value := make([]byte, 1<<20)
	for i := range 40 {
		binary.BigEndian.PutUint32(value, uint32(i))
		s.Hold("a", int64(i), true, bytes.Clone(value), []byte("secret of a"))
		r.write(s)
		info, err := os.Stat(r.logFile())
		if err != nil {
			t.Fatal(err)
		}
		largest = max(largest, info.Size())
	}
	if r.logFile() == first {
		t.Error("no new log was begun")
	}
	if largest > 8<<20 {
		t.Errorf("the log had %d bytes for one of 1 MiB", largest)
	}
	if _, c := r.mustRestore(); len(c.SVIDs) != 2 {
		t.Errorf("%d SVIDs", len(c.SVIDs))
	}
}

// A log that has used up its nonces, or its bytes, is not appended to.
func TestLogIsFull(t *testing.T) {
	for name, fill := range map[string]func(*logFile){
		"frames": func(l *logFile) { l.sealer.frames = 1<<32 - 1 },
		"bytes":  func(l *logFile) { l.length, l.began = maxLogBytes-10, maxLogBytes-10 },
	} {
		r := newRig(t, File{})
		s, _ := r.open()
		r.fill(s)
		first := r.logFile()
		fill(s.log)
		s.Hold("a", 9, true, []byte("after"), []byte("secret of a"))
		r.write(s)
		if r.logFile() == first {
			t.Errorf("%s: the log was appended to", name)
		}
		if _, c := r.mustRestore(); len(c.SVIDs) != 2 {
			t.Errorf("%s: %d SVIDs", name, len(c.SVIDs))
		}
	}
}

// The agent's ID becomes known, or another one, while it runs.
func TestOwn(t *testing.T) {
	r := newRig(t, File{})
	r.config.Agent = spiffeid.ID{}
	s, _ := r.open()
	s.Applied(snapshot(1, "a"))
	s.InContact(true)
	r.write(s)
	if _, err := os.Stat(r.path(headFile)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a cache of nobody was written: %v", err)
	}
	s.Own(agent)
	r.write(s)
	r.config.Agent = agent
	r.mustRestore()
	other := spiffeid.RequireFromString("spiffe://example.org/spire/agent/x")
	s.Own(other)
	r.write(s)
	r.config.Agent = other
	r.mustRestore()
}

// Run writes soon what is new, and all of it when it ends.
func TestRun(t *testing.T) {
	r := newRig(t, File{})
	s, _ := r.open()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	s.Applied(snapshot(5, "a"))
	s.InContact(true)
	deadline := time.After(20 * time.Second)
	for {
		if _, err := os.Stat(r.path(headFile)); err == nil {
			break
		}
		select {
		case <-deadline:
			t.Fatal("nothing was written")
		case <-time.After(10 * time.Millisecond):
		}
	}
	s.Hold("a", 1, true, []byte("c"), []byte("k")) // a first SVID, and the end right behind
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if st := s.Status(); st.Err != nil || st.Unsaved != 0 || st.Written.IsZero() {
		t.Errorf("status %+v", st)
	}
	if _, c := r.mustRestore(); len(c.SVIDs) != 1 {
		t.Errorf("%d SVIDs, want the one of the last moment", len(c.SVIDs))
	}
}
