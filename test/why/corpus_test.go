package why

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/signet-id/signet/internal/why"
)

// A setup is one thing that is broken.
type setup struct {
	name string
	// make says how the world begins; build breaks it and says what to ask about.
	make  maker
	build func(w *world) why.Target
	// want is the cause that must come first, and says what must be in its text or its commands.
	want why.Code
	says string
	root bool // it takes root to build
}

// TestCorpus builds every broken set-up and asks why. The named cause must be right in 95 of a hundred.
func TestCorpus(t *testing.T) {
	all := slices.Concat(selectorSetups, entrySetups, agentSetups, callerSetups, podSetups, templateSetups)
	if len(all) < 40 {
		t.Fatalf("the corpus has %d set-ups, and must have 40 at least", len(all))
	}
	names := map[string]bool{}
	var misses []string
	built := 0
	for _, s := range all {
		if names[s.name] {
			t.Fatalf("two set-ups are called %q", s.name)
		}
		names[s.name] = true
		t.Run(s.name, func(t *testing.T) {
			if s.root && os.Geteuid() != 0 {
				t.Skip("needs root, to be other users; CI runs as root")
			}
			w := newWorld(t, s.make)
			target := s.build(w)
			answer := w.ask(target)
			if t.Failed() {
				return
			}
			built++
			got := answer.Findings[0].Main()
			told := got.Text + "\n" + strings.Join(got.Fix, "\n")
			if got.Code != s.want || !strings.Contains(told, s.says) {
				miss := fmt.Sprintf("%s: want %s with %q, got", s.name, s.want, s.says)
				for _, c := range answer.Findings[0].Causes {
					miss += fmt.Sprintf("\n\t%s %s\n\t\t%s", c.Code, c.Text, strings.Join(c.Fix, "\n\t\t"))
				}
				misses = append(misses, miss)
				t.Log(miss)
			}
		})
	}
	t.Logf("%d set-ups of %d built, %d named right", built, len(all), built-len(misses))
	if built == 0 || len(misses)*20 > built {
		t.Errorf("the cause is wrong in %d of %d set-ups, and may be in one of twenty:\n%s", len(misses), built, strings.Join(misses, "\n"))
	}
}
