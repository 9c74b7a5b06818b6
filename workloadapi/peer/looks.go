package peer

import "sync"

// looks are those at one process. A look counts for everybody who asked before it began: many calls of one process that come
// while it is looked at wait for one further look, and not for one each.
type looks struct {
	mu      sync.Mutex
	running bool
	next    *look // the one after the running one; nil while nobody waits
}

type look struct {
	turn  chan struct{} // closed when it may begin, by whoever asked for it first
	done  chan struct{} // closed when state and err are there
	state Snapshot
	err   error
}

// share returns what read says, which begins after share was called.
func (ls *looks) share(read func() (Snapshot, error)) (Snapshot, error) {
	ls.mu.Lock()
	if !ls.running {
		ls.running = true
		ls.mu.Unlock()
		defer ls.pass()
		return read()
	}
	l, first := ls.next, ls.next == nil
	if first {
		l = &look{turn: make(chan struct{}), done: make(chan struct{})}
		ls.next = l
	}
	ls.mu.Unlock()
	if first {
		<-l.turn
		defer ls.pass()
		l.state, l.err = read()
		close(l.done)
	}
	<-l.done
	return l.state, l.err
}

// pass lets the next look begin. Whoever asks from now on is not told by it.
func (ls *looks) pass() {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if ls.next == nil {
		ls.running = false
		return
	}
	close(ls.next.turn)
	ls.next = nil
}
