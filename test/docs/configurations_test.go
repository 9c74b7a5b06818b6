package docs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/ca"
)

// TestPagesConfigurations reads the configurations of docs/operate as the programs do, but for those that need the driver of a key
// store, which are not linked here.
func TestPagesConfigurations(t *testing.T) {
	pages, err := filepath.Glob(filepath.Join(root, "docs", "operate", "attestors", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob(filepath.Join(root, "docs", "operate", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	pages = append(pages, more...)
	read := map[string]int{}
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for i, block := range strings.Split(string(text), "```") {
			config, ok := strings.CutPrefix(block, "yaml\n")
			if i%2 == 0 || !ok {
				continue
			}
			var err error
			switch top, _, _ := strings.Cut(config, ":"); top {
			case "node_attestors", "upstream", "downstream":
				_, err = ca.ReadConfig([]byte("trust_domain: example.org\ndata_dir: /d\nseal: {key_file: /k}\n"+config), page)
				read[top]++
			case "node_attestation":
				if !strings.Contains(config, "\ntrust_bundle_path:") {
					config += "trust_bundle_path: /b\n"
				}
				_, err = agent.ReadConfig([]byte("trust_domain: example.org\nserver_address: ca\ndata_dir: /d\n"+config), page)
				read[top]++
			case "workload_attestation", "broker", "admin_socket":
				_, err = agent.ReadConfig([]byte("trust_domain: example.org\nserver_address: ca\ndata_dir: /d\n"+config), page)
				read[top]++
			}
			if err != nil {
				t.Errorf("%v, in:\n%s", err, config)
			}
		}
	}
	if read["node_attestors"] < 4 || read["node_attestation"] < 4 || read["upstream"] < 3 || read["downstream"] < 1 || read["workload_attestation"] < 1 || read["broker"] < 1 || read["admin_socket"] < 1 {
		t.Errorf("read %v configurations of %d pages; are the blocks found?", read, len(pages))
	}
}
