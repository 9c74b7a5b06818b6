package svidcache

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/spiffe"
)

const (
	maxEntryIDBytes  = 255
	maxHintBytes     = 1024
	maxSelectors     = 256
	maxFederatesWith = 1000
)

// An entry is a registration entry as far as this agent needs it. It never changes.
type entry struct {
	id            string
	revision      int64
	createdAt     int64
	spiffeID      spiffeid.ID
	selectors     []spiffe.Selector
	federatesWith []spiffeid.TrustDomain
	hint          string
	includeJTI    bool
	noPrefetch    bool
	privileged    bool      // it makes its holder an admin or a CA below
	expiresAt     time.Time // zero: never

	// indexed is the one selector under which the index lists the entry.
	indexed spiffe.Selector
}

// same compares more than the revision: after an older backup of the CA's store was put back, revisions are given once more.
func (e *entry) same(o *entry) bool {
	return e.revision == o.revision && e.createdAt == o.createdAt && e.spiffeID == o.spiffeID && e.hint == o.hint && e.includeJTI == o.includeJTI &&
		e.privileged == o.privileged && e.expiresAt.Equal(o.expiresAt) && slices.Equal(e.selectors, o.selectors) && slices.Equal(e.federatesWith, o.federatesWith)
}

// readEntry checks what the CA sent. An entry without selectors would match every process and is refused.
func readEntry(td spiffeid.TrustDomain, m *nodev1.Entry) (*entry, error) {
	switch {
	case m.GetId() == "" || len(m.GetId()) > maxEntryIDBytes:
		return nil, fmt.Errorf("the entry id has %d bytes, not 1 to %d", len(m.GetId()), maxEntryIDBytes)
	case m.GetRevision() < 0:
		return nil, fmt.Errorf("revision %d is negative", m.GetRevision())
	case len(m.GetSelectors()) == 0:
		return nil, errors.New("it has no selectors")
	case len(m.GetSelectors()) > maxSelectors:
		return nil, fmt.Errorf("it has %d selectors, more than the %d allowed", len(m.GetSelectors()), maxSelectors)
	case len(m.GetHint()) > maxHintBytes:
		return nil, fmt.Errorf("its hint has %d bytes, more than the %d allowed", len(m.GetHint()), maxHintBytes)
	case len(m.GetFederatesWith()) > maxFederatesWith:
		return nil, fmt.Errorf("it federates with %d trust domains, more than the %d allowed", len(m.GetFederatesWith()), maxFederatesWith)
	}
	id, err := spiffe.ParseWorkloadID(m.GetSpiffeId())
	if err != nil {
		return nil, err
	}
	if !id.MemberOf(td) {
		return nil, fmt.Errorf("%q is not in trust domain %q", id, td.Name())
	}
	e := &entry{
		id: m.GetId(), revision: m.GetRevision(), createdAt: m.GetCreatedAt(), spiffeID: id, hint: m.GetHint(),
		includeJTI: m.GetJwtIncludeJti(), noPrefetch: m.GetDisableX509Prefetch(), privileged: m.GetAdmin() || m.GetDownstream(),
	}
	if m.GetExpiresAt() != 0 {
		e.expiresAt = time.Unix(m.GetExpiresAt(), 0)
	}
	for _, s := range m.GetSelectors() {
		selector, err := spiffe.ParseSelector(s)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(e.selectors, selector) {
			e.selectors = append(e.selectors, selector)
		}
	}
	for _, name := range m.GetFederatesWith() {
		foreign, err := spiffe.ParseTrustDomain(name)
		if err != nil {
			return nil, err
		}
		if foreign != td && !slices.Contains(e.federatesWith, foreign) {
			e.federatesWith = append(e.federatesWith, foreign)
		}
	}
	return e, nil
}

func (e *entry) expired(now time.Time) bool { return !e.expiresAt.IsZero() && !now.Before(e.expiresAt) }

// matches says whether all selectors of e are among those of the caller.
func (e *entry) matches(caller map[spiffe.Selector]struct{}) bool {
	for _, s := range e.selectors {
		if _, ok := caller[s]; !ok {
			return false
		}
	}
	return true
}

// byAge orders entries for callers: the oldest first, so that the default identity stays the same when entries are
// added, and after a restart (WAPI-21).
func byAge(a, b *entry) int {
	return cmp.Or(cmp.Compare(a.createdAt, b.createdAt), cmp.Compare(a.id, b.id))
}

// match returns the entries of a caller in their order. Of several with the same hint only the oldest is returned
// (WAPI-19).
func (s *state) match(caller map[spiffe.Selector]struct{}, now time.Time) []*entry {
	var found []*entry
	for selector := range caller {
		candidates, _ := s.index.get(selector)
		for _, e := range candidates {
			if e.matches(caller) && !e.expired(now) {
				found = append(found, e)
			}
		}
	}
	slices.SortFunc(found, byAge)
	hints := make(map[string]struct{}, len(found))
	return slices.DeleteFunc(found, func(e *entry) bool {
		if e.hint == "" {
			return false
		}
		_, taken := hints[e.hint]
		hints[e.hint] = struct{}{}
		return taken
	})
}

// An indexEdit lists entries by one selector each: the one that fewest entries share, so that a caller whose user id is
// in ten thousand entries is matched by the selectors that tell them apart.
type indexEdit struct {
	lists *tableEdit[spiffe.Selector, []*entry]
	owned map[spiffe.Selector]struct{} // lists that this edit made and may change in place
}

func (x *indexEdit) add(e *entry) {
	least := -1
	for _, s := range e.selectors {
		list, _ := x.lists.get(s)
		if least < 0 || len(list) < least {
			e.indexed, least = s, len(list)
		}
	}
	x.lists.set(e.indexed, append(x.own(e.indexed), e))
}

func (x *indexEdit) remove(e *entry) {
	list := slices.DeleteFunc(x.own(e.indexed), func(have *entry) bool { return have == e })
	if len(list) == 0 {
		x.lists.remove(e.indexed)
		delete(x.owned, e.indexed)
		return
	}
	x.lists.set(e.indexed, list)
}

func (x *indexEdit) own(s spiffe.Selector) []*entry {
	list, _ := x.lists.get(s)
	if _, ok := x.owned[s]; !ok {
		list = slices.Clone(list)
		x.owned[s] = struct{}{}
	}
	return list
}
