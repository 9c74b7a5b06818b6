package authority

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store"
)

// This file moves authorities through their lives. Each step is one commit, checked against the index and against every
// record that it builds on: of two operators at once one wins, and a crash leaves the state of before or of after.

// Kind is what an authority signs: X509-SVIDs, JWT-SVIDs or WIT-SVIDs.
type Kind = keys.Use

// The kinds of authorities.
const (
	KindX509 = keys.UseX509
	KindJWT  = keys.UseJWT
	KindWIT  = keys.UseWIT
)

const (
	// maxPublished is how many authorities of a kind may be in the bundle. Every one of them is trusted by everybody.
	maxPublished = 16

	// keptRevoked is how many records of revoked authorities of a kind are kept, for those who ask what became of them and
	// for callers whose SVID one of them has signed.
	keptRevoked = 10

	// signedSlack is how long after the last moment at which an SVID of an authority can be valid the authority still counts
	// as needed: another replica may have signed a little longer, and a verifier's clock may be late.
	signedSlack = 2 * time.Minute
)

var (
	// ErrConflict is returned when somebody else changed the authorities at the same moment. Nothing was changed.
	ErrConflict = errors.New("somebody else changed the authorities at this moment; look again with signet authority list and retry")

	// ErrUnknownAuthority is returned for an id that no authority of the kind has.
	ErrUnknownAuthority = errors.New("no such authority; signet authority list shows all")

	// ErrTooMany is returned by Prepare when the bundle holds as many authorities as it may.
	ErrTooMany = errors.New("the bundle holds as many authorities as it may; revoke old ones first")

	// ErrNotYet is in the chain of the error of Activate for an authority that is not valid yet, or no more.
	ErrNotYet = errors.New("it cannot sign now")
)

// A StateError says that an authority is not in the state from which the step can be made.
type StateError struct {
	Kind  Kind
	ID    string
	State State
	// Want is the state it would have to be in.
	Want State
}

func (e *StateError) Error() string {
	hint := ""
	switch {
	case e.State == StateActive && e.Want != StatePrepared:
		hint = "; activate another one first, or say that the key was stolen"
	case e.State == StateOld && e.Want == StateTainted:
		hint = "; taint it first, so that what it signed is re-issued"
	}
	return fmt.Sprintf("%s authority %s is %s, not %s%s", e.Kind, e.ID, e.State, e.Want, hint)
}

// A life is when an authority came into each of its states. Authorities that were made before this was recorded, and the
// first ones, lack the early moments.
type life struct {
	PreparedAt    time.Time `json:"prepared_at,omitzero"`
	ActivatedAt   time.Time `json:"activated_at,omitzero"`
	DeactivatedAt time.Time `json:"deactivated_at,omitzero"`
	TaintedAt     time.Time `json:"tainted_at,omitzero"`
	RevokedAt     time.Time `json:"revoked_at,omitzero"`

	// SignedUntil is set when it stops signing: nothing that it signed is valid after that.
	SignedUntil time.Time `json:"signed_until,omitzero"`

	reach
}

// An Authority is one authority in any state, with what is known of its life. Moments that have not come are zero.
type Authority struct {
	Kind       Kind
	ID         string
	Generation uint64
	State      State
	// Certificate is nil for JWT and WIT authorities.
	Certificate *x509.Certificate
	// Above leads from the issuer of Certificate to the root, which is the last and the one that is in the bundle. It is
	// empty for self-signed X.509 authorities.
	Above []*x509.Certificate
	// NotBefore and NotAfter are the time in which it, and all above it, is valid.
	NotBefore, NotAfter time.Time

	PreparedAt, ActivatedAt, DeactivatedAt, TaintedAt, RevokedAt time.Time
	// SignedUntil is the moment after which nothing that an old, tainted or revoked authority signed is valid.
	SignedUntil time.Time
}

// PublishedID is the id under which the bundle holds the authority, and by which agents say that they have handed it on:
// below an upstream CA that of the root, else its own.
func (a Authority) PublishedID() string {
	if len(a.Above) == 0 {
		return a.ID
	}
	return rootID(a.Above[len(a.Above)-1])
}

// Authorities returns all authorities of a kind in every state, oldest first.
func (s *Set) Authorities(kind Kind) []Authority { return s.current.Load().authorities(kind) }

// Prepared returns the PublishedIDs of the authorities that are prepared, of every kind, sorted. It costs next to nothing, and its
// result must not be changed.
func (s *Set) Prepared() []string { return s.current.Load().prepared }

func (n *snapshot) authorities(kind Kind) []Authority {
	var out []Authority
	add := func(id string, generation uint64, state State, cert *x509.Certificate, notBefore, notAfter time.Time, l life) {
		out = append(out, Authority{
			Kind: kind, ID: id, Generation: generation, State: state, Certificate: cert, NotBefore: notBefore, NotAfter: notAfter,
			PreparedAt: l.PreparedAt, ActivatedAt: l.ActivatedAt, DeactivatedAt: l.DeactivatedAt, TaintedAt: l.TaintedAt,
			RevokedAt: l.RevokedAt, SignedUntil: l.SignedUntil,
		})
	}
	if kind == KindX509 {
		for _, a := range n.x509 {
			notBefore, notAfter := a.validity()
			add(a.id, a.generation, a.state, a.certificate, notBefore, notAfter, a.life)
			out[len(out)-1].Above = slices.Clone(a.above)
		}
	} else {
		for _, a := range n.tokens(kind) {
			add(a.id, a.generation, a.state, nil, a.notBefore, a.expiresAt, a.life)
		}
	}
	slices.SortFunc(out, func(a, b Authority) int {
		return cmp.Or(cmp.Compare(a.Generation, b.Generation), cmp.Compare(a.ID, b.ID))
	})
	return out
}

// A Step is what became of a change.
type Step struct {
	Authority
	// Changed is false if the authority was in that state already, and nothing was written.
	Changed bool
}

// Prepare makes a new authority and publishes it; it signs nothing yet. If one is prepared already, that one is returned.
func (s *Set) Prepare(ctx context.Context, kind Kind) (Step, error) {
	return s.change(ctx, kind, func(e *edit) (string, error) {
		if r := e.in(StatePrepared); r != nil {
			return r.id, nil
		}
		return e.create(ctx, StatePrepared)
	})
}

// Activate makes a prepared authority the one that signs; the one that did becomes old. An empty id means the one that is
// prepared. Whether everybody knows it already is for the caller to see to.
func (s *Set) Activate(ctx context.Context, kind Kind, id string) (Step, error) {
	return s.change(ctx, kind, func(e *edit) (string, error) {
		r, err := e.find(id, StatePrepared)
		if err != nil || r.state == StateActive {
			return id, err
		}
		return r.id, e.activate(r)
	})
}

// Taint marks an old authority, so that all that it signed is re-issued.
func (s *Set) Taint(ctx context.Context, kind Kind, id string) (Step, error) {
	return s.change(ctx, kind, func(e *edit) (string, error) {
		r, err := e.find(id, StateOld)
		if err != nil || r.state == StateTainted {
			return id, err
		}
		e.move(r, StateTainted)
		return r.id, nil
	})
}

// Revoke takes a tainted authority out of the bundle: nothing that it signed is good any more. Its key, if it is sealed in
// the store, is forgotten.
func (s *Set) Revoke(ctx context.Context, kind Kind, id string) (Step, error) {
	return s.change(ctx, kind, func(e *edit) (string, error) {
		r, err := e.find(id, StateTainted)
		if err != nil || r.state == StateRevoked {
			return id, err
		}
		e.move(r, StateRevoked)
		return r.id, nil
	})
}

// Stolen brings an authority in any state to tainted or revoked, in one commit. If it is the active one, the prepared one
// takes over in the same commit, or one that is made for it: nobody has heard of that before it signs, which is the price
// of not letting a thief's key stay good.
func (s *Set) Stolen(ctx context.Context, kind Kind, id string, to State) (Step, error) {
	if to != StateTainted && to != StateRevoked {
		return Step{}, fmt.Errorf("a stolen authority becomes tainted or revoked, not %q", to)
	}
	return s.change(ctx, kind, func(e *edit) (string, error) {
		r, err := e.find(id, StateOld)
		if state := (*StateError)(nil); errors.As(err, &state) {
			r, err = e.records[id], nil
		}
		if err != nil || r.state.rank() >= to.rank() {
			return id, err
		}
		if r.state == StateActive {
			next := e.in(StatePrepared)
			if next == nil || e.cannotSign(next) != nil {
				made, err := e.create(ctx, StatePrepared)
				if err != nil {
					return "", err
				}
				next = e.records[made]
			}
			if err := e.activate(next); err != nil {
				return "", err
			}
		}
		e.move(r, to)
		return r.id, nil
	})
}

// Retire revokes an old or prepared authority that is of no more use: nothing that it signed is valid any more. For what
// is still good it is refused with a *StateError.
func (s *Set) Retire(ctx context.Context, kind Kind, id string) (Step, error) {
	return s.change(ctx, kind, func(e *edit) (string, error) {
		r := e.records[id]
		if r == nil {
			return "", fmt.Errorf("%s authority %.64q: %w", kind, id, ErrUnknownAuthority)
		}
		now := s.config.Now()
		ended := !now.Before(r.notAfter)
		spent := (r.state == StateOld || r.state == StateTainted) && (ended || !r.life.SignedUntil.IsZero() && !now.Before(r.life.SignedUntil))
		if !spent && !(r.state == StatePrepared && ended) {
			return "", &StateError{Kind: kind, ID: id, State: r.state, Want: StateTainted}
		}
		e.move(r, StateRevoked)
		return id, nil
	})
}

// A record is what the steps see of an authority's record, of either kind.
type record struct {
	id         string
	generation uint64
	state      State
	notBefore  time.Time
	notAfter   time.Time
	life       life
	modified   store.Revision // 0: made by this edit
	touched    bool
	encode     func(State, life) ([]byte, error)
	key        string
	root       []byte // DER of the upstream's root; nil for others
}

// An edit is a change of the authorities of one kind in the making.
type edit struct {
	set     *Set
	kind    Kind
	index   indexRecord
	indexAt store.Revision
	// indexTouched: the index itself is to be written, whatever else is.
	indexTouched bool
	now          time.Time
	records      map[string]*record
	made         *creation
	deletes      []string

	// What the upstream publishes, and foreign JWT keys: see upstreamstate.go.
	upstream   upstreamRecord
	upstreamAt store.Revision
	foreign    map[string]foreignItem
	appended   []*Appended // JWT authorities, for edits of that kind
	checks     []store.Check
	writes     []store.Write
}

// change reads the records as they are in the store now, lets f decide, commits what it did provided that nobody changed
// anything meanwhile, and returns when this Set follows it. f returns the id of the authority it is about.
func (s *Set) change(ctx context.Context, kind Kind, f func(*edit) (string, error)) (Step, error) {
	if err := s.checkKind(kind); err != nil {
		return Step{}, err
	}
	if err := s.stopped.Load(); err != nil {
		return Step{}, *err
	}
	items, err := s.list(ctx)
	if err != nil {
		return Step{}, err
	}
	e, err := s.newEdit(kind, items)
	if err != nil {
		return Step{}, err
	}
	id, err := f(e)
	if err != nil {
		return Step{}, err
	}
	checks, writes, err := e.commit()
	if err != nil {
		return Step{}, err
	}
	if len(writes) == 0 {
		if err := s.WaitFor(ctx, e.newest(items)); err != nil {
			return Step{}, err
		}
		return s.step(kind, id, false)
	}
	revision, err := s.config.Store.Commit(store.WithReserve(ctx), checks, writes)
	var conflict *store.ConflictError
	switch {
	case errors.As(err, &conflict):
		return Step{}, fmt.Errorf("%s authorities: %w", kind, ErrConflict)
	case err != nil:
		return Step{}, fmt.Errorf("writing the %s authorities to the store: %w", kind, err)
	}
	if err := s.WaitFor(ctx, revision); err != nil {
		return Step{}, err
	}
	return s.step(kind, id, true)
}

func (s *Set) step(kind Kind, id string, changed bool) (Step, error) {
	if id == "" { // it was about none of ours
		return Step{Changed: changed}, nil
	}
	for _, a := range s.Authorities(kind) {
		if a.ID == id {
			return Step{Authority: a, Changed: changed}, nil
		}
	}
	return Step{}, fmt.Errorf("%s authority %s: %w", kind, id, ErrUnknownAuthority)
}

func (s *Set) newEdit(kind Kind, items []store.Item) (*edit, error) {
	e := &edit{set: s, kind: kind, now: s.config.Now().UTC().Truncate(time.Second), records: map[string]*record{}, foreign: map[string]foreignItem{}}
	for _, item := range items {
		switch _, prefix := splitKey(item.Key); {
		case prefix == keyIndex:
			var err error
			if e.index, err = decodeIndex(item, s.config.TrustDomain); err != nil {
				return nil, err
			}
			e.indexAt = item.Modified
		case prefix == keyUpstream:
			u, err := decodeUpstream(item)
			if err != nil {
				return nil, err
			}
			e.upstream, e.upstreamAt = u.record, item.Modified
		case prefix == keyForeignPrefix:
			k, err := decodeForeign(item)
			if err != nil {
				return nil, err
			}
			e.foreign[item.Key] = foreignItem{k, item.Modified}
		case prefix == keyAppendedPrefix && kind == KindJWT:
			a, err := decodeAppended(item, s.config.TrustDomain)
			if err != nil {
				return nil, err
			}
			if !a.X509() {
				e.appended = append(e.appended, a)
			}
		case prefix == keyX509Prefix && kind == KindX509:
			r, cert, above, err := decodeX509(item, s.config.TrustDomain)
			if err != nil {
				return nil, err
			}
			notBefore, notAfter := (&x509Authority{certificate: cert, above: above}).validity()
			e.add(item, r.ID, r.Generation, r.State, notBefore, notAfter, r.life, r.encode)
			if len(r.Above) > 0 {
				e.records[r.ID].root = r.Above[len(r.Above)-1]
			}
		case prefix == keyJWTPrefix && kind == KindJWT, prefix == keyWITPrefix && kind == KindWIT:
			r, _, err := decodeJWT(item, prefix)
			if err != nil {
				return nil, err
			}
			e.add(item, r.ID, r.Generation, r.State, r.NotBefore, r.NotAfter, r.life, r.encode)
		}
	}
	if e.indexAt == 0 {
		return nil, fmt.Errorf("the store has no record %q; restore it from a backup", keyIndex)
	}
	return e, nil
}

func (e *edit) add(item store.Item, id string, generation uint64, state State, notBefore, notAfter time.Time, l life, encode func(State, life) ([]byte, error)) {
	e.records[id] = &record{id: id, generation: generation, state: state, notBefore: notBefore, notAfter: notAfter, life: l,
		modified: item.Modified, encode: encode, key: item.Key}
}

// encode returns the record with another state and life. What is revoked never signs again, so that its sealed key is of
// use to a thief only.
func (r x509Record) encode(state State, l life) ([]byte, error) {
	r.State, r.life = state, l
	if state == StateRevoked && r.Key.Kind == keys.KindSoft {
		r.Key.Sealed = nil
	}
	return json.Marshal(r)
}

func (r jwtRecord) encode(state State, l life) ([]byte, error) {
	r.State, r.life = state, l
	if state == StateRevoked && r.Key.Kind == keys.KindSoft {
		r.Key.Sealed = nil
	}
	return json.Marshal(r)
}

// in returns the newest authority in a state, or nil.
func (e *edit) in(state State) *record {
	var found *record
	for _, r := range e.records {
		if r.state == state && (found == nil || r.generation > found.generation) {
			found = r
		}
	}
	return found
}

// find returns the authority id, which must be in state want or in the one that the step leads to. Empty means the newest
// in state want.
func (e *edit) find(id string, want State) (*record, error) {
	r := e.records[id]
	if id == "" {
		if r = e.in(want); r == nil {
			return nil, fmt.Errorf("no %s authority is %s: %w", e.kind, want, ErrUnknownAuthority)
		}
	}
	leads := map[State]State{StatePrepared: StateActive, StateOld: StateTainted, StateTainted: StateRevoked}[want]
	switch {
	case r == nil:
		return nil, fmt.Errorf("%s authority %.64q: %w", e.kind, id, ErrUnknownAuthority)
	case r.state != want && r.state != leads:
		return nil, &StateError{Kind: e.kind, ID: r.id, State: r.state, Want: want}
	}
	return r, nil
}

// create makes a new authority and returns its id.
func (e *edit) create(ctx context.Context, state State) (string, error) {
	published := 0
	for _, r := range e.records {
		if r.state.published() {
			published++
		}
	}
	if published >= maxPublished {
		return "", fmt.Errorf("%d %s authorities: %w", published, e.kind, ErrTooMany)
	}
	generation := &e.index.X509Generation
	switch e.kind {
	case KindJWT:
		generation = &e.index.JWTGeneration
	case KindWIT:
		generation = &e.index.WITGeneration
	}
	*generation++
	made, err := e.set.create(ctx, e.kind, *generation, state)
	if err != nil {
		return "", err
	}
	e.made = &made
	i := slices.IndexFunc(made.writes, func(w store.Write) bool { _, kind := splitKey(w.Key); return kind != keyIndex && kind != "" })
	if i < 0 {
		return "", errors.New("making an authority wrote no record of it")
	}
	// Read it back as everybody will, so that later steps of this edit treat it like any other.
	back, err := e.set.newEdit(e.kind, []store.Item{{Key: keyIndex, Value: e.mustIndex(), Modified: 1}, {Key: made.writes[i].Key, Value: made.writes[i].Value}})
	if err != nil {
		return "", err
	}
	e.records[made.id] = back.records[made.id]
	e.sweep()
	return made.id, nil
}

func (e *edit) mustIndex() []byte {
	value, _ := json.Marshal(e.index) // strings and numbers always marshal
	return value
}

// sweep removes the oldest records of revoked authorities, so that they never fill the store.
func (e *edit) sweep() {
	var revoked []*record
	for _, r := range e.records {
		if r.state == StateRevoked {
			revoked = append(revoked, r)
		}
	}
	slices.SortFunc(revoked, func(a, b *record) int { return cmp.Compare(b.generation, a.generation) })
	for _, r := range revoked[min(len(revoked), keptRevoked):] {
		e.deletes = append(e.deletes, r.id)
	}
}

func (e *edit) cannotSign(r *record) error {
	if e.set.config.Now().Before(r.notBefore) || !e.now.Before(r.notAfter) {
		return fmt.Errorf("%s authority %s is valid from %s to %s: %w", e.kind, r.id, r.notBefore.UTC().Format(time.RFC3339), r.notAfter.UTC().Format(time.RFC3339), ErrNotYet)
	}
	return nil
}

// activate makes r the active one.
func (e *edit) activate(r *record) error {
	if err := e.cannotSign(r); err != nil {
		return err
	}
	if was := e.in(StateActive); was != nil {
		e.move(was, StateOld)
	}
	e.move(r, StateActive)
	return nil
}

// move brings r into a later state and notes when.
func (e *edit) move(r *record, to State) {
	l := &r.life
	if r.state == StateActive {
		l.DeactivatedAt = e.now
		l.SignedUntil = l.until(e.now, e.set.LongestTTL(e.kind)).Add(signedSlack)
		if end := r.notAfter.Add(signedSlack); l.SignedUntil.After(end) {
			l.SignedUntil = end
		}
	}
	switch to {
	case StateActive:
		l.ActivatedAt = e.now
		l.LongestTTL = max(l.LongestTTL, seconds(e.set.LongestTTL(e.kind)))
	case StateTainted:
		l.TaintedAt = e.now
	case StateRevoked:
		l.RevokedAt = e.now
	}
	r.state, r.touched = to, true
}

// LongestTTL is the longest validity that an SVID of a kind can have.
func (s *Set) LongestTTL(kind Kind) time.Duration {
	switch kind {
	case KindJWT:
		return s.config.MaxJWTTTL
	case KindWIT:
		return s.config.WIT.MaxTTL
	}
	return s.config.MaxX509TTL
}

// commit returns what to commit: nothing if nothing was changed.
func (e *edit) commit() (checks []store.Check, writes []store.Write, err error) {
	for _, id := range slices.Sorted(maps.Keys(e.records)) {
		r := e.records[id]
		if !r.touched {
			continue
		}
		value, err := r.encode(r.state, r.life)
		if err != nil {
			return nil, nil, err
		}
		if r.modified == 0 { // made here: its record is among the writes of its creation
			continue
		}
		checks = append(checks, store.Check{Key: r.key, Modified: r.modified})
		writes = append(writes, store.Write{Key: r.key, Value: value})
	}
	if m := e.made; m != nil {
		r := e.records[m.id]
		value, err := r.encode(r.state, r.life)
		if err != nil {
			return nil, nil, err
		}
		checks = append(checks, m.checks...)
		for _, w := range m.writes {
			if w.Key == r.key {
				w.Value = value
			}
			writes = append(writes, w)
		}
	}
	checks, writes = append(checks, e.checks...), append(writes, e.writes...)
	if len(writes) == 0 && !e.indexTouched {
		return nil, nil, nil
	}
	for _, id := range e.deletes {
		r := e.records[id]
		checks = append(checks, store.Check{Key: r.key, Modified: r.modified})
		writes = append(writes, store.Write{Key: r.key, Delete: true})
	}
	// The index is in every commit, so that changes of two operators meet in its check.
	checks = append(checks, store.Check{Key: keyIndex, Modified: e.indexAt})
	writes = append(writes, store.Write{Key: keyIndex, Value: e.mustIndex()})
	return checks, writes, nil
}

func (e *edit) newest(items []store.Item) store.Revision {
	var newest store.Revision
	for _, item := range items {
		newest = max(newest, item.Modified)
	}
	return newest
}

// WaitFor returns when the Set was shown everything up to revision that concerns it.
func (s *Set) WaitFor(ctx context.Context, revision store.Revision) error {
	for {
		s.mu.Lock()
		moved := s.moved
		s.mu.Unlock()
		if s.current.Load().revision >= revision {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return fmt.Errorf("the authorities were written, but this CA has not caught up with the store yet: %w", ctx.Err())
		}
	}
}

// crossSign returns a certificate of the new authority cert that the active one has signed, so that who knows only the
// active one, because it was away, can verify what the new one signs. It is nil if there is none to sign it.
func (s *Set) crossSign(cert *x509.Certificate) []byte {
	known := s.current.Load()
	if known == nil || known.activeX509 == nil || known.activeX509.key == nil || !bytes.Equal(cert.RawIssuer, cert.RawSubject) {
		return nil
	}
	by := known.activeX509
	template := &x509.Certificate{
		SerialNumber: serialNumber(newSerial()), Subject: cert.Subject, RawSubject: cert.RawSubject, NotBefore: cert.NotBefore, NotAfter: cert.NotAfter,
		KeyUsage: cert.KeyUsage, BasicConstraintsValid: true, IsCA: true, SubjectKeyId: cert.SubjectKeyId,
		AuthorityKeyId: by.certificate.SubjectKeyId, // both have the same name, so that crypto/x509 would leave it out
		URIs:           cert.URIs,
	}
	if template.NotAfter.After(by.certificate.NotAfter) {
		template.NotAfter = by.certificate.NotAfter
	}
	if !template.NotAfter.After(template.NotBefore) {
		return nil
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.certificate, cert.PublicKey, by.key)
	if err != nil {
		s.config.Log.Warn("the new authority was not signed by the active one; nodes that are away while it takes over must attest again", "authority_id", by.id, "err", err)
		return nil
	}
	return der
}

// Introduction returns what the CA presents besides its own X509-SVID, for nodes that do not hold the newest bundle: the
// active authority, which a join token's pin names, and certificates that lead from it back to those before it, as long as
// they are valid.
func (s *Set) Introduction() [][]byte {
	const most = 4
	n, now := s.current.Load(), s.config.Now()
	var out [][]byte
	a := n.activeX509
	for a != nil && len(out) < 2*most-1 {
		if a != n.activeX509 { // its SVIDs' chains hold those of the active one
			for _, c := range a.intermediates() {
				out = append(out, c.Raw)
			}
		}
		out = append(out, a.root().Raw)
		if a.cross == nil || !now.Before(a.cross.NotAfter) {
			break
		}
		out = append(out, a.cross.Raw)
		var before *x509Authority
		for _, b := range n.x509 {
			if bytes.Equal(b.certificate.SubjectKeyId, a.cross.AuthorityKeyId) && b.state != StateRevoked {
				before = b
			}
		}
		a = before
	}
	return out
}
