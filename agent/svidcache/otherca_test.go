package svidcache

import (
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"testing"
	"time"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/spiffe"
)

// snapshot applies one of an epoch, with or without policies.
func (w *world) snapshot(epoch string, policies bool, entries ...*nodev1.Entry) {
	w.t.Helper()
	m := &nodev1.FollowResponse{Epoch: epoch, To: 1, Snapshot: true, Complete: true, Entries: w.stamp(entries), Bundles: []*nodev1.Bundle{w.ca.bundle(w.revision, []string{"k1"}, w.ca.active)}}
	if policies {
		m.PolicyDefaults = policyv1.DefaultsMode_DEFAULTS_MODE_DENY.Enum()
	}
	w.apply(m)
}

// Revisions of two CAs say nothing about each other: what the other CA registered otherwise is issued anew, and what it
// registered the same is not.
func TestEntriesOfAnotherEpoch(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		same, changed, moved := anEntry("same", "/same", "unix:uid:1"), anEntry("changed", "/changed", "unix:uid:1"), anEntry("moved", "/moved", "unix:uid:1")
		same.Revision, changed.Revision, moved.Revision = 7, 1000, 1000
		w.revision = 1
		w.snapshot("big numbers", true, same, changed, moved)
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		before := w.next(updates, 0)
		if got := ids(before); got != "/changed /moved /same" {
			t.Fatalf("identities %q", got)
		}

		changed, moved = anEntry("changed", "/changed", "unix:uid:1"), anEntry("moved", "/elsewhere", "unix:uid:1")
		changed.Revision, moved.Revision = 2, 3 // smaller numbers of another CA
		w.snapshot("small numbers", true, same, changed, moved)
		after := w.next(updates, time.Second)
		for i, path := range []string{"/changed", "/elsewhere", "/same"} {
			if got := after.Identities[i].ID.Path(); got != path {
				t.Errorf("identity %d is %q, want %q", i, got, path)
			}
		}
		if n := fmt.Sprint(w.ca.issued); n != "map[changed:2 moved:2 same:1]" {
			t.Errorf("issued %s", n)
		}
		// From now on the new CA's numbers count.
		changed = anEntry("changed", "/changed", "unix:uid:1")
		changed.Revision = 4
		w.apply(&nodev1.FollowResponse{Epoch: "small numbers", From: 1, To: 2, Entries: w.stamp([]*nodev1.Entry{changed})})
		w.next(updates, time.Second)
		if n := fmt.Sprint(w.ca.issued); n != "map[changed:3 moved:2 same:1]" {
			t.Errorf("issued %s", n)
		}
		w.silent(updates, 20*time.Minute)
	})
}

// A CA without policies is not one that has none applied: services learn the difference, and both changes between the two.
func TestCAWithoutPolicies(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.revision = 1
		w.snapshot("spire", false, anEntry("1", "/a", "unix:uid:1"))
		updates, stop := w.watch(caller(1, "unix:uid:1"))
		defer stop()
		if u := w.next(updates, 0); u.Policies != nil || !u.NoPolicies {
			t.Errorf("policies %v, none at all %t", u.Policies, u.NoPolicies)
		}
		w.apply(&nodev1.FollowResponse{Epoch: "spire", From: 1, To: 2, Entries: w.stamp([]*nodev1.Entry{anEntry("2", "/b", "unix:uid:1")})})
		if u := w.next(updates, time.Second); u.Policies != nil || !u.NoPolicies || len(u.Identities) != 2 {
			t.Errorf("after differences: policies %v, none at all %t, %q", u.Policies, u.NoPolicies, ids(u))
		}
		w.snapshot("signet", true, anEntry("1", "/a", "unix:uid:1"))
		if u := w.next(updates, time.Second); u.Policies == nil || u.NoPolicies {
			t.Errorf("at a CA that has them: policies %v, none at all %t", u.Policies, u.NoPolicies)
		}
		w.snapshot("spire", false, anEntry("1", "/a", "unix:uid:1"))
		if u := w.next(updates, time.Second); u.Policies != nil || !u.NoPolicies {
			t.Errorf("back again: policies %v, none at all %t", u.Policies, u.NoPolicies)
		}
	})
}

func TestCSR(t *testing.T) {
	k, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	id, err := spiffe.ParseID("spiffe://example.org/a")
	if err != nil {
		t.Fatal(err)
	}
	der, err := (X509Request{EntryID: "1", PublicKey: k.public, key: k, id: id}).CSR()
	if err != nil {
		t.Fatal(err)
	}
	r, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.CheckSignature(); err != nil || string(r.RawSubjectPublicKeyInfo) != string(k.public) || len(r.URIs) != 1 || r.URIs[0].String() != id.String() {
		t.Errorf("a CSR for %v, %v", r.URIs, err)
	}
}

func jwtOf(payload string) string {
	return "e30." + base64.RawURLEncoding.EncodeToString([]byte(payload)) + ".c2ln"
}

func TestJWTSVIDsThatSaySomethingElse(t *testing.T) {
	now := time.Now()
	e, err := readEntry(td, anEntry("1", "/a", "unix:uid:1"))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, token string
		left        time.Duration
		good        bool
	}{
		{name: "what was asked for", token: jwtOf(`{"sub":"spiffe://example.org/a","aud":["x","y"]}`), good: true},
		{name: "in another order", token: jwtOf(`{"sub":"spiffe://example.org/a","aud":["y","x"]}`), good: true},
		{name: "another's", token: jwtOf(`{"sub":"spiffe://example.org/b","aud":["x","y"]}`)},
		{name: "of another trust domain", token: jwtOf(`{"sub":"spiffe://other.example/a","aud":["x","y"]}`)},
		{name: "an audience more", token: jwtOf(`{"sub":"spiffe://example.org/a","aud":["x","y","z"]}`)},
		{name: "an audience less", token: jwtOf(`{"sub":"spiffe://example.org/a","aud":"x"}`)},
		{name: "no audience", token: jwtOf(`{"sub":"spiffe://example.org/a"}`)},
		{name: "no subject", token: jwtOf(`{"aud":["x","y"]}`)},
		{name: "over", token: jwtOf(`{"sub":"spiffe://example.org/a","aud":["x","y"]}`), left: -time.Second},
		{name: "no JSON", token: jwtOf(`x`)},
		{name: "no base64", token: "e30.%.c2ln"},
		{name: "two parts", token: "e30.e30"},
		{name: "five parts", token: "a.b.c.d.e"},
		{name: "huge", token: jwtOf(`{"sub":"spiffe://example.org/a","aud":["x","y"],"x":"` + string(make([]byte, maxTokenBytes)) + `"}`)},
	} {
		left := tt.left
		if left == 0 {
			left = time.Minute
		}
		if err := checkJWT(e, []string{"x", "y"}, JWTAnswer{Token: tt.token, ExpiresAt: now.Add(left)}, now); (err == nil) != tt.good {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func FuzzCheckJWT(f *testing.F) {
	e, err := readEntry(td, anEntry("1", "/a", "unix:uid:1"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(jwtOf(`{"sub":"spiffe://example.org/a","aud":["x"]}`))
	f.Add(jwtOf(`{"sub":"spiffe://example.org/a","aud":"x"}`))
	f.Add("a.b.c")
	f.Fuzz(func(t *testing.T, token string) {
		now := time.Unix(1_700_000_000, 0)
		if checkJWT(e, []string{"x"}, JWTAnswer{Token: token, ExpiresAt: now.Add(time.Minute)}, now) != nil {
			return
		}
		// What passes, the library that verifies tokens reads the same way.
		_, claims, _, err := spiffe.InspectJWTSVID(token, now)
		if err != nil {
			return // its own bounds are narrower
		}
		if sub, _ := claims["sub"].(string); sub != e.spiffeID.String() {
			t.Errorf("a token for %q passes", sub)
		}
	})
}
