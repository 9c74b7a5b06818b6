package systemd

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/workloadapi/peer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// startBus runs a real dbus-daemon that lets everybody do everything, and returns its socket.
func startBus(t *testing.T) string {
	t.Helper()
	program, err := exec.LookPath("dbus-daemon")
	if err != nil {
		t.Skip("there is no dbus-daemon (Debian's package dbus)")
	}
	dir, err := os.MkdirTemp("", "signet-bus") // its address would have to be escaped with a test's name in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket, config := filepath.Join(dir, "bus"), filepath.Join(dir, "bus.conf")
	err = os.WriteFile(config, []byte(`<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=`+socket+`</listen><auth>EXTERNAL</auth>
<policy context="default"><allow own="*"/><allow user="*"/><allow send_destination="*" eavesdrop="true"/><allow receive_sender="*" eavesdrop="true"/>
<allow send_requested_reply="false" send_type="method_return"/><allow receive_requested_reply="false" receive_type="method_return"/></policy>
</busconfig>`), 0o644)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "--config-file="+config, "--nofork", "--print-address")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("dbus-daemon: %q, %v", line, err)
	}
	return socket
}

// A manager plays systemd on a bus. Its fields are set before it serves.
type manager struct {
	t     *testing.T
	bus   *bus
	fds   *fdReader
	old   bool // as before version 253: it knows no GetUnitByPIDFD
	units map[int]unit
	// before, if not nil, is called with each call before it is answered, and says whether it is answered at all.
	before func(message) bool

	mu    sync.Mutex
	calls []string
}

// An fdReader keeps the descriptors that come with what is read.
type fdReader struct {
	conn *net.UnixConn
	fds  []int
}

func (r *fdReader) Read(p []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4*8))
	n, m, _, _, err := r.conn.ReadMsgUnix(p, oob)
	if m > 0 {
		messages, _ := unix.ParseSocketControlMessage(oob[:m])
		for _, c := range messages {
			fds, _ := unix.ParseUnixRights(&c)
			r.fds = append(r.fds, fds...)
		}
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return max(n, 0), err
}

// serve takes the name of systemd on the bus and answers until the test ends.
func (m *manager) serve(socket string) {
	t := m.t
	t.Helper()
	b, err := dial(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	m.bus, m.fds = b, &fdReader{conn: b.conn}
	b.in = bufio.NewReader(m.fds)
	e := &encoder{}
	e.string(systemdName)
	e.uint32(0)
	if _, err := b.call(busName, message{path: "/org/freedesktop/DBus", iface: busName, member: "RequestName", destination: busName, signature: "su", body: e.data}); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			call, err := readMessage(b.in)
			if err != nil {
				return // the connection is closed
			}
			if call.kind == methodCall {
				m.answer(call)
			}
		}
	}()
	t.Cleanup(func() {
		b.close()
		<-done
		for _, fd := range m.fds.fds {
			unix.Close(fd)
		}
	})
}

func (m *manager) answer(call message) {
	m.mu.Lock()
	m.calls = append(m.calls, call.member)
	m.mu.Unlock()
	if m.before != nil && !m.before(call) {
		return
	}
	m.bus.serial++
	reply := message{kind: errorReply, serial: m.bus.serial, replyTo: call.serial, destination: call.sender, errorName: "org.freedesktop.DBus.Error.UnknownMethod"}
	found := func(pid int) {
		if _, ok := m.units[pid]; !ok {
			reply.errorName = "org.freedesktop.systemd1.NoUnitForPID"
			return
		}
		e := &encoder{}
		e.string("/unit/" + strconv.Itoa(pid))
		reply.kind, reply.errorName, reply.signature = methodReturn, "", "o"
		if call.member == "GetUnitByPIDFD" {
			e.string(m.units[pid].id)
			e.uint32(0) // no invocation id
			reply.signature = "osay"
		}
		reply.body = e.data
	}
	d := &decoder{data: call.body, order: call.order}
	switch {
	case call.member == "GetUnitByPIDFD" && !m.old:
		fd := m.fds.fds[len(m.fds.fds)-1]
		info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
		if err != nil {
			m.t.Error(err)
		}
		pid := 0
		for line := range strings.Lines(string(info)) {
			if text, ok := strings.CutPrefix(line, "Pid:"); ok {
				pid, _ = strconv.Atoi(strings.TrimSpace(text))
			}
		}
		found(pid)
	case call.member == "GetUnitByPID":
		found(int(d.uint32()))
	case call.member == "Get":
		iface, name := d.string(), d.string()
		pid, _ := strconv.Atoi(strings.TrimPrefix(call.path, "/unit/"))
		u := m.units[pid]
		value, ok := map[string]string{systemdName + ".Unit Id": u.id, systemdName + ".Unit FragmentPath": u.fragment, typeInterface(u.id) + " Slice": u.slice}[iface+" "+name]
		if !ok {
			reply.errorName = "org.freedesktop.DBus.Error.UnknownProperty"
			break
		}
		e := &encoder{}
		e.signature("s")
		e.string(value)
		reply.kind, reply.errorName, reply.signature, reply.body = methodReturn, "", "v", e.data
	}
	if _, err := m.bus.conn.Write(reply.bytes()); err != nil {
		m.t.Error(err)
	}
}

// child is a process of the test.
func child(t *testing.T) (*peer.Process, *exec.Cmd) {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	table, err := peer.NewTable(peer.Config{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := table.Open(int32(cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close(); table.Close() })
	return p, cmd
}

func ask(t *testing.T, c Config, p *peer.Process) ([]string, error) {
	t.Helper()
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	found, err := m.Selectors(t.Context(), p, peer.Snapshot{})
	var all []string
	for _, s := range found {
		all = append(all, s.String())
	}
	return all, err
}

func requireRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root may be systemd")
	}
}

var web = unit{"web.service", "/etc/systemd/system/web.service", "system.slice"}

func TestUnit(t *testing.T) {
	requireRoot(t)
	for _, old := range []bool{false, true} {
		for name, tt := range map[string]struct {
			unit unit
			want []string
		}{
			"a service": {web, []string{"systemd:id:web.service", "systemd:fragment_path:/etc/systemd/system/web.service", "systemd:slice:system.slice"}},
			"a scope":   {unit{"session-3.scope", "", "user-1000.slice"}, []string{"systemd:id:session-3.scope", "systemd:slice:user-1000.slice"}},
			"a slice":   {unit{"-.slice", "", ""}, []string{"systemd:id:-.slice"}},
			"no unit":   {},
		} {
			t.Run(fmt.Sprintf("%s, old %t", name, old), func(t *testing.T) {
				socket := startBus(t)
				p, _ := child(t)
				m := &manager{t: t, old: old, units: map[int]unit{}}
				if tt.unit.id != "" {
					m.units[int(p.PID)] = tt.unit
				}
				m.serve(socket)
				if got, err := ask(t, Config{Socket: socket}, p); err != nil || !slices.Equal(got, tt.want) {
					t.Errorf("got %q, %v; want %q", got, err, tt.want)
				}
				m.mu.Lock()
				defer m.mu.Unlock()
				if slices.Contains(m.calls, "GetUnitByPID") != old || !slices.Contains(m.calls, "GetUnitByPIDFD") {
					t.Errorf("calls %q", m.calls)
				}
			})
		}
	}
}

func TestNoSystemdIsNoFailure(t *testing.T) {
	p, _ := child(t)
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale") // a socket on which nobody listens any more
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: stale})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for name, socket := range map[string]string{"no bus": filepath.Join(dir, "none"), "a stale socket": stale, "a bus without systemd": startBus(t)} {
		var log bytes.Buffer
		m, err := New(Config{Socket: socket, Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if got, err := m.Selectors(t.Context(), p, peer.Snapshot{}); len(got) > 0 || err != nil {
				t.Errorf("%s: %q, %v", name, got, err)
			}
		}
		if err := m.Available(t.Context()); err != nil {
			t.Errorf("%s: Available: %v", name, err)
		}
		if n := strings.Count(log.String(), "level=DEBUG"); n != 1 {
			t.Errorf("%s: told %d times:\n%s", name, n, log.String())
		}
	}
}

// On a bus without a policy another connection may send what looks like a reply, before the reply.
func TestForgedReply(t *testing.T) {
	requireRoot(t)
	socket := startBus(t)
	p, _ := child(t)
	impostor, err := dial(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	defer impostor.close()
	forged := 0
	m := &manager{t: t, units: map[int]unit{int(p.PID): web}}
	m.before = func(call message) bool {
		e := &encoder{}
		e.signature("s")
		e.string("evil.service")
		signature := "v"
		if call.member != "Get" {
			e = &encoder{}
			e.string("/unit/evil")
			e.string("evil.service")
			e.uint32(0)
			signature = "osay"
		}
		impostor.serial++
		lie := message{kind: methodReturn, serial: impostor.serial, replyTo: call.serial, destination: call.sender, signature: signature, body: e.data}
		if _, err := impostor.conn.Write(lie.bytes()); err != nil {
			t.Error(err)
		}
		if _, err := impostor.ask("GetNameOwner", systemdName); err != nil { // by now the lie has been passed on
			t.Error(err)
		}
		forged++
		return true
	}
	m.serve(socket)
	got, err := ask(t, Config{Socket: socket, Timeout: 20 * time.Second}, p)
	if err != nil || !slices.Contains(got, "systemd:id:web.service") || strings.Contains(fmt.Sprint(got), "evil") || forged < 3 {
		t.Errorf("with %d forged replies: %q, %v", forged, got, err)
	}
}

func TestSystemdThatHangs(t *testing.T) {
	requireRoot(t)
	socket := startBus(t)
	p, _ := child(t)
	for _, at := range []string{"GetUnitByPIDFD", "Get"} {
		m := &manager{t: t, units: map[int]unit{int(p.PID): web}, before: func(call message) bool { return call.member != at }}
		m.serve(socket)
		method, err := New(Config{Socket: socket, Timeout: 100 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		for range 5 {
			got, err := method.Selectors(t.Context(), p, peer.Snapshot{})
			if len(got) > 0 && at == "GetUnitByPIDFD" || err == nil || !strings.Contains(err.Error(), "does not answer") {
				t.Errorf("hanging at %s: %q, %v", at, got, err)
			}
		}
		m.mu.Lock()
		if n := len(slices.DeleteFunc(m.calls, func(c string) bool { return c != at })); n != 1 {
			t.Errorf("hanging at %s, it was asked %d times in a moment, want once", at, n)
		}
		m.mu.Unlock()
		m.bus.close()
	}
}

func TestProcessThatEndsMeanwhile(t *testing.T) {
	requireRoot(t)
	socket := startBus(t)
	p, cmd := child(t)
	m := &manager{t: t, units: map[int]unit{int(p.PID): web}}
	m.before = func(call message) bool {
		if call.member == "Get" {
			cmd.Process.Kill()
			<-p.Done()
		}
		return true
	}
	m.serve(socket)
	if got, err := ask(t, Config{Socket: socket}, p); len(got) > 0 || err == nil {
		t.Errorf("got %q, %v; want ErrGone", got, err)
	}
}

// Somebody else listens, who says what he likes.
func TestBusThatIsNone(t *testing.T) {
	p, _ := child(t)
	big := message{kind: methodReturn, serial: 1, replyTo: 1, sender: busName, signature: "s", body: make([]byte, maxMessage)}
	flood := bytes.Repeat(message{kind: signal, serial: 9, path: "/x", iface: "a.b", member: "C", sender: ":1.9"}.bytes(), maxUnrelated+1)
	for name, tt := range map[string]struct {
		says []string // each after something was read
		want string
	}{
		"closes":            {nil, "authenticating to the bus"},
		"refuses":           {[]string{"REJECTED EXTERNAL\r\n"}, "REJECTED"},
		"a line too long":   {[]string{strings.Repeat("x", 4096)}, "buffer full"},
		"no message":        {[]string{"OK 1234\r\n", "AGREE_UNIX_FD\r\n", "HTTP/1.1 400 Bad Request\r\n"}, "byte order"},
		"a huge message":    {[]string{"OK 1234\r\n", "ERROR\r\n", string(big.bytes())}, "at most"},
		"a message cut off": {[]string{"OK 1234\r\n", "ERROR\r\n", string(big.bytes()[:10])}, "EOF"},
		"only other things": {[]string{"OK 1234\r\n", "ERROR\r\n", string(flood)}, "none among"},
	} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "bus")
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				c, err := l.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				for _, s := range tt.says {
					if _, err := c.Read(make([]byte, 4096)); err != nil {
						return
					}
					io.WriteString(c, s)
				}
				if len(tt.says) > 0 {
					c.(*net.UnixConn).CloseWrite()
					io.Copy(io.Discard, c)
				}
			}()
			got, err := ask(t, Config{Socket: socket, Timeout: 20 * time.Second}, p)
			l.Close()
			<-done
			if len(got) > 0 || err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %q, %v; want %q", got, err, tt.want)
			}
		})
	}
}

// A user has the name of systemd on a bus whose policy lets him.
func TestNameOfSystemdTakenByAUser(t *testing.T) {
	requireRoot(t)
	socket := startBus(t)
	if err := os.Chmod(filepath.Dir(socket), 0o755); err != nil {
		t.Fatal(err)
	}
	p, _ := child(t)
	b := dialAs(t, socket, 1) // the bus wants one that has a name
	defer b.close()
	e := &encoder{}
	e.string(systemdName)
	e.uint32(0)
	if _, err := b.call(busName, message{path: "/org/freedesktop/DBus", iface: busName, member: "RequestName", destination: busName, signature: "su", body: e.data}); err != nil {
		t.Fatal(err)
	}
	got, err := ask(t, Config{Socket: socket, Timeout: 20 * time.Second}, p)
	if len(got) > 0 || err == nil || !strings.Contains(err.Error(), "uid 1, and not root") {
		t.Errorf("got %q, %v", got, err)
	}
	if err := (&Method{cfg: Config{Socket: socket, Timeout: 20 * time.Second}}).Available(context.Background()); err == nil {
		t.Error("a user's systemd is available")
	}
}

// dialAs connects while one thread has another user id, which the kernel then notes.
func dialAs(t *testing.T, socket string, uid int) *bus {
	t.Helper()
	type result struct {
		b   *bus
		err error
	}
	done := make(chan result)
	go func() { // never unlocked: the thread ends with the goroutine
		runtime.LockOSThread()
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
				err = errno
			}
		}
		if err == nil {
			err = unix.Connect(fd, &unix.SockaddrUnix{Name: socket})
		}
		if err != nil {
			done <- result{nil, err}
			return
		}
		f := os.NewFile(uintptr(fd), socket)
		defer f.Close()
		c, err := net.FileConn(f)
		if err != nil {
			done <- result{nil, err}
			return
		}
		uc := c.(*net.UnixConn)
		b := &bus{conn: uc, in: bufio.NewReaderSize(uc, maxLine)}
		if err = b.authenticateAs(uid); err == nil {
			_, err = b.call(busName, message{path: "/org/freedesktop/DBus", iface: busName, member: "Hello", destination: busName})
		}
		done <- result{b, err}
	}()
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	return r.b
}
