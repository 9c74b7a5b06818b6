package workloadapi_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"

	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi"
	"github.com/signet-id/signet/workloadapi/peer"
)

// inodeOf is the selector by which byState knows an executable.
func inodeOf(t testing.TB, path string) string {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("test:inode:%d", st.Sys().(*syscall.Stat_t).Ino)
}

// pausingAttestor lets the test act between attestation and answer.
type pausingAttestor struct {
	once  sync.Once
	pause func()
}

func (a *pausingAttestor) Attest(ctx context.Context, p *peer.Process) (workloadapi.Caller, error) {
	c, err := byState{}.Attest(ctx, p)
	a.once.Do(a.pause)
	return c, err
}

func TestWEP_21_ExecBetweenAttestationAndAnswer(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	good, evil := copyOfSelf(t, "good"), copyOfSelf(t, "evil")
	src := newMemory(a, entry{match: having(inodeOf(t, good)), identity: a.identity(t, "/secret-name")})
	// The attestor hands over to the test, which alone may end itself.
	paused, resume := make(chan struct{}), make(chan struct{})
	attestor := &pausingAttestor{pause: func() {
		close(paused)
		<-resume
	}}
	ends := make(chan workloadapi.CallEnd, 4)
	e := serve(t, src, func(c *workloadapi.Config) {
		c.Attestor = attestor
		c.OnCall = func(end workloadapi.CallEnd) { ends <- end }
		c.OnPush = func(string) { t.Error("a message was sent to a program without identity") }
	})
	resumeOnce := sync.OnceFunc(func() { close(resume) })
	t.Cleanup(resumeOnce)
	w := startChild(t, good, nil, "fetch", e.path)
	within(t, "the attestation", paused)
	w.say(t, "exec "+evil+" sniff FD secret-name")
	w.want(t, "sniffing") // from here on it is another program
	resumeOnce()
	if end := within(t, "the call's end", ends); end.Code != codes.PermissionDenied {
		t.Errorf("the call ended with %v, want PermissionDenied", end.Code)
	}
	e.stop()
	if got := w.want(t, "sniffed"); got != "sniffed false" {
		t.Error("the program that was exec'ed read the other one's SVID")
	}
}

func TestWEP_21_ExecBeforePush(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	good, evil, other := copyOfSelf(t, "good"), copyOfSelf(t, "evil"), copyOfSelf(t, "other")
	for _, tt := range []struct {
		name, exe string
		pushes    int
	}{
		{"into a program without identity", evil, 0},
		{"into a program with another identity", other, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			src := newMemory(a,
				entry{match: having(inodeOf(t, good)), identity: a.identity(t, "/first-name")},
				entry{match: having(inodeOf(t, other)), identity: a.identity(t, "/other-name")})
			ends, pushes := make(chan workloadapi.CallEnd, 4), make(chan string, 4)
			e := serve(t, src, func(c *workloadapi.Config) {
				c.OnCall = func(end workloadapi.CallEnd) { ends <- end }
				c.OnPush = func(m string) { pushes <- m }
			})
			w := startChild(t, good, nil, "fetch", e.path)
			w.want(t, "svid spiffe://example.org/first-name")
			within(t, "a push", pushes)
			w.say(t, "exec "+tt.exe+" sniff FD second-name")
			w.want(t, "sniffing")
			second := a.identity(t, "/second-name")
			src.change(func() { src.entries[0].identity = second }) // the renewed SVID of what it was
			if tt.pushes == 0 {
				if end := within(t, "the call's end", ends); end.Code != codes.PermissionDenied {
					t.Errorf("the stream ended with %v, want PermissionDenied", end.Code)
				}
			} else {
				within(t, "a push", pushes)
			}
			e.stop()
			if got := w.want(t, "sniffed"); got != "sniffed false" {
				t.Error("the program that was exec'ed read the SVID of what the process was before")
			}
		})
	}
}

// fleetingAttestor knows that an equal state does not say which program runs.
type fleetingAttestor struct{ rewritten atomic.Bool }

func (a *fleetingAttestor) Attest(ctx context.Context, p *peer.Process) (workloadapi.Caller, error) {
	c, err := byState{}.Attest(ctx, p)
	c.Fleeting = true
	if a.rewritten.Load() {
		c.Selectors = append(c.Selectors[:1:1], spiffe.Selector{Type: "test", Value: "rewritten"})
	}
	return c, err
}

func TestWEP_21_RewrittenExecutableBeforePush(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a,
		entry{match: func(c workloadapi.Caller) bool { return !having("test:rewritten")(c) }, identity: a.identity(t, "/good")},
		entry{match: having("test:rewritten"), identity: a.identity(t, "/rewritten")})
	attestor := &fleetingAttestor{}
	e := serve(t, src, func(c *workloadapi.Config) { c.Attestor = attestor })
	stream, err := e.client(t).FetchX509SVID(spiffeCtx(t), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for range 10 { // rotations do no harm while nothing is found to differ
		if got := svidIDs(recv(t, stream)); !slices.Equal(got, []string{"spiffe://example.org/good"}) {
			t.Fatalf("got %q", got)
		}
		renewed := a.identity(t, "/good")
		src.change(func() { src.entries[0].identity = renewed })
	}
	recv(t, stream)
	attestor.rewritten.Store(true)
	renewed := a.identity(t, "/good")
	src.change(func() { src.entries[0].identity = renewed })
	if got := svidIDs(recv(t, stream)); !slices.Equal(got, []string{"spiffe://example.org/rewritten"}) {
		t.Errorf("a program that differs, in an equal state, got %q", got)
	}
}

func TestWEP_21_UserChangeBeforePush(t *testing.T) {
	requireRoot(t)
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a,
		entry{match: having("unix:uid:0"), identity: a.identity(t, "/root")},
		entry{match: having("unix:uid:23001"), identity: a.identity(t, "/user")})
	e := serveAt(t, filepath.Join(openDir(t), "agent.sock"), src)
	w := startChild(t, copyOfSelf(t, "workload"), nil, "fetch", e.path)
	w.want(t, "svid spiffe://example.org/root")

	// Root is kept as the saved user: the connection may go on, as what the process is now.
	w.say(t, "setuid 23001 23001 0")
	w.want(t, "now uid 23001")
	root := a.identity(t, "/root")
	src.change(func() { src.entries[0].identity = root })
	w.want(t, "svid spiffe://example.org/user")

	// Root is given up for good: a connection that root opened serves nobody else.
	w.say(t, "setuid 23001 0 0")
	w.want(t, "now uid 0")
	w.say(t, "setuid 23001 23001 23001")
	w.want(t, "now uid 23001")
	user := a.identity(t, "/user")
	src.change(func() { src.entries[1].identity = user })
	w.want(t, "end PermissionDenied the process has become another user or group")
}

// A user's process that has connected becomes a program with a set-user-ID or set-group-ID bit, such as su, and lives on as
// that, while another process of the user holds the connection: it must not be answered as who the program runs as.
func TestWEP_21_SetIDProgramAfterConnecting(t *testing.T) {
	requireRoot(t)
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a,
		entry{match: having("unix:uid:0"), identity: a.identity(t, "/root")},
		entry{match: having("unix:uid:23002"), identity: a.identity(t, "/service")},
		entry{match: having("unix:uid:23001"), identity: a.identity(t, "/user")})
	e := serveAt(t, filepath.Join(openDir(t), "agent.sock"), src)
	for _, tt := range []struct {
		name     string
		uid, gid int
		mode     os.FileMode
	}{
		{"setuid", 0, 0, 0o755 | os.ModeSetuid},
		{"setgid", 0, 23009, 0o755 | os.ModeSetgid},
		{"both", 23002, 23009, 0o755 | os.ModeSetuid | os.ModeSetgid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			exe := copyOfSelf(t, "su")
			if err := os.Chown(exe, tt.uid, tt.gid); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(exe, tt.mode); err != nil {
				t.Fatal(err)
			}
			w := startChild(t, copyOfSelf(t, "workload"), asUser(23001), "connect", e.path)
			w.want(t, "connected")
			w.say(t, "exec "+exe+" fetchfd FD")
			w.want(t, "end PermissionDenied the process has become another user or group")

			// One that connects as what the bits make it is that.
			w = startChild(t, exe, asUser(23001), "fetch", e.path)
			if line := w.want(t, "svid "); strings.Contains(line, "/user") != (tt.mode&os.ModeSetuid == 0) {
				t.Errorf("a program that connected with its bits got %q", line)
			}
		})
	}
}

func TestWEP_22_PassedConnectionEndsWithItsOpener(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")})
	e := serve(t, src)
	w := startChild(t, copyOfSelf(t, "workload"), nil, "pass", e.path)
	w.want(t, "svid spiffe://example.org/web") // the heir of the connection has the opener's identity
	if err := w.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	line := w.want(t, "end ")
	if !strings.HasPrefix(line, "end Unavailable") {
		t.Errorf("the heir's stream: %q, want Unavailable", line)
	}
	src.waitWatching(t, 0)
}

func TestWAPI_16_StoppedReaderHoldsOneStateOnly(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	src := newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")})
	pushes := make(chan string, 1024)
	e := serve(t, src, func(c *workloadapi.Config) { c.OnPush = func(m string) { pushes <- m } })
	w := startChild(t, copyOfSelf(t, "workload"), nil, "fetch", e.path)
	w.want(t, "svid spiffe://example.org/web")
	within(t, "a push", pushes)
	if err := w.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	// More than the flow-control window: the server must neither queue it all nor keep others waiting.
	for i := range 200 {
		next := a.identity(t, fmt.Sprintf("/n%d", i))
		src.change(func() { src.entries[0].identity = next })
	}
	src.change(func() { src.entries = nil }) // the entry is deleted while updates are held back
	if err := w.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	for ctx := spiffeCtx(t); ; {
		line, err := w.next(ctx)
		if err != nil {
			t.Fatalf("the stream did not end: %v", err)
		}
		if strings.HasPrefix(line, "end ") {
			if !strings.HasPrefix(line, "end PermissionDenied") {
				t.Errorf("the stream: %q, want PermissionDenied", line)
			}
			return
		}
	}
}
