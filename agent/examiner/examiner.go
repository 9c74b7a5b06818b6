// Package examiner is a second process of the agent, which alone looks at the executables of other processes. The right
// to see them is the right to trace processes, their memory included; so the process that has it talks to nobody but the agent,
// opens nothing for writing, makes no sockets and starts no programs, while the agent itself, which talks to the network and
// to every workload, does without that right, and under Landlock cannot have it. docs/decisions/0015-examiner.md
//
// The two talk over a socket pair: small requests of a fixed form, and answers with a descriptor.
package examiner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/internal/sandbox"
	"github.com/signet-id/signet/workloadapi/peer"
)

const (
	// maxWaiting bounds the requests under way, maxWaitingPerUID those for processes of one user: whoever serves a file
	// system can let a look at his programs hang.
	maxWaiting, maxWaitingPerUID = 4096, 64

	// patience is how long a look may take.
	patience = 10 * time.Second

	// startTime is how long the process may take to say hello.
	startTime = 20 * time.Second
)

var (
	errBusy = errors.New("too many looks at executables of this user's processes hang (a file system that does not answer?)")
	errLate = fmt.Errorf("the executable's file system has not answered for %s", patience)
	// ErrEnded says that the examiner is no more.
	ErrEnded = errors.New("the agent's process that looks at executables has ended")
)

// A Client is the agent's end. It is the peer.Executables of the endpoint. Its methods may be called concurrently.
type Client struct {
	conn  *net.UnixConn
	lanes *lanes
	cmd   *exec.Cmd
	log   *slog.Logger

	reader sync.WaitGroup
	done   chan struct{} // closed when the examiner has ended

	mu      sync.Mutex
	last    uint32
	waiting map[uint32]*call // those without an answer, also if nobody waits for it any more
	perUID  map[uint32]int
	closing bool
}

type call struct {
	uid  uint32
	done chan struct{} // closed with the answer
	left bool          // nobody waits any more; guarded by Client.mu
	answer
	file *os.File
}

// Config is what the examiner is started with.
type Config struct {
	// Command is the program and its arguments, to which the mode of seccomp is added. It calls Main.
	Command []string
	// Seccomp is the mode of its system call filter.
	Seccomp sandbox.Mode
	// Log gets what it runs with.
	Log *slog.Logger
}

// Start starts the examiner, while this process still may, and returns when it is ready.
func Start(c Config) (*Client, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("a socket to the process that looks at executables: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "examiner"), os.NewFile(uintptr(fds[1]), "agent")
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return nil, err
	}
	quick, theirLanes, err := newLanes()
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	defer closeAll(theirLanes)
	mode := c.Seccomp
	if mode == "" {
		mode = sandbox.Auto
	}
	client := newClient(conn.(*net.UnixConn), c.Log)
	client.cmd = exec.Command(c.Command[0], append(c.Command[1:len(c.Command):len(c.Command)], string(mode))...)
	client.lanes = quick
	client.cmd.ExtraFiles = append([]*os.File{theirs}, theirLanes...) // from socketFD on
	client.cmd.Env = clean(os.Environ())
	client.cmd.Stderr = os.Stderr
	client.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a Ctrl-C at the terminal is for the agent
	if os.Geteuid() != 0 {
		held, err := sandbox.Held()
		if err != nil {
			return nil, errors.Join(err, client.hangUp())
		}
		for _, c := range Capabilities {
			for _, h := range held {
				if c == h {
					client.cmd.SysProcAttr.AmbientCaps = append(client.cmd.SysProcAttr.AmbientCaps, uintptr(c))
				}
			}
		}
	}
	if err := client.cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("starting the process that looks at executables: %w", err), client.hangUp())
	}
	if err := client.greet(); err != nil {
		client.cmd.Process.Kill()
		return nil, errors.Join(fmt.Errorf("the process that looks at executables: %w", err), client.hangUp(), ignoreExit(client.cmd.Wait()))
	}
	client.reader.Go(client.read)
	return client, nil
}

func newClient(conn *net.UnixConn, log *slog.Logger) *Client {
	return &Client{conn: conn, log: log, lanes: &lanes{}, done: make(chan struct{}), waiting: map[uint32]*call{}, perUID: map[uint32]int{}}
}

func ignoreExit(err error) error {
	if errors.As(err, new(*exec.ExitError)) {
		return nil // it was killed, or said why it ended
	}
	return err
}

// greet waits for the examiner's hello.
func (c *Client) greet() error {
	if err := c.conn.SetReadDeadline(time.Now().Add(startTime)); err != nil {
		return err
	}
	buf := make([]byte, 8<<10)
	n, err := c.conn.Read(buf)
	if err != nil || n == 0 {
		return errors.Join(errors.New("it ended, or did not say that it is ready"), err)
	}
	var h hello
	if err := json.Unmarshal(buf[:n], &h); err != nil {
		return fmt.Errorf("its first words: %w", err)
	}
	if h.Err != "" {
		return errors.New(h.Err)
	}
	c.log.Info("a process of its own looks at executables", "pid", c.cmd.Process.Pid, "capabilities", h.Capabilities, "seccomp", h.Seccomp)
	return c.conn.SetReadDeadline(time.Time{})
}

func (c *Client) hangUp() error {
	c.lanes.close()
	return c.conn.Close()
}

// Done is closed when the examiner has ended. The agent cannot start another one, since it starts no programs any more.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the examiner and waits for it.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closing = true
	c.mu.Unlock()
	err := c.hangUp()
	c.reader.Wait()
	if c.cmd == nil {
		return err
	}
	const grace = 2 * time.Second
	kill := time.AfterFunc(grace, func() { c.cmd.Process.Kill() }) // a look that hangs
	defer kill.Stop()
	return errors.Join(err, ignoreExit(c.cmd.Wait()))
}

// read takes answers until the connection ends.
func (c *Client) read() {
	buf, oob := make([]byte, answerBytes+maxPath+1), make([]byte, unix.CmsgSpace(4))
	var why error
	for {
		n, oobn, flags, _, err := c.conn.ReadMsgUnix(buf, oob)
		if err != nil || n == 0 {
			if !errors.Is(err, io.EOF) {
				why = err
			}
			break
		}
		file, err := received(oob[:oobn], flags)
		var a answer
		if err == nil {
			a, err = parseAnswer(buf[:n])
		}
		if err != nil {
			if file != nil {
				file.Close()
			}
			why = err
			break
		}
		c.answered(a, file)
	}
	c.mu.Lock()
	if !c.closing {
		c.log.Error("the process that looks at executables has ended, and the agent ends with it", "err", errors.Join(ErrEnded, why))
	}
	c.mu.Unlock()
	close(c.done)
}

// received returns the descriptor that came with a message, or nil.
func received(oob []byte, flags int) (*os.File, error) {
	if flags&(unix.MSG_CTRUNC|unix.MSG_TRUNC) != 0 {
		return nil, errors.New("an answer was cut off")
	}
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) != 1 {
		return nil, errors.Join(fmt.Errorf("%d control messages with an answer", len(messages)), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, errors.Join(fmt.Errorf("%d descriptors with an answer", len(fds)), err)
	}
	return os.NewFile(uintptr(fds[0]), "executable"), nil
}

func (c *Client) answered(a answer, file *os.File) {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := c.waiting[a.id]
	if w == nil || w.left {
		if file != nil {
			file.Close()
		}
	} else {
		w.answer, w.file = a, file
		close(w.done)
	}
	if w != nil {
		c.forget(a.id, w)
	}
}

// forget is called with mu held.
func (c *Client) forget(id uint32, w *call) {
	delete(c.waiting, id)
	if c.perUID[w.uid]--; c.perUID[w.uid] <= 0 {
		delete(c.perUID, w.uid)
	}
}

// ask asks on a lane, or, where that is not quick, the other way.
func (c *Client) ask(kind byte, pid int32, uid uint32) (answer, *os.File, error) {
	a, f, err := c.lanes.ask(kind, pid, uid)
	if err == errNotQuick {
		return c.askLong(kind, pid, uid)
	}
	return a, f, err
}

// askLong sends a request and waits for its answer.
func (c *Client) askLong(kind byte, pid int32, uid uint32) (answer, *os.File, error) {
	w := &call{uid: uid, done: make(chan struct{})}
	c.mu.Lock()
	if len(c.waiting) >= maxWaiting || c.perUID[uid] >= maxWaitingPerUID {
		c.mu.Unlock()
		return answer{}, nil, errBusy
	}
	for c.last++; c.waiting[c.last] != nil; c.last++ { // one that has hung since the numbers were here last
	}
	id := c.last
	c.waiting[id] = w
	c.perUID[uid]++
	c.mu.Unlock()
	if _, err := c.conn.Write(request{id: id, ask: kind, pid: pid}.marshal()); err != nil {
		c.mu.Lock()
		c.forget(id, w)
		c.mu.Unlock()
		return answer{}, nil, errors.Join(ErrEnded, err)
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	var err error
	select {
	case <-w.done:
	case <-timer.C:
		err = errLate
	case <-c.done:
		err = ErrEnded
	}
	if err != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		select {
		case <-w.done: // just now
		default:
			w.left = true
			return answer{}, nil, err
		}
	}
	if w.errno != 0 {
		return answer{}, nil, w.errno
	}
	return w.answer, w.file, nil
}

// Stat says which file a process runs.
func (c *Client) Stat(pid int32, uid uint32) (peer.Executable, error) {
	a, _, err := c.ask(askStat, pid, uid)
	return a.exe, err
}

// Path says where it is.
func (c *Client) Path(pid int32, uid uint32) (string, peer.Executable, error) {
	a, _, err := c.ask(askPath, pid, uid)
	return a.path, a.exe, err
}

// Open opens it for reading.
func (c *Client) Open(pid int32, uid uint32) (*os.File, error) { return c.file(askOpen, pid, uid) }

// Pin opens it without the right to read.
func (c *Client) Pin(pid int32, uid uint32) (*os.File, error) { return c.file(askPin, pid, uid) }

func (c *Client) file(kind byte, pid int32, uid uint32) (*os.File, error) {
	_, f, err := c.ask(kind, pid, uid)
	if err == nil && f == nil {
		err = errors.New("no descriptor came with the answer")
	}
	return f, err
}

// Watch returns ErrEnded when the examiner has ended, and nil when ctx has.
func (c *Client) Watch(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-c.done:
		return ErrEnded
	}
}
