package svidcache

import (
	"slices"

	"github.com/signet-id/signet/workloadapi"
)

var _ workloadapi.Acknowledger = (*Cache)(nil)

// handedOn counts which authorities of the own trust domain have reached every open stream. Guarded by Cache.mu.
//
// A stream takes part once it has been given its first update: from then on it holds a bundle, and an authority that
// comes later has reached it only when the endpoint says so. Before, it holds nothing that could be too old.
type handedOn struct {
	streams map[*watcher]*handedStream
	count   map[string]int // authority id → streams that have it
	told    []string       // what the CA was told last
}

// A handedStream is what one open stream has.
type handedStream struct {
	given *bundle // in the newest update offered to the endpoint
	has   *bundle // in the newest update written to the stream
}

// offered notes what w's channel holds ready, before the endpoint can take it and say that it was written.
func (c *Cache) offered(w *watcher, n *shown) {
	own := n.bundles[n.ownTD]
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.handed.streams[w]; s != nil && own != nil {
		s.given = own
	}
}

// taken notes that the endpoint has taken an update from w's channel. With the first one the stream takes part.
func (c *Cache) taken(w *watcher, n *shown) {
	own := n.bundles[n.ownTD]
	c.mu.Lock()
	defer c.mu.Unlock()
	h := &c.handed
	if h.streams[w] != nil || own == nil {
		return
	}
	h.streams[w] = &handedStream{given: own, has: own}
	h.add(own)
	c.handOn()
}

// HandedOn notes that the update with bundleRevision was written to the stream of watch. It is
// workloadapi.Acknowledger's.
func (c *Cache) HandedOn(watch <-chan workloadapi.Update, bundleRevision int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.handed.streams[c.byChan[watch]]
	if s == nil || s.given.revision != bundleRevision || s.given == s.has {
		return
	}
	c.handed.sub(s.has)
	s.has = s.given
	c.handed.add(s.has)
	c.handOn()
}

func (h *handedOn) add(b *bundle) {
	for _, id := range b.ids {
		h.count[id]++
	}
}

func (h *handedOn) sub(b *bundle) {
	for _, id := range b.ids {
		if h.count[id]--; h.count[id] == 0 {
			delete(h.count, id)
		}
	}
}

func (h *handedOn) leave(w *watcher) {
	if s := h.streams[w]; s != nil {
		h.sub(s.has)
		delete(h.streams, w)
	}
}

// handOn tells the CA which authorities of the present bundle all open streams have, if that is news. Without an open
// stream all of them have been handed on to whoever there is. It is called with mu held.
func (c *Cache) handOn() {
	own := c.state.Load().bundles[c.config.TrustDomain]
	if own == nil {
		return
	}
	var ids []string
	for _, id := range own.ids {
		if c.handed.count[id] == len(c.handed.streams) {
			ids = append(ids, id)
		}
	}
	if !slices.Equal(ids, c.handed.told) {
		c.handed.told = ids
		c.config.CA.HandedOn(ids)
	}
}
