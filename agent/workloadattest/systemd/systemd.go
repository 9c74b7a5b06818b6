// Package systemd attests a process by the unit of systemd that it runs in, as systemd's system manager tells over D-Bus. Its
// selectors are those of SPIRE's attestor of the same name, and the slice.
//
//	systemd:id:web.service  systemd:fragment_path:/etc/systemd/system/web.service  systemd:slice:system.slice
//
// Units of users' own managers are no units here: their processes are in user@UID.service, whatever they are called there.
// Where there is no bus or no systemd on it, there are no selectors, and nothing has failed.
//
// It speaks the few messages of D-Bus that it needs itself: four calls on a connection of its own, with a bound for each
// answer and for the whole.
package systemd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi/peer"
)

// Name is the type of the selectors.
const Name = "systemd"

const (
	defaultSocket  = "/run/dbus/system_bus_socket"
	defaultTimeout = 2 * time.Second

	// askingPerUID and askingTotal bound the connections to the bus.
	askingPerUID, askingTotal = 2, 16

	// restFor is how long a systemd that hangs is not asked again, so that not every process waits for it.
	restFor = 5 * time.Second

	systemdName = "org.freedesktop.systemd1"
	managerPath = "/org/freedesktop/systemd1"

	// initialNamespace is the inode of the kernel's first PID namespace (PROC_PID_INIT_INO).
	initialNamespace = "pid:[4026531836]"
)

// Config says where systemd is.
type Config struct {
	// Socket is the Unix socket of the system bus. Empty means /run/dbus/system_bus_socket.
	Socket string

	// Timeout is how long systemd may take for one process. Zero means 2 s.
	Timeout time.Duration

	// Log is told once, at level debug, that there is no systemd. Nil means nowhere.
	Log *slog.Logger
}

// A Method is this attestation. It is for concurrent use.
type Method struct {
	cfg  Config
	gate *peer.Gate
	tell sync.Once

	silent atomic.Int64 // until when systemd is not asked, in nanoseconds since began
	began  time.Time
}

// New returns the method.
func New(cfg Config) (*Method, error) {
	if cfg.Timeout < 0 {
		return nil, fmt.Errorf("systemd attestation: Timeout is %s: must not be negative", cfg.Timeout)
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = defaultTimeout
	}
	if cfg.Socket == "" {
		cfg.Socket = defaultSocket
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Method{cfg: cfg, gate: peer.NewGate(askingPerUID, askingTotal), began: time.Now()}, nil
}

// Name returns "systemd".
func (m *Method) Name() string { return Name }

// Selectors returns the selectors of a process in a unit.
func (m *Method) Selectors(ctx context.Context, p *peer.Process, _ peer.Snapshot) ([]spiffe.Selector, error) {
	leave, err := m.gate.Enter(ctx, p.UID)
	if err != nil {
		return nil, err
	}
	defer leave()
	silent := fmt.Errorf("systemd does not answer within %s", m.cfg.Timeout)
	if int64(time.Since(m.began)) < m.silent.Load() {
		return nil, silent
	}
	bounded, cancel := context.WithTimeout(ctx, m.cfg.Timeout)
	defer cancel()
	u, err := m.unit(bounded, p)
	if errors.Is(err, errAbsent) {
		m.tell.Do(func() {
			m.cfg.Log.LogAttrs(ctx, slog.LevelDebug, "no systemd selectors: there is no systemd", slog.String("socket", m.cfg.Socket))
		})
		return nil, nil
	}
	// systemd was asked about a process id, or about a descriptor that was had by it: that was this process, if it still lives.
	if gone := p.Alive(); gone != nil {
		return nil, gone
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		if ctx.Err() == nil {
			m.silent.Store(int64(time.Since(m.began) + restFor))
		}
		err = silent
	}
	var all []spiffe.Selector
	for _, s := range []struct{ kind, value string }{{"id", u.id}, {"fragment_path", u.fragment}, {"slice", u.slice}} {
		if s.value != "" {
			all = append(all, spiffe.Selector{Type: Name, Value: s.kind + ":" + s.value})
		}
	}
	return all, err
}

// Available says whether systemd answers, if it is there.
func (m *Method) Available(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, m.cfg.Timeout)
	defer cancel()
	b, err := dial(ctx, m.cfg.Socket)
	if err == nil {
		defer b.close()
		_, err = b.manager()
	}
	if errors.Is(err, errAbsent) {
		return nil
	}
	return err
}

// A unit is what is kept of one.
type unit struct{ id, fragment, slice string }

func (m *Method) unit(ctx context.Context, p *peer.Process) (unit, error) {
	b, err := dial(ctx, m.cfg.Socket)
	if err != nil {
		return unit{}, err
	}
	defer b.close()
	systemd, err := b.manager()
	if err != nil {
		return unit{}, err
	}
	path, err := b.unitOf(systemd, p)
	if err != nil || path == "" {
		return unit{}, err
	}
	get := func(iface, name string) (string, error) {
		e := &encoder{}
		e.string(iface)
		e.string(name)
		reply, err := b.call(systemd, message{path: path, iface: "org.freedesktop.DBus.Properties", member: "Get", destination: systemd, signature: "ss", body: e.data})
		if named(err, "org.freedesktop.DBus.Error.UnknownObject", "org.freedesktop.DBus.Error.UnknownProperty", "org.freedesktop.DBus.Error.UnknownInterface") {
			return "", nil
		}
		if err != nil {
			return "", err
		}
		d := reply.values("v")
		value := d.variant()
		return value, d.err
	}
	var u unit
	const unitInterface = systemdName + ".Unit"
	if u.id, err = get(unitInterface, "Id"); err != nil || u.id == "" {
		return u, err
	}
	var errs [2]error
	u.fragment, errs[0] = get(unitInterface, "FragmentPath")
	if typed := typeInterface(u.id); typed != "" {
		u.slice, errs[1] = get(typed, "Slice")
	}
	return u, errors.Join(errs[:]...)
}

// manager returns the unique name of systemd on the bus. On a system bus its policy lets only root take the other name; on
// a bus of another making that must be seen.
func (b *bus) manager() (string, error) {
	reply, err := b.ask("GetNameOwner", systemdName)
	if named(err, "org.freedesktop.DBus.Error.NameHasNoOwner") {
		return "", errAbsent
	}
	if err != nil {
		return "", err
	}
	d := reply.values("s")
	name := d.string()
	if d.err != nil {
		return "", d.err
	}
	if reply, err = b.ask("GetConnectionUnixUser", name); err != nil {
		return "", err
	}
	d = reply.values("u")
	if uid := d.uint32(); d.err == nil && uid != 0 {
		return "", fmt.Errorf("uid %d, and not root, has the name %s on the bus", uid, systemdName)
	}
	return name, d.err
}

// unitOf returns the object of the unit that the process is in, or nothing.
func (b *bus) unitOf(systemd string, p *peer.Process) (path string, err error) {
	call := message{path: managerPath, iface: systemdName + ".Manager", destination: systemd}
	var d *decoder
	err = &busError{name: "org.freedesktop.DBus.Error.UnknownMethod", text: "the bus passes no descriptors"}
	if b.passesFD {
		fd, openErr := unix.PidfdOpen(int(p.PID), 0)
		if openErr != nil {
			return "", fmt.Errorf("process %d: %w", p.PID, peer.ErrGone)
		}
		defer unix.Close(fd)
		e := &encoder{}
		e.uint32(0) // the first descriptor
		call.member, call.signature, call.body = "GetUnitByPIDFD", "h", e.data
		var reply message
		if reply, err = b.call(systemd, call, fd); err == nil {
			d = reply.values("osay")
		}
	}
	if named(err, "org.freedesktop.DBus.Error.UnknownMethod") { // before version 253
		// A process id says something only to who counts the same way.
		if ns, nsErr := os.Readlink("/proc/self/ns/pid"); nsErr != nil || ns != initialNamespace {
			return "", fmt.Errorf("this systemd is asked by process id, and the agent is not in the PID namespace of the host: %w", errors.Join(nsErr, err))
		}
		e := &encoder{}
		e.uint32(uint32(p.PID))
		call.member, call.signature, call.body = "GetUnitByPID", "u", e.data
		var reply message
		if reply, err = b.call(systemd, call); err == nil {
			d = reply.values("o")
		}
	}
	if named(err, "org.freedesktop.systemd1.NoUnitForPID", "org.freedesktop.systemd1.NoSuchUnit") {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	path = d.string()
	return path, d.err
}

// typeInterface is the interface with the properties of a unit's type.
func typeInterface(id string) string {
	for suffix, name := range map[string]string{
		".service": "Service", ".scope": "Scope", ".slice": "Slice", ".socket": "Socket", ".mount": "Mount", ".swap": "Swap",
	} {
		if strings.HasSuffix(id, suffix) {
			return systemdName + "." + name
		}
	}
	return ""
}
