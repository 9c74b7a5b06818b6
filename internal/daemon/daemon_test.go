package daemon

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// manager is a socket such as systemd's.
func manager(t *testing.T, path string) *net.UnixConn {
	t.Helper()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return c
}

func receive(t *testing.T, c *net.UnixConn) (string, []int) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf, oob := make([]byte, 4096), make([]byte, 256)
	n, oobn, _, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		t.Fatal(err)
	}
	var fds []int
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range messages {
		got, err := unix.ParseUnixRights(&m)
		if err != nil {
			t.Fatal(err)
		}
		fds = append(fds, got...)
	}
	return string(buf[:n]), fds
}

func TestNotifierMessages(t *testing.T) {
	for _, address := range []string{filepath.Join(t.TempDir(), "notify"), "@signet-test-" + strconv.Itoa(os.Getpid())} {
		c := manager(t, address)
		t.Setenv("WATCHDOG_USEC", "30000000")
		t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
		n, err := NewNotifier()
		if err != nil {
			t.Fatal(err)
		}
		defer n.Close()
		if os.Getenv("NOTIFY_SOCKET")+os.Getenv("WATCHDOG_USEC")+os.Getenv("WATCHDOG_PID") != "" {
			t.Error("the environment still names the manager; children would speak for the service")
		}
		if n.WatchdogPeriod() != 30*time.Second {
			t.Errorf("period %s, want 30s", n.WatchdogPeriod())
		}
		var before unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &before); err != nil {
			t.Fatal(err)
		}
		n.Ready("in sync\nMAINPID=1")
		n.Reloading()
		n.Status("connecting")
		n.Stopping()
		want := []string{"READY=1\nSTATUS=in sync MAINPID=1", "RELOADING=1\nMONOTONIC_USEC=", "STATUS=connecting", "STOPPING=1"}
		for i, w := range want {
			got, _ := receive(t, c)
			if i != 1 && got != w || !strings.HasPrefix(got, w) {
				t.Errorf("message %q, want %q", got, w)
			}
			if i == 1 {
				usec, err := strconv.ParseInt(strings.TrimPrefix(got, w), 10, 64)
				if err != nil || usec < before.Nano()/1000 {
					t.Errorf("%q: the time is not the steady clock's, which was %d", got, before.Nano()/1000)
				}
			}
		}
	}
}

func TestNotifierWithoutManager(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	n, err := NewNotifier()
	if n != nil || err != nil {
		t.Fatalf("NewNotifier() = %v, %v", n, err)
	}
	n.Ready("")
	n.Stopping()
	n.Keep("x", os.Stdin)
	n.Watch(t.Context(), nil, nil) // returns at once
	if err := n.Close(); err != nil {
		t.Error(err)
	}
}

func TestNotifierMistakes(t *testing.T) {
	for name, env := range map[string][2]string{
		"neither a path nor": {"notify", ""}, "no such file": {filepath.Join(t.TempDir(), "absent"), ""}, "not a number": {"", "a minute"}, "not a number of": {"", "18446744073709551615"},
	} {
		if env[0] == "" {
			manager(t, filepath.Join(t.TempDir(), "n"))
		} else {
			t.Setenv("NOTIFY_SOCKET", env[0])
		}
		t.Setenv("WATCHDOG_USEC", env[1])
		if _, err := NewNotifier(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%v: %v, want %q", env, err, name)
		}
	}
}

// TestWatchdogNeedsLife: the watchdog hears of the program at least twice in each period while it is alive, and never
// while it is not.
func TestWatchdogNeedsLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// A bubble has no sockets that it can wait for; what counts is when life is asked after.
		n := &Notifier{watchdog: 20 * time.Second, conn: new(net.UnixConn)}
		ctx, cancel := context.WithCancel(t.Context())
		var asked, dead atomic.Int64
		go n.Watch(ctx, func(check context.Context) error {
			n := asked.Add(1)
			if deadline, ok := check.Deadline(); !ok || time.Until(deadline) > 5*time.Second {
				t.Errorf("the check may take until %v", deadline)
			}
			if n <= 3 {
				return nil
			}
			<-check.Done()
			return check.Err()
		}, func(error) { dead.Add(1) })
		time.Sleep(19 * time.Second)
		synctest.Wait()
		if asked.Load() < 3 {
			t.Errorf("asked %d times in a period of 20 s", asked.Load())
		}
		time.Sleep(20 * time.Second)
		cancel()
		synctest.Wait()
		if asked, dead := asked.Load(), dead.Load(); dead == 0 || asked-dead > 4 {
			t.Errorf("asked %d times, dead %d times", asked, dead)
		}
	})
}

func TestWatchdogSpeaksOfLifeOnly(t *testing.T) {
	c := manager(t, filepath.Join(t.TempDir(), "notify"))
	t.Setenv("WATCHDOG_USEC", "20000")
	t.Setenv("WATCHDOG_PID", "")
	n, err := NewNotifier()
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	ctx, cancel := context.WithCancel(t.Context())
	died := make(chan struct{}, 1)
	ended := make(chan struct{})
	lives := 0
	go func() {
		defer close(ended)
		n.Watch(ctx, func(context.Context) error {
			if lives++; lives > 2 {
				return errors.New("hangs")
			}
			return nil
		}, func(error) {
			select {
			case died <- struct{}{}:
			default:
			}
		})
	}()
	for range 2 {
		if got, _ := receive(t, c); got != "WATCHDOG=1" {
			t.Errorf("message %q", got)
		}
	}
	<-died
	<-died // it was asked again, and nothing was said
	cancel()
	<-ended
	n.Stopping()
	if got, _ := receive(t, c); got != "STOPPING=1" {
		t.Errorf("message %q after it died", got)
	}
}

// TestKeptSocket: a socket that the manager was given comes back from it and is the same one.
func TestKeptSocket(t *testing.T) {
	dir := t.TempDir()
	c := manager(t, filepath.Join(dir, "notify"))
	t.Setenv("FDSTORE", "4")
	n, err := NewNotifier()
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if !n.Keeps() {
		t.Error("the manager keeps sockets, and the notifier does not know")
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(dir, "s")})
	if err != nil {
		t.Fatal(err)
	}
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	n.Keep("workload", f)
	message, fds := receive(t, c)
	if message != "FDSTORE=1\nFDPOLL=0\nFDNAME=workload" || len(fds) != 1 {
		t.Fatalf("message %q with %d descriptors", message, len(fds))
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	f.Close()
	got, err := take("1", "workload", strconv.Itoa(os.Getpid()), fds[0])
	if err != nil || len(got) != 1 {
		t.Fatal(got, err)
	}
	back, err := net.FileListener(got["workload"])
	got["workload"].Close()
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	conn, err := net.Dial("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	accepted, err := back.Accept()
	if err != nil {
		t.Fatal(err)
	}
	accepted.Close()
}

// TestSocketsMistakes: what is no listening socket is refused, and what is for another process is left alone.
func TestSocketsMistakes(t *testing.T) {
	self := strconv.Itoa(os.Getpid())
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[1])
	defer unix.Close(pair[0])
	tests := []struct {
		name, count, names, pid string
		first                   int
		want                    string // "" for none and no error
	}{
		{"none", "", "", "", 3, ""},
		{"another's", "1", "x", "1", 3, ""},
		{"no number", "one", "", self, 3, "not a number"},
		{"too many", "65", "", self, 3, "not a number from 0 to 64"},
		{"negative", "-1", "", self, 3, "not a number"},
		{"names", "1", "a:b", self, pair[0], "2 names for 1 sockets"},
		{"not listening", "1", "a", self, pair[0], "does not listen"},
		{"no socket", "1", "a", self, 1 << 20, "is no socket"},
	}
	for _, tt := range tests {
		got, err := take(tt.count, tt.names, tt.pid, tt.first)
		if (tt.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), tt.want) || len(got) > 0 {
			t.Errorf("%s: %v, %v; want %q", tt.name, got, err, tt.want)
		}
	}
	for _, name := range []string{"LISTEN_FDS", "LISTEN_FDNAMES"} {
		t.Setenv(name, "1")
	}
	t.Setenv("LISTEN_PID", "1")
	if got, err := Sockets(); got != nil || err != nil || os.Getenv("LISTEN_FDS") != "" {
		t.Errorf("Sockets() = %v, %v", got, err)
	}
}
