package spireserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// wanted are the fields of entries that are asked for.
func wanted() *types.EntryMask {
	return &types.EntryMask{
		SpiffeId: true, Selectors: true, FederatesWith: true, Admin: true, Downstream: true, ExpiresAt: true,
		RevisionNumber: true, StoreSvid: true, Hint: true, CreatedAt: true, AdditionalAttributes: true,
	}
}

// An answer is what the server says of the entries of this agent.
type answer struct {
	// all are the ids of all entries, with their states.
	all map[string]stamp
	// full are those that came in full.
	full []*types.Entry
}

// pollEntries asks for the entries, puts what is new into m, and returns what is known now.
func (p *Poller) pollEntries(ctx context.Context, conn grpc.ClientConnInterface, m *nodev1.FollowResponse) (map[string]heldEntry, error) {
	a, err := p.askEntries(ctx, entryv1.NewEntryClient(conn))
	if err != nil {
		return nil, err
	}
	return p.take(a, m), nil
}

// take puts into m what an answer has that is new, and returns what is known then.
func (p *Poller) take(a *answer, m *nodev1.FollowResponse) map[string]heldEntry {
	next := make(map[string]heldEntry, len(a.all))
	for _, e := range a.full {
		id := e.GetId()
		now, listed := a.all[id]
		if !listed {
			continue // not asked for
		}
		if old, held := p.entries[id]; held && old.stamp == now {
			next[id] = old
			continue
		}
		h := heldEntry{stamp: now, federatesWith: e.GetFederatesWith()}
		t, err := translateEntry(e)
		if err != nil {
			if !errors.Is(err, errStored) {
				p.Log.Error("the server sent a registration entry that is of no use, which is left out", "entry_id", id, "err", err)
			}
			h.federatesWith, h.unusable = nil, true
			if old, held := p.entries[id]; held && !old.unusable {
				m.RemovedEntryIds = append(m.RemovedEntryIds, id)
			}
		} else {
			// A server that was restored from a backup counts from an earlier number; the entry is another all the same.
			h.given = max(t.Revision, p.entries[id].given+1)
			t.Revision = h.given
			m.Entries = append(m.Entries, t)
		}
		next[id] = h
	}
	for id, now := range a.all {
		if _, done := next[id]; done {
			continue
		}
		// One that did not come in full is as it was, or it was deleted between the two answers.
		if old, held := p.entries[id]; held && old.stamp == now {
			next[id] = old
		}
	}
	for id, old := range p.entries {
		if _, held := next[id]; !held && !old.unusable {
			m.RemovedEntryIds = append(m.RemovedEntryIds, id)
		}
	}
	return next
}

// askEntries asks in the way of SPIRE's agents, or for everything at once where the server knows only that.
func (p *Poller) askEntries(ctx context.Context, client entryv1.EntryClient) (*answer, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if !p.whole {
		a, err := p.sync(ctx, client)
		if status.Code(err) != codes.Unimplemented {
			return a, err
		}
		p.whole = true
	}
	r, err := client.GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{OutputMask: wanted()})
	if err != nil {
		return nil, err
	}
	return p.complete(r.GetEntries())
}

// complete is the answer of a server that has sent everything.
func (p *Poller) complete(entries []*types.Entry) (*answer, error) {
	a := &answer{all: make(map[string]stamp, len(entries)), full: entries}
	for _, e := range entries {
		if err := p.list(a, e.GetId(), stampOf(e)); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// list notes that there is an entry.
func (p *Poller) list(a *answer, id string, s stamp) error {
	if id == "" {
		p.Log.Error("the server sent a registration entry without an id, which is left out")
		return nil
	}
	if _, twice := a.all[id]; twice {
		return fmt.Errorf("the server sent the registration entry %q twice", id)
	}
	if len(a.all) == maxEntries {
		return fmt.Errorf("%w: over %d registration entries", errTooMuch, maxEntries)
	}
	a.all[id] = s
	return nil
}

// sync calls SyncAuthorizedEntries: the server answers with all entries, or, if they are many, with their ids and
// revisions, of which then those are asked for that are not known.
func (p *Poller) sync(ctx context.Context, client entryv1.EntryClient) (*answer, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // the end of the stream
	stream, err := client.SyncAuthorizedEntries(ctx)
	if err != nil {
		return nil, err
	}
	s := &syncing{stream: stream}
	if err := s.send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: wanted()}); err != nil {
		return nil, err
	}
	first, err := s.receive()
	if err != nil {
		return nil, err
	}
	if len(first.GetEntryRevisions()) == 0 {
		if first.GetMore() {
			return nil, errors.New("the server sent a part of the registration entries, without their revisions")
		}
		return p.complete(first.GetEntries())
	}
	a := &answer{all: make(map[string]stamp)}
	for page := first; ; {
		if len(page.GetEntries()) > 0 {
			return nil, errors.New("the server mixed registration entries and revisions of them")
		}
		for _, r := range page.GetEntryRevisions() {
			if err := p.list(a, r.GetId(), stampOf(r)); err != nil {
				return nil, err
			}
		}
		if !page.GetMore() {
			break
		}
		if page, err = s.receive(); err != nil {
			return nil, err
		}
	}
	var lacking []string
	for id, now := range a.all {
		if old, held := p.entries[id]; !held || old.stamp != now {
			lacking = append(lacking, id)
		}
	}
	slices.Sort(lacking)
	// A server takes as many ids at once as it has sent in its first page.
	for ids := range slices.Chunk(lacking, len(first.GetEntryRevisions())) {
		if err := s.entries(a, ids); err != nil {
			return nil, err
		}
	}
	return a, stream.CloseSend()
}

// syncing is a stream of SyncAuthorizedEntries with the bytes that came over it.
type syncing struct {
	stream entryv1.Entry_SyncAuthorizedEntriesClient
	bytes  int
}

func (s *syncing) send(m *entryv1.SyncAuthorizedEntriesRequest) error {
	if err := s.stream.Send(m); err != nil && !errors.Is(err, io.EOF) { // EOF: Recv knows the reason
		return err
	}
	return nil
}

func (s *syncing) receive() (*entryv1.SyncAuthorizedEntriesResponse, error) {
	m, err := s.stream.Recv()
	if errors.Is(err, io.EOF) {
		return nil, errors.New("the server ended SyncAuthorizedEntries before it was complete")
	}
	if err != nil {
		return nil, err
	}
	if s.bytes += proto.Size(m); s.bytes > maxBytes {
		return nil, fmt.Errorf("%w: over %d bytes of registration entries", errTooMuch, maxBytes)
	}
	return m, nil
}

// entries asks for those of ids. Their states may have moved on since the revisions were sent: what comes now counts.
func (s *syncing) entries(a *answer, ids []string) error {
	if err := s.send(&entryv1.SyncAuthorizedEntriesRequest{Ids: ids}); err != nil {
		return err
	}
	asked := make(map[string]struct{}, len(ids))
	for _, id := range ids {
		asked[id] = struct{}{}
	}
	for {
		page, err := s.receive()
		if err != nil {
			return err
		}
		for _, e := range page.GetEntries() {
			if _, ok := asked[e.GetId()]; !ok {
				return fmt.Errorf("the server sent the registration entry %q, which was not asked for", e.GetId())
			}
			delete(asked, e.GetId()) // each once
			a.all[e.GetId()] = stampOf(e)
			a.full = append(a.full, e)
		}
		if !page.GetMore() {
			break
		}
	}
	return nil
}
