package demo

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// reportWait is how long a decision may take from the service over the agent to the CA.
const reportWait = 15 * time.Second

// health is what both callers may ask for.
const health = "/v1/health"

// whyDenied asks the CA about a decision of which the caller has only the id.
func (s *show) whyDenied(ctx context.Context, decision string) error {
	s.command("signet why-denied " + decision)
	said, err := s.known(ctx, func(said string) bool { return strings.Contains(said, "policy.yaml:5") }, "why-denied", decision)
	if err != nil {
		return err
	}
	s.output(nearest(said))
	return s.check(strings.Contains(said, "policy.yaml:5") && strings.Contains(said, "spiffe://"+trustDomain+"/"+Utility),
		"the CA knows the decision by its id: who, whom, what, the nearest rule with file and line, and the smallest change", "utility-service and policy.yaml:5", said)
}

// nearest leaves out the changes that are further away than the smallest.
func nearest(said string) string {
	if at := strings.Index(said, "\nor:\n"); at >= 0 {
		return said[:at] + "\n..."
	}
	return said
}

// known runs a command until what it says is what one waits for: decisions come to the CA a moment after they were made.
func (s *show) known(ctx context.Context, enough func(string) bool, args ...string) (said string, err error) {
	waited := s.eventually(ctx, reportWait, lookEvery, func(ctx context.Context) (bool, error) {
		said, err = s.signet(ctx, args...)
		return err == nil && enough(said), ctx.Err()
	})
	if waited != nil {
		return said, waited
	}
	return said, err
}

// tryOut shows a rule in shadow, and the least policy that allows what was seen.
func (s *show) tryOut(ctx context.Context) error {
	s.step("A rule is tried out", "policy-shadow.yaml would refuse utility-service altogether, and is in shadow: it takes nothing, and what it would have\n"+
		"taken is reported.")
	if err := s.apply(ctx, "policy-shadow.yaml"); err != nil {
		return err
	}
	var said string
	s.command("signet policy report --shadow")
	began := time.Now()
	for reported := false; !reported && time.Since(began) < reportWait; {
		if err := s.callQuietly(ctx, Utility, health); err != nil {
			return err
		}
		var err error
		if said, err = s.signet(ctx, "policy", "report", "--shadow"); err != nil {
			return err
		}
		reported = strings.Contains(said, "quarantine")
		if !reported {
			if err := s.pause(ctx); err != nil {
				return err
			}
		}
	}
	s.output(said)
	if err := s.check(strings.Contains(said, "quarantine"), "calls of utility-service still go through, and the report says which of them would not", "a line about the policy quarantine", said); err != nil {
		return err
	}
	s.command("signet delete policies quarantine")
	if _, err := s.signet(ctx, "delete", "policies", "quarantine"); err != nil {
		return err
	}
	s.command("signet policy suggest --service /" + Documents)
	said, err := s.known(ctx, func(said string) bool { return strings.Contains(said, Trusty) && strings.Contains(said, health) }, "policy", "suggest", "--service", "/"+Documents)
	if err != nil {
		return err
	}
	s.output(said)
	return s.check(strings.Contains(said, "kind: CallPolicy") && strings.Contains(said, "/"+Trusty) && strings.Contains(said, health),
		"the least policy that allows what was seen, to be reviewed", "a CallPolicy that names trusty-service and "+health, said)
}

// callQuietly makes a call that must be allowed.
func (s *show) callQuietly(ctx context.Context, from, path string) error {
	o, err := s.call(ctx, from, http.MethodGet, path, "")
	if err == nil && o.Status != http.StatusOK {
		err = fmt.Errorf("%s GET %s: %s", from, path, o)
	}
	return err
}

// pause waits a moment.
func (s *show) pause(ctx context.Context) error {
	t := time.NewTimer(lookEvery)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// revoke shows that what is revoked is refused at once, whatever the policy says.
func (s *show) revoke(ctx context.Context) error {
	s.step("A revocation", "utility-service may ask for "+health+". Its SVID is good for an hour still, and worth nothing as soon as it is revoked:\n"+
		"no new call, no live connection, no new SVID.")
	if err := s.checkCall(ctx, Utility, http.MethodGet, health, "", http.StatusOK, ""); err != nil {
		return err
	}
	began := time.Now()
	s.command(fmt.Sprintf("signet revoke --id /%s --name stolen --reason \"key found in a paste\"", Utility))
	if _, err := s.signet(ctx, "revoke", "--id", "/"+Utility, "--name", "stolen", "--reason", "key found in a paste", "--yes"); err != nil {
		return err
	}
	if err := s.untilAnswered(ctx, began, "refused", func(o outcome) bool { return o.Status != http.StatusOK }); err != nil {
		return err
	}
	began = time.Now()
	s.command("signet unrevoke stolen")
	if _, err := s.signet(ctx, "unrevoke", "stolen"); err != nil {
		return err
	}
	return s.untilAnswered(ctx, began, "allowed again", func(o outcome) bool { return o.Status == http.StatusOK })
}

// untilAnswered calls as utility-service until the answer is the one that is waited for.
func (s *show) untilAnswered(ctx context.Context, began time.Time, word string, good func(outcome) bool) error {
	var o outcome
	err := s.eventually(ctx, obeyWait, lookEvery, func(ctx context.Context) (bool, error) {
		var err error
		o, err = s.call(ctx, Utility, http.MethodGet, health, "")
		return good(o), err
	})
	if err != nil {
		return err
	}
	return s.check(good(o), fmt.Sprintf("utility-service GET %s: %s, %v after the command was typed", health, word, time.Since(began).Round(time.Millisecond)), word+" within "+obeyWait.String(), o.String())
}
