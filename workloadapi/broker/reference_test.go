package broker_test

import (
	"math"
	"strings"
	"testing"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/signet-id/signet/workloadapi/broker/internal/brokertest"
)

const pidURL, objectURL = "type.googleapis.com/spiffe.broker.WorkloadPIDReference", "type.googleapis.com/spiffe.broker.KubernetesObjectReference"

func raw(url string, value []byte) *brokerpb.WorkloadReference {
	return &brokerpb.WorkloadReference{Reference: &anypb.Any{TypeUrl: url, Value: value}}
}

// varint is field 1 of a message as a variable-length number.
func varint(n uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), n)
}

func objectRef(t testing.TB, plural, group string, key *brokerpb.KubernetesObjectKey, uid string) *brokerpb.WorkloadReference {
	return pack(t, &brokerpb.KubernetesObjectReference{Type: &brokerpb.KubernetesObjectType{Plural: plural, Group: group}, Key: key, Uid: uid})
}

// TestBrokenReferences: each is InvalidArgument with WORKLOAD_REFERENCE_INVALID, says which field is wrong, and reaches
// neither a process nor a pod.
func TestBrokenReferences(t *testing.T) {
	key := func(ns, name string) *brokerpb.KubernetesObjectKey {
		return &brokerpb.KubernetesObjectKey{Namespace: ns, Name: name}
	}
	own := brokertest.Start(t)
	pidOf := func(extra ...byte) []byte {
		value, err := proto.Marshal(&brokerpb.WorkloadPIDReference{Pid: own.PID})
		if err != nil {
			t.Fatal(err)
		}
		return append(value, extra...)
	}
	foreign, err := anypb.New(wrapperspb.Int32(1))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name  string
		ref   *brokerpb.WorkloadReference
		field string
	}{
		{"BAPI-03 V145 no message", nil, "reference"},
		{"BAPI-03 no Any", &brokerpb.WorkloadReference{}, "reference"},
		{"BAPI-03 empty type_url", raw("", pidOf()), "reference.type_url"},
		{"BAPI-04 V145 unknown type", raw("type.googleapis.com/acme.Foo", pidOf()), "reference.type_url"},
		{"BAPI-04 another standard's type", &brokerpb.WorkloadReference{Reference: foreign}, "reference.type_url"},
		{"BAPI-04 another prefix", raw("example.com/spiffe.broker.WorkloadPIDReference", pidOf()), "reference.type_url"},
		{"BAPI-04 no prefix", raw("spiffe.broker.WorkloadPIDReference", pidOf()), "reference.type_url"},
		{"BAPI-04 a longer type", raw(pidURL+"s", pidOf()), "reference.type_url"},
		{"BAPI-04 a very long type", raw(strings.Repeat("x", 10000), nil), "reference.type_url"},
		{"BAPI-05 cut off", raw(pidURL, []byte{0x08}), "reference.value"},
		{"BAPI-05 trailing garbage", raw(pidURL, pidOf(0xff)), "reference.value"},
		{"BAPI-05 another field behind", raw(pidURL, pidOf(0x10, 0x01)), "reference.value"},
		{"BAPI-05 the other message", raw(objectURL, pidOf()), "reference.value"},
		{"BAPI-05 unknown field inside", raw(objectURL, append(protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), []byte{0x28, 0x01}),
			protowire.AppendString(protowire.AppendTag(nil, 3, protowire.BytesType), podUID)...)), "reference.value"},
		{"BAPI-05 not UTF-8", raw(objectURL, protowire.AppendBytes(protowire.AppendTag(nil, 3, protowire.BytesType), []byte{0xff, 0xfe})), "reference.value"},
		{"BAPI-05 large", raw(pidURL, make([]byte, 4097)), "reference.value"},
		{"BAPI-05 two process ids", raw(pidURL, append(varint(1), pidOf()...)), "pid"},
		{"BAPI-10 zero", pidRef(t, 0), "pid"},
		{"BAPI-10 explicit zero", raw(pidURL, varint(0)), "pid"},
		{"BAPI-10 V145 negative", pidRef(t, -1), "pid"},
		{"BAPI-10 most negative", pidRef(t, math.MinInt32), "pid"},
		{"BAPI-10 beyond 32 bits, which would be cut to the process", raw(pidURL, varint(1<<32+uint64(own.PID))), "pid"},
		{"BAPI-10 longer than needed", raw(pidURL, []byte{0x08, 0x81, 0x00}), "pid"},
		{"BAPI-12 no type", pack(t, &brokerpb.KubernetesObjectReference{Uid: podUID}), "type.plural"},
		{"BAPI-12 no plural", objectRef(t, "", "core", nil, podUID), "type.plural"},
		{"BAPI-12 no group", objectRef(t, "pods", "", key("shop", "checkout"), ""), "type.group"},
		{"BAPI-12 version for a group", objectRef(t, "pods", "v1", key("shop", "checkout"), ""), "type"},
		{"BAPI-13 neither key nor uid", objectRef(t, "pods", "core", nil, ""), "key"},
		{"BAPI-13 key without name", objectRef(t, "pods", "core", key("shop", ""), podUID), "key.name"},
		{"BAPI-13 empty key", objectRef(t, "pods", "core", &brokerpb.KubernetesObjectKey{}, ""), "key.name"},
		{"BAPI-14 pod without namespace", objectRef(t, "pods", "core", key("", "checkout"), ""), "key.namespace"},
		{"BAPI-14 deployment without namespace", objectRef(t, "deployments", "apps", key("", "checkout"), ""), "key.namespace"},
		{"BAPI-14 node with namespace", objectRef(t, "nodes", "core", key("shop", "n1"), ""), "key.namespace"},
		{"BAPI-15 no UUID", objectRef(t, "pods", "core", nil, "abc"), "uid"},
		{"BAPI-15 UUID in braces", objectRef(t, "pods", "core", nil, "{"+podUID[:34]+"}"), "uid"},
		{"BAPI-15 no hyphens", objectRef(t, "pods", "core", nil, strings.ReplaceAll(podUID, "-", "0")), "uid"},
		{"BAPI-15 not hexadecimal", objectRef(t, "pods", "core", nil, "g"+podUID[1:]), "uid"},
		{"BAPI-15 control bytes that look like digits", objectRef(t, "pods", "core", nil, "\x11"+podUID[1:]), "uid"},
		{"BAPI-15 beside a key", objectRef(t, "pods", "core", key("shop", "checkout"), "abc"), "uid"},
		{"a name that is a path", objectRef(t, "pods", "core", key("shop", "../bank/cart"), ""), "key.name"},
		{"a namespace that is a path", objectRef(t, "pods", "core", key("shop/x", "checkout"), ""), "key.namespace"},
		{"a long name", objectRef(t, "pods", "core", key("shop", strings.Repeat("a", 254)), ""), "key.name"},
		{"BAPI-17 a known type that is not resolved here", objectRef(t, "nodes", "core", key("", "n1"), ""), "type"},
		{"BAPI-17 a custom type", objectRef(t, "kustomizations", "kustomize.toolkit.fluxcd.io", nil, podUID), "type"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, src, _, e := onePod(t)
			for name, call := range calls(t, asBroker(t, e, a), tt.ref) {
				err := call(header(t))
				wantInfo(t, err, codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID", map[string]string{"field": tt.field})
				if t.Failed() {
					t.Errorf("%s: %v", name, err)
				}
			}
			src.Look(func() {
				if len(src.Seen) > 0 {
					t.Error("the source was asked about somebody")
				}
			})
		})
	}
}
