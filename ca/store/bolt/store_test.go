package bolt_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/bolt"
	"github.com/signet-id/signet/ca/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t testing.TB, dir string) store.Store {
	t.Helper()
	s, err := bolt.Open(bolt.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStoreContract(t *testing.T) { storetest.Run(t, open) }

func TestKilledAtRandomMoments(t *testing.T) { storetest.RunCrash(t, open, 12) }

func TestDiskFull(t *testing.T) {
	storetest.RunDiskFull(t, func(t testing.TB, dir string) store.Store {
		s, err := bolt.Open(bolt.Config{Dir: dir, Reserve: 4 << 20})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}, 32<<20, 2000)
}
