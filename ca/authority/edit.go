package authority

import (
	"cmp"
	"context"
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

// This file is how a step in the lives of authorities becomes one commit: records as they are in the store, the change, and the
// checks that nobody changed them meanwhile.

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

// notBelow refuses to taint or revoke an intermediate: whoever has the root in its bundle would go on believing in it.
func (e *edit) notBelow(id string) error {
	r := e.records[id]
	if r == nil || r.root == nil {
		return nil
	}
	root, err := x509.ParseCertificate(r.root)
	if err != nil {
		return fmt.Errorf("the root of %s authority %s: %w", e.kind, id, err)
	}
	return fmt.Errorf("%s authority %s leads to the upstream's root %s: %w", e.kind, id, rootID(root), ErrBelow)
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
