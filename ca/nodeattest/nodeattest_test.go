package nodeattest

import (
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/signet-id/signet/spiffe"
)

func TestParsePath(t *testing.T) {
	known := []string{"PluginName", "Name", "Tags."}
	variables := map[string]Variable{"PluginName": {Value: "x"}, "Name": {Value: "n"}, "Tags.role": {Value: "a/b", Segments: true}, "Tags.bad": {Value: "a/b"}, "Tags.long": {Value: strings.Repeat("x", 100)}}
	for _, tt := range []struct {
		in   string
		want string // the path, or what the error says
		err  bool
	}{
		{in: "/{{ .PluginName }}/{{ .Name }}", want: "x/n"},
		{in: "{{.PluginName}}/{{.Name}}", want: "x/n"},
		{in: "/fixed/{{ .Name }}-{{ .Tags.role }}/z", want: "fixed/n-a/b/z"},
		{in: "/fixed/{{ .Tags.none }}", want: ".Tags.none is empty", err: true},
		{in: "/fixed/{{ .Tags.bad }}", want: "has a slash", err: true},
		{in: "/fixed/{{ .Tags. }}", want: "not one of the variables", err: true},
		{in: "/fixed/{{ .Other }}", want: "not one of the variables", err: true},
		{in: "/fixed/{{ upper .Name }}", want: "functions are not understood", err: true},
		{in: "/fixed/{{ .Name", want: "without }}", err: true},
		{in: "/{{ .Name }}/x", want: "must begin with a fixed segment", err: true},
		{in: "/fixed", want: "must begin with a fixed segment", err: true},
		{in: "", want: "must begin with a fixed segment", err: true},
		{in: "/fixed/" + strings.Repeat("x", maxPathBytes), want: "more than the", err: true},
		{in: "/fixed/" + strings.Repeat("{{ .Tags.long }}", 100), want: "more than", err: true},
	} {
		p, err := ParsePath(tt.in, known...)
		var path []string
		if err == nil {
			path, err = p.Path(variables)
		}
		if (err != nil) != tt.err {
			t.Errorf("%q: %q, %v", tt.in, path, err)
		} else if got := strings.Join(path, "/"); err == nil && !strings.HasPrefix(got, tt.want) || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: %q, %v; want %q", tt.in, got, err, tt.want)
		}
	}
}

func FuzzParsePath(f *testing.F) {
	f.Add("/{{ .PluginName }}/{{ .Name }}", "n")
	f.Add("/a/{{ .Tags.x }}", "join_token/x")
	f.Fuzz(func(t *testing.T, text, value string) {
		p, err := ParsePath(text, "PluginName", "Name", "Tags.")
		if err != nil {
			return
		}
		path, err := p.Path(map[string]Variable{"PluginName": {Value: "x"}, "Name": {Value: value}, "Tags.x": {Value: value}})
		if err != nil {
			return
		}
		// The first segment is the operator's alone, whatever the node calls itself.
		other, err := p.Path(map[string]Variable{"PluginName": {Value: "x"}, "Name": {Value: "other"}, "Tags.x": {Value: "other"}})
		if err != nil || other[0] != path[0] && strings.Contains(strings.Trim(text, "/"), "/") && !strings.Contains(strings.SplitN(strings.TrimPrefix(text, "/"), "/", 2)[0], "{{") {
			t.Errorf("%q with %q gives %q and with another name %q, %v", text, value, path, other, err)
		}
	})
}

func TestEvidenceCheck(t *testing.T) {
	good := Evidence{Path: []string{"a", "b"}, Selectors: []string{"x:1", "x:1", "y"}}
	got, err := good.Check("a")
	if want := []spiffe.Selector{{Type: "a", Value: "x:1"}, {Type: "a", Value: "y"}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	for name, e := range map[string]Evidence{
		"short": {Path: []string{"a"}}, "empty segment": {Path: []string{"a", ""}}, "slash": {Path: []string{"a", "b/c"}},
		"empty selector": {Path: good.Path, Selectors: []string{""}}, "many selectors": {Path: good.Path, Selectors: make([]string, MaxSelectors+1)},
		"a selector that is not UTF-8": {Path: good.Path, Selectors: []string{"\xff"}},
	} {
		if got, err := e.Check("a"); err == nil {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestRootFilesNameWhatIsWrong(t *testing.T) {
	dir := t.TempDir()
	for name, tt := range map[string]struct{ content, want string }{
		"none":  {"", "no PEM certificate"},
		"key":   {"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", `of type "PRIVATE KEY", not CERTIFICATE`},
		"bytes": {"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "certificate 0"},
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(tt.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := NewRootFiles([]string{path}, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParseRoots(f *testing.F) {
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if certs, err := ParseRoots(data); err == nil && (len(certs) == 0 || len(certs) > maxRootsInFile) {
			t.Errorf("%d roots", len(certs))
		}
	})
}
