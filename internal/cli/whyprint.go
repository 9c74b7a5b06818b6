package cli

import (
	"fmt"
	"strings"
	"time"

	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
	"github.com/signet-id/signet/internal/why"
)

// A whyPrinter writes an answer for people.
type whyPrinter struct {
	app  *app
	wide bool
	now  time.Time
	b    strings.Builder
}

// line writes one line. What comes from elsewhere is escaped.
func (w *whyPrinter) line(indent int, color, format string, args ...any) {
	w.b.WriteString(strings.Repeat(" ", indent))
	w.b.WriteString(paint(w.app.color, color, escape(fmt.Sprintf(format, args...))))
	w.b.WriteByte('\n')
}

func (w *whyPrinter) answer(a *why.Answer) {
	for i, f := range a.Findings {
		if i > 0 {
			w.b.WriteByte('\n')
		}
		w.finding(f, a.Local)
	}
}

func (w *whyPrinter) finding(f why.Finding, local *agentv1.ExplainResponse) {
	for i, c := range f.Causes {
		color := red
		switch {
		case c.Code == why.Served:
			color = green
		case i > 0:
			color = yellow
		}
		w.b.WriteString(paint(w.app.color, color, string(c.Code)))
		w.b.WriteString(" " + escape(c.Text) + "\n")
		for _, fix := range c.Fix {
			w.line(2, cyan, "%s", fix)
		}
	}
	if p := f.Process; p != nil {
		w.process(p)
		w.pod(f.Pod)
		w.candidates(p.GetCandidates())
		return
	}
	w.pod(f.Pod)
	w.candidates(local.GetEntries())
}

func (w *whyPrinter) process(p *agentv1.Process) {
	w.b.WriteByte('\n')
	what := fmt.Sprintf("process %d, uid %d, gid %d", p.GetPid(), p.GetUid(), p.GetGid())
	if p.GetExecutable() != "" {
		what += ", " + p.GetExecutable()
	}
	if t := p.GetStartedAt(); t != nil {
		what += ", started " + approximate(max(0, w.now.Sub(t.AsTime()))) + " ago"
	}
	if p.GetEnded() {
		what += ", ended; as it was when it asked last"
	}
	if p.GetOtherPidNamespace() {
		what += ", in another PID namespace than the agent"
	}
	w.line(0, bold, "%s", what)
	for _, m := range p.GetMethods() {
		for _, s := range m.GetSelectors() {
			w.line(2, "", "%-8s %s", m.GetName(), s)
		}
		if m.GetError() != "" {
			w.line(2, yellow, "%-8s could not find out: %s", m.GetName(), m.GetError())
		} else if len(m.GetSelectors()) == 0 {
			w.line(2, "", "%-8s has nothing to say of it", m.GetName())
		}
		if w.wide && m.GetMicros() > 0 {
			w.line(2, "", "%-8s took %s", m.GetName(), time.Duration(m.GetMicros())*time.Microsecond)
		}
	}
	for _, r := range p.GetRefusals() {
		w.line(2, "", "refused  %s, %d times, last %s ago: %s", r.GetReason(), r.GetCount(), approximate(max(0, w.now.Sub(r.GetLastAt().AsTime()))), r.GetMethod())
	}
}

func (w *whyPrinter) candidates(all []*agentv1.Candidate) {
	others := 0
	for _, c := range all {
		if !c.GetMatches() && len(c.GetDifferences()) > 0 {
			if others++; others > shownCandidates && !w.wide {
				continue
			}
		}
		w.candidate(c)
	}
	if others > shownCandidates && !w.wide {
		w.line(0, "", "%d further entries are farther off; -o wide shows them", others-shownCandidates)
	}
}

func (w *whyPrinter) candidate(c *agentv1.Candidate) {
	w.b.WriteByte('\n')
	state := ""
	switch {
	case c.GetRemovedAt() != nil:
		state = ", taken from this node at " + stampOf(c.GetRemovedAt())
	case c.GetExpired():
		state = ", ended at " + stampOf(c.GetExpiresAt())
	case c.GetMatches():
		state = ", matches"
	}
	w.line(0, bold, "entry %s for %s%s", c.GetEntryId(), c.GetSpiffeId(), state)
	differs := map[string]*agentv1.Difference{}
	for _, d := range c.GetDifferences() {
		differs[d.GetSelector()] = d
	}
	for _, s := range c.GetSelectors() {
		switch d := differs[s]; {
		case d == nil:
			w.line(2, "", "  %s", s)
		case len(d.GetHave()) > 0:
			w.line(2, red, "x %s (%s; the process has %s)", s, d.GetKind(), strings.Join(d.GetHave()[:min(3, len(d.GetHave()))], ", "))
		default:
			w.line(2, red, "x %s (%s)", s, d.GetKind())
		}
	}
	if s := c.GetSvid(); s != nil {
		authority := s.GetAuthority()
		switch {
		case s.GetAuthorityGone():
			authority += ", gone from the bundle"
		case s.GetTainted():
			authority += ", tainted"
		}
		w.line(2, "", "SVID valid until %s (%s), renewed at %s, authority %s; %d subscriptions", stampOf(s.GetNotAfter()), left(s.GetNotAfter().AsTime(), w.now), stampOf(s.GetRenewAt()), authority, c.GetWatchers())
	}
	if i := c.GetIssuance(); i.GetError() != "" {
		w.line(2, yellow, "the CA said at %s: %s (attempt %d; the next at %s)", stampOf(i.GetFailedAt()), i.GetError(), i.GetFailures(), stampOf(i.GetRetryAt()))
	}
}
