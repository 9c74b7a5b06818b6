package authority

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store"
)

// A snapshot is the authorities as of one revision. It is never changed once it is in Set.current.
type snapshot struct {
	index    indexRecord
	x509     map[string]*x509Authority
	jwt      map[string]*jwtAuthority
	wit      map[string]*jwtAuthority // WIT authorities differ in what they sign, not in what they are
	upstream upstreamState            // the zero value without an upstream CA
	foreign  map[string]*foreignKey   // JWT keys of downstream CAs, by the last part of their record's key
	appended map[string]*Appended     // by key in the store
	revision store.Revision           // of the newest record, the index included

	activeX509 *x509Authority // nil if none is
	activeJWT  *jwtAuthority  // nil if none is
	prepared   []string       // as the bundle names them
	activeWIT  *jwtAuthority  // nil if none is
	bundle     Bundle
}

// An x509Authority is one X.509 authority. Its fields are never changed.
type x509Authority struct {
	id          string
	generation  uint64
	state       State
	certificate *x509.Certificate
	above       x509Path // to the upstream CA's root; nil if self-signed
	life        life
	cross       *x509.Certificate // nil if there is none
	key         *keys.Key         // nil unless state.signs()
	template    *leafTemplate     // nil unless the key is a P-256 key in this process
}

// A jwtAuthority is one JWT or WIT authority. Its fields are never changed.
type jwtAuthority struct {
	id         string
	generation uint64
	state      State
	public     crypto.PublicKey
	notBefore  time.Time
	expiresAt  time.Time
	life       life
	key        *keys.Key  // nil unless state.signs()
	signer     *jwtSigner // nil unless state.signs()
}

// Load replaces what the Set knows by the records in items: all that the store has under "authority/", as of one revision.
// Other keys are passed over. The CA calls it after its watch was interrupted; Open has called it already. Like Observe,
// it stops issuance if a known authority went back in state.
func (s *Set) Load(items []store.Item) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.current.Load()
	next := &snapshot{x509: map[string]*x509Authority{}, jwt: map[string]*jwtAuthority{}, wit: map[string]*jwtAuthority{}, foreign: map[string]*foreignKey{}, appended: map[string]*Appended{}}
	if err := s.apply(old, next, items); err != nil {
		return s.refuse(old, err)
	}
	return s.publish(old, next)
}

// Observe applies the changes of one commit. The CA calls it with every batch that it watches, in order; a batch without
// authorities costs next to nothing, and one that is already known is passed over.
//
// A known authority that goes back in state, vanishes while it is still good, or changes its key or certificate means that
// the store was tampered with or put back to an older copy. Then, and when a record cannot be read, the Set keeps the
// bundle it has and stops issuing for good: the error wraps ErrStopped.
func (s *Set) Observe(batch store.Batch) error {
	if !slices.ContainsFunc(batch.Events, func(e store.Event) bool { return strings.HasPrefix(e.Key, keyPrefix) }) {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.current.Load()
	if batch.Revision <= old.revision {
		return nil
	}
	next := &snapshot{index: old.index, x509: maps.Clone(old.x509), jwt: maps.Clone(old.jwt), wit: maps.Clone(old.wit),
		upstream: old.upstream, foreign: maps.Clone(old.foreign), appended: maps.Clone(old.appended), revision: old.revision}
	var items []store.Item
	for _, e := range batch.Events {
		switch id, kind := splitKey(e.Key); {
		case !e.Deleted:
			items = append(items, e.Item)
		case kind == keyX509Prefix:
			delete(next.x509, id)
		case kind == keyJWTPrefix:
			delete(next.jwt, id)
		case kind == keyWITPrefix:
			delete(next.wit, id)
		case kind == keyAppendedPrefix:
			delete(next.appended, e.Key)
		case kind == keyIndex:
			next.index = indexRecord{}
		case kind == keyUpstream:
			next.upstream = upstreamState{}
		case kind == keyForeignPrefix:
			delete(next.foreign, id)
		}
	}
	if err := s.apply(old, next, items); err != nil {
		return s.refuse(old, err)
	}
	next.revision = batch.Revision
	return s.publish(old, next)
}

// refuse handles records that cannot be followed: with nothing loaded yet it is only an error, later it stops issuance.
func (s *Set) refuse(old *snapshot, err error) error {
	if old == nil {
		return err
	}
	return s.stop(err)
}

// publish makes next the current snapshot, provided that it continues old.
func (s *Set) publish(old, next *snapshot) error {
	if err := next.finish(s.config); err != nil {
		return s.refuse(old, err)
	}
	if old != nil {
		if err := continues(old, next, s.config.Now()); err != nil {
			return s.stop(err)
		}
	}
	s.current.Store(next)
	close(s.moved)
	s.moved = make(chan struct{})
	s.logChanges(old, next)
	return nil
}

// apply adds items to next. An authority that old has with the same key is not unsealed again.
func (s *Set) apply(old, next *snapshot, items []store.Item) error {
	for _, item := range items {
		var err error
		switch id, kind := splitKey(item.Key); kind {
		case keyX509Prefix:
			var known *x509Authority
			if old != nil {
				known = old.x509[id]
			}
			next.x509[id], err = s.readX509(item, known)
		case keyJWTPrefix:
			var known *jwtAuthority
			if old != nil {
				known = old.jwt[id]
			}
			next.jwt[id], err = s.readJWT(item, keys.UseJWT, known)
		case keyWITPrefix:
			var known *jwtAuthority
			if old != nil {
				known = old.wit[id]
			}
			next.wit[id], err = s.readJWT(item, keys.UseWIT, known)
		case keyAppendedPrefix:
			next.appended[item.Key], err = decodeAppended(item, s.config.TrustDomain)
		case keyIndex:
			next.index, err = decodeIndex(item, s.config.TrustDomain)
		case keyUpstream:
			next.upstream, err = decodeUpstream(item)
		case keyForeignPrefix:
			next.foreign[id], err = decodeForeign(item)
		default:
			if !strings.HasPrefix(item.Key, keyPrefix) {
				continue
			}
			err = fmt.Errorf("record %q is of an unknown kind; use the signet release that wrote it", item.Key)
		}
		if err != nil {
			return err
		}
		next.revision = max(next.revision, item.Modified)
	}
	return nil
}

func (s *Set) readX509(item store.Item, known *x509Authority) (*x509Authority, error) {
	r, cert, above, err := decodeX509(item, s.config.TrustDomain)
	if err != nil {
		return nil, err
	}
	a := &x509Authority{id: r.ID, generation: r.Generation, state: r.State, certificate: cert, above: above, life: r.life}
	if len(r.Cross) > 0 {
		if a.cross, err = x509.ParseCertificate(r.Cross); err != nil {
			return nil, fmt.Errorf("record %q: cross_certificate: %w", item.Key, err)
		}
	}
	if !r.State.signs() {
		return a, nil
	}
	if known != nil && known.key != nil && known.certificate.Equal(cert) && known.generation == r.Generation {
		a.key, a.template = known.key, known.template
		return a, nil
	}
	a.key, err = s.openKey(r.Key, keys.Binding{TrustDomain: s.config.TrustDomain, Use: keys.UseX509, AuthorityID: r.ID, Generation: r.Generation}, cert.PublicKey)
	if err != nil {
		return nil, err
	}
	a.template, err = newLeafTemplate(cert, a.key)
	return a, err
}

func (s *Set) readJWT(item store.Item, use keys.Use, known *jwtAuthority) (*jwtAuthority, error) {
	r, public, err := decodeJWT(item, tokenPrefix(use))
	if err != nil {
		return nil, err
	}
	a := &jwtAuthority{id: r.ID, generation: r.Generation, state: r.State, public: public, notBefore: r.NotBefore, expiresAt: r.NotAfter, life: r.life}
	if !r.State.signs() {
		return a, nil
	}
	if known != nil && known.key != nil && known.generation == r.Generation { // the id is derived from the key
		a.key, a.signer = known.key, known.signer
		return a, nil
	}
	a.key, err = s.openKey(r.Key, keys.Binding{TrustDomain: s.config.TrustDomain, Use: use, AuthorityID: r.ID, Generation: r.Generation}, public)
	if err != nil {
		return nil, err
	}
	a.signer, err = newJWTSigner(use, r.ID, a.key)
	return a, err
}

// openKey unseals a key, or where it is, which is done in this process and never waits.
func (s *Set) openKey(stored keys.Stored, b keys.Binding, want crypto.PublicKey) (*keys.Key, error) {
	key, err := s.config.Keys.Open(context.Background(), stored, s.config.Seal, b, want)
	if err != nil {
		return nil, err
	}
	if public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(want) {
		return nil, fmt.Errorf("key of %s authority %q does not belong to its published public key; restore the store from a backup", b.Use, b.AuthorityID)
	}
	return key, nil
}

// finish derives what is derived from the records, and refuses a set that no code of ours writes.
func (n *snapshot) finish(c Config) error {
	if n.index.Version == 0 {
		return fmt.Errorf("the store has authorities but no record %q; restore it from a backup", keyIndex)
	}
	for _, a := range n.x509 {
		if a.generation > n.index.X509Generation {
			return fmt.Errorf("x509 authority %s has generation %d, but only %d were made; restore the store from a backup", a.id, a.generation, n.index.X509Generation)
		}
		if a.state == StateActive {
			if n.activeX509 != nil {
				return fmt.Errorf("x509 authorities %s and %s are both active; restore the store from a backup", n.activeX509.id, a.id)
			}
			n.activeX509 = a
		}
	}
	var err error
	if n.activeJWT, err = activeToken(keys.UseJWT, n.jwt, n.index.JWTGeneration); err != nil {
		return err
	}
	if n.activeWIT, err = activeToken(keys.UseWIT, n.wit, n.index.WITGeneration); err != nil {
		return err
	}
	n.bundle = n.makeBundle(c)
	for _, a := range n.x509 {
		if a.state == StatePrepared {
			n.prepared = append(n.prepared, rootID(a.root()))
		}
	}
	for _, tokens := range []map[string]*jwtAuthority{n.jwt, n.wit} {
		for _, a := range tokens {
			if a.state == StatePrepared {
				n.prepared = append(n.prepared, a.id)
			}
		}
	}
	slices.Sort(n.prepared)
	return nil
}

// activeToken returns which of the JWT or WIT authorities is active, or nil.
func activeToken(use keys.Use, authorities map[string]*jwtAuthority, made uint64) (active *jwtAuthority, err error) {
	for _, a := range authorities {
		if a.generation > made {
			return nil, fmt.Errorf("%s authority %s has generation %d, but only %d were made; restore the store from a backup", use, a.id, a.generation, made)
		}
		if a.state != StateActive {
			continue
		}
		if active != nil {
			return nil, fmt.Errorf("%s authorities %s and %s are both active; restore the store from a backup", use, active.id, a.id)
		}
		active = a
	}
	return active, nil
}

// continues returns an error if next cannot have come after old. Without this check, a store put back to yesterday's copy
// would make a revoked authority good again.
func continues(old, next *snapshot, now time.Time) error {
	if next.index.X509Generation < old.index.X509Generation || next.index.JWTGeneration < old.index.JWTGeneration || next.index.WITGeneration < old.index.WITGeneration {
		return fmt.Errorf("record %q went back to an earlier generation", keyIndex)
	}
	for id, was := range old.x509 {
		is, ok := next.x509[id]
		if !ok {
			if _, notAfter := was.validity(); was.state != StateRevoked && now.Before(notAfter) {
				return fmt.Errorf("the record of x509 authority %s, %s, vanished from the store", id, was.state)
			}
			continue
		}
		if is.state.rank() < was.state.rank() || is.generation != was.generation {
			return fmt.Errorf("x509 authority %s went back from %s to %s", id, was.state, is.state)
		}
		if !bytes.Equal(is.certificate.Raw, was.certificate.Raw) || !slices.EqualFunc(is.above, was.above, (*x509.Certificate).Equal) {
			return fmt.Errorf("the certificate of x509 authority %s was exchanged", id)
		}
	}
	if err := tokensContinue(keys.UseJWT, old.jwt, next.jwt, now); err != nil {
		return err
	}
	return tokensContinue(keys.UseWIT, old.wit, next.wit, now)
}

func tokensContinue(use keys.Use, old, next map[string]*jwtAuthority, now time.Time) error {
	for id, was := range old {
		is, ok := next[id]
		if !ok {
			if was.state != StateRevoked && now.Before(was.expiresAt) {
				return fmt.Errorf("the record of %s authority %s, %s, vanished from the store", use, id, was.state)
			}
			continue
		}
		if is.state.rank() < was.state.rank() || is.generation != was.generation || !is.expiresAt.Equal(was.expiresAt) {
			return fmt.Errorf("%s authority %s went back from %s to %s, or was exchanged", use, id, was.state, is.state)
		}
	}
	return nil
}

func (s *Set) logChanges(old, next *snapshot) {
	log := func(kind, id string, was, is State) {
		if was != is {
			s.config.Log.Info("authority changed", "trust_domain", s.config.TrustDomain.Name(), "kind", kind, "authority_id", id, "from", string(was), "to", string(is))
		}
	}
	for _, a := range slices.SortedFunc(maps.Values(next.x509), func(a, b *x509Authority) int { return cmp.Compare(a.generation, b.generation) }) {
		var was State
		if old != nil && old.x509[a.id] != nil {
			was = old.x509[a.id].state
		}
		log("x509", a.id, was, a.state)
	}
	tokens := func(use keys.Use, old, next map[string]*jwtAuthority) {
		for _, a := range slices.SortedFunc(maps.Values(next), func(a, b *jwtAuthority) int { return cmp.Compare(a.generation, b.generation) }) {
			var was State
			if old[a.id] != nil {
				was = old[a.id].state
			}
			log(string(use), a.id, was, a.state)
		}
	}
	if old == nil {
		old = &snapshot{}
	}
	tokens(keys.UseJWT, old.jwt, next.jwt)
	tokens(keys.UseWIT, old.wit, next.wit)
}

// splitKey returns the kind of record a key is for (one of the key constants; empty for others) and the authority's id.
func splitKey(key string) (id, kind string) {
	if key == keyIndex || key == keyUpstream {
		return "", key
	}
	if id, ok := strings.CutPrefix(key, keyForeignPrefix); ok {
		return id, keyForeignPrefix
	}
	if id, ok := strings.CutPrefix(key, keyX509Prefix); ok {
		return id, keyX509Prefix
	}
	if id, ok := strings.CutPrefix(key, keyJWTPrefix); ok {
		return id, keyJWTPrefix
	}
	if id, ok := strings.CutPrefix(key, keyWITPrefix); ok {
		return id, keyWITPrefix
	}
	if strings.HasPrefix(key, keyAppendedX509Prefix) || strings.HasPrefix(key, keyAppendedJWTPrefix) {
		return "", keyAppendedPrefix
	}
	return "", ""
}
