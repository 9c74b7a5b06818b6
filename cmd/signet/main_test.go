package main

import (
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"signet": main})
}

// TestScript runs testdata/script: one script per command and per message that an operator may meet.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireUniqueNames:  true,
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			// The scripts decide themselves which CA and agent they talk to.
			env.Setenv("SIGNET_CA_SOCKET", "")
			env.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
			env.Setenv("PATH", env.Getenv("PATH")+string(os.PathListSeparator)+os.Getenv("PATH"))
			return nil
		},
	})
}
