package brokerclient

import (
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-id/signet/spiffe"
)

// X509 is what there is for one workload: all of it, and nothing of any other.
type X509 struct {
	// SVIDs has the default identity first. Their Hint says what each is for; no two have the same hint but "".
	SVIDs []*x509svid.SVID

	// Bundles are the workload's own trust domain's and those that it federates with.
	Bundles *x509bundle.Set
}

// Default is the identity to use where nothing says which. [Broker API §5.3]
func (x X509) Default() *x509svid.SVID { return x.SVIDs[0] }

// X509Bundles are the X.509 bundles of one workload.
type X509Bundles struct{ Set *x509bundle.Set }

// JWTBundles are the JWT bundles of one workload.
type JWTBundles struct{ Set *jwtbundle.Set }

// A JWTSVID is one token of a workload. It is not verified: the recipient does that.
type JWTSVID = jwtsvid.SVID

// x509FromMessage makes a state of the message alone: what it does not have is not there any more. [Broker API §4.5]
func x509FromMessage(m *brokerpb.SubscribeToX509SVIDResponse) (X509, error) {
	if len(m.GetSvids()) == 0 {
		return X509{}, errors.New("svids is empty")
	}
	x := X509{Bundles: x509bundle.NewSet()}
	hints := map[string]bool{}
	for i, s := range m.GetSvids() {
		id, err := spiffe.ParseWorkloadID(s.GetSpiffeId())
		if err != nil {
			return X509{}, fmt.Errorf("svids[%d].spiffe_id: %w", i, err)
		}
		if len(s.GetX509Svid()) == 0 || len(s.GetX509SvidKey()) == 0 || len(s.GetBundle()) == 0 {
			return X509{}, fmt.Errorf("svids[%d]: x509_svid, x509_svid_key or bundle of %q is empty", i, id)
		}
		svid, err := x509svid.ParseRaw(s.GetX509Svid(), s.GetX509SvidKey())
		if err != nil {
			return X509{}, fmt.Errorf("svids[%d]: %w", i, err)
		}
		if svid.ID != id {
			return X509{}, fmt.Errorf("svids[%d]: the SVID of %q is called %q", i, svid.ID, id)
		}
		bundle, err := x509bundle.ParseRaw(id.TrustDomain(), s.GetBundle())
		if err != nil || bundle.Empty() {
			return X509{}, fmt.Errorf("svids[%d].bundle: no authority in it: %w", i, errors.Join(err))
		}
		x.Bundles.Add(bundle)
		if hint := s.GetHint(); hint != "" {
			if hints[hint] {
				continue // the first of them counts [Broker API §5.2.1]
			}
			hints[hint] = true
			svid.Hint = hint
		}
		x.SVIDs = append(x.SVIDs, svid)
	}
	if err := addX509(x.Bundles, m.GetFederatedBundles()); err != nil {
		return X509{}, fmt.Errorf("federated_bundles: %w", err)
	}
	return x, nil
}

func x509BundlesFromMessage(m *brokerpb.SubscribeToX509BundlesResponse) (X509Bundles, error) {
	if len(m.GetBundles()) == 0 {
		return X509Bundles{}, errors.New("bundles is empty")
	}
	set := x509bundle.NewSet()
	if err := addX509(set, m.GetBundles()); err != nil {
		return X509Bundles{}, fmt.Errorf("bundles: %w", err)
	}
	return X509Bundles{set}, nil
}

func addX509(set *x509bundle.Set, bundles map[string][]byte) error {
	for name, raw := range bundles {
		td, err := trustDomainOf(name)
		if err != nil {
			return err
		}
		bundle, err := x509bundle.ParseRaw(td, raw)
		if err != nil {
			return fmt.Errorf("the bundle of %q: %w", td.Name(), err)
		}
		set.Add(bundle)
	}
	return nil
}

func jwtBundlesFromMessage(m *brokerpb.SubscribeToJWTBundlesResponse) (JWTBundles, error) {
	if len(m.GetBundles()) == 0 {
		return JWTBundles{}, errors.New("bundles is empty")
	}
	set := jwtbundle.NewSet()
	for name, raw := range m.GetBundles() {
		td, err := trustDomainOf(name)
		if err != nil {
			return JWTBundles{}, err
		}
		bundle, err := jwtbundle.Parse(td, raw)
		if err != nil {
			return JWTBundles{}, fmt.Errorf("bundles: the bundle of %q: %w", td.Name(), err)
		}
		set.Add(bundle)
	}
	return JWTBundles{set}, nil
}

// trustDomainOf reads a key of a map of bundles, which is the SPIFFE ID of a trust domain.
func trustDomainOf(key string) (spiffeid.TrustDomain, error) {
	id, err := spiffe.ParseID(key)
	if err != nil || id.Path() != "" {
		return spiffeid.TrustDomain{}, fmt.Errorf("%.100q is not the SPIFFE ID of a trust domain", key)
	}
	return id.TrustDomain(), nil
}

// jwtFromMessage checks that the answer is to the question. The errors are not the server's status.
func jwtFromMessage(m *brokerpb.FetchJWTSVIDResponse, id spiffeid.ID, audience []string) ([]JWTSVID, error) {
	if len(m.GetSvids()) == 0 {
		return nil, errors.New("the Broker API's answer has no JWT-SVID")
	}
	hints := map[string]bool{}
	var svids []JWTSVID
	for i, s := range m.GetSvids() {
		svid, err := jwtsvid.ParseInsecure(s.GetSvid(), audience)
		if err != nil {
			return nil, fmt.Errorf("the Broker API's answer: svids[%d]: %w", i, err)
		}
		if svid.ID.String() != s.GetSpiffeId() || !id.IsZero() && svid.ID != id || !sameAudience(svid.Audience, audience) {
			return nil, fmt.Errorf("the Broker API's answer: svids[%d] is for %q and the audience %q, which was not asked for", i, svid.ID, svid.Audience)
		}
		if hint := s.GetHint(); hint != "" {
			if hints[hint] {
				continue
			}
			hints[hint] = true
			svid.Hint = hint
		}
		svids = append(svids, *svid)
	}
	return svids, nil
}

func sameAudience(a, b []string) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(slices.Compact(a), slices.Compact(b))
}

// without says whether x lacks something that before had: an identity, a trust domain or an authority. Then what is held of
// it must not be used for another moment.
func (x X509) without(before X509) bool {
	for _, old := range before.SVIDs {
		if !slices.ContainsFunc(x.SVIDs, func(s *x509svid.SVID) bool { return s.ID == old.ID && s.Hint == old.Hint }) {
			return true
		}
	}
	return X509Bundles{x.Bundles}.without(X509Bundles{before.Bundles})
}

func (b X509Bundles) without(before X509Bundles) bool {
	for _, old := range before.Set.Bundles() {
		now, ok := b.Set.Get(old.TrustDomain())
		if !ok {
			return true
		}
		for _, authority := range old.X509Authorities() {
			if !now.HasX509Authority(authority) {
				return true
			}
		}
	}
	return false
}

func (b JWTBundles) without(before JWTBundles) bool {
	for _, old := range before.Set.Bundles() {
		now, ok := b.Set.Get(old.TrustDomain())
		if !ok {
			return true
		}
		for kid := range old.JWTAuthorities() {
			if !now.HasJWTAuthority(kid) {
				return true
			}
		}
	}
	return false
}
