package rotation

import (
	"math"
	"testing"
	"time"

	"github.com/signet-id/signet/ca/authority"
)

var start = time.Date(2027, 3, 4, 5, 6, 7, 0, time.UTC)

const (
	day     = 24 * time.Hour
	year    = 365 * day
	longest = day
)

func one(id string, state authority.State, from time.Time, life time.Duration) authority.Authority {
	return authority.Authority{Kind: authority.KindX509, ID: id, State: state, NotBefore: from, NotAfter: from.Add(life), PreparedAt: from}
}

func old(id string, until time.Time) authority.Authority {
	a := one(id, authority.StateOld, start.Add(-year), 2*year)
	a.SignedUntil = until
	return a
}

func TestDue(t *testing.T) {
	active := one("a", authority.StateActive, start, year)
	prepared := one("p", authority.StatePrepared, start.Add(250*day), year)
	forever := time.Duration(math.MaxInt64)
	for _, tt := range []struct {
		name        string
		now         time.Time
		authorities []authority.Authority
		wait        time.Duration
		laggards    int
		late        bool
		upstream    bool
		steadyFor   time.Duration
		upFor       time.Duration
		do, id      string
	}{
		{name: "young", now: start.Add(day), authorities: []authority.Authority{active}},
		{name: "just before two thirds", now: start.Add(year*2/3 - time.Second), authorities: []authority.Authority{active}},
		{name: "two thirds of its life are over", now: start.Add(year * 2 / 3), authorities: []authority.Authority{active}, do: doPrepare},
		{name: "everybody has it", now: start.Add(251 * day), authorities: []authority.Authority{active, prepared}, do: doActivate, id: "p"},
		{name: "somebody lags", now: start.Add(251 * day), authorities: []authority.Authority{active, prepared}, laggards: 1},
		{name: "the deadline has come", now: start.Add(364 * day), authorities: []authority.Authority{active, prepared}, laggards: 1, late: true, do: doActivate, id: "p"},
		{name: "an operator prepared before its time", now: start.Add(day), authorities: []authority.Authority{active, one("p", authority.StatePrepared, start, year)}},
		{name: "old, and still needed", now: start.Add(day), authorities: []authority.Authority{old("o", start.Add(day+time.Second)), active}},
		{name: "old, and nothing of it is valid", now: start.Add(day), authorities: []authority.Authority{old("o", start.Add(day)), active}, do: doRetire, id: "o"},
		{name: "a short life is prepared in time", now: start.Add(2 * day), authorities: []authority.Authority{one("a", authority.StateActive, start, 4*day)}, wait: 12 * time.Hour, do: doPrepare},
		{name: "the prepared one has ended", now: start.Add(301 * day), authorities: []authority.Authority{active, one("p", authority.StatePrepared, start, 300*day)}, do: doRetire, id: "p"},

		{name: "nothing can sign", now: start.Add(2 * year), authorities: []authority.Authority{active}, do: doPrepare},
		{name: "nothing can sign, and the CA has just started", now: start.Add(2 * year), authorities: []authority.Authority{active}, upFor: time.Second},
		{name: "nothing can sign, and one is prepared that somebody lacks", now: start.Add(year + day), authorities: []authority.Authority{active, prepared}, laggards: 1, do: doActivate, id: "p"},

		// The clock was ahead by a year when both were made.
		{name: "made in the future", now: start.Add(-day), authorities: []authority.Authority{active}, do: doPrepare},
		{name: "both made in the future", now: start.Add(-day), authorities: []authority.Authority{active, one("p", authority.StatePrepared, start, year)}, do: doDiscard, id: "p"},
		{name: "prepared in the future", now: start.Add(250 * day), authorities: []authority.Authority{active, one("p", authority.StatePrepared, start.Add(400*day), year)}},

		// The clock has just jumped: nothing is done that cannot be taken back.
		{name: "jumped to two thirds", now: start.Add(year * 2 / 3), authorities: []authority.Authority{active}, steadyFor: time.Minute},
		{name: "jumped to the deadline", now: start.Add(364 * day), authorities: []authority.Authority{active, prepared}, laggards: 1, late: true, steadyFor: time.Minute},
		{name: "jumped past all ends", now: start.Add(5 * year), authorities: []authority.Authority{old("o", start.Add(day)), active, prepared}, steadyFor: time.Minute},
		{name: "jumped past what the old one signed, an hour ago", now: start.Add(3 * day), authorities: []authority.Authority{old("o", start.Add(2*day)), active}, steadyFor: time.Hour},
		{name: "jumped past what the old one signed, a day ago", now: start.Add(3 * day), authorities: []authority.Authority{old("o", start.Add(2*day)), active}, steadyFor: day, do: doRetire, id: "o"},

		{name: "below an upstream CA, which prepares", now: start.Add(year * 2 / 3), authorities: []authority.Authority{active}, upstream: true},
		{name: "below an upstream CA, prepared", now: start.Add(250 * day), authorities: []authority.Authority{active, prepared}, upstream: true, do: doActivate, id: "p"},
		{name: "below an upstream CA, ended", now: start.Add(2 * year), authorities: []authority.Authority{active}, upstream: true},
	} {
		if tt.steadyFor == 0 {
			tt.steadyFor = forever
		}
		if tt.upFor == 0 {
			tt.upFor = forever
		}
		s := situation{now: tt.now, authorities: tt.authorities, longest: longest, wait: tt.wait, upstream: tt.upstream, steadyFor: tt.steadyFor, upFor: tt.upFor, settle: 5 * time.Minute,
			ready: func(authority.Authority) Readiness {
				return Readiness{Count: tt.laggards, Ready: tt.laggards == 0 || tt.late, Late: tt.late}
			}}
		if do, id, why := s.due(); do != tt.do || id != tt.id || (do == "") != (why == "") {
			t.Errorf("%s: %q %q (%s), want %q %q", tt.name, do, id, why, tt.do, tt.id)
		}
	}
}

// TestScheduleOverTenYears lets time pass by hours, doing what is due, and looks at what must always hold: one is active and
// valid for longer than any TTL, none signs that was not prepared before, the bundle stays small, and each rotates about
// every eight months.
func TestScheduleOverTenYears(t *testing.T) {
	all := []authority.Authority{one("0", authority.StateActive, start, year)}
	made, rotations := 0, 0
	for now := start; now.Before(start.Add(10 * year)); now = now.Add(time.Hour) {
		for range 4 {
			s := situation{now: now, authorities: all, longest: longest, wait: 25 * time.Minute, steadyFor: math.MaxInt64, upFor: math.MaxInt64, settle: time.Minute,
				ready: func(a authority.Authority) Readiness { // agents answer within a day
					return Readiness{Ready: now.Sub(a.PreparedAt) >= day}
				}}
			do, id, _ := s.due()
			switch do {
			case doPrepare:
				made++
				all = append(all, one(string(rune('0'+made)), authority.StatePrepared, now, year))
			case doActivate:
				rotations++
				for i := range all {
					switch {
					case all[i].State == authority.StateActive:
						all[i].State, all[i].SignedUntil = authority.StateOld, now.Add(longest)
					case all[i].ID == id:
						if now.Sub(all[i].PreparedAt) < day {
							t.Fatal("activated before everybody had it")
						}
						all[i].State = authority.StateActive
					}
				}
			case doRetire:
				for i := range all {
					if all[i].ID == id {
						if now.Before(all[i].SignedUntil) {
							t.Fatal("retired while something of it was valid")
						}
						all = append(all[:i], all[i+1:]...)
						break
					}
				}
			case doNothing:
			default:
				t.Fatal(do)
			}
		}
		active := 0
		for _, a := range all {
			if a.State == authority.StateActive {
				active++
				if left := a.NotAfter.Sub(now); left < longest {
					t.Fatalf("at %v the active one has %v left, less than the longest TTL", now, left)
				}
			}
		}
		if active != 1 || len(all) > 3 {
			t.Fatalf("at %v: %d active among %d", now, active, len(all))
		}
	}
	if rotations < 14 || rotations > 16 {
		t.Errorf("%d rotations in ten years, want about 15", rotations)
	}
}

func TestClockNoticesJumps(t *testing.T) {
	var c clock
	steady := time.Now()
	if by := c.look(start, steady); by != 0 || c.steadyFor(steady) != math.MaxInt64 {
		t.Errorf("the first look found a jump of %v", by)
	}
	if by := c.look(start.Add(10*time.Second), steady.Add(10*time.Second)); by != 0 {
		t.Errorf("time passing was taken for a jump of %v", by)
	}
	if by := c.look(start.Add(21*time.Second), steady.Add(20*time.Second)); by != 0 {
		t.Errorf("drift was taken for a jump of %v", by)
	}
	for _, jump := range []time.Duration{year, -2 * year} {
		c = clock{}
		c.look(start, steady)
		if by := c.look(start.Add(jump).Add(time.Second), steady.Add(time.Second)); by != jump {
			t.Errorf("a jump of %v was taken for %v", jump, by)
		}
		if got := c.steadyFor(steady.Add(time.Minute)); got != 59*time.Second {
			t.Errorf("steady for %v", got)
		}
	}
}
