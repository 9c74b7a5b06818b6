// Package live keeps the connections and requests that were let through, and ends those that would not be any more: whose
// peer has been revoked, whom the policies no longer allow, or whose SVID has expired. The enforcement points for Go
// programs and the proxy put into a Table what they let through; it decides nothing new and opens nothing.
package live

import (
	"container/heap"
	"crypto/x509"
	"slices"
	"sync"
	"time"

	"github.com/signet-id/signet/policy"
)

const (
	// tick is the longest time for which neither the wall clock nor the source is looked at: policies become too old by
	// the clock alone, a machine that slept or whose clock was set has SVIDs that expired meanwhile, and a source may be
	// one that tells nobody of its changes.
	tick = time.Second

	// parting is how long a connection stays open after its requests were ended, so that their last word gets out.
	parting = 100 * time.Millisecond

	// DefaultMaxLinks is how many links a Table holds. What comes above is refused.
	DefaultMaxLinks = 1 << 20
)

// A Source has the policies of the moment.
type Source interface{ Policies() *policy.Policies }

// A Subscriber is a Source that tells of changes at once; a source.Source is one. Others are looked at once a second.
type Subscriber interface {
	// Subscribe returns a channel with one slot that is filled after each change, until stop is called.
	Subscribe() (changed <-chan struct{}, stop func())
}

// A Link is what was let through: a connection, or a request on one.
type Link struct {
	// Leaf is the peer's verified X509-SVID; the link ends when it expires. Nil for a request, whose connection is a link
	// of its own.
	Leaf *x509.Certificate

	// Judge decides again. It must not block, and may be called until Close or the remove function of Add has returned.
	Judge Judge

	// Close ends the link because of d. It is called at most once, after the link has left the table, and must not block:
	// close the network's connection, not TLS's, which may wait for a peer that does not read.
	Close func(d policy.Decision)

	// Parting says that Close is to come a moment after the decision, since requests on the link are told of it first. It
	// is for connections on which nothing new is let through meanwhile.
	Parting bool

	// Gone says that the link was closed by others. It is asked once a second, for links whose owner does not learn of
	// their end. Nil: the owner removes it.
	Gone func() bool
}

// A Table is safe for concurrent use. Its one goroutine lives while it holds links: it needs no closing.
type Table struct {
	source Source
	now    func() time.Time
	most   int

	mu      sync.Mutex
	links   []*member
	ends    ends // those with a leaf, the first to expire on top
	probed  int  // those with Gone
	leaving []departure
	running bool
	wake    chan struct{} // one slot: look again
}

// A member is a link in the table.
type member struct {
	Link
	at      int // in links; -1 when it has left
	endAt   int // in ends; -1 if it is not there
	expires time.Time
}

// A departure is a link that is closed at a moment of the steady clock.
type departure struct {
	member   *member
	decision policy.Decision
	at       time.Time
}

// Config says how a Table works.
type Config struct {
	// Policies decide. Required.
	Policies Source
	// MaxLinks is how many links are held; 0 means DefaultMaxLinks.
	MaxLinks int
	// Now is the wall clock for the validity of SVIDs. Nil means time.Now.
	Now func() time.Time
}

// New returns an empty Table.
func New(c Config) *Table {
	if c.MaxLinks <= 0 {
		c.MaxLinks = DefaultMaxLinks
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Table{source: c.Policies, now: c.Now, most: c.MaxLinks, wake: make(chan struct{}, 1)}
}

// Add puts a link into the table and decides it once more, since the policies may have changed after it was let through:
// from then on no change is missed. If the decision is a denial, the link is not in the table and the caller ends it; should
// the policies have changed in this very moment, Close may have been called too. Otherwise remove must be called when the
// link has ended by itself; it may be called more than once, and from Close.
func (t *Table) Add(l Link) (remove func(), d policy.Decision) {
	m := &member{Link: l, endAt: -1}
	if l.Leaf != nil {
		m.expires = l.Leaf.NotAfter
	}
	t.mu.Lock()
	if len(t.links) >= t.most {
		t.mu.Unlock()
		return func() {}, policy.Decision{Outcome: policy.Outcome{Reason: policy.ReasonTooManyLinks}}
	}
	m.at = len(t.links)
	t.links = append(t.links, m)
	if l.Leaf != nil {
		first := len(t.ends) == 0 || m.expires.Before(t.ends[0].expires)
		heap.Push(&t.ends, m)
		if first {
			t.kick()
		}
	}
	if l.Gone != nil {
		t.probed++
	}
	if !t.running {
		t.running = true
		go t.run()
	}
	t.mu.Unlock()

	if d = t.judge(m, t.source.Policies(), t.wall()); !d.Allowed {
		t.take(m)
		return func() {}, d
	}
	return func() { t.take(m) }, d
}

// Len is how many links there are.
func (t *Table) Len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.links)
}

// take removes a link, and says whether it was there.
func (t *Table) take(m *member) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.drop(m)
}

// drop is take for those that hold mu.
func (t *Table) drop(m *member) bool {
	if m.at < 0 {
		return false
	}
	last := len(t.links) - 1
	t.links[m.at] = t.links[last]
	t.links[m.at].at = m.at
	t.links[last] = nil
	t.links = t.links[:last]
	m.at = -1
	if m.endAt >= 0 {
		heap.Remove(&t.ends, m.endAt)
	}
	if m.Gone != nil {
		t.probed--
	}
	if last == 0 {
		t.kick()
	}
	return true
}

func (t *Table) kick() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// wall is the wall clock alone: the monotonic one stands still while a machine sleeps.
func (t *Table) wall() time.Time { return t.now().Round(0) }

// judge decides a link at a moment.
func (t *Table) judge(m *member, p *policy.Policies, now time.Time) policy.Decision {
	if m.Leaf != nil && now.After(m.expires) {
		return expired(p)
	}
	return m.Judge(p)
}

// expired is the decision on a link whose peer's SVID is not valid any more.
func expired(p *policy.Policies) policy.Decision {
	d := policy.Decision{Outcome: policy.Outcome{Reason: policy.ReasonInvalidSVID}}
	d.Epoch, d.Revision = p.Revision()
	return d
}

// run looks after the links until there are none.
func (t *Table) run() {
	var changed <-chan struct{}
	if s, ok := t.source.(Subscriber); ok {
		var stop func()
		changed, stop = s.Subscribe()
		defer stop()
	}
	var swept *policy.Policies
	first := true
	probe := time.Now().Add(tick)
	timer := time.NewTimer(tick)
	defer timer.Stop()
	for {
		if p := t.source.Policies(); first || p != swept {
			t.sweep(p)
			swept, first = p, false
		}
		t.expire()
		if !time.Now().Before(probe) {
			t.probe()
			probe = time.Now().Add(tick)
		}
		wait, more := t.depart()
		if !more {
			return
		}
		timer.Reset(wait)
		select {
		case <-changed:
		case <-t.wake:
		case <-timer.C:
		}
	}
}

// sweep decides every link by p. The table is not locked meanwhile: a link that comes is decided by Add, one that leaves
// is not closed.
func (t *Table) sweep(p *policy.Policies) {
	t.mu.Lock()
	links := slices.Clone(t.links)
	t.mu.Unlock()
	now := t.wall()
	for _, m := range links {
		if d := t.judge(m, p, now); !d.Allowed {
			t.end(m, d)
		}
	}
}

// expire ends the links whose peers' SVIDs have expired.
func (t *Table) expire() {
	now := t.wall()
	for {
		t.mu.Lock()
		if len(t.ends) == 0 || !now.After(t.ends[0].expires) {
			t.mu.Unlock()
			return
		}
		m := t.ends[0]
		t.mu.Unlock()
		t.end(m, expired(t.source.Policies()))
	}
}

// probe removes the links that were closed without a word.
func (t *Table) probe() {
	t.mu.Lock()
	var links []*member
	if t.probed > 0 {
		links = slices.Clone(t.links)
	}
	t.mu.Unlock()
	for _, m := range links {
		if m.Gone != nil && m.Gone() {
			t.take(m)
		}
	}
}

// end closes a link, unless it has left meanwhile.
func (t *Table) end(m *member, d policy.Decision) {
	t.mu.Lock()
	there := t.drop(m)
	if there && m.Parting {
		t.leaving = append(t.leaving, departure{m, d, time.Now().Add(parting)})
	}
	t.mu.Unlock()
	if there && !m.Parting {
		m.Close(d)
	}
}

// depart closes the links whose parting is over. It returns how long there is nothing to do, and whether there is
// anything left; if not, the goroutine has to end.
func (t *Table) depart() (wait time.Duration, more bool) {
	for {
		t.mu.Lock()
		wait = tick
		if len(t.ends) > 0 {
			// Just after the end: until then the SVID is valid.
			wait = min(wait, max(t.ends[0].expires.Sub(t.wall()), 0)+time.Millisecond)
		}
		if len(t.leaving) == 0 {
			more = len(t.links) > 0
			t.running = more
			t.mu.Unlock()
			return wait, more
		}
		next := t.leaving[0]
		if left := time.Until(next.at); left > 0 {
			t.mu.Unlock()
			return min(wait, left), true
		}
		t.leaving[0] = departure{}
		if t.leaving = t.leaving[1:]; len(t.leaving) == 0 {
			t.leaving = nil
		}
		t.mu.Unlock()
		next.member.Close(next.decision)
	}
}

// ends is a heap of links by the end of their peers' SVIDs.
type ends []*member

func (e ends) Len() int           { return len(e) }
func (e ends) Less(i, j int) bool { return e[i].expires.Before(e[j].expires) }
func (e ends) Swap(i, j int) {
	e[i], e[j] = e[j], e[i]
	e[i].endAt, e[j].endAt = i, j
}
func (e *ends) Push(x any) {
	m := x.(*member)
	m.endAt = len(*e)
	*e = append(*e, m)
}
func (e *ends) Pop() any {
	last := len(*e) - 1
	m := (*e)[last]
	(*e)[last] = nil
	*e = (*e)[:last]
	m.endAt = -1
	return m
}
