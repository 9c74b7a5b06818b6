package follow_test

import (
	"context"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/signet-id/signet/ca/kube/follow"
)

// eater has room again, or not.
type eater struct {
	names
	hungry atomic.Bool
}

func (e *eater) Hungry() bool { return e.hungry.Load() }

// What a Store left out for want of room is listed again once it has room, though nothing happens to it, and not more than once a minute or so,
// however often there is room.
func TestAHungryStoreIsToldAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lists := 0
		e := &eater{names: names{whole: func() { lists++ }}}
		f := follow.New(follow.Config{Name: "things", Store: e, Log: slog.New(slog.DiscardHandler),
			List: func(context.Context, metav1.ListOptions) (runtime.Object, error) {
				return &metav1.PartialObjectMetadataList{ListMeta: metav1.ListMeta{ResourceVersion: "7"}}, nil
			},
			Watch: func(context.Context, metav1.ListOptions) (watch.Interface, error) { return watch.NewFake(), nil }})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			f.Run(ctx)
		}()
		after := func(d time.Duration) int {
			time.Sleep(d) // fake time: the test takes none
			synctest.Wait()
			return lists
		}
		if n := after(10 * time.Minute); n != 1 {
			t.Errorf("%d lists for a Store that left nothing out", n)
		}
		e.hungry.Store(true)
		if n := after(2 * time.Minute); n < 2 || n > 5 {
			t.Errorf("%d lists two minutes after there is room, want 2 to 5", n)
		}
		e.hungry.Store(false)
		now := after(2 * time.Minute)
		if n := after(10 * time.Minute); n != now {
			t.Errorf("%d more lists after all was taken", n-now)
		}
		cancel()
		<-ended
	})
}
