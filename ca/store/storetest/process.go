package storetest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/durable/faulttest"
)

const (
	crashWorkers = 6
	ackMark      = "acknowledged"
)

// RunCrash kills a process that commits, again and again, and checks after each time that everything it was told was
// committed is there, and that nothing else is there in part.
func RunCrash(t *testing.T, open Open, rounds int) {
	if dir := faulttest.Child(); dir != "" {
		commitUntilKilled(t, open(t, dir))
		return
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	acked := make([]int, crashWorkers)
	for round := range rounds {
		kills := 1 + rnd.IntN(200)
		delay := time.Duration(rnd.IntN(3000)) * time.Microsecond
		killAfter(t, dir, kills, delay, acked)
		s := open(t, dir)
		checkCrashed(t, s, acked)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			t.Fatalf("round %d: killed %v after %d acknowledged commits", round, delay, kills)
		}
	}
	t.Logf("acknowledged commits by worker: %v", acked)
}

// commitUntilKilled is the child. Each commit of worker i sets two keys to n, adds item n and removes item n-20.
func commitUntilKilled(t *testing.T, s store.Store) {
	var out sync.Mutex
	var wg sync.WaitGroup
	for i := range crashWorkers {
		it, err := s.Get(t.Context(), fmt.Sprintf("pair/%d/a", i))
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			t.Fatal(err)
		}
		n, _ := strconv.Atoi(string(it.Value))
		wg.Go(func() {
			for {
				n++
				v := strconv.Itoa(n)
				_, err := s.Commit(context.Background(), nil, []store.Write{
					set(fmt.Sprintf("pair/%d/a", i), v),
					set(fmt.Sprintf("pair/%d/b", i), v),
					set(fmt.Sprintf("item/%d/%d", i, n), strings.Repeat(v+" ", 1+n*37%700)),
					del(fmt.Sprintf("item/%d/%d", i, n-20)),
				})
				if err != nil {
					t.Error(err)
					return
				}
				out.Lock()
				fmt.Println(ackMark, i, n)
				out.Unlock()
			}
		})
	}
	wg.Wait()
}

// killAfter runs the child and kills it when it has acknowledged so many commits and a little later. It raises acked.
func killAfter(t *testing.T, dir string, commits int, delay time.Duration, acked []int) {
	t.Helper()
	cmd := faulttest.Command(t, dir)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var other []string
	lines := bufio.NewScanner(stdout)
	for seen := 0; lines.Scan(); {
		var i, n int
		if c, _ := fmt.Sscanf(lines.Text(), ackMark+" %d %d", &i, &n); c != 2 {
			other = append(other, lines.Text())
			continue
		}
		acked[i] = max(acked[i], n)
		if seen++; seen == commits {
			// From here on it is killed at a random moment, while its answers are still read.
			time.AfterFunc(delay, func() { _ = cmd.Process.Kill() })
		}
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("the child ended with %v before it was killed:\n%s", err, strings.Join(other, "\n"))
	}
}

func checkCrashed(t *testing.T, s store.Store, acked []int) {
	t.Helper()
	items, rev := all(t, s, "", 0)
	if err := paired(items); err != nil {
		t.Error(err)
	}
	values := map[string]store.Item{}
	for _, it := range items {
		if it.Modified > rev {
			t.Errorf("key %q is from revision %d, the store is at %d", it.Key, it.Modified, rev)
		}
		values[it.Key] = it
	}
	want := 0
	for i := range acked {
		n, _ := strconv.Atoi(string(values[fmt.Sprintf("pair/%d/a", i)].Value))
		if n < acked[i] || n > acked[i]+1 {
			t.Errorf("worker %d is at %d, acknowledged were %d and at most one more was under way", i, n, acked[i])
		}
		acked[i] = n
		for j := max(1, n-19); j <= n; j++ {
			v := strconv.Itoa(j)
			if it := values[fmt.Sprintf("item/%d/%d", i, j)]; string(it.Value) != strings.Repeat(v+" ", 1+j*37%700) {
				t.Errorf("item %d of worker %d has %d bytes", j, i, len(it.Value))
			}
			want++
		}
		if n > 0 {
			want += 2
		}
	}
	if len(items) != want {
		t.Errorf("the store has %d items, want %d", len(items), want)
	}
}

// RunDiskFull checks what a store promises of a full disk of size bytes: ordinary commits are refused and change nothing,
// those under store.WithReserve go on for at least renewals of them, a restart changes nothing about that, and when there
// is room again everything goes on.
func RunDiskFull(t *testing.T, open Open, size int64, renewals int) {
	faulttest.InSmallDisk(t, size, func(dir string) {
		data := filepath.Join(dir, "data")
		if err := os.Mkdir(data, 0o700); err != nil {
			t.Fatal(err)
		}
		s := open(t, data)
		defer func() { s.Close() }()
		for i := range 200 {
			commit(t, s, set(fmt.Sprintf("agent/%d", i), "0"))
		}
		free := faulttest.FillDisk(t, dir)
		full := fillStore(t, s)
		renew := func(i int) error {
			_, err := s.Commit(store.WithReserve(t.Context()), nil, []store.Write{set(fmt.Sprintf("agent/%d", i%200), strconv.Itoa(i))})
			return err
		}
		for i := range renewals {
			if err := renew(i); err != nil {
				t.Fatalf("renewal %d on a full disk: %v", i, err)
			}
		}
		if _, err := s.Commit(t.Context(), nil, []store.Write{set("new", strings.Repeat("x", 10_000))}); !errors.Is(err, store.ErrDiskFull) {
			t.Errorf("an ordinary commit while the disk is full = %v, want ErrDiskFull", err)
		}
		if err := s.Close(); err != nil {
			t.Errorf("Close on a full disk = %v", err)
		}
		s = open(t, data)
		if items, _ := all(t, s, "fill/", 0); len(items) != full {
			t.Errorf("after reopening %d ordinary items, want the %d acknowledged", len(items), full)
		}
		for i := range renewals {
			if err := renew(i); err != nil {
				t.Fatalf("renewal %d on a full disk after a restart: %v", i, err)
			}
		}
		// Until the reserve is spent, too.
		last := 0
		for {
			_, err := s.Commit(store.WithReserve(t.Context()), nil, []store.Write{set(fmt.Sprintf("grow/%d", last), strings.Repeat("x", 100_000))})
			if errors.Is(err, store.ErrDiskFull) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			last++
		}
		if items, _ := all(t, s, "grow/", 0); len(items) != last || last == 0 {
			t.Errorf("%d items from the reserve, want the %d acknowledged", len(items), last)
		}
		free()
		commit(t, s, set("new", strings.Repeat("x", 1000)))
		if err := renew(1); err != nil {
			t.Error(err)
		}
	})
}

// fillStore commits until the disk is full and returns how many commits were acknowledged.
func fillStore(t *testing.T, s store.Store) int {
	t.Helper()
	for n := 0; ; n++ {
		_, err := s.Commit(t.Context(), nil, []store.Write{set(fmt.Sprintf("fill/%d", n), strings.Repeat("x", 10_000))})
		if errors.Is(err, store.ErrDiskFull) {
			if _, err := s.Get(t.Context(), fmt.Sprintf("fill/%d", n)); !errors.Is(err, store.ErrNotFound) {
				t.Errorf("Get of what did not fit = %v, want ErrNotFound", err)
			}
			if items, _ := all(t, s, "fill/", 0); len(items) != n {
				t.Errorf("%d items, want the %d acknowledged", len(items), n)
			}
			return n
		}
		if err != nil {
			t.Fatalf("on a full disk Commit = %v, want ErrDiskFull", err)
		}
	}
}
