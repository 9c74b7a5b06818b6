// Package container finds out in which container a process runs, for the attestors docker and k8s, which then ask the
// container engine or the kubelet about it. It reads what the kernel says and asks nobody.
//
// What counts is the caller's cgroup, as the agent sees it in /proc/PID/cgroup, for only it is not the caller's to choose:
// a process gets into the cgroup of a container by an act of root. Three things are the caller's to choose, and none of
// them is believed:
//
//   - Its mounts. Whoever may make a user namespace, which on many systems is everybody, mounts what it likes where it likes,
//     also a file of a tmpfs at a path such as /var/lib/docker/containers/ID/hostname, or the cgroup of somebody else. So
//     /proc/PID/mountinfo of a caller is not read at all. The agent's own mounts are, to find out which container the agent
//     itself is in.
//   - Cgroups below its own. A container with a writable cgroup names them as it likes. So the outermost container counts, not
//     what is further down in the path.
//   - Cgroups in a part of the hierarchy that root has handed on, such as user@1000.service, or a unit with Delegate=yes. What a
//     path says there is a Claim and not a Container. The engine of that very user or unit may be asked about it and no other.
//
// So a path counts only from its start on and in known forms (see path.go). A node that is itself a container, such as one of kind,
// has its own start: where the process with id 1 is.
package container

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/signet-id/signet/workloadapi/peer"
)

// A Container is one in which a process is. The zero value is none.
type Container struct {
	// ID is 64 hex digits. It is empty if only the pod is known.
	ID string

	// PodUID is the uid of the Kubernetes pod, with dashes if it is a UUID; that of a static pod is a hash without them. It
	// is empty outside Kubernetes, and for a container beside the agent's own in the same pod, whose path does not tell.
	PodUID string

	// Name is the name of the container in the pod. It is known only of the agent's own container, instead of the ID.
	Name string

	// Runtime is what made the container, such as docker, podman, containerd or cri-o, or empty. It is a hint.
	Runtime string

	// Path is the container's cgroup in the agent's view, such as /docker/ID. It is empty for the agent's own container.
	Path string
}

// A Claim is the name of a container that somebody else than root may have given.
type Claim struct {
	Container

	// UID is the user whose part of the hierarchy it is, or -1 if it is not a user's.
	UID int64

	// Unit is the systemd unit whose part of the hierarchy it is, such as web.service.
	Unit string
}

// A Location is where a process is. The zero value means in no container.
type Location struct {
	// Container is the container.
	Container

	// Claim is what is claimed where there is no container, or nil.
	Claim *Claim
}

// Errors that say why a process's container is not known. They are wrapped.
var (
	// ErrAmbiguous says that the hierarchies of cgroups name different containers.
	ErrAmbiguous = errors.New("its cgroups name different containers")

	// ErrMalformed says that a file of /proc is not as the kernel writes it.
	ErrMalformed = errors.New("not as the kernel writes it")
)

// Config says what a node looks like. The zero value is right for most.
type Config struct {
	// CgroupRoots are further places where a kubelet puts its pods: the values of its option --cgroup-root, such as
	// /kube. Nobody but root may have the right to make cgroups there.
	CgroupRoots []string

	// Parents are further cgroups in which an engine makes its containers: the values of dockerd's option --cgroup-parent,
	// such as /batch. Nobody but root may have the right to make cgroups there.
	Parents []string
}

// A Finder finds containers on this node. It is for concurrent use.
type Finder struct {
	roots, parents [][]string

	// bases are the cgroups of the node itself, if it is a container.
	bases [][]string

	// own is the container that the agent is in, if it has a cgroup namespace of its own.
	own Container

	// private says that the agent has a cgroup namespace of its own, or one that it shares with its node.
	private bool
}

const (
	maxCgroupBytes = 64 << 10 // a line for each of about a dozen hierarchies, each of at most 4 KiB
	maxMountsBytes = 8 << 20  // the agent's own mounts; on a node they may be thousands
	maxLines       = 64

	// initialNamespace is the inode of the kernel's first cgroup namespace (PROC_CGROUP_INIT_INO).
	initialNamespace = "cgroup:[4026531835]"
)

// New returns a Finder for the node on which the agent runs.
func New(cfg Config) (*Finder, error) {
	f := &Finder{}
	var err error
	if f.roots, err = split("cgroup root", cfg.CgroupRoots); err != nil {
		return nil, err
	}
	if f.parents, err = split("parent cgroup", cfg.Parents); err != nil {
		return nil, err
	}
	namespace, err := os.Readlink("/proc/self/ns/cgroup")
	if err != nil {
		return nil, fmt.Errorf("reading the agent's cgroup namespace: %w", err)
	}
	// The process with id 1 is the node's init; without hostPID it is the agent's container's.
	init, err := read("/proc/1/cgroup", maxCgroupBytes)
	if err != nil {
		return nil, err
	}
	if f.bases, err = bases(init); err != nil {
		return nil, fmt.Errorf("/proc/1/cgroup: %w", err)
	}
	if f.private = namespace != initialNamespace; f.private {
		mounts, err := read("/proc/self/mountinfo", maxMountsBytes)
		if err != nil {
			return nil, err
		}
		f.own, err = ownContainer(mounts)
		if err != nil && !errors.Is(err, ErrAmbiguous) { // it may have files of other containers mounted: then it does not know its own
			return nil, fmt.Errorf("/proc/self/mountinfo: %w", err)
		}
	}
	return f, nil
}

func split(what string, paths []string) ([][]string, error) {
	var all [][]string
	for _, p := range paths {
		if p == "/" || !path.IsAbs(p) || path.Clean(p) != p {
			return nil, fmt.Errorf("%s %q must be an absolute path below /, such as /kube", what, p)
		}
		all = append(all, strings.Split(p[1:], "/"))
	}
	return all, nil
}

// Find returns where the process is. Its errors are peer.ErrGone, ErrAmbiguous, ErrMalformed and those of reading /proc.
func (f *Finder) Find(p *peer.Process) (Location, error) {
	name := "/proc/" + strconv.Itoa(int(p.PID)) + "/cgroup"
	data, err := read(name, maxCgroupBytes)
	// Only now is it known that what was read is about this process: while it lives, nobody else has its process id.
	if gone := p.Alive(); gone != nil {
		return Location{}, gone
	}
	if err != nil {
		return Location{}, err
	}
	l, err := f.parse(data)
	if err != nil {
		return Location{}, fmt.Errorf("%s: %w", name, err)
	}
	return l, nil
}

// FindPID returns where the process is that has an id now. Only for a process that is already known by something else than
// its id may it be taken for the one that is meant.
func (f *Finder) FindPID(pid int32) (Location, error) {
	name := "/proc/" + strconv.Itoa(int(pid)) + "/cgroup"
	data, err := read(name, maxCgroupBytes)
	if err != nil {
		return Location{}, err
	}
	l, err := f.parse(data)
	if err != nil {
		return Location{}, fmt.Errorf("%s: %w", name, err)
	}
	return l, nil
}

// parse reads what is in a cgroup file. Each hierarchy may name a container or none; those that do must agree.
func (f *Finder) parse(data []byte) (Location, error) {
	lines, err := readLines(data)
	if err != nil {
		return Location{}, err
	}
	var found Container
	var claim *Claim
	var ambiguous error
	inside := true
	for _, l := range lines {
		inside = inside && l.up == 0
		c, claimed := f.locate(l)
		if c != (Container{}) {
			if err := found.merge(c); err != nil {
				return Location{}, err
			}
		}
		if claimed == nil {
			continue
		}
		switch {
		case claim == nil:
			claim = claimed
		case claim.ID != claimed.ID || claim.UID != claimed.UID || claim.Unit != claimed.Unit:
			ambiguous = fmt.Errorf("%w: %s and %s", ErrAmbiguous, claim.Path, claimed.Path)
		}
	}
	switch {
	case found != (Container{}):
		return Location{Container: found}, nil // proven by one hierarchy; what another claims takes nothing from it
	case ambiguous != nil:
		return Location{}, ambiguous
	case claim != nil:
		return Location{Claim: claim}, nil
	case f.private && inside:
		// The process is in the part of the hierarchy that the agent's own container is.
		return Location{Container: f.own}, nil
	}
	return Location{}, nil
}

// merge adds what another hierarchy says.
func (c *Container) merge(o Container) error {
	if c.ID != "" && o.ID != "" && c.ID != o.ID || c.PodUID != "" && o.PodUID != "" && c.PodUID != o.PodUID {
		return fmt.Errorf("%w: %s and %s", ErrAmbiguous, c.Path, o.Path)
	}
	if c.ID == "" && o.ID != "" {
		c.ID, c.Path = o.ID, o.Path
	}
	if c.PodUID == "" {
		c.PodUID = o.PodUID
	}
	if c.Runtime == "" {
		c.Runtime = o.Runtime
	}
	if c.Path == "" {
		c.Path = o.Path
	}
	return nil
}

// read reads a file of /proc, whose size is not known before.
func read(name string, limit int) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	if len(data) > limit {
		return nil, fmt.Errorf("%s is longer than %d bytes: %w", name, limit, ErrMalformed)
	}
	return data, nil
}

// A line is one of a cgroup file, about one hierarchy.
type line struct {
	// up is how many levels the path goes up from the root of the agent's cgroup namespace, and names are what follows.
	up    int
	names []string
}

// readLines reads a cgroup file. Its lines are NUMBER:CONTROLLERS:/PATH; a path may hold colons, and no newline.
func readLines(data []byte) ([]line, error) {
	if len(data) > maxCgroupBytes {
		return nil, fmt.Errorf("it is longer than %d bytes: %w", maxCgroupBytes, ErrMalformed)
	}
	var all []line
	for text := range bytes.Lines(data) {
		if len(all) == maxLines {
			return nil, fmt.Errorf("it has more than %d lines: %w", maxLines, ErrMalformed)
		}
		l, err := readLine(strings.TrimSuffix(string(text), "\n"))
		if err != nil {
			return nil, err
		}
		all = append(all, l)
	}
	return all, nil
}

func readLine(text string) (line, error) {
	malformed := func(why string) (line, error) {
		return line{}, fmt.Errorf("line %.200q: %s: %w", text, why, ErrMalformed)
	}
	number, rest, ok := strings.Cut(text, ":")
	if _, err := strconv.ParseUint(number, 10, 31); err != nil || !ok {
		return malformed("no number")
	}
	_, p, ok := strings.Cut(rest, ":")
	if !ok || !strings.HasPrefix(p, "/") {
		return malformed("no path")
	}
	if p == "/" {
		return line{}, nil
	}
	l := line{names: strings.Split(p[1:], "/")}
	for len(l.names) > 0 && l.names[0] == ".." {
		l.up, l.names = l.up+1, l.names[1:]
	}
	for _, n := range l.names {
		if n == "" || n == "." || n == ".." {
			return malformed("its path is not clean")
		}
	}
	return l, nil
}

// path is that of the first names of a line, in the agent's view.
func (l line) path(names int) string {
	return strings.Repeat("/..", l.up) + "/" + strings.Join(l.names[:names], "/")
}

// bases are the cgroups below which a node has its containers, from the cgroup file of its init.
func bases(init []byte) ([][]string, error) {
	lines, err := readLines(init)
	if err != nil {
		return nil, err
	}
	var all [][]string
	for _, l := range lines {
		if n := len(l.names); n > 0 && (l.names[n-1] == "init.scope" || l.names[n-1] == "init") {
			l.names = l.names[:n-1]
		}
		if l.up == 0 && len(l.names) > 0 {
			all = append(all, l.names)
		}
	}
	return all, nil
}
