package authority

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store"
)

// A follower is a Set that is shown every commit of its store, as the CA does.
type follower struct {
	t       *testing.T
	set     *Set
	store   store.Store
	watcher store.Watcher
	log     *bytes.Buffer
}

func follow(t *testing.T) *follower {
	t.Helper()
	f := &follower{t: t, log: &bytes.Buffer{}}
	c := testConfig(t)
	c.Log = slog.New(slog.NewTextHandler(f.log, nil))
	f.store = c.Store
	var err error
	if f.set, err = Open(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	revision, err := c.Store.Barrier(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if f.watcher, err = c.Store.Watch(t.Context(), revision); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.watcher.Close)
	return f
}

// commit makes writes and shows them to the Set.
func (f *follower) commit(writes ...store.Write) error {
	f.t.Helper()
	if _, err := f.store.Commit(f.t.Context(), nil, writes); err != nil {
		f.t.Fatal(err)
	}
	batch, err := f.watcher.Next(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	return f.set.Observe(batch)
}

// changed returns the write that sets one field of a record.
func (f *follower) changed(key, field string, value any) store.Write {
	f.t.Helper()
	item, err := f.store.Get(f.t.Context(), key)
	if err != nil {
		f.t.Fatal(err)
	}
	var r map[string]any
	if err := json.Unmarshal(item.Value, &r); err != nil {
		f.t.Fatal(err)
	}
	r[field] = value
	out, err := json.Marshal(r)
	if err != nil {
		f.t.Fatal(err)
	}
	return store.Write{Key: key, Value: out}
}

func (f *follower) moved(key string, state State) store.Write {
	f.t.Helper()
	return f.changed(key, "state", state)
}

// newX509 returns the writes that add a prepared X.509 authority of the second generation, and its key.
func (f *follower) newX509() (writes []store.Write, key string) {
	f.t.Helper()
	made, err := f.set.create(f.t.Context(), keys.UseX509, 2, StatePrepared)
	if err != nil {
		f.t.Fatal(err)
	}
	return append(made.writes, f.changed(keyIndex, "x509_generation", 2)), made.writes[0].Key
}

func (f *follower) newJWT() (writes []store.Write, key string) {
	f.t.Helper()
	made, err := f.set.create(f.t.Context(), keys.UseJWT, 2, StatePrepared)
	if err != nil {
		f.t.Fatal(err)
	}
	return append(made.writes, f.changed(keyIndex, "jwt_generation", 2)), made.writes[0].Key
}

func (f *follower) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *follower) x509Key() string { return keyX509Prefix + f.set.Bundle().X509[0].ID }
func (f *follower) jwtKey() string  { return keyJWTPrefix + f.set.Bundle().JWT[0].KeyID }

func states(b Bundle) (x, j string) {
	for _, a := range b.X509 {
		x += string(a.State) + " "
	}
	for _, a := range b.JWT {
		j += string(a.State) + " "
	}
	return strings.TrimSpace(x), strings.TrimSpace(j)
}

func TestSetFollowsAnAuthorityThroughItsLife(t *testing.T) {
	f := follow(t)
	first := f.x509Key()
	sequence := f.set.Bundle().Sequence
	step := func(want, wantSigner string, writes ...store.Write) {
		t.Helper()
		f.must(f.commit(writes...))
		b := f.set.Bundle()
		if x, _ := states(b); x != want {
			t.Errorf("states %q, want %q", x, want)
		}
		if b.Sequence <= sequence {
			t.Errorf("sequence %d after %d, want it to rise", b.Sequence, sequence)
		}
		sequence = b.Sequence
		if wantSigner != "" {
			svid := issue(t, f.set, X509Request{ID: mustID(t, "/web"), PublicKey: newPublicKey(t)})
			if keyX509Prefix+svid.AuthorityID != wantSigner {
				t.Errorf("signed by %s, want %s", svid.AuthorityID, wantSigner)
			}
			if len(f.set.Pins()) != len(b.X509) {
				t.Errorf("%d pins for %d published authorities", len(f.set.Pins()), len(b.X509))
			}
		}
	}
	writes, second := f.newX509()
	step("active prepared", first, writes...)
	step("old active", second, f.moved(first, StateOld), f.moved(second, StateActive))
	step("tainted active", second, f.moved(first, StateTainted))
	step("active", second, f.moved(first, StateRevoked))
	step("active", second, store.Write{Key: first, Delete: true}, f.changed(keyIndex, "touched", 1))
	step("", "", f.moved(second, StateRevoked))
	if _, err := f.set.CheckX509(X509Request{ID: mustID(t, "/web"), PublicKey: newPublicKey(t)}); !errors.Is(err, ErrNoActive) {
		t.Errorf("CheckX509 without an active authority = %v, want ErrNoActive", err)
	}
	if f.set.Pin() != "" || !errors.Is(f.set.Health(), ErrNoActive) {
		t.Errorf("without an active authority: pin %q, health %v", f.set.Pin(), f.set.Health())
	}
	// A CA must start in this state, or nobody could prepare the next one.
	again, err := Open(t.Context(), f.set.config)
	if err != nil || !errors.Is(again.Health(), ErrNoActive) {
		t.Errorf("opening without an active authority: %v", err)
	}
	if strings.Count(f.log.String(), "authority changed") < 6 {
		t.Errorf("changes are not in the log:\n%s", f.log)
	}
}

func TestObservedBatchesThatChangeNothing(t *testing.T) {
	f := follow(t)
	before := f.set.current.Load()
	f.must(f.commit(store.Write{Key: "entry/1", Value: []byte("x")}))
	old, err := f.store.Get(t.Context(), f.x509Key())
	f.must(err)
	f.must(f.set.Observe(store.Batch{Revision: old.Modified, Events: []store.Event{{Item: old, Deleted: true}}}))
	if f.set.current.Load() != before {
		t.Error("a batch without authorities, or one that is already known, changed the set")
	}
}

func TestReplicaFollowsAnother(t *testing.T) {
	f := follow(t)
	replica, err := Open(t.Context(), f.set.config)
	f.must(err)
	writes, second := f.newJWT()
	f.must(f.commit(writes...))
	f.must(f.commit(f.moved(f.jwtKey(), StateOld), f.moved(second, StateActive)))
	// The replica missed both and lists again.
	var items []store.Item
	for _, item := range records(t, f.store) {
		items = append(items, item)
	}
	f.must(replica.Load(append(items, store.Item{Key: "entry/1", Value: []byte("not ours"), Modified: 1 << 40})))
	a, b := f.set.Bundle(), replica.Bundle()
	if a.Sequence != b.Sequence || len(b.JWT) != 2 || a.JWT[1].KeyID != b.JWT[1].KeyID {
		t.Errorf("bundles differ: %+v and %+v", a, b)
	}
	token, err := replica.SignJWT(t.Context(), JWTRequest{ID: mustID(t, "/web"), Audience: []string{"db"}})
	f.must(err)
	if keyJWTPrefix+token.KeyID != second {
		t.Errorf("the replica signs with %s, want %s", token.KeyID, second)
	}
}

// Each of these is what a store looks like that was put back to an older copy or tampered with.
func TestIssuanceStopsWhenAuthoritiesGoBack(t *testing.T) {
	for _, tt := range []struct {
		name   string
		writes func(*follower) []store.Write
		want   string
	}{
		{"x509 back from old to active", func(f *follower) []store.Write {
			writes, second := f.newX509()
			f.must(f.commit(writes...))
			first := f.x509Key()
			f.must(f.commit(f.moved(first, StateOld), f.moved(second, StateActive)))
			return []store.Write{f.moved(first, StateActive), f.moved(second, StatePrepared)}
		}, "went back from"},
		{"jwt back from old to active", func(f *follower) []store.Write {
			writes, second := f.newJWT()
			f.must(f.commit(writes...))
			first := f.jwtKey()
			f.must(f.commit(f.moved(first, StateOld), f.moved(second, StateActive)))
			return []store.Write{f.moved(first, StateActive), f.moved(second, StatePrepared)}
		}, "went back from"},
		{"x509 vanished", func(f *follower) []store.Write { return []store.Write{{Key: f.x509Key(), Delete: true}} }, "vanished"},
		{"jwt vanished", func(f *follower) []store.Write { return []store.Write{{Key: f.jwtKey(), Delete: true}} }, "vanished"},
		{"index vanished", func(f *follower) []store.Write { return []store.Write{{Key: keyIndex, Delete: true}} }, "no record"},
		{"generation went back", func(f *follower) []store.Write {
			writes, second := f.newX509()
			f.must(f.commit(writes...))
			f.must(f.commit(f.moved(second, StateRevoked)))
			return []store.Write{{Key: second, Delete: true}, f.changed(keyIndex, "x509_generation", 1)}
		}, "earlier generation"},
		{"jwt lives longer", func(f *follower) []store.Write {
			return []store.Write{f.changed(f.jwtKey(), "not_after", testNow.AddDate(10, 0, 0))}
		}, "was exchanged"},
		{"certificate exchanged", func(f *follower) []store.Write {
			key, err := keys.Generate(f.t.Context())
			f.must(err)
			der, err := selfSign(key, testTD, testNow, time.Hour)
			f.must(err)
			return []store.Write{f.changed(f.x509Key(), "certificate", der)}
		}, "holds the certificate of authority"},
		{"two active", func(f *follower) []store.Write {
			writes, second := f.newX509()
			f.must(f.commit(writes...))
			return []store.Write{f.moved(second, StateActive)}
		}, "both active"},
		{"two active jwt", func(f *follower) []store.Write {
			writes, second := f.newJWT()
			f.must(f.commit(writes...))
			return []store.Write{f.moved(second, StateActive)}
		}, "both active"},
		{"more than were made", func(f *follower) []store.Write {
			writes, _ := f.newX509()
			return writes[:1]
		}, "only 1 were made"},
		{"newer record", func(f *follower) []store.Write { return []store.Write{f.changed(f.x509Key(), "v", 3)} }, "format version 3"},
		{"unknown state", func(f *follower) []store.Write { return []store.Write{f.changed(f.jwtKey(), "state", "sleeping")} }, `"sleeping"`},
		{"unknown kind", func(f *follower) []store.Write {
			return []store.Write{{Key: "authority/what/1", Value: []byte("{}")}}
		}, "unknown kind"},
		{"not JSON", func(f *follower) []store.Write { return []store.Write{{Key: f.x509Key(), Value: []byte("{")}} }, "authority/x509/"},
		{"another trust domain", func(f *follower) []store.Write {
			return []store.Write{f.changed(keyIndex, "trust_domain", "example.com")}
		}, `"example.com"`},
		{"oversized", func(f *follower) []store.Write {
			return []store.Write{{Key: f.x509Key(), Value: make([]byte, maxRecordBytes+1)}}
		}, "more than 65536"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := follow(t)
			prepared, err := f.set.CheckX509(X509Request{ID: mustID(t, "/web"), PublicKey: newPublicKey(t)})
			f.must(err)
			writes := tt.writes(f)
			bundle := f.set.Bundle()
			if err := f.commit(writes...); !errors.Is(err, ErrStopped) || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("Observe = %v, want ErrStopped with %q", err, tt.want)
			}
			if _, err := f.set.SignX509(t.Context(), prepared); !errors.Is(err, ErrStopped) {
				t.Errorf("SignX509 afterwards = %v, want ErrStopped", err)
			}
			if _, err := f.set.SignJWT(t.Context(), JWTRequest{ID: mustID(t, "/web"), Audience: []string{"db"}}); !errors.Is(err, ErrStopped) {
				t.Errorf("SignJWT afterwards = %v, want ErrStopped", err)
			}
			if !errors.Is(f.set.Health(), ErrStopped) || !strings.Contains(f.log.String(), "issuing has stopped") {
				t.Errorf("health %v, log:\n%s", f.set.Health(), f.log)
			}
			if got := f.set.Bundle().Sequence; got != bundle.Sequence {
				t.Errorf("the bundle moved from sequence %d to %d", bundle.Sequence, got)
			}
		})
	}
}

func TestExpiredAuthorityMayVanish(t *testing.T) {
	at := newClock(testNow)
	f := follow(t)
	f.set.config.Now = at.now
	writes, second := f.newJWT()
	f.must(f.commit(writes...))
	first := f.jwtKey()
	f.must(f.commit(f.moved(first, StateOld), f.moved(second, StateActive)))
	at.set(testNow.Add(DefaultJWTLifetime + time.Minute))
	f.must(f.commit(store.Write{Key: first, Delete: true}, f.changed(keyIndex, "touched", 1)))
	if _, j := states(f.set.Bundle()); j != "active" {
		t.Errorf("JWT states %q, want one active", j)
	}
}

func TestSealedKeyOfAnotherAuthorityRefused(t *testing.T) {
	f := follow(t)
	writes, second := f.newX509()
	f.must(f.commit(writes...))
	item, err := f.store.Get(t.Context(), second)
	f.must(err)
	var r x509Record
	f.must(json.Unmarshal(item.Value, &r))
	_, err = f.store.Commit(t.Context(), nil, []store.Write{f.changed(f.x509Key(), "key", r.Key)})
	f.must(err)
	if _, err := Open(t.Context(), f.set.config); !errors.Is(err, keys.ErrSealBroken) {
		t.Errorf("Open with exchanged sealed keys = %v, want ErrSealBroken", err)
	}
}

// FuzzRecords holds that records are read whole or not at all: what is accepted names itself, and no input panics.
func FuzzRecords(f *testing.F) {
	s := openSet(f)
	for key, item := range records(f, s.config.Store) {
		f.Add(key, item.Value)
	}
	f.Add(keyX509Prefix+"ab", []byte(`{"v":1,"id":"ab","generation":1,"state":"active","certificate":"MAA="}`))
	f.Add(keyJWTPrefix+"ab", []byte(`{"v":1,"id":"ab","generation":1,"state":"old"}`))
	f.Add(keyIndex, []byte(`{"v":2}`))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		item := store.Item{Key: key, Value: value, Modified: 1}
		if r, cert, _, err := decodeX509(item, testTD); err == nil {
			if keyX509Prefix+r.ID != key || r.State.rank() == 0 || !cert.IsCA || cert.URIs[0].String() != "spiffe://example.org" {
				t.Errorf("accepted record %q holds %+v", key, r)
			}
		}
		if r, public, err := decodeJWT(item, keyJWTPrefix); err == nil {
			if keyJWTPrefix+r.ID != key || r.State.rank() == 0 || checkKeyStrength(public) != nil {
				t.Errorf("accepted record %q holds %+v", key, r)
			}
		}
		if r, err := decodeIndex(item, testTD); err == nil && (r.Version != 1 || r.TrustDomain != "example.org") {
			t.Errorf("accepted index is %+v", r)
		}
	})
}
