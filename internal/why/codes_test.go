package why

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"strings"
	"testing"
)

// TestCodesAreDocumented: each cause stands once in the table of docs/operate/why.md.
func TestCodesAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/operate/why.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(page), "## Causes")
	table, _, _ = strings.Cut(table, "\n## ")
	f, err := parser.ParseFile(token.NewFileSet(), "why.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	codes := 0
	ast.Inspect(f, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if !ok || len(v.Values) != 1 {
			return true
		}
		if typ, ok := v.Type.(*ast.Ident); !ok || typ.Name != "Code" {
			return true
		}
		code := strings.Trim(v.Values[0].(*ast.BasicLit).Value, `"`)
		codes++
		if strings.Count(table, "`"+code+"`") != 1 {
			t.Errorf("docs/operate/why.md does not have %s once", code)
		}
		return true
	})
	if listed := strings.Count(table, "`") / 2; codes < 40 || listed < codes {
		t.Errorf("%d codes and %d names in the document", codes, listed)
	}
}

func TestQuote(t *testing.T) {
	for in, want := range map[string]string{"unix:path:/usr/bin/web": "unix:path:/usr/bin/web", "it's": `'it'\''s'`, "": "''", "a b": "'a b'", "$(x)": "'$(x)'", "k8s:pod-label:a:b": "k8s:pod-label:a:b"} {
		if got := quote(in); got != want {
			t.Errorf("quote(%q) = %s, want %s", in, got, want)
		}
	}
}
