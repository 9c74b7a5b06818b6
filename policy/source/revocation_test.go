package source

import (
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/api/signet/policy/v1/policyapi"
	"github.com/signet-id/signet/policy"
)

func revoking(revision int64, ids ...string) *policyv1.RevocationSet {
	set := &policyv1.RevocationSet{Revision: revision}
	for _, id := range ids {
		set.Revocations = append(set.Revocations, &policyv1.Revocation{Name: id, Target: &policyv1.Revocation_SpiffeId{SpiffeId: "spiffe://example.org" + id}})
	}
	return set
}

func want(t *testing.T, s *Source, when string, reason policy.Reason) {
	t.Helper()
	if r := decided(t, s); r != reason {
		t.Errorf("%s: %v, want %v", when, r, reason)
	}
}

func TestRevocationsComeWithoutThePolicies(t *testing.T) {
	a := newAgent(t)
	s := newSource(t, a, nil)
	changed, stop := s.Subscribe()
	other, stopOther := s.Subscribe()
	stopOther()
	bare := s.current.Load().bare
	want(t, s, "nothing revoked", policy.ReasonDefaultShadow)
	a.send(&policyapi.WatchResponse{Partial: true, Revocations: revoking(2, "/web")})
	<-changed
	want(t, s, "revoked", policy.ReasonRevoked)
	if s.current.Load().bare != bare || revision(s) != 1 || len(s.ServiceIDs()) != 2 {
		t.Error("a revocation compiled the policies anew, or took them away")
	}
	// A change of the policies that does not repeat the revocations keeps them; so does one of the contact.
	a.send(response(3))
	<-changed
	want(t, s, "other policies", policy.ReasonRevoked)
	a.send(&policyapi.WatchResponse{Partial: true, OfflineSince: time.Now().Unix()})
	<-changed
	want(t, s, "without contact", policy.ReasonRevoked)
	a.send(&policyapi.WatchResponse{Partial: true, Revocations: revoking(4)})
	<-changed
	want(t, s, "the revocation is gone", policy.ReasonDefaultShadow)
	stop()
	a.send(&policyapi.WatchResponse{Partial: true, Revocations: revoking(5, "/web")})
	<-s.Updated()
	await(t, "the revocation", func() bool { return decided(t, s) == policy.ReasonRevoked })
	for name, c := range map[string]<-chan struct{}{"stopped": changed, "stopped at once": other} {
		select {
		case <-c:
			t.Errorf("a subscription that was %s is told", name)
		default:
		}
	}
}

// An agent that goes away, or comes back as one that knows no revocations, revives nobody.
func TestAnOutageRevivesNobody(t *testing.T) {
	a := newAgent(t)
	s := newSource(t, a, nil)
	a.send(&policyapi.WatchResponse{Partial: true, Revocations: revoking(2, "/web")})
	<-s.Updated()
	want(t, s, "revoked", policy.ReasonRevoked)
	a.stop()
	waitLost(t, s)
	want(t, s, "without the agent", policy.ReasonRevoked)
	a.send(response(2)) // as an older agent's: no word on revocations
	a.start(t)
	<-s.Updated()
	want(t, s, "with an older agent", policy.ReasonRevoked)
	newer := response(3)
	newer.Revocations = revoking(3)
	a.send(newer)
	<-s.Updated()
	want(t, s, "revoked no more", policy.ReasonDefaultShadow)
}

// An agent that was started without its CA, with a cache of before a revocation, revives nobody either; the CA's word does, also
// if the agent need not repeat that nothing is revoked.
func TestAnOlderCacheRevivesNobody(t *testing.T) {
	a := newAgent(t)
	s := newSource(t, a, nil)
	a.send(&policyapi.WatchResponse{Partial: true, Revocations: revoking(5, "/web")})
	<-s.Updated()
	want(t, s, "revoked", policy.ReasonRevoked)
	older := response(3)
	older.OfflineSince = time.Now().Unix()
	older.Revocations = revoking(3, "/other")
	a.send(older)
	<-s.Updated()
	want(t, s, "with an older cache", policy.ReasonRevoked)
	if d := s.Policies().Decide(&policy.Request{Service: s.ServiceID(), Peer: spiffeid.RequireFromString("spiffe://example.org/other")}); d.Reason != policy.ReasonRevoked {
		t.Errorf("what the older cache has revoked besides: %v", d.Reason)
	}
	a.send(&policyapi.WatchResponse{Partial: true, OfflineSince: older.OfflineSince + 1})
	<-s.Updated()
	want(t, s, "still without the CA", policy.ReasonRevoked)
	a.send(&policyapi.WatchResponse{Partial: true})
	<-s.Updated()
	want(t, s, "in contact again", policy.ReasonDefaultShadow)
}

func TestRevocationsAreReadWherePoliciesCannotBe(t *testing.T) {
	a := newAgent(t)
	refused := make(refusals, 8)
	a.send(response(1))
	s, err := New(t.Context(), Options{Addr: a.addr, Log: slog.New(refused)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	<-s.Updated()
	newer := response(2)
	newer.Policies.Format = policy.Format + 1
	newer.Revocations = revoking(2, "/web")
	a.send(newer)
	<-refused
	<-s.Updated()
	want(t, s, "with policies that cannot be read", policy.ReasonRevoked)
	a.send(&policyapi.WatchResponse{Partial: true, Revocations: &policyv1.RevocationSet{Revocations: []*policyv1.Revocation{{Name: "later"}}}})
	<-refused
	<-s.Updated()
	want(t, s, "a revocation that cannot be read", policy.ReasonRevoked)
	if d := s.Policies().Decide(&policy.Request{Service: s.ServiceID(), Peer: s.ServiceIDs()[1]}); d.Revocation != "later" {
		t.Errorf("another peer: %+v, want a denial", d)
	}
}

func TestDeniesPastMaxRevocationStaleness(t *testing.T) {
	for _, tt := range []struct {
		own, agent, want time.Duration
	}{
		{0, 0, DefaultMaxOffline}, {time.Hour, 0, time.Hour}, {0, time.Minute, time.Minute}, {time.Hour, time.Minute, time.Minute}, {time.Minute, time.Hour, time.Minute},
		{48 * time.Hour, 0, DefaultMaxOffline},
	} {
		t.Run(fmt.Sprint(tt.own, tt.agent), func(t *testing.T) {
			a := newAgent(t)
			c := &clock{now: time.Now().Truncate(time.Second)}
			first := response(1)
			first.MaxRevocationStaleness = int64(tt.agent / time.Second)
			a.send(first)
			s, err := New(t.Context(), Options{Addr: a.addr, Log: slog.New(slog.DiscardHandler), Now: c.Now, MaxRevocationStaleness: tt.own})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Close() })
			<-s.Updated()
			offline := &policyapi.WatchResponse{Partial: true, OfflineSince: c.Now().Unix(), MaxRevocationStaleness: first.MaxRevocationStaleness}
			a.send(offline)
			<-s.Updated()
			c.advance(tt.want)
			want(t, s, "at the limit", policy.ReasonDefaultShadow)
			c.advance(time.Second)
			want(t, s, "past the limit", policy.ReasonStalePolicy)
			a.send(&policyapi.WatchResponse{Partial: true, MaxRevocationStaleness: first.MaxRevocationStaleness})
			<-s.Updated()
			want(t, s, "in contact again", policy.ReasonDefaultShadow)
		})
	}
	if _, err := New(t.Context(), Options{Addr: "unix:///a", MaxRevocationStaleness: -1}); err == nil {
		t.Error("a negative MaxRevocationStaleness was taken")
	}
}

// A clock that is set back does not lengthen the time for which what may be out of date is relied on.
func TestAClockSetBackKeepsNothingYoung(t *testing.T) {
	a := newAgent(t)
	a.send(response(1))
	c := &clock{now: time.Now().Truncate(time.Second)}
	s, err := New(t.Context(), Options{Addr: a.addr, Log: slog.New(slog.DiscardHandler), Now: c.Now, MaxRevocationStaleness: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	<-s.Updated()
	lost := c.Now().Unix()
	c.advance(-time.Hour)
	a.send(&policyapi.WatchResponse{Partial: true, OfflineSince: lost})
	<-s.Updated()
	await(t, "denials", func() bool { return decided(t, s) == policy.ReasonStalePolicy })
	a.send(&policyapi.WatchResponse{Partial: true})
	<-s.Updated()
	want(t, s, "in contact again", policy.ReasonDefaultShadow)
}
