package docker

import (
	"fmt"
	"os"
	"slices"
	"testing"
)

func TestParseMap(t *testing.T) {
	for in, want := range map[string][]extent{
		"":                                   nil,
		"         0       1000          1\n": {{1000, 1}},
		"0 1000 1\n1 100000 65536\n":         {{1000, 1}, {100000, 65536}},
		"         0          0 4294967295\n": {{0, allIDs}},
		"0 1000\n":                           nil,
		"0 1000 1 1\n":                       nil,
		"0 -1 1\n":                           nil,
		"0 4294967296 1\n":                   nil,
		"0 1000 x\n":                         nil,
	} {
		got, err := parseMap([]byte(in))
		if !slices.Equal(got, want) || (err == nil) != (want != nil || in == "") {
			t.Errorf("parseMap(%q) = %v, %v; want %v", in, got, err, want)
		}
	}
}

// What is read is what was written, one extent for each line.
func FuzzParseMap(f *testing.F) {
	f.Add([]byte("0 1000 1\n1 100000 65536\n"))
	f.Add([]byte("         0          0 4294967295\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := parseMap(data)
		if err != nil {
			return
		}
		var text []byte
		for _, e := range got {
			text = fmt.Appendf(text, "%10d %10d %10d\n", 0, e.first, e.size)
		}
		again, err := parseMap(text)
		if err != nil || !slices.Equal(again, got) {
			t.Errorf("%q is read as %v, and that as %v, %v", data, got, again, err)
		}
	})
}

func TestNamespaceOfAUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("processes of other users need root")
	}
	own, none, roots := pin(t, play(t, "parent", as(alice))), pin(t, play(t, "wait", as(alice))), pin(t, play(t, "wait", nil))
	if err := inNamespaceOf(own, alice); err != nil {
		t.Errorf("in her own: %v", err)
	}
	if err := inNamespaceOf(own, mallory); err == nil {
		t.Error("hers is another's")
	}
	if err := inNamespaceOf(none, alice); err == nil {
		t.Error("a process without a user namespace of its own is in hers")
	}
	if err := inNamespaceOf(roots, 0); err == nil {
		t.Error("the first of all user namespaces is root's own")
	}
}
