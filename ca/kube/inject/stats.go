package inject

import "sync/atomic"

// Stats is what the webhook has answered. It answers whoever asks, so that a stranger who reaches its port counts, too.
type Stats struct {
	// Injected are pods into which the proxy was put; Refused are those that asked for it by annotations that cannot be.
	Injected, Refused uint64
}

type counts struct{ injected, refused atomic.Uint64 }

func (n *counts) add(which func(*counts) *atomic.Uint64) {
	if n != nil {
		which(n).Add(1)
	}
}

// Stats returns what was answered since the start.
func (s *Server) Stats() Stats {
	return Stats{s.c.counts.injected.Load(), s.c.counts.refused.Load()}
}
