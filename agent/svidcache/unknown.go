package svidcache

import (
	"crypto/x509"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// withKept completes a snapshot of a CA that does not know yet which pods there are: what this agent holds of the entries that
// the snapshot calls unknown stays, and with it the policies of their SPIFFE IDs and the bundles that they federate with. The
// CA sends another snapshot once it knows. Without this, each start of a CA would take all pods' identities away. m is not
// changed.
func (s *state) withKept(td spiffeid.TrustDomain, matches func(pattern string, id spiffeid.ID) bool, m *nodev1.FollowResponse) *nodev1.FollowResponse {
	if !m.GetSnapshot() || len(m.GetUnknownEntryPrefixes()) == 0 {
		return m
	}
	named := make(map[string]bool, len(m.GetEntries()))
	for _, e := range m.GetEntries() {
		named[e.GetId()] = true
	}
	var kept []*entry
	s.entries.all(func(id string, e *entry) bool {
		if !named[id] && slices.ContainsFunc(m.GetUnknownEntryPrefixes(), func(p string) bool { return p != "" && strings.HasPrefix(id, p) }) {
			kept = append(kept, e)
		}
		return true
	})
	out := &nodev1.FollowResponse{Format: m.Format, Epoch: m.Epoch, From: m.From, To: m.To, Snapshot: true, Complete: m.Complete, SyncIds: m.SyncIds,
		Entries: slices.Clone(m.Entries), Policies: slices.Clone(m.Policies), PolicyDefaults: m.PolicyDefaults, Bundles: slices.Clone(m.Bundles),
		Revocations: m.Revocations, Crls: m.Crls, UserIssuers: slices.Clone(m.UserIssuers), Position: m.Position}
	for _, e := range kept {
		out.Entries = append(out.Entries, e.message())
		for _, foreign := range e.federatesWith {
			b := s.bundles[foreign]
			if b != nil && foreign != td && !slices.ContainsFunc(out.Bundles, func(m *nodev1.Bundle) bool { return m.GetTrustDomain() == foreign.Name() }) {
				out.Bundles = append(out.Bundles, b.message())
			}
		}
	}
	if s.policies.synced {
		s.keepPolicies(kept, matches, out)
	}
	return out
}

// keepPolicies adds to a snapshot what it does not say of the policies of kept entries' IDs.
func (s *state) keepPolicies(kept []*entry, matches func(pattern string, id spiffeid.ID) bool, out *nodev1.FollowResponse) {
	added := false
	for _, held := range s.policies.sorted {
		at := slices.IndexFunc(out.Policies, func(p *policyv1.Policy) bool { return p.GetName() == held.GetName() })
		if at >= 0 && out.Policies[at].GetRevision() != held.GetRevision() {
			continue // it was changed: whether it is still about these IDs is not known, and an allow must not be made up
		}
		ours := func(services []string) (of []string) {
			for _, pattern := range services {
				if slices.ContainsFunc(kept, func(e *entry) bool { return matches(pattern, e.spiffeID) }) {
					of = append(of, pattern)
				}
			}
			return of
		}
		services := ours(held.GetServices())
		switch {
		case len(services) == 0 && len(ours(held.GetRollout().GetFormer().GetServices())) == 0:
		case at < 0:
			out.Policies, added = append(out.Policies, held), true
		default:
			p := proto.CloneOf(out.Policies[at])
			for _, pattern := range services {
				if !slices.Contains(p.Services, pattern) {
					p.Services = append(p.Services, pattern)
				}
			}
			out.Policies[at] = p
		}
	}
	if !added {
		return
	}
	for _, i := range s.policies.issuers {
		if !slices.ContainsFunc(out.UserIssuers, func(o *policyv1.UserIssuer) bool { return o.GetName() == i.GetName() }) {
			out.UserIssuers = append(out.UserIssuers, i)
		}
	}
}

// message is the entry as the CA sent it. One of a pod makes neither an admin nor a CA below.
func (e *entry) message() *nodev1.Entry {
	m := &nodev1.Entry{Id: e.id, Revision: e.revision, CreatedAt: e.createdAt, SpiffeId: e.spiffeID.String(), Hint: e.hint, Admin: e.privileged,
		JwtIncludeJti: e.includeJTI, DisableX509Prefetch: e.noPrefetch}
	if !e.expiresAt.IsZero() {
		m.ExpiresAt = e.expiresAt.Unix()
	}
	for _, sel := range e.selectors {
		m.Selectors = append(m.Selectors, sel.String())
	}
	for _, foreign := range e.federatesWith {
		m.FederatesWith = append(m.FederatesWith, foreign.Name())
	}
	return m
}

// message is a foreign bundle as the CA sent it, as far as it is used.
func (b *bundle) message() *nodev1.Bundle {
	m := &nodev1.Bundle{TrustDomain: b.trustDomain.Name(), Revision: b.revision}
	for _, cert := range b.x509 {
		m.X509Authorities = append(m.X509Authorities, &nodev1.X509Authority{Certificate: cert.Raw})
	}
	for kid, key := range b.jwt {
		if der, err := x509.MarshalPKIXPublicKey(key); err == nil {
			m.JwtAuthorities = append(m.JwtAuthorities, &nodev1.JWTAuthority{KeyId: kid, PublicKey: der})
		}
	}
	for kid, key := range b.wit {
		if der, err := x509.MarshalPKIXPublicKey(key); err == nil {
			m.WitAuthorities = append(m.WitAuthorities, &nodev1.JWTAuthority{KeyId: kid, PublicKey: der})
		}
	}
	return m
}
