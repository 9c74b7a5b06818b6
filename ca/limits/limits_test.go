package limits

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestBucketLetsBurstThenRateThrough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tab := NewTable[string](Limit{Rate: 10, Burst: 20}, time.Second)
		begun := time.Now()
		for i := range 30 {
			if err := tab.Take(t.Context(), "a", 1); err != nil {
				t.Fatalf("call %d: %v", i, err)
			}
		}
		if d := time.Since(begun); d != time.Second {
			t.Errorf("20 at once and 10 more took %v, want 1s", d)
		}
		if err := tab.Take(t.Context(), "b", 20); err != nil || time.Since(begun) != time.Second {
			t.Errorf("another caller: %v after %v", err, time.Since(begun))
		}
		time.Sleep(time.Hour) // kept are 20, not an hour's
		if err := tab.Take(t.Context(), "a", 20); err != nil {
			t.Error(err)
		}
		if err := exceeded(t, tab.Take(t.Context(), "a", 20)); err.RetryAfter != 2*time.Second {
			t.Errorf("retry after %v, want 2s", err.RetryAfter)
		}
		// What was refused was not taken.
		begun = time.Now()
		if err := tab.Take(t.Context(), "a", 1); err != nil || time.Since(begun) != 100*time.Millisecond {
			t.Errorf("one more: %v after %v, want it after 100ms", err, time.Since(begun))
		}
	})
}

func exceeded(t *testing.T, err error) *ExceededError {
	t.Helper()
	x, ok := errors.AsType[*ExceededError](err)
	if !ok {
		t.Fatalf("%v; want an ExceededError", err)
	}
	return x
}

func TestMoreThanABucketHoldsIsNeverLetThrough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tab := NewTable[string](Limit{Rate: 500, Burst: 500}, time.Hour)
		begun := time.Now()
		for _, n := range []int{501, 10_000, 1 << 40} {
			if err := exceeded(t, tab.Take(t.Context(), "a", n)); err.RetryAfter != 0 {
				t.Errorf("%d: retry after %v", n, err.RetryAfter)
			}
		}
		if err := tab.Take(t.Context(), "a", 500); err != nil || time.Since(begun) != 0 {
			t.Errorf("500 after that: %v after %v", err, time.Since(begun))
		}
	})
}

func TestWaitIsBoundedByTheCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tab := NewTable[string](Limit{Rate: 1, Burst: 1}, 5*time.Second)
		take := func(ctx context.Context) error { return tab.Take(ctx, "a", 1) }
		if err := take(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		begun := time.Now()
		exceeded(t, take(ctx)) // known beforehand, so not waited for
		if d := time.Since(begun); d != 0 {
			t.Errorf("refused after %v", d)
		}
		gone, hangUp := context.WithCancel(t.Context())
		time.AfterFunc(100*time.Millisecond, hangUp)
		if err := take(gone); !errors.Is(err, context.Canceled) || time.Since(begun) != 100*time.Millisecond {
			t.Errorf("who hung up: %v after %v", err, time.Since(begun))
		}
		// Its token goes to the next one.
		if err := take(t.Context()); err != nil || time.Since(begun) != time.Second {
			t.Errorf("the next one: %v after %v, want 1s", err, time.Since(begun))
		}
	})
}

// TestWaitersAreBounded: of a flood only as many wait as tokens come in the time; the rest is refused at once.
func TestWaitersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tab := NewTable[string](Limit{Rate: 10, Burst: 10}, time.Second)
		var waiting, refused, first atomic.Int64
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() {
				waiting.Add(1)
				defer waiting.Add(-1)
				if err := tab.Take(t.Context(), "a", 1); err != nil {
					refused.Add(1)
					if exceeded(t, err).First {
						first.Add(1)
					}
				}
			})
		}
		synctest.Wait()
		if n := waiting.Load(); n != 10 {
			t.Errorf("%d wait, want 10", n)
		}
		wg.Wait()
		if refused.Load() != 980 || first.Load() != 1 {
			t.Errorf("%d refused, %d of them to be told of; want 980 and 1", refused.Load(), first.Load())
		}
		// What was refused took nothing, however many were refused at the same moment.
		begun := time.Now()
		if err := tab.Take(t.Context(), "a", 1); err != nil || time.Since(begun) != 100*time.Millisecond {
			t.Errorf("after the flood: %v after %v, want it after 100ms", err, time.Since(begun))
		}
		// A minute later the flood is worth a line again.
		for range 20 {
			tab.Take(t.Context(), "a", 1)
		}
		time.Sleep(tellEvery)
		for range 20 {
			go tab.Take(t.Context(), "a", 1)
		}
		synctest.Wait()
		if !exceeded(t, tab.Take(t.Context(), "a", 1)).First {
			t.Error("not told of again after a minute")
		}
		time.Sleep(time.Minute)
	})
}

// TestManyCallersTakeNoMoreRoom: an attacker with many addresses neither grows the table nor takes from others.
func TestManyCallersTakeNoMoreRoom(t *testing.T) {
	tab := NewTable[netip.Addr](Limit{Rate: 1, Burst: 2}, 0)
	good := netip.MustParseAddr("192.0.2.1")
	attacker := netip.MustParseAddr("2001:db8::")
	for i := range 5 * MaxCallers {
		if err := tab.Take(t.Context(), attacker, 1); err != nil {
			t.Fatal(err)
		}
		attacker = attacker.Next()
		if i%MaxCallers == 0 {
			if err := tab.Take(t.Context(), good, 2); err != nil {
				t.Errorf("after %d other callers: %v", i, err)
			}
		}
		if n := tab.Callers(); n > MaxCallers {
			t.Fatalf("%d callers are remembered, at most %d should be", n, MaxCallers)
		}
	}
	// One who goes on to call is not forgotten.
	flood := netip.MustParseAddr("198.51.100.1")
	let := 0
	for range MaxCallers {
		if tab.Take(t.Context(), flood, 1) == nil {
			let++
		}
		tab.Take(t.Context(), attacker, 1)
		attacker = attacker.Next()
	}
	if let > 30 {
		t.Errorf("a flood got through %d times by hiding among other callers", let)
	}
}

func TestAddress(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.7:8081":               "192.0.2.7",
		"192.0.2.7":                    "192.0.2.7",
		"[::ffff:192.0.2.7]:8081":      "192.0.2.7",
		"[2001:db8:1:2:3:4:5:6]:65535": "2001:db8:1:2::",
		"[2001:db8:1:2:ffff::1]:1":     "2001:db8:1:2::",
		"[2001:db8:1:3::1]:1":          "2001:db8:1:3::",
		"[fe80::1%eth0]:1":             "fe80::",
		"[::1]:1":                      "::",
		"unix":                         "invalid IP",
		"":                             "invalid IP",
		"@":                            "invalid IP",
	} {
		if got := Address(in).String(); got != want {
			t.Errorf("Address(%q) = %s, want %s", in, got, want)
		}
	}
}

func FuzzAddress(f *testing.F) {
	for _, s := range []string{"192.0.2.7:8081", "[::ffff:192.0.2.7]:8081", "[fe80::1%eth0]:1", "x", "[::]:0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a := Address(s)
		if a.Is4In6() || a.Zone() != "" {
			t.Errorf("Address(%q) = %v", s, a)
		}
		if a.Is6() {
			if b := a.As16(); [8]byte(b[8:]) != [8]byte{} {
				t.Errorf("Address(%q) = %v, which is more than a /64", s, a)
			}
		}
		if again := Address(a.String()); a.IsValid() && again != a {
			t.Errorf("Address(%q) = %v, and of that %v", s, a, again)
		}
	})
}

func BenchmarkTake(b *testing.B) {
	tab := NewTable[string](Limit{Rate: 1 << 30, Burst: 1 << 30}, 0)
	keys := make([]string, 1000)
	for i := range keys {
		keys[i] = fmt.Sprint(i)
	}
	for i := 0; b.Loop(); i++ {
		if err := tab.Take(context.Background(), keys[i%len(keys)], 1); err != nil {
			b.Fatal(err)
		}
	}
}
