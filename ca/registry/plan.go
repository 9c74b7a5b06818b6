package registry

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/policy/analyse"
)

// An Action is what apply does with one resource.
type Action int

// The actions.
const (
	Unchanged Action = iota
	Create
	Change
	Delete
)

// A PlannedChange is one line of a plan.
type PlannedChange struct {
	Action      Action
	Kind, Name  string
	Differences []string

	// Entry is what an Identity stands for: the new one, or the deleted one.
	Entry *Entry
	// Revocation is what a Revocation was compiled into: the new one, or the deleted one.
	Revocation *Revocation
	// Federation is the relationship that a Federation stands for: the new one, or the ended one.
	Federation *Federation
	// Rules are those of a CallPolicy, a line each: the new ones, or the deleted ones.
	Rules []string
}

// A Plan says what applying documents does.
type Plan struct {
	Changes  []PlannedChange
	Revision store.Revision
	// Lockouts are the services that nobody could call any more after this plan. LockoutsUnsure says that there was too
	// much to look at.
	Lockouts       []analyse.Lockout
	LockoutsUnsure bool
	// Findings are what the static checks say about the policies that the plan changes, none of them an error, and
	// FindingsOmitted how many more there are.
	Findings        []analyse.Finding
	FindingsOmitted int
	// Warnings are what else the operator should know.
	Warnings []Warning
	// Dangers say why revocations, and new admins, need an explicit yes.
	Dangers []string
	// Bans are the agents that must be banned before the plan is made anew and applied: they are revoked, and what they obtain
	// in between would not be.
	Bans []spiffeid.ID

	checks      []store.Check
	writes      []store.Write
	entries     []*Entry                           // that it writes
	policies    map[string]*policyv1.Policy        // the CallPolicies that it changes, as they will be; nil: deleted
	federations map[spiffeid.TrustDomain]*resource // that it writes
	revokes     map[string]int                     // how much each Revocation that it writes is compiled into
}

// A Warning is about a document of a plan, or about all of it, where Of is empty.
type Warning struct {
	Of   Ref
	Text string
}

// Options of Plan and Apply.
type Options struct {
	Prune bool
	// Owner is whose documents they are, and whose Prune and Delete touch; empty: operators'. Definitions are, by the document,
	// what Document.Definition becomes.
	Owner       string
	Definitions map[Ref]string
	// TakesOver tells that relationships with trust domains that are no document's become the owner's: it made them itself, elsewhere.
	TakesOver bool
	// Delete names documents of the owner to be deleted by the same plan.
	Delete []Ref
	// Namespaces are, by the name of the CallPolicy, the namespaces that may speak for services of their own only.
	Namespaces map[string]Namespace
	// PlannedAt, if not 0, refuses with ErrConflict what was changed after that revision.
	PlannedAt store.Revision
}

// ErrTooMany means that a set is larger than one commit.
var ErrTooMany = fmt.Errorf("more than %d documents or changes in one apply; send them in chunks", MaxDocuments)

// Plan checks documents as a whole and works out what applying them would change. It changes nothing.
func (r *Registry) Plan(docs []strictyaml.Document, o Options) (*Plan, error) {
	if len(docs)+len(o.Delete) > MaxDocuments {
		return nil, ErrTooMany
	}
	var errs []error
	var all []*resource
	seen, similar := map[string]string{}, map[string]string{}
	for _, doc := range docs {
		x, err := r.parseResource(doc)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		x.own(o)
		id := x.key()
		if first, twice := seen[id]; twice && x.federation != nil {
			errs = append(errs, fmt.Errorf("%s: a Federation with %q is in %s already", where(doc, "trustDomain"), x.federation.TrustDomain.Name(), first))
			continue
		} else if twice {
			errs = append(errs, fmt.Errorf("%s: %s %q is in %s already", where(doc, "name"), x.kind, x.name, first))
			continue
		}
		seen[id] = where(doc, "name")
		if x.entry != nil {
			if first, twice := similar[x.entry.similar()]; twice {
				errs = append(errs, fmt.Errorf("%s: Identity %q is the same registration as Identity %q: one spiffeID, one `on`, one `match`", where(doc, "name"), x.name, first))
			}
			similar[x.entry.similar()] = x.name
		}
		all = append(all, x)
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	p, view, err := r.planAll(all, o, seen)
	if err != nil {
		return nil, err
	}
	return p, p.checkPolicies(view, all)
}

// planAll works out what changes. The view it returns is what the policies of the plan are checked on, without the lock.
func (r *Registry) planAll(all []*resource, o Options, seen map[string]string) (*Plan, *policyView, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	p := &Plan{Revision: r.ix.revision}
	r.planDeletions(p, o)
	deleted := map[string]bool{}
	for _, w := range p.writes {
		deleted[w.Key] = true
	}
	goes := func(key string) bool {
		return deleted[key] || o.Prune && seen[key] == "" && r.ix.ownedAt(key, o.Owner)
	}
	for _, x := range all {
		if err := r.checkOwner(x, o); err != nil {
			if _, ok := errors.AsType[*OwnedError](err); ok {
				err = fmt.Errorf("%s: %w", where(*x.source, "name"), err)
			}
			return nil, nil, err
		}
		if ns, ok := o.Namespaces[x.name]; ok && x.compiled != nil {
			if err := r.checkNamespace(p, x, ns); err != nil {
				return nil, nil, err
			}
		}
		plan := r.planOne
		if x.federation != nil {
			plan = r.planFederation
		}
		if err := plan(p, x, o, goes); err != nil {
			return nil, nil, err
		}
	}
	if o.Prune {
		r.planPrune(p, all, o.Owner)
	}
	if len(p.writes) > store.MaxWrites { // some documents are two writes
		return nil, nil, fmt.Errorf("%w: %w", ErrTooMany, ErrCommitTooLarge)
	}
	if err := p.checkCommitSize(); err != nil {
		return nil, nil, err
	}
	r.warnTemplates(p)
	p.notePolicies(all)
	if err := r.checkServiceSizes(p); err != nil {
		return nil, nil, err
	}
	if err := r.checkFederations(p, all); err != nil {
		return nil, nil, err
	}
	if err := r.checkUserIssuers(p, all); err != nil {
		return nil, nil, err
	}
	if err := r.guardRollouts(p); err != nil {
		return nil, nil, err
	}
	if r.revocationsAfter(p) > MaxRevocations {
		return nil, nil, ErrTooManyRevocations
	}
	return p, r.policyView(p), nil
}

// revocationsAfter counts what is revoked after a plan. mu is held.
func (r *Registry) revocationsAfter(p *Plan) int {
	n := len(r.ix.revocations.items)
	for _, w := range p.writes {
		if name, ok := strings.CutPrefix(w.Key, revocationPrefix); ok {
			if old := r.ix.revocations.documents[name]; old != nil {
				n -= len(old.Items)
			}
			n += p.revokes[name]
		}
	}
	return n
}

// current returns the stored form of a resource. mu is held.
func (ix *index) current(kind, name string) (doc *Document, rev store.Revision, created time.Time, entry *Entry) {
	switch kind {
	case KindIdentity:
		if e := ix.identity(EntryID(identityPrefix + name)); e != nil {
			return e.Identity, e.Revision, e.CreatedAt, e
		}
	case KindCallPolicy:
		if p := ix.policies[name]; p != nil {
			return &p.Document, p.Revision, p.CreatedAt, nil
		}
	case KindRevocation:
		if v := ix.revocations.documents[name]; v != nil {
			return &v.Document, v.Revision, v.CreatedAt, nil
		}
	case KindUserIssuer:
		if i := ix.issuers.byName[name]; i != nil {
			return &i.Document, i.Revision, i.CreatedAt, nil
		}
	case KindFederation:
		if f := ix.federationNamed(name); f != nil {
			return f.Document, f.Revision, f.CreatedAt, nil
		}
	case KindPolicyDefaults:
		if d := ix.defaults; d != nil && (name == "" || d.Document.Name == name) {
			return &d.Document, d.Revision, d.CreatedAt, nil
		}
	}
	return nil, 0, time.Time{}, nil
}

// planOne adds what one document changes. goes tells which resources, by key, the same plan deletes. mu is held.
func (r *Registry) planOne(p *Plan, x *resource, o Options, goes func(key string) bool) error {
	doc, rev, created, old := r.ix.current(x.kind, x.currentName())
	if o.PlannedAt != 0 && rev > o.PlannedAt {
		return fmt.Errorf("%s %q: %w", x.kind, x.name, ErrConflict)
	}
	if x.entry != nil {
		id, ok := r.ix.similar[x.entry.similar()]
		if ok && id != x.entry.ID && r.ix.identity(id).Identity != nil && !goes(entryPrefix+string(id)) {
			return fmt.Errorf("%s:%d: Identity %q is the same registration as Identity %q: one spiffeID, one `on`, one `match`", x.doc.File, x.doc.Line, x.name, r.ix.identity(id).Identity.Name)
		}
	}
	if err := r.ix.checkHints(x); err != nil {
		return err
	}
	ch := PlannedChange{Kind: x.kind, Name: x.name, Action: Create, Entry: x.entry}
	if doc == nil {
		created = r.c.Now().Truncate(time.Second)
	} else {
		ch.Action, ch.Differences = r.compare(x, old, doc)
	}
	if ch.Action != Unchanged {
		ch.Rules = ruleLines(x.compiled)
	}
	if x.revocation != nil && ch.Action != Unchanged {
		if err := r.planRevocation(p, x); err != nil {
			return err
		}
	}
	ch.Revocation = x.revoked
	p.Changes = append(p.Changes, ch)
	if ch.Action == Unchanged {
		return nil
	}
	b, err := x.encode(created)
	if err != nil {
		return err
	}
	p.checks = append(p.checks, store.Check{Key: x.key(), Modified: rev})
	p.writes = append(p.writes, store.Write{Key: x.key(), Value: b})
	if x.entry != nil {
		p.entries = append(p.entries, x.entry)
	}
	return nil
}

// planRevocation compiles a Revocation. mu is held.
func (r *Registry) planRevocation(p *Plan, x *resource) error {
	var err error
	if x.revoked, err = r.compileRevocation(x.revocation, x.doc); err != nil {
		return fmt.Errorf("%s:%d: Revocation %q: %w", x.doc.File, x.doc.Line, x.name, err)
	}
	if p.revokes == nil {
		p.revokes = map[string]int{}
	}
	p.revokes[x.name] = len(x.revoked.Items)
	if d := r.reach(x.revocation).Danger; d != "" {
		p.Dangers = append(p.Dangers, fmt.Sprintf("Revocation %q: %s", x.name, d))
	}
	if n := r.ix.nodes[x.revocation.Agent]; n != nil && !n.Banned {
		p.Bans = append(p.Bans, n.ID)
	}
	return nil
}

// deletion is the change that deletes a resource. mu is held.
func (ix *index) deletion(kind, name string) PlannedChange {
	ch := PlannedChange{Action: Delete, Kind: kind, Name: name}
	_, _, _, ch.Entry = ix.current(kind, name)
	if kind == KindRevocation {
		ch.Revocation = ix.revocations.documents[name]
	}
	if kind == KindFederation {
		ch.Federation = ix.federationNamed(name)
	}
	if p := ix.policies[name]; kind == KindCallPolicy && p != nil {
		ch.Rules = ruleLines(p.Compiled)
	}
	return ch
}

func (r *Registry) planPrune(p *Plan, all []*resource, owner string) {
	named, kinds := map[string]bool{}, map[string]bool{}
	for _, x := range all {
		named[x.key()], kinds[x.kind] = true, true
	}
	remove := func(kind string, doc *Document, key string, rev store.Revision) {
		if kinds[kind] && !named[key] && doc.Owner == owner {
			p.delete(r.ix.deletion(kind, doc.Name), rev)
		}
	}
	for _, m := range []map[EntryID]*Entry{r.ix.entries, r.ix.templated} {
		for id, e := range m {
			if e.Identity != nil {
				remove(KindIdentity, e.Identity, entryPrefix+string(id), e.Revision)
			}
		}
	}
	// Revocations are never pruned: un-revoking is always explicit, and commands and alarms make them beside the files.
	for name, pol := range r.ix.policies {
		remove(KindCallPolicy, &pol.Document, policyPrefix+name, pol.Revision)
	}
	for name, i := range r.ix.issuers.byName {
		remove(KindUserIssuer, &i.Document, userIssuerPrefix+name, i.Revision)
	}
	for td, f := range r.ix.federations {
		if f.Document != nil {
			remove(KindFederation, f.Document, federationPrefix+td.Name(), f.Revision)
		}
	}
	slices.SortStableFunc(p.Changes, func(a, b PlannedChange) int {
		if (a.Action == Delete) != (b.Action == Delete) {
			if a.Action == Delete {
				return 1
			}
			return -1
		}
		if a.Action != Delete {
			return 0
		}
		return strings.Compare(a.Kind+a.Name, b.Kind+b.Name)
	})
}

// Apply commits a plan: all of it, or nothing with ErrConflict if a resource was changed after planning.
func (r *Registry) Apply(ctx context.Context, p *Plan) (store.Revision, error) {
	if len(p.writes) == 0 {
		return p.Revision, nil
	}
	r.amu.Lock()
	defer r.amu.Unlock()
	if err := r.stillAlone(p); err != nil {
		return 0, err
	}
	r.mu.RLock()
	n, tooLarge := r.revocationsAfter(p), r.checkServiceSizes(p)
	r.mu.RUnlock()
	if tooLarge != nil { // by what was applied since it was planned
		return 0, tooLarge
	}
	if n > MaxRevocations {
		return 0, ErrTooManyRevocations
	}
	return r.commit(ctx, p.checks, p.writes)
}

// stillAlone refuses a plan if what it registers was registered under another name after planning. amu is held.
func (r *Registry) stillAlone(p *Plan) error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for td, x := range p.federations {
		if f := r.ix.federationNamed(x.name); f != nil && f.TrustDomain != td && !slices.ContainsFunc(p.writes, func(w store.Write) bool { return w.Delete && w.Key == federationPrefix+f.TrustDomain.Name() }) {
			return fmt.Errorf("two Federations %q, with %q and with %q: %w", x.name, f.TrustDomain.Name(), td.Name(), ErrConflict)
		}
	}
	for _, e := range p.entries {
		id, ok := r.ix.similar[e.similar()]
		if !ok || id == e.ID || r.ix.identity(id).Identity == nil || slices.ContainsFunc(p.writes, func(w store.Write) bool { return w.Key == entryPrefix+string(id) }) {
			continue
		}
		return fmt.Errorf("two Identities are one registration, %q and %q: %w", e.Identity.Name, r.ix.identity(id).Identity.Name, ErrConflict)
	}
	return nil
}

// guardRollouts refuses a plan that changes a policy which is being rolled out, and makes it fail if a roll-out begins before
// it is committed. What was fetched for a UserIssuer goes with it. mu is held.
func (r *Registry) guardRollouts(p *Plan) error {
	guarded := false
	for _, w := range slices.Clone(p.writes) {
		if name, ok := strings.CutPrefix(w.Key, userIssuerPrefix); ok && w.Delete && len(p.writes) < store.MaxWrites {
			p.writes = append(p.writes, store.Write{Key: userKeysPrefix + name, Delete: true})
		}
		if name, ok := strings.CutPrefix(w.Key, policyPrefix); ok {
			if err := r.ix.rollouts.refuse(name); err != nil {
				return err
			}
			guarded = true
		}
	}
	if guarded {
		p.checks = append(p.checks, store.Check{Key: rolloutGuard, Modified: r.ix.rollouts.guard})
	}
	return nil
}

// A Resource is a stored document.
type Resource struct {
	Kind      string
	Document  Document
	EntryID   EntryID
	CreatedAt time.Time
	Revision  store.Revision
	// Templated tells that it is a templated Identity, which stands for Pods pods now.
	Templated bool
	Pods      int
}

// Resources returns the documents of a kind in order of name, or the one of that name.
func (r *Registry) Resources(kind, name string) ([]Resource, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var names []string
	switch kind {
	case KindIdentity:
		for _, m := range []map[EntryID]*Entry{r.ix.entries, r.ix.templated} {
			for _, e := range m {
				if e.Identity != nil {
					names = append(names, e.Identity.Name)
				}
			}
		}
	case KindCallPolicy:
		for n := range r.ix.policies {
			names = append(names, n)
		}
	case KindUserIssuer:
		for n := range r.ix.issuers.byName {
			names = append(names, n)
		}
	case KindFederation:
		for _, f := range r.ix.federations {
			if f.Document != nil {
				names = append(names, f.Document.Name)
			}
		}
	case KindPolicyDefaults:
		if d := r.ix.defaults; d != nil {
			names = append(names, d.Document.Name)
		}
	case KindRevocation:
		for n := range r.ix.revocations.documents {
			names = append(names, n)
		}
	default:
		return nil, invalid("kind", kind, "is not one of %s", kinds)
	}
	slices.Sort(names)
	var out []Resource
	for _, n := range names {
		if name != "" && n != name {
			continue
		}
		doc, rev, created, e := r.ix.current(kind, n)
		res := Resource{Kind: kind, Document: *doc, CreatedAt: created, Revision: rev}
		if e != nil {
			res.EntryID = e.ID
			if e.Template != nil {
				res.Templated, res.Pods = true, r.ix.derived.rules[RuleName(n)]
			}
		}
		out = append(out, res)
	}
	if name != "" && len(out) == 0 {
		return nil, fmt.Errorf("%s %q: %w", kind, clip(name), ErrNotFound)
	}
	return out, nil
}

// PlanDelete plans the removal of one resource. One that does not belong to operators is only removed if any is true.
func (r *Registry) PlanDelete(kind, name string, any bool) (*Plan, error) {
	have, err := r.Resources(kind, name)
	if err != nil {
		return nil, err
	}
	if doc := have[0].Document; doc.Owner != "" && !any {
		return nil, &OwnedError{Ref{kind, name}, doc}
	}
	p, view, err := r.planDelete(kind, name)
	if err != nil {
		return nil, err
	}
	return p, p.checkPolicies(view, nil)
}

func (r *Registry) planDelete(kind, name string) (*Plan, *policyView, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	doc, rev, _, _ := r.ix.current(kind, name)
	if doc == nil { // since Resources looked
		return nil, nil, fmt.Errorf("%s %q: %w", kind, clip(name), ErrNotFound)
	}
	p := &Plan{Revision: r.ix.revision}
	p.delete(r.ix.deletion(kind, name), rev)
	p.notePolicies(nil)
	if err := r.guardRollouts(p); err != nil {
		return nil, nil, err
	}
	return p, r.policyView(p), nil
}

// notePolicies fills in which policies the plan changes.
func (p *Plan) notePolicies(all []*resource) {
	p.policies = map[string]*policyv1.Policy{}
	for _, w := range p.writes {
		if name, ok := strings.CutPrefix(w.Key, policyPrefix); ok {
			p.policies[name] = nil
		}
	}
	for _, x := range all {
		if _, changed := p.policies[x.name]; changed && x.compiled != nil {
			p.policies[x.name] = x.compiled
		}
	}
}
