package svidcache

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
)

// maxCRLBytes bounds the CRLs that workloads get, all together: a client of the Workload API takes 4 MiB in one message, and
// one that is refused its message has no SVID.
const maxCRLBytes = 1 << 20

// revocations are what the CA has revoked. They never change.
type revocations struct {
	epoch    string
	byName   map[string]*policyv1.Revocation
	compiled *policy.Revocations // as whoever verifies SVIDs reads them
	serving  *policy.Revocations // as whoever hands them out does
}

func newRevocations(td spiffeid.TrustDomain, epoch string, revision int64, byName map[string]*policyv1.Revocation) *revocations {
	set := &policyv1.RevocationSet{Revision: revision}
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		set.Revocations = append(set.Revocations, byName[name])
	}
	compiled := policy.CompileRevocations(set, td)
	return &revocations{epoch: epoch, byName: byName, compiled: compiled, serving: compiled.Understood()}
}

// next returns r itself if m changes nothing. before is what was there before m, of which r is empty if m is a snapshot.
func (r *revocations) next(td spiffeid.TrustDomain, m *nodev1.FollowResponse, before *revocations) *revocations {
	if !m.GetSnapshot() && len(m.GetRevocations()) == 0 && len(m.GetRemovedRevocations()) == 0 {
		return r
	}
	byName := maps.Clone(r.byName)
	if byName == nil {
		byName = make(map[string]*policyv1.Revocation, len(m.GetRevocations()))
	}
	for _, name := range m.GetRemovedRevocations() {
		delete(byName, name)
	}
	for _, one := range m.GetRevocations() {
		byName[one.GetName()] = one
	}
	if (before.epoch == m.GetEpoch() || len(byName) == 0) && maps.EqualFunc(before.byName, byName, sameRevocation) {
		return before
	}
	return newRevocations(td, m.GetEpoch(), m.GetTo(), byName)
}

// sameRevocation compares the whole: after an older backup of the CA's store was put back, revisions are given once more.
func sameRevocation(a, b *policyv1.Revocation) bool { return a == b || proto.Equal(a, b) }

// missing are the names of those that r has and next has not.
func (r *revocations) missing(next *revocations) (names []string) {
	for _, name := range slices.Sorted(maps.Keys(r.byName)) {
		if next.byName[name] == nil {
			names = append(names, name)
		}
	}
	return names
}

// crls are the CRLs of the own trust domain's X.509 authorities. They never change.
type crls struct {
	byAuthority map[string]*nodev1.CRL
	of          *bundle  // whose authorities they were checked by
	der         [][]byte // those that are handed out
}

// next returns c itself if m changes nothing. before is what was there before m. A CRL that no authority of the bundle has
// signed, or that there is no room for, is left out and told of.
func (c *crls) next(m *nodev1.FollowResponse, own *bundle, before *crls, skipped *[]error) *crls {
	if !m.GetSnapshot() && len(m.GetCrls()) == 0 && len(m.GetRemovedCrls()) == 0 && own == before.of {
		return c
	}
	n := &crls{byAuthority: maps.Clone(c.byAuthority), of: own}
	if n.byAuthority == nil {
		n.byAuthority = make(map[string]*nodev1.CRL, len(m.GetCrls()))
	}
	for _, id := range m.GetRemovedCrls() {
		delete(n.byAuthority, id)
	}
	for _, one := range m.GetCrls() {
		n.byAuthority[one.GetAuthorityId()] = one
	}
	size := 0
	for _, id := range slices.Sorted(maps.Keys(n.byAuthority)) {
		der := n.byAuthority[id].GetCrl()
		err := checkCRL(der, own)
		if size += len(der); err == nil && size > maxCRLBytes {
			err = fmt.Errorf("with it there are %d bytes, more than the %d that clients take", size, maxCRLBytes)
		}
		if err != nil {
			*skipped = append(*skipped, fmt.Errorf("the CRL of authority %q: %w", id, err))
			continue
		}
		n.der = append(n.der, der)
	}
	if sameCRLs(n.der, before.der) {
		n.der = before.der
	}
	return n
}

func sameCRLs(a, b [][]byte) bool { return slices.EqualFunc(a, b, bytes.Equal) }

// checkCRL says whether a CRL is one of an authority of the bundle.
func checkCRL(der []byte, own *bundle) error {
	if len(der) > maxCRLBytes {
		return fmt.Errorf("it has %d bytes, more than the %d that clients take", len(der), maxCRLBytes)
	}
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return err
	}
	for _, authority := range own.x509 {
		if bytes.Equal(authority.SubjectKeyId, list.AuthorityKeyId) && list.CheckSignatureFrom(authority) == nil {
			return nil
		}
	}
	return errors.New("no authority in the bundle has signed it")
}

// userIssuers brings up to date who issues user tokens; nil means that m changes nothing.
func userIssuers(old []*policyv1.UserIssuer, m *nodev1.FollowResponse) []*policyv1.UserIssuer {
	byName := make(map[string]*policyv1.UserIssuer, len(old)+len(m.GetUserIssuers()))
	for _, i := range old {
		byName[i.GetName()] = i
	}
	for _, name := range m.GetRemovedUserIssuers() {
		delete(byName, name)
	}
	for _, i := range m.GetUserIssuers() {
		byName[i.GetName()] = i
	}
	return slices.SortedFunc(maps.Values(byName), func(a, b *policyv1.UserIssuer) int { return cmp.Compare(a.GetName(), b.GetName()) })
}

func sameIssuers(a, b []*policyv1.UserIssuer) bool {
	return slices.EqualFunc(a, b, func(x, y *policyv1.UserIssuer) bool {
		return x == y || proto.Equal(x, y)
	})
}

// revokedFacts is of a certificate what revocations look at.
func revokedFacts(leaf *x509.Certificate) *x509.Certificate {
	return &x509.Certificate{URIs: leaf.URIs, SerialNumber: leaf.SerialNumber, NotBefore: leaf.NotBefore, AuthorityKeyId: leaf.AuthorityKeyId}
}

// revokedID says whether every SVID that could be issued for an entry now is revoked: nobody gets one, and the CA is not
// asked for any.
func (s *state) revokedID(id spiffeid.ID) bool {
	_, found := s.revoked.serving.ID(id)
	return found
}

// judge notes whether r's SVID is revoked. It is called with mu held, for each new state of revocations and each new SVID.
func (r *record) judge(s *state) {
	r.revoked, r.barred = false, s.revokedID(r.entry.spiffeID)
	if r.svid != nil {
		_, r.revoked = s.revoked.serving.X509SVID(r.svid.facts)
	}
}

// takeRevocations brings records up to new revocations. An SVID of which only the serial number is revoked is issued anew,
// with a new key; one of a revoked ID is gone. It is called with mu held.
func (c *Cache) takeRevocations(s *state, now time.Time) {
	for _, r := range c.records {
		was := r.revoked || r.barred
		r.judge(s)
		c.count(r)
		if is := r.revoked || r.barred; is != was {
			r.next = nil // whoever has the old key must not get a new SVID for it
			r.failures, r.retryAt = 0, time.Time{}
			c.check(r, now)
		}
	}
	kick(c.witLane)
	for w := range c.watchers {
		c.kick(w)
	}
}

// unrevoked leaves out the entries whose JWT-SVIDs are revoked, whenever they are issued.
func (c *Cache) unrevoked(entries []*entry) []*entry {
	revoked := c.state.Load().revoked.serving
	return slices.DeleteFunc(entries, func(e *entry) bool {
		_, found := revoked.JWTSVID(e.spiffeID, "", c.config.Now())
		return found
	})
}
