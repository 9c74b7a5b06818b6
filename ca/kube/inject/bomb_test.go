package inject

import (
	"encoding/json"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// TestBombs: whatever a review of four megabytes holds, reading it takes a few times as much memory: sixteen are read at once, and
// whoever reaches the port can send them.
func TestBombs(t *testing.T) {
	c := &Config{Options: options, Namespace: "signet-system"}
	bomb := func(before, piece, after string) string {
		const head = `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"1","operation":"CREATE","namespace":"shop","resource":{"group":"","version":"v1","resource":"pods"}`
		room := maxReviewBytes - len(head) - len(before) - len(after) - len("}}")
		return head + before + strings.TrimSuffix(strings.Repeat(piece, room/len(piece)), ",") + after + "}}"
	}
	const pod = `,"object":{"metadata":{"labels":{"signet-id.github.io/inject":"true"}},"spec":{`
	for name, body := range map[string]string{
		"containers":      bomb(pod+`"containers":[`, `{},`, `]}}`),
		"init containers": bomb(pod+`"initContainers":[`, `{},`, `]}}`),
		"ports":           bomb(pod+`"containers":[{"ports":[`, `{},`, `]}]}}`),
		"environment":     bomb(pod+`"containers":[{"env":[`, `{},`, `]}]}}`),
		"volumes":         bomb(pod+`"volumes":[`, `{},`, `]}}`),
		"tolerations":     bomb(pod+`"tolerations":[`, `{},`, `]}}`),
		"groups":          bomb(`,"userInfo":{"groups":[`, `"",`, `]}`),
		"nested":          bomb(pod+`"containers":`, `[`, ``),
	} {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			answer, err := c.review([]byte(body))
			runtime.ReadMemStats(&after)
			taken := after.TotalAlloc - before.TotalAlloc
			t.Logf("%d MiB, answer %.100q, %v", taken>>20, answer, err)
			if most := uint64(4 * maxReviewBytes); taken > most {
				t.Errorf("%d bytes were taken for %d, want %d at most", taken, len(body), most)
			}
		})
	}
	labels := &strings.Builder{}
	for i := range 300_000 {
		fmt.Fprintf(labels, `"%d":"",`, i)
	}
	for _, field := range []string{"labels", "annotations"} {
		t.Run(field, func(t *testing.T) {
			body := bomb(`,"object":{"metadata":{"`+field+`":{`+labels.String(), `"x":"",`, `,"signet-id.github.io/inject":"true"}}}`)
			body = strings.Replace(body, `,"signet`, `,"signet`, 1)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			answer, err := c.review([]byte(body))
			runtime.ReadMemStats(&after)
			taken := after.TotalAlloc - before.TotalAlloc
			t.Logf("%d MiB, answer %.100q, %v", taken>>20, answer, err)
			if most := uint64(4 * maxReviewBytes); taken > most {
				t.Errorf("%d bytes were taken for %d, want %d at most", taken, len(body), most)
			}
		})
	}
}

// FuzzEach: the elements of lists and objects are those that package json finds.
func FuzzEach(f *testing.F) {
	for _, s := range []string{`{"a":"b" , "c" : {"d":[1,{}],"e":"}\\"]"}}`, `[ ]`, `[1 , "x,]" ,[[],{"a":[]}], null]`, `{"\\u0061":"","b":""}`, ` null `, `{}`, `"x"`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if !json.Valid(text) {
			return
		}
		var list []json.RawMessage
		if json.Unmarshal(text, &list) == nil {
			n := 0
			if err := each(text, '[', func(_, value []byte) error {
				if n == len(list) || string(value) != string(list[n]) {
					t.Fatalf("element %d of %s is %q, want %q", n, text, value, list)
				}
				n++
				return nil
			}); err != nil || n != len(list) {
				t.Errorf("%s: %d elements, %v; want %d", text, n, err, len(list))
			}
		}
		var object map[string]json.RawMessage
		if json.Unmarshal(text, &object) == nil {
			got := map[string]json.RawMessage{}
			if err := each(text, '{', func(key, value []byte) error {
				var k string
				if err := json.Unmarshal(key, &k); err != nil {
					t.Fatalf("%s: key %q: %v", text, key, err)
				}
				got[k] = slices.Clone(value)
				return nil
			}); err != nil || len(got) != len(object) {
				t.Errorf("%s: %q, %v; want %q", text, got, err, object)
			}
			for k, v := range object {
				if string(got[k]) != string(v) {
					t.Errorf("%s: %q is %q, want %q", text, k, got[k], v)
				}
			}
		}
	})
}
