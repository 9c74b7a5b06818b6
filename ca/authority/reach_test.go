package authority

import (
	"errors"
	"testing"
	"time"
)

// retiresAt opens the Set's store anew with a configuration, lets another authority take over and brings the clock to just
// before and just after end.
func retiresAt(t *testing.T, now *clock, c Config, kind Kind, end time.Time) {
	t.Helper()
	s, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	feed(t, s)
	old := s.Authorities(kind)[0].ID
	must(t)(s.Activate(t.Context(), kind, must(t)(s.Prepare(t.Context(), kind)).ID))
	now.set(end.Add(-time.Second))
	if _, err := s.Retire(t.Context(), kind, old); !errors.As(err, new(*StateError)) {
		t.Errorf("%s: retired while what it signed is valid: %v", kind, err)
	}
	now.set(end.Add(signedSlack + reachStep))
	must(t)(s.Retire(t.Context(), kind, old))
}

// TestRetirementCoversTheTTLsOfBefore: a CA that was started anew with a shorter maximum keeps the authority in the bundle
// for as long as SVIDs from before the start can be valid, and one with a longer maximum for its own.
func TestRetirementCoversTheTTLsOfBefore(t *testing.T) {
	for _, maxima := range [][]time.Duration{{24 * time.Hour, time.Hour}, {time.Hour, 24 * time.Hour}, {time.Hour, 24 * time.Hour, 2 * time.Hour}} {
		for _, kind := range []Kind{KindX509, KindJWT, KindWIT} {
			now := newClock(testNow)
			c := testConfig(t)
			c.Now, c.WIT.Enabled = now.now, true
			var end time.Time
			for _, longest := range maxima {
				c.MaxX509TTL, c.MaxJWTTTL, c.WIT.MaxTTL = longest, longest, longest
				s, err := Open(t.Context(), c)
				if err != nil {
					t.Fatal(err)
				}
				signed := testNow.Add(longest) // of an SVID that is signed now
				if kind == KindX509 {
					checked, err := s.CheckX509(X509Request{ID: mustID(t, "/web"), PublicKey: newPublicKey(t), TTL: longest})
					if err != nil {
						t.Fatal(err)
					}
					svid, err := s.SignX509(t.Context(), checked)
					if err != nil {
						t.Fatal(err)
					}
					signed = svid.NotAfter
				}
				if signed.After(end) {
					end = signed
				}
			}
			retiresAt(t, now, c, kind, end)
		}
	}
}

// TestRetirementWaitsForDownstreamCAs: the certificate of a downstream CA may be valid for longer than any SVID.
func TestRetirementWaitsForDownstreamCAs(t *testing.T) {
	now := newClock(testNow)
	s := living(t, func(c *Config) { c.Now = now.now })
	for _, ttl := range []time.Duration{72 * time.Hour, 30 * time.Hour, time.Hour} {
		if _, err := s.SignDownstream(t.Context(), DownstreamRequest{PublicKey: newPublicKey(t), TTL: ttl, Depth: 1}); err != nil {
			t.Fatal(err)
		}
	}
	sequence := s.Bundle().Sequence
	if _, err := s.SignDownstream(t.Context(), DownstreamRequest{PublicKey: newPublicKey(t), TTL: 72 * time.Hour, Depth: 1}); err != nil || s.Bundle().Sequence != sequence {
		t.Errorf("what reaches no further was written again: %v", err)
	}
	retiresAt(t, now, s.config, KindX509, testNow.Add(72*time.Hour))
}

// TestAuthoritiesOfReleasesBefore: what an authority has signed of which no TTL is recorded is taken for signed with the
// default maximum.
func TestAuthoritiesOfReleasesBefore(t *testing.T) {
	now := newClock(testNow)
	c := testConfig(t)
	c.Now = now.now
	s, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	items, err := s.list(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	e, err := s.newEdit(KindX509, items)
	if err != nil {
		t.Fatal(err)
	}
	r := e.in(StateActive)
	r.life, r.touched = life{}, true
	checks, writes, err := e.commit()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Store.Commit(t.Context(), checks, writes); err != nil {
		t.Fatal(err)
	}
	c.MaxX509TTL = time.Hour
	retiresAt(t, now, c, KindX509, testNow.Add(DefaultMaxX509TTL))
}
