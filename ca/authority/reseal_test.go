package authority

import (
	"testing"
)

// TestResealReachesEveryKind: whoever changes the seal key has no key of any kind left under the previous one, which is about
// to be destroyed. WIT authorities stay sealed also while WIT-SVIDs are switched off.
func TestResealReachesEveryKind(t *testing.T) {
	s := living(t, withWIT)
	for _, kind := range s.Kinds() {
		must(t)(s.Prepare(t.Context(), kind))
	}
	again := s.config
	again.Seal = testSealKey(t)
	const sealed = 6 // of each kind the active one and the prepared one
	for round, want := range []int{sealed, 0} {
		n, err := Reseal(t.Context(), again.Store, testTD, s.config.Seal, again.Seal)
		if err != nil || n != want {
			t.Fatalf("round %d sealed %d records anew, %v; want %d", round, n, err, want)
		}
	}
	for _, enabled := range []bool{true, false} {
		again.WIT.Enabled = enabled
		if _, err := Open(t.Context(), again); err != nil {
			t.Errorf("with the new seal key alone, WIT-SVIDs enabled %t: %v", enabled, err)
		}
	}
}
