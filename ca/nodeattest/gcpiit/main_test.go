package gcpiit

import (
	"testing"

	"go.uber.org/goleak"
)

// No connection outlives the attestation that it was made for.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
