package why

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/internal/why"
)

// callerSetups have an entry that is served, and a process that does not get to it; or one that asks in a wrong way.
var callerSetups = []setup{
	{name: "caller without the security header", root: true, build: func(w *world) why.Target {
		w.issued(w.entry(entrySpec{selectors: []string{"unix:uid:4711"}}))
		return pid(w.caller("headerless", as(4711, 4711)))
	}, want: why.HeaderMissing, says: "workload.spiffe.io"},
	{name: "caller with too many streams", root: true, make: maker{Agent: func(c *agent.Config) { c.MaxStreams, c.MaxStreamsPerUID = 64, 2 }}, build: func(w *world) why.Target {
		w.issued(w.entry(entrySpec{selectors: []string{"unix:uid:4711"}}))
		return pid(w.caller("streams", as(4711, 4711)))
	}, want: why.TooManyCalls, says: "max_streams_per_uid"},
	{name: "caller that asks for new JWT-SVIDs all the time", root: true, build: func(w *world) why.Target {
		w.issued(w.entry(entrySpec{selectors: []string{"unix:uid:4711"}}))
		return pid(w.caller("flood", as(4711, 4711)))
	}, want: why.RateLimited, says: "faster"},
	{name: "caller that became another user", root: true, build: func(w *world) why.Target {
		w.issued(w.entry(entrySpec{selectors: []string{"unix:uid:4711"}}))
		return pid(w.caller("setuid"))
	}, want: why.UserChanged, says: "changed its user or group"},
	{name: "caller with a token that is none", root: true, build: func(w *world) why.Target {
		w.issued(w.entry(entrySpec{selectors: []string{"unix:uid:4711"}}))
		return pid(w.caller("badtoken", as(4711, 4711)))
	}, want: why.BadRequest, says: "svid"},
	{name: "caller that has ended, with the wrong user", root: true, build: func(w *world) why.Target {
		w.entry(entrySpec{selectors: []string{"unix:uid:4712", "unix:path:" + self}})
		return pid(w.caller("once", as(4711, 4711)))
	}, want: why.UserDiffers, says: "unix:uid:4711"},
	{name: "caller that ended before its entry came", root: true, build: func(w *world) why.Target {
		p := w.caller("once", as(4711, 4711))
		w.issued(w.entry(entrySpec{selectors: []string{"unix:uid:4711"}}))
		return pid(p)
	}, want: why.ProcessGone, says: "has ended"},
	{name: "endpoint that is not there", root: true, build: endpointIs("unix:///run/nowhere/agent.sock"), want: why.EndpointWrong, says: "does not exist"},
	{name: "endpoint by TCP", root: true, build: endpointIs("tcp://127.0.0.1:8081"), want: why.EndpointWrong, says: "no Unix socket"},
	{name: "endpoint that is the CA's admin socket", root: true, build: func(w *world) why.Target {
		return endpointIs("unix://" + w.CASocket())(w)
	}, want: why.EndpointWrong, says: "not this agent's socket"},
	{name: "endpoint of an agent of before", root: true, build: func(w *world) why.Target {
		p, s := w.serverWith(env("SPIFFE_ENDPOINT_SOCKET=unix://" + w.dir + "/old/agent.sock"))
		w.issued(w.entry(entrySpec{selectors: s}))
		if err := os.MkdirAll(filepath.Join(w.dir, "old"), 0o755); err != nil {
			w.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(w.dir, "old", "agent.sock"), nil, 0o777); err != nil {
			w.Fatal(err)
		}
		return pid(p)
	}, want: why.EndpointWrong, says: "an older agent's"},
	{name: "directory of the socket without permission", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		w.issued(w.entry(entrySpec{selectors: s}))
		if err := os.Chmod(filepath.Join(w.dir, "d"), 0o700); err != nil {
			w.Fatal(err)
		}
		return pid(p)
	}, want: why.SocketDenied, says: "ls -ld"},
	{name: "socket without permission", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		w.issued(w.entry(entrySpec{selectors: s}))
		if err := os.Chmod(w.AgentSocket(), 0o755); err != nil {
			w.Fatal(err)
		}
		return pid(p)
	}, want: why.SocketDenied, says: "agent.sock"},
	{name: "socket that the process does not see", root: true, build: func(w *world) why.Target {
		p, s := w.jailed()
		w.issued(w.entry(entrySpec{selectors: s}))
		return pid(p)
	}, want: why.SocketMissing, says: "mount the directory"},
}

// endpointIs builds a process that is told of another endpoint.
func endpointIs(endpoint string) func(*world) why.Target {
	return func(w *world) why.Target {
		p, s := w.serverWith(env("SPIFFE_ENDPOINT_SOCKET=" + endpoint))
		w.issued(w.entry(entrySpec{selectors: s}))
		return pid(p)
	}
}

// serverWith is server with more options.
func (w *world) serverWith(options ...option) (int32, []string) {
	w.Helper()
	path := w.program("web/server")
	return w.run(path, append([]option{as(4711, 4711)}, options...)...), []string{"unix:uid:4711", "unix:path:" + path}
}

// jailed starts a program whose mount namespace hides the agent's directory.
func (w *world) jailed() (int32, []string) {
	w.Helper()
	path := w.program("web/server")
	cmd := exec.Command("sh", "-c", `mount -t tmpfs none "$1" && exec "$2" 600`, "sh", filepath.Join(w.dir, "d"), path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	p := w.start(cmd)
	w.until("the program in its namespace", func() bool {
		exe, _ := os.Readlink("/proc/" + itoa(p) + "/exe")
		return exe == path
	})
	return p, []string{"unix:uid:0", "unix:path:" + path}
}
