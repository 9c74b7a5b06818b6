package inject

import (
	"errors"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

// A logBuffer is a log that is read while it is written.
type logBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// TestConflictIsNoFailure: the configuration was changed by somebody, this CA perhaps, before the watch has told of it. That is tried again
// without a word; anything else is warned of once.
func TestConflictIsNoFailure(t *testing.T) {
	for name, tt := range map[string]struct {
		err    error
		warned int
	}{
		"conflict":  {apierrors.NewConflict(schema.GroupResource{Resource: "mutatingwebhookconfigurations"}, "signet-inject", errors.New("changed")), 0},
		"forbidden": {apierrors.NewForbidden(schema.GroupResource{Resource: "mutatingwebhookconfigurations"}, "signet-inject", errors.New("no")), 1},
	} {
		t.Run(name, func(t *testing.T) {
			var left atomic.Int64
			left.Store(2)
			var out logBuffer
			w := startWith(t, slog.New(slog.NewTextHandler(&out, nil)), func(c *fake.Clientset) {
				c.PrependReactor("patch", "mutatingwebhookconfigurations", func(clienttesting.Action) (bool, runtime.Object, error) {
					return left.Add(-1) >= 0, nil, tt.err
				})
			})
			eventually(t, "caBundle", func() bool { return len(w.caBundle()) > 0 })
			if got := strings.Count(out.String(), "cannot be kept"); got != tt.warned || left.Load() >= 0 {
				t.Errorf("%d warnings, want %d, with %d tries left:\n%s", got, tt.warned, left.Load(), out.String())
			}
		})
	}
}
