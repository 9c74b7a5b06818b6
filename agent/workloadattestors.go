package agent

import (
	"fmt"
	"log/slog"

	"github.com/signet-id/signet/agent/workloadattest"
	"github.com/signet-id/signet/agent/workloadattest/unix"
)

// WorkloadAttestation says how processes are looked at: always by unix, and by what else is set.
type WorkloadAttestation struct {
	// Unix looks at users, groups and the executable.
	Unix UnixAttestation `yaml:"unix"`

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
	return []namedMethod{{unix.Name, &w.Unix}}
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
