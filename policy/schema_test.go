package policy

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"
)

var update = flag.Bool("update", false, "write the published schemas anew")

func TestPublishedSchemasAreThoseOfTheCode(t *testing.T) {
	for _, kind := range []string{KindCallPolicy, KindPolicyDefaults, KindUserIssuer, KindPolicyTest, KindRevocation} {
		want, err := Schema(kind)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join("..", "docs", "reference", "schemas", kind+".json")
		if *update {
			if err := os.WriteFile(file, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(file)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not what the code says; run go test ./policy -run Schemas -update (%v)", file, err)
		}
	}
	if _, err := Schema("Identity"); err == nil {
		t.Error("a schema for Identity")
	}
}
