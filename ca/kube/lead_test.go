package kube

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A replica that cannot know whether the Lease is still its own, since it stood still or nothing was answered, sends no write, also
// before anything else has ended its work; reads, and what others do with the same client, go on.
func TestNothingIsWrittenWhenTheLeaseMayBeOver(t *testing.T) {
	c := open(t, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNotFound) })
	for name, tt := range map[string]struct {
		renewed time.Time
		writes  bool
	}{
		"just renewed":           {time.Now(), true},
		"stood still":            {time.Now().Add(-time.Minute), false},
		"the machine was asleep": {time.Now().Round(0).Add(-time.Minute), false}, // which the wall clock alone tells
		"never renewed":          {time.Time{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			working, stop := context.WithCancel(t.Context())
			defer stop()
			e := &election{duration: 30 * time.Second}
			if !tt.renewed.IsZero() {
				e.confirmed.Store(&tt.renewed)
			}
			leading := context.WithValue(working, tenureKey{}, &tenure{e, stop})
			maps := c.ConfigMaps("x")
			write := func(ctx context.Context) error {
				_, err := maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "x"}}, metav1.CreateOptions{})
				return err
			}
			before := c.Requests()
			_, _ = maps.Get(leading, "x", metav1.GetOptions{})
			err := write(leading)
			now := c.Requests()
			if now.Reads != before.Reads+1 {
				t.Error("it does not read")
			}
			if wrote := now.Writes > before.Writes; wrote != tt.writes {
				t.Errorf("wrote: %t, want %t", wrote, tt.writes)
			}
			if refused := strings.Contains(err.Error(), errLeaseOver.Error()); refused == tt.writes || (working.Err() != nil) == tt.writes {
				t.Errorf("the write: %v; the work: %v", err, working.Err())
			}
			if err := write(t.Context()); strings.Contains(err.Error(), errLeaseOver.Error()) {
				t.Errorf("who does not lead writes: %v", err)
			}
		})
	}
}
