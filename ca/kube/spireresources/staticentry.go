package spireresources

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/spiffe"
)

// clusterStaticEntrySpec is the spec of a ClusterStaticEntry.
type clusterStaticEntrySpec struct {
	SPIFFEID      string          `json:"spiffeID"`
	ParentID      string          `json:"parentID"`
	Selectors     []string        `json:"selectors"`
	FederatesWith []string        `json:"federatesWith"`
	X509SVIDTTL   metav1.Duration `json:"x509SVIDTTL"`
	JWTSVIDTTL    metav1.Duration `json:"jwtSVIDTTL"`
	DNSNames      []string        `json:"dnsNames"`
	Hint          string          `json:"hint"`
	Admin         bool            `json:"admin"`
	Downstream    bool            `json:"downstream"`
	StoreSVID     bool            `json:"storeSVID"`
	ClassName     string          `json:"className"`
}

// A staticEntry is one ClusterStaticEntry that was read.
type staticEntry struct {
	meta  metav1.ObjectMeta
	spec  clusterStaticEntrySpec
	err   error // why there is no entry
	entry *registry.Entry
}

func (c *Config) readStaticEntry(o *unstructured.Unstructured) *staticEntry {
	s := &staticEntry{meta: metaOf(o)}
	if s.err = decodeSpec(o, &s.spec); s.err == nil {
		s.entry, s.err = s.spec.entry()
	}
	if s.err == nil && c.CheckTTL != nil {
		s.err = c.CheckTTL(s.entry.X509TTL, s.entry.JWTTTL)
	}
	return s
}

// entry is the registration entry that the spec says. The registry checks what it means.
func (s *clusterStaticEntrySpec) entry() (*registry.Entry, error) {
	e := &registry.Entry{X509TTL: seconds(s.X509SVIDTTL), JWTTTL: seconds(s.JWTSVIDTTL), DNSNames: s.DNSNames, Hint: s.Hint, Admin: s.Admin, Downstream: s.Downstream, StoreSVID: s.StoreSVID}
	var err error
	if e.SPIFFEID, err = spiffe.ParseID(s.SPIFFEID); err != nil {
		return nil, fmt.Errorf("spiffeID: %w", err)
	}
	if e.ParentID, err = spiffe.ParseID(s.ParentID); err != nil {
		return nil, fmt.Errorf("parentID: %w", err)
	}
	for _, text := range s.Selectors {
		sel, err := spiffe.ParseSelector(text)
		if err != nil {
			return nil, fmt.Errorf("selectors: %w", err)
		}
		e.Selectors = append(e.Selectors, sel)
	}
	if len(e.Selectors) == 0 {
		return nil, errors.New("selectors: there must be one")
	}
	e.FederatesWith, err = trustDomains(s.FederatesWith)
	return e, err
}

// compareMeta says which of two resources goes first where both say the same: the older one.
func compareMeta(a, b *metav1.ObjectMeta) int {
	if c := a.CreationTimestamp.Compare(b.CreationTimestamp.Time); c != 0 {
		return c
	}
	switch {
	case a.DeletionTimestamp == nil && b.DeletionTimestamp != nil:
		return -1
	case a.DeletionTimestamp != nil && b.DeletionTimestamp == nil:
		return 1
	case a.DeletionTimestamp != nil && !a.DeletionTimestamp.Equal(b.DeletionTimestamp):
		return b.DeletionTimestamp.Compare(a.DeletionTimestamp.Time)
	}
	return cmp.Compare(a.UID, b.UID)
}

// federatedTrustDomainSpec is the spec of a ClusterFederatedTrustDomain.
type federatedTrustDomainSpec struct {
	TrustDomain           string `json:"trustDomain"`
	BundleEndpointURL     string `json:"bundleEndpointURL"`
	BundleEndpointProfile struct {
		Type             string `json:"type"`
		EndpointSPIFFEID string `json:"endpointSPIFFEID"`
	} `json:"bundleEndpointProfile"`
	TrustDomainBundle string `json:"trustDomainBundle"`
	ClassName         string `json:"className"`
}

// A federatedTrustDomain is one ClusterFederatedTrustDomain that was read.
type federatedTrustDomain struct {
	meta metav1.ObjectMeta
	spec federatedTrustDomainSpec
	td   spiffeid.TrustDomain
	err  error
}

func readFederatedTrustDomain(o *unstructured.Unstructured) *federatedTrustDomain {
	f := &federatedTrustDomain{meta: metaOf(o)}
	if f.err = decodeSpec(o, &f.spec); f.err == nil {
		if f.td, f.err = spiffe.ParseTrustDomain(f.spec.TrustDomain); f.err != nil {
			f.err = fmt.Errorf("trustDomain: %w", f.err)
		}
	}
	return f
}

// oldest sorts resources so that the one that goes first is first.
func oldest[T any](all []T, meta func(T) *metav1.ObjectMeta) {
	slices.SortStableFunc(all, func(a, b T) int { return compareMeta(meta(a), meta(b)) })
}
