package svidcache

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi"
)

// A WITIssuer signs WIT-SVIDs. It is called by one goroutine at a time.
type WITIssuer interface {
	// IssueWIT asks for one WIT-SVID for each request. Answers are positional.
	IssueWIT(ctx context.Context, requests []WITRequest) []WITAnswer
}

// A WITRequest asks for a WIT-SVID of an entry.
type WITRequest struct {
	EntryID string
	// PublicKey is PKIX DER; Algorithm is the one with which it proves possession.
	PublicKey []byte
	Algorithm string
}

// A WITAnswer is what became of a WITRequest.
type WITAnswer struct {
	Err   error
	Token string
}

// witAlgorithm is that of workloads' keys, which are on P-256. (WPT-07)
const witAlgorithm = "ES256"

// A witRecord is the WIT-SVID of an entry, while a stream shows it. Guarded by Cache.mu.
type witRecord struct {
	entry    *entry
	watchers map[*watcher]struct{}
	svid     *witSVID // nil until issued
	failures int
	retryAt  time.Time // on the steady clock; zero: at once
	usable   bool      // what the last look at the clock found
}

// A witSVID is one WIT-SVID with its key, which belongs to it alone (WIT-24). All processes of the entry on this node share
// it (WIT-23). It never changes.
type witSVID struct {
	entryRevision int64
	id            spiffeid.ID
	keyID         string
	begin, end    time.Time
	renewAt       time.Time
	shown         *workloadapi.WITSVID
}

var _ workloadapi.WITSource = (*Cache)(nil)

// WatchWIT is Watch for callers that want WIT-SVIDs. It is workloadapi.WITSource's.
func (c *Cache) WatchWIT(ctx context.Context, caller workloadapi.Caller) (<-chan workloadapi.Update, error) {
	if c.config.WIT == nil {
		return nil, errors.New("the cache has no issuer of WIT-SVIDs")
	}
	w := newWatcher(caller, true)
	w.wit = true
	return c.follow(ctx, w)
}

// watchWIT makes w one of those who need the WIT-SVID of e. It is called with mu held.
func (c *Cache) watchWIT(e *entry, w *watcher) {
	r := c.wits[e.id]
	if r == nil {
		r = &witRecord{watchers: make(map[*watcher]struct{})}
		c.wits[e.id] = r
	}
	if r.entry != e {
		r.entry, r.failures, r.retryAt = e, 0, time.Time{}
	}
	r.watchers[w] = struct{}{}
	kick(c.witLane)
}

// unwatchWIT is the reverse. What nobody shows is forgotten with its key. It is called with mu held.
func (c *Cache) unwatchWIT(id string, w *watcher) {
	r := c.wits[id]
	if r == nil {
		return
	}
	delete(r.watchers, w)
	if len(r.watchers) == 0 {
		delete(c.wits, id)
	}
}

// serves says whether r has what may be shown at now: the key that signed it is still one of the trust domain's.
func (r *witRecord) serves(own *bundle, now time.Time) bool {
	return r.svid != nil && now.Before(r.svid.end) && r.svid.id == r.entry.spiffeID && own != nil && own.wit[r.svid.keyID] != nil
}

// due says whether a WIT-SVID must be issued although there may be one.
func (r *witRecord) due(own *bundle, now time.Time) bool {
	return !r.serves(own, now) || r.svid.entryRevision < r.entry.revision || !has(own.witKnown, r.svid.keyID) ||
		!now.Before(r.svid.renewAt) || now.Before(r.svid.begin.Add(-time.Minute))
}

// witLoop issues and renews what streams show, until ctx ends.
func (c *Cache) witLoop(ctx context.Context) {
	timer := time.NewTimer(tick)
	defer timer.Stop()
	for ctx.Err() == nil {
		batch, wait := c.takeWIT()
		if len(batch) > 0 {
			c.issueWIT(ctx, batch)
			continue
		}
		timer.Reset(wait)
		select {
		case <-c.witLane:
		case <-timer.C:
		case <-ctx.Done():
		}
	}
}

// A witJob is one issuance under way.
type witJob struct {
	record *witRecord
	entry  *entry // as it was when the issuance began
}

// takeWIT returns up to a batch of what is due, and otherwise how long nothing will be.
func (c *Cache) takeWIT() (batch []witJob, wait time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	own, now, steady := c.state.Load().bundles[c.config.TrustDomain], c.config.Now(), time.Now()
	wait = tick
	for _, r := range c.wits {
		if usable := r.serves(own, now); usable != r.usable {
			r.usable = usable
			r.kick(c)
		}
		switch {
		case !r.due(own, now):
			wait = min(wait, max(r.svid.renewAt.Sub(now), lookMin))
		case c.source.Load() != nil: // nothing is asked for until the CA has said what there is now
		case r.retryAt.After(steady):
			wait = min(wait, r.retryAt.Sub(steady))
		case len(batch) < maxBatch:
			batch = append(batch, witJob{record: r, entry: r.entry})
		}
	}
	return batch, wait
}

func (r *witRecord) kick(c *Cache) {
	for w := range r.watchers {
		c.kick(w)
	}
}

// issueWIT asks for a batch and puts what came into the records.
func (c *Cache) issueWIT(ctx context.Context, batch []witJob) {
	requests := make([]WITRequest, len(batch))
	keys := make([]*ecdsa.PrivateKey, len(batch))
	var err error
	for i, j := range batch {
		if keys[i], err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			err = fmt.Errorf("making a workload's key: %w", err)
			break
		}
		var public []byte
		if public, err = x509.MarshalPKIXPublicKey(keys[i].Public()); err != nil {
			err = fmt.Errorf("encoding a workload's public key: %w", err)
			break
		}
		requests[i] = WITRequest{EntryID: j.entry.id, PublicKey: public, Algorithm: witAlgorithm}
	}
	var answers []WITAnswer
	if err == nil {
		answers = c.config.WIT.IssueWIT(ctx, requests)
	}
	now, own := c.config.Now(), c.state.Load().bundles[c.config.TrustDomain]
	svids, errs := make([]*witSVID, len(batch)), make([]error, len(batch))
	for i, j := range batch {
		switch {
		case err != nil:
			errs[i] = err
		case i >= len(answers):
			errs[i] = errors.New("the CA did not answer")
		case answers[i].Err != nil:
			errs[i] = answers[i].Err
		default:
			svids[i], errs[i] = readWIT(j.entry, keys[i], answers[i].Token, own, now)
		}
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	var failures int
	var sample error
	for i, j := range batch {
		r := j.record
		if errs[i] == nil {
			r.svid, r.failures, r.retryAt = svids[i], 0, time.Time{}
		}
		if own := c.state.Load().bundles[c.config.TrustDomain]; errs[i] != nil || r.entry == j.entry && r.due(own, c.config.Now()) {
			// Asking again at once would bring the same.
			wait := min(retryMin<<min(r.failures, 20), retryMax)
			r.failures++
			r.retryAt = time.Now().Add(wait/2 + mathrand.N(wait))
		}
		if errs[i] != nil {
			failures, sample = failures+1, errs[i]
		}
		r.kick(c)
	}
	if failures > 0 && ctx.Err() == nil {
		c.config.Log.Warn("WIT-SVIDs were not issued, retrying", "failed", failures, "asked", len(batch), "err", sample)
	}
}

// readWIT checks what the CA issued for e and key. A caller gets it only if any verifier would take it for e's ID.
func readWIT(e *entry, key *ecdsa.PrivateKey, token string, own *bundle, now time.Time) (*witSVID, error) {
	if own == nil {
		return nil, errors.New("there is no bundle to check it with")
	}
	issued, err := spiffe.CheckIssuedWITSVID(token, e.spiffeID, key.Public(), own.wit, now)
	if err != nil {
		return nil, fmt.Errorf("what the CA issued is unusable: %w", err)
	}
	private, err := spiffe.MarshalWITKey(key)
	if err != nil {
		return nil, err
	}
	begin := issued.NotBefore
	if begin.IsZero() {
		begin = now
	}
	// Half of the life that is left, a tenth of it to either side, as for X509-SVIDs.
	from := now
	if from.Before(begin) {
		from = begin
	}
	life := issued.Expiry.Sub(from)
	if life <= 0 {
		return nil, fmt.Errorf("it ends at %s, before it begins at %s", issued.Expiry, begin)
	}
	return &witSVID{
		entryRevision: e.revision, id: e.spiffeID, keyID: issued.KeyID, begin: begin, end: issued.Expiry,
		renewAt: from.Add(life*9/20 + mathrand.N(life/10+1)), shown: &workloadapi.WITSVID{Token: token, Key: private},
	}, nil
}
