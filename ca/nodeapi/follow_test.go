package nodeapi

import (
	"testing"
	"time"
)

// TestWaveKeepsTheRate: however many SVIDs a tainted authority has signed, and however slow its successor's key store is, no
// more are asked for in a second than the operator has allowed.
func TestWaveKeepsTheRate(t *testing.T) {
	for _, tt := range []struct {
		svids, rate int
		want        time.Duration
	}{
		{0, 1000, minReissue},
		{3_000, 1000, 3 * time.Second},
		{3_001, 1000, 4 * time.Second},
		{40_000, 10, 4000 * time.Second}, // as an HSM
		{1_000_000, 1000, 1000 * time.Second},
		{1 << 40, 1, maxReissue},
	} {
		if got := waveOf(tt.svids, tt.rate); got != tt.want {
			t.Errorf("%d SVIDs at %d a second take %v, want %v", tt.svids, tt.rate, got, tt.want)
		}
	}
}
