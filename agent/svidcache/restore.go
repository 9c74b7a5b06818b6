package svidcache

import (
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// spareWait is how long after the first contact restored SVIDs are held beyond the budget, for workloads that come back.
const spareWait = time.Minute

// Kept is what an earlier run of the agent left behind.
type Kept struct {
	// State is a complete snapshot.
	State *nodev1.FollowResponse
	SVIDs []KeptSVID
	// Contact is when there was contact with the CA last, Seen the latest time that the clock has shown since then. A clock
	// that stands before Seen was set back.
	Contact, Seen time.Time
	// MaxOffline is how long after Contact the SVIDs are used, if the CA stays away.
	MaxOffline time.Duration
}

// A KeptSVID is an X509-SVID as a Keeper was told it.
type KeptSVID struct {
	EntryID       string
	EntryRevision int64
	Used          bool
	// Chain is concatenated DER, leaf first; Key is PKCS#8 DER.
	Chain, Key []byte
}

// A Source says where what is held comes from, if not from the CA in this run.
type Source struct {
	// Restored is when it was restored, Contact when the CA had been there last.
	Restored, Contact time.Time
}

// A floor is a time before which the clock does not stand: that it shows less is no proof.
type floor struct {
	seen time.Time
	at   time.Time // on the steady clock
}

// now is the wall clock, but not before the floor.
func (c *Cache) now() time.Time {
	now := c.wall()
	if f := c.floor.Load(); f != nil {
		if least := f.seen.Add(time.Since(f.at)); now.Before(least) {
			return least
		}
	}
	return now
}

// Restore takes over what an earlier run left behind, before the first Apply and before Run. Callers are served from it at
// once. Until InSync it counts as out of date: nothing is asked of the CA by it, watchers are told since when there has been
// no contact, and its SVIDs end with MaxOffline at the latest. SVIDs that are unusable are left out and told of in the log.
// After an error nothing has changed.
func (c *Cache) Restore(k Kept) error {
	if !k.State.GetSnapshot() || !k.State.GetComplete() {
		return errors.New("what is restored must be a complete snapshot")
	}
	next, change, skipped, err := newState().next(c.config.TrustDomain, k.State)
	if err != nil {
		return err
	}
	for _, err := range skipped {
		c.config.Log.Error("the sealed cache holds something unusable, which is left out", "err", err)
	}
	now := c.wall()
	c.source.Store(&Source{Restored: now, Contact: k.Contact})
	if k.Seen.After(now) {
		c.config.Log.Warn("the clock stands before a time that it has shown already; what was restored ends as if it had not been set back",
			"now", now.UTC(), "seen", k.Seen.UTC())
	}
	c.floor.Store(&floor{seen: k.Seen, at: time.Now()})
	latest := c.now()
	until := k.Contact.Add(k.MaxOffline)

	c.mu.Lock()
	unusable := 0
	for _, kept := range k.SVIDs {
		s, err := restoreSVID(next, kept, latest)
		if err != nil {
			unusable++
			c.config.Log.Debug("an X509-SVID of the sealed cache is left out", "entry_id", kept.EntryID, "err", err)
			c.keepNot(kept.EntryID)
			continue
		}
		s.until, s.used = until, kept.Used
		c.spare[kept.EntryID] = s
	}
	restored := len(c.spare)
	c.restoreIdle(next)
	// Workloads count by the clock of this machine, so that they are told a time of that.
	c.offline = now.Add(-max(latest.Sub(k.Contact), 0))
	c.told = c.offline
	c.mu.Unlock()
	c.takeOver(next, change)
	c.config.Log.Info("serving from the sealed cache until the CA is there", "entries", next.entries.len(), "x509_svids", restored,
		"left_out", unusable, "last_contact", k.Contact.UTC(), "until", until.UTC())
	return nil
}

// restoreIdle makes records of restored SVIDs as far as the budget goes, those that were used first. The rest waits in spare.
// It is called with mu held.
func (c *Cache) restoreIdle(s *state) {
	var found []*entry
	for id := range c.spare {
		if e, ok := s.entries.get(id); ok {
			found = append(found, e)
		}
	}
	slices.SortFunc(found, func(a, b *entry) int {
		if used := c.spare[a.id].used; used != c.spare[b.id].used {
			if used {
				return -1
			}
			return 1
		}
		return byAge(b, a)
	})
	for _, e := range found[:min(len(found), c.config.MaxPrefetch)] {
		r := c.newRecord(e)
		r.idle = c.idle.PushBack(r)
	}
}

// restoreSVID reads what a Keeper was told.
func restoreSVID(s *state, kept KeptSVID, now time.Time) (*svid, error) {
	e, ok := s.entries.get(kept.EntryID)
	if !ok {
		return nil, errors.New("its entry is gone")
	}
	private, err := x509.ParsePKCS8PrivateKey(kept.Key)
	if err != nil {
		return nil, errors.New("its key is unreadable")
	}
	ec, ok := private.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("its key is a %T", private)
	}
	public, err := x509.MarshalPKIXPublicKey(ec.Public())
	if err != nil {
		return nil, err
	}
	certs, err := x509.ParseCertificates(kept.Chain)
	if err != nil {
		return nil, err
	}
	chain := make([][]byte, len(certs))
	for i, c := range certs {
		chain[i] = c.Raw
	}
	svid, err := newSVID(e, &key{private: kept.Key, public: public}, kept.EntryRevision, chain, now)
	if err == nil && !svid.valid(now) {
		err = fmt.Errorf("it ended at %s", svid.notAfter.UTC())
	}
	return svid, err
}

// confirm notes that the CA has said what there is now. It is called with mu held.
func (c *Cache) confirm() {
	if c.source.Swap(nil) == nil {
		return
	}
	c.floor.Store(nil)
	c.spareTil = time.Now().Add(spareWait)
	c.refill = c.config.MaxPrefetch > 0
	for _, r := range c.records {
		if r.svid != nil && !r.svid.until.IsZero() {
			r.svid = r.svid.lasting()
		}
	}
	for id, s := range c.spare {
		c.spare[id] = s.lasting()
	}
	c.retimeTo(time.Now().Add(lookMin))
}

// lasting is s without the bound of what was restored.
func (s *svid) lasting() *svid {
	l := *s
	l.until = time.Time{}
	return &l
}

// Restored says where what is held comes from, or is nil if it is the CA's own word.
func (c *Cache) Restored() *Source { return c.source.Load() }

// keep and keepNot tell the Keeper. They are called with mu held.
func (c *Cache) keep(r *record) {
	if c.config.Keeper == nil || r.svid == nil {
		return
	}
	revision := r.svid.entryRevision
	if r.foreign { // older than any
		revision = 0
	}
	c.config.Keeper.Hold(r.entry.id, revision, r.used, r.svid.chain, r.svid.key)
}

func (c *Cache) keepNot(entryID string) {
	if c.config.Keeper != nil {
		c.config.Keeper.Drop(entryID)
	}
}

// dropSpare gives up the restored SVID of an entry. It is called with mu held.
func (c *Cache) dropSpare(entryID string) {
	if c.spare[entryID] != nil {
		delete(c.spare, entryID)
		c.keepNot(entryID)
	}
}

// sweepSpare gives up what nobody came back for. It is called with mu held.
func (c *Cache) sweepSpare() {
	if c.spareTil.IsZero() || time.Now().Before(c.spareTil) {
		return
	}
	c.dropSpares()
	c.spareTil = time.Time{}
}

func (c *Cache) dropSpares() {
	for id := range c.spare {
		c.dropSpare(id)
	}
}
