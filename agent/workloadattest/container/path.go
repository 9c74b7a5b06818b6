package container

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// locate says what container a path names. Its forms, from the start of the path or from the base of a node that is itself a container:
//
//	[ROOT/]kubepods/[QOS/]podUID/ID                     the kubelet with the driver cgroupfs; ID may be RUNTIME-ID
//	kubepods.slice/…/kubepods-QOS-podUID.slice/RUNTIME-ID.scope     with the driver systemd
//	[system.slice/[containerd.service/]]kubepods-QOS-podUID.slice:RUNTIME:ID        containerd, told to use the other driver than the kubelet
//	docker/ID, libpod_parent/libpod-ID, ecs/TASK/ID …    an engine with the driver cgroupfs
//	system.slice/RUNTIME-ID.scope                       an engine with the driver systemd; the slices may be others
//
// A path that leaves the agent's cgroup namespace may begin with any part of these. Only slices may be above: systemd never hands
// them on to anybody, as it may do with services and scopes.
func (f *Finder) locate(l line) (Container, *Claim) {
	base := 0
	if l.up == 0 {
		for _, b := range f.bases {
			if len(b) > base && len(l.names) > len(b) && slices.Equal(l.names[:len(b)], b) {
				base = len(b)
			}
		}
	}
	if base > 0 {
		if c, claim := f.locateFrom(l, base); c != (Container{}) || claim != nil {
			return c, claim
		}
	}
	return f.locateFrom(l, 0)
}

func (f *Finder) locateFrom(l line, start int) (Container, *Claim) {
	names := l.names[start:]
	finish := func(c Container, used int) Container {
		c.Path = l.path(start + used)
		return c
	}
	if c, used := f.inPod(names, l.up > 0); used > 0 {
		return finish(c, used), nil
	}
	if c, used := f.ofEngine(names, l.up > 0); used > 0 {
		return finish(c, used), nil
	}
	if claim, used := claimed(names); used > 0 {
		claim.Container = finish(claim.Container, used)
		return Container{}, &claim
	}
	return Container{}, nil
}

const uid = `([0-9a-f]{32}|[0-9a-f]{8}([-_])[0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12})`

var (
	podDirectory = pattern(`^pod` + uid + `$`)
	podSlice     = pattern(`^(.+-)?kubepods(-burstable|-besteffort)?-pod` + uid + `\.slice$`)
	podColons    = pattern(`^kubepods(-burstable|-besteffort)?-pod` + uid + `\.slice:([a-z-]+):([0-9a-f]{64})$`)
	bare         = pattern(`^[0-9a-f]{64}$`)
	prefixed     = pattern(`^([a-z][a-z0-9-]*)-([0-9a-f]{64})$`)
	scoped       = pattern(`^([a-z][a-z0-9-]*)-([0-9a-f]{64})\.scope$`)
	userSlice    = pattern(`^user-([0-9]{1,10})\.slice$`)
	userService  = pattern(`^user@([0-9]{1,10})\.service$`)
)

// pattern is compiled when it is first needed: an agent beside no containers needs none, and their tables are much of what it keeps.
func pattern(text string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(text) })
}

// runtimes are the words before an ID, and who says them. A conmon watches a container and is not in it.
var runtimes = map[string]string{
	"docker": "docker", "cri-containerd": "containerd", "containerd": "containerd", "nerdctl": "containerd", "crio": "cri-o",
	"libpod": "podman", "libpod-payload": "podman",
}

// engineDirectories are where engines with the driver cgroupfs make their containers.
var engineDirectories = map[string]string{
	"docker": "docker", "actions_job": "docker", "moby": "docker", "default": "containerd", "k8s.io": "containerd", "libpod_parent": "podman",
}

// engineServices are units in whose cgroups an engine may make containers, where it has not been told of any other. They are
// root's.
var engineServices = []string{"containerd.service", "docker.service", "k3s.service", "k3s-agent.service", "rke2-server.service", "rke2-agent.service",
	"crio.service", "kubelet.service", "snap.microk8s.daemon-containerd.service", "snap.microk8s.daemon-kubelite.service"}

// inPod reads the forms of Kubernetes. used is how many names it took; 0: it is none of them. Within says that the path
// begins somewhere below its root.
func (f *Finder) inPod(names []string, within bool) (c Container, used int) {
	for _, root := range append([][]string{nil, {"kubelet"}}, f.roots...) {
		if len(names) < len(root) || !slices.Equal(names[:len(root)], root) {
			continue
		}
		if c, used := podByDirectories(names[len(root):], within); used > 0 {
			return c, len(root) + used
		}
	}
	if c, used := podBySlices(names, within); used > 0 {
		return c, used
	}
	n := 0
	if len(names) > 1 && names[0] == "system.slice" {
		n++
	}
	if len(names) > n+1 && slices.Contains(engineServices, names[n]) {
		n++
		if c, used := podByDirectories(names[n:], false); used > 0 {
			return c, n + used
		}
	}
	if len(names) > n {
		if m := podColons().FindStringSubmatch(names[n]); m != nil {
			return Container{ID: m[5], PodUID: dashes(m[2]), Runtime: runtimes[m[4]]}, n + 1
		}
	}
	return Container{}, 0
}

// podByDirectories reads kubepods/[QOS/]podUID[/ID].
func podByDirectories(names []string, within bool) (c Container, used int) {
	n, kubepods := 0, false
	for n < len(names) && n < 2 && names[n] == "kubepods" {
		n, kubepods = n+1, true // twice where an engine's parent is kubepods as well
	}
	if n < len(names) && (names[n] == "burstable" || names[n] == "besteffort" || names[n] == "guaranteed") {
		n++
	}
	if !kubepods && !within || n == len(names) {
		return Container{}, 0
	}
	m := podDirectory().FindStringSubmatch(names[n])
	if m == nil {
		return Container{}, 0
	}
	return inside(Container{PodUID: dashes(m[1])}, names, n+1)
}

// podBySlices reads kubepods.slice/…/kubepods-QOS-podUID.slice[/RUNTIME-ID.scope].
func podBySlices(names []string, within bool) (c Container, used int) {
	n := slicesAbove(names, within)
	if n == 0 {
		return Container{}, 0
	}
	m := podSlice().FindStringSubmatch(names[n-1])
	if m == nil {
		return Container{}, 0
	}
	return inside(Container{PodUID: dashes(m[3])}, names, n)
}

// inside reads the container's own name after that of its pod. A pod alone counts only where the path ends.
func inside(pod Container, names []string, n int) (c Container, used int) {
	if n == len(names) {
		return pod, n
	}
	id, word := leaf(names[n])
	if id == "" || strings.HasSuffix(word, "conmon") {
		return Container{}, 0
	}
	pod.ID, pod.Runtime = id, runtimes[word]
	return pod, n + 1
}

// leaf reads ID, RUNTIME-ID and RUNTIME-ID.scope.
func leaf(name string) (id, word string) {
	if bare().MatchString(name) {
		return name, ""
	}
	for _, r := range []*regexp.Regexp{prefixed(), scoped()} {
		if m := r.FindStringSubmatch(name); m != nil {
			return m[2], m[1]
		}
	}
	return "", ""
}

// slicesAbove counts the slices at the start, each of which is in the one before it as its name says: a-b.slice in a.slice. The
// first is below the root, if the path begins there, and has no other in its name.
func slicesAbove(names []string, within bool) int {
	n := 0
	if len(names) > 0 && !within && strings.Contains(names[0], "-") {
		return 0
	}
	for n < len(names) && strings.HasSuffix(names[n], ".slice") {
		if n > 0 && !strings.HasPrefix(names[n], strings.TrimSuffix(names[n-1], ".slice")+"-") {
			break
		}
		n++
	}
	return n
}

// ofEngine reads the forms of an engine without Kubernetes.
func (f *Finder) ofEngine(names []string, within bool) (c Container, used int) {
	for _, parent := range f.parents {
		if n := len(parent); len(names) > n && slices.Equal(names[:n], parent) {
			if id, word := leaf(names[n]); id != "" && !strings.HasSuffix(word, "conmon") {
				return Container{ID: id, Runtime: runtimes[word]}, n + 1
			}
		}
	}
	n := slicesAbove(names, within)
	if n > 0 || within {
		if n < len(names) {
			if m := scoped().FindStringSubmatch(names[n]); m != nil && runtimes[m[1]] != "" {
				return Container{ID: m[2], Runtime: runtimes[m[1]]}, n + 1
			}
		}
		if n+1 < len(names) && slices.Contains(engineServices, names[n]) {
			names, used = names[n+1:], n+1
		}
	}
	if used == 0 && len(names) > 0 {
		if id, word := leaf(names[0]); id != "" && (word == "" || within && runtimes[word] != "") {
			return Container{ID: id, Runtime: runtimes[word]}, 1 // below the root, or beside the agent's own container
		}
	}
	if len(names) > 2 && names[0] == "docker-ce" {
		names, used = names[1:], used+1 // Docker Desktop
	}
	if len(names) < 2 {
		return Container{}, 0
	}
	id, word := leaf(names[1])
	switch {
	case names[0] == "ecs":
		// TASK/ID or CLUSTER/TASK/ID
		for n := 2; n < min(len(names), 4); n++ {
			if bare().MatchString(names[n]) {
				return Container{ID: names[n], Runtime: "docker"}, used + n + 1
			}
		}
		return Container{}, 0
	case engineDirectories[names[0]] == "" || id == "" || strings.HasSuffix(word, "conmon"):
		return Container{}, 0
	}
	return Container{ID: id, Runtime: engineDirectories[names[0]]}, used + 2
}

// claimed reads what is below a service or scope that may be handed on: the first name that is one of a container's.
func claimed(names []string) (c Claim, used int) {
	n := 0
	c.UID = -1
	for n < len(names) && strings.HasSuffix(names[n], ".slice") {
		if m := userSlice().FindStringSubmatch(names[n]); m != nil {
			c.UID = number(m[1])
		}
		n++
	}
	if n == len(names) || !strings.HasSuffix(names[n], ".service") && !strings.HasSuffix(names[n], ".scope") {
		return Claim{}, 0
	}
	c.Unit = names[n]
	if m := userService().FindStringSubmatch(names[n]); m != nil {
		if uid := number(m[1]); c.UID < 0 || c.UID == uid {
			c.UID = uid
		} else {
			return Claim{}, 0
		}
	}
	for i, name := range names[n+1:] {
		id, word := leaf(name)
		if id != "" && runtimes[word] != "" {
			c.Container = Container{ID: id, Runtime: runtimes[word]}
			return c, n + 1 + i + 1
		}
	}
	return Claim{}, 0
}

// number reads a user id. One that is no user's is nobody's.
func number(text string) int64 {
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		return -1
	}
	return int64(n)
}

// dashes writes a uid as Kubernetes does. A slice cannot have dashes in it, for they say in which others it is.
func dashes(uid string) string { return strings.ReplaceAll(uid, "_", "-") }
