package k8s

import (
	"strconv"
	"strings"

	"github.com/signet-id/signet/spiffe"
)

func selector(kind, value string) spiffe.Selector {
	return spiffe.Selector{Type: Name, Value: kind + ":" + value}
}

// podSelectors are those that all processes of a pod have.
func podSelectors(p *pod) []spiffe.Selector {
	all := append(lastingSelectors(p), selector("pod-image-count", strconv.Itoa(len(p.containers))), selector("pod-init-image-count", strconv.Itoa(len(p.inits))))
	all = append(all, images("pod-image", p.containers)...)
	return append(all, images("pod-init-image", p.inits)...)
}

// comesLater tells of selectors that show what the kubelet has told of containers, all others being known from the pod's beginning.
func comesLater(s spiffe.Selector) bool {
	return strings.HasPrefix(s.Value, "container-") || strings.HasPrefix(s.Value, "pod-image") || strings.HasPrefix(s.Value, "pod-init-image")
}

// lastingSelectors are those of podSelectors that are the same before and after containers start.
func lastingSelectors(p *pod) []spiffe.Selector {
	all := []spiffe.Selector{
		selector("ns", p.namespace), selector("sa", p.serviceAccount), selector("node-name", p.nodeName),
		selector("pod-name", p.name), selector("pod-uid", p.uid),
	}
	for k, v := range p.labels {
		all = append(all, selector("pod-label", k+":"+v))
	}
	for _, o := range p.owners {
		all = append(all, selector("pod-owner", o.kind+":"+o.name), selector("pod-owner-uid", o.kind+":"+o.uid))
	}
	return all
}

// containerSelectors are those of a container.
func containerSelectors(m *member) []spiffe.Selector {
	return append([]spiffe.Selector{selector("container-name", m.name)}, images("container-image", []member{*m})...)
}

// images names each image as the pod does and as the runtime found it, with its digest.
func images(kind string, some []member) []spiffe.Selector {
	var all []spiffe.Selector
	seen := map[string]bool{"": true} // a container that has not started has none
	for _, m := range some {
		for _, image := range []string{m.image, m.imageID} {
			if !seen[image] {
				seen[image] = true
				all = append(all, selector(kind, image))
			}
		}
	}
	return all
}
