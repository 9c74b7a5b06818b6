package spireresources

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-id/signet/ca/kube/pods"
)

// TestDifferences has a row for each way in which a ClusterSPIFFEID does not select a pod.
func TestDifferences(t *testing.T) {
	pod := &pods.Pod{Cluster: "prod", UID: "u", NodeUID: "n", Namespace: "shop", Name: "web-0", Labels: map[string]string{"app": "front", "tier": "web"}, NamespaceLabels: map[string]string{"team": "blue"}}
	in := func(key string, op metav1.LabelSelectorOperator, values ...string) *metav1.LabelSelector {
		return &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: key, Operator: op, Values: values}}}
	}
	label := func(key, value string) *metav1.LabelSelector {
		return &metav1.LabelSelector{MatchLabels: map[string]string{key: value}}
	}
	for _, tt := range []struct {
		name            string
		namespaces, pod *metav1.LabelSelector
		ignore, want    string
	}{
		{name: "it selects all"},
		{name: "it selects this one", namespaces: label("team", "blue"), pod: in("app", metav1.LabelSelectorOpIn, "front", "back")},
		{name: "a label", pod: label("app", "back"), want: "k8s:pod-label:app:back value k8s:pod-label:app:front"},
		{name: "a typing error", pod: label("app", "fornt"), want: "k8s:pod-label:app:fornt typo k8s:pod-label:app:front"},
		{name: "no such label", pod: label("zone", "z"), want: "k8s:pod-label:zone:z absent "},
		{name: "the namespace's", namespaces: label("team", "green"), want: "k8s:ns-label:team:green value k8s:ns-label:team:blue"},
		{name: "none of several", pod: in("tier", metav1.LabelSelectorOpIn, "db", "wbe"), want: "podSelector: tier in (db,wbe) typo k8s:pod-label:tier:web"},
		{name: "one that it must not have", pod: in("tier", metav1.LabelSelectorOpNotIn, "web"), want: "podSelector: tier notin (web) value k8s:pod-label:tier:web"},
		{name: "one that it must have", pod: in("zone", metav1.LabelSelectorOpExists), want: "podSelector: zone absent "},
		{name: "one that there must not be", namespaces: in("team", metav1.LabelSelectorOpDoesNotExist), want: "namespaceSelector: !team value k8s:ns-label:team:blue"},
		{name: "both, and the namespace is passed over", namespaces: label("team", "green"), pod: label("app", "back"), ignore: "^shop$",
			want: "a namespace that ignore_namespaces does not name value k8s:ns:shop; k8s:ns-label:team:green value k8s:ns-label:team:blue; k8s:pod-label:app:back value k8s:pod-label:app:front"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := &clusterSPIFFEID{spec: clusterSPIFFEIDSpec{NamespaceSelector: tt.namespaces, PodSelector: tt.pod, SPIFFEIDTemplate: "spiffe://example.org/x"}}
			c := &Config{}
			if tt.ignore != "" {
				c.IgnoreNamespaces = []*regexp.Regexp{regexp.MustCompile(tt.ignore)}
			}
			if err := r.compile(c); err != nil {
				t.Fatal(err)
			}
			rule := &rule{set: newSet(c, []*clusterSPIFFEID{r}, nil, 1, func() {}), at: 0}
			var lines []string
			for _, d := range rule.Differences(pods.NewSubject(pod)) {
				lines = append(lines, fmt.Sprintf("%s %s %s", d.Want, d.Kind, strings.Join(d.Have, " ")))
			}
			if got := strings.Join(lines, "; "); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}
