package spiffe

import (
	"slices"
	"strings"
	"testing"
)

func TestEveryFaultOfAnIDIsFound(t *testing.T) {
	for _, tt := range []struct {
		id   string
		want []string
	}{
		{"spiffe://example.org/web", nil},
		{"spiffe://Example.org/a//b", []string{"ID-07", "ID-14"}},
		{"SPIFFE://Example.org/a/", []string{"DEC-01", "ID-07", "ID-16"}},
		{"spiffe://u@exa%6dple.org:443/a/../b%20 c?x#y", []string{"ID-03", "ID-05", "ID-06", "ID-09", "ID-13", "ID-15", "ID-17"}},
		{"https://example.org/web", []string{"ID-01"}},
		{"spiffe:///./", []string{"ID-02", "ID-15", "ID-16"}},
		{"spiffe://" + strings.Repeat("A", 256) + "/" + strings.Repeat("a", 2048), []string{"DEC-02", "ID-07", "ID-11"}},
	} {
		var got []string
		for _, err := range idFaults(tt.id) {
			got = append(got, innermostRow(err))
		}
		slices.Sort(got)
		if !slices.Equal(got, tt.want) {
			t.Errorf("idFaults(%q) = %v, want %v", excerpt(tt.id), got, tt.want)
		}
	}
}

// FuzzIDFaults: there is a fault if and only if the ID does not parse, and the search ends.
func FuzzIDFaults(f *testing.F) {
	f.Add("spiffe://Example.org/a//b?x")
	f.Add("spiffe://[::1]:1/%61/../~/")
	f.Fuzz(func(t *testing.T, s string) {
		_, err := ParseID(s)
		if faults := idFaults(s); (err != nil) != (len(faults) > 0) || err != nil && faults[0].Error() != err.Error() {
			t.Errorf("idFaults(%q) = %v, ParseID says %v", s, faults, err)
		}
	})
}
