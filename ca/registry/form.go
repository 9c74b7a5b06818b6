package registry

import (
	"fmt"

	"go.yaml.in/yaml/v3"

	"github.com/signet-id/signet/internal/strictyaml"
)

// resourceGroup begins the apiVersion of signet's custom resources.
const resourceGroup = "signet-id.github.io/"

// CheckForm refuses an object of Kubernetes, and says how a custom resource of signet's becomes a document. They are not taken for
// documents: the same name would belong to whoever came first, the file or the cluster, and a CallPolicy of a namespace means less than
// a document does.
func CheckForm(doc strictyaml.Document) error {
	m := mapping(doc.Node)
	version := child(m, "apiVersion")
	if version == nil {
		return nil
	}
	at := where(doc, "apiVersion")
	kind := valueOf(child(m, "kind"))
	if len(version.Value) <= len(resourceGroup) || version.Value[:len(resourceGroup)] != resourceGroup {
		if items := child(m, "items"); items != nil && kind == "List" {
			return fmt.Errorf("%s: apiVersion: this is a List of Kubernetes; signet takes documents, separated by ---, and none of them has an apiVersion ('signet get KIND -o yaml' prints them so)", at)
		}
		return fmt.Errorf("%s: apiVersion %q: this is an object of Kubernetes (kind %q); the documents of signet have a kind, one of %s, and no apiVersion", at, clip(version.Value), clip(kind), kinds)
	}
	name, namespace := valueOf(child(child(m, "metadata"), "name")), valueOf(child(child(m, "metadata"), "namespace"))
	shown, note := kind, ""
	switch {
	case kind == "ClusterCallPolicy":
		shown = KindCallPolicy
	case kind == KindCallPolicy:
		if namespace == "" {
			namespace = "default"
		}
		note = fmt.Sprintf("; as a document it may speak for any service, not only for those of the namespace %q", clip(namespace))
	}
	return fmt.Errorf("%s: apiVersion: this is the custom resource %s %q, which 'kubectl apply' brings to the CA; as a document for signet it begins with \"kind: %s\" and \"name: %s\", without apiVersion and metadata, and what is below spec follows at the top level%s",
		at, clip(kind), clip(name), clip(shown), clip(name), note)
}

// child returns the value of a key of a mapping, nil if there is none.
func child(m *yaml.Node, key string) *yaml.Node {
	if m == nil || m.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(m.Content); i += 2 {
		if m.Content[i].Value == key {
			return m.Content[i+1]
		}
	}
	return nil
}

func valueOf(n *yaml.Node) string {
	if n == nil {
		return ""
	}
	return n.Value
}
