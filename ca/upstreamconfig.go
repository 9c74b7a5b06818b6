package ca

import (
	"time"

	"github.com/signet-id/signet/ca/authority"
)

// Downstream bounds what CAs below this one get.
type Downstream struct {
	// MaxTTL is the longest validity of a downstream CA's certificate. It cannot be revoked on its own. Default 72h.
	MaxTTL time.Duration `yaml:"max_ttl"`
	// Depth is how many levels of CAs may be below this one: the path length in their certificates. Default 1.
	Depth int `yaml:"depth"`
}

const (
	minDownstreamTTL   = time.Minute
	maxDownstreamDepth = 4
)

func (d *Downstream) check(bad func(field, format string, args ...any)) {
	if d.MaxTTL == 0 {
		d.MaxTTL = authority.DefaultMaxDownstreamTTL
	}
	if d.MaxTTL < minDownstreamTTL {
		bad("downstream.max_ttl", "%v is shorter than %v", d.MaxTTL, minDownstreamTTL)
	}
	if d.Depth == 0 {
		d.Depth = 1
	}
	if d.Depth < 0 || d.Depth > maxDownstreamDepth {
		bad("downstream.depth", "%d is not 1 to %d", d.Depth, maxDownstreamDepth)
	}
}
