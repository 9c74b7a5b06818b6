// Package docker attests a process by the container that it runs in, as the engine tells: Docker or Podman, root's or a
// user's own. Its selectors are those of SPIRE's attestor of the same name, and some more.
//
//	docker:label:app:web  docker:env:STAGE=prod  docker:image_id:web:1.2  docker:image_config_digest:sha256:9f86…
//	docker:image_digest:sha256:3b1c…  docker:container_name:web-1
//
// In which container a process is, package container finds out from its cgroup; the engine then is asked over its Unix socket, and
// is believed only if the container's first process, as the engine names it, is in the same cgroup.
//
// A user's own engine answers whatever its user likes. It is asked only where the configuration says so, only about
// processes in that user's part of the cgroups and in a user namespace of his, only on a socket that he listens on,
// and what it says is in selectors of its own, with the user in them: docker:rootless:1000:label:app:web.
package docker

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-id/signet/agent/workloadattest/container"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi/peer"
)

// Name is the type of the selectors.
const Name = "docker"

// Defaults of Config.
var (
	// RootSockets are where root's engines listen.
	RootSockets = []string{"/run/docker.sock", "/run/podman/podman.sock"}

	// userSockets are where a user's own engines listen, below the user's folder in /run/user.
	userSockets = []string{"podman/podman.sock", "docker.sock"}
)

const (
	defaultTimeout = 2 * time.Second

	// askingPerUID and askingTotal bound what engines are asked at the same time.
	askingPerUID, askingTotal = 4, 32

	maxSelectors = 256

	// restFor is how long a hanging engine of root's is not asked again, so that not every process waits for it.
	restFor = 5 * time.Second
)

// Config says whom to ask.
type Config struct {
	// Sockets are the Unix sockets of root's engines. Nil means RootSockets, of which each may be absent.
	Sockets []string

	// Rootless asks users' own engines, too.
	Rootless bool

	// Env names environment variables of containers that become selectors. They may hold secrets, so none does by default.
	Env []string

	// Timeout is how long an engine may take to answer. Zero means 2 s.
	Timeout time.Duration

	// Parents are further cgroups in which an engine makes its containers; see package container.
	Parents []string

	// userDirs is where the folders of users are, for tests.
	userDirs string
}

// A Method is this attestation. It is for concurrent use.
type Method struct {
	cfg      Config
	optional bool // the sockets may be absent
	finder   *container.Finder
	gate     *peer.Gate

	silent map[string]*atomic.Int64 // by socket of root's: until when it is not asked, in nanoseconds since began
	began  time.Time
}

// New returns the method.
func New(cfg Config) (*Method, error) {
	m := &Method{cfg: cfg, gate: peer.NewGate(askingPerUID, askingTotal), silent: map[string]*atomic.Int64{}, began: time.Now()}
	if cfg.Timeout < 0 {
		return nil, fmt.Errorf("docker attestation: Timeout is %s: must not be negative", cfg.Timeout)
	}
	if cfg.Timeout == 0 {
		m.cfg.Timeout = defaultTimeout
	}
	if cfg.Sockets == nil {
		m.cfg.Sockets, m.optional = RootSockets, true
	}
	for _, path := range m.cfg.Sockets {
		m.silent[path] = new(atomic.Int64)
	}
	if cfg.userDirs == "" {
		m.cfg.userDirs = "/run/user"
	}
	var err error
	if m.finder, err = container.New(container.Config{Parents: cfg.Parents}); err != nil {
		return nil, fmt.Errorf("docker attestation: %w", err)
	}
	return m, nil
}

// Name returns "docker".
func (m *Method) Name() string { return Name }

// A source is an engine that may be asked about one process.
type source struct {
	engine
	prefix string // of its selectors
}

// Selectors returns the selectors of a process in a container of Docker or Podman, and none for any other. They count only
// if the process still is in the same container after the engine has answered.
func (m *Method) Selectors(ctx context.Context, p *peer.Process, _ peer.Snapshot) ([]spiffe.Selector, error) {
	at, err := m.finder.Find(p)
	if err != nil {
		return nil, err
	}
	sources, c, err := m.sources(p, at)
	if err != nil || len(sources) == 0 {
		return nil, err
	}
	leave, err := m.gate.Enter(ctx, p.UID)
	if err != nil {
		return nil, err
	}
	defer leave()
	selectors, err := m.ask(ctx, sources, at, c)
	if len(selectors) == 0 {
		return nil, err
	}
	again, findErr := m.finder.Find(p)
	if findErr != nil {
		return nil, findErr
	}
	if !same(at, again) {
		return nil, fmt.Errorf("the process left container %s while it was looked at", short(c.ID))
	}
	return selectors, err
}

// sources says who may be asked about a process there, and about which container.
func (m *Method) sources(p *peer.Process, at container.Location) ([]source, container.Container, error) {
	c, uid := at.Container, int64(0)
	if at.Claim != nil {
		c = at.Claim.Container
		if at.Claim.UID > 0 {
			uid = at.Claim.UID
		}
		// Else it is in the part of a unit of root's, such as a container that systemd starts by Podman. Whoever else may make
		// cgroups there cannot make the container's first process be in one of his.
	}
	if c.ID == "" || c.Runtime != "" && c.Runtime != "docker" && c.Runtime != "podman" {
		return nil, c, nil
	}
	var sources []source
	if uid == 0 {
		for _, path := range m.cfg.Sockets {
			sources = append(sources, source{engine: engine{path: path}})
		}
		return sources, c, nil
	}
	if !m.cfg.Rootless {
		return nil, c, nil
	}
	owner := uint32(uid) // package container reads no more than 32 bits
	if err := inNamespaceOf(p, owner); err != nil {
		return nil, c, fmt.Errorf("the process is in the cgroups of uid %d, whose engine is not asked: %w", uid, err)
	}
	dir := filepath.Join(m.cfg.userDirs, strconv.FormatInt(uid, 10))
	for _, name := range userSockets {
		sources = append(sources, source{engine{path: filepath.Join(dir, name), dir: dir, below: name, uid: owner}, fmt.Sprintf("rootless:%d:", uid)})
	}
	return sources, c, nil
}

// ask asks all engines at the same time, and returns what the one says that knows the container.
func (m *Method) ask(ctx context.Context, sources []source, at container.Location, c container.Container) ([]spiffe.Selector, error) {
	type reply struct {
		description
		err error
	}
	replies := make([]reply, len(sources))
	var wg sync.WaitGroup
	for i, s := range sources {
		wg.Go(func() {
			replies[i].description, replies[i].err = m.askOne(ctx, s.engine, c.ID)
			if replies[i].err == nil {
				replies[i].err = m.inside(replies[i].description, at, c)
			}
		})
	}
	wg.Wait()
	var failed []error
	for i, r := range replies {
		switch {
		case r.err == nil:
			return m.selectors(sources[i].prefix, r.description)
		case errors.Is(r.err, errUnknown), errors.Is(r.err, errAbsent) && (m.optional || sources[i].dir != ""):
		default:
			failed = append(failed, fmt.Errorf("engine at %s: %w", sources[i].path, r.err))
		}
	}
	if len(failed) == 0 && c.Runtime != "" {
		var paths []string
		for _, s := range sources {
			paths = append(paths, s.path)
		}
		return nil, fmt.Errorf("container %s of %s: no engine knows it; asked at %s", short(c.ID), c.Runtime, strings.Join(paths, ", "))
	}
	return nil, errors.Join(failed...)
}

// askOne asks an engine, unless it hung a moment ago.
func (m *Method) askOne(ctx context.Context, e engine, id string) (description, error) {
	until := m.silent[e.path] // nil for a user's, for whom nobody else waits
	if until != nil && int64(time.Since(m.began)) < until.Load() {
		return description{}, errSilent
	}
	bounded, cancel := context.WithTimeout(ctx, m.cfg.Timeout)
	defer cancel()
	d, err := e.container(bounded, id)
	if until != nil && errors.Is(err, errSilent) && ctx.Err() == nil {
		until.Store(int64(time.Since(m.began) + restFor))
	}
	return d, err
}

// inside says whether the container's first process is where the process is. Without that, a cgroup that somebody named
// after another container would be that container.
func (m *Method) inside(d description, at container.Location, c container.Container) error {
	if d.pid <= 0 {
		return fmt.Errorf("container %s does not run, says the engine", short(c.ID))
	}
	first, err := m.finder.FindPID(d.pid)
	if err != nil {
		return fmt.Errorf("the first process of container %s: %w", short(c.ID), err)
	}
	if !same(at, first) {
		return fmt.Errorf("the first process of container %s, which is %d as the engine says, is not in the cgroup of the process: "+
			"does the engine run in another PID namespace, or did somebody name a cgroup after a container?", short(c.ID), d.pid)
	}
	return nil
}

// same says whether two processes are in one container.
func same(a, b container.Location) bool {
	if (a.Claim == nil) != (b.Claim == nil) {
		return false
	}
	if a.Claim != nil {
		return *a.Claim == *b.Claim
	}
	return a.Container == b.Container
}

// selectors says what an engine says in selectors.
func (m *Method) selectors(prefix string, d description) ([]spiffe.Selector, error) {
	var all []spiffe.Selector
	var missing []error
	add := func(kind, value string) {
		s := spiffe.Selector{Type: Name, Value: prefix + kind + ":" + value}
		if value == "" {
			return
		}
		if err := s.Check(); err != nil {
			missing = append(missing, err)
			return
		}
		if len(all) == maxSelectors {
			missing = append(missing, fmt.Errorf("the container has more than %d labels and variables: the rest is left out", maxSelectors))
		}
		if len(all) < maxSelectors {
			all = append(all, s)
		}
	}
	add("container_name", strings.TrimPrefix(d.name, "/"))
	add("image_id", d.imageName)
	if d.image != "" {
		add("image_config_digest", d.image)
	}
	for _, digest := range d.digests {
		add("image_digest", digest)
	}
	for _, v := range d.env {
		if name, _, ok := strings.Cut(v, "="); ok && slices.Contains(m.cfg.Env, name) {
			add("env", v)
		}
	}
	for _, l := range d.labels {
		add("label", l.key+":"+l.value)
	}
	if d.missing != nil {
		missing = append(missing, d.missing)
	}
	return all, errors.Join(missing[:min(len(missing), 8)]...)
}

// Available says whether root's engines answer. One that needs not be there, and is not, is none.
func (m *Method) Available(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, m.cfg.Timeout)
	defer cancel()
	failed := make([]error, len(m.cfg.Sockets))
	var wg sync.WaitGroup
	for i, path := range m.cfg.Sockets {
		wg.Go(func() {
			err := engine{path: path}.ping(ctx)
			if err != nil && !(m.optional && errors.Is(err, errAbsent)) {
				failed[i] = fmt.Errorf("engine at %s: %w", path, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(failed...)
}

// short is how people write an id.
func short(id string) string { return id[:min(len(id), 12)] }
