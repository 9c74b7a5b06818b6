package testca

import (
	"sync"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

// Changing is a source whose policies change, and which tells of it.
type Changing struct {
	current atomic.Pointer[policy.Policies]
	mu      sync.Mutex
	readers map[chan struct{}]struct{}
}

// Policies returns those of the moment.
func (c *Changing) Policies() *policy.Policies { return c.current.Load() }

// Set makes p the policies of the moment.
func (c *Changing) Set(p *policy.Policies) {
	c.current.Store(p)
	c.mu.Lock()
	defer c.mu.Unlock()
	for r := range c.readers {
		select {
		case r <- struct{}{}:
		default:
		}
	}
}

// Revoke revokes the IDs of these paths in example.org, and no others.
func (c *Changing) Revoke(paths ...string) {
	set := &policyv1.RevocationSet{}
	for _, path := range paths {
		set.Revocations = append(set.Revocations, &policyv1.Revocation{Name: "revoked" + path, Target: &policyv1.Revocation_SpiffeId{SpiffeId: "spiffe://example.org" + path}})
	}
	c.Set(c.Policies().WithRevocations(policy.CompileRevocations(set, spiffeid.RequireTrustDomainFromString("example.org"))))
}

// Subscribe tells of changes.
func (c *Changing) Subscribe() (<-chan struct{}, func()) {
	r := make(chan struct{}, 1)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.readers == nil {
		c.readers = make(map[chan struct{}]struct{})
	}
	c.readers[r] = struct{}{}
	return r, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.readers, r)
	}
}
