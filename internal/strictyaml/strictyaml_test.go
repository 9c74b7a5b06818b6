package strictyaml

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/google/go-cmp/cmp"
)

type inner struct {
	Kind string `yaml:"kind"`
}

type config struct {
	inner  `yaml:"-"`
	Inner  inner             `yaml:",inline"`
	Name   string            `yaml:"name"`
	TTL    time.Duration     `yaml:"ttl"`
	On     *bool             `yaml:"on"`
	Port   uint16            `yaml:"port"`
	Delta  int               `yaml:"delta"`
	Rate   float64           `yaml:"rate"`
	IDs    []string          `yaml:"ids"`
	Labels map[string]string `yaml:"labels"`
	Sub    struct {
		Path string `yaml:"path"`
	} `yaml:"sub"`
	At   Located[[]Located[string]] `yaml:"at"`
	Many OneOrMany[Located[string]] `yaml:"many"`
	Free time.Time                  `yaml:"free"` // a TextUnmarshaler
}

func TestUnmarshalReadsEveryType(t *testing.T) {
	const in = `# a comment
kind: Config
name: "12"
ttl: 1h30m
on: false
port: 8081
delta: -3
rate: 0.5
ids: [a, b]
labels:
  x: y
sub: {path: /p}
at: [one,
  two]
free: "2026-01-02T03:04:05Z"
`
	var c config
	if err := Unmarshal([]byte(in), "f.yaml", &c); err != nil {
		t.Fatal(err)
	}
	if c.Inner.Kind != "Config" || c.Name != "12" || c.TTL != 90*time.Minute || c.On == nil || *c.On || c.Port != 8081 ||
		c.Delta != -3 || c.Rate != 0.5 || !cmp.Equal(c.IDs, []string{"a", "b"}) || c.Labels["x"] != "y" || c.Sub.Path != "/p" ||
		c.Free.Year() != 2026 {
		t.Errorf("read %+v", c)
	}
	want := Located[[]Located[string]]{[]Located[string]{{"one", 13, 6}, {"two", 14, 3}}, 13, 5}
	if diff := cmp.Diff(want, c.At); diff != "" {
		t.Errorf("located values (-want +got):\n%s", diff)
	}
}

func TestOneOrMany(t *testing.T) {
	for in, want := range map[string]OneOrMany[Located[string]]{
		"many: x\n":      {{"x", 1, 7}},
		"many: [x, y]\n": {{"x", 1, 8}, {"y", 1, 11}},
		"many:\n- x\n":   {{"x", 2, 3}},
		"many: []\n":     {},
	} {
		var c config
		if err := Unmarshal([]byte(in), "f", &c); err != nil || !cmp.Equal(c.Many, want) {
			t.Errorf("Unmarshal(%q) = %v, %v; want %v", in, c.Many, err, want)
		}
	}
	err := Unmarshal([]byte("many: 1\n"), "f", new(config))
	if want := `f:1:7: many is the number "1"; it must be a string; write it in quotes`; fmt.Sprint(err) != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestSorted(t *testing.T) {
	err := Sorted(Errors{{"b", 1, 1, "m"}, {"a", 2, 1, "m"}, {"a", 1, 3, "m"}})
	if got, want := err.Error(), "a:1:3: m\na:2:1: m\nb:1:1: m"; got != want {
		t.Errorf("Sorted: %q, want %q", got, want)
	}
}

func TestUnmarshalReadsJSON(t *testing.T) {
	var c config
	if err := Unmarshal([]byte(`{"name": "a/b\u00e9\n", "ids": ["x"], "on": true, "port": 1}`), "f.json", &c); err != nil {
		t.Fatal(err)
	}
	if c.Name != "a/bé\n" || len(c.IDs) != 1 || c.On == nil || !*c.On || c.Port != 1 {
		t.Errorf("read %+v", c)
	}
}

func TestUnmarshalRefuses(t *testing.T) {
	deep := strings.Repeat("[", MaxDepth+1) + strings.Repeat("]", MaxDepth+1)
	for _, tt := range []struct {
		name, in string
		want     string // complete, or the start when it ends in an ellipsis
	}{
		{"unknown field", "name: x\nnmae: y\n", `f:2:1: unknown field "nmae" in the document; known are kind, …`},
		{"unknown field inside", "sub: {pth: y}\n", `f:1:7: unknown field "pth" in sub; known are path`},
		{"fields without a tag are not reachable", "Name: x\n", `f:1:1: unknown field "Name"…`},
		{"duplicate key", "name: x\nname: y\n", `f:2:1: duplicate key "name", first on line 1`},
		{"duplicate key inside", "labels:\n  a: x\n  \"a\": y\n", `f:3:3: duplicate key "a", first on line 2`},
		{"alias and anchor", "name: &a x\nids: [*a]\n", "f:1:7: anchor \"&a\": anchors are not allowed\nf:2:7: alias \"*a\": aliases are not allowed; write the value again"},
		{"merge key", "sub:\n  <<: {path: x}\n", `f:2:3: merge keys are not allowed`},
		{"tag", "name: !!str 1\n", `f:1:7: tag "!!str": tags are not allowed`},
		{"number for a string", "name: 12\n", `f:1:7: name is the number "12"; it must be a string; write it in quotes`},
		{"boolean for a string", "name: true\n", `f:1:7: name is the boolean "true"; it must be a string; write it in quotes`},
		{"list for a string", "name: [a]\n", `f:1:7: name is the list; it must be a string`},
		{"scalar for a list", "ids: a\n", `f:1:6: ids is the string "a"; it must be a list, such as [a, b]`},
		{"scalar for a mapping", "sub: a\n", `f:1:6: sub is the string "a"; it must be a mapping`},
		{"list for a document", "- a\n", `f:1:1: the document is the list; it must be a mapping`},
		{"null", "name:\n", `f:1:6: name is empty (null); give it a value or remove it`},
		{"null in a list", "ids: [a, ~]\n", `f:1:10: ids[1] is empty (null); give it a value or remove it`},
		{"plain number for a duration", "ttl: 90\n", `f:1:6: ttl is the number "90"; it must be a duration with its unit, such as 90s or 1h (90s for seconds)`},
		{"zero for a duration", "ttl: 0\n", `f:1:6: ttl is the number "0"; …`},
		{"quoted number for a duration", "ttl: '90'\n", `f:1:6: ttl is "90"; it must be a duration with its unit, such as 90s or 1h`},
		{"octal", "port: 0640\n", `f:1:7: port is the number "0640"; it must be a whole number in decimal`},
		{"hexadecimal", "port: 0x10\n", `f:1:7: port is the number "0x10"; it must be a whole number in decimal`},
		{"too large", "port: 65536\n", `f:1:7: port is "65536"; it must be from 0 to 65535`},
		{"negative", "port: -1\n", `f:1:7: port is "-1"; it must be from 0 to 65535`},
		{"infinity", "rate: .inf\n", `f:1:7: rate is the number ".inf"; it must be a number`},
		{"yes for true", "on: yes\n", `f:1:5: on is the string "yes"; it must be true or false`},
		{"bad text", "free: noon\n", `f:1:7: free: …`},
		{"tab", "sub:\n\tpath: x\n", `f:2:1: tab; use spaces`},
		{"NUL", "name: a\x00\n", `f:1:8: NUL byte`},
		{"invalid UTF-8", "name: é\xff\n", `f:1:8: byte 0xff is not UTF-8`},
		{"line separator", "name: a\u2028---\n", `f:1:8: character U+2028; remove it`},
		{"lone carriage return", "name: a\r---\r", "f:1:8: control character U+000D\n…"},
		{"byte order mark", "\ufeffname: a", `f:1:1: character U+FEFF; remove it`},
		{"too deep", "ids: " + deep, `f:1:37: nested deeper than 32 levels`},
		{"too large a document", "# " + strings.Repeat("x", MaxDocument) + "\nname: x\n", `f:1:1: the document has 1048587 bytes; at most 1048576 are read`},
		{"syntax", "name: x\nids: a: b\n", `f:2:1: not valid YAML: …`},
		{"JSON escape that YAML lacks", `{"name": "a\/b"}`, `f:1:1: not valid YAML: found unknown escape character`},
		{"a second document", "name: x\n---\nname: y\n", `f:3:1: a second document begins here; this file holds exactly one`},
		{"directive", "%YAML 1.1\n---\nname: x\n", `f:1:1: YAML directives are not allowed`},
		{"key that is a number", "labels: {1: a}\n", `f:1:10: key "1" is a number; write it in quotes`},
		{"key that is a list", "labels: {[a]: a}\n", `f:1:10: a key must be a string, not a list`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := Unmarshal([]byte(tt.in), "f", new(config))
			got := fmt.Sprint(err)
			start, cut := strings.CutSuffix(tt.want, "…")
			if !cut && got != tt.want || !strings.HasPrefix(got, start) {
				t.Errorf("Unmarshal(%.60q):\n got %s\nwant %s", tt.in, got, tt.want)
			}
			var list Errors
			if !errors.As(err, &list) {
				t.Errorf("the error is of type %T", err)
			}
		})
	}
}

func TestUnmarshalReportsAllMistakesUpToALimit(t *testing.T) {
	var in strings.Builder
	for i := range 30 {
		fmt.Fprintf(&in, "x%d: 1\n", i)
	}
	var list Errors
	if err := Unmarshal([]byte(in.String()), "f", new(config)); !errors.As(err, &list) || len(list) != MaxErrors {
		t.Errorf("30 mistakes: got %v", err)
	}
	var one *Error
	if !errors.As(error(list), &one) || one.Line != 1 {
		t.Errorf("errors.As does not find the first mistake: %v", one)
	}
}

func TestSplitKeepsPositionsAndText(t *testing.T) {
	const in = "# head\n\nname: a\n---\n# only a comment\n---\r\nname: b\r\n...\n--- {name: c}\n--- # comment\nname: |\n  ---\n  text\n"
	docs, err := Split([]byte(in), "f", 100)
	if err != nil {
		t.Fatal(err)
	}
	type doc struct {
		Name        string
		Line, Name0 int
		Content     string
	}
	var got []doc
	for _, d := range docs {
		name, line, _, ok := d.Field("name")
		if !ok {
			t.Errorf("document at line %d has no name", d.Line)
		}
		got = append(got, doc{name, d.Line, line, string(d.Content)})
	}
	want := []doc{
		{"a", 100, 102, "# head\n\nname: a\n"},
		{"b", 106, 106, "name: b\r\n"},
		{"c", 108, 108, "--- {name: c}\n"},
		{"---\ntext\n", 110, 110, "name: |\n  ---\n  text\n"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Split (-want +got):\n%s", diff)
	}
}

func TestDecodeWantsAStruct(t *testing.T) {
	if err := Decode(Document{Node: &yaml.Node{}}, new(int)); err == nil {
		t.Error("Decode into *int succeeded")
	}
	if err := Decode(Document{File: "f"}, new(config)); err == nil || err.Error() != "f:1:1: the document is empty" {
		t.Errorf("Decode of an empty document: %v", err)
	}
}

// FuzzSplit holds that every document that is accepted is the one that package yaml reads from the same text, that its
// text splits to itself, and that positions lie within the input.
func FuzzSplit(f *testing.F) {
	f.Add("name: x\n---\nids: [a, b]\n")
	f.Add("{\"a\": {\"b\": [1, 2.5, null, true]}}")
	f.Add("a: |\n  text\n  ---\nb: >-\n  folded\n...\nc: 'x\n  y'\n")
	f.Add("--- a\n--- - b\n- <<: *x\n")
	f.Fuzz(func(t *testing.T, in string) {
		docs, err := Split([]byte(in), "f", 1)
		if err != nil {
			var list Errors
			if !errors.As(err, &list) || len(list) == 0 || len(list) > MaxErrors {
				t.Fatalf("error %T %v", err, err)
			}
			for _, e := range list {
				if e.Line < 1 || e.Column < 1 || e.Line > strings.Count(in, "\n")+2 {
					t.Fatalf("position %d:%d outside of the input: %v", e.Line, e.Column, e)
				}
			}
			return
		}
		for _, d := range docs {
			again, err := Split(d.Content, "f", d.Line)
			if err != nil || len(again) != 1 {
				t.Fatalf("text of an accepted document splits to %d documents, %v:\n%q", len(again), err, d.Content)
			}
			if diff := cmp.Diff(d.Node, again[0].Node); diff != "" {
				t.Fatalf("document changes when it is read again:\n%s", diff)
			}
			var plain, own any
			if err := yaml.Unmarshal(d.Content, &plain); err != nil {
				continue // for instance a timestamp out of range
			}
			if err := d.Node.Decode(&own); err != nil {
				t.Fatalf("decoding an accepted node: %v", err)
			}
			if !sameValue(plain, own) {
				t.Fatalf("read %#v, package yaml reads %#v", own, plain)
			}
			var c config
			if err := Decode(d, &c); err != nil && len(err.(Errors)) == 0 {
				t.Fatal("an error without a message")
			}
		}
	})
}

func sameValue(a, b any) bool {
	return cmp.Equal(a, b, cmp.Comparer(func(x, y float64) bool { return x == y || math.IsNaN(x) && math.IsNaN(y) }))
}
