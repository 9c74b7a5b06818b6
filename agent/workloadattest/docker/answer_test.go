package docker

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	anID    = "139a32b28b5487c13e8018d622c5f2a34d538b54d82a765668bf68a64ccd1707"
	anImage = "sha256:f17617c4b21ccd00d33e773f003761919f24710cef0ef7cb5cfaa4ff5183278f"
)

// The answers of real engines, about a container that was started with a label and a variable.
func TestRecordedAnswers(t *testing.T) {
	for _, tt := range []struct {
		file  string
		name  string
		image string
	}{
		{"docker-20.10.24", "/t1", "signet-test:1"},
		{"podman-4.3.1", "/t1", "localhost/signet-test:1"},
	} {
		t.Run(tt.file, func(t *testing.T) {
			d, err := readContainer(bytes.NewReader(answer(t, tt.file+"-container.json")))
			if err != nil {
				t.Fatal(err)
			}
			if len(d.id) != 64 || d.pid <= 1 || d.name != tt.name || d.imageName != tt.image || !digestPattern.MatchString(d.image) ||
				!slices.Contains(d.labels, label{"app", "web"}) || !slices.Contains(d.env, "X=y") {
				t.Errorf("got %+v", d)
			}
			digests, err := readImage(bytes.NewReader(answer(t, tt.file+"-image.json")))
			if err != nil || (tt.file == "podman-4.3.1") != (len(digests) == 1) {
				t.Errorf("digests %q, %v", digests, err)
			}
		})
	}
}

func answer(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", "answers", name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestAnswersThatAreRefused(t *testing.T) {
	deep := strings.Repeat("[", maxDepth+1) + strings.Repeat("]", maxDepth+1)
	var keys strings.Builder
	for i := range maxKeys + 1 {
		fmt.Fprintf(&keys, `"k%d":"v",`, i)
	}
	for name, tt := range map[string]struct{ answer, want string }{
		"nothing":                {"", "ends too early"},
		"cut off":                {`{"Id":"` + anID + `","Config":{"Labels":{"a":`, "ends too early"},
		"no JSON":                {`<html>`, "no JSON"},
		"a list":                 {`[]`, "where an object should be"},
		"an id twice":            {`{"Id":"a","Id":"b"}`, "twice"},
		"a label twice":          {`{"Config":{"Labels":{"a":"1","a":"2"}}}`, "twice"},
		"labels in a list":       {`{"Config":{"Labels":["a"]}}`, "where an object should be"},
		"a label of numbers":     {`{"Config":{"Labels":{"a":1}}}`, "where a string should be"},
		"variables in an object": {`{"Config":{"Env":{"A":"b"}}}`, "where a list should be"},
		"a process id of text":   {`{"State":{"Pid":"1"}}`, "where a process id should be"},
		"a negative process id":  {`{"State":{"Pid":-1}}`, "is not a process id"},
		"a broken process id":    {`{"State":{"Pid":1.5}}`, "is not a process id"},
		"a huge process id":      {`{"State":{"Pid":4294967297}}`, "is not a process id"},
		"an image of a path":     {`{"Image":"../../secrets"}`, "is not an image's id"},
		"too deep":               {`{"HostConfig":` + deep + `}`, "deep"},
		"too many labels":        {`{"Config":{"Labels":{` + keys.String() + `"z":""}}}`, "more than"},
		"too many variables":     {`{"Config":{"Env":[` + strings.Repeat(`"A=b",`, maxKeys) + `"A=b"]}}`, "more than"},
		"too long":               {`{"HostConfig":"` + strings.Repeat("x", maxAnswerBytes) + `"}`, "longer than"},
		"too long in all":        {`{"HostConfig":[` + strings.Repeat(`"`+strings.Repeat("x", 1000)+`",`, maxAnswerBytes/1000) + `"x"]}`, "longer than"},
	} {
		d, err := readContainer(strings.NewReader(tt.answer))
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %+v, %v; want %q", name, d, err, tt.want)
		}
		if err != nil && len(err.Error()) > 400 {
			t.Errorf("%s: an error of %d bytes", name, len(err.Error()))
		}
	}
}

// What is read is what any reader of JSON finds there.
func FuzzReadContainer(f *testing.F) {
	f.Add(answer(f, "docker-20.10.24-container.json"))
	f.Add(answer(f, "podman-4.3.1-container.json"))
	f.Add([]byte(`{"Id":null,"Config":null,"Image":"` + anImage[7:] + `","State":{"Pid":7}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := readContainer(bytes.NewReader(data))
		if err != nil {
			return
		}
		var m map[string]any
		if err := json.NewDecoder(bytes.NewReader(data)).Decode(&m); err != nil {
			t.Fatalf("accepted what is no JSON: %v", err)
		}
		str := func(v any) string { s, _ := v.(string); return s }
		if d.id != str(m["Id"]) || d.name != str(m["Name"]) || strings.TrimPrefix(d.image, "sha256:") != strings.TrimPrefix(str(m["Image"]), "sha256:") {
			t.Errorf("read %+v of %v", d, m)
		}
		config, _ := m["Config"].(map[string]any)
		labels, _ := config["Labels"].(map[string]any)
		env, _ := config["Env"].([]any)
		if d.imageName != str(config["Image"]) || len(d.labels) != len(labels) || len(d.env) != len(env) {
			t.Errorf("read %+v of %v", d, config)
		}
		for _, l := range d.labels {
			if l.value != str(labels[l.key]) {
				t.Errorf("label %q is %q and not %v", l.key, l.value, labels[l.key])
			}
		}
	})
}

func FuzzReadImage(f *testing.F) {
	f.Add(answer(f, "docker-20.10.24-image.json"))
	f.Add(answer(f, "podman-4.3.1-image.json"))
	f.Add([]byte(`{"RepoDigests":["a@b@` + anImage + `","x@` + anImage + `"]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		digests, err := readImage(bytes.NewReader(data))
		if err != nil {
			return
		}
		for i, d := range digests {
			if !digestPattern.MatchString(d) || slices.Contains(digests[:i], d) || !bytes.Contains(data, []byte("@")) {
				t.Errorf("digests %q", digests)
			}
		}
	})
}
