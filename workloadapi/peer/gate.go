package peer

import (
	"context"
	"sync"
)

// A Gate bounds how much work one user can make the agent do at the same time. Looking at a process touches files of its
// choosing, and one on a filesystem that it serves itself can hold a thread for as long as it likes.
type Gate struct {
	perUID int
	total  chan struct{}

	mu   sync.Mutex
	uids map[uint32]*lane // those in use
}

type lane struct {
	slots chan struct{}
	users int // inside or waiting, guarded by Gate.mu
}

// NewGate lets in perUID at once of each user and total of all. Both must be positive.
func NewGate(perUID, total int) *Gate {
	return &Gate{perUID: perUID, total: make(chan struct{}, total), uids: map[uint32]*lane{}}
}

// Enter waits for a place and returns how to leave it, which must be called once. Its only error is ctx's.
func (g *Gate) Enter(ctx context.Context, uid uint32) (leave func(), err error) {
	g.mu.Lock()
	l := g.uids[uid]
	if l == nil {
		l = &lane{slots: make(chan struct{}, g.perUID)}
		g.uids[uid] = l
	}
	l.users++
	g.mu.Unlock()

	select {
	case l.slots <- struct{}{}:
	case <-ctx.Done():
		g.forget(uid, l)
		return nil, context.Cause(ctx)
	}
	select {
	case g.total <- struct{}{}:
	case <-ctx.Done():
		<-l.slots
		g.forget(uid, l)
		return nil, context.Cause(ctx)
	}
	return func() {
		<-g.total
		<-l.slots
		g.forget(uid, l)
	}, nil
}

func (g *Gate) forget(uid uint32, l *lane) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if l.users--; l.users == 0 {
		delete(g.uids, uid)
	}
}
