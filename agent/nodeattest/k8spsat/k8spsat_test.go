package k8spsat

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const token = "aGVhZGVy.cGF5bG9hZA.c2lnbmF0dXJl"

// The token is read each time, since the kubelet replaces the file.
func TestPayload(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	a := New(Config{Cluster: "prod", TokenPath: path})
	if a.Type() != "k8s_psat" {
		t.Errorf("Type() = %q", a.Type())
	}
	for _, content := range []string{token, token + "\n", strings.ReplaceAll(token, "c", "C")} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		e, err := a.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		want := `{"cluster":"prod","token":"` + strings.TrimSpace(content) + `"}`
		if payload, err := e.Payload(t.Context()); err != nil || string(payload) != want {
			t.Errorf("payload %s, %v; want %s", payload, err, want)
		}
		if s := fmt.Sprintf("%v %+v %#v", e, e, e); strings.Contains(s, "mF0d") {
			t.Errorf("the evidence prints as %q", s)
		}
	}
}

func TestFaults(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct{ name, content, want string }{
		{"empty", "", "is empty"},
		{"no token", "s3cret", "no service account token"},
		{"two tokens", token + "\n" + token, "no service account token"},
		{"huge", "a.b." + strings.Repeat("s3cret", maxTokenBytes), "at most"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(dir, "token")
			if err := os.WriteFile(path, []byte(tt.content), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := New(Config{Cluster: "prod", TokenPath: path}).Begin(t.Context())
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "s3cret") {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
		})
	}
	_, err := New(Config{Cluster: "prod", TokenPath: filepath.Join(dir, "absent")}).Begin(t.Context())
	if err == nil || !strings.Contains(err.Error(), "projected volume") {
		t.Errorf("without the file: %v", err)
	}
}

func TestCheck(t *testing.T) {
	for _, tt := range []struct {
		config Config
		want   string
	}{
		{Config{Cluster: "prod"}, ""},
		{Config{}, "cluster"},
		{Config{Cluster: "a/b"}, "cluster"},
		{Config{Cluster: "prod", TokenPath: "token"}, "token_path"},
	} {
		told := ""
		tt.config.Check(func(field, _ string, _ ...any) { told += field })
		if told != tt.want {
			t.Errorf("Check of %+v tells of %q, want %q", tt.config, told, tt.want)
		}
	}
}

// What is sent has the form of a signed JWT and nothing around it.
func FuzzToken(f *testing.F) {
	f.Add([]byte(token + "\n"))
	f.Add([]byte("a.b."))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := readToken(data)
		if err != nil {
			return
		}
		if strings.Count(got, ".") != 2 || strings.ContainsAny(got, " \r\n\t\"\x00") || len(got) > maxTokenBytes {
			t.Fatalf("readToken(%q) = %q", data, got)
		}
	})
}
