package broker

import (
	"bytes"
	"fmt"
	"strings"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// A ReferenceType says how a workload is named.
type ReferenceType string

const (
	// PID names a process by its id, as the agent counts it.
	PID ReferenceType = "pid"

	// Kubernetes names an object of the cluster that this node belongs to. Pods of this node are understood.
	Kubernetes ReferenceType = "kubernetes"
)

// Bounds of a reference.
const (
	maxReferenceBytes = 4 << 10
	maxNamespaceBytes = 63  // [RFC 1123 label]
	maxNameBytes      = 253 // [RFC 1123 subdomain]
)

// typePrefix is what the standard's references have before the name of their message.
const typePrefix = "type.googleapis.com/"

// A referenceError says what is wrong with a reference. Its text goes to the broker. [Broker API §4.8]
type referenceError struct{ field, text string }

func (e *referenceError) Error() string { return e.field + ": " + e.text }

func badReference(field, format string, args ...any) error {
	return &referenceError{field, fmt.Sprintf(format, args...)}
}

// A reference is one that is well-formed: exactly one of its parts is set.
type reference struct {
	pid int32
	pod *PodReference
}

func (r reference) kind() ReferenceType {
	if r.pod != nil {
		return Kubernetes
	}
	return PID
}

// parseReference checks a reference without resolving it. The error is a referenceError.
func parseReference(w *brokerpb.WorkloadReference) (reference, error) {
	any := w.GetReference()
	switch {
	case any == nil:
		return reference{}, badReference("reference", "missing; name one workload")
	case any.GetTypeUrl() == "":
		return reference{}, badReference("reference.type_url", "empty; pack one of the standard's reference messages")
	case len(any.GetValue()) > maxReferenceBytes:
		return reference{}, badReference("reference.value", "%d bytes long; at most %d are allowed", len(any.GetValue()), maxReferenceBytes)
	}
	name, ok := strings.CutPrefix(any.GetTypeUrl(), typePrefix)
	switch {
	case ok && name == string((&brokerpb.WorkloadPIDReference{}).ProtoReflect().Descriptor().FullName()):
		return parsePID(any.GetValue())
	case ok && name == string((&brokerpb.KubernetesObjectReference{}).ProtoReflect().Descriptor().FullName()):
		return parseObject(any.GetValue())
	}
	return reference{}, badReference("reference.type_url", "%s is no type of reference that is understood here", quoted(any.GetTypeUrl()))
}

func parsePID(value []byte) (reference, error) {
	var m brokerpb.WorkloadPIDReference
	if err := decode(value, &m); err != nil {
		return reference{}, err
	}
	// A number beyond 32 bits is cut short by the decoder, and would name some other process.
	if again, err := proto.Marshal(&m); err != nil || !bytes.Equal(again, value) && m.GetPid() > 0 {
		return reference{}, badReference("pid", "not the encoding of one 32-bit number")
	}
	if m.GetPid() <= 0 {
		return reference{}, badReference("pid", "%d is not positive", m.GetPid())
	}
	return reference{pid: m.GetPid()}, nil
}

// scopes of the Kubernetes types that clients are likely to name, so that the answer tells a wrong namespace from a type
// that is merely not supported.
var clusterScoped = map[string]bool{
	"nodes.core": true, "namespaces.core": true, "persistentvolumes.core": true, "pods.core": false, "serviceaccounts.core": false,
	"deployments.apps": false, "daemonsets.apps": false, "statefulsets.apps": false, "replicasets.apps": false, "jobs.batch": false,
}

func parseObject(value []byte) (reference, error) {
	var m brokerpb.KubernetesObjectReference
	if err := decode(value, &m); err != nil {
		return reference{}, err
	}
	plural, group, key := m.GetType().GetPlural(), m.GetType().GetGroup(), m.GetKey()
	switch {
	case plural == "":
		return reference{}, badReference("type.plural", "empty; give the plural name of the resource, such as pods")
	case group == "":
		return reference{}, badReference("type.group", "empty; give the API group, for the core group the word core")
	case key == nil && m.GetUid() == "":
		return reference{}, badReference("key", "neither key nor uid is set; give at least one")
	case key != nil && key.GetName() == "":
		return reference{}, badReference("key.name", "empty; a key has a name")
	case key != nil && !isName(key.GetName(), maxNameBytes, true):
		return reference{}, badReference("key.name", "%s is no name of a Kubernetes object", quoted(key.GetName()))
	case key.GetNamespace() != "" && !isName(key.GetNamespace(), maxNamespaceBytes, false):
		return reference{}, badReference("key.namespace", "%s is no name of a namespace", quoted(key.GetNamespace()))
	case m.GetUid() != "" && !isUUID(m.GetUid()):
		return reference{}, badReference("uid", "%s is no UUID", quoted(m.GetUid()))
	}
	if cluster, known := clusterScoped[plural+"."+group]; known && key != nil {
		switch {
		case cluster && key.GetNamespace() != "":
			return reference{}, badReference("key.namespace", "set, but %s have no namespace", plural)
		case !cluster && key.GetNamespace() == "":
			return reference{}, badReference("key.namespace", "empty; %s have a namespace", plural)
		}
	}
	if plural != "pods" || group != "core" {
		return reference{}, badReference("type", "%s of group %s are not understood here; name a pod (pods, core)", quoted(plural), quoted(group))
	}
	return reference{pod: &PodReference{Namespace: key.GetNamespace(), Name: key.GetName(), UID: strings.ToLower(m.GetUid())}}, nil
}

// decode reads a message of which everything must be understood: a part that is skipped might have said that another
// workload is meant.
func decode(value []byte, m proto.Message) error {
	if err := proto.Unmarshal(value, m); err != nil {
		return badReference("reference.value", "does not decode as %s", m.ProtoReflect().Descriptor().FullName())
	}
	if hasUnknown(m.ProtoReflect()) {
		return badReference("reference.value", "has fields that %s does not", m.ProtoReflect().Descriptor().FullName())
	}
	return nil
}

// hasUnknown says whether a message, or one in it, has fields that are not in its definition.
func hasUnknown(m protoreflect.Message) bool {
	if len(m.GetUnknown()) > 0 {
		return true
	}
	unknown := false
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if f.Message() != nil && !f.IsList() && !f.IsMap() { // references have no lists
			unknown = unknown || hasUnknown(v.Message())
		}
		return !unknown
	})
	return unknown
}

// isName says whether s is a label of RFC 1123, or labels with dots between.
func isName(s string, most int, dots bool) bool {
	if s == "" || len(s) > most {
		return false
	}
	labels := []string{s}
	if dots {
		labels = strings.Split(s, ".")
	}
	for _, l := range labels {
		if l == "" || l[0] == '-' || l[len(l)-1] == '-' || strings.Trim(l, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			return false
		}
	}
	return true
}

// isUUID says whether s is a UUID as text. [RFC 9562 §4]
func isUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i := range len(s) {
		switch i {
		case 8, 13, 18, 23:
			if s[i] != '-' {
				return false
			}
		default:
			if strings.IndexByte("0123456789abcdefABCDEF", s[i]) < 0 {
				return false
			}
		}
	}
	return true
}

// quoted is text of a request in a message that goes back: not more of it than helps.
func quoted(s string) string {
	const most = 80
	if len(s) > most {
		return fmt.Sprintf("%.*q and more", most, s)
	}
	return fmt.Sprintf("%q", s)
}
