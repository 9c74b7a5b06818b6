package registry

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/store"
)

// This file holds who may change which document. A document belongs to whoever made it: to operators, who apply files, or to
// a source such as the custom resources of a cluster. Two sources never fight over a name: the first one has it.

// A Ref names a document.
type Ref struct{ Kind, Name string }

// An OwnedError says that a document belongs to somebody else.
type OwnedError struct {
	Ref
	// Document is the one that is there; without a name, a relationship with the trust domain Name that is no document's.
	Document Document
}

func (e *OwnedError) Error() string {
	if e.Kind == KindFederation && e.Document.Name == "" {
		return fmt.Sprintf("the relationship with the trust domain %q is an operator's, made with 'signet federation'; end it there first, or leave it there", e.Name)
	}
	if e.Document.Owner == "" {
		return fmt.Sprintf("%s %q was applied by an operator (%s); delete that one with 'signet delete', or choose another name", e.Kind, e.Name, clip(e.Document.File))
	}
	return fmt.Sprintf("%s %q comes from the custom resource %s; change it there (kubectl), or choose another name. If its cluster is gone, 'signet delete' removes it here with --yes", e.Kind, e.Name, e.Document.File)
}

// document is the stored form.
func (d Document) document() document {
	return document{Name: d.Name, Content: string(d.Content), File: d.File, Line: d.Line, Owner: d.Owner, Definition: d.Definition}
}

func (d document) domain() Document {
	return Document{Name: d.Name, Content: []byte(d.Content), File: d.File, Line: d.Line, Owner: d.Owner, Definition: d.Definition}
}

// same tells whether two documents are one text at one place.
func (d *Document) same(o *Document) bool {
	return d.samePlace(o) && string(d.Content) == string(o.Content)
}

func (d *Document) samePlace(o *Document) bool {
	return d.File == o.File && d.Line == o.Line && d.Owner == o.Owner && d.Definition == o.Definition
}

// checkOwner refuses a document in the place of one that belongs to somebody else. mu is held.
func (r *Registry) checkOwner(x *resource, o Options) error {
	if o.Owner != "" && x.entry != nil && (x.entry.Admin || x.entry.Downstream) {
		return fmt.Errorf("%s: admin is true; only an operator can make an admin, with 'signet apply' [DESIGN §8]", where(*x.source, "admin"))
	}
	if o.Owner != "" && x.entry != nil && x.entry.Template == nil {
		if err := r.checkPower(x); err != nil {
			return err
		}
	}
	if doc, _, _, _ := r.ix.current(x.kind, x.currentName()); doc != nil && doc.Owner != o.Owner {
		return &OwnedError{Ref{x.kind, x.name}, *doc}
	}
	if x.federation != nil {
		switch f := r.ix.federations[x.federation.TrustDomain]; {
		case f == nil:
		case f.Document == nil && o.Owner != "" && !o.TakesOver:
			return &OwnedError{Ref{x.kind, f.TrustDomain.Name()}, Document{}}
		case f.Document != nil && f.Document.Owner != o.Owner:
			return &OwnedError{Ref{x.kind, f.Document.Name}, *f.Document}
		}
	}
	return nil
}

// checkPower refuses the SPIFFE ID of an admin, of a CA below, or of what other entries descend from: who has it by whatever entry
// has the rights that an operator gave to that ID. mu is held.
func (r *Registry) checkPower(x *resource) error {
	ix, id := r.ix, x.entry.SPIFFEID
	if old := ix.entries[x.entry.ID]; old != nil && old.SPIFFEID == id {
		return nil // the operator who gave the ID more was told of it
	}
	refuse := func(what string, e *Entry) error {
		by := "the CA's configuration (admin_ids)"
		if e != nil {
			by = e.Called()
		}
		return fmt.Errorf("%s: spiffeID: %s is %s by %s; only an operator can give it, with 'signet apply' [DESIGN §8]", where(*x.source, "spiffeID"), id, what, by)
	}
	if r.c.Admins != nil && slices.Contains(r.c.Admins(), id) {
		return refuse("that of an admin", nil)
	}
	for _, e := range ix.byID[id] {
		switch {
		case e.Expired(ix.asOf):
		case e.Admin:
			return refuse("that of an admin", e)
		case e.Downstream:
			return refuse("that of a downstream CA", e)
		case e.alias():
			return refuse("that of a group of nodes", e)
		}
	}
	for _, e := range ix.byParent[id] {
		return refuse("the parent of other entries, such as", e)
	}
	return nil
}

// currentName is the name under which the document in the place of x is found.
func (x *resource) currentName() string {
	if x.kind == KindPolicyDefaults {
		return "" // there is at most one, whatever its name
	}
	return x.name
}

// ownedAt tells whether the document of a key belongs to owner. mu is held.
func (ix *index) ownedAt(key, owner string) bool {
	if id, ok := strings.CutPrefix(key, entryPrefix); ok {
		e := ix.identity(EntryID(id))
		return e != nil && e.Identity != nil && e.Identity.Owner == owner
	}
	if name, ok := strings.CutPrefix(key, federationPrefix); ok {
		td, err := spiffeid.TrustDomainFromString(name)
		f := ix.federations[td]
		return err == nil && f != nil && f.Document != nil && f.Document.Owner == owner
	}
	return false
}

// planDeletions adds the deletions that were asked for. One of a document that is not there, or not the owner's, is none. mu is
// held.
func (r *Registry) planDeletions(p *Plan, o Options) {
	for _, ref := range o.Delete {
		doc, rev, _, _ := r.ix.current(ref.Kind, ref.Name)
		if doc != nil && doc.Owner == o.Owner {
			p.delete(r.ix.deletion(ref.Kind, ref.Name), rev)
		}
	}
}

// delete adds one deletion.
func (p *Plan) delete(ch PlannedChange, rev store.Revision) {
	p.Changes = append(p.Changes, ch)
	if ch.Federation != nil {
		p.deleteFederation(ch.Federation)
		return
	}
	key := (&resource{kind: ch.Kind, name: ch.Name}).key()
	p.checks = append(p.checks, store.Check{Key: key, Modified: rev})
	p.writes = append(p.writes, store.Write{Key: key, Delete: true})
}

// Owned returns the documents of one owner by what they are.
func (r *Registry) Owned(owner string) map[Ref]Resource {
	r.mu.RLock()
	defer r.mu.RUnlock()
	out := map[Ref]Resource{}
	note := func(kind string, d *Document, rev store.Revision) {
		if d != nil && d.Owner == owner {
			out[Ref{kind, d.Name}] = Resource{Kind: kind, Document: *d, Revision: rev}
		}
	}
	for _, m := range []map[EntryID]*Entry{r.ix.entries, r.ix.templated} {
		for _, e := range m {
			note(KindIdentity, e.Identity, e.Revision)
		}
	}
	for _, p := range r.ix.policies {
		note(KindCallPolicy, &p.Document, p.Revision)
	}
	for _, v := range r.ix.revocations.documents {
		note(KindRevocation, &v.Document, v.Revision)
	}
	for _, f := range r.ix.federations {
		note(KindFederation, f.Document, f.Revision)
	}
	for _, i := range r.ix.issuers.byName {
		note(KindUserIssuer, &i.Document, i.Revision)
	}
	return out
}

// A NeedsYesError says that a plan is one that an operator must confirm.
type NeedsYesError struct{ What string }

func (e *NeedsYesError) Error() string { return e.What }

// NeedsYes returns a *NeedsYesError if an operator must confirm the plan: nobody could call a service any more, or a revocation
// hits more than it may seem.
func (p *Plan) NeedsYes() error {
	if len(p.Dangers) > 0 {
		return &NeedsYesError{strings.Join(p.Dangers, "; ")}
	}
	if len(p.Lockouts) == 0 {
		return nil
	}
	const named = 5
	var lines []string
	for i, l := range p.Lockouts {
		if i == named {
			lines = append(lines, fmt.Sprintf("and %d more services", len(p.Lockouts)-named))
			break
		}
		lines = append(lines, l.String())
	}
	return &NeedsYesError{"this takes the last allow away:\n" + strings.Join(lines, "\n")}
}

// own makes a parsed document its owner's.
func (x *resource) own(o Options) {
	for _, d := range []*Document{&x.doc, x.storedDocument()} {
		if d != nil {
			d.Owner, d.Definition = o.Owner, o.Definitions[Ref{x.kind, x.name}]
		}
	}
}

// storedDocument is the one that goes into the record, of the kinds that keep it elsewhere.
func (x *resource) storedDocument() *Document {
	switch {
	case x.entry != nil:
		return x.entry.Identity
	case x.federation != nil:
		return x.federation.Document
	}
	return nil
}
