package handover

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var quiet = slog.New(slog.DiscardHandler)

// A place is a directory with somebody who listens in it.
type place struct {
	t        *testing.T
	dir      string
	listener *net.UnixListener
	taken    atomic.Bool
}

func newPlace(t *testing.T) *place {
	t.Helper()
	p := &place{t: t, dir: t.TempDir()}
	var err error
	if p.listener, err = net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(p.dir, "served.sock")}); err != nil {
		t.Fatal(err)
	}
	p.listener.SetUnlinkOnClose(false)
	t.Cleanup(func() { p.listener.Close() })
	p.taken.Store(true)
	return p
}

func (p *place) sockets() (map[string]*os.File, error) {
	f, err := p.listener.File()
	return map[string]*os.File{"served": f}, err
}

func (p *place) offer() *Offer {
	p.t.Helper()
	o, err := NewOffer(p.dir, p.sockets, quiet)
	if err != nil {
		p.t.Fatal(err)
	}
	return o
}

type outcome struct {
	sockets map[string]*os.File
	turn    *os.File
	err     error
}

// await starts a successor; waiting is closed when it waits.
func (p *place) await(ctx context.Context) (waiting chan struct{}, done chan outcome) {
	waiting, done = make(chan struct{}), make(chan outcome, 1)
	go func() {
		s, turn, err := Await(ctx, Config{Dir: p.dir, Taken: func() (bool, error) { return p.taken.Load(), nil }, Waiting: func() { close(waiting) }, Log: quiet})
		done <- outcome{s, turn, err}
	}()
	return waiting, done
}

func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// Whoever connects while nobody serves is served by the successor.
func TestSocketsGoOn(t *testing.T) {
	ctx := bounded(t)
	p := newPlace(t)
	o := p.offer()
	waiting, done := p.await(ctx)
	<-waiting
	p.listener.Close()
	caller, err := net.Dial("unix", filepath.Join(p.dir, "served.sock"))
	if err != nil {
		t.Fatalf("between the two: %v", err)
	}
	defer caller.Close()
	p.taken.Store(false)
	if err := o.Close(); err != nil {
		t.Error(err)
	}
	got := <-done
	if got.err != nil || got.sockets["served"] == nil {
		t.Fatalf("%v, %v", got.sockets, got.err)
	}
	defer closeAll(got.sockets)
	l, err := net.FileListener(got.sockets["served"])
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	served, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer served.Close()
	fmt.Fprint(served, "hello")
	served.Close()
	if said, err := io.ReadAll(caller); err != nil || string(said) != "hello" {
		t.Errorf("%q, %v", said, err)
	}
}

// A place that is free is taken at once.
func TestFree(t *testing.T) {
	p := newPlace(t)
	p.taken.Store(false)
	_, done := p.await(bounded(t))
	got := <-done
	if got.err != nil || len(got.sockets) != 0 {
		t.Errorf("%v, %v", got.sockets, got.err)
	}
	got.turn.Close()
	broken := errors.New("broken")
	if _, _, err := Await(bounded(t), Config{Dir: p.dir, Taken: func() (bool, error) { return false, broken }, Log: quiet}); !errors.Is(err, broken) {
		t.Error(err)
	}
}

// A successor that ends leaves the place to the next one; one at a time is admitted.
func TestSuccessorThatEnds(t *testing.T) {
	p := newPlace(t)
	o := p.offer()
	defer o.Close()
	firstCtx, endFirst := context.WithCancel(bounded(t))
	waiting, first := p.await(firstCtx)
	<-waiting
	if _, _, err := ask(bounded(t), p.dir); !errors.Is(err, errRefused) {
		t.Errorf("beside the first: %v", err)
	}
	endFirst()
	if got := <-first; !errors.Is(got.err, context.Canceled) || got.sockets != nil {
		t.Errorf("%v, %v", got.sockets, got.err)
	}
	waiting, second := p.await(bounded(t))
	<-waiting
	p.taken.Store(false)
	o.Close()
	got := <-second
	if got.err != nil || len(got.sockets) != 1 {
		t.Errorf("%v, %v", got.sockets, got.err)
	}
	closeAll(got.sockets)
}

// Of two that wait, the second does not take the place when its holder lets it go, a moment before that one ends: the first has the
// sockets. The second comes after the first.
func TestTwoThatWait(t *testing.T) {
	ctx := bounded(t)
	p := newPlace(t)
	o := p.offer()
	waiting, first := p.await(ctx)
	<-waiting
	waitingToo, second := p.await(ctx)
	p.taken.Store(false) // and it looks once a second
	select {
	case got := <-second:
		t.Fatalf("the second has the place before the first: %v, %v", got.sockets, got.err)
	case <-time.After(3 * refusedWait):
	}
	o.Close()
	got := <-first
	if got.err != nil || len(got.sockets) != 1 {
		t.Fatalf("%v, %v", got.sockets, got.err)
	}
	defer closeAll(got.sockets)
	p.taken.Store(true)
	next := p.offer()
	got.turn.Close()
	<-waitingToo
	p.taken.Store(false)
	next.Close()
	if got := <-second; got.err != nil || len(got.sockets) != 1 {
		t.Errorf("%v, %v", got.sockets, got.err)
	} else {
		closeAll(got.sockets)
		got.turn.Close()
	}
}

// A holder that has no descriptor left when a successor comes takes it when there is one again.
func TestNoDescriptorLeft(t *testing.T) {
	p := newPlace(t)
	said := make(chan string, 100)
	o, err := NewOffer(p.dir, p.sockets, slog.New(slog.NewTextHandler(writer(func(b []byte) { said <- string(b) }), nil)))
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	none := was
	none.Cur = 3 // what is open stays open
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	err = unix.Connect(fd, &unix.SockaddrUnix{Name: filepath.Join(p.dir, name)})
	var line string
	select {
	case line = <-said:
	case <-bounded(t).Done():
	}
	if err := errors.Join(err, unix.Setrlimit(unix.RLIMIT_NOFILE, &was)); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(line, "too many open files") {
		t.Errorf("the holder says %q", line)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 20}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, maxMessage)
	n, err := unix.Read(fd, buf)
	if err != nil || !strings.HasPrefix(string(buf[:n]), greeting) {
		t.Errorf("the successor gets %q, %v", buf[:n], err)
	}
	if err := o.Close(); err != nil {
		t.Error(err)
	}
}

type writer func([]byte)

func (w writer) Write(b []byte) (int, error) {
	w(b)
	return len(b), nil
}

// Where the holder offers nothing, such as one of an older version, its end is awaited all the same.
func TestNothingOffered(t *testing.T) {
	p := newPlace(t)
	_, done := p.await(bounded(t))
	p.taken.Store(false)
	if got := <-done; got.err != nil || len(got.sockets) != 0 {
		t.Errorf("%v, %v", got.sockets, got.err)
	}
	// What a killed one has left is no obstacle to the next.
	if err := p.offer().Close(); err != nil {
		t.Fatal(err)
	}
	if err := p.offer().Close(); err != nil {
		t.Fatal(err)
	}
}

// Whatever the other side sends, no socket is taken from it that it did not name, none is leaked, and its place is awaited.
func TestHostileHolder(t *testing.T) {
	open := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	for name, message := range map[string]struct {
		text string
		fds  int
	}{
		"silence":        {"", 0},
		"other version":  {"signet-handover 2 served\n", 1},
		"no names":       {greeting + "\n", 1},
		"too few":        {greeting + " served other\n", 1},
		"too many":       {greeting + " a b c d e f g h i\n", 9},
		"one name twice": {greeting + " served served\n", 2},
		"cut":            {greeting + " served", 1},
		"long":           {greeting + " " + strings.Repeat("x", 2*maxMessage) + "\n", 1},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(p.dir, "successor.sock")})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			before := open()
			asked := make(chan error, 1)
			go func() {
				_, sockets, err := ask(bounded(t), p.dir)
				closeAll(sockets)
				asked <- err
			}()
			c, err := l.AcceptUnix()
			if err != nil {
				t.Fatal(err)
			}
			if message.text != "" {
				var fds []int
				for range message.fds {
					fds = append(fds, int(os.Stdin.Fd()))
				}
				if _, _, err := c.WriteMsgUnix([]byte(message.text), unix.UnixRights(fds...), nil); err != nil {
					t.Fatal(err)
				}
			}
			c.Close()
			if err := <-asked; err == nil {
				t.Error("it was taken")
			}
			if after := open(); after != before {
				t.Errorf("%d descriptors are open, before %d", after, before)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add(greeting + " workload\n")
	f.Add(greeting + "\n")
	f.Add(greeting + " a b\n")
	f.Fuzz(func(t *testing.T, message string) {
		names, err := parse(message)
		if err != nil {
			return
		}
		back := greeting
		for _, n := range names {
			back += " " + n
		}
		if back+"\n" != message || len(names) > maxSockets || slices.Contains(names, "") {
			t.Errorf("%q is read as %q", message, names)
		}
	})
}

// The log says what happens on both sides.
func TestLog(t *testing.T) {
	var said bytes.Buffer
	p := newPlace(t)
	o, err := NewOffer(p.dir, p.sockets, slog.New(slog.NewTextHandler(&said, nil)))
	if err != nil {
		t.Fatal(err)
	}
	waiting, done := p.await(bounded(t))
	<-waiting
	p.taken.Store(false)
	o.Close()
	closeAll((<-done).sockets)
	if !strings.Contains(said.String(), "a successor waits") {
		t.Error(said.String())
	}
}
