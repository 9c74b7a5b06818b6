package e2e

import (
	"context"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-id/signet/internal/dev"
	"github.com/signet-id/signet/test/signettest"
)

// BenchmarkStartToFirstSVID measures from nothing (an empty directory) to the first SVID in a go-spiffe client's
// hands: CA and agent start, attest, an Identity is applied, the client fetches.
func BenchmarkStartToFirstSVID(b *testing.B) {
	for b.Loop() {
		s := signettest.Start(b, signettest.Config{})
		s.Apply(identity("web"))
		src, err := workloadapi.NewX509Source(context.Background(), workloadapi.WithClientOptions(workloadapi.WithAddr(s.WorkloadAPI())))
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		src.Close()
		s.Close()
		b.StartTimer()
	}
}

// watcher passes on which IDs each update of an open stream holds.
type watcher chan []string

func (w watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	var ids []string
	for _, s := range c.SVIDs {
		ids = append(ids, s.ID.Path())
	}
	w <- ids
}
func (w watcher) OnX509ContextWatchError(error) {}

// BenchmarkEntryToOpenStream measures from the call that creates an entry to its SVID in a stream that was open
// before. It reports the median and the 99th percentile.
func BenchmarkEntryToOpenStream(b *testing.B) {
	s := signettest.Start(b, signettest.Config{})
	s.Apply(identity("first"))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(s.WorkloadAPI()))
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	w := make(watcher, 64)
	done := make(chan struct{})
	go func() { defer close(done); client.WatchX509Context(ctx, w) }()
	defer func() { cancel(); <-done }()
	<-w
	var took []time.Duration
	n := 0
	for b.Loop() {
		n++
		name := fmt.Sprintf("e%d", n)
		start := time.Now()
		s.Apply(identity(name))
		for ids := range w {
			if slices.Contains(ids, "/"+name) {
				break
			}
		}
		took = append(took, time.Since(start))
		b.StopTimer()
		s.Delete("Identity", name)
		for ids := range w {
			if !slices.Contains(ids, "/"+name) {
				break
			}
		}
		b.StartTimer()
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
}

// BenchmarkDevRestart measures a restart on existing state until the agent serves.
func BenchmarkDevRestart(b *testing.B) {
	dir, err := os.MkdirTemp("", "signet")
	if err != nil {
		b.Fatal(err)
	}
	defer os.RemoveAll(dir)
	for b.Loop() {
		i, err := dev.Start(context.Background(), dev.Config{Dir: dir})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := i.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
