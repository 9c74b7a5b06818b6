package resources

import (
	"encoding/json"
	"runtime"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// TestBombs: a resource that is nothing but nested, which an API server takes from whoever may write one in a namespace, costs
// little and is refused with a reason.
func TestBombs(t *testing.T) {
	for name, spec := range map[string]string{
		"maps":  strings.Repeat(`{"a":`, 5000) + "1" + strings.Repeat("}", 5000),
		"lists": `{"service":` + strings.Repeat("[", 5000) + strings.Repeat("]", 5000) + "}",
		"mixed": strings.Repeat(`{"a":[`, 4000) + strings.Repeat("]}", 4000),
		"long":  `{"service":"` + strings.Repeat("a", 1<<20) + `"}`,
		"wide":  `{"service":[` + strings.Repeat("[],", 300_000) + `[]]}`,
		"lines": `{"service":` + strings.Repeat("[", 20) + `"` + strings.Repeat(`a\n`, 100_000) + `"` + strings.Repeat("]", 20) + "}",
	} {
		t.Run(name, func(t *testing.T) {
			var fields map[string]any
			if err := json.Unmarshal([]byte(spec), &fields); err != nil {
				t.Fatal(err)
			}
			u := &unstructured.Unstructured{Object: map[string]any{"spec": fields}}
			u.SetName("p")
			u.SetNamespace("shop")
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			w := read("prod", kindOf("CallPolicy"), u)
			runtime.ReadMemStats(&after)
			taken := after.TotalAlloc - before.TotalAlloc
			t.Logf("%d KiB for %d, %.200v", taken>>10, len(spec), w.err)
			if w.err == nil {
				t.Error("it is taken for a document")
			}
			if taken > 1<<20 {
				t.Errorf("reading %d bytes took %d", len(spec), taken)
			}
		})
	}
}
