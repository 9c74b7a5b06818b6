// Package helm tries the chart in deploy/helm/signet without a cluster: what it renders, what its schema refuses, and which
// privileges its pods have. test/kube installs it in a real one. HELM names the program; without it the one of tools/helm.sh
// is taken.
package helm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/client-go/kubernetes/scheme"

	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
)

const (
	root  = "../.."
	chart = root + "/deploy/helm/signet"
)

// needed are the values without which nothing can be installed.
const needed = "trustDomain: example.org\nclusterName: prod\n"

func helm(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	program := os.Getenv("HELM")
	if program == "" {
		var err error
		if program, err = filepath.Abs(root + "/bin/tools/helm"); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(program); err != nil {
			if program, err = exec.LookPath("helm"); err != nil {
				t.Skip("there is no helm: set HELM, or run tools/helm.sh, as make test does")
			}
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	home := t.TempDir()
	cmd.Env = append(os.Environ(), "HOME="+home, "XDG_CACHE_HOME="+home, "XDG_CONFIG_HOME="+home, "XDG_DATA_HOME="+home, "KUBECONFIG=/dev/null")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// render renders the chart with values, each a YAML document that is laid over those before.
func render(t *testing.T, args []string, values ...string) (string, error) {
	t.Helper()
	all := append([]string{"template", "signet", chart, "--namespace", "signet-system"}, args...)
	dir, err := os.MkdirTemp("", "signet-values-") // Helm takes a % in the path for an escape
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	for i, v := range values {
		file := filepath.Join(dir, fmt.Sprintf("values-%d.yaml", i))
		if err := os.WriteFile(file, []byte(v), 0o600); err != nil {
			t.Fatal(err)
		}
		all = append(all, "--values", file)
	}
	stdout, stderr, err := helm(t, all...)
	if err != nil {
		return "", errors.New(stderr)
	}
	return stdout, nil
}

// foreign are kinds that client-go has no types for; they are held to be there, and not looked into.
var foreign = map[string]bool{"CustomResourceDefinition": true, "ServiceMonitor": true}

// objects decodes what was rendered, as strictly as the API server with fieldValidation=Strict: a field that does not exist, or
// comes twice, is an error.
func objects(t *testing.T, rendered string) []runtime.Object {
	t.Helper()
	decoder := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme.Scheme, scheme.Scheme, json.SerializerOptions{Yaml: true, Strict: true})
	documents := utilyaml.NewDocumentDecoder(io.NopCloser(strings.NewReader(rendered)))
	defer documents.Close()
	var out []runtime.Object
	buf := make([]byte, 4<<20)
	for {
		n, err := documents.Read(buf)
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		var meta struct {
			Kind     string
			Metadata struct{ Name string }
		}
		if err := utilyaml.Unmarshal(buf[:n], &meta); err != nil {
			t.Fatalf("%v in\n%s", err, buf[:n])
		}
		if meta.Kind == "" || foreign[meta.Kind] {
			continue
		}
		o, _, err := decoder.Decode(buf[:n], nil, nil)
		if err != nil {
			t.Errorf("%s %s: %v\n%s", meta.Kind, meta.Metadata.Name, err, buf[:n])
			continue
		}
		out = append(out, o)
	}
}

// find returns the object of a type and name.
func find[T runtime.Object](t *testing.T, all []runtime.Object, name string) (found T, ok bool) {
	t.Helper()
	for _, o := range all {
		if v, is := o.(T); is && nameOf(o) == name {
			if ok {
				t.Errorf("two %T %s", v, name)
			}
			found, ok = v, true
		}
	}
	return found, ok
}

func nameOf(o runtime.Object) string {
	if n, ok := o.(interface{ GetName() string }); ok {
		return n.GetName()
	}
	return ""
}
