package policy

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/signet-id/signet/internal/strictyaml"
)

var yamlBlock = regexp.MustCompile("(?ms)^```yaml\n(.*?)^```$")

// blocks are the documents of a page, by block of code, with the lines at which they stand.
func blocks(t *testing.T, file string) [][]strictyaml.Document {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out [][]strictyaml.Document
	for _, m := range yamlBlock.FindAllSubmatchIndex(text, -1) {
		docs, err := strictyaml.Split(text[m[2]:m[3]], file, 1+strings.Count(string(text[:m[2]]), "\n"))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, docs)
	}
	return out
}

// TestCookbook decides every table of the cookbook by the documents before it.
func TestCookbook(t *testing.T) {
	const file = "../docs/policy/cookbook.md"
	var policies []strictyaml.Document
	tables, tested := 0, true
	for _, docs := range blocks(t, file) {
		first := true
		for _, doc := range docs {
			switch kind, line, _, _ := doc.Field("kind"); kind {
			case KindPolicyTest:
				set, err := Check(policies, exampleOrg)
				if err != nil {
					t.Fatal(err)
				}
				table, err := ParseTests(doc)
				if err != nil {
					t.Fatal(err)
				}
				for _, r := range RunTests(compile(t, set), table) {
					if !r.Passed {
						t.Errorf("%s\n%s", r.Message, r.Explanation)
					}
				}
				tables, tested = tables+1, true
			case KindCallPolicy, KindPolicyDefaults, KindUserIssuer:
				if first {
					if !tested {
						t.Errorf("%s:%d: the documents before have no table", file, line)
					}
					policies, tested, first = nil, false, false
				}
				policies = append(policies, doc)
				if kind == KindUserIssuer {
					if _, _, err := ParseUserIssuer(doc); err != nil {
						t.Error(err)
					}
				}
			default:
				t.Errorf("%s:%d: a document of kind %q", file, line, kind)
			}
		}
	}
	if tables < 8 || !tested {
		t.Errorf("%d tables, and the last documents have one: %t", tables, tested)
	}
}

// TestLanguageReference holds that the documents of the reference are sound, and that it names all variables, functions and
// reasons of conditions.
func TestLanguageReference(t *testing.T) {
	const file = "../docs/policy/language.md"
	n := 0
	for _, docs := range blocks(t, file) {
		set, err := Check(docs, exampleOrg)
		if err != nil {
			t.Fatal(err)
		}
		for _, pol := range compile(t, set).set.Policies {
			for i := range pol.Rules {
				n++
				if r := newRule(pol, i, 0, conditionsAfter(nil)); r.broken != "" {
					t.Errorf("%s:%d: %s", file, pol.Rules[i].Line, r.broken)
				}
			}
		}
	}
	if n < 6 {
		t.Errorf("the reference has %d rules", n)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	e, err := celEnv()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, v := range e.Variables() {
		if isVariable(v.Name()) {
			names = append(names, v.Name())
		}
	}
	if len(names) != 13 {
		t.Errorf("there are %d variables: %q", len(names), names)
	}
	for name := range e.Functions() {
		if regexp.MustCompile(`^[a-z]`).MatchString(name) {
			names = append(names, "`"+name+"`")
		}
	}
	for _, name := range append(names, ReasonTooManyConditions.String()) {
		if !strings.Contains(string(text), name) {
			t.Errorf("%s does not say %s", file, name)
		}
	}
	for _, limit := range []string{fmt.Sprintf("lists of %d items", usualItems), fmt.Sprintf("texts of %d bytes", usualBytes), "20,000", fmt.Sprintf("%d parts", maxConditionNodes), fmt.Sprintf("brackets %d deep", maxConditionDepth)} {
		if !strings.Contains(string(text), limit) {
			t.Errorf("%s does not say %q", file, limit)
		}
	}
}
