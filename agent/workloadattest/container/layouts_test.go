package container

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A layout is a recorded one: what /proc/PID/cgroup says, what the node's and the agent's files say, and where that is. The first
// line of its file says where it was recorded.
type layout struct{ cgroup, init, mounts, roots, want string }

func readLayout(t testing.TB, file string) layout {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var l layout
	parts := strings.Split("\n"+string(data), "\n-- ")
	for _, p := range parts[1:] {
		name, text, ok := strings.Cut(p, " --\n")
		if !ok {
			t.Fatalf("%s: a part without a name", file)
		}
		if text != "" && !strings.HasSuffix(text, "\n") {
			text += "\n" // the one that the next part's name was cut off with
		}
		switch name {
		case "cgroup":
			l.cgroup = text
		case "init":
			l.init = text
		case "agent mountinfo":
			l.mounts = text
		case "cgroup roots":
			l.roots = text
		case "want":
			l.want = text
		default:
			t.Fatalf("%s: an unknown part %q", file, name)
		}
	}
	if l.cgroup == "" {
		t.Fatalf("%s: no cgroup", file)
	}
	return l
}

func (l layout) finder() (*Finder, error) {
	f := &Finder{}
	var err error
	if f.roots, err = split("cgroup root", strings.Fields(l.roots)); err != nil {
		return nil, err
	}
	if f.bases, err = bases([]byte(l.init)); err != nil {
		return nil, err
	}
	if l.mounts != "" {
		f.private = true
		f.own, err = ownContainer([]byte(l.mounts))
	}
	return f, err
}

func show(l Location) string {
	var b strings.Builder
	c := l.Container
	if l.Claim != nil {
		fmt.Fprintf(&b, "claim\nuid: %d\nunit: %s\n", l.Claim.UID, l.Claim.Unit)
		c = l.Claim.Container
	}
	for _, f := range []struct{ name, value string }{{"id", c.ID}, {"pod", c.PodUID}, {"name", c.Name}, {"runtime", c.Runtime}} {
		if f.value != "" {
			fmt.Fprintf(&b, "%s: %s\n", f.name, f.value)
		}
	}
	return b.String()
}

func TestLayouts(t *testing.T) {
	files, err := filepath.Glob("testdata/layouts/*.txt")
	if err != nil || len(files) < 50 {
		t.Fatalf("%d layouts, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			l := readLayout(t, file)
			f, err := l.finder()
			if err != nil {
				t.Fatal(err)
			}
			got, err := f.parse([]byte(l.cgroup))
			if err != nil {
				t.Fatal(err)
			}
			if show(got) != l.want {
				t.Errorf("got\n%swant\n%s", show(got), l.want)
			}
			if c := got.Container; c.ID != "" && !strings.Contains(l.cgroup, c.Path) && c != f.own {
				t.Errorf("Path %q is not one of the cgroups", c.Path)
			}
		})
	}
}

const (
	idA, idB   = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
	podA, podB = "0a0a0a0a-1111-2222-3333-444444444444", "0b0b0b0b-1111-2222-3333-444444444444"
)

// What a process may bring about without being root on the node never names a container other than the one it is in.
func TestForgedPaths(t *testing.T) {
	slice := func(pod string) string { return strings.ReplaceAll(pod, "-", "_") }
	own := "/kubepods/burstable/pod" + podA + "/" + idA
	for _, tt := range []struct{ name, path, want string }{
		{"a container with a writable cgroup makes a pod below", own + "/kubepods/burstable/pod" + podB + "/" + idB, idA + " " + podA},
		{"a container makes a container below", own + "/" + idB, idA + " " + podA},
		{"a container makes a scope below", own + "/docker-" + idB + ".scope", idA + " " + podA},
		{"a container by systemd makes a slice below", "/kubepods.slice/kubepods-pod" + slice(podA) + ".slice/cri-containerd-" + idA + ".scope/kubepods.slice/kubepods-pod" +
			slice(podB) + ".slice/cri-containerd-" + idB + ".scope", idA + " " + podA},
		{"a container of docker makes a pod below", "/docker/" + idA + "/kubepods/pod" + podB + "/" + idB, idA + " "},
		{"a user makes a pod", "/user.slice/user-1000.slice/user@1000.service/kubepods/burstable/pod" + podB + "/" + idB, " "},
		{"a user makes a pod below a kubelet", "/user.slice/user-1000.slice/user@1000.service/kubelet/kubepods/pod" + podB + "/" + idB, " "},
		{"a user makes slices of a pod", "/user.slice/user-1000.slice/user@1000.service/kubepods.slice/kubepods-pod" + slice(podB) + ".slice/cri-containerd-" + idB + ".scope", "claim 1000 " + idB},
		{"a user makes a container", "/user.slice/user-1000.slice/user@1000.service/docker/" + idB, " "},
		{"a user makes the scope of a container", "/user.slice/user-1000.slice/user@1000.service/user.slice/docker-" + idB + ".scope", "claim 1000 " + idB},
		{"a user of another number", "/user.slice/user-1000.slice/user@1001.service/docker-" + idB + ".scope", " "},
		{"a user beyond 32 bits", "/user.slice/user-4294968296.slice/user@4294968296.service/docker-" + idB + ".scope", "claim -1 " + idB},
		{"a delegated unit makes a scope", "/system.slice/web.service/docker-" + idB + ".scope", "claim -1 " + idB},
		{"a delegated unit makes a pod", "/system.slice/web.service/kubepods/pod" + podB + "/" + idB, " "},
		{"a delegated unit makes what containerd makes", "/system.slice/web.service/kubepods-pod" + slice(podB) + ".slice:cri-containerd:" + idB, " "},
		{"a delegated unit with the name of a slice inside", "/system.slice/web.service/system.slice/containerd.service/kubepods/pod" + podB + "/" + idB, " "},
		{"an unprivileged container of LXC", "/lxc.payload.c1/kubepods/pod" + podB + "/" + idB, " "},
		{"an unprivileged container of LXC with docker", "/lxc.payload.c1/docker/" + idB, " "},
		{"a virtual machine", "/machine.slice/machine-qemu.scope/libpod-" + idB + ".scope", "claim -1 " + idB},
		{"out of the namespace into a user's part", "/../../../user.slice/user-1000.slice/user@1000.service/kubepods/pod" + podB + "/" + idB, " "},
		{"out of the namespace into a unit", "/../web.service/kubepods/pod" + podB + "/" + idB, " "},
		{"a slice that is not where its name says", "/user.slice/kubepods-pod" + slice(podB) + ".slice/cri-containerd-" + idB + ".scope", " "},
		{"a pod's slice at the root", "/kubepods-pod" + slice(podB) + ".slice/cri-containerd-" + idB + ".scope", " "},
		{"a pod at the root", "/pod" + podB + "/" + idB, " "},
		{"a short id", "/docker/" + idB[:63], " "},
		{"a long id", "/docker/" + idB + "b", " "},
		{"an id in capitals", "/docker/" + strings.ToUpper(idB), " "},
		{"a deleted cgroup", "/docker/" + idB + " (deleted)", " "},
		{"a pod without hyphens at their places", "/kubepods/pod" + strings.ReplaceAll(podB, "-", "") + "-/" + idB, " "},
		{"something else in a pod", "/kubepods/pod" + podB + "/sandbox/" + idB, " "},
		{"a watcher in a pod", "/kubepods/pod" + podB + "/crio-conmon-" + idB, " "},
		{"a watcher of podman", "/machine.slice/libpod-conmon-" + idB + ".scope", " "},
		{"a watcher of docker's kind", "/docker/docker-conmon-" + idB, " "},
	} {
		got, err := (&Finder{}).parse([]byte("0::" + tt.path + "\n"))
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		text := got.ID + " " + got.PodUID
		if got.Claim != nil {
			text = fmt.Sprintf("claim %d %s", got.Claim.UID, got.Claim.ID)
		}
		if text != tt.want {
			t.Errorf("%s: %q gives %q, want %q", tt.name, tt.path, text, tt.want)
		}
	}
}

// Hierarchies that contradict each other name nothing.
func TestAmbiguous(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		err        error
		want       string
	}{
		{"two containers", "2:cpu:/docker/" + idA + "\n1:pids:/docker/" + idB + "\n", ErrAmbiguous, ""},
		{"two pods", "2:cpu:/kubepods/pod" + podA + "\n1:pids:/kubepods/pod" + podB + "\n", ErrAmbiguous, ""},
		{"one container in two pods", "2:cpu:/kubepods/pod" + podA + "/" + idA + "\n1:pids:/kubepods/pod" + podB + "/" + idA + "\n", ErrAmbiguous, ""},
		{"a pod and its container", "2:cpu:/kubepods/pod" + podA + "\n1:pids:/kubepods/pod" + podA + "/" + idA + "\n", nil, idA + " " + podA},
		{"a container and nothing", "2:cpu:/\n1:pids:/docker/" + idA + "\n", nil, idA + " "},
		{"a container and a claim", "2:cpu:/docker/" + idA + "\n1:name=systemd:/user.slice/user-1000.slice/user@1000.service/docker-" + idB + ".scope\n", nil, idA + " "},
		{"two claims", "2:cpu:/user.slice/user-1000.slice/user@1000.service/docker-" + idA + ".scope\n1:pids:/user.slice/user-1000.slice/user@1000.service/docker-" + idB + ".scope\n", ErrAmbiguous, ""},
		{"claims of two users", "2:cpu:/user.slice/user-1000.slice/user@1000.service/docker-" + idA + ".scope\n1:pids:/user.slice/user-1001.slice/user@1001.service/docker-" + idA + ".scope\n", ErrAmbiguous, ""},
		{"two claims and a container", "3:blkio:/docker/" + idA + "\n2:cpu:/a.service/docker-" + idA + ".scope\n1:pids:/b.service/docker-" + idB + ".scope\n", nil, idA + " "},
		{"no path", "1:pids\n", ErrMalformed, ""},
		{"no number", "pids:/docker/" + idA + "\n", ErrMalformed, ""},
		{"a relative path", "1:pids:docker/" + idA + "\n", ErrMalformed, ""},
		{"a path up in the middle", "0::/docker/../docker/" + idA + "\n", ErrMalformed, ""},
		{"an empty name", "0::/docker//" + idA + "\n", ErrMalformed, ""},
		{"an empty line", "0::/docker/" + idA + "\n\n", ErrMalformed, ""},
		{"too many lines", strings.Repeat("0::/\n", maxLines+1), ErrMalformed, ""},
		{"too long", "0::/" + strings.Repeat("x", maxCgroupBytes), ErrMalformed, ""},
		{"empty", "", nil, " "},
	} {
		got, err := (&Finder{}).parse([]byte(tt.text))
		if !errors.Is(err, tt.err) || err == nil && got.ID+" "+got.PodUID != tt.want {
			t.Errorf("%s: %+v, %v; want %q, %v", tt.name, got, err, tt.want, tt.err)
		}
	}
}

// Configured places count from the root on, and only there.
func TestConfiguredPlaces(t *testing.T) {
	roots, err := split("", []string{"/kube/a"})
	if err != nil {
		t.Fatal(err)
	}
	parents, err := split("", []string{"/batch"})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ path, want string }{
		{"/kube/a/kubepods/pod" + podA + "/" + idA, idA + " " + podA},
		{"/x/kube/a/kubepods/pod" + podA + "/" + idA, " "},
		{"/kube/kubepods/pod" + podA + "/" + idA, " "},
		{"/batch/" + idA, idA + " "},
		{"/batch/docker-" + idA + ".scope", idA + " "},
		{"/batch/x/" + idA, " "},
		{"/user.slice/batch/" + idA, " "},
	} {
		got, err := (&Finder{roots: roots, parents: parents}).parse([]byte("0::" + tt.path + "\n"))
		if err != nil || got.ID+" "+got.PodUID != tt.want {
			t.Errorf("%s: %+v, %v; want %q", tt.path, got, err, tt.want)
		}
	}
	for _, bad := range []string{"", "/", "kube", "/kube/", "/../kube", "/a//b"} {
		if _, err := New(Config{CgroupRoots: []string{bad}}); err == nil || !strings.Contains(err.Error(), "cgroup root") {
			t.Errorf("CgroupRoots %q: %v", bad, err)
		}
		if _, err := New(Config{Parents: []string{bad}}); err == nil || !strings.Contains(err.Error(), "parent cgroup") {
			t.Errorf("Parents %q: %v", bad, err)
		}
	}
}

// The agent's own mounts are the runtime's work, but a volume may lie over a file that is looked at.
func TestOwnMounts(t *testing.T) {
	const m = "1 2 253:0 %s %s rw - ext4 /dev/x rw\n"
	line := func(root, point string) string { return fmt.Sprintf(m, root, point) }
	for _, tt := range []struct {
		name, text string
		want       Container
		err        error
	}{
		{"docker", line("/var/lib/docker/containers/"+idA+"/hostname", "/etc/hostname"), Container{ID: idA, Runtime: "docker"}, nil},
		{"elsewhere", line("/var/lib/docker/containers/"+idA+"/hostname", "/mnt/hostname"), Container{}, nil},
		{"two engines' files", line("/docker/containers/"+idA+"/hostname", "/etc/hostname") + line("/docker/containers/"+idB+"/hosts", "/etc/hosts"), Container{}, ErrAmbiguous},
		{"two pods", line("/var/lib/kubelet/pods/"+podA+"/etc-hosts", "/etc/hosts") + line("/var/lib/kubelet/pods/"+podB+"/containers/x/0a0b0c0d", "/dev/termination-log"), Container{}, ErrAmbiguous},
		{"octal", line(`/var/lib/docker/containers/`+idA+`/hostname\040x`, "/etc/hostname"), Container{}, nil},
		{"octal space", line(`/my\040docker/containers/`+idA+`/hostname`, "/etc/hostname"), Container{ID: idA, Runtime: "docker"}, nil},
		{"short", "1 2 3\n", Container{}, ErrMalformed},
	} {
		got, err := ownContainer([]byte(tt.text))
		if !errors.Is(err, tt.err) || got != tt.want {
			t.Errorf("%s: %+v, %v; want %+v, %v", tt.name, got, err, tt.want, tt.err)
		}
	}
	// A process outside the agent's namespace is not in the agent's container, whatever the agent's mounts are.
	f := &Finder{private: true, own: Container{ID: idA}}
	for _, text := range []string{"0::/../../user.slice/user-1000.slice/session-1.scope\n", "1:pids:/\n0::/../x\n"} {
		if got, err := f.parse([]byte(text)); err != nil || got != (Location{}) {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
}

func FuzzCgroup(f *testing.F) {
	files, _ := filepath.Glob("testdata/layouts/*.txt")
	for _, file := range files {
		l := readLayout(f, file)
		f.Add(l.cgroup, l.init)
	}
	f.Fuzz(func(t *testing.T, cgroup, init string) {
		finder := &Finder{}
		var err error
		if finder.bases, err = bases([]byte(init)); err != nil {
			return
		}
		l, err := finder.parse([]byte(cgroup))
		if err != nil {
			if l != (Location{}) {
				t.Fatalf("an error and %+v", l)
			}
			return
		}
		for _, c := range []Container{l.Container, claimOf(l)} {
			if c == (Container{}) {
				continue
			}
			// What is named is in the text, whole, at the place that Path says.
			if c.ID != "" && (!bare().MatchString(c.ID) || !strings.Contains(c.Path, c.ID)) {
				t.Errorf("id %q of path %q", c.ID, c.Path)
			}
			if c.PodUID != "" && (strings.Contains(c.PodUID, "_") || !strings.Contains(dashes(cgroup), c.PodUID)) {
				t.Errorf("pod %q of %q", c.PodUID, cgroup)
			}
			if !strings.Contains(cgroup, ":"+c.Path) {
				t.Errorf("path %q of %q", c.Path, cgroup)
			}
			// Whatever a process makes below its own cgroup changes nothing.
			below, err := finder.parse([]byte("0::" + c.Path + "/kubepods/pod" + podB + "/" + idB + "\n"))
			if err == nil && l.Claim == nil && below.ID != c.ID && c.ID != "" && len(finder.bases) == 0 {
				t.Errorf("below %q is %+v", c.Path, below)
			}
		}
		if l.Claim != nil && l.Container != (Container{}) {
			t.Errorf("a container and a claim: %+v", l)
		}
	})
}

func claimOf(l Location) Container {
	if l.Claim == nil {
		return Container{}
	}
	return l.Claim.Container
}

func FuzzOwnMounts(f *testing.F) {
	files, _ := filepath.Glob("testdata/layouts/*.txt")
	for _, file := range files {
		if l := readLayout(f, file); l.mounts != "" {
			f.Add(l.mounts)
		}
	}
	f.Fuzz(func(t *testing.T, text string) {
		c, err := ownContainer([]byte(text))
		if err != nil && c != (Container{}) {
			t.Fatalf("an error and %+v", c)
		}
		if c.ID != "" && (!bare().MatchString(c.ID) || c.PodUID != "") || c.Name != "" && c.PodUID == "" {
			t.Errorf("%+v", c)
		}
	})
}
