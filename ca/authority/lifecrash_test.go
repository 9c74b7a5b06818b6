package authority

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store/bolt"
)

// lifeDirVariable makes the test binary a child that rotates the authorities in that directory until it is killed.
const lifeDirVariable = "SIGNET_TEST_LIFE_DIR"

// rotateAsChild rotates both kinds for ever, and says so on stdout when it has begun.
func rotateAsChild(dir string) {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	ctx := context.Background()
	seal, err := keys.LoadOrCreateSealKey(filepath.Join(dir, crashSealKey))
	fail(err)
	st, err := bolt.Open(bolt.Config{Dir: filepath.Join(dir, "data"), Reserve: 4096, Log: slog.New(slog.DiscardHandler)})
	fail(err)
	s, err := Open(ctx, Config{TrustDomain: testTD, Store: st, Seal: seal, Log: slog.New(slog.DiscardHandler)})
	fail(err)
	revision, err := st.Barrier(ctx)
	fail(err)
	w, err := st.Watch(ctx, revision)
	fail(err)
	go func() {
		for {
			b, err := w.Next(ctx)
			fail(err)
			fail(s.Observe(b))
		}
	}()
	fmt.Println("rotating")
	for {
		for _, kind := range []Kind{KindX509, KindJWT} {
			fail(nextStep(ctx, s, kind))
		}
	}
}

// nextStep makes the next step of a rotation from wherever the last one was left.
func nextStep(ctx context.Context, s *Set, kind Kind) error {
	var err error
	step := func(f func(context.Context, Kind, string) (Step, error), id string) { _, err = f(ctx, kind, id) }
	for _, a := range s.Authorities(kind) {
		switch a.State {
		case StateTainted:
			step(s.Revoke, a.ID)
			return err
		case StateOld:
			step(s.Taint, a.ID)
			return err
		case StatePrepared:
			step(s.Activate, a.ID)
			return err
		}
	}
	_, err = s.Prepare(ctx, kind)
	return err
}

// TestKillInEveryStepOfARotation kills a process with SIGKILL while it rotates, again and again on the same store. What is
// left is the state of before or after a step: exactly one authority of each kind signs, what was published before its
// first use still is, and the next command works.
func TestKillInEveryStepOfARotation(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	seen := map[string]int{}
	var generations uint64
	for range 25 {
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), lifeDirVariable+"="+dir)
		var complaint bytes.Buffer
		child.Stderr = &complaint
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 16)); err != nil {
			t.Fatalf("the child said nothing: %v (%v) %s", err, child.Wait(), complaint.String())
		}
		<-time.After(time.Duration(random.Int64N(int64(40 * time.Millisecond))))
		_ = child.Process.Kill()
		_ = child.Wait()
		if complaint.Len() > 0 {
			t.Fatalf("the child could not go on: %s", complaint.String())
		}
		seal, err := keys.LoadOrCreateSealKey(filepath.Join(dir, crashSealKey))
		if err != nil {
			t.Fatal(err)
		}
		st, err := bolt.Open(bolt.Config{Dir: filepath.Join(dir, "data"), Reserve: 4096, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		s, err := Open(t.Context(), Config{TrustDomain: testTD, Store: st, Seal: seal, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatalf("after the kill: %v", err)
		}
		if err := s.Health(); err != nil {
			t.Errorf("nothing can be issued after the kill: %v", err)
		}
		for _, kind := range []Kind{KindX509, KindJWT} {
			active := 0
			for _, a := range s.Authorities(kind) {
				if a.State == StateActive {
					active++
				}
				if kind == KindX509 {
					generations = max(generations, a.Generation)
				}
			}
			if active != 1 {
				t.Errorf("%s: %d are active after the kill: %s", kind, active, stateNames(s, kind))
			}
			if all := s.Authorities(kind); len(all) > 0 {
				seen[string(kind)+" "+string(all[len(all)-1].State)]++
			}
		}
		if err := st.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d X.509 authorities were made; after the kills the newest ones were: %v", generations, seen)
	if generations < 3 || len(seen) < 3 {
		t.Error("the kills came too early to prove anything")
	}
}
