// Package conformance connects each requirement of the SPIFFE standards with the tests that prove it, and writes
// docs/conformance.md. Its test fails when the document is stale, and when a requirement that this version claims has
// no test. Nothing else calls it.
//
// A test carries a requirement when its name says so (TestX509_07_PathlessLeafRejected) or when its body does, as the
// name of a subtest or in a comment (X509-07, V012). A table outside of the test counts for the tests that use it.
package conformance

import (
	_ "embed"
	"fmt"
	"io"
	"slices"
	"strings"
)

//go:embed rows.tsv
var rowsTSV string

// A Row is one requirement.
type Row struct {
	Section string   // of the list: 1 to 14, 7.4, 16
	ID      string   // such as X509-07
	Level   string   // MUST, SHOULD, MAY, ..., RFC, DER, WIMSE, decision, vector
	Binds   []string // ca, agent, wapi, wep, val, pol, cli, bes, bec, brk, docs, all
	Later   string   // key of a capability that is still to come, or ""
	Text    string   // in our words
}

// laterNames says what a capability is that this version does not have yet.
var laterNames = map[string]string{
	"wit":        "WIT-SVIDs with their proofs of possession, at who presents and who validates them (an incubating part of the standard)",
	"witval":     "what a validator does with WIT-SVIDs (the issuer's and the holder's part is here)",
	"federation": "a test of its own (bundles of other trust domains are fetched and handed on)",
	"redirects":  "a reason to follow redirects (docs/decisions/0013)",
	"maps":       "bundle maps",
	"endpoint":   "serving the bundle at an endpoint",
	"revocation": "revocation lists",
	"jitter":     "spreading of pushes that concern a whole fleet",
}

var sections = []struct{ number, title string }{
	{"1", "SPIFFE ID"}, {"2", "SVIDs in general"}, {"3", "X509-SVID"}, {"4", "JWT-SVID"}, {"5", "WIT-SVID"}, {"6", "Workload Endpoint"},
	{"7", "Workload API"}, {"7.4", "Workload API: WIT profile"}, {"8", "Trust domain and bundle"}, {"9", "Bundle map"}, {"10", "Federation"},
	{"11", "Broker Endpoint"}, {"12", "Broker API"}, {"13", "Stability"}, {"14", "Where the standard is silent: our decisions"}, {"16", "Vectors"},
}

// Rows returns all requirements in the order of the list. An error names the line that is wrong.
func Rows() ([]Row, error) {
	var rows []Row
	seen := map[string]bool{}
	n := 0
	for line := range strings.Lines(rowsTSV) {
		n++
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, "#") {
			continue
		}
		f := strings.Split(line, "\t")
		if len(f) != 6 {
			return nil, fmt.Errorf("rows.tsv:%d: %d fields, want 6", n, len(f))
		}
		r := Row{Section: f[0], ID: f[1], Level: f[2], Later: f[4], Text: f[5]}
		if f[3] != "" {
			r.Binds = strings.Split(f[3], ",")
		}
		switch {
		case seen[r.ID]:
			return nil, fmt.Errorf("rows.tsv:%d: %s is there twice", n, r.ID)
		case r.Later != "" && laterNames[r.Later] == "":
			return nil, fmt.Errorf("rows.tsv:%d: no capability is called %q", n, r.Later)
		case r.Text == "" || r.Level == "":
			return nil, fmt.Errorf("rows.tsv:%d: %s has no level or no text", n, r.ID)
		}
		seen[r.ID] = true
		rows = append(rows, r)
	}
	return rows, nil
}

// Claimed tells whether this version claims to meet the requirement, so that a test must show it: what binds issuer,
// agent, Workload API, validator or policy in the stable parts of the standard, what binds the issuer of WIT-SVIDs and the
// agent that holds them, and the Broker Endpoint and API in full, with their clients, for which there is a package.
func (r Row) Claimed() bool {
	if r.Section == "11" || r.Section == "12" {
		return r.Later == ""
	}
	if r.Later != "" && r.Later != "witval" || !slices.Contains([]string{"1", "2", "3", "4", "5", "6", "7", "7.4", "8"}, r.Section) {
		return false
	}
	return slices.ContainsFunc(r.Binds, func(b string) bool {
		return slices.Contains([]string{"ca", "agent", "wapi", "wep", "val", "pol", "all"}, b)
	})
}

// Spread lets tests that carry a vector carry the rules that the vector is an input for as well, which stand at the end
// of its text in brackets.
func Spread(rows []Row, tests map[string][]Test) {
	for _, r := range rows {
		if r.Level != "vector" {
			continue
		}
		at := strings.LastIndexByte(r.Text, '[')
		for _, rule := range idsInText([]byte(r.Text[max(at, 0):])) {
			for _, t := range tests[r.ID] {
				t.named = false
				if !slices.ContainsFunc(tests[rule], func(have Test) bool { return have.String() == t.String() }) {
					tests[rule] = append(tests[rule], t)
				}
			}
		}
	}
}

// Missing returns the claimed rows that no test carries.
func Missing(rows []Row, tests map[string][]Test) []Row {
	var missing []Row
	for _, r := range rows {
		if r.Claimed() && len(tests[r.ID]) == 0 {
			missing = append(missing, r)
		}
	}
	return missing
}

// shown is how many tests of a row the document names; a row is rarely carried by more, and then it says how many.
const shown = 3

// Write writes docs/conformance.md.
func Write(w io.Writer, rows []Row, tests map[string][]Test, specRevision string) error {
	var b strings.Builder
	claimed, carried := 0, 0
	for _, r := range rows {
		if r.Claimed() {
			claimed++
			if len(tests[r.ID]) > 0 {
				carried++
			}
		}
	}
	fmt.Fprintf(&b, `# Conformance

Made from internal/conformance/rows.tsv and the tests by `+"`make docs`"+`; do not edit.

What the SPIFFE standards demand (commit %s of github.com/spiffe/spiffe), in our words, and the tests that show it. Of the requirements
on issuer, agent, Workload API, validators and policy in the stable parts, on the issuer of WIT-SVIDs, and on brokers' endpoints and clients, this version
claims %d; %d have a test.

Levels: MUST, SHOULD, MAY and their negatives are the standard's. RFC is a rule that the standard imports. DER is derived: another rule
cannot be met without it. WIMSE comes from a draft that the standard points at. *decision* is ours, where the standard is silent.
*vector* is an input with its verdict. *later* names what the requirement waits for. Rows for clients bind the libraries that services use.
`, specRevision, claimed, carried)
	for _, s := range sections {
		fmt.Fprintf(&b, "\n## %s\n\n| id | level | requirement | tests |\n|---|---|---|---|\n", s.title)
		for _, r := range rows {
			if r.Section == s.number {
				fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", r.ID, r.Level, escape(r.Text), carriers(r, tests[r.ID]))
			}
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func carriers(r Row, tests []Test) string {
	var cells []string
	for _, t := range tests[:min(shown, len(tests))] {
		cells = append(cells, "`"+t.String()+"`")
	}
	if more := len(tests) - shown; more > 0 {
		cells = append(cells, fmt.Sprintf("and %d more", more))
	}
	if r.Later != "" {
		cells = append(cells, "later: "+laterNames[r.Later])
	}
	if len(cells) == 0 {
		switch {
		case slices.Equal(r.Binds, []string{"cli"}), slices.Equal(r.Binds, []string{"docs", "cli"}):
			return "for clients"
		case r.Claimed():
			return "**none**"
		}
		return "none"
	}
	return strings.Join(cells, ", ")
}

func escape(s string) string { return strings.ReplaceAll(s, "|", "\\|") }
