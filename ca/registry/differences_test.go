package registry

import (
	"slices"
	"testing"
)

// A plan has modes in the words of documents.
func TestModesInPlans(t *testing.T) {
	r := replica(t, newStore(t), newClock().now)
	apply(t, r, "kind: CallPolicy\nname: p\nservice: /web\nmode: shadow\nallow: [{from: [/api]}]\n---\nkind: PolicyDefaults\nmode: shadow\n")
	p := plan(t, r, "kind: CallPolicy\nname: p\nservice: /web\nmode: enforce\nallow: [{from: [/api]}]\n---\nkind: PolicyDefaults\nmode: deny\n")
	var got []string
	for _, ch := range p.Changes {
		got = append(got, ch.Differences...)
	}
	slices.Sort(got)
	if want := []string{"mode: shadow -> deny", "mode: shadow -> enforce"}; !slices.Equal(got, want) {
		t.Errorf("differences %q, want %q", got, want)
	}
}
