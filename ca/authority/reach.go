package authority

import (
	"context"
	"errors"
	"time"

	"github.com/signet-id/signet/ca/store"
)

// A reach is how far into the future goes what an authority has signed. It is in the record before anything that goes
// further is signed: the program that takes the authority out of use may be another one than signed, with other TTLs, and
// an authority that leaves the bundle too early ends what is still valid.
type reach struct {
	// LongestTTL is the longest TTL with which any CA was opened, or activated it, while it signed; in seconds. Authorities
	// of releases before this was recorded have none.
	LongestTTL int64 `json:"longest_ttl,omitempty"`

	// Reaches is a moment not before the end of every downstream CA that outlives the SVIDs.
	Reaches time.Time `json:"reaches,omitzero"`
}

// until is the moment after which nothing is valid that an authority has signed until now, if longest is the longest TTL.
func (r reach) until(now time.Time, longest time.Duration) time.Time {
	until := now.Add(max(longest, time.Duration(r.LongestTTL)*time.Second))
	if r.Reaches.After(until) {
		return r.Reaches
	}
	return until
}

// seconds rounds up.
func seconds(d time.Duration) int64 { return int64((d + time.Second - 1) / time.Second) }

// noteLongestTTLs brings into the records of the active authorities that this CA may sign for longer than was so far. For
// those of releases before that was recorded, the default maxima are taken for what they have signed.
func (s *Set) noteLongestTTLs(ctx context.Context) error {
	for _, kind := range s.Kinds() {
		if err := s.noteLongestTTL(ctx, kind); err != nil {
			return err
		}
	}
	return nil
}

func (s *Set) noteLongestTTL(ctx context.Context, kind Kind) error {
	const attempts = 4
	for range attempts {
		items, err := s.list(ctx)
		if err != nil {
			return err
		}
		if err := s.Load(items); err != nil {
			return err
		}
		e, err := s.newEdit(kind, items)
		if err != nil {
			return err
		}
		r := e.in(StateActive)
		if r == nil {
			return nil
		}
		longest := seconds(s.LongestTTL(kind))
		if r.life.LongestTTL == 0 {
			before := map[Kind]time.Duration{KindX509: DefaultMaxX509TTL, KindJWT: DefaultMaxJWTTTL, KindWIT: DefaultMaxWITTTL}[kind]
			longest = max(longest, seconds(before))
		}
		if r.life.LongestTTL >= longest {
			return nil
		}
		r.life.LongestTTL, r.touched = longest, true
		checks, writes, err := e.commit()
		if err != nil {
			return err
		}
		_, err = s.config.Store.Commit(store.WithReserve(ctx), checks, writes)
		if conflict := (*store.ConflictError)(nil); err != nil && !errors.As(err, &conflict) {
			return err
		}
	}
	return ErrConflict
}

// reachStep is to what a reach is rounded up, so that many downstream CAs are one commit.
const reachStep = time.Hour

// noteReach brings into the record of a, which is active, that it signs something that is valid until notAfter. If it is
// no longer active, that is ErrConflict.
func (s *Set) noteReach(ctx context.Context, a *x509Authority, now, notAfter time.Time) error {
	if !notAfter.After(a.life.until(now, s.LongestTTL(KindX509))) {
		return nil
	}
	_, err := s.change(ctx, KindX509, func(e *edit) (string, error) {
		r := e.records[a.id]
		if r == nil || r.state != StateActive {
			return "", ErrConflict
		}
		if notAfter.After(r.life.Reaches) {
			r.life.Reaches, r.touched = notAfter.UTC().Truncate(reachStep).Add(reachStep), true
		}
		return r.id, nil
	})
	return err
}
