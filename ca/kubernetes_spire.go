package ca

import (
	"context"
	"regexp"
	"slices"
	"strings"

	"github.com/signet-id/signet/ca/adminapi"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/kube/spireresources"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/internal/strictyaml"
)

// KubernetesSPIREResources says that the custom resources of spire-controller-manager in a cluster are read: ClusterSPIFFEIDs give pods their
// identities, ClusterStaticEntries are registration entries and ClusterFederatedTrustDomains federation relationships.
type KubernetesSPIREResources struct {
	// Kinds are those that are read: ClusterSPIFFEID (which needs pods), ClusterStaticEntry, ClusterFederatedTrustDomain. Default: all.
	Kinds []string `yaml:"kinds"`
	// ClassName is the class of resources that are read, as in spire-controller-manager's className. Default: none, and resources
	// without a class are read.
	ClassName string `yaml:"class_name"`
	// WatchClassless reads resources without a class, too, where class_name is set. Default: false.
	WatchClassless bool `yaml:"watch_classless"`
	// ClusterDomain is the domain of the cluster's DNS names. Default: cluster.local.
	ClusterDomain string `yaml:"cluster_domain"`
	// IgnoreNamespaces are regular expressions of namespaces whose pods get nothing by ClusterSPIFFEIDs. They match anywhere in the
	// name unless they have ^ and $. Default: kube-system, kube-public, spire-system, and the CA's own namespace.
	IgnoreNamespaces []string `yaml:"ignore_namespaces"`
}

const maxIgnoredNamespaces = 100

func (s *KubernetesSPIREResources) check(field string, pods bool, bad func(field, format string, args ...any)) {
	if s == nil {
		return
	}
	for _, k := range s.Kinds {
		if !slices.Contains(spireresources.Kinds, k) {
			bad(field+".kinds", "%q is not one of %s", k, strings.Join(spireresources.Kinds, ", "))
		}
	}
	if s.reads(spireresources.KindClusterSPIFFEID) && !pods {
		bad(field, "ClusterSPIFFEIDs need the cluster's pods; set pods: {} beside it, or leave ClusterSPIFFEID out of kinds")
	}
	if len(s.IgnoreNamespaces) > maxIgnoredNamespaces {
		bad(field+".ignore_namespaces", "has %d items, at most %d are allowed", len(s.IgnoreNamespaces), maxIgnoredNamespaces)
	}
	for _, text := range s.IgnoreNamespaces {
		if _, err := regexp.Compile(text); err != nil {
			bad(field+".ignore_namespaces", "%q is not a regular expression: %v", text, err)
		}
	}
}

func (s *KubernetesSPIREResources) reads(kind string) bool {
	return len(s.Kinds) == 0 || slices.Contains(s.Kinds, kind)
}

// ignored are the namespaces that ClusterSPIFFEIDs pass over; own is the CA's.
func (s *KubernetesSPIREResources) ignored(own string) []*regexp.Regexp {
	texts := s.IgnoreNamespaces
	if texts == nil {
		texts = []string{"kube-system", "kube-public", "spire-system", "^" + regexp.QuoteMeta(own) + "$"}
	}
	var out []*regexp.Regexp
	for _, text := range texts {
		if r, err := regexp.Compile(text); err == nil { // check has looked
			out = append(out, r)
		}
	}
	return out
}

// readSPIREResources adds what reads the resources of spire-controller-manager in a cluster.
func (ca *CA) readSPIREResources(c KubernetesCluster, k *kubeCluster) {
	s := c.SPIREResources
	if s == nil {
		return
	}
	domain := s.ClusterDomain
	if domain == "" {
		domain = "cluster.local"
	}
	r := spireresources.New(spireresources.Config{Client: k.client, TrustDomain: ca.td, Registry: ca.reg, Expander: ca.pods, Kinds: s.Kinds, ClassName: s.ClassName, WatchClassless: s.WatchClassless,
		ClusterDomain: domain, IgnoreNamespaces: s.ignored(k.namespace), CheckTTL: ca.checkTTL, Actor: registry.ServerID(ca.td).String(), Now: ca.c.Now, Log: ca.log.With("cluster", k.client.Cluster), Events: k.events,
		Apply: func(ctx context.Context, docs []strictyaml.Document, o registry.Options, actor func(registry.Ref) string) error {
			// Whoever changes the resource means it: it has no place for a yes.
			_, _, err := ca.admin.ApplySource(ctx, adminapi.Source{Name: "kubernetes/" + k.client.Cluster, Actor: actor}, docs, o, true)
			return err
		},
		Telling:  func(p map[string]uint64) { ca.reg.Telling(k.client.Cluster, p) },
		Followed: func(p map[string]uint64) { ca.reg.Followed(k.client.Cluster, p) },
		Audit: func(ctx context.Context, records ...auditlog.Record) error {
			return ca.audit.Append(ctx, auditlog.New, records...)
		}})
	k.parts = append(k.parts, r.Run)
	k.leading = append(k.leading, r.Lead)
	k.ails = append(k.ails, r.Problems)
}

// ownerGone tells whether the resources to which an entry belongs are not read any more, so that somebody else may change it.
func (ca *CA) ownerGone(owner string) bool {
	for name, c := range ca.c.Kubernetes.Clusters {
		if c.SPIREResources != nil && c.SPIREResources.reads(spireresources.KindClusterStaticEntry) && strings.HasPrefix(owner, spireresources.Source(name)+"/") {
			return false
		}
	}
	return true
}
