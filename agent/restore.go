package agent

import (
	"context"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/agent/sealed"
	"github.com/signet-id/signet/agent/svidcache"
)

// SealedCache configures what the agent keeps on disk for a start without its CA.
type SealedCache struct {
	// Key is where the key of the cache is kept: file (default), in data_dir, which only the agent's user can read.
	Key string `yaml:"key"`
	// Disable keeps nothing: an agent that is started while the CA is away serves nothing until it is back.
	Disable bool `yaml:"disable"`
}

// check fills in defaults and tells each mistake by its field.
func (c *SealedCache) check(bad func(field, format string, args ...any)) {
	if c.Key == "" {
		c.Key = "file"
	}
	if c.key() == nil {
		bad("sealed_cache.key", "%q is not file", c.Key)
	}
}

// key is what Key names, or nil.
func (c *SealedCache) key() sealed.Key {
	switch c.Key {
	case "file":
		return sealed.File{}
	}
	return nil
}

// openCache opens the sealed cache and returns what an earlier run of this agent left there, or nil.
func (a *Agent) openCache() *sealed.Contents {
	c := a.config
	if c.SealedCache.Disable {
		return nil
	}
	var contents *sealed.Contents
	a.sealed, contents = sealed.Open(context.Background(), sealed.Config{
		Dir: c.DataDir, TrustDomain: c.trustDomain(), Agent: a.node.id(), Key: c.SealedCache.key(), MaxOffline: c.MaxOffline, Log: a.log, Now: c.Now,
	})
	a.node.own = a.sealed.Own
	return contents
}

// restore has the SVID cache serve what was found.
func (a *Agent) restore(found *sealed.Contents) error {
	kept := svidcache.Kept{State: found.State, Contact: found.Contact, Seen: found.Seen, MaxOffline: a.config.MaxOffline}
	for _, s := range found.SVIDs {
		kept.SVIDs = append(kept.SVIDs, svidcache.KeptSVID(s))
	}
	if err := a.cache.Restore(kept); err != nil {
		return fmt.Errorf("what the sealed cache holds cannot be used: %w", err)
	}
	return nil
}

// heldAs is who the agent was when it received what was found, if the CA can go on from there.
func (a *Agent) heldAs(found *sealed.Contents) spiffeid.ID {
	if found == nil || !found.Continues {
		return spiffeid.ID{}
	}
	return a.node.id()
}
