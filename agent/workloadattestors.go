package agent

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/signet-id/signet/agent/workloadattest"
	"github.com/signet-id/signet/agent/workloadattest/docker"
	"github.com/signet-id/signet/agent/workloadattest/k8s"
	"github.com/signet-id/signet/agent/workloadattest/systemd"
	"github.com/signet-id/signet/agent/workloadattest/unix"
)

// WorkloadAttestation says how processes are looked at: always by unix, and by what else is set.
type WorkloadAttestation struct {
	// Unix looks at users, groups and the executable.
	Unix UnixAttestation `yaml:"unix"`
	// Systemd asks systemd about the units that processes run in. With its defaults it is written {}.
	Systemd *SystemdAttestation `yaml:"systemd"`
	// Docker asks Docker or Podman about the containers that processes run in. With its defaults it is written {}.
	Docker *DockerAttestation `yaml:"docker"`

	// K8s looks at the Kubernetes pod and container. Absent: it does not.
	K8s *K8sAttestation `yaml:"k8s"`

	// MaxHashBytes is the older name of unix.max_hash_bytes.
	MaxHashBytes int64 `yaml:"max_hash_bytes"`
}

// methodConfig is the configuration of one method of workload attestation.
type methodConfig interface {
	// check fills in defaults and tells each mistake by its field, without opening anything.
	check(bad func(field, format string, args ...any))
	// open makes the method.
	open(log *slog.Logger) (workloadattest.Method, error)
}

// A namedMethod is one that is used, with the key that the file has it under.
type namedMethod struct {
	name string
	methodConfig
}

// used are the methods that this agent attests by.
func (w *WorkloadAttestation) used() []namedMethod {
	all := []namedMethod{{unix.Name, &w.Unix}}
	if w.Systemd != nil {
		all = append(all, namedMethod{systemd.Name, w.Systemd})
	}
	if w.Docker != nil {
		all = append(all, namedMethod{docker.Name, w.Docker})
	}
	if w.K8s != nil {
		all = append(all, namedMethod{k8s.Name, w.K8s})
	}
	return all
}

// check checks each method.
func (w *WorkloadAttestation) check(bad func(field, format string, args ...any)) {
	if w.MaxHashBytes != 0 {
		if w.Unix.MaxHashBytes != 0 && w.Unix.MaxHashBytes != w.MaxHashBytes {
			bad("workload_attestation.max_hash_bytes", "is the older name of workload_attestation.unix.max_hash_bytes; keep that one")
		}
		w.Unix.MaxHashBytes = w.MaxHashBytes
	}
	for _, m := range w.used() {
		m.check(func(field, format string, args ...any) {
			bad("workload_attestation."+m.name+"."+field, format, args...)
		})
	}
}

// open makes the methods.
func (w *WorkloadAttestation) open(log *slog.Logger) ([]workloadattest.Method, error) {
	var methods []workloadattest.Method
	for _, m := range w.used() {
		method, err := m.open(log)
		if err != nil {
			return nil, fmt.Errorf("workload_attestation.%s: %w", m.name, err)
		}
		methods = append(methods, method)
	}
	return methods, nil
}

// UnixAttestation configures the workload attestor unix.
type UnixAttestation struct {
	// MaxHashBytes is the size of the largest executable whose SHA-256 becomes a selector. Default 512 MiB; negative:
	// none is hashed.
	MaxHashBytes int64 `yaml:"max_hash_bytes"`
	// AllowForeignPaths gives a path selector also to a process whose executable the agent does not find under that path,
	// such as one in a container. Whoever may make a mount namespace can then run any program under any path.
	AllowForeignPaths bool `yaml:"allow_foreign_paths"`
	// AllowFUSE hashes also executables on FUSE filesystems, whose owner can run one content and show another.
	AllowFUSE bool `yaml:"allow_fuse"`
}

func (u *UnixAttestation) check(func(field, format string, args ...any)) {}

func (u *UnixAttestation) open(*slog.Logger) (workloadattest.Method, error) {
	return unix.New(unix.Config{MaxHashBytes: u.MaxHashBytes, AllowForeignPaths: u.AllowForeignPaths, AllowFUSE: u.AllowFUSE})
}

// SystemdAttestation configures the workload attestor systemd.
type SystemdAttestation struct {
	// BusSocket is the Unix socket of the system bus. Default /run/dbus/system_bus_socket. If nobody is there, there are no selectors.
	BusSocket string `yaml:"bus_socket"`
	// Timeout is how long systemd may take to answer. Default 2s; at most 4s.
	Timeout time.Duration `yaml:"timeout"`
}

func (s *SystemdAttestation) check(bad func(field, format string, args ...any)) {
	if s.BusSocket != "" {
		checkSocket("bus_socket", s.BusSocket, bad)
	}
	checkAskTimeout(s.Timeout, bad)
}

func (s *SystemdAttestation) open(log *slog.Logger) (workloadattest.Method, error) {
	return systemd.New(systemd.Config{Socket: s.BusSocket, Timeout: s.Timeout, Log: log})
}

// maxAskTimeout is less than what a method may take in all.
const maxAskTimeout = 4 * time.Second

func checkAskTimeout(d time.Duration, bad func(field, format string, args ...any)) {
	if d < 0 || d > maxAskTimeout {
		bad("timeout", "%s is not between 0 and %s", d, maxAskTimeout)
	}
}

func checkSocket(field, path string, bad func(field, format string, args ...any)) {
	if !filepath.IsAbs(path) {
		bad(field, "%q must be an absolute path, without unix://", path)
	} else if len(path) > maxSocketBytes {
		bad(field, "%q has %d bytes, and a Unix socket's path at most %d", path, len(path), maxSocketBytes)
	}
}

// DockerAttestation configures the workload attestor docker, which is for Podman, too.
type DockerAttestation struct {
	// Sockets are the Unix sockets of root's engines. Default /run/docker.sock and /run/podman/podman.sock, of which each may be
	// absent.
	Sockets []string `yaml:"sockets"`
	// Rootless asks users' own engines about their own containers, at podman/podman.sock and docker.sock in /run/user/UID. What they
	// say is in selectors docker:rootless:UID:…, and is worth as much as that user's word.
	Rootless bool `yaml:"rootless"`
	// Env names the environment variables of containers that become selectors. They may hold secrets; default none.
	Env []string `yaml:"env"`
	// CgroupParents are further cgroups in which an engine makes its containers (dockerd --cgroup-parent), such as /batch. Nobody
	// but root may have the right to make cgroups there.
	CgroupParents []string `yaml:"cgroup_parents"`
	// Timeout is how long an engine may take to answer. Default 2s; at most 4s.
	Timeout time.Duration `yaml:"timeout"`
}

func (d *DockerAttestation) check(bad func(field, format string, args ...any)) {
	for _, s := range d.Sockets {
		checkSocket("sockets", s, bad)
	}
	for _, e := range d.Env {
		if e == "" || strings.ContainsAny(e, "=\x00") {
			bad("env", "%q is not a variable's name, such as STAGE", e)
		}
	}
	for _, p := range d.CgroupParents {
		if !filepath.IsAbs(p) || filepath.Clean(p) != p || p == "/" {
			bad("cgroup_parents", "%q is not an absolute path below /, such as /batch", p)
		}
	}
	checkAskTimeout(d.Timeout, bad)
}

func (d *DockerAttestation) open(*slog.Logger) (workloadattest.Method, error) {
	return docker.New(docker.Config{Sockets: d.Sockets, Rootless: d.Rootless, Env: d.Env, Timeout: d.Timeout, Parents: d.CgroupParents})
}
