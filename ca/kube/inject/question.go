package inject

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// This file holds what is read of a review: little, and of lists that are long nothing. Kubernetes' own types take hundreds of
// bytes for an element of which two stand on the wire, and whoever reaches the port may send some megabytes of these.

// maxElements bounds a list of a pod that is looked at, and the annotations that are the proxy's.
const maxElements = 1000

// A question is an AdmissionReview as it is asked.
type question struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Request    *struct {
		UID         types.UID                   `json:"uid"`
		Operation   admissionv1.Operation       `json:"operation"`
		Resource    metav1.GroupVersionResource `json:"resource"`
		SubResource string                      `json:"subResource"`
		Namespace   string                      `json:"namespace"`
		Object      json.RawMessage             `json:"object"`
	} `json:"request"`
}

// A pod is what is looked at in one.
type pod struct {
	Metadata struct {
		Labels      ours `json:"labels"`
		Annotations ours `json:"annotations"`
	} `json:"metadata"`
	Spec struct {
		ServiceAccountName string         `json:"serviceAccountName"`
		InitContainers     few[container] `json:"initContainers"`
		Containers         few[container] `json:"containers"`
		Volumes            few[named]     `json:"volumes"`
		OS                 *named         `json:"os"`
	} `json:"spec"`
}

type named struct {
	Name string `json:"name"`
}

type container struct {
	Name  string `json:"name"`
	Ports few[struct {
		ContainerPort int32 `json:"containerPort"`
	}] `json:"ports"`
}

// few is a list of which more than maxElements are not taken.
type few[T any] []T

// UnmarshalJSON implements json.Unmarshaler.
func (f *few[T]) UnmarshalJSON(text []byte) error {
	*f = nil
	return each(text, '[', func(_, value []byte) error {
		if len(*f) == maxElements {
			return errTooMany
		}
		var x T
		if err := json.Unmarshal(value, &x); err != nil {
			return err
		}
		*f = append(*f, x)
		return nil
	})
}

// ours are those of a pod's labels or annotations that are about the proxy. It is nil if the pod has none of any kind.
type ours map[string]string

// UnmarshalJSON implements json.Unmarshaler.
func (o *ours) UnmarshalJSON(text []byte) error {
	*o = nil
	return each(text, '{', func(key, value []byte) error {
		if *o == nil {
			*o = ours{}
		}
		if !bytes.HasPrefix(key, []byte(`"`+Label)) && !bytes.Contains(key, []byte{'\\'}) {
			return nil
		}
		var k, v string
		if err := json.Unmarshal(key, &k); err != nil || !strings.HasPrefix(k, Label) {
			return err
		}
		if err := json.Unmarshal(value, &v); err != nil {
			return err
		}
		if len(*o) == maxElements {
			return errTooMany
		}
		(*o)[k] = v
		return nil
	})
}

var errTooMany = fmt.Errorf("it has more than %d containers, ports, volumes or annotations of one kind", maxElements)

// each calls visit for each element of a list, or of an object with its key, as they stand in text, which is valid JSON: package
// json has looked. It takes no memory for them.
func each(text []byte, open byte, visit func(key, value []byte) error) error {
	text = bytes.TrimSpace(text)
	if string(text) == "null" {
		return nil
	}
	if len(text) < 2 || text[0] != open {
		return fmt.Errorf("it does not begin with %c", open)
	}
	for i := 1; i < len(text)-1; i++ { // at the white space before an element, or the comma
		if c := text[i]; c == ' ' || c == '\t' || c == '\r' || c == '\n' || c == ',' {
			continue
		}
		var key []byte
		if open == '{' {
			end := elementEnd(text, i)
			key = text[i:end]
			i = end + bytes.IndexByte(text[end:], ':') + 1
		}
		end := elementEnd(text, i)
		if err := visit(key, bytes.TrimSpace(text[i:end])); err != nil {
			return err
		}
		i = end - 1
	}
	return nil
}

// elementEnd returns where the element ends that begins at from or behind white space there: at the comma, the colon or the
// bracket after it.
func elementEnd(text []byte, from int) int {
	depth := 0
	for i := from; i < len(text); i++ {
		switch text[i] {
		case '"':
			for i++; i < len(text) && text[i] != '"'; i++ {
				if text[i] == '\\' {
					i++
				}
			}
		case '[', '{':
			depth++
		case ']', '}':
			if depth--; depth < 0 {
				return i
			}
		case ',', ':':
			if depth == 0 {
				return i
			}
		}
	}
	return len(text)
}
