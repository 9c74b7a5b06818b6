package auditlog

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-id/signet/internal/durable/faulttest"
)

// TestDiskFull: on a full disk new records are refused and essential ones go on, also after a restart, until the reserve
// is spent; with room again it fills up, and the log notices by itself.
func TestDiskFull(t *testing.T) {
	faulttest.InSmallDisk(t, 24<<20, func(dir string) {
		cfg := Config{Dir: filepath.Join(dir, "audit"), Reserve: 4 << 20, MaxFileBytes: 256 << 10}
		l, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { l.Close() }()
		record := Record{Event: "x509svid.issued", Subject: strings.Repeat("s", 1000)}
		appendAll(t, l, record)
		if err := l.Health(); err != nil {
			t.Fatalf("Health = %v at the beginning", err)
		}
		free := faulttest.FillDisk(t, dir)
		written := uint64(1)
		for ; ; written++ { // what was allocated beyond the reserve
			if err := l.Append(t.Context(), New, record); errors.Is(err, ErrDisk) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Health(); !errors.Is(err, ErrDisk) {
			t.Errorf("Health = %v, want ErrDisk", err)
		}
		const renewals = 1000
		for range renewals {
			if err := l.Append(t.Context(), Essential, record); err != nil {
				t.Fatal(err)
			}
		}
		written += renewals
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if l, err = Open(cfg); err != nil {
			t.Fatal(err)
		}
		if err := l.Append(t.Context(), New, record); !errors.Is(err, ErrDisk) {
			t.Errorf("a new record after a restart = %v, want ErrDisk", err)
		}
		spent := 0
		for ; ; spent++ {
			if err := l.Append(t.Context(), Essential, record); errors.Is(err, ErrDisk) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
		if spent < renewals {
			t.Errorf("%d essential records after a restart, want more than %d", spent, renewals)
		}
		written += uint64(spent)
		if n := checkLog(t, l); n != written {
			t.Errorf("%d records, want %d", n, written)
		}
		free()
		for deadline := time.After(10 * time.Second); l.Health() != nil; {
			select {
			case <-deadline:
				t.Fatalf("Health = %v although there is room", l.Health())
			case <-time.After(20 * time.Millisecond):
			}
		}
		appendAll(t, l, record)
		if n := checkLog(t, l); n != written+1 {
			t.Errorf("%d records, want %d", n, written+1)
		}
		if files, err := listFiles(cfg.Dir); err != nil || len(files) < 2 {
			t.Errorf("files %v, %v; want a new one now that there is room", files, err)
		}
	})
}

func TestFailedSyncStopsTheLog(t *testing.T) {
	dir := faulttest.Child()
	if dir == "" {
		dir = filepath.Join(t.TempDir(), "audit")
		if out, err := faulttest.Command(t, dir).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		l := openLog(t, Config{Dir: dir})
		if n := checkLog(t, l); n < 1 || n > 2 {
			t.Errorf("%d records after a restart, want the one that was acknowledged and perhaps the next", n)
		}
		return
	}
	l := openLog(t, Config{Dir: dir, Log: slog.New(slog.DiscardHandler)})
	appendAll(t, l, Record{Event: "before"})
	faulttest.FailSync(t)
	for range 2 {
		if err := l.Append(t.Context(), Essential, Record{Event: "e"}); !errors.Is(err, ErrBroken) {
			t.Errorf("Append = %v, want ErrBroken", err)
		}
	}
	if err := l.Health(); !errors.Is(err, ErrBroken) {
		t.Errorf("Health = %v, want ErrBroken", err)
	}
	if n := len(search1(t, l, Filter{})); n != 1 {
		t.Errorf("%d records, want the one that was acknowledged", n)
	}
}

// TestKilledAtRandomMoments kills a process that appends, and wants every acknowledged record back.
func TestKilledAtRandomMoments(t *testing.T) {
	const workers = 4
	if dir := faulttest.Child(); dir != "" {
		l := openLog(t, Config{Dir: dir, MaxFileBytes: 30_000, Keep: -1})
		next := map[string]int{}
		for _, r := range search1(t, l, Filter{}) {
			next[r.Actor]++
		}
		var out sync.Mutex
		var wg sync.WaitGroup
		for w := range workers {
			wg.Go(func() {
				for n := next[fmt.Sprint(w)]; ; n += 3 {
					var rs []Record
					for i := range 3 {
						rs = append(rs, Record{Event: "e", Actor: fmt.Sprint(w), Subject: fmt.Sprint(n + i)})
					}
					if err := l.Append(context.Background(), New, rs...); err != nil {
						t.Error(err)
						return
					}
					out.Lock()
					fmt.Println("acknowledged", w, n+3)
					out.Unlock()
				}
			})
		}
		wg.Wait()
		return
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	dir := filepath.Join(t.TempDir(), "audit")
	acked := make([]int, workers)
	for range 12 {
		killAfter(t, faulttest.Command(t, dir), 1+rnd.IntN(150), time.Duration(rnd.IntN(2000))*time.Microsecond, acked)
		l := openLog(t, Config{Dir: dir, Log: slog.New(slog.DiscardHandler)})
		checkLog(t, l)
		count := make([]int, workers)
		for _, r := range search1(t, l, Filter{}) {
			var w, n int
			fmt.Sscan(r.Actor, &w)
			fmt.Sscan(r.Subject, &n)
			if n != count[w] {
				t.Fatalf("worker %d: record %d where %d was expected", w, n, count[w])
			}
			count[w]++
		}
		for w := range workers {
			// A group that was under way may be there in part: it was not acknowledged.
			if count[w] < acked[w] || count[w] > acked[w]+3 {
				t.Fatalf("worker %d has %d records, %d were acknowledged and at most 3 more under way", w, count[w], acked[w])
			}
			acked[w] = count[w]
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("records by worker: %v", acked)
}

// killAfter kills cmd after it has printed so many lines that begin with acknowledged, and a little later.
func killAfter(t *testing.T, cmd *exec.Cmd, lines int, delay time.Duration, acked []int) {
	t.Helper()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var other []string
	for in := bufio.NewScanner(stdout); in.Scan(); {
		var w, n int
		if c, _ := fmt.Sscanf(in.Text(), "acknowledged %d %d", &w, &n); c != 2 {
			other = append(other, in.Text())
			continue
		}
		acked[w] = max(acked[w], n)
		if lines--; lines == 0 {
			time.AfterFunc(delay, func() { _ = cmd.Process.Kill() })
		}
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("the child ended with %v before it was killed:\n%s", err, strings.Join(other, "\n"))
	}
}

// FuzzRecord: what parses and is appended again parses as the same; and appending never makes more than one line.
func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"v":1,"seq":7,"time":"2026-05-01T12:00:00.000000123Z","event":"e","actor":"a","details":{"n":123456789012345678901,"l":[1,"x",null,true],"m":{"k":1e9}}}`))
	f.Add([]byte(`{"v":1,"seq":7,"TIME":"2026-05-01T12:00:00Z","event":"e"}`))
	f.Add([]byte(`{"v":2}`))
	f.Add([]byte("{\"v\":1,\"seq\":1,\"event\":\"\\ud800\\u202e\",\"time\":\"2026-05-01T12:00:00+23:59\"}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		r, err := parseRecord(text)
		if err != nil {
			if !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrNewerFormat) {
				t.Errorf("parseRecord = %v", err)
			}
			return
		}
		body, err := appendBody(nil, &r, time.Time{})
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("appendBody = %v", err)
			}
			return // deeper than we write
		}
		whole := append(appendHead(nil, r.Seq), body...)
		if strings.Count(string(whole), "\n") != 1 || strings.ContainsFunc(string(whole[:len(whole)-1]), func(r rune) bool { return r < 0x20 || r >= 0x7f && r < 0xa0 }) {
			t.Fatalf("appended as %q", whole)
		}
		if len(whole) > MaxRecordBytes {
			return
		}
		again, err := parseRecord(whole[:len(whole)-1])
		if err != nil || !again.Time.Equal(r.Time) || again.Event != r.Event || again.Seq != r.Seq || fmt.Sprint(again.Details) != fmt.Sprint(r.Details) {
			t.Errorf("%q became %q: %+v, %v; want %+v", text, whole, again, err, r)
		}
		if seq, ok := frame(whole[:len(whole)-1]); !ok || seq != r.Seq {
			t.Errorf("frame(%q) = %d, %t", whole, seq, ok)
		}
	})
}

// FuzzOpen opens files of any contents: what Open accepts, it goes on with, and what it does not know it keeps.
func FuzzOpen(f *testing.F) {
	h := string(header{File: 1, First: 1}.line())
	f.Add([]byte(h + `{"v":1,"seq":1,"time":"2026-05-01T12:00:00Z","event":"e"}` + "\n"))
	f.Add([]byte(h + `{"v":1,"seq":1,"time":"2026-05-01T12:00:00Z","event":"e"}` + "\n{\"v\":1,\"seq\":2,"))
	f.Add([]byte(h + h))
	f.Add([]byte("\n\n\n"))
	f.Add([]byte(`{"v":1,"seq":18446744073709551615,}` + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		path := filepath.Join(dir, fileName(1))
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := Open(Config{Dir: dir, Reserve: 1, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			if now, rerr := os.ReadFile(path); rerr != nil || string(now) != string(data) {
				t.Errorf("Open = %v, and the file was changed", err)
			}
			return
		}
		defer l.Close()
		before := l.Checkpoint()
		if err := l.Append(t.Context(), New, Record{Event: "after"}); err != nil {
			t.Fatal(err)
		}
		found := 0
		err = l.Search(t.Context(), Filter{Event: "after"}, func(r Record) error {
			if r.Seq == before.Seq+1 {
				found++
			}
			return nil
		})
		if found != 1 || err != nil && !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrNewerFormat) {
			t.Errorf("the record appended was found %d times, %v", found, err)
		}
	})
}

func benchRecord() Record {
	return Record{
		Event: "x509svid.issued", Actor: "spiffe://example.org/spire/agent/k8s_psat/prod/4b7e5c1a", ActorKind: "agent",
		Subject: "spiffe://example.org/ns/payments/sa/checkout", Outcome: "ok",
		Details: map[string]any{"serial": "1234567890123456789012345678", "entry_id": "2f8f3a0e-5a6f-4f0f-8d2e-0a1b2c3d4e5f", "not_after": time.Unix(1.8e9, 0), "authority_id": "a1b2c3d4e5f60718", "ra_verified": true},
	}
}

func BenchmarkEncode(b *testing.B) {
	r, now, buf := benchRecord(), time.Now(), []byte(nil)
	b.ReportAllocs()
	for b.Loop() {
		buf, _ = appendBody(buf[:0], &r, now)
	}
}

func BenchmarkAppend500(b *testing.B) {
	l := openLog(b, Config{})
	rs := make([]Record, 500)
	for i := range rs {
		rs[i] = benchRecord()
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := l.Append(b.Context(), Essential, rs...); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(rs)), "ns/record")
}
