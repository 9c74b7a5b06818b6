// Package docs holds the documents to the code: the reference of the configuration files is made from the structs, and
// commands, metrics, audit events and example files that documents name must be those that exist.
package docs

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/internal/cli"
	"github.com/signet-id/signet/policy/proxy"
)

var update = flag.Bool("update", false, "write docs/reference/*-config.md anew")

const root = "../.."

// TestReference compares docs/reference/ca-config.md, agent-config.md and proxy-config.md with the fields of the structs and their
// comments.
func TestReference(t *testing.T) {
	for _, tt := range []struct{ program, file, folder string }{
		{"CA", "ca-config.md", "ca"},
		{"agent", "agent-config.md", "agent"},
		{"proxy", "proxy-config.md", "policy/proxy"},
	} {
		structs := readStructs(t, filepath.Join(root, tt.folder))
		var b strings.Builder
		fmt.Fprintf(&b, `# Configuration of the %s

Made from %s/*.go by `+"`make docs`"+`; do not edit.

A file in YAML or JSON. A key that is not here is an error with line and column, and so is a value that cannot work; the %s then does
not start. `+"`signet config check FILE`"+` checks a file without starting anything. Times are written 1h, 30m, 90s.
`, tt.program, tt.folder, tt.program)
		writeStruct(&b, structs, "Config", "", 0)
		path := filepath.Join(root, "docs", "reference", tt.file)
		if *update {
			if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != b.String() {
			t.Errorf("docs/reference/%s is stale; make it anew with: make docs", tt.file)
		}
		if rows := strings.Count(b.String(), "\n| `"); rows < 10 {
			t.Errorf("docs/reference/%s has %d fields; is %s/config.go read correctly?", tt.file, rows, tt.folder)
		}
	}
	// What the document is made from is what is decoded.
	for _, c := range []any{ca.Config{}, agent.Config{}, proxy.Config{}} {
		for i := range reflect.TypeOf(c).NumField() {
			if f := reflect.TypeOf(c).Field(i); f.Tag.Get("yaml") == "" {
				t.Errorf("%T: field %s has no yaml tag", c, f.Name)
			}
		}
	}
}

// A field is one key of a configuration file, with the field's name and comment.
type field struct{ name, key, typ, doc string }

// readStructs reads the structs with yaml tags of a package: each part of the configuration is beside what it configures.
func readStructs(t *testing.T, folder string) map[string][]field {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(folder, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	structs := map[string][]field{}
	for _, file := range files {
		if !strings.HasSuffix(file, "_test.go") {
			readFile(t, file, structs)
		}
	}
	return structs
}

func readFile(t *testing.T, file string, structs map[string][]field) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(f, func(n ast.Node) bool {
		ts, ok := n.(*ast.TypeSpec)
		if !ok {
			return true
		}
		st, ok := ts.Type.(*ast.StructType)
		if !ok {
			return true
		}
		above := ""
		for _, fl := range st.Fields.List {
			if fl.Tag == nil {
				continue
			}
			key := reflect.StructTag(strings.Trim(fl.Tag.Value, "`")).Get("yaml")
			if key == "-" || key == "" {
				continue
			}
			doc := fl.Doc.Text() + fl.Comment.Text()
			name := fl.Names[0].Name
			if doc == "" && strings.Contains(above, name) {
				doc = above // one comment for two fields
			}
			above = doc
			structs[ts.Name.Name] = append(structs[ts.Name.Name], field{name: name, key: key, typ: typeName(fl.Type), doc: doc})
		}
		return false
	})
}

// capitals is a word with two capitals, such as DataDir, TPM or MaxStreamsPerUID.
var capitals = regexp.MustCompile(`\b[A-Z]\w*[A-Z]\w*\b`)

// sentence makes a row's text of a field's comment: it begins with the key, and other fields go by theirs, those of the same
// struct first. Names of one word and abbreviations are left alone, since they mean themselves as well (Broker, TPM).
func (f field) sentence(structs map[string][]field, of string) string {
	doc := strings.Join(strings.Fields(f.doc), " ")
	if rest, ok := strings.CutPrefix(doc, f.name+" "); ok {
		doc = "`" + f.key + "` " + rest
	}
	doc = capitals.ReplaceAllStringFunc(doc, func(name string) string {
		if name == strings.ToUpper(name) {
			return name
		}
		for _, s := range slices.Concat([]string{of}, slices.Sorted(maps.Keys(structs))) {
			if i := slices.IndexFunc(structs[s], func(f field) bool { return f.name == name }); i >= 0 {
				return "`" + structs[s][i].key + "`"
			}
		}
		return name
	})
	return strings.ReplaceAll(doc, "|", "\\|")
}

func typeName(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.ArrayType:
		return "list of " + typeName(e.Elt)
	case *ast.MapType:
		return "mapping to " + typeName(e.Value)
	case *ast.StarExpr:
		return typeName(e.X)
	case *ast.SelectorExpr:
		switch e.Sel.Name {
		case "Duration":
			return "time"
		case "Secret", "Mode":
			return "string"
		}
		return e.Sel.Name
	}
	return fmt.Sprintf("%T", e)
}

func writeStruct(b *strings.Builder, structs map[string][]field, name, prefix string, depth int) {
	fmt.Fprintf(b, "\n| key | value | meaning |\n|---|---|---|\n")
	var inner []field
	for _, f := range structs[name] {
		typ := strings.NewReplacer("int64", "number", "int", "number", "uint32", "number", "bool", "true or false").Replace(f.typ)
		for _, of := range []struct{ prefix, is, key string }{{"", "section", ""}, {"list of ", "list of sections", "[]"}, {"mapping to ", "sections by name", ".NAME"}} {
			if in, ok := strings.CutPrefix(f.typ, of.prefix); ok && structs[in] != nil {
				typ = of.is
				inner = append(inner, field{key: f.key + of.key, typ: in})
				break
			}
		}
		fmt.Fprintf(b, "| `%s%s` | %s | %s |\n", prefix, f.key, typ, f.sentence(structs, name))
	}
	for _, f := range inner {
		fmt.Fprintf(b, "\n%s `%s`\n", strings.Repeat("#", depth+2), prefix+f.key)
		writeStruct(b, structs, f.typ, prefix+f.key+".", depth+1)
	}
}

// TestExamples reads every example as the programs do.
func TestExamples(t *testing.T) {
	for _, args := range [][]string{
		{"config", "check", "config/ca.yaml", "config/agent.yaml", "config/proxy.yaml"},
		{"config", "check", "--trust-domain", "example.org", "policies/identities.yaml", "policies/callpolicies.yaml"},
		{"policy", "check", "-f", "policies/callpolicies.yaml", "--trust-domain", "example.org"},
		{"policy", "test", "policies/callpolicies_test.yaml"},
	} {
		for i, a := range args {
			if strings.HasSuffix(a, ".yaml") {
				args[i] = filepath.Join(root, "examples", a)
			}
		}
		var out bytes.Buffer
		if status := cli.Main(t.Context(), args, strings.NewReader(""), &out, &out); status != 0 {
			t.Errorf("signet %s: exit status %d\n%s", strings.Join(args, " "), status, out.Bytes())
		}
	}
}

// TestID_23_ATrustDomainIsNamedByItsOperator: neither program makes up a trust domain, so that no two are alike by
// accident.
func TestID_23_ATrustDomainIsNamedByItsOperator(t *testing.T) {
	if _, err := ca.ReadConfig([]byte("data_dir: /d\nseal: {key_file: /k}\n"), "ca.yaml"); err == nil || !strings.Contains(err.Error(), "trust_domain: missing") {
		t.Errorf("ca.ReadConfig without a trust domain = %v; want that it is missing", err)
	}
	if _, err := agent.ReadConfig([]byte("data_dir: /d\nserver_address: h\n"), "agent.yaml"); err == nil || !strings.Contains(err.Error(), "trust_domain: missing") {
		t.Errorf("agent.ReadConfig without a trust domain = %v; want that it is missing", err)
	}
}

// TestCommandsExist looks up every command line of signet that a document shows.
func TestCommandsExist(t *testing.T) {
	command := regexp.MustCompile("(?m)(?:^|[`$(])\\s*signet ((?:[a-z][a-z0-9-]*)(?: [a-z][a-z0-9-]*)*)((?: +--?[a-z][a-z-]*)?)")
	commandRoot := cli.NewRootCommand()
	seen := 0
	for name, text := range documents(t) {
		for _, m := range command.FindAllStringSubmatch(text, -1) {
			words := strings.Fields(m[1])
			if words[0] == "gives" || words[0] == "holds" || words[0] == "is" {
				continue // prose at the beginning of a line
			}
			cmd, rest, err := commandRoot.Find(words)
			if err != nil || cmd == commandRoot || cmd.HasSubCommands() && len(rest) > 0 {
				t.Errorf("%s: there is no command %q", name, "signet "+m[1])
				continue
			}
			if flagName := strings.TrimLeft(strings.TrimSpace(m[2]), "-"); len(flagName) > 1 && cmd.Flags().Lookup(flagName) == nil && flagName != "help" {
				t.Errorf("%s: signet %s has no flag --%s", name, m[1], flagName)
			}
			seen++
		}
	}
	if seen < 20 {
		t.Errorf("the documents show %d commands; are they read correctly?", seen)
	}
}

// TestEventsAndMetricsAreDocumented compares what the code names with what the documents list, both ways.
func TestEventsAndMetricsAreDocumented(t *testing.T) {
	for _, tt := range []struct {
		what, document string
		code, listed   *regexp.Regexp
		folders        []string
	}{
		{"event", "reference/audit.md", regexp.MustCompile(`"((?:agent|authority|bundle|call|downstreamca|upstreamca|entry|federation|jwtsvid|leak|logger|resource|revocation|rollout|token|userissuer|witsvid|x509svid)\.[a-z]+)"`),
			regexp.MustCompile("`([a-z0-9]+\\.[a-z]+)`"), []string{"ca", "ca/adminapi", "ca/federation", "ca/nodeapi", "ca/registry", "ca/rotation", "ca/userkeys"}},
		{"metric", "operate.md", regexp.MustCompile(`"(signet_(?:ca|agent|proxy)_[a-z0-9_]+)"`),
			regexp.MustCompile("`(signet_[a-z0-9_]+)`"), []string{"ca", "agent", "policy/proxy"}},
	} {
		text, err := os.ReadFile(filepath.Join(root, "docs", filepath.FromSlash(tt.document)))
		if err != nil {
			t.Fatal(err)
		}
		var listed, used []string
		for row := range strings.Lines(string(text)) {
			cells := strings.Split(row, "|")
			if len(cells) < 3 {
				continue
			}
			for _, m := range tt.listed.FindAllStringSubmatch(cells[1], -1) {
				listed = append(listed, m[1])
			}
		}
		for _, folder := range tt.folders {
			files, err := filepath.Glob(filepath.Join(root, folder, "*.go"))
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range files {
				if strings.HasSuffix(f, "_test.go") {
					continue
				}
				src, err := os.ReadFile(f)
				if err != nil {
					t.Fatal(err)
				}
				for _, m := range tt.code.FindAllSubmatch(src, -1) {
					used = append(used, string(m[1]))
				}
			}
		}
		for _, u := range used {
			if !slices.Contains(listed, u) {
				t.Errorf("docs/%s does not list the %s %s", tt.document, tt.what, u)
			}
		}
		for _, l := range listed {
			if !slices.Contains(used, l) && !strings.HasPrefix(l, "resource.") { // the code puts these together
				t.Errorf("docs/%s lists the %s %s, which the code does not name", tt.document, tt.what, l)
			}
		}
	}
}

func documents(t *testing.T) map[string]string {
	t.Helper()
	texts := map[string]string{}
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/operate/*.md", "docs/operate/*/*.md", "docs/reference/*.md"} {
		names, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			texts[name] = string(text)
		}
	}
	return texts
}
