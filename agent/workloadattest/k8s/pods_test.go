package k8s

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
)

// endless is a text that repeats its last part for ever.
type endless struct {
	start  *strings.Reader
	repeat string
	at     int // in repeat
	read   int
}

func (e *endless) Read(p []byte) (int, error) {
	n, _ := e.start.Read(p)
	for n < len(p) {
		m := copy(p[n:], e.repeat[e.at:])
		n, e.at = n+m, (e.at+m)%len(e.repeat)
	}
	e.read += n
	return n, nil
}

// However much there is to read, no more is read than may be.
func TestDecodeBounds(t *testing.T) {
	one := `{"metadata":{"name":"a","namespace":"b","uid":"` + strings.Repeat("c", 1<<20) + `"}}`
	for _, tt := range []struct {
		name, start, repeat, want string
		bound                     int
	}{
		{"a string", `{"kind":"PodList","items":[{"metadata":{"name":"`, "a", "one object in it is larger", 2 * maxPodBytes},
		{"blanks", `{"kind":"PodList","items":[`, " ", "one object in it is larger", 2 * maxPodBytes},
		{"something else", `{"kind":"PodList","x":[[]`, ",[]", "one object in it is larger", 2 * maxPodBytes},
		{"arrays in arrays", `{"kind":"PodList","items":[`, "[", "exceeded max depth", 2 * maxPodBytes},
		{"pods", `{"kind":"PodList","items":[` + one, "," + one, "larger than 134217728 bytes", maxListBytes},
		{"keys", `{"x":1`, `,"x":1`, "more than 32 parts", maxPodBytes},
	} {
		r := &endless{start: strings.NewReader(tt.start), repeat: tt.repeat}
		err := decodePods(r, func(*pod) error { return nil })
		if err == nil || !strings.Contains(err.Error(), tt.want) || r.read > tt.bound {
			t.Errorf("%s: %.200v after %d bytes; want %q after %d at most", tt.name, err, r.read, tt.want, tt.bound)
		}
	}
}

// Read in pieces, a list is what it is as a whole; what is not a list as a whole is none in pieces.
func FuzzDecodePods(f *testing.F) {
	web := podObject(podA, "shop", "web", running("web", id("a")), running("proxy", id("b")))
	web["status"].(object)["initContainerStatuses"] = []object{running("setup", id("c"))}
	for _, s := range []string{
		podListOf(web, podObject(podB, "shop", "b")), podListOf(), `{"kind":"PodList","items":null}`, `{"items":[],"kind":"PodList"}`, `{"kind":"PodList"}`, `{}`, `[]`, ``,
		`{"kind":"PodList","items":[{"metadata":{"uid":"a","name":"b","namespace":"c"},"status":{"containerStatuses":[{"containerID":"x://` + id("a") + `"}]}}]} x`,
		`{"kind":"PodList","items":[null]}`, `{"kind":"PodList","items":[],"items":[]}`, `{"kind":"PodList","metadata":{"a":[1,2,{}]},"items":[]}`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got := []*pod{}
		err := decodePods(iotest.HalfReader(strings.NewReader(text)), func(p *pod) error {
			if p.uid == "" || p.name == "" || p.namespace == "" {
				t.Fatalf("a pod without a name: %+v", p)
			}
			for m := range p.members {
				if m.id != "" && !hexID.MatchString(m.id) {
					t.Fatalf("a container with the id %q", m.id)
				}
			}
			got = append(got, p)
			return nil
		})
		if err != nil {
			return
		}
		var whole struct {
			Kind  string    `json:"kind"`
			Items []podJSON `json:"items"`
		}
		if err := json.NewDecoder(strings.NewReader(text)).Decode(&whole); err != nil {
			t.Fatalf("%q is a list in pieces, and as a whole: %v", text, err)
		}
		want := []*pod{}
		for _, j := range whole.Items {
			p, err := j.pod()
			if err != nil {
				t.Fatalf("%q is a list in pieces, and as a whole: %v", text, err)
			}
			want = append(want, p)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%q in pieces is %+v, as a whole %+v", text, got, want)
		}
	})
}
