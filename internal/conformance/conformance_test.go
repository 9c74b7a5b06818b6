package conformance

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/signet-id/signet/internal/version"
)

var update = flag.Bool("update", false, "write docs/conformance.md anew")

const root = "../.."

// TestDocument compares docs/conformance.md with the rows and the tests of the tree.
func TestDocument(t *testing.T) {
	rows, tests := read(t)
	var want bytes.Buffer
	if err := Write(&want, rows, tests, version.SpecRevision); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(root, "docs", "conformance.md")
	if *update {
		if err := os.WriteFile(path, want.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want.Bytes()) {
		t.Error("docs/conformance.md is stale; make it anew with: make docs")
	}
}

// TestEveryClaimHasATest names the requirements that this version claims and no test shows.
func TestEveryClaimHasATest(t *testing.T) {
	rows, tests := read(t)
	for _, r := range Missing(rows, tests) {
		t.Errorf("no test carries %s (%s): %s", r.ID, r.Level, r.Text)
	}
}

// TestTestsNameRowsThatExist finds a mistyped row.
func TestTestsNameRowsThatExist(t *testing.T) {
	rows, tests := read(t)
	for id, carriers := range tests {
		if !slices.ContainsFunc(rows, func(r Row) bool { return r.ID == id }) {
			t.Errorf("%s names %s, and there is no such row", carriers[0], id)
		}
	}
}

func TestIDs(t *testing.T) {
	for _, tt := range []struct {
		name string
		want []string
	}{
		{"TestX509_07_PathlessLeafRejected", []string{"X509-07"}},
		{"TestID_08_17_EveryByte", []string{"ID-08", "ID-17"}},
		{"TestX509_17_18_SVID02_03_AuthorityHasThePathlessID", []string{"X509-17", "X509-18", "SVID-02", "SVID-03"}},
		{"TestV125_FED_08_Older", []string{"V125", "FED-08"}},
		{"FuzzID_01", []string{"ID-01"}},
		{"TestX509SVIDVectors", nil},
		{"TestHTTP_07", nil},
		{"TestX509_Leaf_07", nil},
	} {
		if got := idsInName(tt.name); !slices.Equal(got, tt.want) {
			t.Errorf("idsInName(%q) = %q; want %q", tt.name, got, tt.want)
		}
	}
	text := "// X509-14..16 and [JWT-04], V007..009; not AX509-15 or X509-123 or RS256"
	want := []string{"JWT-04", "V007", "V008", "V009", "X509-14", "X509-15", "X509-16"}
	if got := idsInText([]byte(text)); !slices.Equal(got, want) {
		t.Errorf("idsInText(%q) = %q; want %q", text, got, want)
	}
}

// TestScanAttributes looks at a folder of one test file with a table, a helper and two tests.
func TestScanAttributes(t *testing.T) {
	dir := t.TempDir()
	src := `package p
var vectors = []string{"V001 plain", "ID-03 query"}
func helper() { _ = "JWT-01" }
// TestTable is SVID-04.
func TestTable(t *testing.T) { for range vectors { helper() } }
func TestWEP_07(t *testing.T) { _ = 1 }
`
	if err := os.WriteFile(filepath.Join(dir, "p_test.go"), []byte(src), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := Scan(dir)
	if err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]string{"V001": "..TestTable", "ID-03": "..TestTable", "SVID-04": "..TestTable", "WEP-07": "..TestWEP_07"} {
		if tests := got[id]; len(tests) != 1 || tests[0].String() != want {
			t.Errorf("Scan: %s is carried by %v; want %s alone", id, tests, want)
		}
	}
	if tests := got["JWT-01"]; len(tests) != 0 {
		t.Errorf("Scan: JWT-01 is carried by %v, but stands in a helper", tests)
	}
}

func read(t *testing.T) ([]Row, map[string][]Test) {
	t.Helper()
	rows, err := Rows()
	if err != nil {
		t.Fatal(err)
	}
	tests, err := Scan(root)
	if err != nil {
		t.Fatal(err)
	}
	Spread(rows, tests)
	return rows, tests
}
