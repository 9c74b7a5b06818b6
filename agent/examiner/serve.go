package examiner

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/internal/sandbox"
	"github.com/signet-id/signet/workloadapi/peer"
)

// Capabilities are what the examiner works with: the one shows it the executables of other users' processes, the other
// lets it read files that only their owner may.
var Capabilities = []sandbox.Capability{sandbox.DACReadSearch, sandbox.SysPtrace}

const (
	// socketFD is where the examiner finds its socket, and behind it the lanes.
	socketFD = 3
	// maxAsked bounds the requests that are looked at simultaneously: more than Client sends.
	maxAsked = maxWaiting + 64
)

// A hello is the first message of the examiner: what it has given up, or why it does not work.
type hello struct {
	Err          string
	Capabilities string
	Seccomp      string
}

// Main is the examiner's process: it gives up what it does not need, and answers on its socket until the agent closes its
// end. seccomp is a sandbox.Mode.
func Main(seccomp string) error {
	if kind, err := unix.GetsockoptInt(socketFD, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || kind != unix.SOCK_SEQPACKET {
		return errors.New("this is the part of the agent that looks at executables: the agent starts it by itself")
	}
	f := os.NewFile(socketFD, "agent")
	c, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return err
	}
	conn, ok := c.(*net.UnixConn)
	if !ok {
		return errors.Join(fmt.Errorf("the agent is on a %T, not on a Unix socket", c), c.Close())
	}
	defer conn.Close()
	debug.SetGCPercent(25) // there is nearly nothing to collect, and memory counts on each node
	report, err := sandbox.Apply(sandbox.Policy{Keep: Capabilities, Landlock: sandbox.Off, Seccomp: sandbox.Mode(seccomp), Syscalls: sandbox.Syscalls{Only: true}})
	h := hello{Capabilities: sandbox.Names(report.Capabilities), Seccomp: report.NoSeccomp}
	if report.KeptAll != "" {
		h.Capabilities += " (none was dropped: " + report.KeptAll + ")"
	}
	if report.Seccomp {
		h.Seccomp = "on"
	}
	if err != nil {
		h.Err = err.Error()
	}
	data, jsonErr := json.Marshal(h)
	if _, writeErr := conn.Write(data); errors.Join(err, jsonErr, writeErr) != nil {
		return errors.Join(err, jsonErr, writeErr)
	}
	for i := range quickLanes {
		go serveLane(socketFD+1+i, peer.Proc{}) // it ends with the process: a look may hang
	}
	return serve(conn, peer.Proc{})
}

// serve answers until the other end is closed. Each request has a goroutine, since a look at a file may hang.
func serve(conn *net.UnixConn, executables peer.Executables) error {
	slots := make(chan struct{}, maxAsked)
	var asked sync.WaitGroup
	buf := make([]byte, requestBytes+1)
	for {
		n, err := conn.Read(buf)
		if err == nil && n == 0 || errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
			return nil // those that still hang are left alone
		}
		if err != nil {
			return err
		}
		r, err := parseRequest(buf[:n])
		if err != nil {
			return err // this is not the agent
		}
		select {
		case slots <- struct{}{}:
		default:
			send(conn, answer{id: r.id, errno: unix.EAGAIN}, nil)
			continue
		}
		asked.Go(func() {
			defer func() { <-slots }()
			a, f := look(executables, r)
			send(conn, a, f)
			if f != nil {
				f.Close()
			}
		})
	}
}

func look(executables peer.Executables, r request) (answer, *os.File) {
	a := answer{id: r.id}
	var f *os.File
	var err error
	switch r.ask {
	case askStat:
		a.exe, err = executables.Stat(r.pid, 0)
	case askPath:
		a.path, a.exe, err = executables.Path(r.pid, 0)
		if len(a.path) > maxPath {
			a.path, err = "", unix.ENAMETOOLONG
		}
	case askOpen:
		f, err = executables.Open(r.pid, 0)
	case askPin:
		f, err = executables.Pin(r.pid, 0)
	}
	a.errno = errnoOf(err)
	return a, f
}

// send answers. If that does not work the agent is gone, which serve notices.
func send(conn *net.UnixConn, a answer, f *os.File) {
	var rights []byte
	if f != nil {
		rights = unix.UnixRights(int(f.Fd()))
	}
	_, _, _ = conn.WriteMsgUnix(a.marshal(), rights, nil)
}

// clean is the environment without what is for the agent alone.
func clean(env []string) []string {
	var kept []string
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		switch {
		case strings.HasPrefix(name, "LISTEN_"), strings.HasPrefix(name, "WATCHDOG_"), name == "NOTIFY_SOCKET", name == "CREDENTIALS_DIRECTORY":
		default:
			kept = append(kept, e)
		}
	}
	return kept
}
