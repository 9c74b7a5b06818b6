package k8spsat

import (
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// DefaultAudience is the audience of the tokens of SPIRE's agents.
const DefaultAudience = "spire-server"

// Config names the clusters whose nodes may attest.
type Config struct {
	// Clusters are the clusters by the name that their agents send, which becomes a part of the agents' SPIFFE IDs.
	Clusters map[string]Cluster

	// ServiceAccountDir is where the credentials of the CA's own pod are. Empty: where Kubernetes mounts them.
	ServiceAccountDir string
}

// Cluster says who of one cluster may attest, and how its API server is reached.
type Cluster struct {
	// ServiceAccounts are the service accounts, as namespace:name, whose pods are agents. One at least is needed.
	ServiceAccounts []string
	// Audiences are those of which the token must have one. Default spire-server. The API server's own audience is no
	// good choice: tokens for it are in most pods.
	Audiences []string
	// Kubeconfig is a file that says how to reach the API server. Default: as a pod of that cluster does.
	Kubeconfig string
	// NodeLabels are the keys of those labels of the node that become selectors. Default none.
	NodeLabels []string
	// PodLabels are the keys of those labels of the agent's pod that become selectors. Default none.
	PodLabels []string
	// UsePodUID names agents after their pod's UID instead of their node's.
	UsePodUID bool
}

const (
	maxClusterBytes = 255
	maxLabelKey     = 317 // a prefix of 253 bytes, a slash and a name of 63
)

// Check tells each mistake by its field, without opening anything.
func (c Config) Check(tell func(field, format string, args ...any)) {
	if len(c.Clusters) == 0 {
		tell("clusters", "missing; name at least one cluster")
	}
	for _, name := range slices.Sorted(maps.Keys(c.Clusters)) {
		k := c.Clusters[name]
		bad := func(field, format string, args ...any) { tell("clusters."+name+"."+field, format, args...) }
		if spiffeid.ValidatePathSegment(name) != nil || len(name) > maxClusterBytes {
			tell("clusters", "%q cannot be a cluster's name; it is part of SPIFFE IDs: letters, digits, '.', '-' and '_', at most %d bytes", name, maxClusterBytes)
		}
		if len(k.ServiceAccounts) == 0 {
			bad("service_accounts", "missing; list the agents' service accounts, such as [signet:signet-agent]")
		}
		for _, a := range k.ServiceAccounts {
			if ns, sa, ok := strings.Cut(a, ":"); !ok || !isDNSName(ns) || !isDNSName(sa) {
				bad("service_accounts", "%q is not of the form namespace:name", a)
			}
		}
		for _, a := range k.Audiences {
			if a == "" {
				bad("audiences", "one is empty")
			}
		}
		if k.Kubeconfig != "" && !filepath.IsAbs(k.Kubeconfig) {
			bad("kubeconfig", "%q must be absolute", k.Kubeconfig)
		}
		for _, f := range []struct {
			field string
			keys  []string
		}{{"node_labels", k.NodeLabels}, {"pod_labels", k.PodLabels}} {
			for _, key := range f.keys {
				if key == "" || len(key) > maxLabelKey {
					bad(f.field, "%q is not the key of a label", key)
				}
			}
		}
	}
}

// isDNSName says whether s can be the name of a Kubernetes object that this package asks for, so that it can stand in
// the path of a URL as it is.
func isDNSName(s string) bool {
	const maxName = 253
	if s == "" || len(s) > maxName || s[0] == '.' || s[0] == '-' {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' || r == '.')
	})
}

// isUID says whether s can be the UID of an object and a segment of a SPIFFE ID.
func isUID(s string) bool {
	const maxUID = 128
	return len(s) <= maxUID && spiffeid.ValidatePathSegment(s) == nil
}
