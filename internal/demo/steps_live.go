package demo

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"
)

const (
	rotations   = 2                // that are shown
	enough      = 100              // calls that show that traffic goes on
	obeyWait    = 15 * time.Second // for a change to arrive at running processes
	rotateWait  = 30 * time.Second
	trafficLook = 20 * time.Millisecond
)

// rotate shows rotation under live traffic.
func (s *show) rotate(ctx context.Context) error {
	s.step("Rotation under live traffic", fmt.Sprintf("trusty-service now calls without a pause: one call on a new connection, one on a kept one, and so on. Meanwhile\n"+
		"the validity of all X509-SVIDs goes from 1h to %v, so that they are replaced every %v.", shortTTL, shortTTL/2))
	if err := s.ask(ctx, Trusty, http.MethodPost, "/traffic", nil); err != nil {
		return err
	}
	before, err := s.flow(ctx, 2)
	if err != nil {
		return err
	}
	if err := s.apply(ctx, "short-lived.yaml"); err != nil {
		return err
	}
	// Each side changes to a short-lived SVID first, and that one is then rotated.
	var after flow
	target := len(before.client) + 1 + rotations
	err = s.eventually(ctx, rotateWait, trafficLook, func(ctx context.Context) (bool, error) {
		var err error
		after, err = s.flow(ctx, 0)
		return len(after.client) >= target && len(after.server) >= target || after.Failed > 0, err
	})
	if err != nil {
		return err
	}
	for _, side := range []struct {
		name    string
		serials []string
	}{{Trusty, after.client}, {Documents, after.server}} {
		if err := s.check(len(side.serials) >= target, fmt.Sprintf("%s went through %d X509-SVIDs: %s", side.name, len(side.serials), shortSerials(side.serials)),
			fmt.Sprintf("at least %d serial numbers on the wire", target), fmt.Sprintf("%d: %v", len(side.serials), side.serials)); err != nil {
			return err
		}
	}
	if err := s.noneFailed(ctx, "meanwhile"); err != nil {
		return err
	}
	return s.apply(ctx, "identities.yaml")
}

// changePolicy shows that running processes obey a new policy.
func (s *show) changePolicy(ctx context.Context) error {
	s.step("A policy change", "policy-open.yaml lets utility-service read, too. Nobody restarts anything.")
	if err := s.obey(ctx, "policy-open.yaml", http.StatusOK); err != nil {
		return err
	}
	return s.obey(ctx, "policy.yaml", http.StatusForbidden)
}

// obey applies a policy and calls as utility-service until the answer is the new one.
func (s *show) obey(ctx context.Context, file string, want int) error {
	began := time.Now()
	if err := s.apply(ctx, file); err != nil {
		return err
	}
	var o outcome
	err := s.eventually(ctx, obeyWait, lookEvery, func(ctx context.Context) (bool, error) {
		var err error
		o, err = s.call(ctx, Utility, http.MethodGet, document, "")
		return o.Status == want, err
	})
	if err != nil {
		return err
	}
	word := "allowed"
	if want != http.StatusOK {
		word = "refused"
	}
	return s.check(o.Status == want, fmt.Sprintf("utility-service GET %s: %s, %v after the command was typed", document, word, time.Since(began).Round(time.Millisecond)),
		fmt.Sprintf("status %d within %v", want, obeyWait), o.String())
}

// killAgent shows that calls do not need the agent, and that all come back to it.
func (s *show) killAgent(ctx context.Context) error {
	s.step("The agent is killed", "Services have their SVIDs and policies in memory, and the traffic still flows. The new agent picks up the old one's\n"+
		"identity from its data directory; the join token is used up.")
	s.command(fmt.Sprintf("kill -9 %d", s.agent.cmd.Process.Pid))
	s.agent.kill()
	if err := s.callsGoOn(ctx, "without the agent"); err != nil {
		return err
	}
	if err := s.checkCall(ctx, Utility, http.MethodGet, document, "", http.StatusForbidden, ""); err != nil {
		return err
	}
	s.command("signet agent run --config agent.yaml")
	began := time.Now()
	if err := s.startAgent(ctx); err != nil {
		return err
	}
	s.command("trusty-service svid fetch x509")
	said, err := s.crew.run(ctx, s.binary(Trusty), "svid", "fetch", "x509")
	if err != nil {
		return err
	}
	if err := s.check(strings.Contains(said, "spiffe://"+trustDomain+"/"+Trusty), fmt.Sprintf("a new process of trusty-service has its X509-SVID %v after the restart", time.Since(began).Round(time.Millisecond)),
		"an X509-SVID of spiffe://"+trustDomain+"/"+Trusty, said); err != nil {
		return err
	}
	return s.reconnected(ctx)
}

// reconnected checks that the open streams of the running services are back: new policies and new SVIDs arrive.
func (s *show) reconnected(ctx context.Context) error {
	old, err := s.state(ctx, Trusty)
	if err != nil {
		return err
	}
	if err := s.obey(ctx, "policy-open.yaml", http.StatusOK); err != nil {
		return err
	}
	if err := s.apply(ctx, "short-lived.yaml"); err != nil {
		return err
	}
	var now state
	err = s.eventually(ctx, obeyWait, lookEvery, func(ctx context.Context) (bool, error) {
		var err error
		now, err = s.state(ctx, Trusty)
		return now.Serial != old.Serial, err
	})
	if err != nil {
		return err
	}
	if err := s.check(now.Serial != old.Serial, fmt.Sprintf("the running trusty-service gets new X509-SVIDs again: serial %s after %s", short(now.Serial), short(old.Serial)),
		"another serial number than "+old.Serial, now.Serial); err != nil {
		return err
	}
	if err := s.apply(ctx, "identities.yaml"); err != nil {
		return err
	}
	return s.obey(ctx, "policy.yaml", http.StatusForbidden)
}

// killCA shows the same for the CA.
func (s *show) killCA(ctx context.Context) error {
	s.step("The CA is killed", "Nobody is issued anything without it, and nobody needs to be for a while.")
	s.command(fmt.Sprintf("kill -9 %d", s.ca.cmd.Process.Pid))
	s.ca.kill()
	if err := s.callsGoOn(ctx, "without the CA"); err != nil {
		return err
	}
	said, err := s.crew.run(ctx, s.binary(Utility), "svid", "fetch", "x509")
	if err != nil {
		return err
	}
	if err := s.check(strings.Contains(said, "spiffe://"+trustDomain+"/"+Utility), "a new process of utility-service gets the X509-SVID that the agent holds",
		"an X509-SVID of spiffe://"+trustDomain+"/"+Utility, said); err != nil {
		return err
	}
	s.command("signet ca run --config ca.yaml")
	if err := s.startCA(ctx); err != nil {
		return err
	}
	return s.changeAfterRestart(ctx)
}

func (s *show) changeAfterRestart(ctx context.Context) error {
	if err := s.obey(ctx, "policy-open.yaml", http.StatusOK); err != nil {
		return err
	}
	return s.obey(ctx, "policy.yaml", http.StatusForbidden)
}

// finish looks back.
func (s *show) finish(ctx context.Context) error {
	s.step("At the end", "")
	if err := s.noneFailed(ctx, "through all of this"); err != nil {
		return err
	}
	for _, name := range []string{Documents, Trusty, Utility} {
		if p := s.services[name]; !p.alive() {
			return s.check(false, "the services ran all the time", name+" alive", p.err.Error())
		}
	}
	return s.check(true, "the three services were never restarted", "", "")
}

// A flow is the live traffic as both ends saw it: the serial numbers of the X509-SVIDs that trusty-service and
// documents-service showed each other.
type flow struct {
	traffic
	client, server []string
}

// flow looks at the traffic once at least so many calls have been made.
func (s *show) flow(ctx context.Context, calls int) (flow, error) {
	var f flow
	err := s.eventually(ctx, obeyWait, trafficLook, func(ctx context.Context) (bool, error) {
		err := s.ask(ctx, Trusty, http.MethodGet, "/traffic", &f.traffic)
		return f.Calls >= calls, err
	})
	if err != nil {
		return f, err
	}
	var seen map[string][]string
	if err := s.ask(ctx, Documents, http.MethodGet, "/seen", &seen); err != nil {
		return f, err
	}
	f.client, f.server = seen["/"+Trusty], f.Serials
	return f, nil
}

func (s *show) noneFailed(ctx context.Context, when string) error {
	f, err := s.flow(ctx, 1)
	if err != nil {
		return err
	}
	return s.check(f.Calls > 0 && f.Failed == 0, fmt.Sprintf("%d calls of trusty-service %s, %d failed", f.Calls, when, f.Failed), "no failed call", fmt.Sprintf("%d, the first: %s", f.Failed, f.FirstFailure))
}

// callsGoOn checks that live traffic flows from now on.
func (s *show) callsGoOn(ctx context.Context, when string) error {
	before, err := s.flow(ctx, 0)
	if err != nil {
		return err
	}
	after, err := s.flow(ctx, before.Calls+enough)
	if err != nil {
		return err
	}
	made := after.Calls - before.Calls
	return s.check(made >= enough && after.Failed == 0, fmt.Sprintf("%d calls %s, none failed", made, when),
		fmt.Sprintf("%d calls and no failed one", enough), fmt.Sprintf("%d calls; failed ever: %d, the first: %s", made, after.Failed, after.FirstFailure))
}

// apply runs signet apply in front of the person.
func (s *show) apply(ctx context.Context, file string) error {
	s.command("signet apply -f " + file)
	_, err := s.signet(ctx, "apply", "-f", file)
	return err
}

// eventually looks until it sees what it looks for, or wait is over. The check that follows says which of the two it was.
func (s *show) eventually(ctx context.Context, wait, every time.Duration, look func(context.Context) (bool, error)) error {
	over := time.NewTimer(wait)
	defer over.Stop()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		if seen, err := look(ctx); seen || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-over.C:
			return nil
		case <-tick.C:
		}
	}
}

// short is the end of a serial number: those of one CA begin alike.
func short(serial string) string { return "..." + serial[max(0, len(serial)-6):] }

// shortSerials are serial numbers in the order in which they were seen.
func shortSerials(serials []string) string {
	all := make([]string, len(serials))
	for i, s := range serials {
		all[i] = short(s)
	}
	return strings.Join(all, ", ")
}
