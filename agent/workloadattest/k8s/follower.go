package k8s

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"
)

const (
	// spacing is the time between the beginnings of two lists, give or take a fifth, and share how much of it a list may take: one
	// that comes quickly is asked for more often, down to minSpacing. The kubelet itself looks at its containers once a second,
	// and a pod that has just begun waits for what it sees then.
	spacing    = 500 * time.Millisecond
	minSpacing = 100 * time.Millisecond
	share      = 20 // one part in it

	// maxBackoff is the longest wait after failures.
	maxBackoff = 5 * time.Second
)

var errClosed = errors.New("the agent is ending")

// A follower holds the newest pod list. It is asked for only while somebody waits for it, once for all who do.
type follower struct {
	fetch func(context.Context) (*podList, error)
	ctx   context.Context // ends with close
	stop  context.CancelFunc
	tasks sync.WaitGroup

	spacing, minSpacing, maxBackoff time.Duration // not changed once it is used

	mu       sync.Mutex
	newest   *podList
	failed   error // of the last fetch
	failures int   // in a row
	waiting  int
	fetching bool          // a task runs, and will look at waiting before it fetches
	next     time.Time     // when the next fetch may begin
	ended    chan struct{} // closed when a fetch has ended
}

func newFollower(fetch func(context.Context) (*podList, error)) *follower {
	f := &follower{fetch: fetch, ended: make(chan struct{}), spacing: spacing, minSpacing: minSpacing, maxBackoff: maxBackoff}
	f.ctx, f.stop = context.WithCancel(context.Background())
	return f
}

func (f *follower) close() {
	f.mu.Lock()
	f.stop()
	f.mu.Unlock()
	f.tasks.Wait()
}

// held returns the newest list, or nil.
func (f *follower) held() *podList {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.newest
}

// since waits for a list that began at t or later, over failures, until ctx ends.
func (f *follower) since(ctx context.Context, t time.Time) (*podList, error) {
	return f.wait(ctx, t, false)
}

// sinceOrFailure is since that waits for one fetch only.
func (f *follower) sinceOrFailure(ctx context.Context, t time.Time) (*podList, error) {
	return f.wait(ctx, t, true)
}

func (f *follower) wait(ctx context.Context, t time.Time, once bool) (*podList, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.waiting++
	defer func() { f.waiting-- }()
	for waited := false; ; waited = true {
		switch {
		case f.newest != nil && !f.newest.started.Before(t):
			return f.newest, nil
		case f.ctx.Err() != nil:
			return nil, errClosed
		case once && f.failed != nil && (waited || time.Now().Before(f.next)):
			return nil, f.failed
		case ctx.Err() != nil:
			return nil, f.why(ctx)
		}
		if !f.fetching {
			f.fetching = true
			f.tasks.Go(f.refresh)
		}
		ended := f.ended
		f.mu.Unlock()
		select {
		case <-ended:
		case <-ctx.Done():
		case <-f.ctx.Done():
		}
		f.mu.Lock()
	}
}

// why says why a list did not come, or did not have what was waited for.
func (f *follower) why(ctx context.Context) error {
	if f.failed != nil {
		return f.failed
	}
	if f.newest == nil {
		return errors.New("the kubelet has not answered in time")
	}
	return errors.Join(errors.New("the kubelet does not know it yet (a sandbox of a pod is none of its containers)"), context.Cause(ctx))
}

// refresh fetches once, if somebody still waits when it may.
func (f *follower) refresh() {
	f.mu.Lock()
	pause := time.Until(f.next)
	f.mu.Unlock()
	if pause > 0 {
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-f.ctx.Done():
			timer.Stop()
		}
	}
	f.mu.Lock()
	if f.waiting == 0 || f.ctx.Err() != nil {
		f.fetching = false
		f.mu.Unlock()
		return
	}
	f.mu.Unlock()

	started := time.Now()
	l, err := f.fetch(f.ctx)

	f.mu.Lock()
	defer f.mu.Unlock()
	f.failed = err
	if err == nil {
		f.newest, f.failures, f.next = l, 0, started.Add(jitter(f.between(time.Since(started))))
	} else {
		f.failures++
		f.next = time.Now().Add(jitter(min(f.spacing<<min(f.failures-1, 8), f.maxBackoff)))
	}
	f.fetching = false
	close(f.ended)
	f.ended = make(chan struct{})
}

// between is the time between the beginnings of two lists of which one took so long.
func (f *follower) between(took time.Duration) time.Duration {
	return min(max(share*took, f.minSpacing), f.spacing)
}

// jitter is d, give or take a fifth.
func jitter(d time.Duration) time.Duration { return d*4/5 + rand.N(d*2/5) }
