package svidcache

import (
	"cmp"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/spiffe"
)

// An EntryState is a registration entry with what is held for it, for explanations. It has no key.
type EntryState struct {
	ID            string
	SPIFFEID      spiffeid.ID
	Selectors     []spiffe.Selector
	Hint          string
	Revision      int64
	CreatedAt     int64
	ExpiresAt     time.Time // zero: never
	Expired       bool
	RemovedAt     time.Time // when the CA took it from this node; zero: it is held
	FederatesWith []spiffeid.TrustDomain
	// MissingBundles are those of FederatesWith whose bundle the CA has not sent.
	MissingBundles []spiffeid.TrustDomain

	// SVID is the X509-SVID; nil: none is held.
	SVID *SVIDState
	// Watchers are the subscriptions for which it is held.
	Watchers int
	// InFlight says that the CA is being asked; Failures how many attempts in a row came to nothing; Failed what the last
	// one was, at FailedAt, and RetryAt when the next is due.
	InFlight          bool
	Failures          int
	Failed            error
	FailedAt, RetryAt time.Time
}

// An SVIDState is an X509-SVID without its key.
type SVIDState struct {
	NotBefore, NotAfter, RenewAt time.Time
	// Authority is the id of the authority that signed it.
	Authority string
	// Tainted and Gone say what became of that authority in the bundle.
	Tainted, Gone bool
	// Valid says that it may be handed out; Outdated that it is of an older revision of the entry.
	Valid, Outdated bool
}

// Older says whether e stands before o where a caller has both: of two with the same hint, it gets the older one.
func (e *EntryState) Older(o *EntryState) bool {
	return cmp.Or(cmp.Compare(e.CreatedAt, o.CreatedAt), cmp.Compare(e.ID, o.ID)) < 0
}

// PolicySet is the call policies for an ID, as they are held; nil if the CA has told of none yet, or has none to tell of.
func (c *Cache) PolicySet(id spiffeid.ID) *policyv1.PolicySet {
	p := c.state.Load().policies
	var found []*policyv1.Policy
	for _, policy := range p.sorted { // not by ofID, which is bounded by who asks it
		if slices.ContainsFunc(policy.GetServices(), func(pattern string) bool { return c.config.ServiceMatches(pattern, id) }) {
			found = append(found, policy)
		}
	}
	return p.set(c.config.TrustDomain, found, nil)
}

// Entries returns each entry that keep takes: those that are held and those that were lately (gone), of which the one that
// went last comes first. keep sees the selectors only, so that a node of many entries is looked through quickly; it must not
// change them.
func (c *Cache) Entries(keep func(id string, spiffeID spiffeid.ID, selectors []spiffe.Selector, gone bool) bool) []EntryState {
	s := c.state.Load()
	now := c.config.Now()
	var found []*entry
	s.entries.all(func(_ string, e *entry) bool {
		if keep(e.id, e.spiffeID, e.selectors, false) {
			found = append(found, e)
		}
		return true
	})
	slices.SortFunc(found, byAge)

	c.mu.Lock()
	defer c.mu.Unlock()
	all := make([]EntryState, 0, len(found))
	for _, e := range found {
		all = append(all, c.describe(s, e, now))
	}
	for _, r := range slices.Backward(c.past.entries) {
		if _, back := s.entries.get(r.entry.id); !back && keep(r.entry.id, r.entry.spiffeID, r.entry.selectors, true) {
			gone := describeEntry(s, r.entry, now)
			gone.RemovedAt = r.at
			all = append(all, gone)
		}
	}
	return all
}

func describeEntry(s *state, e *entry, now time.Time) EntryState {
	d := EntryState{ID: e.id, SPIFFEID: e.spiffeID, Selectors: e.selectors, Hint: e.hint, Revision: e.revision, CreatedAt: e.createdAt,
		ExpiresAt: e.expiresAt, Expired: e.expired(now), FederatesWith: e.federatesWith}
	for _, td := range e.federatesWith {
		if s.bundles[td] == nil {
			d.MissingBundles = append(d.MissingBundles, td)
		}
	}
	return d
}

// describe is called with mu held.
func (c *Cache) describe(s *state, e *entry, now time.Time) EntryState {
	d := describeEntry(s, e, now)
	if i := slices.IndexFunc(c.past.failed, func(f failedIssue) bool { return f.entryID == e.id }); i >= 0 {
		d.Failed, d.FailedAt = c.past.failed[i].err, c.past.failed[i].at
	}
	r := c.records[e.id]
	if r == nil {
		return d
	}
	d.Watchers, d.InFlight, d.Failures = len(r.watchers), r.inFlight, r.failures
	if wait := time.Until(r.retryAt); !r.retryAt.IsZero() && wait > 0 {
		d.RetryAt = now.Add(wait)
	}
	if v := r.svid; v != nil {
		own := s.bundles[c.config.TrustDomain]
		d.SVID = &SVIDState{NotBefore: v.notBefore, NotAfter: v.notAfter, RenewAt: v.renewAt, Authority: v.authority, Valid: r.serves(now),
			Outdated: v.entryRevision < e.revision, Tainted: own != nil && has(own.tainted, v.signer),
			Gone: own != nil && v.signer != "" && !has(own.signers, v.signer) && !has(own.tainted, v.signer)}
	}
	return d
}

func compareSelectors(a, b spiffe.Selector) int {
	return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Value, b.Value))
}
