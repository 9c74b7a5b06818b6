package resources

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"unicode"

	"go.yaml.in/yaml/v3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/internal/strictyaml"
)

// resource is what an API server calls the kind.
func (k Kind) resource() schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: Group, Version: Version, Resource: k.Plural}
}

// A wanted is the document that one custom resource is.
type wanted struct {
	kind *Kind
	obj  *unstructured.Unstructured
	ref  registry.Ref
	file string // such as kubernetes/prod/CallPolicy/web/documents
	doc  strictyaml.Document
	err  error // why there is no document
}

// source names one resource of a cluster, in the audit log and as the file of its document.
func source(cluster string, k *Kind, obj metav1.Object) string {
	if ns := obj.GetNamespace(); ns != "" {
		return fmt.Sprintf("kubernetes/%s/%s/%s/%s", cluster, k.Kind, ns, obj.GetName())
	}
	return fmt.Sprintf("kubernetes/%s/%s/%s", cluster, k.Kind, obj.GetName())
}

// documentName is the name of the document that a resource is. Those of a namespace are named by cluster and namespace as well,
// so that namespaces and clusters do not meet; no name of Kubernetes holds an underscore.
func documentName(cluster string, obj metav1.Object) string {
	if ns := obj.GetNamespace(); ns != "" {
		return cluster + "_" + ns + "_" + obj.GetName()
	}
	return obj.GetName()
}

// read makes the document of a resource. Its fields are in order of name, so that the same resource is always the same text.
func read(cluster string, k *Kind, obj *unstructured.Unstructured) *wanted {
	w := &wanted{kind: k, obj: obj, ref: registry.Ref{Kind: k.Document, Name: documentName(cluster, obj)}, file: source(cluster, k, obj)}
	if w.err = registry.CheckName(w.ref.Name); w.err != nil {
		w.err = fmt.Errorf("metadata.name: the document would be called %q: %w", w.ref.Name, w.err)
		return w
	}
	spec, ok := obj.Object["spec"].(map[string]any)
	if !ok {
		w.err = errors.New("spec is missing")
		return w
	}
	if w.err = check(spec); w.err != nil {
		return w
	}
	for _, field := range []string{"kind", "name"} {
		if _, found := spec[field]; found {
			w.err = fmt.Errorf("spec.%s: unknown field; the resource's own kind and metadata.name count", field)
			return w
		}
	}
	// YAML 1.1, which kubectl reads, takes the key `on` for true.
	if on, found := spec["true"]; found && k.Document == registry.KindIdentity {
		if _, twice := spec["on"]; twice {
			w.err = errors.New("spec.on is there twice, once as \"true\": kubectl takes `on` without quotes for true; write \"on\" in quotes")
			return w
		}
		spec = maps.Clone(spec)
		delete(spec, "true")
		spec["on"] = on
	}
	var content bytes.Buffer
	fmt.Fprintf(&content, "kind: %s\nname: %s\n", w.ref.Kind, strconv.Quote(w.ref.Name))
	if len(spec) > 0 {
		e := yaml.NewEncoder(&content)
		e.SetIndent(2)
		if w.err = e.Encode(spec); w.err != nil {
			return w
		}
	}
	docs, err := strictyaml.Split(content.Bytes(), w.file, 1)
	switch {
	case err != nil:
		w.err = err
	case len(docs) != 1:
		w.err = fmt.Errorf("it is %d documents", len(docs))
	default:
		w.doc = docs[0]
	}
	return w
}

// maxNodes bounds the keys and values of a spec. A policy of a thousand rules has a tenth of it.
const maxNodes = 50_000

// check refuses a spec of which the text would be too large or too deep, before there is a text: one that is nothing but nested
// has thousands of times its bytes in YAML.
func check(spec map[string]any) error {
	nodes, size := 0, 0
	var walk func(v any, depth int) error
	walk = func(v any, depth int) error {
		nodes++
		size += 2 * depth
		switch v := v.(type) {
		case string:
			size += len(v) + 2*depth*strings.Count(v, "\n") // each of its lines is set in
		case map[string]any:
			for k, x := range v {
				size += len(k)
				nodes++
				if err := walk(x, depth+1); err != nil {
					return err
				}
			}
		case []any:
			for _, x := range v {
				if err := walk(x, depth+1); err != nil {
					return err
				}
			}
		}
		switch {
		case depth > strictyaml.MaxDepth:
			return fmt.Errorf("spec: nested deeper than %d levels", strictyaml.MaxDepth)
		case nodes > maxNodes:
			return fmt.Errorf("spec: more than %d keys and values; make several resources of it", maxNodes)
		case size > strictyaml.MaxDocument:
			return fmt.Errorf("spec: its text has more than %d bytes; make several resources of it", strictyaml.MaxDocument)
		}
		return nil
	}
	return walk(spec, 0)
}

// explain turns an error about a document into what the author of a resource can use: with fields of the resource instead of places
// in a text that he never saw.
func explain(w *wanted, err error) string {
	text := err.Error()
	var out strings.Builder
	for {
		before, rest, found := strings.Cut(text, w.file+":")
		out.WriteString(before)
		if !found {
			break
		}
		line, rest := number(rest)
		column, rest := number(rest)
		if at := fieldAt(w.doc.Node, line, column, ""); at != "" {
			out.WriteString("spec." + at + ": ")
		}
		text = strings.TrimPrefix(rest, " ")
	}
	// Who writes a resource chooses its keys, and others show the message on their terminals.
	message := strings.Map(func(r rune) rune {
		if r == '\n' || unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, out.String())
	const most = 4096
	if len(message) > most {
		return strings.ToValidUTF8(message[:most], "") + " ..."
	}
	return message
}

// number takes a number and the colon behind it off.
func number(s string) (n int, rest string) {
	end := 0
	for end < len(s) && s[end] >= '0' && s[end] <= '9' {
		end++
	}
	n, _ = strconv.Atoi(s[:end])
	return n, strings.TrimPrefix(s[end:], ":")
}

// fieldAt returns the path of the key or value that begins at a place of a document; nothing for kind and name, which are no fields
// of a resource's spec, and for the document itself.
func fieldAt(n *yaml.Node, line, column int, path string) string {
	if n == nil {
		return ""
	}
	if path != "" && n.Line == line && n.Column == column {
		return path
	}
	for i, c := range n.Content {
		at := path
		switch n.Kind {
		case yaml.MappingNode:
			if i%2 == 0 {
				continue
			}
			key := n.Content[i-1]
			if path == "" && (key.Value == "kind" || key.Value == "name") {
				continue
			}
			if at = strings.TrimPrefix(path+"."+key.Value, "."); key.Line == line && key.Column == column {
				return at
			}
		case yaml.SequenceNode:
			at = fmt.Sprintf("%s[%d]", path, i)
		}
		if found := fieldAt(c, line, column, at); found != "" {
			return found
		}
	}
	return ""
}
