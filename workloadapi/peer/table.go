package peer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Config says how many callers a Table takes.
type Config struct {
	// MaxConnections bounds open connections, which cost one file descriptor each, and MaxHeld more in all. Zero means 16384.
	MaxConnections int

	// MaxConnectionsPerUID bounds those of one user, so that one cannot lock out the others. Zero means a quarter of
	// MaxConnections.
	MaxConnectionsPerUID int

	// Executables looks at what processes run. Nil means Proc, which is this process itself.
	Executables Executables

	// Log gets refused connections. Nil means nowhere.
	Log *slog.Logger
}

// MaxHeld is how many pidfds a table holds open on kernels that have SO_PEERPIDFD, for processes behind connections. The end
// of such a process is noticed at once. For further ones the pidfd is asked of the connection whenever it is needed, which is
// as safe and costs two system calls more, and their end is looked for every sweepEvery.
const MaxHeld = 1024

// sweepEvery is how long a process that ended may go unnoticed while nobody asks, if its connection was passed to another:
// otherwise the kernel closes the connection.
const sweepEvery = 2 * time.Second

// MaxConnections says how many connections fit into so many file descriptors, each of a process of its own.
func MaxConnections(descriptors int) int {
	if hasPeerPIDFD() {
		return max(descriptors-MaxHeld, descriptors/2)
	}
	return descriptors / 2
}

// Descriptors says how many file descriptors so many connections need at most.
func Descriptors(connections int) int {
	if hasPeerPIDFD() {
		return connections + min(connections, MaxHeld)
	}
	return 2 * connections
}

// A Table pins the processes behind connections. One goroutine watches them all; when a process ends, its connections are
// closed, wherever they were passed to.
type Table struct {
	maxConns, maxConnsPerUID int
	log                      *slog.Logger
	executables              Executables

	// noPeerPIDFD makes the table act as on a kernel before 6.5, without SO_PEERPIDFD.
	noPeerPIDFD bool
	maxHeld     int

	epoll   *os.File
	epollFD int
	watcher sync.WaitGroup
	stop    chan struct{} // closed by Close
	sweeps  chan struct{} // one slot: there is a pin to sweep

	// mu guards what follows. Holding it, a pin that is in pins has at least one user and an open pidfd.
	mu       sync.Mutex
	closed   bool
	lastID   uint64
	held     int             // pins whose pidfd is open
	pins     map[uint64]*pin // by id
	byPID    map[int32]*pin  // the newest by process id
	conns    int
	uidConns map[uint32]int
}

// A pin holds on to one process.
type pin struct {
	id   uint64
	pid  int32
	gone chan struct{} // closed once, when the process has ended or the pin is given up

	looks looks
	start atomic.Uint64 // the process's start time, 0 until it was read while the process was known to live

	// users and conns are guarded by Table.mu.
	users int
	conns map[*conn]struct{}

	// mu makes sure that nobody polls a descriptor that has been closed and given to something else.
	mu       sync.RWMutex
	fd       int   // -1 when it is not held
	via      *conn // a connection to ask for a pidfd, where none is held
	goneOnce sync.Once
}

// NewTable returns an empty table whose watcher runs until Close.
func NewTable(c Config) (*Table, error) {
	if c.MaxConnections < 0 || c.MaxConnectionsPerUID < 0 {
		return nil, fmt.Errorf("MaxConnections %d and MaxConnectionsPerUID %d: must not be negative", c.MaxConnections, c.MaxConnectionsPerUID)
	}
	if c.MaxConnections == 0 {
		c.MaxConnections = 16384
	}
	if c.MaxConnectionsPerUID == 0 {
		c.MaxConnectionsPerUID = max(1, c.MaxConnections/4)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Executables == nil {
		c.Executables = Proc{}
	}
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("creating an epoll descriptor to watch callers: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("making the epoll descriptor non-blocking: %w", err)
	}
	t := &Table{
		maxConns: c.MaxConnections, maxConnsPerUID: c.MaxConnectionsPerUID, log: c.Log, executables: c.Executables,
		// The runtime's own poller watches the epoll descriptor, so that waiting costs no thread and Close wakes it.
		epoll: os.NewFile(uintptr(fd), "pidfds"), epollFD: fd,
		pins: map[uint64]*pin{}, byPID: map[int32]*pin{}, uidConns: map[uint32]int{},
		noPeerPIDFD: !hasPeerPIDFD(), maxHeld: MaxHeld, stop: make(chan struct{}), sweeps: make(chan struct{}, 1),
	}
	raw, err := t.epoll.SyscallConn()
	if err != nil {
		t.epoll.Close()
		return nil, fmt.Errorf("watching callers: %w", err)
	}
	t.watcher.Go(func() { t.watch(raw) })
	t.watcher.Go(t.sweep)
	return t, nil
}

// Close closes every connection, gives up every process and waits for the watcher.
func (t *Table) Close() error {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nil
	}
	t.closed = true
	close(t.stop)
	var conns []*conn
	for _, p := range t.pins {
		for c := range p.conns {
			conns = append(conns, c)
		}
		p.markGone()
	}
	t.mu.Unlock()
	for _, c := range conns {
		c.Close()
	}
	err := t.epoll.Close()
	t.watcher.Wait()
	return err
}

// Open pins a process by its id, as the agent counts it. The caller must have reason to believe that the id still means
// the process it has in mind, and must Close the Process. Its UID and GID are the present effective ones.
//
// Errors: ErrGone if there is no such process.
func (t *Table) Open(pid int32) (*Process, error) {
	if pid <= 0 {
		return nil, fmt.Errorf("process id %d is not positive", pid)
	}
	fd, err := pidfdOpen(pid)
	if err != nil {
		return nil, err
	}
	p, err := t.acquire(pid, fd, nil)
	if err != nil {
		return nil, err
	}
	process := &Process{PID: pid, pin: p, table: t}
	s, err := readSnapshot(pid, 0, t.executables)
	if gone := p.alive(); gone != nil {
		err = gone
	}
	if err != nil {
		t.release(p, nil)
		return nil, err
	}
	process.UID, process.GID = s.EffectiveUID, s.EffectiveGID
	return process, nil
}

// acquire returns the pin for the process that fd, which it takes over, refers to, and adds c to its connections.
func (t *Table) acquire(pid int32, fd int, c *conn) (*pin, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		unix.Close(fd)
		return nil, net.ErrClosed
	}
	// The order matters: the process behind fd is alive, so it holds pid now; the pinned one is alive after that, and has
	// held pid since before. Hence they are one process.
	if err := pollAlive(fd); err != nil {
		unix.Close(fd)
		return nil, err
	}
	p := t.byPID[pid]
	if p == nil || p.alive() != nil {
		t.lastID++
		p = &pin{id: t.lastID, pid: pid, gone: make(chan struct{}), conns: map[*conn]struct{}{}, fd: -1}
	}
	if err := t.holdOrClose(p, fd, c); err != nil {
		return nil, err
	}
	t.pins[p.id], t.byPID[pid] = p, p
	p.users++
	if c != nil {
		// Under mu, since ended may close c as soon as it is listed.
		p.conns[c] = struct{}{}
		c.pin = p
	}
	return p, nil
}

// holdOrClose takes over fd, a pidfd of p: it is held if p has none yet and there is room for it, or no connection c that
// could be asked for another. It is called with mu held.
func (t *Table) holdOrClose(p *pin, fd int, c *conn) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.fd >= 0:
		unix.Close(fd)
		return nil
	case c != nil && !t.noPeerPIDFD && t.held >= t.maxHeld:
		unix.Close(fd)
		if p.via == nil {
			p.via = c
		}
		select {
		case t.sweeps <- struct{}{}:
		default:
		}
		return nil
	}
	event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT, Fd: int32(uint32(p.id)), Pad: int32(uint32(p.id >> 32))}
	if err := unix.EpollCtl(t.epollFD, unix.EPOLL_CTL_ADD, fd, &event); err != nil {
		unix.Close(fd)
		return fmt.Errorf("watching process %d: %w", p.pid, err)
	}
	t.held++
	p.fd, p.via = fd, nil
	return nil
}

// release gives up one use of a pin; the last one closes the pidfd.
func (t *Table) release(p *pin, c *conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(p.conns, c)
	p.users--
	if p.users > 0 {
		p.askAnother(c)
		return
	}
	delete(t.pins, p.id)
	if t.byPID[p.pid] == p {
		delete(t.byPID, p.pid)
	}
	p.markGone()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.via = nil
	if p.fd < 0 {
		return
	}
	// Closing the only descriptor of a pidfd would also take it off the epoll set, but a forked child may hold a copy.
	if !t.closed {
		_ = unix.EpollCtl(t.epollFD, unix.EPOLL_CTL_DEL, p.fd, nil)
	}
	unix.Close(p.fd)
	p.fd = -1
	t.held--
}

// askAnother finds another connection to ask when c is about to be closed. It is called with Table.mu held.
func (p *pin) askAnother(c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c == nil || p.via != c {
		return
	}
	p.via = nil
	for other := range p.conns {
		p.via = other
		return
	}
}

// admit counts a connection of uid, or says why it is one too many.
func (t *Table) admit(uid uint32) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.conns >= t.maxConns {
		return fmt.Errorf("%d connections are open, which is the limit", t.conns)
	}
	if t.uidConns[uid] >= t.maxConnsPerUID {
		return fmt.Errorf("uid %d has %d connections open, which is the limit for one user", uid, t.uidConns[uid])
	}
	t.conns++
	t.uidConns[uid]++
	return nil
}

func (t *Table) dismiss(uid uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.conns--
	if t.uidConns[uid]--; t.uidConns[uid] == 0 {
		delete(t.uidConns, uid)
	}
}

// watch closes the connections of processes that end, until the epoll descriptor is closed.
func (t *Table) watch(raw syscall.RawConn) {
	events := make([]unix.EpollEvent, 64)
	for {
		n := 0
		var waitErr error
		err := raw.Read(func(fd uintptr) bool {
			n, waitErr = unix.EpollWait(int(fd), events, 0)
			return n != 0 || (waitErr != nil && waitErr != unix.EINTR)
		})
		if err != nil || waitErr != nil {
			t.mu.Lock()
			closed := t.closed
			t.mu.Unlock()
			if !closed {
				t.log.LogAttrs(context.Background(), slog.LevelError, "watching callers ended: connections of processes that end stay open until used",
					slog.Any("err", errors.Join(err, waitErr)))
			}
			return
		}
		for _, e := range events[:n] {
			t.ended(uint64(uint32(e.Fd)) | uint64(uint32(e.Pad))<<32)
		}
	}
}

// sweep looks for processes that have ended among those without a held pidfd, until the table is closed. It sleeps while
// there are none.
func (t *Table) sweep() {
	ticker := time.NewTicker(sweepEvery)
	ticker.Stop()
	defer ticker.Stop()
	for {
		select {
		case <-t.sweeps:
			ticker.Reset(sweepEvery)
			continue
		case <-ticker.C:
		case <-t.stop:
			return
		}
		if t.sweepOnce() == 0 {
			ticker.Stop()
		}
	}
}

// sweepOnce returns how many it has looked at.
func (t *Table) sweepOnce() int {
	var pins []*pin
	t.mu.Lock()
	for _, p := range t.pins {
		if p.swept() {
			pins = append(pins, p)
		}
	}
	t.mu.Unlock()
	for _, p := range pins {
		if errors.Is(p.alive(), ErrGone) {
			t.ended(p.id)
		}
	}
	return len(pins)
}

func (p *pin) swept() bool {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.fd < 0
}

// ended closes the connections of the process with that id.
func (t *Table) ended(id uint64) {
	t.mu.Lock()
	var conns []*conn
	if p := t.pins[id]; p != nil {
		p.markGone()
		for c := range p.conns {
			conns = append(conns, c)
		}
	}
	t.mu.Unlock()
	for _, c := range conns {
		c.Close()
	}
}

func (p *pin) markGone() { p.goneOnce.Do(func() { close(p.gone) }) }

func (p *pin) alive() error {
	select {
	case <-p.gone:
		return ErrGone
	default:
	}
	p.mu.RLock()
	defer p.mu.RUnlock()
	switch {
	case p.fd >= 0:
		return pollAlive(p.fd)
	case p.via == nil:
		return ErrGone
	}
	fd, err := p.via.peerPIDFD()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return pollAlive(fd)
}

// pollAlive asks the pidfd, which turns readable when the process ends. Unlike sending signal 0 this needs no rights and
// takes a zombie for what it is.
func pollAlive(fd int) error {
	fds := unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	var now unix.Timespec
	for {
		// It never blocks, so the scheduler need not know.
		n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&fds)), 1, uintptr(unsafe.Pointer(&now)), 0, 0, 0)
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return fmt.Errorf("polling a pidfd: %w", errno)
		case n > 0:
			return ErrGone
		}
		return nil
	}
}

func pidfdOpen(pid int32) (int, error) {
	fd, err := unix.PidfdOpen(int(pid), 0)
	switch {
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
		// EINVAL, since Linux 6.15 ENOENT: the id of a thread, not of a process. No process has it.
		return -1, fmt.Errorf("process %d: %w", pid, ErrGone)
	case err != nil:
		return -1, fmt.Errorf("opening a pidfd of process %d: %w", pid, err)
	}
	return fd, nil
}
