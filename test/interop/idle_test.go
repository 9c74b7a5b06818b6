package interop

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestIdleCost measures what an agent costs that serves ten identities and has nothing to do: ours under a SPIRE server, a SPIRE agent
// there, and ours under signet's CA. SIGNET_IDLE says for how long, such as 2m; docs/performance.md has the figures.
func TestIdleCost(t *testing.T) {
	foreign(t, envAgent)
	length, err := time.ParseDuration(os.Getenv("SIGNET_IDLE"))
	if err != nil {
		t.Skip("SIGNET_IDLE does not say for how long to measure, such as 2m")
	}
	ctx := bounded(t, length+3*time.Minute)
	spire, ca := startSPIREServer(t, ctx, "", ""), startCA(t, ctx, "")
	type measured struct {
		what  string
		agent *agent
		proxy *proxy
	}
	var all []measured
	at := func(s *server, what string, start func(behind *server) *agent) {
		behind := *s
		p := startProxy(t, s.addr)
		behind.addr = p.addr
		a := start(&behind)
		var ids []string
		for i := range 10 {
			ids = append(ids, fmt.Sprintf("/%d", i))
			s.entry(ctx, ids[i], "/"+strings.ReplaceAll(what, " ", "-"))
		}
		a.serves(ctx, ids...)
		all = append(all, measured{what, a, p})
	}
	at(spire, "ours under SPIRE", func(s *server) *agent {
		a, _ := underSPIRE(t, ctx, s, nil, "/ours-under-SPIRE", "")
		return a
	})
	at(spire, "SPIRE under SPIRE", func(s *server) *agent {
		token, _ := s.joinToken(ctx, "/SPIRE-under-SPIRE")
		a := newSPIREAgent(t, agentConfig{server: s, token: token, bundle: s.bundleFile(ctx)})
		a.start()
		return a
	})
	at(ca, "ours under signet", func(s *server) *agent {
		token, _ := s.joinToken(ctx, "/ours-under-signet")
		a := newSignetAgent(t, agentConfig{server: s, token: token})
		a.start()
		return a
	})
	wait := func(d time.Duration) {
		select {
		case <-time.After(d):
		case <-ctx.Done():
			t.Fatal("out of time")
		}
	}
	wait(10 * time.Second) // what follows the start is no idling
	type reading struct {
		cpu      time.Duration
		up, down int64
	}
	read := func(m measured) reading {
		return reading{cpuOf(t, m.agent.cmd.Process.Pid), m.proxy.up.Load(), m.proxy.down.Load()}
	}
	before := make([]reading, len(all))
	for i, m := range all {
		before[i] = read(m)
	}
	wait(length)
	for i, m := range all {
		now := read(m)
		minutes := length.Minutes()
		t.Logf("%s: %.1f ms of CPU a minute, %.1f KiB a minute to the server, %.1f from it, %d connections", m.what, float64((now.cpu-before[i].cpu).Microseconds())/1000/minutes,
			float64(now.up-before[i].up)/1024/minutes, float64(now.down-before[i].down)/1024/minutes, m.proxy.made.Load())
	}
}

// cpuOf is the time that all threads of a process have run.
func cpuOf(t *testing.T, pid int) time.Duration {
	t.Helper()
	var sum time.Duration
	for _, path := range must[[]string](t)(filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))) {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // the thread has ended
		}
		ns, err := strconv.ParseInt(strings.Fields(string(text))[0], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		sum += time.Duration(ns)
	}
	return sum
}
