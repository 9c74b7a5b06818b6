//go:build scale

package node

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
)

// settle is how long a process is left alone before its memory is read: longer than the two minutes after which Go's
// runtime collects garbage even if nothing happens.
const settle = 150 * time.Second

// A child is a process of the test binary in a role.
type child struct {
	t     *testing.T
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines *bufio.Reader
}

// maxOpen is how many descriptors a process here may open.
const maxOpen = 20_000

// as starts the test binary in a role.
func as(t *testing.T, who string, args ...string) *child { return spawn(t, os.Args[0], who, args...) }

// built are the programs as they are released, made once.
var built = sync.OnceValues(func() (dir string, err error) {
	if dir, err = os.MkdirTemp("", "signet-built"); err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-tags=grpcnotrace", "-trimpath", "-ldflags=-s -w", "-o", dir+"/", "github.com/signet-id/signet/cmd/signet", "github.com/signet-id/signet/cmd/signet-agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return dir, nil
})

// program starts one of the built programs.
func program(t *testing.T, name string, args ...string) *child {
	t.Helper()
	dir, err := built()
	if err != nil {
		t.Fatal(err)
	}
	return spawn(t, filepath.Join(dir, name), "", args...)
}

// spawn starts a child.
func spawn(t *testing.T, path, who string, args ...string) *child {
	t.Helper()
	cmd := exec.Command("sh", append([]string{"-c", `ulimit -n ` + strconv.Itoa(maxOpen) + `; exec "$0" "$@"`, path}, args...)...)
	cmd.Env = append(os.Environ(), role+"="+who)
	cmd.Stderr = &bytes.Buffer{}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &child{t: t, cmd: cmd, in: in, lines: bufio.NewReader(out)}
	t.Cleanup(c.end)
	return c
}

func (c *child) end() {
	if c.cmd.ProcessState != nil {
		return
	}
	c.in.Close()
	c.cmd.Process.Kill()
	c.cmd.Wait()
	if c.t.Failed() {
		c.t.Logf("%v said:\n%s", c.cmd.Args[3:], c.cmd.Stderr)
	}
}

// ready waits until the child says that it is.
func (c *child) ready() {
	c.t.Helper()
	if line, err := c.lines.ReadString('\n'); line != "ready\n" {
		c.t.Fatalf("%v: %q (%v)\n%s", c.cmd.Args[3:], line, err, c.cmd.Stderr)
	}
}

// status returns a field of /proc/PID/status, in its unit.
func (c *child) status(field string) int {
	c.t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.cmd.Process.Pid))
	if err != nil {
		c.t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				c.t.Fatal(err)
			}
			return n
		}
	}
	c.t.Fatalf("no %s in /proc/PID/status", field)
	return 0
}

func (c *child) rss() int { return c.status("VmRSS") } // KiB

func (c *child) descriptors() int {
	c.t.Helper()
	names, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", c.cmd.Process.Pid))
	if err != nil {
		c.t.Fatal(err)
	}
	return len(names)
}

// cpu is the processor time that the child's threads have used.
func (c *child) cpu() time.Duration {
	c.t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", c.cmd.Process.Pid))
	if err != nil {
		c.t.Fatal(err)
	}
	var sum time.Duration
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			continue // the thread has ended
		}
		ns, err := strconv.ParseInt(strings.Fields(string(data))[0], 10, 64)
		if err != nil {
			c.t.Fatal(err)
		}
		sum += time.Duration(ns)
	}
	return sum
}

// A site is a CA, and agents of it as processes.
type site struct {
	t     *testing.T
	dir   string
	addr  string
	admin *grpc.ClientConn
}

func newSite(t *testing.T) *site {
	t.Helper()
	dir, err := os.MkdirTemp("", "signet")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &site{t: t, dir: dir, addr: freeAddress(t)}
	s.write("ca.yaml", fmt.Sprintf("trust_domain: example.org\nlisten: %s\ndata_dir: %s/ca\nadmin_socket: {path: %s/ca.sock}\nseal: {key_file: %s/seal.key, create: true}\naudit: {reserve_bytes: 2097152}\nlimits: {x509: {rate: -1}}\n", s.addr, dir, dir, dir))
	program(t, "signet", "ca", "run", "--config", dir+"/ca.yaml")
	if s.admin, err = grpc.NewClient("unix://"+dir+"/ca.sock", grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.admin.Close() })
	return s
}

func (s *site) write(name, text string) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// An agent is one as a process, with the socket of its workloads and the address of its metrics.
type agent struct {
	*child
	socket, metrics string
}

// agent starts one in a node group of its name, and returns when it serves.
func (s *site) agent(ctx context.Context, name, config string) *agent {
	s.t.Helper()
	token, err := adminv1.NewAdminClient(s.admin).CreateJoinToken(ctx, &adminv1.CreateJoinTokenRequest{Ttl: 600, NodeGroups: []string{name}}, grpc.WaitForReady(true))
	if err != nil {
		s.t.Fatal(err)
	}
	a := &agent{socket: filepath.Join(s.dir, name+".sock"), metrics: freeAddress(s.t)}
	s.write(name+".token", token.GetToken()+"\n")
	s.write(name+".yaml", fmt.Sprintf("trust_domain: example.org\nserver_address: %s\ndata_dir: %s/%s\nsocket_path: %s\njoin_token_file: %s/%s.token\nmetrics: {listen: %s}\n%s",
		s.addr, s.dir, name, a.socket, s.dir, name, a.metrics, config))
	a.child = program(s.t, "signet-agent", "-config", filepath.Join(s.dir, name+".yaml"))
	s.until(ctx, "agent "+name, func() bool { return a.metric(ctx, "signet_agent_revision") > 0 })
	return a
}

// until asks again and again, with pauses, until ok.
func (s *site) until(ctx context.Context, what string, ok func() bool) {
	s.t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			s.t.Fatalf("%s: %v", what, ctx.Err())
		}
	}
}

// metric returns the sum of a metric of the agent over its labels, or -1 while it does not answer.
func (a *agent) metric(ctx context.Context, name string) float64 {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+a.metrics+"/metrics", nil)
	if err != nil {
		a.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return -1
	}
	defer resp.Body.Close()
	var sum float64
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		series, value, ok := cutLast(lines.Text())
		if base, _, _ := strings.Cut(series, "{"); !ok || base != name {
			continue
		}
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			a.t.Fatal(err)
		}
		sum += v
	}
	return sum
}

// identities registers n for the group, of which the first is this process's if own.
func (s *site) identities(ctx context.Context, group string, n int, own bool, more string) {
	s.t.Helper()
	for from := 0; from < n; from += 100 {
		var docs strings.Builder
		for i := from; i < min(from+100, n); i++ {
			uid := 100_000 + i
			if i == 0 && own {
				uid = os.Getuid()
			}
			fmt.Fprintf(&docs, "---\nkind: Identity\nname: %s-%d\nspiffeID: /%s/%d\nmatch: [unix:uid:%d]\non: [node:group:%s]\n%s", group, i, group, i, uid, group, more)
		}
		if _, err := adminv1.NewAdminClient(s.admin).Apply(ctx, &adminv1.ApplyRequest{Yes: true, Documents: []*adminv1.Document{{Content: []byte(docs.String()), File: "node.yaml"}}}); err != nil {
			s.t.Fatal(err)
		}
	}
}

func dial(t testing.TB, socket string) *grpc.ClientConn {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func asWorkload(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

const audience = "measure"

// bareBeside starts a bare server that returns what the agent returns to this process.
func bareBeside(ctx context.Context, s *site, a *agent) (*child, string) {
	s.t.Helper()
	conn := dial(s.t, a.socket)
	defer conn.Close()
	api := workload.NewSpiffeWorkloadAPIClient(conn)
	inner, cancel := context.WithCancel(asWorkload(ctx))
	defer cancel()
	stream, err := api.FetchX509SVID(inner, &workload.X509SVIDRequest{})
	if err != nil {
		s.t.Fatal(err)
	}
	x, err := stream.Recv()
	if err != nil {
		s.t.Fatal(err)
	}
	j, err := api.FetchJWTSVID(inner, &workload.JWTSVIDRequest{Audience: []string{audience}})
	if err != nil {
		s.t.Fatal(err)
	}
	socket := filepath.Join(s.dir, "bare.sock")
	b := as(s.t, "bare", socket)
	for _, m := range []proto.Message{x, j} {
		raw, err := proto.Marshal(m)
		if err != nil {
			s.t.Fatal(err)
		}
		fmt.Fprintln(b.in, base64.StdEncoding.EncodeToString(raw))
	}
	b.ready()
	return b, socket
}

// TestFirstSVID: a fresh connection to its first X509-SVID, and JWT-SVIDs out of the cache.
func TestFirstSVID(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	s := newSite(t)
	a := s.agent(ctx, "first", "max_calls_per_second: -1\n")
	s.identities(ctx, "first", 1, true, "")
	_, bareSocket := bareBeside(ctx, s, a)

	for _, callers := range []int{1, 16, 64} {
		times := map[string][]time.Duration{}
		for range 5 { // in turn, so that both see the same machine
			for _, socket := range []string{a.socket, bareSocket} {
				times[socket] = append(times[socket], firsts(t, ctx, socket, callers, 400)...)
			}
		}
		for _, all := range times {
			slices.Sort(all)
		}
		at := func(socket string, q float64) time.Duration {
			return times[socket][int(q*float64(len(times[socket])-1))]
		}
		for _, q := range []float64{0.5, 0.99} {
			t.Logf("first X509-SVID, %2d callers, p%g: %v, bare %v, ratio %.2f", callers, 100*q, at(a.socket, q), at(bareSocket, q), float64(at(a.socket, q))/float64(at(bareSocket, q)))
		}
	}

	for _, callers := range []int{1, 16} {
		var ratios []float64
		var rates [2]float64
		for range 5 {
			for i, socket := range []string{a.socket, bareSocket} {
				rates[i] = tokens(t, ctx, socket, callers, 2*time.Second)
			}
			ratios = append(ratios, rates[0]/rates[1])
		}
		slices.Sort(ratios)
		t.Logf("JWT-SVIDs out of the cache, %2d callers: %.0f a second, bare %.0f, ratio %.2f (%.2f–%.2f)", callers, rates[0], rates[1], ratios[2], ratios[0], ratios[4])
	}
}

// firsts opens n connections, so many at a time, and returns how long each took to its first message.
func firsts(t *testing.T, ctx context.Context, socket string, callers, n int) []time.Duration {
	t.Helper()
	times := make([]time.Duration, n)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				began := time.Now()
				conn := dial(t, socket)
				inner, cancel := context.WithCancel(asWorkload(ctx))
				stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(inner, &workload.X509SVIDRequest{})
				if err == nil {
					_, err = stream.Recv()
				}
				times[i] = time.Since(began)
				cancel()
				conn.Close()
				if err != nil {
					t.Errorf("fetching from %s: %v", socket, err)
					return
				}
			}
		})
	}
	wg.Wait()
	return times
}

// tokens returns how many JWT-SVIDs a second the callers get, each over a connection of its own.
func tokens(t *testing.T, ctx context.Context, socket string, callers int, d time.Duration) float64 {
	t.Helper()
	ctx = asWorkload(ctx)
	var n atomic.Int64
	var wg sync.WaitGroup
	began := time.Now()
	for range callers {
		wg.Go(func() {
			conn := dial(t, socket)
			defer conn.Close()
			api := workload.NewSpiffeWorkloadAPIClient(conn)
			for time.Since(began) < d {
				if _, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{audience}}); err != nil {
					t.Errorf("fetching a JWT-SVID from %s: %v", socket, err)
					return
				}
				n.Add(1)
			}
		})
	}
	wg.Wait()
	return float64(n.Load()) / time.Since(began).Seconds()
}

// TestMemory: of idle streams beside those of a bare server, and of agents with ten and a thousand X509-SVIDs.
func TestMemory(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	s := newSite(t)
	a := s.agent(ctx, "streams", "max_streams: 12000\nmax_streams_per_uid: 12000\nmax_calls_per_second: -1\n")
	s.identities(ctx, "streams", 1, true, "")
	few := s.agent(ctx, "few", "")
	s.identities(ctx, "few", 10, false, "")
	many := s.agent(ctx, "many", "")
	s.identities(ctx, "many", 1000, false, "")
	s.until(ctx, "a thousand X509-SVIDs", func() bool { return many.metric(ctx, "signet_agent_x509_svids") == 1000 })
	b, bareSocket := bareBeside(ctx, s, a)

	agents := map[string]*child{"agent": a.child, "bare": b}
	before, beforeFDs := map[string]int{}, map[string]int{}
	rest(t, ctx)
	parts := []string{"go_memstats_heap_inuse_bytes", "go_memstats_stack_inuse_bytes", "go_goroutines"}
	beforeParts := map[string]float64{}
	for _, p := range parts {
		beforeParts[p] = a.metric(ctx, p)
	}
	for name, c := range agents {
		before[name], beforeFDs[name] = c.rss(), c.descriptors()
	}
	t.Logf("resident: an agent with 10 X509-SVIDs %.1f MiB, with 1,000 %.1f MiB; at most %.1f MiB", float64(few.rss())/1024, float64(many.rss())/1024, float64(many.status("VmHWM"))/1024)
	open := 0
	for _, n := range []int{1000, 10_000} {
		for _, socket := range []string{a.socket, bareSocket} {
			as(t, "workloads", socket, strconv.Itoa(n-open)).ready()
		}
		open = n
		rest(t, ctx)
		each := map[string]float64{}
		for name, c := range agents {
			each[name] = float64(c.rss()-before[name]) / float64(n)
		}
		for _, p := range parts {
			t.Logf("%d idle streams: %s grew by %.2f each", n, p, (a.metric(ctx, p)-beforeParts[p])/float64(n))
		}
		t.Logf("%d idle streams: %.1f KiB each, bare %.1f KiB, ratio %.2f; %.2f descriptors each, bare %.2f", n, each["agent"], each["bare"], each["agent"]/each["bare"],
			float64(a.descriptors()-beforeFDs["agent"])/float64(n), float64(b.descriptors()-beforeFDs["bare"])/float64(n))
	}
}

// rest leaves everything alone until garbage has been collected.
func rest(t *testing.T, ctx context.Context) {
	t.Helper()
	timer := time.NewTimer(settle)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		t.Fatal(ctx.Err())
	}
}

// TestCPUPerRotation: what the agent's process spends on an X509-SVID that it renews, as a multiple of making a key and a
// certificate request for it.
func TestCPUPerRotation(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	s := newSite(t)
	a := s.agent(ctx, "rotates", "")
	s.identities(ctx, "rotates", 1000, false, "x509TTL: 20s\n")
	s.until(ctx, "a thousand X509-SVIDs", func() bool { return a.metric(ctx, "signet_agent_x509_svids") == 1000 })
	unit := keyAndCSR(t)
	began, issued := a.cpu(), a.metric(ctx, "signet_agent_x509_issued_total")
	timer := time.NewTimer(time.Minute)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		t.Fatal(ctx.Err())
	}
	n := a.metric(ctx, "signet_agent_x509_issued_total") - issued
	if n < 1000 {
		t.Fatalf("only %g X509-SVIDs were renewed", n)
	}
	each := time.Duration(float64(a.cpu()-began) / n)
	unit = (unit + keyAndCSR(t)) / 2
	t.Logf("%g X509-SVIDs renewed in a minute: %v of CPU each, a key and a CSR take %v, ratio %.2f", n, each, unit, float64(each)/float64(unit))
}

// TestAThousandEntriesChangeEverySecond for twenty seconds, while a workload of one of them has a stream: it has the last
// state in the end, and the agent keeps up.
func TestAThousandEntriesChangeEverySecond(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	s := newSite(t)
	a := s.agent(ctx, "changes", "")
	const n, rounds = 1000, 20
	s.identities(ctx, "changes", n, true, "hint: begin\n")
	conn := dial(t, a.socket)
	defer conn.Close()
	stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(asWorkload(ctx), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	messages := 0
	next := func() string {
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		messages++
		return m.Svids[0].GetHint()
	}
	next()
	began, issued, tick := a.cpu(), a.metric(ctx, "signet_agent_x509_issued_total"), time.NewTicker(time.Second)
	defer tick.Stop()
	start := time.Now()
	for round := range rounds {
		<-tick.C
		s.identities(ctx, "changes", n, true, fmt.Sprintf("hint: round%d\n", round))
	}
	for next() != fmt.Sprintf("round%d", rounds-1) {
	}
	t.Logf("%d entries changed %d times in %v: %d messages to the workload, %g X509-SVIDs issued, %.0f%% of a core, resident at most %.1f MiB", n, rounds, time.Since(start).Round(time.Second),
		messages, a.metric(ctx, "signet_agent_x509_issued_total")-issued, 100*float64(a.cpu()-began)/float64(time.Since(start)), float64(a.status("VmHWM"))/1024)
}

// keyAndCSR measures the CPU of a key pair with its certificate request.
func keyAndCSR(t *testing.T) time.Duration {
	t.Helper()
	const n = 2000
	var before, after syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &before); err != nil {
		t.Fatal(err)
	}
	for range n {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &after); err != nil {
		t.Fatal(err)
	}
	of := func(u syscall.Rusage) time.Duration { return time.Duration(u.Utime.Nano() + u.Stime.Nano()) }
	return (of(after) - of(before)) / n
}

// cutLast cuts a line at its last space: labels may hold others.
func cutLast(line string) (before, after string, ok bool) {
	i := strings.LastIndexByte(line, ' ')
	if i < 0 {
		return line, "", false
	}
	return line[:i], line[i+1:], true
}
