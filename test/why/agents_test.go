package why

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	agentapi "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/agent/nodeattest"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/internal/why"
)

// noCache is an agent that keeps nothing on disk for a start without its CA.
func noCache(c *agent.Config) { c.SealedCache.Disable = true }

// troubled waits until the agent is in a state, or has lost its CA for a reason.
func (w *world) troubled(what string) {
	w.Helper()
	w.until("the state "+what, func() bool {
		s := w.status()
		return s.GetState() == what || what == "away" && !s.GetCa().GetConnected() && (s.GetCa().GetError() != "" || s.GetDetail() != "")
	})
}

// agentSetups have an agent and a CA that are not of one mind.
var agentSetups = []setup{
	{name: "CA down, and the agent was just started", root: true, make: maker{Agent: noCache}, build: func(w *world) why.Target {
		p, _ := w.server()
		if err := w.StopCA(); err != nil {
			w.Fatal(err)
		}
		w.startAlone(noCache)
		w.troubled("away")
		w.noCA = true
		return pid(p)
	}, want: why.CAUnreachable, says: "since it started"},
	{name: "CA down for longer than SVIDs live", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		w.issued(w.entry(entrySpec{selectors: s}))
		if err := w.StopCA(); err != nil {
			w.Fatal(err)
		}
		w.troubled("away")
		w.offset.Store(int64(2 * time.Hour))
		w.noCA = true
		return pid(p)
	}, want: why.CAUnreachable, says: "no contact"},
	{name: "CA down, and the SVID still lives", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		w.issued(w.entry(entrySpec{selectors: s}))
		if err := w.StopCA(); err != nil {
			w.Fatal(err)
		}
		w.troubled("away")
		w.noCA = true
		return pid(p)
	}, want: why.CAUnreachable, says: "127.0.0.1"},
	{name: "server_address that nobody listens on", root: true, make: maker{Agent: noCache}, build: func(w *world) why.Target {
		p, _ := w.server()
		w.startAlone(func(c *agent.Config) { c.ServerAddress = "127.0.0.1:1" })
		w.troubled("away")
		return pid(p)
	}, want: why.CAUnreachable, says: "127.0.0.1:1"},
	{name: "agent banned", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		id := w.agentID()
		if _, err := w.agents().BanAgent(context.Background(), &agentapi.BanAgentRequest{Id: spiffeID(id)}); err != nil {
			w.Fatal(err)
		}
		w.troubled("banned")
		w.entry(entrySpec{parent: id, selectors: s})
		return pid(p)
	}, want: why.AgentBanned, says: "signet agent unban spiffe://example.org/spire/agent/"},
	{name: "agent evicted", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		id := w.agentID()
		if _, err := w.agents().DeleteAgent(context.Background(), &agentapi.DeleteAgentRequest{Id: spiffeID(id)}); err != nil {
			w.Fatal(err)
		}
		w.troubled("refused")
		w.entry(entrySpec{parent: id, selectors: s})
		return pid(p)
	}, want: why.AgentEvicted, says: "signet token create"},
	{name: "agent away for a month", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		w.issued(w.entry(entrySpec{selectors: s}))
		if err := w.StopAgent(); err != nil {
			w.Fatal(err)
		}
		if err := w.StopCA(); err != nil {
			w.Fatal(err)
		}
		w.offset.Store(int64(30 * 24 * time.Hour))
		if err := w.RestartCA(context.Background()); err != nil {
			w.Fatal(err)
		}
		w.startAlone(func(*agent.Config) {})
		w.troubled("away")
		return pid(p)
	}, want: why.AgentSVIDExpired, says: "token"},
	{name: "join token that was used already", root: true, make: maker{Agent: noCache}, build: func(w *world) why.Target {
		p, _ := w.server()
		w.startAlone(func(c *agent.Config) { c.DataDir = filepath.Join(w.dir, "fresh") })
		w.troubled("away")
		return pid(p)
	}, want: why.AttestationRefused, says: "join_token"},
	{name: "join token that is none", root: true, make: maker{Agent: noCache}, build: func(w *world) why.Target {
		p, _ := w.server()
		w.startAlone(func(c *agent.Config) {
			c.DataDir, c.JoinTokenFile, c.JoinToken = filepath.Join(w.dir, "fresh"), "", nodeattest.Secret("made-up")
		})
		w.troubled("away")
		return pid(p)
	}, want: why.AttestationRefused, says: "signet token create"},
	{name: "CA of another trust domain", root: true, make: maker{Agent: noCache}, build: func(w *world) why.Target {
		p, _ := w.server()
		w.startAlone(func(c *agent.Config) {
			c.TrustDomain, c.DataDir = "other.example", filepath.Join(w.dir, "fresh")
		})
		w.troubled("away")
		return pid(p)
	}, want: why.CAOtherTrustDomain, says: "other.example"},
	{name: "CA made anew with another root", root: true, build: func(w *world) why.Target {
		p, _ := w.server()
		if err := w.StopCA(); err != nil {
			w.Fatal(err)
		}
		for _, path := range []string{"ca", "seal.key"} {
			if err := os.RemoveAll(filepath.Join(w.dir, "d", path)); err != nil {
				w.Fatal(err)
			}
		}
		if err := w.RestartCA(context.Background()); err != nil {
			w.Fatal(err)
		}
		w.until("that the agent meets the new CA", func() bool { return strings.Contains(w.status().GetCa().GetError(), "x509") })
		return pid(p)
	}, want: why.CANotTrusted, says: "signet token create"},
	{name: "clock of the node two hours fast", root: true, make: maker{Agent: noCache}, build: func(w *world) why.Target {
		p, _ := w.server()
		w.skew.Store(int64(2 * time.Hour))
		return pid(p)
	}, want: why.ClockWrong, says: "2h0m0s apart"},
	{name: "clock of the node a day slow, and the agent was just started", root: true, make: maker{Agent: noCache}, build: func(w *world) why.Target {
		p, _ := w.server()
		w.skew.Store(-int64(24 * time.Hour))
		w.startAlone(noCache)
		w.troubled("away")
		return pid(p)
	}, want: why.ClockWrong, says: "NTP"},
	{name: "CA that lets the agent ask for one SVID a second", root: true, make: maker{CA: func(c *ca.Config) {
		c.Limits.X509SVIDs, c.Limits.MaxWait = ca.Limit{Rate: 1, Burst: 500}, time.Millisecond
	}, Agent: func(c *agent.Config) { c.DisablePrefetch = true }}, build: func(w *world) why.Target {
		var docs strings.Builder
		for i := range 700 {
			fmt.Fprintf(&docs, "---\nkind: Identity\nname: web%d\nspiffeID: /web%d\nmatch: ['unix:uid:4712']\n", i, i)
		}
		for chunk := range slices.Chunk(strings.SplitAfter(docs.String(), "']\n"), 100) {
			if doc := strings.Join(chunk, ""); doc != "" {
				w.apply(doc)
			}
		}
		w.held("identity.web699", true)
		w.caller("fetch", as(4712, 4712)) // takes all that may be had at once
		id := w.entry(entrySpec{selectors: []string{"unix:uid:4711"}})
		p := w.caller("fetch", as(4711, 4711))
		w.issued(id)
		return pid(p)
	}, want: why.CARateLimited, says: "limits"},
	{name: "disk of the CA full", root: true, make: diskOf(func(c *ca.Config) { c.Audit.Reserve = 64 << 10 }), build: func(w *world) why.Target {
		w.entry(entrySpec{spiffeID: "/flood", selectors: []string{"unix:gid:4700"}})
		w.entry(entrySpec{selectors: []string{"unix:uid:4711"}})
		w.fill()
		w.caller("flood", as(4712, 4700))
		w.caller("short flood", as(4713, 4700)) // into the last gaps
		return pid(w.caller("fetch", as(4711, 4711)))
	}, want: why.CADiskFull, says: "df -h"},
	{name: "Docker down", root: true, make: maker{Agent: func(c *agent.Config) {
		c.WorkloadAttestation.Docker = &agent.DockerAttestation{Sockets: []string{"/nowhere/docker.sock"}}
	}}, build: func(w *world) why.Target {
		path := w.program("web/server")
		w.entry(entrySpec{selectors: []string{"docker:label:app:web", "unix:path:" + path}})
		p := w.run(path, as(4711, 4711))
		w.cgroup(p, "docker/"+strings.Repeat("5e", 32))
		return pid(p)
	}, want: why.AttestorFailed, says: "docker"},
}

// cgroup puts a process into a cgroup of that name.
func (w *world) cgroup(p int32, name string) {
	w.Helper()
	dir := w.cgroupDir(name)
	if err := os.WriteFile(dir+"/cgroup.procs", []byte(itoa(p)), 0o644); err != nil {
		w.Skipf("no process can be put into a cgroup here: %v", err)
	}
	w.Cleanup(func() {
		if err := os.WriteFile(cgroupRoot()+"/cgroup.procs", []byte(itoa(p)), 0o644); err != nil {
			w.Error(err)
		}
	})
}

// cgroupDir makes a cgroup, until the end of the test.
func (w *world) cgroupDir(name string) string {
	w.Helper()
	root := cgroupRoot()
	dir := filepath.Join(root, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		w.Skipf("no cgroup can be made here: %v", err)
	}
	w.Cleanup(func() {
		for d := dir; d != root; d = filepath.Dir(d) {
			os.Remove(d) // other tests may use what is above
		}
	})
	return dir
}

func cgroupRoot() string {
	root := "/sys/fs/cgroup"
	if _, err := os.Stat(root + "/cgroup.procs"); err != nil {
		root += "/unified"
	}
	return root
}

// diskOf puts the CA's data on a small disk of its own.
func diskOf(change func(*ca.Config)) maker {
	return maker{CA: func(c *ca.Config) {
		change(c)
		disk := c.DataDir + ".disk"
		if _, err := os.Stat(disk); err == nil {
			c.DataDir = disk + "/ca"
			return
		}
		if os.MkdirAll(disk, 0o700) == nil && exec.Command("mount", "-t", "tmpfs", "-o", "size=48m", "none", disk).Run() == nil {
			c.DataDir = disk + "/ca"
		}
	}, Agent: func(c *agent.Config) { c.DisablePrefetch = true }}
}

// fill fills the disk of diskOf to its last byte.
func (w *world) fill() {
	w.Helper()
	disk := filepath.Join(w.dir, "d", "ca.disk")
	var st unix.Statfs_t
	if err := unix.Statfs(disk, &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		w.Skipf("no disk of its own: %v", err)
	}
	w.Cleanup(func() {
		w.StopAgent()
		w.StopCA()
		unix.Unmount(disk, unix.MNT_DETACH)
	})
	f, err := os.Create(filepath.Join(disk, "fill"))
	if err != nil {
		w.Fatal(err)
	}
	defer f.Close()
	for chunk := make([]byte, 64<<10); len(chunk) > 1; {
		if _, err := f.Write(chunk); err != nil {
			chunk = chunk[:len(chunk)/2]
		}
	}
}
