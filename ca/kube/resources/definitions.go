package resources

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/policy"
)

// This file makes the definitions of the custom resources from the schemas of the documents. What CEL rules say here, the
// registry says again: an API server whose definitions are older must not let through what the CA does not expect.

// Group and version of the custom resources.
const (
	Group   = "signet-id.github.io"
	Version = "v1alpha1"
)

// A Kind is one kind of custom resource.
type Kind struct {
	Kind, Plural string
	// Document is the kind of document that one is.
	Document string
	// Namespaced tells that it is of a namespace, and speaks for that alone.
	Namespaced bool

	singular, short, about string
	columns                []column
	rules                  []rule
}

type column struct{ name, path, kind, about string }

// A rule is a validation rule in CEL, at a place in the schema below spec.
type rule struct{ at, rule, message string }

var (
	policyColumns = []column{
		{"Service", ".spec.service", "string", "services that the policy governs"},
		{"Mode", ".spec.mode", "string", ""},
		{"Allow", ".status.allow", "integer", "rules that let calls through"},
		{"Deny", ".status.deny", "integer", "rules that refuse calls"},
	}
	policyRules = []rule{
		{"allow[]", "!(has(self.http) && has(self.grpc))", "http and grpc exclude each other; write a rule for each"},
		{"deny[]", "!(has(self.http) && has(self.grpc))", "http and grpc exclude each other; write a rule for each"},
	}
)

// Kinds are all of them.
var Kinds = []Kind{
	{Kind: "Identity", Plural: "identities", Document: registry.KindIdentity, singular: "identity", short: "sid",
		about: "Identity says which workloads get which SPIFFE ID.",
		columns: []column{
			{"SPIFFE ID", ".spec.spiffeID", "string", ""},
			{"On", ".spec['on','true']", "string", "selectors of the nodes"},
		},
		rules: []rule{
			{"", "!has(self.admin) || !self.admin", "admin: only an operator can make an admin, with 'signet apply'"},
			{"", "!(has(self.on) && has(self.__true__))", "on is there twice: in quotes, and without, which kubectl sends as true; leave one of them"},
			{"", "self.spiffeID.contains('{{') || has(self.match)", "match: an Identity without a template needs selectors, such as k8s:ns:web"},
			{"spiffeID", "self.startsWith('/') || self.startsWith('spiffe://')", "must begin with / (relative to the trust domain) or spiffe://"},
			{"spiffeID", "!self.matches('^(spiffe://[^/]*)?/[^/]*[{][{]')", "the first path segment must be fixed; a template begins behind it"},
			{"spiffeID", "!self.matches('[}][}][^/]*[{][{]')", "a path segment holds one variable at most"},
		}},
	{Kind: "CallPolicy", Plural: "callpolicies", Document: registry.KindCallPolicy, Namespaced: true, singular: "callpolicy", short: "cp",
		about: "CallPolicy says who may call services of its own namespace.", columns: policyColumns, rules: policyRules},
	{Kind: "ClusterCallPolicy", Plural: "clustercallpolicies", Document: registry.KindCallPolicy, singular: "clustercallpolicy", short: "ccp",
		about: "ClusterCallPolicy says who may call services, of any namespace or of none.", columns: policyColumns, rules: policyRules},
	{Kind: "Federation", Plural: "federations", Document: registry.KindFederation, singular: "federation", short: "sfed",
		about: "Federation is the relationship with a foreign trust domain, whose bundle is fetched.",
		columns: []column{
			{"Trust Domain", ".spec.trustDomain", "string", ""},
			{"Profile", ".spec.profile", "string", ""},
			{"URL", ".spec.bundleEndpointURL", "string", ""},
		},
		rules: []rule{
			{"", "self.trustDomain == oldSelf.trustDomain", "trustDomain cannot be changed; delete the Federation and make another one"},
			{"", "self.profile != 'https_spiffe' || has(self.endpointSPIFFEID)", "endpointSPIFFEID: needed with the profile https_spiffe"},
			{"", "self.profile != 'https_web' || !has(self.endpointSPIFFEID)", "endpointSPIFFEID: for the profile https_spiffe only; leave it out"},
			{"bundleEndpointURL", "self.startsWith('https://')", "must begin with https://"},
		}},
	{Kind: "Revocation", Plural: "revocations", Document: registry.KindRevocation, singular: "revocation", short: "srev",
		about: "Revocation withdraws SVIDs before they expire. It stays in force when the resource is deleted; the annotation " + AnnotationLift + " lifts it.",
		columns: []column{
			{"Target", ".status.target", "string", "what is revoked"},
			{"Items", ".status.items", "integer", "what it was compiled into"},
			{"Expires", ".spec.expires", "date", ""},
		},
		rules: []rule{
			{"", "[has(self.id), has(self.serial), has(self.agent), has(self.jti), has(self.authority)].filter(x, x).size() == 1", "exactly one of id, serial, agent, jti and authority must be there"},
			{"", "!has(self.issuedBefore) || has(self.id)", "issuedBefore: goes with id only"},
		}},
}

// Annotations of custom resources.
const (
	// AnnotationYes says what --yes says at the command line, for one generation of a resource: its number.
	AnnotationYes = Group + "/yes"
	// AnnotationLift says, with the value true, that a Revocation is lifted.
	AnnotationLift = Group + "/lift"
)

// Bounds in the schemas. They keep the cost of the CEL rules below what an API server takes, and are far above what anybody
// writes; the size of a whole policy is bounded by the registry.
const (
	maxItems  = 1000
	maxLength = 4096
	maxBundle = 256 << 10
	maxName   = 200
)

// Definitions returns the CustomResourceDefinitions in YAML, by the name of the file.
func Definitions() (map[string][]byte, error) {
	out := map[string][]byte{}
	for _, k := range Kinds {
		d, err := k.definition()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", k.Kind, err)
		}
		var b strings.Builder
		b.WriteString("# Made by `make docs` from the schemas of the documents. Do not edit.\n")
		e := yaml.NewEncoder(&b)
		e.SetIndent(2)
		if err := e.Encode(d); err != nil {
			return nil, err
		}
		out[k.name()+".yaml"] = []byte(b.String())
	}
	return out, nil
}

// name is that of the definition.
func (k Kind) name() string { return k.Plural + "." + Group }

func (k Kind) definition() (map[string]any, error) {
	read := policy.Schema
	if k.Document == registry.KindIdentity || k.Document == registry.KindFederation {
		read = registry.Schema
	}
	text, err := read(k.Document)
	if err != nil {
		return nil, err
	}
	var published map[string]any
	if err := json.Unmarshal(text, &published); err != nil {
		return nil, err
	}
	spec := structural(published)
	for _, field := range []string{"kind", "name"} { // they are kind and metadata.name
		delete(spec["properties"].(map[string]any), field)
	}
	if on, ok := spec["properties"].(map[string]any)["on"].(map[string]any); ok && k.Document == registry.KindIdentity {
		unquoted := maps.Clone(on)
		unquoted["description"] = "The field on, as kubectl and other readers of YAML 1.1 send it when it is written without quotes."
		spec["properties"].(map[string]any)["true"] = unquoted
	}
	required := []any{}
	for _, r := range spec["required"].([]any) {
		if r != "kind" && r != "name" {
			required = append(required, r)
		}
	}
	delete(spec, "required")
	if len(required) > 0 {
		spec["required"] = required
	}
	delete(spec, "oneOf") // a rule says it better
	for _, r := range k.rules {
		at := spec
		for _, step := range strings.FieldsFunc(r.at, func(c rune) bool { return c == '.' }) {
			field, list := strings.CutSuffix(step, "[]")
			at = at["properties"].(map[string]any)[field].(map[string]any)
			if list {
				at = at["items"].(map[string]any)
			}
		}
		have, _ := at["x-kubernetes-validations"].([]any)
		at["x-kubernetes-validations"] = append(have, map[string]any{"rule": r.rule, "message": r.message})
	}
	scope := "Cluster"
	if k.Namespaced {
		scope = "Namespaced"
	}
	return map[string]any{
		"apiVersion": "apiextensions.k8s.io/v1",
		"kind":       "CustomResourceDefinition",
		"metadata":   map[string]any{"name": k.name()},
		"spec": map[string]any{
			"group": Group,
			"scope": scope,
			"names": map[string]any{"kind": k.Kind, "listKind": k.Kind + "List", "plural": k.Plural, "singular": k.singular,
				"shortNames": []any{k.short}, "categories": []any{"signet"}},
			"versions": []any{map[string]any{
				"name": Version, "served": true, "storage": true,
				"subresources":             map[string]any{"status": map[string]any{}},
				"additionalPrinterColumns": k.printerColumns(),
				"schema": map[string]any{"openAPIV3Schema": map[string]any{
					"type": "object", "description": k.about, "required": []any{"spec"},
					"x-kubernetes-validations": []any{map[string]any{"rule": fmt.Sprintf("self.metadata.name.size() <= %d", maxName), "message": fmt.Sprintf("metadata.name: at most %d characters", maxName)}},
					"properties": map[string]any{
						"apiVersion": map[string]any{"type": "string"},
						"kind":       map[string]any{"type": "string"},
						"metadata":   map[string]any{"type": "object"},
						"spec":       spec,
						"status":     k.status(),
					},
				}},
			}},
		},
	}, nil
}

// printerColumns are what kubectl get shows: the kind's own columns, and those that all have.
func (k Kind) printerColumns() []any {
	var columns []any
	for _, c := range append(slices.Clone(k.columns), []column{
		{"Accepted", `.status.conditions[?(@.type=="Accepted")].status`, "string", "whether it is in force as it is written here"},
		{"Reason", `.status.conditions[?(@.type=="Accepted")].reason`, "string", ""},
		{"Age", ".metadata.creationTimestamp", "date", ""},
	}...) {
		column := map[string]any{"name": c.name, "jsonPath": c.path, "type": c.kind}
		if c.about != "" {
			column["description"] = c.about
		}
		columns = append(columns, column)
	}
	return columns
}

// structural turns a JSON Schema of ours into what an API server takes. Unknown fields are kept, not dropped in silence: the CA
// refuses them, where a rule without its mistyped restriction would allow more than was meant.
func structural(in map[string]any) map[string]any {
	out := map[string]any{}
	if d := in["description"]; d != nil {
		out["description"] = d
	}
	if _, either := in["oneOf"]; either && in["type"] == nil { // one or a list, which a structural schema cannot say
		out["x-kubernetes-preserve-unknown-fields"] = true
		return out
	}
	out["type"] = in["type"]
	switch in["type"] {
	case "object":
		out["x-kubernetes-preserve-unknown-fields"] = true
		properties := map[string]any{}
		for name, p := range in["properties"].(map[string]any) {
			properties[name] = structural(p.(map[string]any))
			if name == "bundle" {
				properties[name].(map[string]any)["maxLength"] = maxBundle
			}
		}
		out["properties"] = properties
		for _, also := range []string{"required", "minProperties"} {
			if v := in[also]; v != nil {
				out[also] = v
			}
		}
	case "array":
		out["items"] = structural(in["items"].(map[string]any))
		out["maxItems"] = maxItems
		if v := in["minItems"]; v != nil {
			out["minItems"] = v
		}
	case "string":
		if v := in["enum"]; v != nil {
			out["enum"] = v
		} else {
			out["maxLength"] = maxLength
		}
	}
	return out
}

func (k Kind) status() map[string]any {
	text := func(about string) map[string]any { return map[string]any{"type": "string", "description": about} }
	number := func(about string) map[string]any {
		return map[string]any{"type": "integer", "format": "int64", "description": about}
	}
	properties := map[string]any{
		"observedGeneration": number("The generation that the conditions are about."),
		"revision":           number("The revision of the CA's store at which the document was written."),
		"document":           text("The name of the document, as the signet command shows it."),
		"conditions": map[string]any{
			"type": "array", "description": "Accepted tells whether it is in force as it is written here.",
			"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": []any{"type"},
			"items": map[string]any{
				"type": "object", "required": []any{"type", "status", "reason", "message", "lastTransitionTime"},
				"properties": map[string]any{
					"type":               map[string]any{"type": "string"},
					"status":             map[string]any{"type": "string", "enum": []any{"True", "False", "Unknown"}},
					"reason":             map[string]any{"type": "string"},
					"message":            map[string]any{"type": "string"},
					"observedGeneration": map[string]any{"type": "integer", "format": "int64"},
					"lastTransitionTime": map[string]any{"type": "string", "format": "date-time"},
				},
			},
		},
	}
	switch k.Document {
	case registry.KindCallPolicy:
		maps.Copy(properties, map[string]any{"allow": number("How many rules let calls through."), "deny": number("How many rules refuse calls.")})
	case registry.KindRevocation:
		maps.Copy(properties, map[string]any{"target": text("What is revoked, in a few words."), "items": number("How many revocations it was compiled into.")})
	}
	return map[string]any{"type": "object", "properties": properties}
}
