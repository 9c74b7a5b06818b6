package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
)

func run(t *testing.T, stdin string, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = Main(context.Background(), args, strings.NewReader(stdin), &out, &errs)
	return status, out.String(), errs.String()
}

func TestExitStatus(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
		want int
	}{
		{name: "done", args: []string{"version"}, want: exitDone},
		{name: "help is a result", args: []string{"entry", "create", "--help"}, want: exitDone},
		{name: "failed", args: []string{"svid", "inspect", "/nonexistent"}, want: exitFailed},
		{name: "unknown noun", args: []string{"enrty"}, want: exitUsage},
		{name: "unknown verb", args: []string{"entry", "creat"}, want: exitUsage},
		{name: "unknown flag", args: []string{"version", "--nope"}, want: exitUsage},
		{name: "surplus argument", args: []string{"version", "x"}, want: exitUsage},
		{name: "bad flag value", args: []string{"version", "-o", "xml"}, want: exitUsage},
		{name: "flags that exclude each other", args: []string{"bundle", "show", "--format", "pem", "-o", "json"}, want: exitUsage},
	} {
		t.Run(tt.name, func(t *testing.T) {
			status, stdout, stderr := run(t, "", tt.args...)
			if status != tt.want {
				t.Errorf("signet %q = %d, want %d\n%s", tt.args, status, tt.want, stderr)
			}
			if status != exitDone && (stdout != "" && tt.name != "failed" || !strings.HasPrefix(stderr, "signet: error: ")) {
				t.Errorf("signet %q: stdout %q, stderr %q; want nothing and an error", tt.args, stdout, stderr)
			}
		})
	}
}

// TestEveryCommandIsExplained holds the house rules of help texts over the whole tree.
func TestEveryCommandIsExplained(t *testing.T) {
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		path := cmd.CommandPath()
		if cmd.Hidden || strings.HasPrefix(path, "signet help") || strings.HasPrefix(path, "signet completion") {
			return
		}
		if cmd.Short == "" || strings.HasSuffix(cmd.Short, ".") {
			t.Errorf("%s: Short is %q, want a line without a period", path, cmd.Short)
		}
		if !cmd.HasSubCommands() {
			if !strings.Contains(cmd.Example, path) {
				t.Errorf("%s has no example that shows it", path)
			}
			if cmd.RunE == nil {
				t.Errorf("%s does nothing", path)
			}
			for line := range strings.Lines(cmd.Example) {
				if strings.HasPrefix(line, "  signet ") {
					checkExample(t, path, line)
				}
			}
		}
		if cmd.Args == nil {
			t.Errorf("%s takes any arguments", path)
		}
		for _, c := range cmd.Commands() {
			walk(c)
		}
	}
	walk(NewRootCommand())
}

// checkExample finds examples whose command or flags do not exist.
func checkExample(t *testing.T, path, line string) {
	t.Helper()
	line, _, _ = strings.Cut(line, " | ")
	line, _, _ = strings.Cut(line, " > ")
	line, _, _ = strings.Cut(line, " && ")
	args := strings.Fields(strings.ReplaceAll(line, `""`, ""))[1:]
	cmd, rest, err := NewRootCommand().Find(args)
	if err != nil || cmd.HasSubCommands() {
		t.Errorf("%s: example %q names no command", path, line)
		return
	}
	for _, a := range rest {
		if name, ok := strings.CutPrefix(a, "--"); ok {
			if name, _, _ = strings.Cut(name, "="); cmd.Flags().Lookup(name) == nil {
				t.Errorf("%s: example %q has the flag %s, which does not exist", path, line, a)
			}
		}
	}
}

func TestReferenceIsUpToDate(t *testing.T) {
	var want bytes.Buffer
	if err := WriteReference(&want); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile("../../docs/reference/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want.String(), string(got)); diff != "" {
		t.Errorf("docs/reference/cli.md is not what the commands say; run go run ./internal/cli/gendoc > docs/reference/cli.md (-want +got):\n%s", diff)
	}
}

func TestEscape(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{name: "plain", in: "unix:uid:1000", want: "unix:uid:1000"},
		{name: "letters of any script", in: "grüße/日本", want: "grüße/日本"},
		{name: "cursor", in: "a\x1b[2Jb", want: `a\x1b[2Jb`},
		{name: "C1 control", in: "a\u009b2Jb", want: `a\u009b2Jb`},
		{name: "newline", in: "a\nsignet: error: b", want: `a\nsignet: error: b`},
		{name: "direction", in: "a\u202eb", want: `a\u202eb`},
		{name: "no UTF-8", in: "a\xffb", want: `a\xffb`},
		{name: "beyond the basic plane", in: "a\U000e0041b", want: `a\U000e0041b`},
	} {
		if got := escape(tt.in); got != tt.want {
			t.Errorf("%s: escape(%q) = %q, want %q", tt.name, tt.in, got, tt.want)
		}
	}
}

func FuzzEscape(f *testing.F) {
	for _, s := range []string{"", "a\x1b[2J", "\xff\xfe", "a\u202eb", "\U000e0041", "日本"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if got := escape(s); strings.ContainsFunc(got, func(r rune) bool { return !unicode.IsPrint(r) }) || strings.ContainsRune(got, unicode.ReplacementChar) && !strings.ContainsRune(s, unicode.ReplacementChar) {
			t.Errorf("escape(%q) = %q holds what does not print", s, got)
		}
		value := map[string]any{"s": strings.ToValidUTF8(s, "?")}
		for _, enc := range []struct {
			name   string
			encode func() (string, error)
			decode func([]byte, any) error
		}{
			{"JSON", func() (string, error) { return encodeJSON(value, "") }, json.Unmarshal},
			{"YAML", func() (string, error) { return encodeYAML(value) }, yaml.Unmarshal},
		} {
			text, err := enc.encode()
			if err != nil {
				t.Fatalf("%s of %q: %v", enc.name, s, err)
			}
			if strings.ContainsFunc(text, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }) {
				t.Errorf("%s of %q is %q, which holds what does not print", enc.name, s, text)
			}
			var back map[string]any
			if err := enc.decode([]byte(text), &back); err != nil || back["s"] != value["s"] {
				t.Errorf("%s of %q is %q, which reads back as %q (%v)", enc.name, value["s"], text, back["s"], err)
			}
		}
	})
}

type fullDisk struct{}

func (fullDisk) Write([]byte) (int, error) { return 0, syscall.ENOSPC }

// TestResultThatCannotBeWritten: a command whose result is lost has not done what it says.
func TestResultThatCannotBeWritten(t *testing.T) {
	for _, args := range [][]string{{"version"}, {"version", "-o", "json"}, {"--help"}, {"completion", "bash"}} {
		var errs bytes.Buffer
		status := Main(context.Background(), args, strings.NewReader(""), fullDisk{}, &errs)
		if status != exitFailed || !strings.Contains(errs.String(), "no space left on device") {
			t.Errorf("signet %q on a full disk = %d, %q; want %d and why", args, status, errs.String(), exitFailed)
		}
	}
}

// TestYAMLForOldParsers: what YAML 1.1 takes for a truth value, a number or a default is quoted.
func TestYAMLForOldParsers(t *testing.T) {
	for _, s := range []string{"y", "Yes", "ON", "n", "no", "off", "=", "1:30", "-190:20:30.15", "true", "null", "~", "<<", "0x1f", "2026-01-01"} {
		if text, err := encodeYAML(map[string]string{"hint": s}); err != nil || text != "hint: \""+s+"\"\n" {
			t.Errorf("%q is %q, %v; want it in quotes", s, text, err)
		}
	}
	if text, err := encodeYAML(map[string]string{"selector": "unix:uid:0"}); err != nil || text != "selector: unix:uid:0\n" {
		t.Errorf("a selector is %q, %v", text, err)
	}
}

func TestPrintError(t *testing.T) {
	var b bytes.Buffer
	printError(&b, false, withHint(&remoteError{doing: "applying", message: "a.yaml:1:1: x\na.yaml:2:1: \x1by\n"}, "say %s", "please"))
	want := "signet: error: applying: a.yaml:1:1: x\n  a.yaml:2:1: \\x1by\nsignet: hint: say please\n"
	if b.String() != want {
		t.Errorf("printError wrote %q, want %q", b.String(), want)
	}
}

func TestDurations(t *testing.T) {
	for _, tt := range []struct {
		in   time.Duration
		want string
	}{{0, "0s"}, {59 * time.Second, "59s"}, {61 * time.Second, "1m1s"}, {time.Hour, "1h"}, {25*time.Hour + 59*time.Minute, "1d1h"}, {48 * time.Hour, "2d"}} {
		if got := approximate(tt.in); got != tt.want {
			t.Errorf("approximate(%s) = %q, want %q", tt.in, got, tt.want)
		}
	}
	for _, tt := range []struct {
		in   int64
		want string
	}{{30, "30s"}, {3600, "1h"}, {5400, "1h30m"}, {3601, "1h0m1s"}, {600, "10m"}} {
		if got := exactTTL(tt.in); got != tt.want {
			t.Errorf("exactTTL(%d) = %q, want %q", tt.in, got, tt.want)
		}
	}
	now := time.Unix(1000, 0)
	if got := left(now.Add(-90*time.Second), now); got != "expired 1m30s ago" {
		t.Errorf("left = %q", got)
	}
}

type item struct {
	Name string `json:"name"`
	Note string `json:"note,omitempty"`
}

func TestLister(t *testing.T) {
	columns := []column[item]{{name: "NAME", value: func(i item) string { return i.Name }}, {name: "NOTE", value: func(i item) string { return i.Note }},
		{name: "MORE", wide: true, value: func(item) string { return "x" }}}
	pages := [][]item{{{Name: "a\x1b"}, {Name: "long name"}}, {{Name: "c", Note: "true"}}}
	for _, tt := range []struct {
		format format
		pages  [][]item
		want   string
	}{
		{formatTable, pages, "NAME       NOTE\na\\x1b      -\nlong name  -\nc          true\n"},
		{formatWide, pages[1:], "NAME  NOTE  MORE\nc     true  x\n"},
		{formatJSON, pages, "[\n  {\n    \"name\": \"a\\u001b\"\n  },\n  {\n    \"name\": \"long name\"\n  },\n  {\n    \"name\": \"c\",\n    \"note\": \"true\"\n  }\n]\n"},
		{formatJSON, nil, "[]\n"},
		{formatYAML, pages, "- name: \"a\\e\"\n- name: long name\n- name: c\n  note: \"true\"\n"},
		{formatYAML, nil, "[]\n"},
		{formatTable, nil, ""},
	} {
		var out, errs bytes.Buffer
		a := &app{stdout: &out, stderr: &errs}
		l := &lister[item]{app: a, format: tt.format, columns: columns, none: "none"}
		for _, p := range tt.pages {
			if err := l.add(p); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.close(); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tt.want, out.String()); diff != "" {
			t.Errorf("%s of %d pages (-want +got):\n%s", tt.format, len(tt.pages), diff)
		}
		if said := errs.String(); (tt.format == formatTable && tt.pages == nil) != strings.Contains(said, "none") {
			t.Errorf("%s of %d pages said %q", tt.format, len(tt.pages), said)
		}
	}
}

func TestSTAB_02_SpecRevisionsArePrinted(t *testing.T) {
	status, stdout, stderr := run(t, "", "version", "--specs", "-o", "json")
	var v struct {
		Specs []struct{ Name, Status, Revision, Use string }
	}
	if err := json.Unmarshal([]byte(stdout), &v); status != exitDone || err != nil || len(v.Specs) == 0 {
		t.Fatalf("signet version --specs -o json = %d, %q, %q (%v); want specs", status, stdout, stderr, err)
	}
	for _, s := range v.Specs {
		if len(s.Revision) != 40 || s.Name == "" || s.Status == "" || s.Use == "" {
			t.Errorf("specification %+v lacks its name, status, use or the commit of its text", s)
		}
	}
}
