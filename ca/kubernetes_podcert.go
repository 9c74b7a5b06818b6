package ca

import (
	"cmp"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/kube/podcert"
	"github.com/signet-id/signet/ca/nodeattest/k8spsat"
	"github.com/signet-id/signet/ca/registry"
)

// PodCertificates makes the CA the signer signet-id.github.io/x509-svid of the cluster: it answers the
// PodCertificateRequests of kubelets, by the X509-SVIDs that Identities give to pods.
type PodCertificates struct {
	// TTL is how long a certificate lasts whose Identity has no x509TTL; an hour at least, as Kubernetes demands. Default: as
	// ttl.x509 says, if that is an hour or more; else 1h.
	TTL time.Duration `yaml:"ttl"`
}

// checkPodCertificates fills in defaults.
func (c *Config) checkPodCertificates(bad func(field, format string, args ...any)) {
	most := cmp.Or(c.TTL.MaxX509, authority.DefaultMaxX509TTL)
	for name, k := range c.Kubernetes.Clusters {
		p := k.PodCertificates
		if p == nil {
			continue
		}
		if p.TTL == 0 {
			p.TTL = max(c.TTL.X509, podcert.MinLifetime)
		}
		section := "kubernetes.clusters." + name
		if k.Pods == nil {
			bad(section+".pods", "missing; pod_certificates needs the CA's own sight of the pods: set `pods: {}`")
		}
		field := section + ".pod_certificates.ttl"
		switch {
		case p.TTL < podcert.MinLifetime:
			bad(field, "%s is less than the hour that Kubernetes demands", p.TTL)
		case p.TTL > most:
			bad(field, "%s is longer than ttl.max_x509, %s; set that to as much", p.TTL, most)
		}
	}
}

// signPodCertificates makes the CA a signer of the cluster, if the configuration says so.
func (ca *CA) signPodCertificates(c KubernetesCluster, k *kubeCluster) {
	if c.PodCertificates == nil {
		return
	}
	cluster := k.client.Cluster
	s := podcert.New(podcert.Config{Cluster: cluster, Requests: func(ns string) podcert.Requests { return k.client.PodCertificateRequests(ns) }, Pods: ca.pods, TrustDomain: ca.td, Authority: ca.set, Registry: ca.reg, Audit: ca.audit,
		TTL: c.PodCertificates.TTL, Agents: func(nodeUID string) []*registry.Node { return ca.agentsOfNode(cluster, nodeUID) },
		Canary: ca.leaks.CanaryIssued, Issued: ca.metrics.issued, Now: ca.c.Now, Log: ca.log})
	k.leading = append(k.leading, s.Run)
}

// agentsOfNode returns the attested agents of a node of a cluster: one that is named after the node, or, where agents are
// named after their pods, all that attested there.
func (ca *CA) agentsOfNode(cluster, nodeUID string) []*registry.Node {
	if ca.c.NodeAttestors.namesAgentsAfterPods(cluster) {
		return ca.reg.NodesOfPods(cluster, nodeUID)
	}
	id, err := spiffeid.FromPath(ca.td, "/spire/agent/"+k8spsat.Type+"/"+cluster+"/"+nodeUID)
	if err != nil {
		return nil
	}
	n, err := ca.reg.Node(id)
	if err != nil {
		return nil
	}
	return []*registry.Node{n}
}
