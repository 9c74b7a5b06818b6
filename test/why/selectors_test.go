package why

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/signet-id/signet/internal/why"
)

func pid(p int32) why.Target { return why.Target{PID: p} }

// withPath builds an entry for uid 4711 and a path made of that of the program that runs.
func withPath(change func(path string) string) func(*world) why.Target {
	return func(w *world) why.Target {
		path := w.program("web/document-server")
		w.entry(entrySpec{selectors: []string{"unix:uid:4711", "unix:path:" + change(path)}})
		return pid(w.run(path, as(4711, 4711)))
	}
}

// withSelector builds an entry with the program's path and one selector that is wrong.
func withSelector(selector string, options ...option) func(*world) why.Target {
	return func(w *world) why.Target {
		path := w.program("web/document-server")
		w.entry(entrySpec{selectors: []string{selector, "unix:path:" + path}})
		return pid(w.run(path, options...))
	}
}

// selectorSetups have an entry of which one selector does not hold.
var selectorSetups = []setup{
	{name: "typo in the path", root: true, build: withPath(func(p string) string { return strings.Replace(p, "document-server", "documnet-server", 1) }),
		want: why.Typo, says: "signet entry update"},
	{name: "letter missing in the path", root: true, build: withPath(func(p string) string { return strings.TrimSuffix(p, "r") }), want: why.Typo, says: "document-server"},
	{name: "wrong case in the path", root: true, build: withPath(func(p string) string { return strings.Replace(p, "document", "Document", 1) }), want: why.WrongCase, says: "upper and lower case"},
	{name: "slash at the end of the path", root: true, build: withPath(func(p string) string { return p + "/" }), want: why.StraySpace, says: "counts"},
	{name: "another program", root: true, build: withPath(func(string) string { return "/usr/sbin/nginx" }), want: why.PathDiffers, says: "/usr/sbin/nginx"},
	{name: "path is a symbolic link", root: true, build: func(w *world) why.Target {
		path := w.program("opt/web-2.1/server")
		link := filepath.Join(w.dir, "opt", "current")
		if err := os.Symlink("web-2.1", link); err != nil {
			w.Fatal(err)
		}
		w.entry(entrySpec{selectors: []string{"unix:uid:4711", "unix:path:" + link + "/server"}})
		return pid(w.run(path, as(4711, 4711)))
	}, want: why.PathAlias, says: "same file"},
	{name: "path from before /bin became /usr/bin", root: true, build: func(w *world) why.Target {
		w.entry(entrySpec{selectors: []string{"unix:uid:4711", "unix:path:/bin/sleep"}})
		return pid(w.run("/usr/bin/sleep", as(4711, 4711)))
	}, want: why.PathAlias, says: "unix:path:/usr/bin/sleep"},
	{name: "an interpreter's script instead of the interpreter", root: true, build: func(w *world) why.Target {
		script := filepath.Join(w.dir, "job.sh")
		if err := os.WriteFile(script, []byte("#!/bin/sh\nsleep \"$1\"\nexit 0\n"), 0o755); err != nil {
			w.Fatal(err)
		}
		w.entry(entrySpec{selectors: []string{"unix:uid:4711", "unix:path:" + script}})
		return pid(w.run(script, as(4711, 4711)))
	}, want: why.PathDiffers, says: "the process runs"},
	{name: "wrong uid", root: true, build: withSelector("unix:uid:4712", as(4711, 4711)), want: why.UserDiffers, says: "unix:uid:4711"},
	{name: "typo in the user's name", root: true, build: withSelector("unix:user:nobdy", as(65534, 65534)), want: why.Typo, says: "unix:user:nobody"},
	{name: "another user's name", root: true, build: withSelector("unix:user:postgres", as(65534, 65534)), want: why.UserDiffers, says: "unix:user:nobody"},
	{name: "user's name where the uid belongs", root: true, build: withSelector("unix:uid:nobody", as(65534, 65534)), want: why.NameForNumber, says: "unix:user:nobody"},
	{name: "uid where the user's name belongs", root: true, build: withSelector("unix:user:4711", as(4711, 4711)), want: why.NameForNumber, says: "unix:uid:4711"},
	{name: "wrong gid", root: true, build: withSelector("unix:gid:4712", as(4711, 4711)), want: why.GroupDiffers, says: "unix:gid:4711"},
	{name: "supplementary group missing", root: true, build: withSelector("unix:supplementary_gid:4713", as(4711, 4711)), want: why.GroupMissing, says: "log in anew"},
	{name: "another supplementary group", root: true, build: withSelector("unix:supplementary_gid:4713", as(4711, 4711, 4714)), want: why.GroupMissing, says: "4714"},
	{name: "supplementary group where the primary one is asked for", root: true, build: withSelector("unix:gid:4713", as(4711, 4711, 4713)), want: why.GroupDiffers, says: "supplementary"},
	{name: "hash of the build before", root: true, build: withSelector("unix:sha256:"+strings.Repeat("5e", 32), as(4711, 4711)), want: why.HashDiffers, says: "built or updated since"},
	{name: "upgrade replaced the program that runs", root: true, build: func(w *world) why.Target {
		path := w.program("web/server")
		w.entry(entrySpec{selectors: []string{"unix:uid:4711", "unix:path:" + path}})
		p := w.run(path, as(4711, 4711))
		if err := os.Rename(w.program("web/server.new"), path); err != nil {
			w.Fatal(err)
		}
		return pid(p)
	}, want: why.BinaryReplaced, says: "restart"},
	{name: "program deleted while it runs", root: true, build: func(w *world) why.Target {
		path := w.program("web/server")
		w.entry(entrySpec{selectors: []string{"unix:uid:4711", "unix:path:" + path}})
		p := w.run(path, as(4711, 4711))
		if err := os.Remove(path); err != nil {
			w.Fatal(err)
		}
		return pid(p)
	}, want: why.BinaryReplaced, says: "deleted"},
	{name: "program in a mount namespace of its own", root: true, build: func(w *world) why.Target {
		path := filepath.Join(w.dir, "image", "server")
		src := w.program("server")
		if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil {
			w.Fatal(err)
		}
		w.entry(entrySpec{selectors: []string{"unix:uid:0", "unix:path:" + path}})
		cmd := exec.Command("sh", "-c", `mount -t tmpfs none "$1" && cp "$2" "$3" && echo up && exec "$3" 600`, "sh", filepath.Dir(path), src, path)
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
		p := w.start(cmd)
		w.until("the program in its namespace", func() bool {
			exe, _ := os.Readlink("/proc/" + itoa(p) + "/exe")
			return exe == path
		})
		return pid(p)
	}, want: why.BinaryNotVisible, says: "its own mounts"},
	{name: "two users in one entry", root: true, build: withSelectors([]string{"unix:uid:4711", "unix:uid:4712"}, as(4711, 4711)), want: why.SelectorsTwoOfOne, says: "an entry for each"},
	{name: "two programs in one entry", root: true, build: func(w *world) why.Target {
		a, b := w.program("web/a-server"), w.program("web/b-server")
		w.entry(entrySpec{selectors: []string{"unix:path:" + a, "unix:path:" + b}})
		return pid(w.run(a, as(4711, 4711)))
	}, want: why.SelectorsTwoOfOne, says: "no process has both"},
	{name: "wrong case in the type", root: true, build: withSelector("Unix:uid:4711", as(4711, 4711)), want: why.WrongCase, says: "--selector unix:uid:4711"},
	{name: "type that nobody attests", root: true, build: withSelector("unxi:uid:4711", as(4711, 4711)), want: why.TypeNotAttested, says: "there are unix, systemd, docker and k8s"},
	{name: "selector of a type that this agent does not attest", root: true, build: withSelector("k8s:ns:prod", as(4711, 4711)), want: why.TypeNotAttested, says: "workload_attestation.k8s"},
	{name: "no entry at all", root: true, build: func(w *world) why.Target { return pid(w.run(w.program("web/server"), as(4711, 4711))) },
		want: why.NoEntry, says: "signet entry create --spiffe-id /server --parent-id spiffe://example.org/spire/agent/"},
	{name: "entries of others only", root: true, build: func(w *world) why.Target {
		w.entry(entrySpec{spiffeID: "/db", selectors: []string{"unix:uid:26", "unix:path:/usr/lib/postgresql/bin/postgres"}})
		return pid(w.run(w.program("web/server"), as(4711, 4711)))
	}, want: why.NoEntry, says: "no registration entry of this node comes near"},
	{name: "process in a PID namespace of its own, with a typo", root: true, build: func(w *world) why.Target {
		path := w.program("web/document-server")
		w.entry(entrySpec{selectors: []string{"unix:uid:0", "unix:path:" + path + "s"}})
		return pid(w.run(path, func(c *exec.Cmd) { c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID} }))
	}, want: why.Typo, says: "document-server"},
}

// withSelectors builds an entry with these selectors.
func withSelectors(selectors []string, options ...option) func(*world) why.Target {
	return func(w *world) why.Target {
		w.entry(entrySpec{selectors: selectors})
		return pid(w.run(w.program("web/server"), options...))
	}
}
