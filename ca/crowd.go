package ca

import (
	"errors"
	"net"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"

	"github.com/signet-id/signet/ca/limits"
)

const (
	// maxConnsOfCaller bounds the open connections of one SPIFFE ID, and those of one address from which no certificate was
	// shown. An agent has one or two; a node that joins has one for a moment.
	maxConnsOfCaller = 256
	// maxConnsOfStrangers bounds the connections without a certificate together, well below the file descriptors that the
	// CA may have open: with none left it could neither log nor sign.
	maxConnsOfStrangers = 4096
)

var (
	errCallerConns    = errors.New("this caller has too many connections open")
	errStrangersConns = errors.New("too many connections without a certificate are open")
)

// A crowd counts open connections.
type crowd struct {
	mu        sync.Mutex // guards what is below
	of        map[limitedCaller]int
	strangers int
	told      rate.Sometimes
}

func (c *crowd) enter(k limitedCaller) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	stranger := k.id.IsZero()
	switch {
	case c.of[k] >= maxConnsOfCaller:
		return errCallerConns
	case stranger && c.strangers >= maxConnsOfStrangers:
		return errStrangersConns
	}
	if c.of == nil {
		c.of = map[limitedCaller]int{}
	}
	c.of[k]++
	if stranger {
		c.strangers++
	}
	return nil
}

func (c *crowd) leave(k limitedCaller) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.of[k]--; c.of[k] == 0 {
		delete(c.of, k)
	}
	if k.id.IsZero() {
		c.strangers--
	}
}

// enter is access.LimitedCredentials.Enter.
func (l *limiter) enter(id spiffeid.ID, from net.Addr) (leave func(), err error) {
	k := limitedCaller{id: id}
	if id.IsZero() {
		k.address = limits.Address(from.String())
	}
	if err := l.crowd.enter(k); err != nil {
		l.ca.metrics.limited.WithLabelValues("connections").Inc()
		l.crowd.told.Do(func() {
			l.ca.log.Warn("a connection was refused", "err", err, "spiffe_id", id.String(), "address", from.String())
		})
		return nil, err
	}
	return func() { l.crowd.leave(k) }, nil
}
