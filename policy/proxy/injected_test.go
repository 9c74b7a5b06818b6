package proxy

import (
	"os"
	"path/filepath"
	"testing"
)

// What the CA's admission webhook gives to a proxy in a pod (ca/kube/inject, whose tests make the same files) is a configuration.
func TestInjectedConfigurations(t *testing.T) {
	files, err := filepath.Glob("../../ca/kube/inject/testdata/proxy-*.json")
	if err != nil || len(files) < 3 {
		t.Fatalf("files %q, %v", files, err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		c, err := ReadConfig(text, f)
		if err != nil {
			t.Errorf("the proxy refuses what it is given: %v", err)
			continue
		}
		if c.Metrics.Listen == "" || c.AgentSocket != "unix:///run/signet/agent/agent.sock" || len(c.Inbound)+len(c.Outbound) == 0 {
			t.Errorf("%s is read as %+v", f, c)
		}
	}
}
