package svidcache

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"time"
)

// issueLoop asks the CA for what is due in one lane, a batch at a time, until ctx ends.
func (c *Cache) issueLoop(ctx context.Context, lane int) {
	for {
		select {
		case <-c.lanes[lane]:
		case <-ctx.Done():
			return
		}
		for ctx.Err() == nil {
			batch := c.take(lane)
			if len(batch) == 0 {
				break
			}
			c.issue(ctx, batch)
		}
	}
}

// A job is one issuance under way.
type job struct {
	record *record
	entry  *entry // as it was when the issuance began
	key    *key
}

// take returns up to a batch of what is due.
func (c *Cache) take(lane int) []job {
	c.mu.Lock()
	defer c.mu.Unlock()
	due := slices.Collect(maps.Keys(c.due[lane]))
	if len(due) > maxBatch { // who has nothing yet, and then the oldest, comes first
		begin := func(r *record) time.Time {
			if r.svid == nil {
				return time.Time{}
			}
			return r.svid.notBefore
		}
		slices.SortFunc(due, func(a, b *record) int { return begin(a).Compare(begin(b)) })
		due = due[:maxBatch]
	}
	batch := make([]job, 0, len(due))
	for _, r := range due {
		delete(c.due[lane], r)
		r.inFlight = true
		batch = append(batch, job{record: r, entry: r.entry, key: r.next})
	}
	return batch
}

// requestsOf makes the keys that the batch lacks.
func requestsOf(batch []job) ([]X509Request, error) {
	requests := make([]X509Request, len(batch))
	for i := range batch {
		j := &batch[i]
		if j.key == nil {
			k, err := newKey()
			if err != nil {
				return nil, err
			}
			j.key = k
		}
		requests[i] = X509Request{EntryID: j.entry.id, PublicKey: j.key.public, key: j.key, id: j.entry.spiffeID}
	}
	return requests, nil
}

// CSR makes the PKCS#10 request for the key and the entry's ID, DER, for a CA that wants one.
func (r X509Request) CSR() ([]byte, error) {
	k, err := x509.ParsePKCS8PrivateKey(r.key.private)
	if err != nil {
		return nil, fmt.Errorf("a workload's key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{r.id.URL()}}, k)
	if err != nil {
		return nil, fmt.Errorf("making a workload's certificate request: %w", err)
	}
	return csr, nil
}

// issue asks for a batch and puts what came into the records.
func (c *Cache) issue(ctx context.Context, batch []job) {
	var answers []X509Answer
	requests, err := requestsOf(batch)
	if err == nil {
		answers = c.config.CA.IssueX509(ctx, requests)
	}
	svids, errs := make([]*svid, len(batch)), make([]error, len(batch))
	authorities := c.state.Load().bundles[c.config.TrustDomain]
	for i, j := range batch {
		switch {
		case err != nil:
			errs[i] = err
		case i >= len(answers):
			errs[i] = errors.New("the CA did not answer")
		case answers[i].Err != nil:
			errs[i] = answers[i].Err
		default:
			svids[i], errs[i] = readSVID(j.entry, j.key, answers[i], authorities, c.config.Now())
		}
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.config.Now()
	own := c.state.Load().bundles[c.config.TrustDomain]
	var failures int
	var sample error
	for i, j := range batch {
		r := j.record
		r.inFlight = false
		if c.records[j.entry.id] != r {
			continue // the entry is gone, or nobody needs its SVID any more
		}
		if err := errs[i]; err != nil {
			c.stats.issueErrors.Add(1)
			failures, sample = failures+1, err
			r.next = j.key
			r.postpone(retryMax)
			c.past.issued(r.entry.id, err, now)
		} else {
			c.stats.issued.Add(1)
			c.past.issued(r.entry.id, nil, now)
			r.svid, r.next, r.waveAt = svids[i], nil, time.Time{}
			r.foreign = r.foreign && r.entry != j.entry
			r.judge(c.state.Load())
			c.count(r)
			c.keep(r)
			if why := r.stale(own, now); why == "" || r.entry != j.entry {
				r.failures, r.retryAt = 0, time.Time{} // if the entry moved on meanwhile, the next is asked for at once
			} else {
				// Asking again at once would bring the same.
				c.config.Log.Warn("the CA issued an X509-SVID that must be renewed at once; do the clocks of CA and agent agree?",
					"entry_id", r.entry.id, "reason", why, "not_before", r.svid.notBefore, "not_after", r.svid.notAfter, "now", now)
				r.postpone(futileMax)
				c.past.issued(r.entry.id, fmt.Errorf("the CA issued an X509-SVID that must be renewed at once (%s): do the clocks of CA and agent agree?", why), now)
			}
		}
		c.check(r, now)
		for w := range r.watchers {
			c.kick(w)
		}
	}
	c.tellUse()
	if failures > 0 && ctx.Err() == nil {
		c.config.Log.Warn("X509-SVIDs were not issued, retrying", "failed", failures, "asked", len(batch), "err", sample)
	}
}

// clockLoop looks at the wall clock at least every tick, and earlier when something is due, until ctx ends.
func (c *Cache) clockLoop(ctx context.Context) {
	timer := time.NewTimer(tick)
	defer timer.Stop()
	wall, steady := c.config.Now().Round(0), time.Now()
	for {
		select {
		case <-c.retime:
			c.mu.Lock()
			wait := time.Until(c.nextTick)
			c.mu.Unlock()
			timer.Reset(max(wait, 0))
			continue
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		now, steadyNow := c.config.Now().Round(0), time.Now()
		jumped := now.Sub(wall) - steadyNow.Sub(steady)
		wall, steady = now, steadyNow
		timer.Reset(max(c.look(now, jumped.Abs() > clockJump), 0))
		if jumped.Abs() > clockJump {
			c.config.Log.Warn("the wall clock jumped", "by", jumped.Round(time.Second))
		}
	}
}

// look finds what the passing of time has made due, and says how long until the next look. After a jump of the clock
// everything is tried again at once.
func (c *Cache) look(now time.Time, jumped bool) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.state.Load()
	c.nextTick = time.Now().Add(tick)
	c.tellOffline()
	ended := make(map[*watcher]struct{})
	for _, r := range c.records {
		if jumped {
			r.retryAt = time.Time{}
		}
		was := r.usable
		c.check(r, now)
		if r.entry.expired(now) {
			for w := range r.watchers {
				ended[w] = struct{}{}
			}
		} else if was != r.usable {
			for w := range r.watchers {
				c.kick(w)
			}
		}
	}
	if jumped { // entries may have come to life again
		kick(c.witLane)
		for w := range c.watchers {
			ended[w] = struct{}{}
		}
	}
	for w := range ended {
		c.rematch(w, s, now)
		c.kick(w)
	}
	c.sweepSpare()
	if c.refill {
		c.refill = false
		c.refillIdle(s, now)
	}
	c.jwts.sweep(s, c.config.TrustDomain, now)
	return time.Until(c.nextTick)
}

// retimeTo makes the next look at the clock happen at the latest at t, on the steady clock. It is called with mu held.
func (c *Cache) retimeTo(t time.Time) {
	if c.nextTick.IsZero() || t.Before(c.nextTick) {
		c.nextTick = t
		kick(c.retime)
	}
}
