package etcd_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/etcd"
	"github.com/signet-id/signet/ca/store/storetest"
	"github.com/signet-id/signet/internal/durable/faulttest"
	"github.com/signet-id/signet/test/etcdtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// prefixOf is a place in etcd for a directory of a test.
func prefixOf(dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return "/signet/" + hex.EncodeToString(sum[:8]) + "/"
}

func config(c *etcdtest.Cluster, dir string) etcd.Config {
	return etcd.Config{Endpoints: c.Endpoints(), Prefix: prefixOf(dir), Dir: dir, Log: slog.New(slog.DiscardHandler)}
}

func opened(t testing.TB, c etcd.Config) *etcd.Store {
	t.Helper()
	s, err := etcd.Open(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// closed is opened with a Close at the end of the test.
func closed(t testing.TB, c etcd.Config) *etcd.Store {
	t.Helper()
	s := opened(t, c)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close = %v", err)
		}
	})
	return s
}

func TestStoreContract(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{})
	storetest.Suite{
		Open: func(t testing.TB, dir string) store.Store { return opened(t, config(c, dir).WithBuffer(500)) },
		Forget: func(t testing.TB, s store.Store) {
			// More than the watcher keeps for its reader, and then etcd forgets too.
			es := s.(*etcd.Store)
			var rev store.Revision
			for i := 0; es.Overflows() == 0; i++ {
				var writes []store.Write
				for j := range store.MaxWrites {
					writes = append(writes, store.Write{Key: fmt.Sprintf("filler/%d", j), Value: []byte("v")})
				}
				var err error
				if rev, err = s.Commit(t.Context(), nil, writes); err != nil {
					t.Fatal(err)
				}
				if i > 1000 {
					t.Fatal("the watcher keeps everything")
				}
			}
			if err := es.Compact(t.Context(), rev); err != nil {
				t.Fatal(err)
			}
		},
	}.Run(t)
}

// endpointVariable tells the child of RunCrash where etcd is.
const endpointVariable = "SIGNET_ETCDTEST_ENDPOINT"

func TestKilledAtRandomMoments(t *testing.T) {
	if faulttest.Child() == "" {
		c := etcdtest.Start(t, etcdtest.Config{})
		t.Setenv(endpointVariable, c.Members[0].Endpoint)
	}
	storetest.RunCrash(t, func(t testing.TB, dir string) store.Store {
		return opened(t, etcd.Config{Endpoints: []string{os.Getenv(endpointVariable)}, Prefix: prefixOf(dir), Dir: dir, Log: slog.New(slog.DiscardHandler)})
	}, 6)
}
