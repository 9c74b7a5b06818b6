package workloadattest_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	sys "golang.org/x/sys/unix"

	"github.com/signet-id/signet/agent/workloadattest"
	"github.com/signet-id/signet/agent/workloadattest/unix"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi/peer"
)

// respawn starts the program of its second argument under the process id of its first one, and ends with it.
func respawn() {
	pid, err := strconv.Atoi(os.Args[1])
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	exe, err := sys.BytePtrFromString(os.Args[2])
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	env, err := sys.BytePtrFromString("SIGNET_TEST_ATTEST=wait")
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	argv, envv := []*byte{exe, nil}, []*byte{env, nil}
	ids := []int64{int64(pid)}
	args := struct { // struct clone_args
		flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls, setTID, setTIDSize, cgroup uint64
	}{exitSignal: uint64(syscall.SIGCHLD), setTID: uint64(uintptr(unsafe.Pointer(&ids[0]))), setTIDSize: 1}

	// The child is a copy of this one thread: until exec it may do nothing but system calls.
	debug.SetGCPercent(-1)
	runtime.LockOSThread()
	child, _, errno := sys.RawSyscall(sys.SYS_CLONE3, uintptr(unsafe.Pointer(&args)), unsafe.Sizeof(args), 0)
	if errno == 0 && child == 0 {
		sys.RawSyscall(sys.SYS_EXECVE, uintptr(unsafe.Pointer(exe)), uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envv[0])))
		sys.RawSyscall(sys.SYS_EXIT_GROUP, 1, 0, 0)
	}
	runtime.KeepAlive(ids)
	if errno != 0 {
		fmt.Println("error", errno)
		os.Exit(1)
	}
	var status syscall.WaitStatus
	_, _ = syscall.Wait4(int(child), &status, 0, nil)
	os.Exit(0)
}

// reuse gives a free process id to another program.
func reuse(t *testing.T, pid int32, exe string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", strconv.Itoa(int(pid)), exe)
	cmd.Env = append(os.Environ(), "SIGNET_TEST_ATTEST=respawn")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Error(err)
		return
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Error(err)
		return
	}
	if err := cmd.Start(); err != nil {
		t.Error(err)
		return
	}
	t.Cleanup(func() {
		in.Close() // ends the program, and with it the one that started it
		cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Errorf("process id %d again: %q, %v", pid, line, err)
	}
}

func TestProcessIDGivenToAnotherWhileAttesting(t *testing.T) {
	requireRoot(t)
	poor, _ := workload(t, "poor", "10")
	rich, richSum := workload(t, "rich", "11")
	table := newTable(t)
	for _, when := range []string{"before the others look", "after the others have looked"} {
		t.Run(when, func(t *testing.T) {
			w := startRewritable(t, table, poor, "wait")
			swap := func() {
				w.end()
				reuse(t, w.process.PID, rich)
			}
			looked := make(chan struct{})
			u := unixMethod(t, unix.Config{})
			a := attestor(t, workloadattest.Config{Timeout: time.Minute, Methods: []workloadattest.Method{
				stateMethod{"first", func(ctx context.Context, p *peer.Process, s peer.Snapshot) ([]spiffe.Selector, error) {
					if when == "before the others look" {
						swap()
					}
					found, err := u.Selectors(ctx, p, s)
					for _, f := range found {
						if strings.Contains(f.Value, richSum) || strings.Contains(f.Value, rich) {
							t.Errorf("the process that ended has the selector %s of the next with its id", f)
						}
					}
					close(looked)
					return nil, err
				}},
				stateMethod{"second", func(context.Context, *peer.Process, peer.Snapshot) ([]spiffe.Selector, error) {
					<-looked
					if when != "before the others look" {
						swap()
					}
					return []spiffe.Selector{{Type: "second", Value: "x"}}, nil
				}},
			}})
			if c, err := a.Attest(t.Context(), w.process); !errors.Is(err, peer.ErrGone) {
				t.Errorf("Attest = %v, %v; want ErrGone", c.Selectors, err)
			}
			if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", w.process.PID)); err != nil || exe != rich {
				t.Errorf("process id %d has %q, %v: it was not given to another program", w.process.PID, exe, err)
			}
		})
	}
}

// stateMethod is a Method of the test that sees what it is asked about.
type stateMethod struct {
	name string
	find func(context.Context, *peer.Process, peer.Snapshot) ([]spiffe.Selector, error)
}

func (m stateMethod) Name() string { return m.name }

func (m stateMethod) Selectors(ctx context.Context, p *peer.Process, s peer.Snapshot) ([]spiffe.Selector, error) {
	return m.find(ctx, p, s)
}

// hideProcesses mounts /proc with hidepid and looks around there as the user of its first argument.
func hideProcesses() {
	runtime.LockOSThread()
	uid, err := strconv.Atoi(os.Args[1])
	for _, err := range []error{
		err, sys.Unshare(sys.CLONE_NEWNS), sys.Mount("", "/", "", sys.MS_REC|sys.MS_PRIVATE, ""), sys.Mount("proc", "/proc", "proc", 0, "hidepid=2"),
	} {
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
	}
	cmd := exec.Command(os.Args[2], os.Args[3:]...)
	cmd.Env = append(os.Environ(), "SIGNET_TEST_ATTEST=look")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	if err := cmd.Run(); err != nil {
		fmt.Println("error", err)
	}
	os.Exit(0)
}

// lookAround attests the process of its first argument and itself, and prints what it finds.
func lookAround() {
	table, err := peer.NewTable(peer.Config{})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	m, _ := unix.New(unix.Config{})
	a, _ := workloadattest.New(workloadattest.Config{Methods: []workloadattest.Method{m}})
	for _, pid := range []string{os.Args[1], strconv.Itoa(os.Getpid())} {
		n, _ := strconv.Atoi(pid)
		p, err := table.Open(int32(n))
		if err != nil {
			fmt.Println("refused", err)
			continue
		}
		c, err := a.Attest(context.Background(), p)
		fmt.Println("selectors", c.Selectors, err)
	}
	os.Exit(0)
}

func TestHiddenProcesses(t *testing.T) {
	requireRoot(t)
	exe, sum := workload(t, "web", "12")
	web := startRewritable(t, newTable(t), exe, "wait") // root's
	look, _ := workload(t, "agent", "13")
	for _, tt := range []struct {
		name, uid, want string
	}{
		{"agent of a user", "1", "refused reading /proc/"},
		{"agent of root", "0", sum},
	} {
		cmd := exec.Command("/proc/self/exe", tt.uid, look, strconv.Itoa(int(web.process.PID)))
		cmd.Env = append(os.Environ(), "SIGNET_TEST_ATTEST=hidepid")
		out, err := cmd.CombinedOutput()
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		if err != nil || len(lines) != 2 {
			t.Fatalf("%s: %v, %q", tt.name, err, out)
		}
		if !strings.Contains(lines[0], tt.want) || (tt.uid != "0") != strings.Contains(lines[0], "hidepid") {
			t.Errorf("%s sees of another user's process: %q, want %q", tt.name, lines[0], tt.want)
		}
		// Its own processes are seen as ever.
		if !strings.Contains(lines[1], "uid:"+tt.uid) || !strings.Contains(lines[1], "path:"+look) {
			t.Errorf("%s sees of its own process: %q", tt.name, lines[1])
		}
	}
}

// A file is exchanged under its path all the time while processes start from it: path and hash are those of what runs, or
// absent.
func TestExecutableExchangedAllTheTime(t *testing.T) {
	good, goodSum := workload(t, "good", "14")
	evil, evilSum := workload(t, "evil", "15")
	place, _ := workload(t, "place", "14")
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			from := []string{good, evil}[i%2]
			tmp := place + ".new"
			os.Remove(tmp)
			if err := errors.Join(os.Link(from, tmp), os.Rename(tmp, place)); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	defer func() { close(stop); <-stopped }()
	a := attestor(t, workloadattest.Config{Methods: []workloadattest.Method{unixMethod(t, unix.Config{})}})
	table := newTable(t)
	for range 30 {
		w := startRewritable(t, table, place, "wait")
		running, err := os.Open(fmt.Sprintf("/proc/%d/exe", w.process.PID))
		if err != nil {
			t.Fatal(err)
		}
		last := make([]byte, 2)
		st, err := running.Stat()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := running.ReadAt(last, st.Size()-2); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		running.Close()
		mine, other := goodSum, evilSum
		if string(last) == "15" {
			mine, other = evilSum, goodSum
		}
		got := attest(t, a, w.process)
		if has(got, "unix:sha256:"+other) {
			t.Errorf("what ends in %s has the hash of the other program: %q", last, got)
		}
		if !has(got, "unix:sha256:"+mine) {
			// Linking changes ctime, and then the process is in another state.
			t.Logf("no hash while the file is exchanged: %q", got)
		}
		w.end()
	}
}
