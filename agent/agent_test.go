package agent

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent/internal/faultca"
	"github.com/signet-id/signet/agent/nodeattest"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	endpoint "github.com/signet-id/signet/workloadapi"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A logWatch keeps the log and lets tests wait for a line of it.
type logWatch struct {
	mu    sync.Mutex
	text  bytes.Buffer
	lines chan string
}

func (l *logWatch) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Write(p)
	select {
	case l.lines <- string(p):
	default: // nobody waits that far behind
	}
	return len(p), nil
}

func (l *logWatch) await(t *testing.T, part string) string {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		select {
		case line := <-l.lines:
			if strings.Contains(line, part) {
				return line
			}
		case <-timeout:
			l.mu.Lock()
			defer l.mu.Unlock()
			t.Fatalf("%q was not logged; the log is:\n%s", part, l.text.String())
		}
	}
}

// A rig is an agent's configuration with its log.
type rig struct {
	t      *testing.T
	ca     *faultca.CA
	config Config
	log    *logWatch
}

func newRig(t *testing.T) *rig {
	t.Helper()
	ca := faultca.Start(t, "/spire/server")
	l := &logWatch{lines: make(chan string, 1000)}
	dir := t.TempDir()
	return &rig{t: t, ca: ca, log: l, config: Config{
		TrustDomain: "example.org", ServerAddress: ca.Addr, DataDir: filepath.Join(dir, "data"), SocketPath: filepath.Join(dir, "a.sock"),
		JoinToken: nodeattest.Secret("n1.verysecret." + ca.Pin()), Log: slog.New(slog.NewTextHandler(l, nil)),
	}}
}

// run starts an agent; the returned function ends it.
func (r *rig) run() (*Agent, func()) {
	r.t.Helper()
	a, err := New(r.config)
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	var once sync.Once
	stop := func() {
		once.Do(func() {
			began := time.Now()
			cancel()
			if err := <-done; err != nil {
				r.t.Errorf("Run: %v", err)
			}
			if took := time.Since(began); took > 10*time.Second {
				r.t.Errorf("the agent took %s to stop", took)
			}
		})
	}
	r.t.Cleanup(stop)
	return a, stop
}

func (r *rig) ready(a *Agent) {
	r.t.Helper()
	select {
	case <-a.Synced():
	case <-time.After(20 * time.Second):
		r.t.Fatalf("the agent is not in sync: %+v", a.Status())
	}
}

func TestAttestsOnceAndComesBackByItself(t *testing.T) {
	r := newRig(t)
	var mu sync.Mutex
	attested := 0
	r.ca.Attest = func(token string, _ *ecdsa.PublicKey) error {
		mu.Lock()
		defer mu.Unlock()
		if attested++; attested > 1 {
			t.Error("the agent attested again")
		}
		if !strings.HasPrefix(token, "n1.verysecret.") {
			t.Error("the payload is not the token")
		}
		return nil
	}
	a, stop := r.run()
	r.ready(a)
	r.log.await(t, "in sync")
	if s := a.Status(); s.ID.Path() != faultca.AgentPath || s.Revision != 1 || !s.Serving || s.NotAfter.Before(time.Now()) {
		t.Errorf("Status = %+v", s)
	}
	for _, name := range []string{"node.json"} {
		info, err := os.Stat(filepath.Join(r.config.DataDir, name))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v; want mode 0600", name, info, err)
		}
	}
	if _, err := os.Stat(filepath.Join(r.config.DataDir, "attest.key")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the pending key is left: %v", err)
	}
	stop()
	again, _ := r.run()
	r.ready(again)
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	if strings.Contains(r.log.text.String(), "verysecret") {
		t.Error("the join token is in the log")
	}
}

func TestLostReplySameKeyGetsIn(t *testing.T) {
	r := newRig(t)
	keys := make(chan *ecdsa.PublicKey, 10)
	r.ca.Lose = true
	r.ca.Attest = func(_ string, key *ecdsa.PublicKey) error {
		keys <- key
		return nil
	}
	_, stop := r.run()
	first := <-keys
	r.log.await(t, "not attested yet")
	stop() // also over a restart
	r.ca.Lock()
	r.ca.Lose = false
	r.ca.Unlock()
	a, _ := r.run()
	r.ready(a)
	for len(keys) > 0 {
		if !first.Equal(<-keys) {
			t.Error("the second attempt came with another key")
		}
	}
}

func TestBannedAgentStaysUpAndComesBack(t *testing.T) {
	r := newRig(t)
	r.ca.Follow = func(nodev1.Node_FollowServer, string) error {
		return faultca.Denied(types.PermissionDeniedDetails_AGENT_BANNED)
	}
	a, _ := r.run()
	r.log.await(t, "this agent is banned")
	if s := a.Status(); s.State != Banned || s.Detail == "" || s.Connected {
		t.Errorf("Status = %+v, want banned", s)
	}
	client, err := workloadapi.New(t.Context(), workloadapi.WithAddr(a.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.FetchX509Context(t.Context()); status.Code(err) != codes.Unavailable {
		t.Errorf("a workload of a banned agent that has nothing: %v, want Unavailable", err)
	}
}

func TestRefusedAgentComesBackWithAFreshToken(t *testing.T) {
	r := newRig(t)
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(string(r.config.JoinToken)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.config.JoinToken, r.config.JoinTokenFile = "", file
	tokens := make(chan string, 10)
	r.ca.Attest = func(token string, _ *ecdsa.PublicKey) error {
		tokens <- token
		return nil
	}
	r.ca.Follow = func(nodev1.Node_FollowServer, string) error {
		return faultca.Denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	}
	a, _ := r.run()
	<-tokens
	line := r.log.await(t, "cannot attest again by itself")
	if !strings.Contains(line, "signet token create") || a.Status().State != Refused {
		t.Errorf("state %s, log %q; want a hint", a.Status().State, line)
	}
	r.ca.Lock()
	r.ca.Follow = nil
	r.ca.Attest = func(token string, _ *ecdsa.PublicKey) error {
		tokens <- token
		return nil
	}
	r.ca.Unlock()
	if err := os.WriteFile(file, []byte("n2.fresh."+r.ca.Pin()), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Reload(r.config); err != nil { // wakes it
		t.Fatal(err)
	}
	r.ready(a)
	if n := len(tokens); n > 1 {
		t.Errorf("%d attestations with one fresh token", n)
	}
}

func TestRenewsAtHalfLifeAndPersistsFirst(t *testing.T) {
	r := newRig(t)
	r.ca.AgentTTL = 4 * time.Second
	serials := make(chan string, 100)
	r.ca.Follow = func(s nodev1.Node_FollowServer, serial string) error {
		// With its first use the CA forgets the old SVID: the new one must be on disk by now.
		dir := &nodeDir{path: r.config.DataDir, td: r.ca.TrustDomain}
		if record, err := dir.load(); err != nil || record.svid.Certificates[0].SerialNumber.String() != serial {
			t.Errorf("serial %s is used and not on disk: %v", serial, err)
		}
		serials <- serial
		return r.ca.Answer(s)
	}
	r.run()
	seen := make(map[string]bool)
	for range 3 {
		select {
		case s := <-serials:
			if seen[s] {
				t.Errorf("serial %s came back", s)
			}
			seen[s] = true
		case <-time.After(20 * time.Second):
			t.Fatal("the SVID was not renewed")
		}
	}
}

func TestRefusesToStart(t *testing.T) {
	tests := []struct {
		name   string
		change func(*rig)
		want   string
	}{
		{name: "nothing to attest with", change: func(r *rig) { r.config.JoinToken = "" }, want: "join_token: missing"},
		{name: "a data directory for everybody", change: func(r *rig) {
			if err := os.Mkdir(r.config.DataDir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(r.config.DataDir, 0o755); err != nil {
				t.Fatal(err)
			}
		}, want: "data_dir: "},
		{name: "nothing verifies the CA", change: func(r *rig) { r.config.JoinToken = "plain" }, want: "no authority pin"},
		{name: "metrics on a taken port", change: func(r *rig) { r.config.Metrics.Listen = r.ca.Addr }, want: "metrics.listen: "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t)
			tt.change(r)
			a, err := New(r.config)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("New: %v, want %q", err, tt.want)
			}
			if err == nil {
				if err := a.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	r := newRig(t)
	a, _ := r.run()
	r.ready(a)
	second := r.config
	second.SocketPath += "2"
	if _, err := New(second); err == nil || !strings.Contains(err.Error(), "in use by another agent") {
		t.Errorf("two agents on one data directory: %v", err)
	}
	// One of its own trust domain may wait to take over from it, one of another may not.
	if used, err := second.DataDirInUse(); !used || err != nil {
		t.Errorf("the data directory is in use: %t, %v", used, err)
	}
	second.TrustDomain = "other.example"
	if _, err := second.DataDirInUse(); err == nil || !strings.Contains(err.Error(), `in use by an agent of the trust domain "example.org"; give this one, of "other.example", a data_dir`) {
		t.Errorf("for an agent of another trust domain: %v", err)
	}
}

func TestBrokenRecordIsSetAside(t *testing.T) {
	r := newRig(t)
	if err := os.Mkdir(r.config.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(r.config.DataDir, "node.json")
	if err := os.WriteFile(path, []byte(`{"v":99}`), 0o600); err != nil {
		t.Fatal(err)
	}
	a, _ := r.run()
	r.ready(a)
	kept, err := os.ReadFile(path + ".refused")
	if err != nil || string(kept) != `{"v":99}` {
		t.Errorf("what was set aside is %q, %v", kept, err)
	}
}

// What enforcement points are told when the CA is lost: policy/source denies by it after max_offline. [DESIGN §7]
func TestLossOfTheCAIsToldWithItsTime(t *testing.T) {
	r := newRig(t)
	a, _ := r.run()
	r.ready(a)
	r.log.await(t, "in sync with the CA")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	updates, err := a.cache.Watch(ctx, endpoint.Caller{PID: 1, UID: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		cancel()
		for range updates { // until the cache has let go
		}
	}()
	next := func() endpoint.Update {
		t.Helper()
		select {
		case u := <-updates:
			return u
		case <-time.After(20 * time.Second):
			t.Fatal("no update came")
			return endpoint.Update{}
		}
	}
	if u := next(); !u.Offline.IsZero() {
		t.Errorf("in contact, and offline since %s", u.Offline)
	}
	before := time.Now()
	r.ca.Stop()
	if u := next(); u.Offline.Before(before) || u.Offline.After(time.Now()) {
		t.Errorf("the CA was lost after %s, and the agent is offline since %s", before, u.Offline)
	}
}

func TestMetricsLiveReady(t *testing.T) {
	r := newRig(t)
	r.config.Metrics.Listen = "127.0.0.1:0"
	hold := make(chan struct{})
	r.ca.Follow = func(s nodev1.Node_FollowServer, _ string) error {
		select {
		case <-hold:
			return r.ca.Answer(s)
		case <-s.Context().Done():
			return nil
		}
	}
	a, _ := r.run()
	get := func(path string) (int, string) {
		t.Helper()
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		response, err := client.Get("http://" + a.MetricsAddr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if err != nil {
			t.Fatal(err)
		}
		return response.StatusCode, string(body)
	}
	if code, _ := get("/live"); code != http.StatusOK {
		t.Errorf("/live = %d", code)
	}
	if code, body := get("/ready"); code != http.StatusServiceUnavailable || !strings.Contains(body, "ca: ") {
		t.Errorf("/ready before the first state = %d %q", code, body)
	}
	close(hold)
	r.ready(a)
	if code, body := get("/ready"); code != http.StatusOK {
		t.Errorf("/ready = %d %q", code, body)
	}
	_, body := get("/metrics")
	for _, want := range []string{"signet_agent_revision 1", "signet_agent_entries 0", `signet_agent_x509_svids{left="expired"} 0`, "signet_agent_svid_not_after_seconds"} {
		if !strings.Contains(body, want) {
			t.Errorf("/metrics lacks %q", want)
		}
	}
	if strings.Contains(body, "spiffe://") {
		t.Error("/metrics holds a SPIFFE ID")
	}
}

func TestReload(t *testing.T) {
	r := newRig(t)
	a, _ := r.run()
	next := r.config
	next.Logging.Level, next.MaxPrefetch, next.SocketPath = "debug", 7, r.config.SocketPath+"x"
	names, err := a.Reload(next)
	if err != nil || strings.Join(names, " ") != "socket_path max_prefetch" {
		t.Errorf("Reload = %q, %v; want the names of what needs a restart", names, err)
	}
	if a.level.Level() != slog.LevelDebug {
		t.Errorf("the level is %s after the reload", a.level.Level())
	}
	next.TrustDomain = ""
	if _, err := a.Reload(next); err == nil {
		t.Error("a broken configuration was taken over")
	}
}

func TestHalfLife(t *testing.T) {
	now := time.Now()
	for _, tt := range []struct {
		name     string
		from, to time.Duration // the certificate's, from now
		lo, hi   time.Duration // the moment's
	}{
		{"an hour", -30 * time.Second, time.Hour, 27 * time.Minute, 33*time.Minute + time.Second},
		{"a short life does not begin half over", -30 * time.Second, 10 * time.Second, 4 * time.Second, 6 * time.Second},
		{"from the future", time.Hour, 2 * time.Hour, 87 * time.Minute, 93*time.Minute + time.Second},
		{"over", -2 * time.Hour, -time.Hour, -93 * time.Minute, -87*time.Minute + time.Second},
	} {
		for range 100 {
			cert := &x509.Certificate{NotBefore: now.Add(tt.from), NotAfter: now.Add(tt.to)}
			if d := halfLife(cert, now).Sub(now); d < tt.lo || d > tt.hi {
				t.Errorf("%s: %s from now, want between %s and %s", tt.name, d, tt.lo, tt.hi)
			}
		}
	}
}
