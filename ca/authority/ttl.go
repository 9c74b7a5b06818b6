package authority

import (
	"fmt"
	"time"
)

// A TTLDecision says how long an SVID would be valid if it were issued now, and what decided that.
type TTLDecision struct {
	Kind Kind
	// TTL is the validity from now on. It is shorter than asked for only if Maximum or the authority's end cut it.
	TTL time.Duration
	// DecidedBy is "entry", "default", "maximum" or "authority".
	DecidedBy string

	// What was asked for (0: nothing), the default, and the maximum.
	Asked, Default, Maximum time.Duration

	// The active authority and its end.
	AuthorityID string
	NotAfter    time.Time
}

// ExplainTTL says what becomes of a TTL that an entry asks for; 0 asks for the default.
func (s *Set) ExplainTTL(kind Kind, asked time.Duration) (TTLDecision, error) {
	now := s.config.Now()
	d := TTLDecision{Kind: kind, Asked: asked, Default: s.config.DefaultX509TTL, Maximum: s.config.MaxX509TTL}
	if kind == KindJWT {
		d.Default, d.Maximum = s.config.DefaultJWTTTL, s.config.MaxJWTTTL
		a, err := s.activeJWT(now)
		if err != nil {
			return d, err
		}
		d.AuthorityID, d.NotAfter = a.id, a.expiresAt
	} else {
		a, err := s.activeX509(now)
		if err != nil {
			return d, err
		}
		d.AuthorityID, d.NotAfter = a.id, a.certificate.NotAfter
	}
	d.TTL, d.DecidedBy = asked, "entry"
	if asked == 0 {
		d.TTL, d.DecidedBy = d.Default, "default"
	}
	if d.TTL > d.Maximum {
		d.TTL, d.DecidedBy = d.Maximum, "maximum"
	}
	if left := d.NotAfter.Sub(now).Truncate(time.Second); d.TTL > left {
		d.TTL, d.DecidedBy = left, "authority"
	}
	return d, nil
}

// String is the decision in a sentence.
func (d TTLDecision) String() string {
	what := "X509-SVIDs"
	if d.Kind == KindJWT {
		what = "JWT-SVIDs"
	}
	switch d.DecidedBy {
	case "entry":
		return fmt.Sprintf("%s are valid for %v, as the entry says", what, d.TTL)
	case "default":
		return fmt.Sprintf("%s are valid for %v, the CA's default, since the entry says nothing", what, d.TTL)
	case "maximum":
		return fmt.Sprintf("%s are valid for %v, the CA's maximum; the entry asks for %v", what, d.TTL, d.Asked)
	}
	wanted := d.Asked
	if wanted == 0 {
		wanted = d.Default
	}
	return fmt.Sprintf("%s are valid for %v instead of %v, because authority %s ends at %s; prepare and activate another one", what, d.TTL,
		min(wanted, d.Maximum), d.AuthorityID, d.NotAfter.UTC().Format(time.RFC3339))
}
