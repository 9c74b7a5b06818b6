package spireresources

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/signet-id/signet/ca/kube/pods"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

// clusterSPIFFEIDSpec is the spec of a ClusterSPIFFEID.
type clusterSPIFFEIDSpec struct {
	SPIFFEIDTemplate          string                `json:"spiffeIDTemplate"`
	TTL                       metav1.Duration       `json:"ttl"`
	JWTTTL                    metav1.Duration       `json:"jwtTtl"`
	DNSNameTemplates          []string              `json:"dnsNameTemplates"`
	WorkloadSelectorTemplates []string              `json:"workloadSelectorTemplates"`
	FederatesWith             []string              `json:"federatesWith"`
	NamespaceSelector         *metav1.LabelSelector `json:"namespaceSelector"`
	PodSelector               *metav1.LabelSelector `json:"podSelector"`
	Admin                     bool                  `json:"admin"`
	Downstream                bool                  `json:"downstream"`
	AutoPopulateDNSNames      bool                  `json:"autoPopulateDNSNames"`
	ClassName                 string                `json:"className"`
	Fallback                  bool                  `json:"fallback"`
	Hint                      string                `json:"hint"`
}

// A clusterSPIFFEID is one that was read. It is never changed in place.
type clusterSPIFFEID struct {
	meta metav1.ObjectMeta
	spec clusterSPIFFEIDSpec
	// err is why it gives nobody anything; the rest of the fields are set if it is nil.
	err error

	id                 *boundTemplate
	dnsNames           []*boundTemplate
	selectors          []*boundTemplate
	federates          []spiffeid.TrustDomain
	namespaces, chosen labels.Selector // nil: all
}

// decodeSpec reads the spec of a resource into its struct.
func decodeSpec(o *unstructured.Unstructured, into any) error {
	text, err := json.Marshal(o.Object["spec"])
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, into); err != nil {
		return fmt.Errorf("spec: %w", err)
	}
	return nil
}

// metaOf keeps of a resource what is looked at later.
func metaOf(o *unstructured.Unstructured) metav1.ObjectMeta {
	return metav1.ObjectMeta{Name: o.GetName(), UID: o.GetUID(), Generation: o.GetGeneration(), ResourceVersion: o.GetResourceVersion(),
		CreationTimestamp: o.GetCreationTimestamp(), DeletionTimestamp: o.GetDeletionTimestamp()}
}

func (c *Config) compile(o *unstructured.Unstructured) *clusterSPIFFEID {
	r := &clusterSPIFFEID{meta: metaOf(o)}
	if r.err = decodeSpec(o, &r.spec); r.err == nil {
		r.err = r.compile(c)
	}
	return r
}

func (r *clusterSPIFFEID) compile(c *Config) (err error) {
	s := &r.spec
	if r.namespaces, err = selector("namespaceSelector", s.NamespaceSelector); err != nil {
		return err
	}
	if r.chosen, err = selector("podSelector", s.PodSelector); err != nil {
		return err
	}
	switch {
	case s.Admin:
		return errors.New("admin: a template must not make admins; write an Identity, or a ClusterStaticEntry, for each one")
	case s.Downstream:
		return errors.New("downstream: a template must not make downstream CAs; write a ClusterStaticEntry for each one")
	case s.SPIFFEIDTemplate == "":
		return errors.New("spiffeIDTemplate is empty")
	case len(s.DNSNameTemplates) > registry.MaxDNSNames:
		return fmt.Errorf("dnsNameTemplates has %d items, at most %d are allowed", len(s.DNSNameTemplates), registry.MaxDNSNames)
	case len(s.WorkloadSelectorTemplates) >= registry.MaxSelectors:
		return fmt.Errorf("workloadSelectorTemplates has %d items, at most %d are allowed", len(s.WorkloadSelectorTemplates), registry.MaxSelectors-1)
	case len(s.FederatesWith) > registry.MaxFederatesWith:
		return fmt.Errorf("federatesWith has %d items, at most %d are allowed", len(s.FederatesWith), registry.MaxFederatesWith)
	case len(s.Hint) > registry.MaxHintBytes:
		return fmt.Errorf("hint has %d bytes, at most %d are allowed", len(s.Hint), registry.MaxHintBytes)
	case s.TTL.Duration < 0 || s.JWTTTL.Duration < 0:
		return errors.New("ttl and jwtTtl must not be negative")
	}
	if c.CheckTTL != nil {
		if err := c.CheckTTL(seconds(s.TTL), seconds(s.JWTTTL)); err != nil {
			return err
		}
	}
	if r.id, err = parseTemplate("spiffeIDTemplate", s.SPIFFEIDTemplate); err != nil {
		return err
	}
	for _, text := range s.DNSNameTemplates {
		t, err := parseTemplate("dnsNameTemplates", text)
		if err != nil {
			return err
		}
		r.dnsNames = append(r.dnsNames, t)
	}
	for _, text := range s.WorkloadSelectorTemplates {
		t, err := parseTemplate("workloadSelectorTemplates", text)
		if err != nil {
			return err
		}
		r.selectors = append(r.selectors, t)
	}
	r.federates, err = trustDomains(s.FederatesWith)
	return err
}

func selector(field string, s *metav1.LabelSelector) (labels.Selector, error) {
	if s == nil {
		return nil, nil
	}
	out, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	return out, nil
}

func trustDomains(names []string) ([]spiffeid.TrustDomain, error) {
	var out []spiffeid.TrustDomain
	for _, n := range names {
		td, err := spiffe.ParseTrustDomain(strings.TrimPrefix(n, "spiffe://"))
		if err != nil {
			return nil, fmt.Errorf("federatesWith: %w", err)
		}
		if !slices.Contains(out, td) {
			out = append(out, td)
		}
	}
	return out, nil
}

// seconds cuts a TTL to whole ones, in which SPIRE's API has it.
func seconds(d metav1.Duration) time.Duration { return d.Truncate(time.Second) }

func (r *clusterSPIFFEID) compare(o *clusterSPIFFEID) int { return compareMeta(&r.meta, &o.meta) }

// revision changes whenever the resource's spec does, also when it is deleted and made anew, and is the same on every
// replica: 32 bits of when it was created, 20 of its generation, 11 of its UID.
func (r *clusterSPIFFEID) revision() store.Revision {
	uid := uint64(14695981039346656037)
	for _, c := range []byte(r.meta.UID) {
		uid = (uid ^ uint64(c)) * 1099511628211
	}
	created := min(max(r.meta.CreationTimestamp.Unix(), 0), 1<<32-1)
	return store.Revision(created<<31 | min(max(r.meta.Generation, 0), 1<<20-1)<<11 | int64(uid>>53))
}

// A set is the ClusterSPIFFEIDs of a cluster, which look at each other: those that are a fallback, and those that make the same
// entry. It is never changed but for what it remembers of the last pod.
type set struct {
	c        *Config
	all      []*clusterSPIFFEID
	services *services
	serial   uint64 // of the resources
	seen     func() // is called when a pod is expanded by a rule
	last     lastPod
}

// A result is what one ClusterSPIFFEID makes of one pod.
type result struct {
	selected bool // it is for the pod
	entry    *registry.Entry
	err      error
	masked   bool // another one makes the same entry
}

func newSet(c *Config, all []*clusterSPIFFEID, services *services, serial uint64, seen func()) *set {
	all = slices.Clone(all)
	slices.SortStableFunc(all, func(a, b *clusterSPIFFEID) int {
		if a.spec.Fallback != b.spec.Fallback {
			if b.spec.Fallback {
				return -1
			}
			return 1
		}
		return a.compare(b)
	})
	return &set{c: c, all: all, services: services, serial: serial, seen: seen}
}

// expand returns what each of s.all makes of the pod.
func (s *set) expand(p *pods.Pod) []result {
	out := make([]result, len(s.all))
	if ignored(s.c.IgnoreNamespaces, p.Namespace) {
		return out
	}
	var data *templateData
	var dataErr error
	applied := false
	first := map[string]int{}
	for i, r := range s.all {
		if r.namespaces != nil && !r.namespaces.Matches(labels.Set(p.NamespaceLabels)) || r.chosen != nil && !r.chosen.Matches(labels.Set(p.Labels)) {
			continue
		}
		out[i].selected = true
		if r.err != nil {
			out[i].err = r.err
			continue
		}
		if r.spec.Fallback && applied {
			continue
		}
		if data == nil && dataErr == nil {
			data, dataErr = s.c.dataOf(p)
		}
		if out[i].err = dataErr; dataErr == nil {
			out[i].entry, out[i].err = s.render(r, p, data)
		}
		if out[i].err != nil {
			continue
		}
		applied = applied || !r.spec.Fallback
		key := out[i].entry.SPIFFEID.String()
		for _, sel := range sortedSelectors(out[i].entry.Selectors) {
			key += "\x00" + sel
		}
		before, twice := first[key]
		switch {
		case !twice:
			first[key] = i
		case s.all[before].compare(r) <= 0:
			out[i].masked, out[i].entry = true, nil
		default: // a fallback that is older
			out[before].masked, out[before].entry = true, nil
			first[key] = i
		}
	}
	return out
}

func sortedSelectors(all []spiffe.Selector) []string {
	var out []string
	for _, s := range all {
		out = append(out, s.String())
	}
	slices.Sort(out)
	return out
}

func ignored(all []*regexp.Regexp, namespace string) bool {
	return slices.ContainsFunc(all, func(r *regexp.Regexp) bool { return r.MatchString(namespace) })
}

func (c *Config) dataOf(p *pods.Pod) (*templateData, error) {
	pod, _ := p.Object.(*corev1.Pod)
	node, _ := p.Node.(*corev1.Node)
	if pod == nil || node == nil {
		return nil, errors.New("the pod or its node is not known yet")
	}
	return &templateData{TrustDomain: c.TrustDomain.Name(), ClusterName: c.Client.Cluster, ClusterDomain: c.ClusterDomain, PodMeta: &pod.ObjectMeta, PodSpec: &pod.Spec,
		NodeMeta: &node.ObjectMeta, NodeSpec: &node.Spec}, nil
}

// render makes the entry, without the selector of the pod itself, which every entry of a pod has.
func (s *set) render(r *clusterSPIFFEID, p *pods.Pod, data *templateData) (*registry.Entry, error) {
	text, err := r.id.execute(data)
	if err != nil {
		return nil, fmt.Errorf("spiffeIDTemplate: %w", err)
	}
	e := &registry.Entry{X509TTL: seconds(r.spec.TTL), JWTTTL: seconds(r.spec.JWTTTL), FederatesWith: r.federates, Hint: r.spec.Hint, Revision: r.revision()}
	if e.SPIFFEID, err = spiffe.ParseWorkloadID(text); err != nil {
		return nil, fmt.Errorf("spiffeIDTemplate: %w", err)
	}
	if e.SPIFFEID.TrustDomain() != s.c.TrustDomain {
		return nil, fmt.Errorf("spiffeIDTemplate: %q is not of the trust domain %q", clipText(text), s.c.TrustDomain.Name())
	}
	for _, t := range r.dnsNames {
		name, err := t.execute(data)
		if err != nil {
			return nil, fmt.Errorf("dnsNameTemplates: %w", err)
		}
		if !slices.Contains(e.DNSNames, name) {
			e.DNSNames = append(e.DNSNames, name)
		}
	}
	if r.spec.AutoPopulateDNSNames {
		for _, name := range s.services.dnsNames(p.UID, p.Namespace, s.c.ClusterDomain) {
			if !slices.Contains(e.DNSNames, name) {
				e.DNSNames = append(e.DNSNames, name)
			}
		}
	}
	for _, t := range r.selectors {
		text, err := t.execute(data)
		if err != nil {
			return nil, fmt.Errorf("workloadSelectorTemplates: %w", err)
		}
		sel, err := spiffe.ParseSelector(text)
		if err != nil {
			return nil, fmt.Errorf("workloadSelectorTemplates: %w", clip(err))
		}
		if !slices.Contains(e.Selectors, sel) {
			e.Selectors = append(e.Selectors, sel)
		}
	}
	return e, nil
}

func clipText(s string) string {
	if len(s) > maxErrorText {
		return s[:maxErrorText] + "..."
	}
	return s
}

func ruleName(r *clusterSPIFFEID) string { return KindClusterSPIFFEID + " " + r.meta.Name }

// A rule is one ClusterSPIFFEID of a set. It implements pods.Rule.
type rule struct {
	set *set
	at  int
}

func (r *rule) Name() string       { return ruleName(r.set.all[r.at]) }
func (r *rule) Created() time.Time { return r.set.all[r.at].meta.CreationTimestamp.Time }

// Expand implements pods.Rule.
func (r *rule) Expand(p *pods.Pod) ([]*registry.Entry, error) {
	r.set.seen()
	got := r.set.last.expand(r.set, p)[r.at]
	if got.entry == nil {
		return nil, got.err
	}
	return []*registry.Entry{got.entry}, nil
}
