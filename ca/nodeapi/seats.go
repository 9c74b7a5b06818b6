package nodeapi

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/signet-id/signet/ca/access"
)

const (
	// maxAttesting bounds the attestations that are under way, and maxAttestingFrom those from one address, of IPv6 from one
	// /64: callers who need not be anybody must not fill the CA with streams that wait, nor keep other nodes out.
	maxAttesting     = 1024
	maxAttestingFrom = 128
)

// errCrowded tells the agent to come back; agents wait with jitter before they do.
var errCrowded = access.Limited(5*time.Second, "too many nodes attest at this moment; attest again in a few seconds")

// seats counts the attestations under way.
type seats struct {
	mu    sync.Mutex // guards taken and from
	taken int
	from  map[netip.Addr]int
}

// take takes a seat for a caller from addr, or says that there is none.
func (s *seats) take(addr netip.Addr) (leave func(), err error) {
	if addr.Is6() {
		network, err := addr.Prefix(64)
		if err != nil {
			return nil, err
		}
		addr = network.Addr()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken >= maxAttesting || s.from[addr] >= maxAttestingFrom {
		return nil, errCrowded
	}
	if s.from == nil {
		s.from = map[netip.Addr]int{}
	}
	s.taken++
	s.from[addr]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.taken--
		if s.from[addr]--; s.from[addr] == 0 {
			delete(s.from, addr)
		}
	}, nil
}

// callerAddress is where the caller comes from; the zero Addr on the admin socket.
func callerAddress(ctx context.Context) netip.Addr {
	at, err := netip.ParseAddrPort(access.From(ctx).Address)
	if err != nil {
		return netip.Addr{}
	}
	return at.Addr().Unmap().WithZone("")
}
