package peer

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// TestLooksAreShared: who asks while a process is looked at is told by one look, which begins later.
func TestLooksAreShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ls looks
		var begun atomic.Uint64
		let := make(chan struct{})
		failed := errors.New("third")
		read := func() (Snapshot, error) {
			n := begun.Add(1)
			<-let
			if n == 3 {
				return Snapshot{}, failed
			}
			return Snapshot{StartTime: n}, nil
		}
		var all sync.WaitGroup
		ask := func(n int, want uint64, wantErr error) {
			for range n {
				all.Go(func() {
					if s, err := ls.share(read); s.StartTime != want || err != wantErr {
						t.Errorf("told of look %d, %v; want %d, %v", s.StartTime, err, want, wantErr)
					}
				})
			}
			synctest.Wait()
		}
		ask(1, 1, nil)
		ask(10, 2, nil)
		let <- struct{}{}
		synctest.Wait()
		ask(5, 0, failed) // the second has begun: it is not for these
		let <- struct{}{}
		let <- struct{}{}
		all.Wait()
		if n := begun.Load(); n != 3 || ls.running || ls.next != nil {
			t.Errorf("%d looks, running %t", n, ls.running)
		}
	})
}

// TestSnapshotsOfManyCalls: each is told of this process.
func TestSnapshotsOfManyCalls(t *testing.T) {
	table := newTable(t, Config{})
	p, err := table.Open(int32(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	want, err := p.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			for range 200 {
				if s, err := p.Snapshot(); err != nil || !s.Equal(want) {
					t.Errorf("%+v, %v; want %+v", s, err, want)
				}
			}
		})
	}
	all.Wait()
}
