package nodeapi

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/spireproto"
)

// How SPIRE's agents learn of their entries: they poll. signet's own agents Follow instead. [SPIRE-PROTOCOL §5]

const (
	// DefaultSyncPage is how many entries or revisions a message holds at most. SPIRE's agents know this number.
	DefaultSyncPage = 500
	// maxSyncBytes bounds a message of full entries: SPIRE's agents take 4 MiB.
	maxSyncBytes = 3 << 20
	// maxSync bounds a whole stream. An agent gives itself 30 seconds.
	maxSync = time.Minute
	// maxSyncsPerAgent is how many streams one agent may have at a time. An honest one has one, or two after it lost one.
	maxSyncsPerAgent = 4
	// catchUp is the wait for an index that lags, well below an agent's 30 seconds.
	catchUp = 10 * time.Second
)

var (
	errSyncMask    = status.Error(codes.InvalidArgument, "output_mask: revision_number must be set, since entries are compared by it")
	errSyncIDs     = status.Error(codes.InvalidArgument, "ids: the first message must not ask for any; the revisions come first")
	errSyncSilent  = status.Errorf(codes.DeadlineExceeded, "the sync was not done after %v; begin anew", maxSync)
	errTooManySync = status.Errorf(codes.ResourceExhausted, "more than %d streams of this agent sync at a time", maxSyncsPerAgent)
	errSyncRepeats = status.Error(codes.ResourceExhausted, "ids: more were asked for on this stream than there are entries; begin anew")
	errNotCaughtUp = status.Error(codes.Unavailable, registry.ErrNotReady.Error())
)

// SyncAuthorizedEntries tells an agent which entries it may serve: all of them if they fit one message, or else their
// revisions, and then those that it asks for. What it tells is as of one revision, whatever changes meanwhile.
func (a *API) SyncAuthorizedEntries(s entryv1.Entry_SyncAuthorizedEntriesServer) error {
	c := access.From(s.Context())
	if !a.beginSync(c.ID) {
		return errTooManySync
	}
	defer a.endSync(c.ID)
	done := make(chan error, 1)
	go func() { done <- a.sync(s, c) }()
	timer := time.NewTimer(maxSync)
	defer timer.Stop()
	// An agent that neither reads nor writes blocks sync for ever; the handler's return ends the stream and with it that.
	select {
	case err := <-done:
		return err
	case <-timer.C:
		return errSyncSilent
	case <-a.stop:
		return errStopping
	}
}

func (a *API) beginSync(agent spiffeid.ID) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.syncs[agent] >= maxSyncsPerAgent {
		return false
	}
	a.syncs[agent]++
	return true
}

func (a *API) endSync(agent spiffeid.ID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.syncs[agent]--; a.syncs[agent] == 0 {
		delete(a.syncs, agent)
	}
}

func (a *API) sync(s entryv1.Entry_SyncAuthorizedEntriesServer, c *access.Caller) error {
	first, err := s.Recv()
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil:
		return err
	case len(first.Ids) > 0:
		return errSyncIDs
	case first.OutputMask != nil && !first.OutputMask.RevisionNumber:
		return errSyncMask
	}
	entries, err := a.scope(s.Context(), c)
	if err != nil {
		return err
	}
	if len(entries) <= a.c.SyncPage {
		if all, ok := spireEntries(entries, first.OutputMask); ok {
			return s.Send(&entryv1.SyncAuthorizedEntriesResponse{Entries: all})
		}
	}
	if err := a.sendRevisions(s, entries); err != nil {
		return err
	}
	asked := 0
	for {
		req, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if len(req.Ids) > a.c.SyncPage {
			return status.Errorf(codes.ResourceExhausted, "ids: %d in one message, at most %d are allowed", len(req.Ids), a.c.SyncPage)
		}
		// An honest agent asks for each entry once. Without a bound a few bytes would buy megabytes, again and again.
		if asked += max(1, len(req.Ids)); asked > len(entries)+a.c.SyncPage {
			return errSyncRepeats
		}
		if _, err := a.c.Guard.CheckAgent(s.Context(), c); err != nil {
			return err
		}
		if err := a.sendEntries(s, pick(entries, req.Ids), first.OutputMask); err != nil {
			return err
		}
	}
}

// scope returns what the agent may serve, up to date: an agent drops what is not in the answer, so there is none from
// an index that lags or does not know the agent.
func (a *API) scope(ctx context.Context, c *access.Caller) ([]*registry.Entry, error) {
	bctx, cancel := context.WithTimeout(ctx, a.catchUp)
	defer cancel()
	if _, err := a.c.Registry.Barrier(bctx); err != nil {
		if ctx.Err() != nil {
			return nil, status.FromContextError(ctx.Err()).Err()
		}
		a.c.Log.Warn("an agent cannot sync before the index has caught up with the store", "node_id", c.ID.String(), "err", err)
		return nil, errNotCaughtUp
	}
	if a.c.Registry.PodsUnknown(c.ID) {
		a.c.Log.Warn("an agent cannot sync before the pods of its cluster are known", "node_id", c.ID.String())
		return nil, errNotCaughtUp
	}
	entries, attested := a.c.Registry.Scope(c.ID)
	if !attested { // evicted or banned since the call began: say which
		if _, err := a.c.Guard.CheckAgent(ctx, c); err != nil {
			return nil, err
		}
		return nil, errNotCaughtUp
	}
	return entries, nil
}

// spireEntries returns the entries as they are sent, or false if they are too large for one message.
func spireEntries(entries []*registry.Entry, m *types.EntryMask) ([]*types.Entry, bool) {
	out := make([]*types.Entry, len(entries))
	size := 0
	for i, e := range entries {
		out[i] = spireproto.Entry(e, m)
		if size += proto.Size(out[i]); size > maxSyncBytes {
			return nil, false
		}
	}
	return out, true
}

// sendRevisions sends the first answer: pages that are full but for the last, since agents take the length of the first
// one for how many entries they may ask for at once.
func (a *API) sendRevisions(s entryv1.Entry_SyncAuthorizedEntriesServer, entries []*registry.Entry) error {
	for from := 0; from < len(entries); from += a.c.SyncPage {
		part := entries[from:min(len(entries), from+a.c.SyncPage)]
		page := &entryv1.SyncAuthorizedEntriesResponse{EntryRevisions: make([]*entryv1.EntryRevision, len(part)), More: from+len(part) < len(entries)}
		for i, e := range part {
			page.EntryRevisions[i] = &entryv1.EntryRevision{Id: string(e.ID), RevisionNumber: int64(e.Revision), CreatedAt: e.CreatedAt.Unix()}
		}
		if err := s.Send(page); err != nil {
			return err
		}
	}
	return nil
}

// pick returns those of entries, which are in order of ID, that ids name, each once. Unknown IDs are passed over.
func pick(entries []*registry.Entry, ids []string) []*registry.Entry {
	ids = slices.Clone(ids)
	slices.Sort(ids)
	var out []*registry.Entry
	for _, id := range slices.Compact(ids) {
		at, found := slices.BinarySearchFunc(entries, id, func(e *registry.Entry, id string) int { return strings.Compare(string(e.ID), id) })
		if found {
			out = append(out, entries[at])
		}
	}
	return out
}

// sendEntries sends full entries in pages, of which the last, that may be empty, has no more behind it.
func (a *API) sendEntries(s entryv1.Entry_SyncAuthorizedEntriesServer, entries []*registry.Entry, m *types.EntryMask) error {
	page, size := &entryv1.SyncAuthorizedEntriesResponse{}, 0
	for _, e := range entries {
		one := spireproto.Entry(e, m)
		n := proto.Size(one)
		if len(page.Entries) == a.c.SyncPage || len(page.Entries) > 0 && size+n > maxSyncBytes {
			page.More = true
			if err := s.Send(page); err != nil {
				return err
			}
			page, size = &entryv1.SyncAuthorizedEntriesResponse{}, 0
		}
		page.Entries = append(page.Entries, one)
		size += n
	}
	return s.Send(page)
}

// GetAuthorizedEntries is the older way: everything in one message.
func (a *API) GetAuthorizedEntries(ctx context.Context, req *entryv1.GetAuthorizedEntriesRequest) (*entryv1.GetAuthorizedEntriesResponse, error) {
	entries, err := a.scope(ctx, access.From(ctx))
	if err != nil {
		return nil, err
	}
	all, ok := spireEntries(entries, req.OutputMask)
	if !ok {
		return nil, status.Errorf(codes.ResourceExhausted, "the agent's %d entries do not fit one message; use SyncAuthorizedEntries", len(entries))
	}
	return &entryv1.GetAuthorizedEntriesResponse{Entries: all}, nil
}
