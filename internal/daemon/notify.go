// Package daemon is what a service manager and a long-lived program say to each other: readiness, the watchdog, and
// listening sockets that are passed in and kept for the next start. It speaks systemd's protocols, which are a few
// environment variables and datagrams, and does nothing where no manager is. It knows none of the daemons.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long a message may wait for a manager that is busy.
const patience = 5 * time.Second

// A Notifier tells the service manager how the program is. A nil Notifier tells nobody. Its methods may be called
// concurrently. A message that does not arrive is not an error of the program: the manager acts on what it misses.
type Notifier struct {
	conn     *net.UnixConn
	watchdog time.Duration
	keeps    bool
}

// NewNotifier connects to the manager that the environment names, or returns nil if there is none. What it read is taken
// out of the environment, so that no child takes itself for the service.
func NewNotifier() (*Notifier, error) {
	path, usec, pid, store := os.Getenv("NOTIFY_SOCKET"), os.Getenv("WATCHDOG_USEC"), os.Getenv("WATCHDOG_PID"), os.Getenv("FDSTORE")
	for _, name := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "FDSTORE"} {
		if err := os.Unsetenv(name); err != nil {
			return nil, err
		}
	}
	if path == "" {
		return nil, nil
	}
	if !strings.HasPrefix(path, "/") && !strings.HasPrefix(path, "@") {
		return nil, fmt.Errorf("NOTIFY_SOCKET is %q: neither a path nor an abstract address", path)
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		return nil, fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	n := &Notifier{conn: conn, keeps: store != "" && store != "0"}
	if usec != "" && (pid == "" || pid == strconv.Itoa(os.Getpid())) {
		const most = uint64(1<<63-1) / 1000
		us, err := strconv.ParseUint(usec, 10, 64)
		if err != nil || us == 0 || us > most {
			return nil, errors.Join(fmt.Errorf("WATCHDOG_USEC is %q: not a number of microseconds", usec), conn.Close())
		}
		n.watchdog = time.Duration(us) * time.Microsecond
	}
	return n, nil
}

// Close ends the connection.
func (n *Notifier) Close() error {
	if n == nil {
		return nil
	}
	return n.conn.Close()
}

// Ready says that the program does its work now, also after a reload, and what its state is.
func (n *Notifier) Ready(status string) { n.send("READY=1\nSTATUS=" + oneLine(status)) }

// Status says what the program's state is.
func (n *Notifier) Status(status string) { n.send("STATUS=" + oneLine(status)) }

// Reloading says that the program reads its configuration again; Ready ends that.
func (n *Notifier) Reloading() {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return
	}
	// The time tells the manager which of its requests this answers.
	n.send("RELOADING=1\nMONOTONIC_USEC=" + strconv.FormatInt(now.Nano()/1000, 10))
}

// Stopping says that the program ends.
func (n *Notifier) Stopping() { n.send("STOPPING=1") }

// Keeps says whether the manager holds sockets over a restart (FileDescriptorStoreMax= in the unit; systemd 254 and later).
func (n *Notifier) Keeps() bool { return n != nil && n.keeps }

// Keep gives the manager a listening socket to hold, which it passes to the next start of the service under this name.
func (n *Notifier) Keep(name string, socket *os.File) {
	if n == nil {
		return
	}
	from, err := socket.SyscallConn()
	if err != nil {
		return
	}
	to, err := n.conn.SyscallConn()
	if err != nil {
		return
	}
	if err := n.conn.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return
	}
	_ = from.Control(func(kept uintptr) {
		_ = to.Write(func(fd uintptr) bool {
			// Without FDPOLL=0 the manager watches what it holds.
			err := unix.Sendmsg(int(fd), []byte("FDSTORE=1\nFDPOLL=0\nFDNAME="+name), unix.UnixRights(int(kept)), nil, unix.MSG_NOSIGNAL)
			return err != unix.EAGAIN
		})
	})
}

// WatchdogPeriod is how often the manager wants to hear that the program is alive; zero: never.
func (n *Notifier) WatchdogPeriod() time.Duration {
	if n == nil {
		return 0
	}
	return n.watchdog
}

// Watch tells the manager's watchdog that the program lives, at least twice in each of its periods and for as long as
// alive says so, until ctx ends. alive must return by the end of its context. A program that hangs goes unmentioned, and
// the manager starts it anew.
func (n *Notifier) Watch(ctx context.Context, alive func(context.Context) error, dead func(error)) {
	if n.WatchdogPeriod() == 0 {
		return
	}
	for {
		check, cancel := context.WithTimeout(ctx, n.watchdog/4)
		err := alive(check)
		cancel()
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			n.send("WATCHDOG=1")
		} else {
			dead(err)
		}
		wait := n.watchdog/4 + rand.N(n.watchdog/20+1)
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

// send gives the manager a message. It may be busy; a program that waits for its manager forever would be worse than one
// whose message is lost.
func (n *Notifier) send(message string) {
	if n == nil {
		return
	}
	if err := n.conn.SetWriteDeadline(time.Now().Add(patience)); err == nil {
		_, _ = n.conn.Write([]byte(message))
	}
}

// oneLine keeps a text from becoming another message.
func oneLine(s string) string {
	const most = 1000
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
	return s[:min(len(s), most)]
}
