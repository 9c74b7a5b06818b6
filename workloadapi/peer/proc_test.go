package peer

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// statOf is /proc/PID/stat of a program with that name and start time.
func statOf(name string, start uint64) []byte {
	return []byte(fmt.Sprintf("77 (%s) S 1 77 77 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 %d 2703360 200 18446744073709551615\n", name, start))
}

func TestParseStartTime(t *testing.T) {
	for _, name := range []string{"web", "a b", ") S 1", "((", "))", ") S 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 666 ", "\n", ""} {
		if got, err := parseStartTime(statOf(name, 4711)); err != nil || got != 4711 {
			t.Errorf("a program named %q: start time %d, %v", name, got, err)
		}
	}
	for _, bad := range []string{"", "77 web S 1", "77 (web)", "77 (web) S 1 2 3", "77 (web) " + strings.Repeat("x ", 30), "77 (web) " + strings.Repeat("-1 ", 30)} {
		if got, err := parseStartTime([]byte(bad)); err == nil {
			t.Errorf("parseStartTime(%q) = %d, want an error", bad, got)
		}
	}
}

func FuzzParseStartTime(f *testing.F) {
	f.Add("web", uint64(1))
	f.Add(") S 1 (", uint64(1<<63))
	f.Fuzz(func(t *testing.T, name string, start uint64) {
		if got, err := parseStartTime(statOf(name, start)); err != nil || got != start {
			t.Errorf("the name %q makes the start time %d to %d, %v", name, start, got, err)
		}
	})
}

const aStatus = "Name:\tweb\nUmask:\t0022\nState:\tS (sleeping)\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nFDSize:\t64\nGroups:\t9 27 9 \nNStgid:\t1\n"

func TestParseStatus(t *testing.T) {
	var s Snapshot
	if err := parseStatus([]byte(aStatus), &s); err != nil {
		t.Fatal(err)
	}
	want := Snapshot{RealUID: 1, EffectiveUID: 2, SavedUID: 3, RealGID: 5, EffectiveGID: 6, SavedGID: 7, Groups: []uint32{9, 27}}
	if !s.Equal(want) {
		t.Errorf("got %+v, want %+v", s, want)
	}
	for name, bad := range map[string]string{
		"empty":              "",
		"a second Uid line":  aStatus + "Uid:\t0\t0\t0\t0\n",
		"a name with a line": strings.Replace(aStatus, "web", "web\nUid:\t0\t0\t0\t0", 1), // which the kernel escapes
		"three ids":          strings.Replace(aStatus, "1\t2\t3\t4", "1\t2\t3", 1),
		"no Groups":          strings.Replace(aStatus, "Groups", "Grups", 1),
		"negative":           strings.Replace(aStatus, "1\t2\t3\t4", "-1\t2\t3\t4", 1),
		"too large":          strings.Replace(aStatus, "1\t2\t3\t4", "4294967296\t2\t3\t4", 1),
		"bad group":          strings.Replace(aStatus, "9 27", "9 x", 1),
	} {
		if err := parseStatus([]byte(bad), new(Snapshot)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzParseStatus(f *testing.F) {
	f.Add([]byte(aStatus))
	f.Add([]byte("Uid:\nGid:\nGroups:\n"))
	f.Fuzz(func(t *testing.T, status []byte) {
		var s Snapshot
		if parseStatus(status, &s) != nil {
			return
		}
		// What is accepted says each thing once, and whatever else stands there changes nothing.
		for _, name := range []string{"Uid:", "Gid:", "Groups:"} {
			n := 0
			for line := range bytes.Lines(status) {
				if bytes.HasPrefix(line, []byte(name)) {
					n++
				}
			}
			if n != 1 {
				t.Errorf("a status with %d lines %s is accepted", n, name)
			}
		}
		if !slices.IsSorted(s.Groups) {
			t.Errorf("groups %v", s.Groups)
		}
	})
}
