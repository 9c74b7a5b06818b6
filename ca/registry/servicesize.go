package registry

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/policy"
)

// MaxServiceBytes bounds the compiled policies of one service together: some 150,000 rules that name a caller each. A workload
// gets all policies of its services in one message, of which its reader takes 64 MiB (policy/source): a service that is
// larger would be left without any, so what makes it so is refused when it is applied. What is between the two is room for
// workloads with several SPIFFE IDs, for revocations, for hints, and for the former versions that go with a roll-out.
const MaxServiceBytes = 16 << 20

// ErrServiceTooLarge means that a service would have more policies than its workloads can be sent.
var ErrServiceTooLarge = errors.New("too much for one service")

// ErrCommitTooLarge means that a set is larger than one commit, and fewer documents would not be.
var ErrCommitTooLarge = errors.New("too much for one commit")

// checkServiceSizes refuses a plan that makes the policies of a service larger than that. mu is held.
func (r *Registry) checkServiceSizes(p *Plan) error {
	x, after, added := &r.ix.services, newPolicyIndex(), 0
	for name, pol := range p.policies {
		if pol != nil {
			sized := newPolicy(pol)
			after.add(name, sized)
			added += sized.bytes
		}
	}
	if x.bytes+added <= MaxServiceBytes {
		return nil // all of it together is not too much
	}
	s := &serviceSizes{before: x, after: &after, changed: p.policies, done: map[string]bool{}}
	for _, pol := range p.policies {
		for _, service := range pol.GetServices() {
			if err := s.check(pol, service, added); err != nil {
				return err
			}
		}
	}
	return nil
}

// serviceSizes measures services before and after a plan: after it, what the plan changes counts as it will be.
type serviceSizes struct {
	before, after *policyIndex
	changed       map[string]*policyv1.Policy
	done          map[string]bool
}

func (s *serviceSizes) check(pol *policyv1.Policy, service string, added int) error {
	if s.done[service] {
		return nil
	}
	s.done[service] = true
	begin, wild := beforeWildcard(service)
	if !wild {
		return s.compare(pol, service, func(x *policyIndex, found map[string]*Policy) {
			x.near(service, found)
			maps.DeleteFunc(found, func(_ string, p *Policy) bool { return !speaksOf(p.Compiled, service) })
		})
	}
	// All patterns that may meet this one are the most that a service without a policy of its own can have.
	patterns := 0
	if err := s.compare(pol, service, func(x *policyIndex, found map[string]*Policy) {
		maps.Copy(found, x.wildNear(begin))
		patterns = max(patterns, bytesOf(found))
	}); err != nil {
		return err
	}
	for _, side := range []*policyIndex{s.before, s.after} {
		for named, bytes := range side.exactBytes {
			if strings.HasPrefix(named, begin) && patterns+bytes+added > MaxServiceBytes && speaksOf(pol, named) {
				if err := s.check(pol, named, added); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// compare refuses what gather finds after the plan, if it is too much and more than before.
func (s *serviceSizes) compare(pol *policyv1.Policy, service string, gather func(*policyIndex, map[string]*Policy)) error {
	found := map[string]*Policy{}
	gather(s.before, found)
	before := bytesOf(found)
	maps.DeleteFunc(found, func(name string, _ *Policy) bool { _, changed := s.changed[name]; return changed })
	fresh := map[string]*Policy{}
	gather(s.after, fresh)
	if after := bytesOf(found) + bytesOf(fresh); after > MaxServiceBytes && after > before {
		return tooLarge(pol, service, after)
	}
	return nil
}

func bytesOf(policies map[string]*Policy) int {
	sum := 0
	for _, p := range policies {
		sum += p.bytes
	}
	return sum
}

func speaksOf(p *policyv1.Policy, service string) bool {
	id, err := spiffeid.FromString(service)
	return err == nil && slices.ContainsFunc(p.Services, func(s string) bool { return s == service || policy.ServiceMatches(s, id) })
}

func tooLarge(pol *policyv1.Policy, service string, size int) error {
	return fmt.Errorf("%s:%d: CallPolicy %q: the policies of service %q would have %d bytes in compiled form, %w: at most %d are allowed, for its workloads get them in one message; "+
		"name callers by pattern in place of one by one, or split the service", pol.GetFile(), pol.GetLine(), pol.GetName(), service, size, ErrServiceTooLarge, MaxServiceBytes)
}

// checkCommitSize refuses what is too large for one commit while that can still be told apart from what is wrong with a document.
func (p *Plan) checkCommitSize() error {
	if err := store.CheckCommit(p.checks, p.writes); err != nil {
		return fmt.Errorf("the documents are %w: %w (a document that is too large alone can be several: policies of one service are united)", ErrCommitTooLarge, err)
	}
	return nil
}
