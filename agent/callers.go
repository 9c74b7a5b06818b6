package agent

import (
	"container/list"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/signet-id/signet/workloadapi"
)

const (
	// maxCallers bounds the processes whose refusals are remembered, and maxKinds the kinds of refusals of each.
	maxCallers = 512
	maxKinds   = 8
	// maxTold bounds what is kept of the text that a caller was told.
	maxTold = 300
)

// A refusals book remembers for a while whom the Workload API refused and why, so that an operator who asks hears of it.
type refusals struct {
	mu      sync.Mutex
	callers map[callerKey]*list.Element
	recent  *list.List // of *refusedCaller, the latest in front
}

// A callerKey names a process; those of other PID namespaces have none but their user.
type callerKey struct {
	pid int32
	uid uint32
}

type refusedCaller struct {
	key   callerKey
	kinds []refusalKind
}

// A refusalKind is one reason for one method.
type refusalKind struct {
	Reason workloadapi.Reason
	Method string
	Text   string
	Count  int64
	Last   time.Time
}

func newRefusals() *refusals {
	return &refusals{callers: map[callerKey]*list.Element{}, recent: list.New()}
}

// note is told of the end of each call.
func (r *refusals) note(c workloadapi.CallEnd, now time.Time) {
	if c.Reason == "" || c.Reason == workloadapi.ReasonStopping {
		return
	}
	key := callerKey{c.PID, c.UID}
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.callers[key]
	if e == nil {
		e = r.recent.PushFront(&refusedCaller{key: key})
		r.callers[key] = e
		if r.recent.Len() > maxCallers {
			oldest := r.recent.Back()
			delete(r.callers, oldest.Value.(*refusedCaller).key)
			r.recent.Remove(oldest)
		}
	}
	r.recent.MoveToFront(e)
	caller := e.Value.(*refusedCaller)
	i := slices.IndexFunc(caller.kinds, func(k refusalKind) bool { return k.Reason == c.Reason && k.Method == c.Method })
	kind := refusalKind{Reason: c.Reason, Method: c.Method}
	if i >= 0 {
		kind = caller.kinds[i]
		caller.kinds = slices.Delete(caller.kinds, i, i+1)
	}
	kind.Count++
	kind.Last = now
	kind.Text = strings.ToValidUTF8(c.Text[:min(len(c.Text), maxTold)], "")
	caller.kinds = slices.Insert(caller.kinds, 0, kind)
	caller.kinds = caller.kinds[:min(len(caller.kinds), maxKinds)]
}

// of returns the refusals of a process since it began, the latest first. Pid 0 is every process of another PID namespace.
func (r *refusals) of(pid int32, since time.Time) []refusalKind {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []refusalKind
	for e := r.recent.Front(); e != nil; e = e.Next() {
		caller := e.Value.(*refusedCaller)
		if caller.key.pid != pid {
			continue
		}
		for _, k := range caller.kinds {
			if !k.Last.Before(since) {
				all = append(all, k)
			}
		}
	}
	slices.SortStableFunc(all, func(a, b refusalKind) int { return b.Last.Compare(a.Last) })
	return all[:min(len(all), maxKinds)]
}
