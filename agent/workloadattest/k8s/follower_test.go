package k8s

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A fetcher counts when it was called, and takes some time.
type fetcher struct {
	mu    sync.Mutex
	calls []time.Time
	takes time.Duration
	err   error
}

func (f *fetcher) fetch(ctx context.Context) (*podList, error) {
	f.mu.Lock()
	f.calls = append(f.calls, time.Now())
	takes, err := f.takes, f.err
	f.mu.Unlock()
	started := time.Now()
	timer := time.NewTimer(takes)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	return newPodList(started), nil
}

// Lists that come quickly are closer together than those that cost the kubelet more, which are half a second apart.
func TestListsAreApartByWhatTheyTake(t *testing.T) {
	for takes, want := range map[time.Duration]time.Duration{time.Millisecond: minSpacing, 10 * time.Millisecond: 200 * time.Millisecond, 100 * time.Millisecond: spacing} {
		t.Run(takes.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fetch := &fetcher{takes: takes}
				f := newFollower(fetch.fetch)
				defer f.close()
				for end := time.Now().Add(100 * want); time.Now().Before(end); {
					if _, err := f.since(t.Context(), time.Now()); err != nil {
						t.Fatal(err)
					}
				}
				if n := len(fetch.calls); n < 90 || n > 112 {
					t.Errorf("%d lists in %s, want about 100", n, 100*want)
				}
				for i := 1; i < len(fetch.calls); i++ {
					if apart := fetch.calls[i].Sub(fetch.calls[i-1]); apart < want*4/5 {
						t.Errorf("list %d came %s after the one before", i, apart)
					}
				}
			})
		})
	}
}

// However many wait, and however often, lists are apart; nobody waiting, there are none.
func TestListsAreApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fetch := &fetcher{takes: 30 * time.Millisecond}
		f := newFollower(fetch.fetch)
		defer f.close()
		var wg sync.WaitGroup
		for range 20 { // twenty who each want a list that begins after they came, for ten seconds
			wg.Go(func() {
				for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
					if _, err := f.since(t.Context(), time.Now()); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if n := len(fetch.calls); n < 15 || n > 27 {
			t.Errorf("%d lists in ten seconds, want about 20", n)
		}
		for i := 1; i < len(fetch.calls); i++ {
			if apart := fetch.calls[i].Sub(fetch.calls[i-1]); apart < spacing*4/5 {
				t.Errorf("list %d came %s after the one before", i, apart)
			}
		}
		n := len(fetch.calls)
		time.Sleep(time.Hour)
		if len(fetch.calls) != n {
			t.Errorf("%d lists for nobody", len(fetch.calls)-n)
		}
		// Nor for those who left before it was time for the next one.
		if _, err := f.since(t.Context(), time.Now()); err != nil {
			t.Error(err)
		}
		n = len(fetch.calls)
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := f.since(ctx, time.Now()); err == nil {
			t.Error("a list came within a millisecond")
		}
		time.Sleep(time.Hour)
		if len(fetch.calls) != n {
			t.Errorf("%d lists for those who left", len(fetch.calls)-n)
		}
		// After a rest the next one begins at once.
		begun := time.Now()
		if _, err := f.since(t.Context(), begun); err != nil || time.Since(begun) > 40*time.Millisecond {
			t.Errorf("%v after %s", err, time.Since(begun))
		}
	})
}

func TestFailuresBackOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fetch := &fetcher{err: errors.New("boom")}
		f := newFollower(fetch.fetch)
		defer f.close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := f.since(ctx, time.Now()); err == nil || !strings.Contains(err.Error(), "boom") {
			t.Errorf("%v", err)
		}
		if n := len(fetch.calls); n < 10 || n > 20 {
			t.Errorf("%d attempts in a minute", n)
		}
		for i := 5; i < len(fetch.calls); i++ {
			if apart := fetch.calls[i].Sub(fetch.calls[i-1]); apart < maxBackoff*4/5 || apart > maxBackoff*6/5 {
				t.Errorf("attempt %d came %s after the one before", i, apart)
			}
		}
		// Who wants one attempt only does not wait for the next.
		begun := time.Now()
		if _, err := f.sinceOrFailure(t.Context(), begun); err == nil || time.Since(begun) > maxBackoff {
			t.Errorf("%v after %s", err, time.Since(begun))
		}
		fetch.mu.Lock()
		fetch.err = nil
		fetch.mu.Unlock()
		if _, err := f.since(t.Context(), time.Now()); err != nil {
			t.Errorf("after it was mended: %v", err)
		}
	})
}

// Callers that come and go do not keep others waiting: what they began goes on for the rest.
func TestGoneCallersDoNotDisturb(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fetch := &fetcher{takes: 100 * time.Millisecond}
		f := newFollower(fetch.fetch)
		defer f.close()
		ending, end := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				for ending.Err() == nil {
					ctx, cancel := context.WithTimeout(ending, time.Millisecond)
					_, _ = f.since(ctx, time.Now())
					cancel()
				}
			})
		}
		for range 5 {
			begun := time.Now()
			if _, err := f.since(t.Context(), begun); err != nil || time.Since(begun) > 2*spacing {
				t.Errorf("%v after %s", err, time.Since(begun))
			}
		}
		end()
		wg.Wait()
	})
}

func TestCloseEndsAFetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFollower((&fetcher{takes: time.Hour}).fetch)
		waits := make(chan error, 1)
		go func() {
			_, err := f.since(t.Context(), time.Now())
			waits <- err
		}()
		synctest.Wait()
		begun := time.Now()
		f.close()
		if err := <-waits; !errors.Is(err, errClosed) || time.Since(begun) > 0 {
			t.Errorf("%v after %s", err, time.Since(begun))
		}
	})
}
