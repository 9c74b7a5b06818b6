package nodeapi

import (
	"context"
	"net/netip"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/ca/access"
)

const (
	// maxAttesting bounds the attestations that are under way, and maxAttestingFrom those from one address: callers who
	// need not be anybody must not fill the CA with streams that wait, nor keep other nodes out.
	maxAttesting     = 1024
	maxAttestingFrom = 128
)

// errCrowded tells the agent to come back; agents wait with jitter before they do.
var errCrowded = status.Error(codes.ResourceExhausted, "too many nodes attest at this moment; attest again in a few seconds")

// seats counts the attestations under way.
type seats struct {
	mu    sync.Mutex // guards taken and from
	taken int
	from  map[netip.Addr]int
}

// take takes a seat for a caller from addr, or says that there is none.
func (s *seats) take(addr netip.Addr) (leave func(), err error) {
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

// callerAddress is where the caller comes from, without the port; the zero Addr on the admin socket.
func callerAddress(ctx context.Context) netip.Addr {
	ap, err := netip.ParseAddrPort(access.From(ctx).Address)
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap().WithZone("")
}
