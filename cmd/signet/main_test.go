package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/internal/dev"
	"github.com/signet-id/signet/test/signettest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"signet": main})
}

// TestScript runs testdata/script: one script per command and per message that an operator may meet. Those whose name
// begins with live_ have a CA and an agent of their own, which SIGNET_CA_SOCKET, AGENT_SOCKET, SPIFFE_ENDPOINT_SOCKET, CA_ADDR and
// BUNDLE name; live_upstream's is below another one.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireUniqueNames:  true,
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			// The scripts decide themselves which CA and agent they talk to.
			env.Setenv("SIGNET_CA_SOCKET", "")
			env.Setenv("SIGNET_AGENT_SOCKET", "")
			env.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
			env.Setenv("TERM", "dumb")
			if strings.HasPrefix(filepath.Base(env.WorkDir), "script-live_") {
				if err := startSignet(env); err != nil {
					return err
				}
			}
			env.Setenv("PATH", env.Getenv("PATH")+string(os.PathListSeparator)+os.Getenv("PATH"))
			return nil
		},
	})
}

func startSignet(env *testscript.Env) error {
	dir, err := os.MkdirTemp("", "signet") // short: a Unix socket's path has at most 107 bytes
	if err != nil {
		return err
	}
	env.Defer(func() { os.RemoveAll(dir) })
	var above *ca.UpstreamDisk
	if filepath.Base(env.WorkDir) == "script-live_upstream" {
		o, err := signettest.NewOrganisation(env.WorkDir, "Example")
		if err != nil {
			return err
		}
		above = o.Disk()
	}
	var clusters map[string]ca.KubernetesCluster
	if strings.HasPrefix(filepath.Base(env.WorkDir), "script-live_pods") {
		kubeconfig, stop, err := serveCluster(env.WorkDir)
		if err != nil {
			return err
		}
		env.Defer(stop)
		clusters = map[string]ca.KubernetesCluster{"prod": {Kubeconfig: kubeconfig, Pods: &ca.KubernetesPods{}}}
	}
	i, err := dev.Start(context.Background(), dev.Config{Dir: dir, NodeGroups: []string{"backend"}, CA: func(c *ca.Config) {
		c.Audit.Reserve, c.WIT.Enabled, c.Upstream.Disk = 1<<20, true, above
		c.Kubernetes.Clusters = clusters
	}, Agent: func(c *agent.Config) { c.WIT.Enabled = true }})
	if err != nil {
		return err
	}
	env.Defer(func() {
		if err := i.Close(); err != nil {
			env.T().Log("closing signet: ", err)
			env.T().FailNow()
		}
	})
	env.Setenv("SIGNET_CA_SOCKET", i.CASocket())
	env.Setenv("AGENT_SOCKET", i.AgentAdminSocket())
	env.Setenv("SPIFFE_ENDPOINT_SOCKET", i.WorkloadAPI())
	env.Setenv("CA_ADDR", i.CAAddr())
	env.Setenv("BUNDLE", i.BundlePath())
	return nil
}
