// Package handover lets a daemon that is started beside one of its kind take over that one's listening sockets and its place,
// without a service manager that holds them: the later one waits until the earlier has ended, and callers meanwhile wait in
// the sockets' queues. The agent uses it where Kubernetes starts the next agent of a node before it ends the present one.
//
// The earlier one offers its sockets at a Unix socket in a directory that only its own user enters, and keeps the connection of
// whoever comes open for as long as it runs. That connection's end is the moment to take over, however it came about.
package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// name is the socket's in the directory.
	name = "successor.sock"

	// greeting begins the only message; the names of the sockets that come with it follow. Another version is another greeting.
	greeting = "signet-handover 1"

	maxMessage = 512
	maxSockets = 8

	// lookEvery is how often a place is looked at whose holder offers nothing.
	lookEvery = 100 * time.Millisecond
	// offerWait is how long the holder of a place is given to offer its sockets: it may just be starting.
	offerWait = 10 * time.Second
	// sendTimeout bounds the message to a successor.
	sendTimeout = 5 * time.Second
	// acceptAgain is the wait after a connection could not be accepted.
	acceptAgain = 100 * time.Millisecond
	// refusedWait is the wait after another successor was there first.
	refusedWait = time.Second
)

// An Offer hands sockets to the next of our kind.
type Offer struct {
	sockets  func() (map[string]*os.File, error)
	log      *slog.Logger
	listener *net.UnixListener
	done     chan struct{} // closed by Close
	accepted sync.WaitGroup

	mu        sync.Mutex
	successor *net.UnixConn // nil: none waits
	closed    bool
}

// NewOffer listens in dir, which must be private and held by the caller: what is at the socket's place is somebody's who has
// ended. sockets returns the listening sockets, anew for each successor; they are closed when they are sent.
func NewOffer(dir string, sockets func() (map[string]*os.File, error), log *slog.Logger) (*Offer, error) {
	path := filepath.Join(dir, name)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		return nil, fmt.Errorf("offering the sockets to a successor: %w", err)
	}
	l.SetUnlinkOnClose(false) // it may be a successor's by then
	o := &Offer{sockets: sockets, log: log, listener: l, done: make(chan struct{})}
	o.accepted.Go(o.accept)
	return o, nil
}

// Close lets the successor go on: it is called when everything else has ended.
func (o *Offer) Close() error {
	o.mu.Lock()
	if !o.closed {
		close(o.done)
	}
	o.closed = true
	err := o.listener.Close()
	if o.successor != nil {
		err = errors.Join(err, o.successor.Close())
	}
	o.mu.Unlock()
	o.accepted.Wait()
	return err
}

func (o *Offer) accept() {
	said := false
	for {
		conn, err := o.listener.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // such as no descriptor left; whoever comes waits in the queue
			if !said {
				o.log.Warn("a successor cannot be taken; trying again", "err", err)
			}
			said = true
			select {
			case <-o.done:
				return
			case <-time.After(acceptAgain):
			}
			continue
		}
		said = false
		if err := o.admit(conn); err != nil {
			o.log.Warn("a successor did not get the sockets", "err", err)
			conn.Close()
		}
	}
}

// admit sends the sockets, and then watches the successor: if it ends, another may come.
func (o *Offer) admit(conn *net.UnixConn) error {
	if err := ours(conn); err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.successor != nil {
		return errors.New("another one waits already")
	}
	if o.closed {
		return net.ErrClosed
	}
	if err := o.send(conn); err != nil {
		return err
	}
	o.successor = conn
	o.log.Info("a successor waits for this process to end")
	o.accepted.Go(func() {
		_, _ = conn.Read(make([]byte, 1)) // until either side closes; nothing is ever sent
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.successor == conn && !o.closed {
			o.successor = nil
			o.log.Warn("the successor has gone; this process goes on")
		}
		conn.Close()
	})
	return nil
}

func (o *Offer) send(conn *net.UnixConn) error {
	sockets, err := o.sockets()
	if err != nil {
		return err
	}
	message := greeting
	var fds []int
	for name, f := range sockets {
		defer f.Close()
		message += " " + name
		fds = append(fds, int(f.Fd()))
	}
	if err := conn.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return err
	}
	_, _, err = conn.WriteMsgUnix([]byte(message+"\n"), unix.UnixRights(fds...), nil)
	return err
}

// ours says whether the other side is of our own user, or root. The directory lets nobody else in; this is for one with a wrong
// mode.
func ours(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if credErr != nil {
		return credErr
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("the other side is uid %d", cred.Uid)
	}
	return nil
}

// Config is what Await needs.
type Config struct {
	// Dir is the directory that the two share.
	Dir string
	// Taken says whether somebody holds the place.
	Taken func() (bool, error)
	// Waiting is called once, when this process waits for another to end and may be called ready. Nil: nothing.
	Waiting func()
	Log     *slog.Logger
}

// Await returns when the place is free: at once, if nobody holds it, and otherwise when who holds it has ended. The sockets are
// those of the one before, if it offered any; the caller closes them. Until the caller closes turn, nobody else's Await returns:
// several may wait, and the place is free before they all can see who takes it.
func Await(ctx context.Context, c Config) (sockets map[string]*os.File, turn *os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(sockets)
			turn.Close() // which may be nil
			sockets, turn = nil, nil
		}
	}()
	if turn, err = awaitTurn(ctx, c.Dir); err != nil {
		return nil, nil, err
	}
	began := time.Now()
	said := false
	say := func(how string) {
		if !said {
			c.Log.Info("another process holds this place; this one waits for it to end", "dir", c.Dir, "sockets", how)
			if c.Waiting != nil {
				c.Waiting()
			}
		}
		said = true
	}
	for {
		taken, err := c.Taken()
		if err != nil || !taken {
			return sockets, turn, err
		}
		conn, got, err := ask(ctx, c.Dir)
		wait := lookEvery
		switch {
		case err == nil:
			closeAll(sockets)
			sockets = got
			say("received")
			err = untilEnd(ctx, conn)
			if err != nil {
				return sockets, turn, err
			}
		case errors.Is(err, errRefused):
			wait = refusedWait
		case time.Since(began) > offerWait: // such as an older version
			say("not offered: callers fail between its end and our start")
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return sockets, turn, ctx.Err()
		case <-timer.C:
		}
	}
}

// awaitTurn waits until no other one waits for the place, and returns what keeps them waiting. There is none in a directory that does
// not exist, which nobody has held yet.
func awaitTurn(ctx context.Context, dir string) (*os.File, error) {
	turn, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(turn.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return turn, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("locking %s: %w", dir, err), turn.Close())
		}
		timer := time.NewTimer(refusedWait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil, errors.Join(ctx.Err(), turn.Close())
		case <-timer.C:
		}
	}
}

// errRefused says that the holder was reached and gave nothing.
var errRefused = errors.New("the other process gave no sockets")

// ask gets the sockets. The connection ends when the one that gave them does.
func ask(ctx context.Context, dir string) (_ *net.UnixConn, _ map[string]*os.File, err error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", filepath.Join(dir, name))
	if err != nil {
		return nil, nil, err
	}
	conn := c.(*net.UnixConn)
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	if err := ours(conn); err != nil {
		return nil, nil, err
	}
	if err := conn.SetReadDeadline(time.Now().Add(sendTimeout)); err != nil {
		return nil, nil, err
	}
	buf, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*maxSockets))
	n, oobn, flags, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = errRefused
		}
		return nil, nil, err
	}
	files, err := received(oob[:oobn])
	if err != nil {
		return nil, nil, err
	}
	sockets, err := match(string(buf[:n]), files, flags&unix.MSG_CTRUNC != 0)
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return nil, nil, err
	}
	return conn, sockets, conn.SetReadDeadline(time.Time{})
}

// received are the descriptors of a message.
func received(oob []byte) ([]*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("the sockets of the other process: %w", err)
	}
	var files []*os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue // something else than descriptors
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "socket"))
		}
	}
	return files, nil
}

// match gives the descriptors their names.
func match(message string, files []*os.File, cut bool) (map[string]*os.File, error) {
	names, err := parse(message)
	switch {
	case err != nil:
		return nil, err
	case cut || len(names) != len(files):
		return nil, fmt.Errorf("the other process names %d sockets, and %d came", len(names), len(files))
	}
	sockets := map[string]*os.File{}
	for i, n := range names {
		sockets[n] = files[i]
	}
	return sockets, nil
}

// parse reads the message: the greeting, and names of sockets.
func parse(message string) ([]string, error) {
	line, ok := strings.CutSuffix(message, "\n")
	rest, ok2 := strings.CutPrefix(line, greeting)
	if !ok || !ok2 || rest != "" && rest[0] != ' ' {
		return nil, fmt.Errorf("the other process says %.40q; want %q: it is of another version", message, greeting)
	}
	if rest == "" {
		return nil, nil
	}
	names := strings.Split(rest[1:], " ")
	if len(names) > maxSockets {
		return nil, fmt.Errorf("the other process names %d sockets, more than %d", len(names), maxSockets)
	}
	for i, n := range names {
		if n == "" || strings.ContainsFunc(n, func(r rune) bool { return r <= ' ' || r > '~' }) || slices.Contains(names[:i], n) {
			return nil, fmt.Errorf("the other process names a socket %.40q", n)
		}
	}
	return names, nil
}

// untilEnd waits until the other process has ended.
func untilEnd(ctx context.Context, conn *net.UnixConn) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	defer conn.Close()
	_, _ = conn.Read(make([]byte, 1)) // nothing is ever sent
	return ctx.Err()
}

func closeAll(sockets map[string]*os.File) {
	for _, f := range sockets {
		f.Close()
	}
}
