// Package sealed keeps on disk what an agent needs to serve its workloads when it is started while the CA is away: the CA's
// state as last followed, and X509-SVIDs with their keys, encrypted. The agent fills it through Applied, Hold and Drop, which
// only note what is new; one goroutine writes, seldom and off everybody's way. It decides nothing about identities and
// talks to nobody but the disk and the holder of its key.
package sealed

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

const (
	// openWait bounds the opening of the key at start, so that a TPM that hangs does not hold the agent.
	openWait = 10 * time.Second
	// soon is how long a change waits for others, later how long one does whose loss costs nothing but an issuance, such as
	// a renewal: the SVID before it is on disk and valid.
	soon  = 250 * time.Millisecond
	later = time.Minute
	// spacing is the least time between two writes, pressing that before one with a change that waits for nothing.
	spacing  = time.Second
	pressing = 20 * time.Millisecond
	// heartbeat is how often the times in the head are brought up to date when nothing changes.
	heartbeat = 5 * time.Minute
	// retryMin and retryMax bound the wait after a write that failed.
	retryMin = 5 * time.Second
	retryMax = time.Minute
)

// Config says where a Store keeps what, and how.
type Config struct {
	// Dir is the agent's data directory, which nobody else may enter or write to.
	Dir string
	// TrustDomain is the agent's.
	TrustDomain spiffeid.TrustDomain
	// Agent is the agent's own ID. Zero: not known yet; then nothing is found, and nothing is written until Own.
	Agent spiffeid.ID
	// Key is where the key is kept.
	Key Key
	// MaxOffline is how long after the last contact with the CA what is held may be used.
	MaxOffline time.Duration
	// Log receives what operators want to know. Nil means slog.Default.
	Log *slog.Logger
	// Now is the wall clock. Nil means time.Now.
	Now func() time.Time
}

// Contents are what Open found.
type Contents struct {
	// State is a complete snapshot of the CA's state.
	State *nodev1.FollowResponse
	// Continues says that the CA may send differences to State. Otherwise another program wrote it, which may have left out
	// what that one did not know.
	Continues bool
	// SVIDs are of entries in State, in no order.
	SVIDs []SVID
	// Contact is when there was contact with the CA last; Seen is the latest time of which the agent was sure or that it saw
	// since then. A clock before Seen was set back.
	Contact, Seen time.Time
}

// A Store is the cache on disk. Its methods may be called concurrently; but for Run they do not wait for the disk.
type Store struct {
	config Config
	wake   chan struct{} // one slot: look at pending

	// Owned by Open, then by Run.
	holder  holder
	held    records
	log     *logFile // nil: the next write begins a log
	counted uint64   // the counter's value in the newest head
	credit  credit   // increments that are left

	// mu is held for moments, never over a write.
	mu       sync.Mutex
	pending  records // nil values remove
	reset    bool    // pending's entries, policies and bundles are all there are
	weighty  bool    // going back to before pending would be a rollback of the CA's state
	urgent   bool
	pressing bool            // what is revoked changed: it waits for nothing
	since    time.Time       // of the first in pending; zero: none
	writing  time.Time       // of the first in what is being written
	svids    map[string]bool // those held, and whether they were used
	defaults *policyv1.DefaultsMode
	position *nodev1.Position // the newest
	owner    spiffeid.ID
	contact  bool
	last     time.Time // contact, while there is none now
	seen     time.Time
	trouble  error     // why the newest could not be written or the key not be opened
	written  time.Time // when everything was on disk last
}

// Open opens the key and reads what is there, within openWait. It never fails: what is refused is set aside and told of in
// the log, and then there are no Contents. Run makes the Store write.
func Open(ctx context.Context, c Config) (*Store, *Contents) {
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	s := &Store{
		config: c, wake: make(chan struct{}, 1), held: make(records), pending: make(records), svids: make(map[string]bool),
		owner: c.Agent, credit: credit{left: maxCredit, at: time.Now()},
	}
	ctx, cancel := context.WithTimeout(ctx, openWait)
	defer cancel()
	contents, err := s.load(ctx)
	switch {
	case err == nil:
	case s.holder == nil:
		s.fail(fmt.Errorf("the key cannot be opened: %w", err))
		c.Log.Error("the sealed cache's key cannot be opened; the agent goes on without the cache and keeps trying", "key", c.Key.kind(), "err", err)
	case errors.Is(err, errUnread):
		c.Log.Error("the sealed cache cannot be read now; the agent begins afresh", "err", err)
	case errors.Is(err, errTooOld):
		c.Log.Warn("the sealed cache is not used", "err", err)
	default:
		aside, moveErr := s.setAside()
		c.Log.Error("the sealed cache is refused and set aside; the agent begins afresh", "set_aside", aside, "err", errors.Join(err, moveErr))
	}
	if contents == nil {
		s.held = make(records)
	}
	return s, contents
}

// Applied notes a message of Follow that the agent has taken over.
func (s *Store) Applied(m *nodev1.FollowResponse) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m.GetSnapshot() || m.PolicyDefaults != nil {
		s.defaults = m.PolicyDefaults
	}
	if m.Position != nil {
		s.position = m.Position
	}
	changes, weighty, err := fold(m, s.defaults, s.position)
	if err != nil {
		s.config.Log.Error("the sealed cache cannot keep what the CA sent", "err", err)
	}
	if m.GetSnapshot() {
		s.reset = true
		for k := range s.pending {
			if replacedBySnapshot(k.kind) {
				delete(s.pending, k)
			}
		}
	}
	s.weighty = s.weighty || weighty
	// Whoever is revoked stays so, also if the CA and this agent are gone in the next moment.
	s.pressing = s.pressing || len(m.GetRevocations())+len(m.GetRemovedRevocations()) > 0
	s.note(changes, weighty)
}

// Hold notes the X509-SVID that an entry's callers get from now on, and whether one has asked for it. Chain and key are
// concatenated DER and PKCS#8 DER.
func (s *Store) Hold(entryID string, entryRevision int64, used bool, chain, key []byte) {
	svid := SVID{EntryID: entryID, EntryRevision: entryRevision, Used: used, Chain: chain, Key: key}
	value := svid.encode()
	s.mu.Lock()
	defer s.mu.Unlock()
	was, renewal := s.svids[entryID]
	renewal = renewal && was == used
	s.svids[entryID] = used
	s.note(records{{kindSVID, entryID}: value}, !renewal)
}

// Drop notes that no X509-SVID of an entry is held any more.
func (s *Store) Drop(entryID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.svids[entryID]; ok {
		delete(s.svids, entryID)
		s.note(records{{kindSVID, entryID}: nil}, false)
	}
}

// note adds to pending. It is called with mu held.
func (s *Store) note(changes records, urgent bool) {
	for k, value := range changes {
		s.pending[k] = value
	}
	if s.since.IsZero() {
		s.since = time.Now()
	}
	s.urgent = s.urgent || urgent
	s.kick()
}

func (s *Store) kick() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Own notes who the agent is. What is kept is of that agent from then on.
func (s *Store) Own(agent spiffeid.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.owner != agent {
		s.owner = agent
		s.note(nil, true)
	}
}

// InContact notes that there is contact with the CA from now on, or none any more.
func (s *Store) InContact(contact bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.contact == contact {
		return
	}
	now := s.config.Now()
	s.contact, s.last, s.seen = contact, now, now
	s.note(nil, true)
}

// times returns what the head says about contact and the clock. It is called with mu held.
func (s *Store) times() (contact, seen time.Time) {
	now := s.config.Now()
	if s.contact {
		// The CA's certificates were valid at this time, so that it is no wild one.
		s.last, s.seen = now, now
	} else if now.After(s.seen) {
		s.seen = now
	}
	return s.last, s.seen
}

// A Status describes a Store at one moment.
type Status struct {
	// Err says why what is new is not on disk. What was written before stays valid.
	Err error
	// Unsaved is how long something has been waiting to be written; zero: nothing is.
	Unsaved time.Duration
	// Written is when everything was on disk last; zero: not since the start.
	Written time.Time
}

// Status returns the present state.
func (s *Store) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{Err: s.trouble, Written: s.written}
	for _, t := range []time.Time{s.since, s.writing} {
		if !t.IsZero() {
			st.Unsaved = max(st.Unsaved, time.Since(t))
		}
	}
	return st
}

// fail notes trouble and says whether it is news.
func (s *Store) fail(err error) (news bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	news = (s.trouble == nil) != (err == nil)
	s.trouble = err
	return news
}

// schema identifies what this program understands of Follow, so that a newer one does not take for whole what this one
// wrote.
var schema = sync.OnceValue(func() [sha256.Size]byte {
	h := sha256.New()
	for _, file := range []protoreflect.FileDescriptor{nodev1.File_signet_node_v1_node_proto, policyv1.File_signet_policy_v1_policy_proto, policyv1.File_signet_policy_v1_revocation_proto} {
		raw, err := deterministic.Marshal(protodesc.ToFileDescriptorProto(file))
		if err != nil {
			continue // what was compiled into the program can be encoded
		}
		h.Write(raw)
	}
	return [sha256.Size]byte(h.Sum(nil))
})
