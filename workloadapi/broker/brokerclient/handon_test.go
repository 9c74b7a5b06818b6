package brokerclient

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"google.golang.org/protobuf/proto"
)

type recorder struct {
	mu   sync.Mutex
	list []string
}

func (r *recorder) told() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.list)
}

func (r *recorder) add(what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = append(r.list, what)
}

func (r *recorder) Take(s string) error {
	r.add("take " + s)
	if s == "bad" {
		return errors.New("no room")
	}
	return nil
}

func (r *recorder) Drop() { r.add("drop") }

// TestBAPI_26_JitterWhenHandingOn: the first state and one that takes something away come at once, others spread over
// time, and only the newest of those that wait.
func TestBAPI_26_JitterWhenHandingOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const jitter = 10 * time.Second
		shorter := func(now, before string) bool { return len(now) < len(before) }
		var moments []time.Duration
		for range 200 {
			var r recorder
			h := newHandOn[string](&r, jitter, shorter, slog.New(slog.DiscardHandler))
			began := time.Now()
			h.take("a")
			h.take("bb")
			h.take("cc")
			if got := fmt.Sprint(r.told()); got != "[take a]" {
				t.Fatalf("at once: %s, want the first state alone", got)
			}
			for len(r.told()) == 1 && time.Since(began) < 2*jitter {
				time.Sleep(jitter / 100)
				synctest.Wait()
			}
			if got := fmt.Sprint(r.told()); got != "[take a take cc]" {
				t.Fatalf("after a while: %s, want the newest state alone", got)
			}
			moments = append(moments, time.Since(began))
			h.take("ddd")
			h.take("e")
			if got := fmt.Sprint(r.told()); got != "[take a take cc take e]" {
				t.Fatalf("a state that takes something away: %s, want that it comes at once, and what waited does not", got)
			}
			h.take("ff")
			h.close()
			time.Sleep(2 * jitter)
			if got := fmt.Sprint(r.told()); got != "[take a take cc take e drop]" {
				t.Fatalf("after the end: %s", got)
			}
		}
		var quarters [4]int
		for _, m := range moments {
			if m > jitter+jitter/100 {
				t.Errorf("a state waited %s, longer than %s", m, jitter)
				continue
			}
			quarters[min(3, int(4*m/jitter))]++
		}
		for i, n := range quarters {
			if n < 20 { // of 200, 50 are expected; fewer than 20 is a chance of less than one in a million
				t.Errorf("quarter %d of the time has %d of 200 states: they are not spread", i, n)
			}
		}
	})
}

// TestKeeperThatFails: a state that could not be kept is no reason not to offer the next.
func TestKeeperThatFails(t *testing.T) {
	var r recorder
	h := newHandOn[string](&r, -1, func(_, _ string) bool { return false }, slog.New(slog.DiscardHandler))
	h.take("bad")
	h.take("good")
	h.close()
	if got := fmt.Sprint(r.told()); got != "[take bad take good drop]" {
		t.Error(got)
	}
}

// FuzzMessage: whatever a server sends is either a complete state of SVIDs, each with its bundle, or an error.
func FuzzMessage(f *testing.F) {
	f.Add([]byte{})
	seed, err := proto.Marshal(&brokerpb.SubscribeToX509SVIDResponse{Svids: []*brokerpb.X509SVID{{SpiffeId: "spiffe://example.org/a", X509Svid: []byte{0x30}, X509SvidKey: []byte{1}, Bundle: []byte{0x30}}},
		FederatedBundles: map[string][]byte{"spiffe://partner.example": {0x30}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, raw []byte) {
		var m brokerpb.SubscribeToX509SVIDResponse
		if proto.Unmarshal(raw, &m) == nil {
			x, err := x509FromMessage(&m)
			if err == nil {
				if len(x.SVIDs) == 0 {
					t.Fatal("a state without SVIDs")
				}
				for _, s := range x.SVIDs {
					if b, err := x.Bundles.GetX509BundleForTrustDomain(s.ID.TrustDomain()); err != nil || b.Empty() {
						t.Errorf("%s has no bundle: %v", s.ID, err)
					}
				}
				if x.without(x) {
					t.Error("a state lacks something of itself")
				}
			}
		}
		var xb brokerpb.SubscribeToX509BundlesResponse
		if proto.Unmarshal(raw, &xb) == nil {
			if b, err := x509BundlesFromMessage(&xb); err == nil && b.Set.Len() == 0 {
				t.Error("no bundle, and no error")
			}
		}
		var jb brokerpb.SubscribeToJWTBundlesResponse
		if proto.Unmarshal(raw, &jb) == nil {
			if b, err := jwtBundlesFromMessage(&jb); err == nil && b.Set.Len() == 0 {
				t.Error("no bundle, and no error")
			}
		}
	})
}
