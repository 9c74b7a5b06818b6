package examiner

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/internal/sandbox"
	"github.com/signet-id/signet/workloadapi/peer"
)

// asExaminer makes the test binary be the examiner.
const asExaminer = "examiner-of-test"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == asExaminer {
		if err := Main(os.Args[2]); err != nil {
			os.Stderr.WriteString(err.Error() + "\n")
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func start(t *testing.T) *Client {
	t.Helper()
	c, err := Start(Config{Command: []string{os.Args[0], asExaminer}, Seccomp: sandbox.Require, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// sleeper starts a copy of sleep from a place of its own, as another user if the test may.
func sleeper(t *testing.T) (pid int32, path string) {
	t.Helper()
	data, err := os.ReadFile("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "sleeper")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path = filepath.Join(dir, "sleep")
	if err := errors.Join(os.Chmod(dir, 0o711), os.WriteFile(path, data, 0o711)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "3600")
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 64125, Gid: 64125}}
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return int32(cmd.Process.Pid), path
}

// TestSeesWhatProcSees asks the examiner and /proc the same.
func TestSeesWhatProcSees(t *testing.T) {
	c := start(t)
	pid, path := sleeper(t)
	want, err := peer.Proc{}.Stat(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.Stat(pid, 1)
	if err != nil || got != want {
		t.Errorf("Stat = %+v, %v; want %+v", got, err, want)
	}
	gotPath, there, err := c.Path(pid, 1)
	if err != nil || gotPath != path || there != want {
		t.Errorf("Path = %q, %+v, %v; want %q, %+v", gotPath, there, err, path, want)
	}
	f, err := c.Open(pid, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	content, err := io.ReadAll(f)
	wantContent, _ := os.ReadFile(path)
	if err != nil || !bytes.Equal(content, wantContent) {
		t.Errorf("%d bytes, %v; want %d", len(content), err, len(wantContent))
	}
	pin, err := c.Pin(pid, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer pin.Close()
	if _, err := pin.Read(make([]byte, 1)); err == nil {
		t.Error("what Pin opened can be read")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if gone, there, err := c.Path(pid, 1); err != nil || gone != path+" (deleted)" || there != (peer.Executable{}) {
		t.Errorf("Path of a deleted file = %q, %+v, %v", gone, there, err)
	}
	for _, pid := range []int32{1 << 30, -1, 0} {
		if _, err := c.Stat(pid, 1); err == nil {
			t.Errorf("process %d has an executable", pid)
		}
		if pid <= 0 {
			return // the examiner ends: who asks so is not the agent
		}
	}
}

// TestKilled: whoever waits is told, and so is whoever asks later.
func TestKilled(t *testing.T) {
	c := start(t)
	if err := c.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-c.Done()
	if err := c.Watch(t.Context()); !errors.Is(err, ErrEnded) {
		t.Errorf("Watch = %v", err)
	}
	if _, err := c.Stat(int32(os.Getpid()), 0); !errors.Is(err, ErrEnded) {
		t.Errorf("Stat = %v, want ErrEnded", err)
	}
}

// TestEndsWithTheAgent: the process does not outlive the agent's end of the socket.
func TestEndsWithTheAgent(t *testing.T) {
	c := start(t)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if state := c.cmd.ProcessState; state == nil || !state.Success() {
		t.Errorf("it ended with %v", state)
	}
}

// TestByHand: who starts it from a shell is told what it is.
func TestByHand(t *testing.T) {
	out, err := exec.Command(os.Args[0], asExaminer, "auto").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "the agent starts it by itself") {
		t.Errorf("%v: %s", err, out)
	}
}

// stuck are Executables of which Stat hangs for process 1.
type stuck struct {
	peer.Proc
	came, let chan struct{}
}

func (s stuck) Stat(pid int32, uid uint32) (peer.Executable, error) {
	if pid == 1 {
		s.came <- struct{}{}
		<-s.let
	}
	return peer.Executable{Links: uint64(pid)}, nil
}

// within returns a client and a server in this process.
func within(t *testing.T, e peer.Executables) *Client {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
	}
	c := newClient(conns[0], slog.New(slog.DiscardHandler))
	c.reader.Go(c.read)
	served := make(chan error, 1)
	go func() {
		defer conns[1].Close()
		served <- serve(conns[1], e)
	}()
	t.Cleanup(func() {
		c.Close()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return c
}

// TestHangingFileSystem: the looks at one user's programs hang, and those at others' do not.
func TestHangingFileSystem(t *testing.T) {
	came, let := make(chan struct{}), make(chan struct{})
	c := within(t, stuck{came: came, let: let})
	var hanging sync.WaitGroup
	for range maxWaitingPerUID {
		hanging.Go(func() {
			if exe, err := c.Stat(1, 1000); err != nil || exe.Links != 1 {
				t.Errorf("Stat = %+v, %v", exe, err)
			}
		})
	}
	for range maxWaitingPerUID {
		<-came
	}
	if _, err := c.Stat(2, 1000); !errors.Is(err, errBusy) {
		t.Errorf("one more of the same user: %v, want errBusy", err)
	}
	if exe, err := c.Stat(7, 1001); err != nil || exe.Links != 7 {
		t.Errorf("another user's: %+v, %v", exe, err)
	}
	close(let)
	hanging.Wait()
	if _, err := c.Stat(2, 1000); err != nil {
		t.Errorf("after all: %v", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.waiting)+len(c.perUID) != 0 {
		t.Errorf("%d requests and %d users are left behind", len(c.waiting), len(c.perUID))
	}
}

// TestLateAnswer: a descriptor that nobody waits for any more is closed.
func TestLateAnswer(t *testing.T) {
	c := newClient(nil, slog.New(slog.DiscardHandler))
	c.waiting[5], c.perUID[9] = &call{uid: 9, done: make(chan struct{}), left: true}, 1
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	c.answered(answer{id: 5}, f)
	if _, err := f.Stat(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the descriptor is still open: %v", err)
	}
	if len(c.waiting)+len(c.perUID) != 0 {
		t.Error("the request is still counted")
	}
}

// TestConcurrent asks from many goroutines; each gets its own answer.
func TestConcurrent(t *testing.T) {
	c := within(t, stuck{let: make(chan struct{})})
	var all sync.WaitGroup
	for i := range 32 {
		all.Go(func() {
			for j := range 200 {
				pid := int32(2 + i*1000 + j)
				if exe, err := c.Stat(pid, uint32(i)); err != nil || exe.Links != uint64(pid) {
					t.Errorf("process %d: %+v, %v", pid, exe, err)
				}
			}
		})
	}
	all.Wait()
}

// TestEnvironment: what is for the service is not for the examiner.
func TestEnvironment(t *testing.T) {
	got := clean([]string{"PATH=/bin", "NOTIFY_SOCKET=/run/n", "LISTEN_FDS=1", "LISTEN_PID=1", "WATCHDOG_USEC=1", "CREDENTIALS_DIRECTORY=/c", "LISTENER=x"})
	if strings.Join(got, " ") != "PATH=/bin LISTENER=x" {
		t.Errorf("%q", got)
	}
}

func FuzzParseRequest(f *testing.F) {
	f.Add(request{id: 7, ask: askOpen, pid: 1}.marshal())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRequest(b)
		if err == nil && (!bytes.Equal(r.marshal(), b) || r.pid <= 0) {
			t.Errorf("%x became %+v", b, r)
		}
	})
}

func FuzzParseAnswer(f *testing.F) {
	f.Add(answer{id: 7, exe: peer.Executable{Links: 1, File: peer.File{Inode: 3, Size: -1}}, path: "/bin/true"}.marshal())
	f.Add(answer{errno: unix.EACCES}.marshal())
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := parseAnswer(b)
		if err == nil && !bytes.Equal(a.marshal(), b) {
			t.Errorf("%x became %+v", b, a)
		}
	})
}

// BenchmarkStat is what a look costs, beside the one without a second process.
func BenchmarkStat(b *testing.B) {
	c, err := Start(Config{Command: []string{os.Args[0], asExaminer}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	for name, e := range map[string]peer.Executables{"examiner": c, "proc": peer.Proc{}} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if _, err := e.Stat(int32(os.Getpid()), 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// lanesWithin returns a client with lanes that are served in this process.
func lanesWithin(t *testing.T, e peer.Executables) *Client {
	t.Helper()
	c := within(t, e)
	ours, theirs, err := newLanes()
	if err != nil {
		t.Fatal(err)
	}
	c.lanes = ours
	var serving sync.WaitGroup
	for _, f := range theirs {
		fd, err := unix.Dup(int(f.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		serving.Go(func() { serveLane(fd, e) })
	}
	closeAll(theirs)
	t.Cleanup(func() {
		c.lanes.close()
		serving.Wait()
	})
	return c
}

// TestQuickConcurrent: as TestConcurrent, with lanes, which are all free in the end.
func TestQuickConcurrent(t *testing.T) {
	c := lanesWithin(t, stuck{let: make(chan struct{})})
	if a, _, err := c.lanes.ask(askStat, 5, 5); err != nil || a.exe.Links != 5 {
		t.Fatalf("a lane answers %+v, %v", a, err)
	}
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			for j := range 500 {
				pid := int32(2 + i*1000 + j)
				if exe, err := c.Stat(pid, uint32(i)); err != nil || exe.Links != uint64(pid) {
					t.Errorf("process %d: %+v, %v", pid, exe, err)
				}
			}
		})
	}
	all.Wait()
	for _, l := range c.lanes.all {
		if l.busy || !l.settled() {
			t.Error("a lane is not free")
		}
	}
}

// TestQuickHangs: a user whose programs hang holds up some lanes, and others get theirs; late answers go to nobody else.
func TestQuickHangs(t *testing.T) {
	came, let, over := make(chan struct{}), make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { close(over) })
	c := lanesWithin(t, stuck{came: came, let: let})
	var hanging sync.WaitGroup
	for range quickLanes + 1 {
		hanging.Go(func() {
			if exe, err := c.Stat(1, 1000); err != nil || exe.Links != 1 {
				t.Errorf("Stat = %+v, %v", exe, err)
			}
		})
		<-came
	}
	if _, _, err := c.lanes.ask(askStat, 2, 1000); err != errNotQuick {
		t.Errorf("another lane for the same user: %v", err)
	}
	if exe, err := c.Stat(2, 1000); err != nil || exe.Links != 2 {
		t.Errorf("the other way: %+v, %v", exe, err)
	}
	if a, _, err := c.lanes.ask(askStat, 7, 1001); err != nil || a.exe.Links != 7 {
		t.Errorf("another user's: %+v, %v", a, err)
	}
	go func() {
		for { // those that asked on a lane first, and then the other way
			select {
			case <-came:
			case <-over:
				return
			}
		}
	}()
	close(let)
	hanging.Wait()
	for pid := int32(2); pid < 20; pid++ {
		if exe, err := c.Stat(pid, 1000); err != nil || exe.Links != uint64(pid) {
			t.Errorf("process %d after all: %+v, %v", pid, exe, err)
		}
	}
}

// TestLaneRefusesOthers: what is no look on a lane ends it.
func TestLaneRefusesOthers(t *testing.T) {
	for name, raw := range map[string][]byte{"no request": []byte("GET / HTTP"), "another kind": request{id: 1, ask: askPin + 1, pid: 1}.marshal(), "no process": request{id: 1, ask: askStat}.marshal()} {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Write(fds[0], raw); err != nil {
			t.Fatal(err)
		}
		serveLane(fds[1], stuck{})
		if n, err := unix.Read(fds[0], make([]byte, 100)); n > 0 {
			t.Errorf("%s: answered with %d bytes, %v", name, n, err)
		}
		unix.Close(fds[0])
	}
}

// TestLaneAnswersAnother: an answer that belongs to no request is not taken, and the lane not used again.
func TestLaneAnswersAnother(t *testing.T) {
	ours, theirs, err := newLanes()
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(theirs)
	defer ours.close()
	for _, f := range theirs {
		if _, err := unix.Write(int(f.Fd()), answer{id: 77, exe: peer.Executable{Links: 9}}.marshal()); err != nil {
			t.Fatal(err)
		}
	}
	for uid := range uint32(quickLanes) {
		if a, _, err := ours.ask(askStat, 5, uid); err != errNotQuick {
			t.Errorf("took %+v, %v", a, err)
		}
	}
	if l := ours.take(100); l != nil {
		t.Error("a lane that answered wrongly is used again")
	}
}

// TestLateDescriptor: what comes on a lane after its time is closed, and the lane is free again.
func TestLateDescriptor(t *testing.T) {
	ours, theirs, err := newLanes()
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(theirs)
	defer ours.close()
	l := ours.take(1)
	if _, _, err := l.ask(askOpen, 5); err != errNotQuick {
		t.Fatalf("an answer from nobody: %v", err)
	}
	ours.giveBack(l)
	if l.settled() {
		t.Fatal("nothing is owed")
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	for i, of := range ours.all {
		if of == l {
			err = unix.Sendmsg(int(theirs[i].Fd()), answer{id: l.last}.marshal(), unix.UnixRights(int(w.Fd())), nil, 0)
		}
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	if !l.settled() {
		t.Error("the late answer was not taken")
	}
	if n, err := r.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the descriptor is still open somewhere: %d, %v", n, err)
	}
	r.Close()
}
