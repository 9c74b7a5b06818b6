package cli

import (
	"fmt"
	"io"
	"strings"

	"github.com/signet-id/signet/policy"
)

// showDenied prints the stories.
func (a *app) showDenied(f format, q whyDenied, stories []*deniedStory) error {
	if f == formatJSON || f == formatYAML {
		if q.id != "" && len(stories) == 1 {
			return a.show(f, stories[0], nil)
		}
		return list(a, f, "", nil, stories)
	}
	for i, s := range stories {
		if i > 0 {
			fmt.Fprintln(a.stdout)
		}
		if err := a.printDenied(f, s); err != nil {
			return err
		}
	}
	return nil
}

func (a *app) printDenied(f format, s *deniedStory) error {
	var b strings.Builder
	color := red
	if s.Verdict == verdictWord(true) {
		color = green
	}
	fmt.Fprintf(&b, "%s: %s\n", paint(a.color, color, s.Verdict), escape(s.Because))
	if s.WouldBe != "" {
		fmt.Fprintf(&b, "%s: %s\n", paint(a.color, yellow, "would be "+s.WouldBe), escape(s.WouldReason))
	}
	if _, err := io.WriteString(a.stdout, b.String()); err != nil {
		return err
	}
	times, at := "", s.Last
	if s.Count > 1 {
		times, at = fmt.Sprintf("%d times, which were counted together", s.Count), s.First+" to "+s.Last
	}
	peer := s.Peer
	if peer == "" {
		peer = "(a caller without an SVID)"
	}
	fields := []field{
		{name: "  decision", value: s.DecisionID}, {name: "  who", value: peer}, {name: "  whom", value: s.Service}, {name: "  what", value: s.Call}, {name: "  when", value: at}, {name: "", value: times},
		{name: "  where", value: join(" on the node of ", pointName(s.Point), s.AgentID)}, {name: "  revision", value: fmt.Sprint(s.Revision)},
		{name: "  rule", value: rulePlace(s.Rule)}, {name: "  shadow rule", value: rulePlace(s.WouldRule)}, {name: "  token", value: s.Token}, {name: "  roll-out", value: s.rollout()},
	}
	if r := s.Revocation; r != nil {
		fields = append(fields, r.fields()...)
	}
	kept := fields[:0]
	for _, one := range fields {
		if one.name == "" && one.value == "" {
			continue
		}
		kept = append(kept, one)
	}
	if err := a.show(formatTable, nil, kept); err != nil {
		return err
	}
	b.Reset()
	switch {
	case s.Now == nil:
		fmt.Fprintf(&b, "now: not known: %s\n", escape(s.NotNow))
	default:
		color, since := red, ""
		if s.Now.Allowed {
			color = green
		}
		if c := s.Now.Changed; c != nil && *c {
			since = " (the policy has changed since)"
		}
		fmt.Fprintf(&b, "now, at revision %d%s: %s: %s\n", s.Now.Revision, since, paint(a.color, color, verdictWord(s.Now.Allowed)), escape(s.Now.Because))
		if s.Now.Unless != "" {
			fmt.Fprintf(&b, "  unless %s\n", escape(s.Now.Unless))
		}
		if f == formatWide {
			b.WriteString(considered(s.Now.Considered))
		}
	}
	if s.Nearest != nil {
		b.WriteString(a.remedy(*s.Nearest))
	}
	_, err := io.WriteString(a.stdout, b.String())
	return err
}

func considered(rules []policy.Considered) string {
	var b strings.Builder
	for _, c := range rules {
		why := c.Why
		if c.Matches {
			why = join(": ", "matches", c.Why)
		}
		fmt.Fprintf(&b, "  %s: %s: %s\n", escape(rulePlace(&c.Rule)), c.Effect, escape(why))
	}
	return b.String()
}

// rulePlace says where a rule is written.
func rulePlace(r *policy.Rule) string {
	if r == nil {
		return ""
	}
	place := r.Policy
	if r.File != "" || r.Line != 0 {
		place = fmt.Sprintf("%s:%d (policy %s)", r.File, r.Line, r.Policy)
		if r.File == "" {
			place = fmt.Sprintf("policy %s, line %d", r.Policy, r.Line)
		}
	}
	return place
}

func (s *deniedStory) rollout() string {
	if s.Rollout == "" {
		return ""
	}
	if s.FormerlyAllowed {
		return s.Rollout + ", before which the call was allowed"
	}
	return s.Rollout
}

func (r *revocationStory) fields() []field {
	name := r.Name
	if r.Present != nil && !*r.Present {
		name += " (no longer in force)"
	}
	return []field{
		{name: "  revocation", value: name}, {name: "  of", value: r.Target}, {name: "  by", value: join(", ", r.By, r.At)}, {name: "  why", value: r.Reason}, {name: "  until", value: r.until()},
	}
}

func (r *revocationStory) until() string {
	if r.Expires == "" && r.By != "" {
		return "somebody deletes it"
	}
	return r.Expires
}

// pointName is a kind of enforcement point in words.
func pointName(point string) string {
	switch point {
	case "":
		return ""
	case "tls":
		return "a TLS handshake of the Go library"
	case "http":
		return "the Go library's HTTP middleware"
	case "grpc":
		return "the Go library's gRPC interceptor"
	case "ext_authz":
		return "an Envoy, by the agent"
	case "proxy":
		return "signet-proxy"
	}
	return point
}

// join puts sep between those that are not empty.
func join(sep string, parts ...string) string {
	var kept []string
	for _, p := range parts {
		if p != "" {
			kept = append(kept, p)
		}
	}
	return strings.Join(kept, sep)
}
