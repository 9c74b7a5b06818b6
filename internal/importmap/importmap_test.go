package importmap

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write testdata/*.modules anew")

const root = "../.."

// TestMap holds every package of the tree to the map.
func TestMap(t *testing.T) {
	dependOnTree(t)
	pkgs := list(t)
	if len(pkgs) < 20 {
		t.Fatalf("go list names %d packages, which cannot be all", len(pkgs))
	}
	for _, fault := range Check(pkgs) {
		t.Error(fault)
	}
}

// TestModules compares what each binary links with testdata/NAME.modules. A module that is new there is a decision:
// who maintains it, what it brings along, which binaries it reaches. Then: go test ./internal/importmap -update
func TestModules(t *testing.T) {
	dependOnTree(t)
	for _, binary := range []string{"signet", "signet-agent", "signet-proxy"} {
		if _, err := os.Stat(filepath.Join(root, "cmd", binary)); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		packages := lines(goCommand(t, "list", "-deps", "-f", "{{with .Module}}{{$.ImportPath}}{{end}}", "./cmd/"+binary))
		if binary != "signet" {
			for _, fault := range CheckSlim(binary, packages) {
				t.Error(fault)
			}
		}
		modules := lines(goCommand(t, "list", "-deps", "-f", "{{with .Module}}{{if not .Main}}{{.Path}}{{end}}{{end}}", "./cmd/"+binary))
		golden := filepath.Join("testdata", binary+".modules")
		if *update {
			if err := os.WriteFile(golden, []byte(strings.Join(modules, "\n")+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Errorf("%v (make it with: go test ./internal/importmap -update)", err)
			continue
		}
		wanted := lines(want)
		for _, m := range modules {
			if !slices.Contains(wanted, m) {
				t.Errorf("%s links %s, which %s does not name", binary, m, golden)
			}
		}
		for _, m := range wanted {
			if !slices.Contains(modules, m) {
				t.Errorf("%s names %s, which %s does not link any more", golden, m, binary)
			}
		}
	}
}

// TestLinkerDrops builds the slim programs as they are released, and looks for what keeps the linker from dropping methods that
// nobody calls: templates, which call methods by their name.
func TestLinkerDrops(t *testing.T) {
	dependOnTree(t)
	script, err := os.ReadFile(filepath.Join(root, "tools", "build.sh"))
	if err != nil {
		t.Fatal(err)
	}
	tags := ""
	for _, line := range lines(script) {
		if after, ok := strings.CutPrefix(line, "tags="); ok {
			tags = after
		}
	}
	if tags == "" {
		t.Fatal("tools/build.sh names no tags")
	}
	for _, binary := range linkedSlim {
		program := filepath.Join(t.TempDir(), binary)
		goCommand(t, "build", "-tags", tags, "-o", program, "./cmd/"+binary)
		symbols := string(goCommand(t, "tool", "nm", program))
		if !strings.Contains(symbols, "main.main") {
			t.Fatalf("%s has no symbols", binary)
		}
		if strings.Contains(symbols, "text/template.(*state).evalField") {
			t.Errorf("%s can run templates, so every method of every type in it is linked; go build -ldflags=-dumpdep says who calls text/template", binary)
		}
	}
}

// linkedSlim are the programs in which nothing calls methods by name.
var linkedSlim = []string{"signet-agent", "signet-proxy"}

// TestCheckFinds proves that each kind of fault is found.
func TestCheckFinds(t *testing.T) {
	m := func(paths ...string) (out []string) {
		for _, p := range paths {
			out = append(out, Module+"/"+p)
		}
		return out
	}
	tests := []struct {
		name string
		pkg  Package
		want string // "" if nothing is wrong
	}{
		{"a door and what it serves", Package{Path: "ca/nodeapi", Imports: m("ca/registry", "ca/auditlog", "spiffe")}, ""},
		{"a package and its part", Package{Path: "agent/workloadattest", Imports: m("agent/workloadattest/unix")}, ""},
		{"the top and its sub-packages", Package{Path: "agent", Imports: m("agent/svidcache", "workloadapi")}, ""},
		{"the command line composes", Package{Path: "internal/cli", Imports: m("ca", "agent"), Deps: m("ca", "agent")}, ""},
		{"no rule", Package{Path: "helpers"}, "has no place"},
		{"neighbours", Package{Path: "ca/registry", Imports: m("ca/auditlog")}, "imports ca/auditlog"},
		{"neighbours at the agent", Package{Path: "agent/caclient", Imports: m("agent/svidcache")}, "imports agent/svidcache"},
		{"uphill", Package{Path: "workloadapi", Imports: m("agent/svidcache")}, "imports agent/svidcache"},
		{"pure packages import nothing of ours", Package{Path: "spiffe", Imports: m("internal/durable")}, "imports internal/durable"},
		{"other side, directly", Package{Path: "ca", Imports: m("agent"), Deps: m("agent")}, "needs agent; CA and agent meet"},
		{"other side, through a third package", Package{Path: "agent/svidcache", Deps: m("ca/store")}, "needs ca/store"},
		{"other side, in a test", Package{Path: "agent", TestImports: m("ca")}, "needs ca; CA and agent meet"},
		{"enforcement point in the agent", Package{Path: "agent", Deps: m("policy/source")}, "needs policy/source"},
		{"a library that runs the CA", Package{Path: "policy/source", Deps: m("ca")}, "needs ca; only"},
		{"key bytes elsewhere", Package{Path: "ca/authority", Imports: []string{"go.step.sm/crypto/kms"}}, "imports go.step.sm/crypto/kms"},
		{"files in a pure package", Package{Path: "policy", Imports: []string{"os"}}, "imports os, but is pure"},
		{"gRPC below a pure package", Package{Path: "spiffe", Deps: []string{"google.golang.org/grpc/codes"}}, "needs google.golang.org/grpc/codes"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.pkg.Path = Module + "/" + tt.pkg.Path
			got := strings.Join(Check([]Package{tt.pkg}), "\n")
			if (tt.want == "") != (got == "") || !strings.Contains(got, tt.want) {
				t.Errorf("Check(%+v) = %q; want %q", tt.pkg, got, tt.want)
			}
		})
	}
	if got := CheckSlim("signet-agent", []string{"k8s.io/client-go/rest", "net/http"}); len(got) != 1 {
		t.Errorf("CheckSlim = %q; want client-go alone", got)
	}
}

// TestPureDoesNotDial looks at what pure packages use of package net.
func TestPureDoesNotDial(t *testing.T) {
	for _, pkg := range pure {
		files, err := filepath.Glob(filepath.Join(root, pkg, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: no Go files (%v)", pkg, err)
		}
		for _, name := range files {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			ast.Inspect(f, func(n ast.Node) bool {
				if s, ok := n.(*ast.SelectorExpr); ok {
					if x, ok := s.X.(*ast.Ident); ok && x.Name == "net" && !slices.Contains(pureNet, s.Sel.Name) {
						t.Errorf("%s uses net.%s, but %s is pure", name, s.Sel.Name, pkg)
					}
				}
				return true
			})
		}
	}
}

// list asks the go command for all packages of the module.
func list(t *testing.T) []Package {
	d := json.NewDecoder(bytes.NewReader(goCommand(t, "list", "-json=ImportPath,Imports,TestImports,XTestImports,Deps", "./...")))
	var pkgs []Package
	for {
		var p struct {
			ImportPath                               string
			Imports, TestImports, XTestImports, Deps []string
		}
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, Package{Path: p.ImportPath, Imports: p.Imports, Deps: p.Deps, TestImports: slices.Concat(p.TestImports, p.XTestImports)})
	}
}

// goCommand runs go as a release does: for linux/amd64, without cgo.
func goCommand(t *testing.T, args ...string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH=amd64", "CGO_ENABLED=0")
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, exit.Stderr)
	} else if err != nil {
		t.Fatal(err)
	}
	return out
}

// lines returns the distinct lines of b, sorted.
func lines(b []byte) []string {
	out := strings.Fields(string(b))
	slices.Sort(out)
	return slices.Compact(out)
}

// dependOnTree looks at every folder of Go code, so that the go command does not take an old result from its cache
// when a file there has changed.
func dependOnTree(t *testing.T) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (path == filepath.Join(root, ".git") || path == filepath.Join(root, "bin") || path == filepath.Join(root, "dist")) {
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
