package svidcache

import (
	"crypto/x509"
	"maps"
	mathrand "math/rand/v2"
	"slices"
	"time"
)

// maxWave bounds the time over which what a tainted authority signed is renewed, whatever the CA says.
const maxWave = 24 * time.Hour

// Authorities are the X.509 authorities of the own trust domain.
type Authorities struct {
	// X509 are all of them, Tainted those subject key ids whose authority is tainted.
	X509    []*x509.Certificate
	Tainted map[string]struct{}
	// Reissue is the time over which what the tainted ones signed is to be renewed, by all agents together.
	Reissue time.Duration
}

// planWave gives each record whose SVID a tainted authority signed its moment in the wave: the oldest first, evenly, and
// with a random share, so that the agents of the trust domain together ask for a steady number a second. Records that have
// their moment keep it. It is called with mu held.
func (c *Cache) planWave(own *bundle) {
	if len(own.tainted) == 0 {
		return
	}
	var wave []*record
	for _, r := range c.records {
		if r.svid != nil && r.waveAt.IsZero() && has(own.tainted, r.svid.signer) {
			wave = append(wave, r)
		}
	}
	slices.SortFunc(wave, func(a, b *record) int { return a.svid.notBefore.Compare(b.svid.notBefore) })
	steady := time.Now()
	for i, r := range wave {
		r.waveAt = steady.Add(waveMoment(own.reissue, i, len(wave)))
	}
}

// waveMoment is when the i-th of n takes its turn within a wave of that length.
func waveMoment(length time.Duration, i, n int) time.Duration {
	turn := min(length, maxWave) / time.Duration(n)
	if turn <= 0 {
		return 0
	}
	return time.Duration(i)*turn + mathrand.N(turn)
}

// count notes of which authority r's SVID is. One that is revoked, or whose ID is, nobody gets: no workload needs its authority
// any more, and it may stay for as long as the Revocation does. It is called with mu held, whenever one of these changes.
func (c *Cache) count(r *record) {
	authority := ""
	if r.svid != nil && !r.revoked && !r.barred && c.records[r.entry.id] == r {
		authority = r.svid.authority
	}
	if authority == r.counted {
		return
	}
	if r.counted != "" {
		if c.inUse[r.counted]--; c.inUse[r.counted] == 0 {
			delete(c.inUse, r.counted)
		}
	}
	if authority != "" {
		c.inUse[authority]++
	}
	r.counted = authority
}

// tellUse tells the CA of which authorities the cache holds SVIDs, if that is news. It is called with mu held.
func (c *Cache) tellUse() {
	ids := slices.Sorted(maps.Keys(c.inUse))
	if c.toldUse == nil || !slices.Equal(ids, *c.toldUse) {
		c.toldUse = &ids
		c.config.CA.InUse(ids)
	}
}
