package observations

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/durable/faulttest"
	"github.com/signet-id/signet/internal/tally"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const node = "spiffe://example.org/spire/agent/a"

func open(t *testing.T, dir string, change ...func(*Config)) *Observations {
	t.Helper()
	c := Config{Dir: dir, Keep: 24 * time.Hour, MaxRecords: 10_000, Now: time.Now, Log: slog.New(slog.DiscardHandler)}
	for _, f := range change {
		f(&c)
	}
	o, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func single(id string) *policyv1.Observation {
	now := time.Now().UnixNano()
	return &policyv1.Observation{DecisionId: id, Count: 1, First: now, Last: now, Service: "spiffe://example.org/db", Peer: "spiffe://example.org/web", Reason: "no_allow",
		Protocol: policyv1.CallProtocol_CALL_PROTOCOL_HTTP, Method: "POST", Path: "/a"}
}

func calls(path string, n uint64) *policyv1.Observation {
	o := single("")
	o.Count, o.Allowed, o.Reason, o.Path = n, true, "allowed", path
	return o
}

func all(int) bool { return true }

func add(t *testing.T, o *Observations, observed ...*policyv1.Observation) {
	t.Helper()
	if err := o.Add(node, observed, all, 0); err != nil {
		t.Fatal(err)
	}
}

// ended runs o and lets it write what is left.
func ended(o *Observations) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	o.Run(ctx)
}

func sum(o *Observations) (n uint64) {
	for _, one := range o.List(tally.Filter{}) {
		n += one.GetCount()
	}
	return n
}

func names(t *testing.T, dir string) (out []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// TestRestart: what was reported is there after restarts, counts are added up and not doubled, and the files are private.
func TestRestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "observations")
	for run := range 3 {
		o := open(t, dir)
		add(t, o, single(fmt.Sprint("RUN", run)), calls("/a", 3))
		ended(o)
	}
	o := open(t, dir)
	defer ended(o)
	for run := range 3 {
		if one := o.Decision(fmt.Sprint("RUN", run)); one == nil || one.GetAgentId() != node {
			t.Errorf("decision of run %d: %v", run, one)
		}
	}
	if n := sum(o); n != 3+9 {
		t.Errorf("%d decisions, want 12", n)
	}
	for _, name := range names(t, dir) {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
}

// TestAdd: what is about others or malformed is left out and counted, and the node is who the CA says.
func TestAdd(t *testing.T) {
	var seen []*policyv1.Observation
	o := open(t, t.TempDir(), func(c *Config) { c.Observed = func(one *policyv1.Observation) { seen = append(seen, one) } })
	defer ended(o)
	lie, malformed := single("LIE"), single("BAD")
	lie.AgentId = "spiffe://example.org/spire/agent/other"
	malformed.Path = strings.Repeat("x", 1000)
	err := o.Add(node, []*policyv1.Observation{single("NOTMINE"), lie, malformed, nil, calls("/", 5)}, func(i int) bool { return i > 0 }, 7)
	if err != nil || o.Decision("NOTMINE") != nil || o.Decision("BAD") != nil || o.Decision("LIE").GetAgentId() != node {
		t.Errorf("%v, %v", err, o.List(tally.Filter{}))
	}
	if s := o.Stats(); s.Accepted != 6 || s.Refused != 3 || s.Dropped != 7 || len(seen) != 2 {
		t.Errorf("%+v, %d told", s, len(seen))
	}
	future := single("FUTURE")
	future.First, future.Last = future.First+int64(time.Hour), future.Last+int64(time.Hour)
	add(t, o, future)
	if one := o.Decision("FUTURE"); one.GetLast() > time.Now().UnixNano() {
		t.Errorf("an observation of the future is kept: %v", one)
	}
}

// TestBusy: too much from all agents together is refused with a time, and nothing of it is taken.
func TestBusy(t *testing.T) {
	o := open(t, t.TempDir())
	defer ended(o)
	if !o.limit.AllowN(time.Now(), burst) { // what all agents together may report at once
		t.Fatal("there is no room to begin with")
	}
	many := make([]*policyv1.Observation, 0, burst)
	for range burst {
		many = append(many, nil)
	}
	busy, ok := errors.AsType[*BusyError](o.Add(node, many, all, 3))
	if s := o.Stats(); !ok || busy.RetryAfter <= 0 || s.Accepted+s.Refused+s.Dropped != 0 {
		t.Errorf("%v, %+v", busy, s)
	}
}

// write makes a file with these records and returns its path.
func write(t *testing.T, dir string, number uint64, observed ...*policyv1.Observation) string {
	t.Helper()
	b := append([]byte(magic), formatVersion)
	for _, one := range observed {
		b = appendRecord(b, one)
	}
	path := filepath.Join(dir, fileName(number))
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestCutAndFlipped cuts a file at every byte and flips each: the records before are kept, a file that is only cut off stays, one
// that is damaged is set aside, and the CA goes on.
func TestCutAndFlipped(t *testing.T) {
	whole, err := os.ReadFile(write(t, t.TempDir(), 1, single("A"), single("B"), single("C")))
	if err != nil {
		t.Fatal(err)
	}
	try := func(what string, content []byte) (set map[string]bool, aside bool) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, fileName(1)), content, 0o600); err != nil {
			t.Fatal(err)
		}
		o := open(t, dir)
		add(t, o, single("NEW"))
		ended(o)
		o = open(t, dir)
		defer ended(o)
		if o.Decision("NEW") == nil {
			t.Fatalf("%s: what was reported after it is lost", what)
		}
		set = map[string]bool{}
		for _, id := range []string{"A", "B", "C"} {
			set[id] = o.Decision(id) != nil
		}
		for _, name := range names(t, dir) {
			aside = aside || strings.HasSuffix(name, damagedSuffix)
		}
		return set, aside
	}
	size := (len(whole) - len(magic) - 1) / 3
	for n := range len(whole) {
		set, aside := try(fmt.Sprintf("cut at %d", n), whole[:n])
		records := max(0, n-len(magic)-1) / size
		if aside || set["A"] != (records > 0) || set["B"] != (records > 1) || set["C"] {
			t.Fatalf("cut at %d of %d: %v, set aside %t", n, len(whole), set, aside)
		}
	}
	for n := range len(whole) {
		if n == len(magic) {
			continue // the version: see TestNewerFormat
		}
		flipped := bytes.Clone(whole)
		flipped[n] ^= 1
		at := max(0, n-len(magic)-1) / size // the record that is hit
		set, aside := try(fmt.Sprintf("flipped at %d", n), flipped)
		header := n <= len(magic)
		switch {
		case header && (!aside || set["A"]), !header && at > 0 && !set["A"], !header && at > 1 && !set["B"]:
			t.Fatalf("flipped at %d (record %d): %v, set aside %t", n, at, set, aside)
		case !header && at == 0 && set["A"], !header && at == 2 && set["C"]:
			t.Fatalf("flipped at %d (record %d): a record that was changed is taken", n, at)
		}
	}
}

// TestNewerFormat: files of a newer version are left alone, and nothing is written beside them.
func TestNewerFormat(t *testing.T) {
	dir := t.TempDir()
	path := write(t, dir, 1, single("A"))
	b, _ := os.ReadFile(path)
	b[len(magic)]++
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	o, err := Open(Config{Dir: dir, Keep: time.Hour, MaxRecords: 100, Now: time.Now, Log: slog.New(slog.DiscardHandler)})
	if o == nil || !errors.Is(err, errNewer) || o.Trouble() == nil {
		t.Fatalf("got %v", err)
	}
	add(t, o, single("B"))
	ended(o)
	if after, _ := os.ReadFile(path); !bytes.Equal(after, b) || len(names(t, dir)) != 1 {
		t.Errorf("the directory was touched: %v", names(t, dir))
	}
	if o.Decision("B") == nil || o.Stats().Unsaved != 1 {
		t.Errorf("kept in memory: %v, %+v", o.Decision("B"), o.Stats())
	}
}

// TestNoDirectory: that observations cannot be kept is no reason to fail.
func TestNoDirectory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	o, err := Open(Config{Dir: file, Keep: time.Hour, MaxRecords: 100, Now: time.Now, Log: slog.New(slog.DiscardHandler)})
	if o == nil || err == nil {
		t.Fatalf("got %v, %v", o, err)
	}
	add(t, o, single("A"))
	ended(o)
	if o.Decision("A") == nil {
		t.Error("it is not kept in memory")
	}
}

// TestCompaction: the files stay within bounds however much comes, and a crash in the middle of a compaction loses nothing.
func TestCompaction(t *testing.T) {
	dir := t.TempDir()
	o := open(t, dir, func(c *Config) { c.MaxRecords = 1000 })
	for i := range 60 {
		for j := range 1000 {
			one := single(fmt.Sprint("D", i, "X", j))
			one.Path = "/" + strings.Repeat("x", 250)
			o.kept.Add(one)
		}
		o.save(true)
		o.note(o.files.compact(o.kept))
		if n := o.Stats().Bytes; n > 2*compactBytes {
			t.Fatalf("the files have %d bytes", n)
		}
	}
	if err := o.Trouble(); err != nil {
		t.Fatal(err)
	}
	if n := len(names(t, dir)); n > 3 {
		t.Errorf("%d files: %v", n, names(t, dir))
	}
	want := o.Decision("D59X999")
	ended(o)
	if err := os.WriteFile(filepath.Join(dir, fileName(99)+tempSuffix), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	again := open(t, dir, func(c *Config) { c.MaxRecords = 1000 })
	defer ended(again)
	if got := again.Decision("D59X999"); want == nil || !proto.Equal(got, want) || again.kept.Len() > 1000 {
		t.Errorf("after a restart: %v, %d records", got, again.kept.Len())
	}
	if _, err := os.Stat(filepath.Join(dir, fileName(99)+tempSuffix)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what a crash left behind: %v", err)
	}
}

// TestDiskFull: on a full disk nothing is written, nothing is waited for, what is reported is kept in memory, the last tenth of the disk
// stays free, and when there is room again all of it comes to the disk.
func TestDiskFull(t *testing.T) {
	faulttest.InSmallDisk(t, 16<<20, func(disk string) {
		dir := filepath.Join(disk, "observations")
		o := open(t, dir)
		add(t, o, single("BEFORE"))
		o.save(true)
		if err := o.Trouble(); err != nil {
			t.Fatal(err)
		}
		free := faulttest.FillDisk(t, disk)
		add(t, o, single("FULL"))
		o.save(true)
		if o.Trouble() == nil || o.Stats().Unsaved != 1 || o.Decision("FULL") == nil {
			t.Errorf("on a full disk: %v, %+v", o.Trouble(), o.Stats())
		}
		free()
		// Whatever comes, there is room left for others.
		for i := range 60 {
			for j := range 1000 {
				one := single(fmt.Sprint("D", i, "X", j))
				one.Path = "/" + strings.Repeat("x", 250)
				o.kept.Add(one)
			}
			o.save(true)
		}
		var st syscall.Statfs_t
		if err := syscall.Statfs(disk, &st); err != nil || st.Bavail*uint64(st.Bsize) < 1<<20 {
			t.Errorf("%d bytes are left, %v", st.Bavail*uint64(st.Bsize), err)
		}
		if o.Trouble() == nil {
			t.Error("the disk is nearly full, and that is not told")
		}
		ended(o)
		again := open(t, dir)
		defer ended(again)
		if again.Decision("BEFORE") == nil && again.kept.Len() == 0 {
			t.Error("nothing is left after a restart")
		}
	})
}

// TestKilled kills a process that writes, again and again: each start reads what was synced before, and never sees a damaged file.
func TestKilled(t *testing.T) {
	if dir := faulttest.Child(); dir != "" {
		o := open(t, dir)
		start := o.kept.Len()
		for i := 0; ; i++ {
			one := single(fmt.Sprint("P", os.Getpid(), "N", i))
			one.Path = "/" + strings.Repeat("x", i%250)
			o.kept.Add(one)
			o.save(true)
			if i%50 == 49 {
				o.files.untidy = true // compact all the time
			}
			o.note(o.files.compact(o.kept))
			if err := o.Trouble(); err != nil {
				t.Fatal(err)
			}
			fmt.Printf("synced %d %d\n", start, i+1)
		}
	}
	dir, before := t.TempDir(), 0
	for round := range 6 {
		cmd := faulttest.Command(t, dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines, wrote := bufio.NewScanner(out), 0
		for want := 30 + 61*round; wrote < want && lines.Scan(); {
			var start, n int
			if k, _ := fmt.Sscanf(lines.Text(), "synced %d %d", &start, &n); k == 2 {
				if wrote = n; start < before {
					t.Errorf("round %d starts with %d records, and %d were synced", round, start, before)
				}
			}
		}
		if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // it was killed
		if before += wrote; wrote == 0 {
			t.Fatal("the child wrote nothing")
		}
	}
	o := open(t, dir)
	defer ended(o)
	if o.kept.Len() < before {
		t.Errorf("%d records, and %d were synced", o.kept.Len(), before)
	}
	for _, name := range names(t, dir) {
		if strings.HasSuffix(name, damagedSuffix) {
			t.Errorf("a kill left the damaged file %s", name)
		}
	}
}

// FuzzReadRecords: whatever a file holds, reading ends, and what is taken of it is what was written.
func FuzzReadRecords(f *testing.F) {
	b := append([]byte(magic), formatVersion)
	b = appendRecord(appendRecord(b, single("A")), calls("/", 4))
	f.Add(b)
	f.Add(b[:len(b)-3])
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		again := append([]byte(magic), formatVersion)
		n := 0
		err := readRecords(bufio.NewReader(bytes.NewReader(b)), func(one *policyv1.Observation) {
			n++
			again = appendRecord(again, one)
		})
		if err == nil && len(b) < len(again) && n == 0 {
			t.Fatalf("%d bytes are a whole file", len(b))
		}
		m := 0
		if err := readRecords(bufio.NewReader(bytes.NewReader(again)), func(*policyv1.Observation) { m++ }); err != nil || m > n {
			t.Fatalf("what was read cannot be read again: %d, %d, %v", n, m, err)
		}
	})
}
