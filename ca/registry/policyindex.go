package registry

import (
	"iter"
	"maps"
	"strings"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// policyIndex finds the policies that speak of a service without looking at all that there are.
type policyIndex struct {
	exact map[string]map[string]*Policy // service ID -> policies that name it, by name
	wild  map[string]map[string]*Policy // what stands before the first wildcard of a service pattern -> policies, by name

	bytes      int            // of all policies
	exactBytes map[string]int // service ID -> bytes of the policies that name it
}

func newPolicyIndex() policyIndex {
	return policyIndex{exact: map[string]map[string]*Policy{}, wild: map[string]map[string]*Policy{}, exactBytes: map[string]int{}}
}

func (x *policyIndex) add(name string, p *Policy) {
	x.bytes += p.bytes
	for _, s := range p.Compiled.Services {
		if before, wild := beforeWildcard(s); wild {
			put(x.wild, before, name, p)
			continue
		}
		if x.exact[s][name] != p { // a service may stand twice in a record
			x.exactBytes[s] += p.bytes
		}
		put(x.exact, s, name, p)
	}
}

func (x *policyIndex) remove(name string, p *Policy) {
	x.bytes -= p.bytes
	for _, s := range p.Compiled.Services {
		if before, wild := beforeWildcard(s); wild {
			drop(x.wild, before, name)
			continue
		}
		if x.exact[s][name] == p {
			if x.exactBytes[s] -= p.bytes; x.exactBytes[s] == 0 {
				delete(x.exactBytes, s)
			}
		}
		drop(x.exact, s, name)
	}
}

// beforeWildcard cuts a service pattern before its first wildcard, which is a whole segment.
func beforeWildcard(service string) (before string, wild bool) {
	before, _, wild = strings.Cut(service, "*")
	return before, wild
}

// wildOver returns the policies with a pattern whose fixed beginning service has too. One that has several comes several times.
func (x *policyIndex) wildOver(service string) iter.Seq2[string, *Policy] {
	return func(yield func(string, *Policy) bool) {
		for i := range len(service) {
			if service[i] != '/' {
				continue
			}
			for name, p := range x.wild[service[:i+1]] {
				if !yield(name, p) {
					return
				}
			}
		}
	}
}

// wildNear returns the policies with a pattern that may match something that begins so, by name.
func (x *policyIndex) wildNear(before string) map[string]*Policy {
	found := maps.Collect(x.wildOver(before))
	for other, policies := range x.wild {
		if strings.HasPrefix(other, before) {
			maps.Copy(found, policies)
		}
	}
	return found
}

// near adds to found the policies that may speak of a service which a service pattern names. It adds some that do not.
func (x *policyIndex) near(service string, found map[string]*Policy) {
	before, wild := beforeWildcard(service)
	if !wild {
		maps.Insert(found, x.wildOver(service))
		maps.Copy(found, x.exact[service])
		return
	}
	maps.Copy(found, x.wildNear(before))
	for other, policies := range x.exact {
		if strings.HasPrefix(other, before) {
			maps.Copy(found, policies)
		}
	}
}

// nearAll is near for the services of several policies, of which some may be nil.
func (x *policyIndex) nearAll(policies iter.Seq[*policyv1.Policy]) map[string]*Policy {
	found, done := map[string]*Policy{}, map[string]bool{}
	for p := range policies {
		for _, s := range p.GetServices() {
			if !done[s] {
				done[s] = true
				x.near(s, found)
			}
		}
	}
	return found
}
