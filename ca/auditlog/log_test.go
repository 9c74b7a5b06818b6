package auditlog

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func openLog(t testing.TB, cfg Config) *Log {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = filepath.Join(t.TempDir(), "audit")
	}
	if cfg.Reserve == 0 {
		cfg.Reserve = 1 << 20
	}
	l, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("Close = %v", err)
		}
	})
	return l
}

func appendAll(t testing.TB, l *Log, records ...Record) {
	t.Helper()
	if err := l.Append(t.Context(), New, records...); err != nil {
		t.Fatal(err)
	}
}

func search1(t testing.TB, l *Log, f Filter) []Record {
	t.Helper()
	var got []Record
	if err := l.Search(t.Context(), f, func(r Record) error { got = append(got, r); return nil }); err != nil {
		t.Fatal(err)
	}
	return got
}

// checkLog is the invariant: the chain holds, and the numbers are 1 to n without gaps. It returns n.
func checkLog(t testing.TB, l *Log) uint64 {
	t.Helper()
	at, err := l.Verify(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if c := l.Checkpoint(); at != c {
		t.Errorf("verified up to %d %x, the checkpoint is %d %x", at.Seq, at.Chain[:4], c.Seq, c.Chain[:4])
	}
	next := uint64(1)
	for _, r := range search1(t, l, Filter{}) {
		if r.Seq != next {
			t.Fatalf("record %d follows record %d", r.Seq, next-1)
		}
		next++
	}
	return next - 1
}

func TestAppendThenSearch(t *testing.T) {
	at := time.Date(2026, 5, 1, 12, 0, 0, 123, time.UTC)
	l := openLog(t, Config{Now: func() time.Time { return at }})
	appendAll(t, l,
		Record{Event: "x509svid.issued", Actor: "spiffe://example.org/spire/agent/a", ActorKind: "agent", Subject: "spiffe://example.org/web", Outcome: "ok",
			Details: map[string]any{"serial": json.Number("12345678901234567890123"), "ttl": time.Hour, "ra_verified": true, "dns": []string{"a", "b"}}},
		Record{Event: "x509svid.refused", Actor: "spiffe://example.org/spire/agent/b", Outcome: "refused", Time: at.Add(time.Minute)})
	appendAll(t, l, Record{Event: "entry.created", Actor: "uid:0", ActorKind: "local", Outcome: "ok", Time: at.Add(time.Hour)})
	all := search1(t, l, Filter{})
	if len(all) != 3 || checkLog(t, l) != 3 {
		t.Fatalf("%d records, want 3", len(all))
	}
	first := all[0]
	if !first.Time.Equal(at) || first.Subject != "spiffe://example.org/web" || first.ActorKind != "agent" ||
		first.Details["serial"] != json.Number("12345678901234567890123") || first.Details["ttl"] != "1h0m0s" || first.Details["ra_verified"] != true ||
		fmt.Sprint(first.Details["dns"]) != "[a b]" {
		t.Errorf("the first record came back as %+v", first)
	}
	for _, tt := range []struct {
		name   string
		filter Filter
		want   string
	}{
		{"event", Filter{Event: "x509svid.issued"}, "1"},
		{"events by beginning", Filter{Event: "x509svid."}, "12"},
		{"not by beginning without a dot", Filter{Event: "x509svid"}, ""},
		{"actor", Filter{Actor: "uid:0"}, "3"},
		{"subject", Filter{Subject: "spiffe://example.org/web"}, "1"},
		{"outcome", Filter{Outcome: "refused"}, "2"},
		{"since", Filter{Since: at.Add(time.Minute)}, "23"},
		{"until", Filter{Until: at.Add(time.Minute)}, "1"},
		{"after", Filter{AfterSeq: 2}, "3"},
		{"all together", Filter{AfterSeq: 1, Event: "entry.", Outcome: "refused"}, ""},
	} {
		got := ""
		for _, r := range search1(t, l, tt.filter) {
			got += fmt.Sprint(r.Seq)
		}
		if got != tt.want {
			t.Errorf("%s: records %q, want %q", tt.name, got, tt.want)
		}
	}
	info, err := os.Stat(filepath.Join(l.cfg.Dir, fileName(1)))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
	}
}

func TestNothingInARecordMovesTheCursor(t *testing.T) {
	l := openLog(t, Config{})
	evil := "a\n{\"v\":1}\r\x1b[2J\x00\x7f\u0085\u2028\u202e\u200b\ufeff\U000e0001\xff\"\\é世"
	appendAll(t, l, Record{Event: evil, Actor: evil, ActorKind: evil, Subject: evil, Outcome: evil, Details: map[string]any{evil: evil, "list": []any{evil, errors.New(evil)}}})
	data, err := os.ReadFile(filepath.Join(l.cfg.Dir, fileName(1)))
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(data, []byte{'\n'}); n != 2 {
		t.Errorf("%d lines, want the header and one record", n)
	}
	for _, r := range string(data) {
		if r != '\n' && !unicode.IsPrint(r) {
			t.Errorf("the file has the character %U", r)
		}
	}
	got := search1(t, l, Filter{})
	want := strings.ToValidUTF8(evil, "\ufffd")
	if len(got) != 1 {
		t.Fatalf("%d records, want 1", len(got))
	}
	if got[0].Actor != want || got[0].Details[want] != want {
		t.Errorf("came back as %q, %q", got[0].Actor, got[0].Details)
	}
}

type opaque struct{ secret string }

func TestAppendRefuses(t *testing.T) {
	l := openLog(t, Config{})
	deep := map[string]any{}
	for range maxDepth {
		deep = map[string]any{"d": deep}
	}
	for _, tt := range []struct {
		name   string
		record Record
		want   error
	}{
		{"no event", Record{Actor: "a"}, ErrInvalid},
		{"a type that may hold anything", Record{Event: "e", Details: map[string]any{"k": opaque{"hunter2"}}}, ErrInvalid},
		{"bytes", Record{Event: "e", Details: map[string]any{"k": []byte("hunter2")}}, ErrInvalid},
		{"too deep", Record{Event: "e", Details: deep}, ErrInvalid},
		{"a number that is none", Record{Event: "e", Details: map[string]any{"k": json.Number(`1,"x":2`)}}, ErrInvalid},
		{"a year beyond RFC 3339", Record{Event: "e", Time: time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)}, ErrInvalid},
		{"too large", Record{Event: "e", Subject: strings.Repeat("x", MaxRecordBytes)}, ErrTooLarge},
	} {
		err := l.Append(t.Context(), New, Record{Event: "good"}, tt.record)
		if !errors.Is(err, tt.want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
	if err := l.Append(t.Context(), New, make([]Record, MaxAppend+1)...); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too many records: %v, want ErrTooLarge", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Append(ended, New, Record{Event: "e"}); !errors.Is(err, context.Canceled) {
		t.Errorf("an ended context: %v", err)
	}
	if n := checkLog(t, l); n != 0 {
		t.Errorf("%d records were written, want none", n)
	}
	if _, err := Open(Config{Dir: l.cfg.Dir}); !errors.Is(err, ErrLocked) {
		t.Errorf("a second Open = %v, want ErrLocked", err)
	}
}

func TestConcurrentAppendsAndFollowers(t *testing.T) {
	l := openLog(t, Config{MaxFileBytes: 20_000, Keep: -1})
	const workers, rounds, batch = 8, 20, 5
	total := uint64(workers * rounds * batch)
	done := errors.New("done")
	var wg sync.WaitGroup
	for range 3 {
		next := uint64(1)
		ready := make(chan struct{})
		wg.Go(func() {
			close(ready)
			err := l.Follow(t.Context(), Filter{}, func(r Record) error {
				if next == 1 {
					next = r.Seq // it may have begun a little later
				}
				if r.Seq != next {
					return fmt.Errorf("record %d, want %d", r.Seq, next)
				}
				if next++; r.Event == "last" {
					return done
				}
				return nil
			})
			if !errors.Is(err, done) {
				t.Errorf("Follow = %v at record %d", err, next)
			}
		})
		<-ready
	}
	var writers sync.WaitGroup
	for w := range workers {
		writers.Go(func() {
			for i := range rounds {
				var rs []Record
				for j := range batch {
					rs = append(rs, Record{Event: "e", Actor: fmt.Sprint(w), Subject: fmt.Sprint(i*batch + j)})
				}
				if err := l.Append(t.Context(), Class(i%2), rs...); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	last := map[string]int{}
	for _, r := range search1(t, l, Filter{}) {
		var n int
		fmt.Sscan(r.Subject, &n)
		if n != last[r.Actor] {
			t.Fatalf("worker %s: record %d where %d was expected", r.Actor, n, last[r.Actor])
		}
		last[r.Actor]++
	}
	// Whoever begins late and asks for the past gets it without a gap.
	seen := uint64(10)
	wg.Go(func() {
		err := l.Follow(t.Context(), Filter{AfterSeq: 10}, func(r Record) error {
			if seen++; r.Seq != seen {
				return fmt.Errorf("record %d, want %d", r.Seq, seen)
			}
			if r.Event == "last" {
				return done
			}
			return nil
		})
		if !errors.Is(err, done) {
			t.Errorf("Follow from record 10 = %v", err)
		}
	})
	appendAll(t, l, Record{Event: "last"})
	wg.Wait()
	if n := checkLog(t, l); n != total+1 {
		t.Errorf("%d records, want %d", n, total+1)
	}
	files, err := listFiles(l.cfg.Dir)
	if err != nil || len(files) < 3 {
		t.Errorf("files %v, %v; want several", files, err)
	}
}

func TestRotationKeepsTheChainAndDeletesTheOldest(t *testing.T) {
	l := openLog(t, Config{MaxFileBytes: 2000, Keep: 3})
	var known []Checkpoint
	for i := range 60 {
		appendAll(t, l, Record{Event: "e", Subject: strings.Repeat("s", 200), Details: map[string]any{"i": i}})
		known = append(known, l.Checkpoint())
	}
	files, err := listFiles(l.cfg.Dir)
	if err != nil || len(files) != 3 {
		t.Fatalf("files %v, %v; want 3", files, err)
	}
	newest, err := l.Verify(t.Context(), known[58], known[59])
	if err != nil || newest != known[59] {
		t.Errorf("Verify = %v, %v", newest, err)
	}
	if _, err := l.Verify(t.Context(), known[0]); !errors.Is(err, ErrMalformed) {
		t.Errorf("Verify against a checkpoint before the oldest file = %v, want an error", err)
	}
	if err := l.Follow(t.Context(), Filter{AfterSeq: 1}, func(Record) error { return nil }); !errors.Is(err, ErrLagged) {
		t.Errorf("Follow from a deleted record = %v, want ErrLagged", err)
	}
	// The old files have given back their reserve.
	for _, n := range files[:2] {
		if b := blocks(t, filepath.Join(l.cfg.Dir, fileName(n))); b > 64<<10 {
			t.Errorf("file %d takes %d bytes of the disk", n, b)
		}
	}
	if b := blocks(t, filepath.Join(l.cfg.Dir, fileName(files[2]))); b < 1<<20 {
		t.Errorf("the newest file takes %d bytes of the disk, want the reserve of 1 MiB", b)
	}
}

func TestFollowEndsWithTheLogAndTheContext(t *testing.T) {
	l := openLog(t, Config{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Follow(ctx, Filter{}, func(Record) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("Follow with an ended context = %v", err)
	}
	got := make(chan error, 1)
	go func() { got <- l.Follow(t.Context(), Filter{}, func(Record) error { return nil }) }()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-got; !errors.Is(err, ErrClosed) {
		t.Errorf("Follow of a closed log = %v, want ErrClosed", err)
	}
	if err := l.Append(t.Context(), New, Record{Event: "e"}); !errors.Is(err, ErrClosed) {
		t.Errorf("Append to a closed log = %v, want ErrClosed", err)
	}
}
