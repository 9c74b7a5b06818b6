package svidcache

import (
	"bytes"
	"container/list"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/spiffe"
)

const (
	// retryMin and retryMax bound the wait after a failed issuance.
	retryMin = time.Second
	retryMax = 30 * time.Second
	// futileMax bounds the wait after an issuance that succeeded and did not help, such as while the clocks of CA and
	// agent disagree.
	futileMax = 10 * time.Minute
	// lookMin is the shortest time between two looks at the clock for renewals, so that those of a batch go together.
	lookMin = 500 * time.Millisecond
	// maxChainBytes bounds one X509-SVID with its intermediates.
	maxChainBytes = 64 << 10
)

// The lanes of issuing: what a caller waits for never stands behind what is only kept ready.
const (
	laneWatched = iota
	lanePrefetch
)

// A record is the X509-SVID of an entry that is watched or kept ready. Guarded by Cache.mu.
type record struct {
	entry    *entry
	svid     *svid // nil until issued
	watchers map[*watcher]struct{}
	idle     *list.Element // in Cache.idle while nobody watches
	used     bool          // somebody has watched it

	foreign  bool // its SVID was built from an entry of another epoch, whose revision says nothing about the present one
	inFlight bool
	next     *key // made for an issuance that has not succeeded yet
	failures int
	triedAt  time.Time // the last failure, on the steady clock
	retryAt  time.Time // on the steady clock; zero: at once
	usable   bool      // what the last look at the clock found
	revoked  bool      // its SVID is
	barred   bool      // its entry's ID is: the CA would issue none
	counted  string    // the authority that Cache.inUse counts it for
	waveAt   time.Time // on the steady clock: its moment, if a tainted authority signed its SVID; zero: not planned
}

// An svid is one X509-SVID with its key. It never changes.
type svid struct {
	entryRevision       int64
	id                  spiffeid.ID
	chain               []byte // concatenated DER
	key                 []byte // PKCS#8 DER
	notBefore, notAfter time.Time
	renewAt             time.Time
	until               time.Time         // restored, and not to be used from then on; zero: until notAfter
	used                bool              // restored, and somebody had asked for it
	signer              string            // key id of the authority that ends the chain; empty: not stated
	authority           string            // id of the authority that signed the leaf
	facts               *x509.Certificate // see revokedFacts
}

// A key is one that was made for a workload and is not certified yet.
type key struct {
	private []byte // PKCS#8 DER
	public  []byte // PKIX DER
}

func newKey() (*key, error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making a workload's key: %w", err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, fmt.Errorf("encoding a workload's key: %w", err)
	}
	public, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		return nil, fmt.Errorf("encoding a workload's public key: %w", err)
	}
	return &key{private: private, public: public}, nil
}

// readSVID checks what the CA issued for e and k. A caller gets it only if any verifier would take it for e's ID.
func readSVID(e *entry, k *key, a X509Answer, own *bundle, now time.Time) (*svid, error) {
	revision := a.EntryRevision
	if revision == 0 {
		revision = e.revision
	}
	s, err := newSVID(e, k, revision, a.Chain, now)
	if err != nil {
		return nil, err
	}
	return s, checkSigned(a.Chain, own)
}

// checkSigned says whether each certificate of a chain is signed by the next, and the last by an authority of the bundle that
// the workload gets with it.
func checkSigned(chain [][]byte, own *bundle) error {
	if own == nil {
		return errors.New("there is no bundle to verify it with")
	}
	certs := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("certificate %d: %w", i, err)
		}
		certs[i] = cert
		if i > 0 {
			if err := certs[i-1].CheckSignatureFrom(cert); err != nil {
				return fmt.Errorf("certificate %d is not signed by the next: %w", i-1, err)
			}
		}
	}
	last := certs[len(certs)-1]
	for _, root := range own.x509 {
		if bytes.Equal(root.SubjectKeyId, last.AuthorityKeyId) && last.CheckSignatureFrom(root) == nil {
			return nil
		}
	}
	return fmt.Errorf("it is signed by an authority that is not in the bundle of %q", own.trustDomain.Name())
}

// newSVID makes an svid for e of a chain in DER, leaf first, that is for k.
func newSVID(e *entry, k *key, revision int64, chain [][]byte, now time.Time) (*svid, error) {
	s := &svid{entryRevision: revision, key: k.private}
	var last *x509.Certificate
	for i, der := range chain {
		if len(s.chain)+len(der) > maxChainBytes {
			return nil, fmt.Errorf("the chain has more than the %d bytes allowed", maxChainBytes)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", i, err)
		}
		if i == 0 {
			if s.id, err = spiffe.CheckX509SVIDLeaf(cert); err != nil {
				return nil, err
			}
			if string(cert.RawSubjectPublicKeyInfo) != string(k.public) {
				return nil, errors.New("it is for another key")
			}
			s.notBefore, s.notAfter = cert.NotBefore, cert.NotAfter
			s.authority = hex.EncodeToString(cert.AuthorityKeyId)
			s.facts = revokedFacts(cert)
		}
		s.chain = append(s.chain, der...)
		last = cert
	}
	switch {
	case last == nil:
		return nil, errors.New("it is empty")
	case s.id != e.spiffeID && s.entryRevision <= e.revision:
		return nil, fmt.Errorf("it is for %q, and the entry is for %q", s.id, e.spiffeID)
	}
	s.signer = string(last.AuthorityKeyId)
	// Half of the life that is left, a tenth of it to either side, so that SVIDs that were issued together are not renewed
	// together. It does not begin at NotBefore, which CAs put back: a short life would be half over from the start.
	from := now
	if from.Before(s.notBefore) || !from.Before(s.notAfter) {
		from = s.notBefore
	}
	life := s.notAfter.Sub(from)
	if life <= 0 {
		return nil, fmt.Errorf("it ends at %s, before it begins at %s", s.notAfter, s.notBefore)
	}
	s.renewAt = from.Add(life*9/20 + mathrand.N(life/10+1))
	return s, nil
}

// valid says whether the SVID may be handed out. That it is not valid yet is left to the verifier to say: its clock may
// be the better one.
func (s *svid) valid(now time.Time) bool {
	return now.Before(s.notAfter) && (s.until.IsZero() || now.Before(s.until))
}

// stale says why an SVID must be issued now although there is one, or is empty.
func (s *svid) stale(e *entry, own *bundle, now time.Time) string {
	switch {
	case s.entryRevision < e.revision:
		return "the entry has changed"
	case s.id != e.spiffeID: // of a newer revision than the one that is known: until that comes, nobody gets it
		return "it is for another ID"
	case own != nil && s.signer != "" && !has(own.signers, s.signer) && !has(own.tainted, s.signer):
		return "its authority is gone"
	case !now.Before(s.renewAt):
		return "half of its life is over"
	case now.Before(s.notBefore.Add(-time.Minute)):
		return "it is not valid yet"
	}
	return ""
}

// stale says why the record's SVID must be issued now although there is one, or is empty. What a tainted authority signed
// waits for its moment in the wave.
func (r *record) stale(own *bundle, now time.Time) string {
	if r.foreign {
		return "its entry is another CA's"
	}
	if r.revoked {
		return "it is revoked"
	}
	if why := r.svid.stale(r.entry, own, now); why != "" {
		return why
	}
	if own != nil && has(own.tainted, r.svid.signer) && !time.Now().Before(r.waveAt) {
		return "its authority is tainted"
	}
	return ""
}

func has(set map[string]struct{}, k string) bool {
	_, ok := set[k]
	return ok
}

// serves says whether r has what its entry's callers may get at now.
func (r *record) serves(now time.Time) bool {
	return r.svid != nil && !r.revoked && !r.barred && r.svid.valid(now) && r.svid.id == r.entry.spiffeID
}

// settling says whether an issuance is on its way whose outcome callers should wait for: there is nothing to serve, or
// what there is was built from an older revision of the entry.
func (r *record) settling(now time.Time) bool {
	return r.failures == 0 && !r.barred && (!r.serves(now) || r.svid.entryRevision < r.entry.revision)
}

// check queues r for issuance if it needs one and its time has come, and sees to it that the clock is looked at in time
// for the next one. It is called with mu held.
func (c *Cache) check(r *record, now time.Time) {
	r.usable = r.serves(now)
	if r.inFlight {
		return // looked at again when it is done
	}
	if c.source.Load() != nil {
		return // nothing is asked for until the CA has said what there is now
	}
	if r.barred {
		for lane := range c.due {
			delete(c.due[lane], r)
		}
		return // looked at again when the revocation is gone
	}
	own := c.state.Load().bundles[c.config.TrustDomain]
	if r.svid != nil && r.stale(own, now) == "" {
		r.failures, r.retryAt = 0, time.Time{}
		next := r.svid.renewAt.Sub(now)
		if own != nil && has(own.tainted, r.svid.signer) {
			next = min(next, time.Until(r.waveAt))
		}
		c.retimeTo(time.Now().Add(min(max(next, lookMin), tick)))
		return
	}
	if steady := time.Now(); r.retryAt.After(steady) {
		c.retimeTo(r.retryAt)
		return
	}
	lane, other := laneWatched, lanePrefetch
	if len(r.watchers) == 0 {
		lane, other = other, lane
	}
	delete(c.due[other], r)
	c.due[lane][r] = struct{}{}
	kick(c.lanes[lane])
}

// postpone notes that an issuance did not help, and when to try again. It is called with mu held.
func (r *record) postpone(longest time.Duration) {
	wait := min(retryMin<<min(r.failures, 20), longest)
	r.failures++
	r.triedAt = time.Now()
	r.retryAt = r.triedAt.Add(wait/2 + mathrand.N(wait))
}

// drop forgets r. It is called with mu held.
func (c *Cache) drop(r *record) {
	if r.idle != nil {
		c.idle.Remove(r.idle)
		r.idle = nil
	}
	delete(c.records, r.entry.id)
	c.count(r)
	if r.svid != nil {
		c.keepNot(r.entry.id)
	}
	for lane := range c.due {
		delete(c.due[lane], r)
	}
}

// watch makes w one of those who need the SVID of e. It is called with mu held.
func (c *Cache) watch(e *entry, w *watcher, now time.Time) {
	r := c.records[e.id]
	if r == nil {
		r = c.newRecord(e)
	}
	if !r.used {
		r.used = true
		c.keep(r)
	}
	if r.idle != nil {
		c.idle.Remove(r.idle)
		r.idle = nil
		c.refill = true
	}
	r.watchers[w] = struct{}{}
	if !r.serves(now) && time.Since(r.triedAt) >= retryMin {
		// Somebody waits now: a failure that nobody saw is no reason to wait longer.
		r.failures, r.retryAt = 0, time.Time{}
	}
	c.check(r, now)
}

// unwatch is the reverse of watch. The SVIDs that were used last stay, as far as the budget goes. It is called with mu
// held.
func (c *Cache) unwatch(id string, w *watcher) {
	r := c.records[id]
	if r == nil {
		return
	}
	delete(r.watchers, w)
	if len(r.watchers) > 0 || r.idle != nil {
		return
	}
	r.idle = c.idle.PushFront(r)
	for c.idle.Len() > c.config.MaxPrefetch {
		c.drop(c.idle.Back().Value.(*record))
	}
}

func kick(slot chan struct{}) {
	select {
	case slot <- struct{}{}:
	default:
	}
}
