package examiner

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/workloadapi/peer"
)

// Every call of a workload has its executable looked at, and nearly all looks take microseconds. So a request goes first
// over one of a few sockets on which the thread that asks waits in the kernel for the answer, and a thread of the
// examiner for the request: no goroutine has to be woken, which costs several times as much as the look.

const (
	// quickLanes is how many such looks there are simultaneously, quickLanesPerUID how many for processes of one user, whose file
	// system may let them hang. Those beyond them go the other way.
	quickLanes, quickLanesPerUID = 4, 2

	// quickMilliseconds is how long a thread waits on a lane before the goroutine asks the other way.
	quickMilliseconds = 20
)

// lanes are the agent's ends of these sockets.
type lanes struct {
	mu  sync.Mutex
	all []*lane
}

// A lane has at most one request under way.
type lane struct {
	// Guarded by lanes.mu.
	busy   bool
	uid    uint32 // of the last request
	closed bool

	// Owned by whoever made it busy.
	fd   int
	last uint32
	owed bool // the last answer has not come yet
}

var errNotQuick = errors.New("no quick answer")

// newLanes makes the sockets: the agent's ends, and the examiner's.
func newLanes() (ours *lanes, theirs []*os.File, err error) {
	ours = &lanes{}
	for range quickLanes {
		var fds [2]int
		if fds, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0); err != nil {
			break
		}
		ours.all = append(ours.all, &lane{fd: fds[0]})
		theirs = append(theirs, os.NewFile(uintptr(fds[1]), "lane"))
		if err = unix.SetsockoptTimeval(fds[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: quickMilliseconds * 1000}); err != nil {
			break
		}
	}
	if err != nil {
		ours.close()
		closeAll(theirs)
		return nil, nil, fmt.Errorf("a socket to the process that looks at executables: %w", err)
	}
	return ours, theirs, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// close closes those that are free; the others are closed when they are given back.
func (ls *lanes) close() {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for _, l := range ls.all {
		if !l.busy {
			unix.Close(l.fd)
		}
		l.closed = true
	}
	ls.all = nil
}

// take returns a free lane, or nil. One that has not answered yet is not free, and counts as its user's.
func (ls *lanes) take(uid uint32) *lane {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	var free *lane
	ofUID := 0
	for _, l := range ls.all {
		switch {
		case !l.busy && l.settled():
			free = l
		case l.uid == uid:
			ofUID++
		}
	}
	if free == nil || ofUID >= quickLanesPerUID {
		return nil
	}
	free.busy, free.uid = true, uid
	return free
}

func (ls *lanes) giveBack(l *lane) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l.busy = false
	if l.closed {
		unix.Close(l.fd)
	}
}

// ask asks on a lane that is free.
func (ls *lanes) ask(kind byte, pid int32, uid uint32) (answer, *os.File, error) {
	l := ls.take(uid)
	if l == nil {
		return answer{}, nil, errNotQuick
	}
	defer ls.giveBack(l)
	return l.ask(kind, pid)
}

// settled says whether nothing is owed, and takes a late answer.
func (l *lane) settled() bool {
	if !l.owed {
		return true
	}
	_, f, err := l.receive(unix.MSG_DONTWAIT)
	if f != nil {
		f.Close()
	}
	return err == nil
}

func (l *lane) ask(kind byte, pid int32) (answer, *os.File, error) {
	l.last++
	if err := ignoringEINTR(func() error {
		_, err := unix.Write(l.fd, request{id: l.last, ask: kind, pid: pid}.marshal())
		return err
	}); err != nil {
		return answer{}, nil, errNotQuick
	}
	l.owed = true
	a, f, err := l.receive(0)
	switch {
	case err != nil:
		return answer{}, nil, errNotQuick
	case a.errno != 0:
		if f != nil {
			f.Close()
		}
		return answer{}, nil, a.errno
	}
	return a, f, nil
}

// answers are buffers for what is received.
var answers = sync.Pool{New: func() any { b := make([]byte, answerBytes+maxPath+1); return &b }}

// receive takes the answer to the last request.
func (l *lane) receive(flags int) (answer, *os.File, error) {
	buf := answers.Get().(*[]byte)
	defer answers.Put(buf)
	var oob [32]byte // one descriptor: unix.CmsgSpace(4) is 24
	var n, oobn, got int
	err := ignoringEINTR(func() (err error) {
		n, oobn, got, _, err = unix.Recvmsg(l.fd, *buf, oob[:], flags|unix.MSG_CMSG_CLOEXEC)
		return err
	})
	if err != nil {
		return answer{}, nil, err
	}
	f, err := received(oob[:oobn], got)
	var a answer
	if err == nil {
		a, err = parseAnswer((*buf)[:n])
	}
	if err == nil && a.id != l.last {
		err = errNotQuick
	}
	if err != nil { // the lane stays owed, and so is not used any more
		if f != nil {
			f.Close()
		}
		return answer{}, nil, err
	}
	l.owed = false
	return a, f, nil
}

// serveLane answers on one lane, whose descriptor it takes over, until the agent closes its end. A look that hangs holds up
// this lane alone.
func serveLane(fd int, executables peer.Executables) {
	defer unix.Close(fd)
	var buf [requestBytes + 1]byte
	for {
		var n int
		err := ignoringEINTR(func() (err error) {
			n, err = unix.Read(fd, buf[:])
			return err
		})
		if err != nil || n == 0 {
			return
		}
		r, err := parseRequest(buf[:n])
		if err != nil {
			return // this is not the agent
		}
		a, f := look(executables, r)
		var rights []byte
		if f != nil {
			rights = unix.UnixRights(int(f.Fd()))
		}
		err = ignoringEINTR(func() error { return unix.Sendmsg(fd, a.marshal(), rights, nil, 0) })
		if f != nil {
			f.Close()
		}
		if err != nil {
			return
		}
	}
}

func ignoringEINTR(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}
