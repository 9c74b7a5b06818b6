package ca

import "testing"

// By default pods of the cluster's own namespaces and of the CA's get nothing by ClusterSPIFFEIDs.
func TestIgnoredNamespaces(t *testing.T) {
	for name, want := range map[string]bool{"kube-system": true, "spire-system": true, "identity": true, "shop": false, "identity-tests": false} {
		got := false
		for _, r := range (&KubernetesSPIREResources{}).ignored("identity") {
			got = got || r.MatchString(name)
		}
		if got != want {
			t.Errorf("pods of %s are passed over: %t", name, got)
		}
	}
	for _, r := range (&KubernetesSPIREResources{IgnoreNamespaces: []string{"^shop$"}}).ignored("identity") {
		if r.MatchString("identity") || r.MatchString("kube-system") {
			t.Error("more is passed over than the configuration says")
		}
	}
}
