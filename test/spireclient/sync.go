package spireclient

import (
	"context"
	"fmt"
	"slices"
	"strings"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// A Synced says what one Sync did.
type Synced struct {
	// Revisions is how many pages of revisions came; 0 if all entries came at once.
	Revisions int
	// Asked are the entries that were asked for, in order, Requests in how many messages.
	Asked    []string
	Requests int
	// Pages is how many messages of full entries came.
	Pages int
	// Dropped are the entries that were held before and are not there any more.
	Dropped []string
}

// Mask is what a SPIRE agent asks to see of its entries.
func Mask() *types.EntryMask {
	return &types.EntryMask{SpiffeId: true, Selectors: true, FederatesWith: true, Admin: true, Downstream: true, RevisionNumber: true,
		StoreSvid: true, Hint: true, AdditionalAttributes: true, CreatedAt: true}
}

// Sync calls SyncAuthorizedEntries and takes the answers as a SPIRE agent does: it drops what is not in the first one,
// and asks for what it lacks or holds in another state, as many at a time as the first page of revisions had. What such
// an agent would stumble over is an error.
func (a *Agent) Sync(ctx context.Context) (*Synced, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := a.EntryAPI().SyncAuthorizedEntries(ctx)
	if err != nil {
		return nil, err
	}
	_ = s.Send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: Mask()}) // why it failed, says Recv
	first, err := s.Recv()
	if err != nil {
		return nil, err
	}
	done := &Synced{}
	if len(first.EntryRevisions) == 0 {
		if first.More {
			return nil, fmt.Errorf("the first answer has no revisions, and says that there is more")
		}
		fresh := map[string]*types.Entry{}
		done.Pages = 1
		for _, e := range first.Entries {
			if err := usable(e); err != nil {
				return nil, err
			}
			fresh[e.Id] = e
		}
		a.replace(fresh, done)
		return done, nil
	}
	lacking, kept, pageSize, err := a.revisions(s, first, done)
	if err != nil {
		return nil, err
	}
	for ids := range slices.Chunk(lacking, pageSize) {
		done.Requests++
		if err := s.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: ids}); err != nil {
			return nil, err
		}
		if err := receive(s, kept, done); err != nil {
			return nil, err
		}
	}
	if err := s.CloseSend(); err != nil {
		return nil, err
	}
	a.replace(kept, done)
	return done, nil
}

// revisions reads the pages of revisions. It returns, in order, what must be asked for, and what can be kept.
func (a *Agent) revisions(s entryv1.Entry_SyncAuthorizedEntriesClient, page *entryv1.SyncAuthorizedEntriesResponse, done *Synced) (lacking []string, kept map[string]*types.Entry, pageSize int, err error) {
	kept, pageSize = map[string]*types.Entry{}, len(page.EntryRevisions)
	for {
		done.Revisions++
		if len(page.Entries) > 0 {
			return nil, nil, 0, fmt.Errorf("revisions and entries are mixed in one answer")
		}
		if page.More && len(page.EntryRevisions) != pageSize || len(page.EntryRevisions) > pageSize {
			return nil, nil, 0, fmt.Errorf("page %d has %d revisions, the first one had %d", done.Revisions, len(page.EntryRevisions), pageSize)
		}
		for _, r := range page.EntryRevisions {
			if r.Id == "" || r.RevisionNumber < 0 {
				return nil, nil, 0, fmt.Errorf("revision %v: agents ignore it and drop the entry", r)
			}
			if have := a.Entries[r.Id]; have != nil && have.RevisionNumber == r.RevisionNumber && have.CreatedAt == r.CreatedAt {
				kept[r.Id] = have
			} else {
				lacking = append(lacking, r.Id)
			}
		}
		if !page.More {
			slices.Sort(lacking)
			done.Asked = lacking
			return lacking, kept, pageSize, nil
		}
		if page, err = s.Recv(); err != nil {
			return nil, nil, 0, err
		}
	}
}

func receive(s entryv1.Entry_SyncAuthorizedEntriesClient, into map[string]*types.Entry, done *Synced) error {
	for {
		page, err := s.Recv()
		if err != nil {
			return err
		}
		done.Pages++
		if len(page.EntryRevisions) > 0 {
			return fmt.Errorf("revisions came where entries were asked for")
		}
		for _, e := range page.Entries {
			if err := usable(e); err != nil {
				return err
			}
			into[e.Id] = e
		}
		if !page.More {
			return nil
		}
	}
}

// usable says why a SPIRE agent would log an entry and ignore it.
func usable(e *types.Entry) error {
	switch {
	case e.GetId() == "":
		return fmt.Errorf("an entry has no ID: %v", e)
	case e.SpiffeId == nil || e.SpiffeId.Path == "":
		return fmt.Errorf("entry %s has no SPIFFE ID", e.Id)
	case len(e.Selectors) == 0:
		return fmt.Errorf("entry %s has no selectors", e.Id)
	}
	for _, s := range e.Selectors {
		if s.Type == "" || s.Value == "" || strings.Contains(s.Type, ":") {
			return fmt.Errorf("entry %s has the selector %v", e.Id, s)
		}
	}
	return nil
}

func (a *Agent) replace(fresh map[string]*types.Entry, done *Synced) {
	for id := range a.Entries {
		if fresh[id] == nil {
			done.Dropped = append(done.Dropped, id)
		}
	}
	slices.Sort(done.Dropped)
	a.Entries = fresh
}
