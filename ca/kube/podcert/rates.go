package podcert

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// How often requests are looked at, so that the flood of one node or pod holds up no other. A kubelet asks once for each
// volume, and again at half life.
const (
	nodeRate, nodeBurst = 20, 500
	podRate, podBurst   = 0.2, 40
	// maxRates bounds the nodes and pods that are told apart; with more, those that are idle are forgotten, which is looked for
	// once in sweepEvery.
	maxRates   = 50_000
	sweepEvery = 10 * time.Second
)

// rates bound how often the requests for one node and for one pod are looked at.
type rates struct {
	now func() time.Time

	mu          sync.Mutex // guards what follows
	nodes, pods limiters
}

// limiters are those of one kind, which share a rate and a burst.
type limiters struct {
	by    map[string]*rate.Limiter
	each  rate.Limit
	burst int
	swept time.Time
}

func newRates(now func() time.Time) *rates {
	return &rates{now: now, nodes: limiters{by: map[string]*rate.Limiter{}, each: nodeRate, burst: nodeBurst}, pods: limiters{by: map[string]*rate.Limiter{}, each: podRate, burst: podBurst}}
}

// wait returns how long a request for the pod on the node has to wait for its turn; if it has not to, that turn is taken.
func (r *rates) wait(node, pod string) time.Duration {
	now := r.now()
	r.mu.Lock()
	defer r.mu.Unlock()
	byNode, byPod := r.nodes.get(node, now), r.pods.get(pod, now)
	if wait := max(due(byPod, now), due(byNode, now)); wait > 0 {
		return wait
	}
	byPod.AllowN(now, 1)
	byNode.AllowN(now, 1)
	return 0
}

// due is how long it takes until there is a token.
func due(l *rate.Limiter, now time.Time) time.Duration {
	missing := 1 - l.TokensAt(now)
	if missing <= 0 {
		return 0
	}
	return time.Duration(missing/float64(l.Limit())*float64(time.Second)) + time.Millisecond
}

func (ls *limiters) get(key string, now time.Time) *rate.Limiter {
	if l := ls.by[key]; l != nil {
		return l
	}
	if len(ls.by) >= maxRates && now.Sub(ls.swept).Abs() >= sweepEvery {
		ls.swept = now
		for k, l := range ls.by {
			if l.TokensAt(now) >= float64(ls.burst) {
				delete(ls.by, k)
			}
		}
	}
	if len(ls.by) >= maxRates { // a flood of made-up names: all of these share one limit
		key = ""
		if l := ls.by[key]; l != nil {
			return l
		}
	}
	l := rate.NewLimiter(ls.each, ls.burst)
	ls.by[key] = l
	return l
}
