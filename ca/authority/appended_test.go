package authority

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

// show lets the follower's Set see the next commit.
func (f *follower) show() {
	f.t.Helper()
	batch, err := f.watcher.Next(f.t.Context())
	f.must(err)
	f.must(f.set.Observe(batch))
}

func TestAppendedAuthoritiesOfTwoReplicas(t *testing.T) {
	f := follow(t)
	c := f.set.config
	other, err := Open(t.Context(), c)
	f.must(err)
	const each = 8
	var wg sync.WaitGroup
	for r, s := range []*Set{f.set, other} {
		for i := range each {
			der := marshalKey(t, newPublicKey(t))
			wg.Go(func() {
				for {
					_, _, err := s.Append(t.Context(), nil, []JWTKey{{KeyID: fmt.Sprint(r, "-", i), PublicKey: der}}, "test")
					if err == nil {
						return
					}
					if !strings.Contains(err.Error(), "try again") {
						t.Error(err)
						return
					}
				}
			})
		}
	}
	wg.Wait()
	for range 2 * each {
		f.show()
	}
	if got := len(f.set.Appended()); got != 2*each {
		t.Errorf("%d appended, want %d: two replicas overwrote each other", got, 2*each)
	}
	// A replica that lists sees what one that followed sees, the sequence too.
	fresh, err := Open(t.Context(), c)
	f.must(err)
	if a, b := ok(spiffe.MarshalBundle(fresh.Bundle().SPIFFE())), ok(spiffe.MarshalBundle(f.set.Bundle().SPIFFE())); !bytes.Equal(a, b) {
		t.Errorf("bundle of a fresh replica:\n%s\nof one that followed:\n%s", a, b)
	}
	// Deleting the newest record does not take the sequence back. [TDB-05]
	before := f.set.Bundle().Sequence
	if _, err := f.set.RevokeAppended(t.Context(), false, "1-7"); err != nil {
		t.Fatal(err)
	}
	f.show()
	if fresh, err = Open(t.Context(), c); err != nil || fresh.Bundle().Sequence <= before || fresh.Bundle().Sequence != f.set.Bundle().Sequence {
		t.Errorf("sequence %d of a fresh replica, %d of one that followed, %d before; %v", fresh.Bundle().Sequence, f.set.Bundle().Sequence, before, err)
	}
}

func ok[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// A revoked authority of our own is not let in again by the door for those of others.
func TestRevokedAuthorityCannotBeAppended(t *testing.T) {
	f := follow(t)
	b := f.set.Bundle()
	x, j := b.X509[0].Certificate.Raw, marshalKey(t, b.JWT[0].PublicKey)
	f.must(f.commit(f.moved(f.x509Key(), StateRevoked), f.moved(f.jwtKey(), StateRevoked), f.changed(keyIndex, "x509_generation", 1)))
	if _, _, err := f.set.Append(t.Context(), [][]byte{x}, nil, "test"); !errors.Is(err, ErrRefused) {
		t.Errorf("the revoked X.509 authority: %v", err)
	}
	for _, kid := range []string{b.JWT[0].KeyID, "another-kid"} {
		if _, _, err := f.set.Append(t.Context(), nil, []JWTKey{{KeyID: kid, PublicKey: j}}, "test"); !errors.Is(err, ErrRefused) {
			t.Errorf("the revoked JWT authority as %q: %v", kid, err)
		}
	}
}

// Records that somebody spoiled are not followed: issuing stops, and says which record it is.
func TestSpoiledRecordOfAnAppendedAuthority(t *testing.T) {
	for name, spoil := range map[string]func(map[string]any){
		"newer version": func(r map[string]any) { r["v"] = recordVersion + 1 },
		"other id":      func(r map[string]any) { r["id"] = "x" },
		"no key":        func(r map[string]any) { delete(r, "public_key") },
	} {
		t.Run(name, func(t *testing.T) {
			f := follow(t)
			_, _, err := f.set.Append(t.Context(), nil, []JWTKey{{KeyID: "k", PublicKey: marshalKey(t, newPublicKey(t))}}, "test")
			f.must(err)
			f.show()
			key := f.set.Appended()[0].key
			item, err := f.store.Get(t.Context(), key)
			f.must(err)
			var r map[string]any
			f.must(json.Unmarshal(item.Value, &r))
			spoil(r)
			if err := f.commit(store.Write{Key: key, Value: ok(json.Marshal(r))}); !errors.Is(err, ErrStopped) || !strings.Contains(err.Error(), key) {
				t.Errorf("Observe: %v; want ErrStopped that names %s", err, key)
			}
		})
	}
}

// What can be appended can be stored, read back, and published in a bundle that is read as it was written.
func FuzzAppend(f *testing.F) {
	s := openSet(f)
	f.Add(authorityCert(s).Raw, "kid", marshalKey(f, newPublicKey(f)), int64(0))
	f.Add([]byte("x"), "", []byte("x"), int64(1))
	f.Add(authorityCert(openSet(f)).Raw, strings.Repeat("k", 300), marshalKey(f, testKeys(f)["RSA 2048"]), int64(1<<40))
	f.Fuzz(func(t *testing.T, der []byte, kid string, spki []byte, end int64) {
		var got []*Appended
		if a, err := checkAppendedX509(der, testTD); err == nil {
			got = append(got, a)
		} else if !errors.Is(err, ErrRefused) {
			t.Fatalf("error without ErrRefused: %v", err)
		}
		k := JWTKey{KeyID: kid, PublicKey: spki}
		if end > 0 && end < 1<<40 {
			k.ExpiresAt = time.Unix(end, 0)
		}
		if a, err := checkAppendedJWT(k); err == nil {
			got = append(got, a)
		} else if !errors.Is(err, ErrRefused) {
			t.Fatalf("error without ErrRefused: %v", err)
		}
		for _, a := range got {
			value, err := a.encode()
			if err != nil {
				t.Fatal(err)
			}
			back, err := decodeAppended(store.Item{Key: a.key, Value: value}, testTD)
			if err != nil || back.ID != a.ID || !back.ExpiresAt.Equal(a.ExpiresAt) || back.X509() != a.X509() {
				t.Fatalf("stored and read back: %+v, %v; want %+v", back, err, a)
			}
			n := &snapshot{appended: map[string]*Appended{a.key: back}}
			doc, err := spiffe.MarshalBundle(n.makeBundle(Config{TrustDomain: testTD}).SPIFFE())
			if err != nil {
				t.Fatal(err)
			}
			if b, skipped, err := spiffe.ParseBundle(testTD, doc); err != nil || len(skipped) > 0 || len(b.X509Authorities())+len(b.JWTAuthorities()) != 1 {
				t.Fatalf("what was published is read as %v, %v, %v", b, skipped, err)
			}
		}
	})
}
