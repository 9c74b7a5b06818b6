package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRun(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "proxy.yaml")
	if err := os.WriteFile(bad, []byte("drain_timeout: 5s\nsocket: x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SIGNET_PROXY_TEST", `{"socket": "x"}`)
	for _, tt := range []struct {
		name       string
		args       []string
		status     int
		out, wrong string
	}{
		{name: "version", args: []string{"-version"}, out: "signet-proxy "},
		{name: "no configuration", status: 2, wrong: "signet-proxy: error: --config is missing"},
		{name: "configuration from two places", args: []string{"-config", bad, "-config-env", "X"}, status: 2, wrong: "exclude each other"},
		{name: "no such variable", args: []string{"-config-env", "SIGNET_NO_SUCH_VARIABLE"}, status: 1, wrong: "no variable SIGNET_NO_SUCH_VARIABLE"},
		{name: "bad configuration in a variable", args: []string{"-config-env", "SIGNET_PROXY_TEST"}, status: 1, wrong: "$SIGNET_PROXY_TEST:1:2"},
		{name: "surplus argument", args: []string{"-config", bad, "x"}, status: 2, wrong: `no argument is taken, such as "x"`},
		{name: "unknown flag", args: []string{"-nope"}, status: 2, wrong: "not defined: -nope"},
		{name: "no such file", args: []string{"-config", bad + "x"}, status: 1, wrong: "reading the configuration"},
		{name: "bad configuration", args: []string{"-config", bad}, status: 1, wrong: bad + ":2:1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			if got := run(t.Context(), tt.args, &stdout, &stderr); got != tt.status {
				t.Errorf("run(%q) = %d, want %d", tt.args, got, tt.status)
			}
			if !strings.Contains(stdout.String(), tt.out) || !strings.Contains(stderr.String(), tt.wrong) {
				t.Errorf("run(%q): stdout %q, stderr %q; want %q, %q", tt.args, stdout.String(), stderr.String(), tt.out, tt.wrong)
			}
		})
	}
}
