package registry

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/strictyaml"
)

func revoke(t testing.TB, r *Registry, name, target string) {
	t.Helper()
	docs, err := strictyaml.Split(fmt.Appendf(nil, "kind: Revocation\nname: %s\n%s\n", name, target), "test.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	p, err := r.Plan(docs, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
}

func unrevoke(t testing.TB, r *Registry, name string) {
	t.Helper()
	p, err := r.PlanDelete(KindRevocation, name, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
}

// TestRevocationHistory: whatever comes and goes, in whatever order an agent reads, leaves and comes back at an earlier
// revision, it holds in the end exactly what is revoked; also if it missed more than is remembered.
func TestRevocationHistory(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	r := open(t)
	r.mu.Lock()
	r.ix.revocations.remember = 8
	r.mu.Unlock()
	agent := spiffeid.RequireFromString("spiffe://example.org/spire/agent/test/one")
	holds := map[store.Revision]map[string]int64{} // by revision: what the agent held then
	held, at, shots := map[string]int64{}, store.Revision(0), 0
	f := r.Follow(agent, 0, true)
	read := func() {
		d := f.Next(true)
		if d.Snapshot {
			held = map[string]int64{}
			shots++
		} else if d.From != at {
			t.Fatalf("a difference from %d to an agent at %d", d.From, at)
		}
		for _, it := range d.Revocations {
			held[it.Name] = it.Revision
		}
		for _, n := range d.RemovedRevocations {
			delete(held, n)
		}
		at = d.To
		holds[at] = maps.Clone(held)
		want := map[string]int64{}
		items, _ := r.RevokedItems()
		for _, it := range items {
			want[it.Name] = it.Revision
		}
		if !maps.Equal(held, want) {
			t.Fatalf("at %d the agent holds %v; revoked is %v", at, held, want)
		}
	}
	read()
	for range 300 {
		switch name := fmt.Sprintf("r%d", rnd.IntN(12)); rnd.IntN(5) {
		case 0, 1:
			revoke(t, r, name, fmt.Sprintf("id: /x/%d", rnd.IntN(1000)))
		case 2:
			revoke(t, r, name, fmt.Sprintf("agent: /spire/agent/x/y%d", rnd.IntN(1000)))
		case 3:
			if _, err := r.Resources(KindRevocation, name); err == nil {
				unrevoke(t, r, name)
			}
		case 4:
			if rnd.IntN(3) == 0 { // it comes back with what it held earlier: its acknowledgement of the rest was lost
				f.Close()
				revs := slices.Sorted(maps.Keys(holds))
				back := revs[max(0, len(revs)-1-rnd.IntN(3))]
				f = r.Follow(agent, back, true)
				held, at = maps.Clone(holds[back]), back
			}
			if rnd.IntN(2) == 0 {
				read()
			}
		}
	}
	read()
	f.Close()
	if shots < 2 {
		t.Errorf("%d snapshots: more was never missed than is remembered, and the test proves less than it says", shots)
	}
}

// TestTooManyRevocations: there is no room for more than agents can hold, and the refusal says what to do.
func TestTooManyRevocations(t *testing.T) {
	r := open(t)
	r.mu.Lock()
	for i := range MaxRevocations - 1 { // what only the index counts costs no time
		n := fmt.Sprintf("full/%d", i)
		r.ix.revocations.items[n] = &policyv1.Revocation{Name: n, Target: &policyv1.Revocation_JtiHash{JtiHash: make([]byte, 32)}}
	}
	r.mu.Unlock()
	revoke(t, r, "last", "id: /last")
	revoke(t, r, "last", "id: /instead") // replaces one
	docs, err := strictyaml.Split([]byte("kind: Revocation\nname: more\nid: /more\n"), "test.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Plan(docs, Options{}); !errors.Is(err, ErrTooManyRevocations) || !strings.Contains(err.Error(), "100000") {
		t.Errorf("one more: %v", err)
	}
	unrevoke(t, r, "last")
	if _, err := r.Plan(docs, Options{}); err != nil {
		t.Errorf("after one was deleted: %v", err)
	}
}

// TestRevocationsOfANewerVersion: a store that a newer CA wrote is not read as if nothing were revoked.
func TestRevocationsOfANewerVersion(t *testing.T) {
	ix := newIndex()
	err := ix.apply(td, store.Event{Item: store.Item{Key: revocationPrefix + "x", Value: []byte(`{"v":9}`), Modified: 3}}, nil)
	if !errors.Is(err, ErrNewerFormat) {
		t.Errorf("%v", err)
	}
	for _, damaged := range []string{`{`, `{"v":1,"compiled":"/////w=="}`, `{"v":1,"agent":"x"}`, `{"v":1,"compiled":7}`} {
		if err := newIndex().apply(td, store.Event{Item: store.Item{Key: revocationPrefix + "x", Value: []byte(damaged), Modified: 3}}, nil); err == nil {
			t.Errorf("%s was taken", damaged)
		}
	}
}

// TestSerialPrefixOfAnAgent: it is the same after a restart and on every replica of the store, and another one for another
// agent, and in another store, so that who has not read the store cannot tell an agent from a serial number.
func TestSerialPrefixOfAnAgent(t *testing.T) {
	r, other := open(t), open(t)
	a, b := spiffeid.RequireFromString("spiffe://example.org/spire/agent/x/a"), spiffeid.RequireFromString("spiffe://example.org/spire/agent/x/b")
	again, err := Open(t.Context(), Config{TrustDomain: td, Store: r.c.Store})
	if err != nil {
		t.Fatal(err)
	}
	defer again.watch.Close()
	p := string(r.SerialPrefix(a))
	if len(p) != 9 || p[0] != 1 || p != string(again.SerialPrefix(a)) || p == string(r.SerialPrefix(b)) || p == string(other.SerialPrefix(a)) {
		t.Errorf("prefixes %x, %x, %x, %x", p, again.SerialPrefix(a), r.SerialPrefix(b), other.SerialPrefix(a))
	}
}
