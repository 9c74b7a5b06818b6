package conformance

import (
	"bytes"
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// A Test is a test function, or a script of the command line.
type Test struct {
	Package string // folder, relative to the root
	Name    string // of the function, or of the script's file
	named   bool   // its name carries the row, not only its body
}

func (t Test) String() string { return t.Package + "." + t.Name }

const prefixes = `ID|SVID|X509|JWT|WIT|WPT|WEP|WAPI|TDB|MAP|FED|BEP|BAPI|STAB|DEC`

var (
	inText  = regexp.MustCompile(`\b(?:(` + prefixes + `)-(\d\d)(?:\.\.(\d\d))?|(V\d\d\d)(?:\.\.V?(\d\d\d))?)\b`)
	joined  = regexp.MustCompile(`^(` + prefixes + `)(\d\d)$`)
	prefix  = regexp.MustCompile(`^(?:` + prefixes + `)$`)
	number  = regexp.MustCompile(`^\d\d$`)
	vector  = regexp.MustCompile(`^V\d\d\d$`)
	isTest  = regexp.MustCompile(`^(?:Test|Fuzz|Example|Benchmark)`)
	skipDir = map[string]bool{".git": true, "bin": true, "dist": true, "tools": true}
)

// Scan reads the tests below root and returns for each row id the tests that carry it, those first whose name does.
func Scan(root string) (map[string][]Test, error) {
	found := map[string][]Test{}
	add := func(id string, t Test) {
		for i, have := range found[id] {
			if have.String() == t.String() {
				found[id][i].named = have.named || t.named
				return
			}
		}
		found[id] = append(found[id], t)
	}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		switch {
		case d.IsDir():
			if skipDir[rel] {
				return fs.SkipDir
			}
			if rel == "internal/conformance" {
				return fs.SkipDir // speaks about rows, proves none
			}
			return scanFolder(path, rel, add)
		case strings.HasSuffix(rel, ".txtar"):
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			for _, id := range idsInText(text) {
				add(id, Test{Package: strings.Split(rel, "/testdata/")[0], Name: filepath.Base(rel)})
			}
		}
		return nil
	})
	for _, tests := range found {
		slices.SortFunc(tests, func(a, b Test) int {
			if a.named != b.named {
				if a.named {
					return -1
				}
				return 1
			}
			return cmp.Compare(a.String(), b.String())
		})
	}
	return found, err
}

// scanFolder reads the test files of one folder, which are one or two packages.
func scanFolder(dir, rel string, add func(string, Test)) error {
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		return err
	}
	tables := map[string][]string{} // ids in what is declared outside of functions, by its name
	type function struct {
		name string
		ids  []string
		uses map[string]bool
	}
	var functions []function
	for _, name := range files {
		src, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, name, src, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return fmt.Errorf("reading tests: %w", err)
		}
		text := func(doc *ast.CommentGroup, n ast.Node) []byte {
			from := n.Pos()
			if doc != nil {
				from = doc.Pos()
			}
			return src[fset.Position(from).Offset:fset.Position(n.End()).Offset]
		}
		for _, decl := range f.Decls {
			switch d := decl.(type) {
			case *ast.FuncDecl:
				if d.Recv != nil || !isTest.MatchString(d.Name.Name) {
					continue
				}
				fn := function{name: d.Name.Name, ids: idsInText(text(d.Doc, d)), uses: map[string]bool{}}
				ast.Inspect(d, func(n ast.Node) bool {
					if id, ok := n.(*ast.Ident); ok {
						fn.uses[id.Name] = true
					}
					return true
				})
				functions = append(functions, fn)
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					if v, ok := spec.(*ast.ValueSpec); ok && d.Tok == token.VAR {
						for _, id := range v.Names {
							tables[id.Name] = idsInText(text(v.Doc, v))
						}
					}
				}
			}
		}
	}
	for _, fn := range functions {
		t := Test{Package: rel, Name: fn.name}
		for _, id := range idsInName(fn.name) {
			t.named = true
			add(id, t)
		}
		t.named = false
		for _, id := range fn.ids {
			add(id, t)
		}
		for table, ids := range tables {
			if fn.uses[table] {
				for _, id := range ids {
					add(id, t)
				}
			}
		}
	}
	return nil
}

// idsInName returns the rows that the name of a test function carries: X509-07 and X509-08 of
// TestX509_07_08_LeafNeedsAPath, SVID-02 and V012 of TestSVID02_V012.
func idsInName(name string) []string {
	var ids []string
	current := ""
	for _, part := range strings.Split(isTest.ReplaceAllString(name, ""), "_") {
		switch m := joined.FindStringSubmatch(part); {
		case m != nil:
			current = m[1]
			ids = append(ids, m[1]+"-"+m[2])
		case prefix.MatchString(part):
			current = part
		case vector.MatchString(part):
			ids = append(ids, part)
		case number.MatchString(part) && current != "":
			ids = append(ids, current+"-"+part)
		default:
			current = ""
		}
	}
	return ids
}

// idsInText returns the rows that a text names, each once; X509-14..16 names three.
func idsInText(text []byte) []string {
	var ids []string
	for _, m := range inText.FindAllSubmatch(text, -1) {
		family, from, to := string(m[1])+"-", m[2], m[3]
		if len(m[4]) > 0 {
			family, from, to = "V", bytes.TrimPrefix(m[4], []byte("V")), m[5]
		}
		if len(to) == 0 {
			to = from
		}
		first, _ := strconv.Atoi(string(from)) // digits, by the pattern
		last, _ := strconv.Atoi(string(to))
		for n := first; n <= last; n++ {
			ids = append(ids, fmt.Sprintf("%s%0*d", family, len(from), n))
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}
