package broker

import (
	"errors"
	"testing"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// FuzzBAPI_05_Reference: a reference names one thing that is well-formed, and what was read of it says the same when it is
// written again; or the error is of the kind that the broker is told.
func FuzzBAPI_05_Reference(f *testing.F) {
	for _, m := range []proto.Message{
		&brokerpb.WorkloadPIDReference{Pid: 7}, &brokerpb.WorkloadPIDReference{Pid: -7},
		&brokerpb.KubernetesObjectReference{Type: &brokerpb.KubernetesObjectType{Plural: "pods", Group: "core"}, Uid: "A1b2c3d4-e5f6-7890-abcd-ef1234567890"},
		&brokerpb.KubernetesObjectReference{Type: &brokerpb.KubernetesObjectType{Plural: "pods", Group: "core"}, Key: &brokerpb.KubernetesObjectKey{Namespace: "shop", Name: "cart.1"}},
	} {
		packed, err := anypb.New(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(packed.TypeUrl, packed.Value)
		f.Add(packed.TypeUrl, append(packed.Value, 0))
	}
	f.Fuzz(func(t *testing.T, url string, value []byte) {
		ref, err := parseReference(&brokerpb.WorkloadReference{Reference: &anypb.Any{TypeUrl: url, Value: value}})
		if err != nil {
			if bad := (*referenceError)(nil); !errors.As(err, &bad) || bad.field == "" || bad.text == "" || len(bad.text) > 1000 {
				t.Errorf("error %v is not one that the broker is told", err)
			}
			return
		}
		var again proto.Message
		switch {
		case ref.pod == nil:
			if ref.pid <= 0 {
				t.Fatalf("process id %d is taken", ref.pid)
			}
			again = &brokerpb.WorkloadPIDReference{Pid: ref.pid}
		case ref.pid != 0 || ref.pod.Name == "" && ref.pod.UID == "" || (ref.pod.Name == "") != (ref.pod.Namespace == "") || ref.pod.UID != "" && !isUUID(ref.pod.UID):
			t.Fatalf("%+v %+v is taken", ref, ref.pod)
		default:
			object := &brokerpb.KubernetesObjectReference{Type: &brokerpb.KubernetesObjectType{Plural: "pods", Group: "core"}, Uid: ref.pod.UID}
			if ref.pod.Name != "" {
				object.Key = &brokerpb.KubernetesObjectKey{Namespace: ref.pod.Namespace, Name: ref.pod.Name}
			}
			again = object
		}
		packed, err := anypb.New(again)
		if err != nil {
			t.Fatal(err)
		}
		second, err := parseReference(&brokerpb.WorkloadReference{Reference: packed})
		if err != nil || second.pid != ref.pid || (second.pod == nil) != (ref.pod == nil) || second.pod != nil && *second.pod != *ref.pod {
			t.Errorf("%+v, written again, is %+v, %v", ref, second, err)
		}
	})
}
