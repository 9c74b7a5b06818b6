package spiffe

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
)

var testLimits = jsonLimits{bytes: 4096, depth: 8, values: 200}

func TestReadJSON(t *testing.T) {
	for _, tt := range []struct{ name, in, row string }{
		{"everything", `{"a":[1,-2.5e3,"x\u00e9\"\\",true,false,null,{}],"A":1}`, ""},
		{"surrogate pair", `"\ud83d\ude00"`, ""},
		{"escaped backslash before u", `"\\ud800"`, ""},
		{"depth 8", strings.Repeat("[", 8) + strings.Repeat("]", 8), ""},
		{"depth 9", strings.Repeat("[", 9) + strings.Repeat("]", 9), "syntax"},
		{"200 values", "[" + strings.Repeat("1,", 198) + "1]", ""},
		{"201 values", "[" + strings.Repeat("1,", 199) + "1]", "syntax"},
		{"4097 bytes", strings.Repeat(" ", 4096) + "1", "syntax"},
		{"names differ by case", `{"a":1,"A":2}`, ""},
		{"name twice", `{"a":1,"a":1}`, "duplicate"},
		{"name twice by escape", `{"a":1,"\u0061":1}`, "duplicate"},
		{"name twice below", `[{"x":{"a":1,"b":2,"a":1}}]`, "duplicate"},
		{"same name in two objects", `[{"a":1},{"a":1}]`, ""},
		{"high half", `"\ud800"`, "syntax"},
		{"low half", `"\udc00"`, "syntax"},
		{"two high halves", `"\ud800\ud800"`, "syntax"},
		{"high half at the end", `"\ud800x"`, "syntax"},
		{"after an escaped backslash", `"\\\ud800"`, "syntax"},
		{"not UTF-8", "\"\xff\"", "syntax"},
		{"two values", `1 2`, "syntax"},
		{"nothing", ``, "syntax"},
		{"comment", `{} // x`, "syntax"},
		{"NaN", `NaN`, "syntax"},
		{"leading zero", `01`, "syntax"},
		{"byte order mark", "\ufeff1", "DEC-19"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := readJSON([]byte(tt.in), testLimits, "syntax", "duplicate")
			wantRow(t, "readJSON("+excerpt(tt.in)+")", err, tt.row)
		})
	}
}

// What we read, encoding/json reads too, and to the same value.
func FuzzReadJSON(f *testing.F) {
	for _, seed := range []string{`{"a":[1,{"b":null}]}`, `"\ud83d\ude00\\u"`, `{"a":1,"a":2}`, `[1e5,-0]`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		value, err := readJSON(doc, testLimits, "syntax", "duplicate")
		if err != nil {
			if RowOf(err) == "" {
				t.Errorf("error %v has no row", err)
			}
			return
		}
		var theirs any
		decoder := json.NewDecoder(strings.NewReader(string(doc)))
		decoder.UseNumber()
		if err := decoder.Decode(&theirs); err != nil || !reflect.DeepEqual(value, theirs) {
			t.Errorf("%q: we read %#v, encoding/json %#v, %v", doc, value, theirs, err)
		}
	})
}
