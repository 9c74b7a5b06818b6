package workloadapi_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi"
	"github.com/signet-id/signet/workloadapi/peer"
)

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		os.Exit(child(os.Args[1:], os.Stdin, os.Stdout))
	}
	goleak.VerifyTestMain(m)
}

// An authority is a small CA for one trust domain.
type authority struct {
	td     spiffeid.TrustDomain
	key    *ecdsa.PrivateKey
	cert   *x509.Certificate
	jwtKey *ecdsa.PrivateKey
	kid    string
}

func newAuthority(t testing.TB, td, kid string) *authority {
	t.Helper()
	a := &authority{td: spiffeid.RequireTrustDomainFromString(td), key: newKey(t), jwtKey: newKey(t), kid: kid}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: td}, URIs: []*url.URL{a.td.ID().URL()},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	a.cert = a.sign(t, tmpl, tmpl, &a.key.PublicKey)
	return a
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (a *authority) sign(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, a.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// identity issues an X509-SVID for the path.
func (a *authority) identity(t testing.TB, path string) workloadapi.Identity {
	t.Helper()
	id := spiffeid.RequireFromPath(a.td, path)
	key := newKey(t)
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<60))
	if err != nil {
		t.Fatal(err)
	}
	leaf := a.sign(t, &x509.Certificate{
		SerialNumber: serial, URIs: []*url.URL{id.URL()}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(30 * time.Minute),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}, a.cert, &key.PublicKey)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return workloadapi.Identity{ID: id, EntryID: path, Chain: leaf.Raw, Key: pkcs8, NotAfter: leaf.NotAfter}
}

// token signs claims as a JWT-SVID of this trust domain.
func (a *authority) token(claims map[string]any) (string, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: a.jwtKey, KeyID: a.kid}}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", err
	}
	return jwt.Signed(signer).Claims(claims).Serialize()
}

// An entry gives identities to the callers that it matches.
type entry struct {
	match    func(workloadapi.Caller) bool
	identity workloadapi.Identity
	pending  bool // registered, but without an SVID yet
}

func everyone(workloadapi.Caller) bool { return true }

// having matches callers with a selector.
func having(selector string) func(workloadapi.Caller) bool {
	return func(c workloadapi.Caller) bool {
		for _, s := range c.Selectors {
			if s.String() == selector {
				return true
			}
		}
		return false
	}
}

// memory is a Source that keeps everything in plain maps.
type memory struct {
	own *authority

	mu          sync.Mutex
	changed     chan struct{} // closed at each change
	err         error         // returned by everything, if set
	jwtErr      error
	entries     []entry
	x509        map[spiffeid.TrustDomain][]byte
	jwt         map[spiffeid.TrustDomain]map[string]crypto.PublicKey
	policies    *policyv1.PolicySet
	offline     time.Time
	revocations *policy.Revocations
	crls        map[spiffeid.TrustDomain][][]byte
	revision    int64
	watching    int
	handedOn    chan int64
}

func newMemory(own *authority, entries ...entry) *memory {
	return &memory{
		own: own, changed: make(chan struct{}), entries: entries, revision: 1, handedOn: make(chan int64, 1024),
		x509:     map[spiffeid.TrustDomain][]byte{own.td: own.cert.Raw},
		jwt:      map[spiffeid.TrustDomain]map[string]crypto.PublicKey{own.td: {own.kid: &own.jwtKey.PublicKey}},
		policies: &policyv1.PolicySet{Format: 1, TrustDomain: own.td.Name()},
	}
}

// change makes a change that all watchers see as one.
func (m *memory) change(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
	close(m.changed)
	m.changed = make(chan struct{})
}

func (m *memory) trust(a *authority) {
	m.change(func() {
		m.x509[a.td] = a.cert.Raw
		m.jwt[a.td] = map[string]crypto.PublicKey{a.kid: &a.jwtKey.PublicKey}
	})
}

func (m *memory) state(c workloadapi.Caller) (workloadapi.Update, <-chan struct{}, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return workloadapi.Update{}, nil, m.err
	}
	u := workloadapi.Update{
		TrustDomain: m.own.td, X509Bundles: map[spiffeid.TrustDomain][]byte{}, JWTBundles: map[spiffeid.TrustDomain]map[string]crypto.PublicKey{},
		Policies: m.policies, Revocations: m.revocations, CRLs: m.crls, Offline: m.offline, BundleRevision: m.revision,
	}
	for td, b := range m.x509 {
		u.X509Bundles[td] = b
	}
	for td, b := range m.jwt {
		u.JWTBundles[td] = b
	}
	for _, e := range m.entries {
		if e.match(c) {
			u.Entitled = true
			if !e.pending {
				u.Identities = append(u.Identities, e.identity)
			}
		}
	}
	return u, m.changed, nil
}

func (m *memory) Watch(ctx context.Context, c workloadapi.Caller) (<-chan workloadapi.Update, error) {
	u, changed, err := m.state(c)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	m.watching++
	m.mu.Unlock()
	updates := make(chan workloadapi.Update)
	go func() {
		defer close(updates)
		defer func() {
			m.mu.Lock()
			m.watching--
			m.mu.Unlock()
		}()
		out := updates
		for {
			select {
			case out <- u:
				out = nil // the reader has the newest
			case <-changed:
				var err error
				if u, changed, err = m.state(c); err != nil {
					return
				}
				out = updates
			case <-ctx.Done():
				return
			}
		}
	}()
	return updates, nil
}

func (m *memory) HandedOn(_ <-chan workloadapi.Update, revision int64) { m.handedOn <- revision }

func (m *memory) FetchJWTSVIDs(_ context.Context, c workloadapi.Caller, id spiffeid.ID, audience []string) ([]workloadapi.JWTSVID, error) {
	u, _, err := m.state(c)
	m.mu.Lock()
	jwtErr := m.jwtErr
	m.mu.Unlock()
	if err != nil || jwtErr != nil {
		return nil, errorsFirst(err, jwtErr)
	}
	var svids []workloadapi.JWTSVID
	for _, i := range u.Identities {
		if !id.IsZero() && i.ID != id {
			continue
		}
		token, err := m.own.token(map[string]any{"sub": i.ID.String(), "aud": audience, "exp": time.Now().Add(time.Minute).Unix(), "iat": time.Now().Unix()})
		if err != nil {
			return nil, err
		}
		svids = append(svids, workloadapi.JWTSVID{ID: i.ID, Token: token, Hint: i.Hint})
	}
	if len(svids) == 0 {
		return nil, workloadapi.ErrNoIdentity
	}
	return svids, nil
}

func errorsFirst(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// byState attests by effective uid and executable, and nothing else.
type byState struct{}

func (byState) Attest(_ context.Context, p *peer.Process) (workloadapi.Caller, error) {
	s, err := p.Snapshot()
	if err != nil {
		return workloadapi.Caller{}, err
	}
	return workloadapi.Caller{PID: p.PID, UID: s.EffectiveUID, GID: s.EffectiveGID, State: s, Selectors: []spiffe.Selector{
		{Type: "unix", Value: "uid:" + strconv.FormatUint(uint64(s.EffectiveUID), 10)},
		{Type: "test", Value: "inode:" + strconv.FormatUint(s.Executable.Inode, 10)},
	}}, nil
}

// A lockedBuffer is a log that can be read while it is written.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// An endpoint is a running server.
type endpoint struct {
	*workloadapi.Server
	path string
	log  *lockedBuffer
	stop func() // ends Run and waits
}

// serve starts a server for the test. Changes to the configuration come from adjust.
func serve(t testing.TB, src workloadapi.Source, adjust ...func(*workloadapi.Config)) *endpoint {
	t.Helper()
	return serveAt(t, filepath.Join(t.TempDir(), "agent.sock"), src, adjust...)
}

func serveAt(t testing.TB, path string, src workloadapi.Source, adjust ...func(*workloadapi.Config)) *endpoint {
	t.Helper()
	e := &endpoint{path: path, log: &lockedBuffer{}}
	cfg := workloadapi.Config{Source: src, Attestor: byState{}, SocketPath: path, Log: slog.New(slog.NewTextHandler(e.log, nil))}
	for _, f := range adjust {
		f(&cfg)
	}
	var err error
	if e.Server, err = workloadapi.New(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	e.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run = %v, want nil", err)
			}
		case <-time.After(30 * time.Second):
			t.Error("Run does not end with its context")
		}
	})
	t.Cleanup(e.stop)
	return e
}

// dial returns a connection to the endpoint.
func (e *endpoint) dial(t testing.TB) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+e.path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// client returns a Workload API client of the test process itself.
func (e *endpoint) client(t testing.TB) workload.SpiffeWorkloadAPIClient {
	return workload.NewSpiffeWorkloadAPIClient(e.dial(t))
}

// spiffeCtx carries the security header and a limit that only a hanging test meets.
func spiffeCtx(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

func wantCode(t testing.TB, err error, want codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != want {
		t.Fatalf("status %v (%v), want %v", status.Code(err), err, want)
	}
	for _, w := range words {
		if !strings.Contains(status.Convert(err).Message(), w) {
			t.Errorf("message %q does not say %q", status.Convert(err).Message(), w)
		}
	}
}

// childEnv makes the test binary play a workload.
const childEnv = "SIGNET_TEST_WORKLOAD"

// A workloadProcess is a child that calls the endpoint and reports each message as a line.
type workloadProcess struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines chan string
}

// startChild runs exe (a copy of the test binary) with a child command, see child.
func startChild(t testing.TB, exe string, prepare func(*exec.Cmd), args ...string) *workloadProcess {
	t.Helper()
	cmd := exec.Command(exe, args...)
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.Stderr = os.Stderr
	if prepare != nil {
		prepare(cmd)
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w := &workloadProcess{cmd: cmd, stdin: stdin, lines: make(chan string, 64)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer close(w.lines)
		scanner := bufio.NewScanner(stdout)
		for scanner.Scan() {
			w.lines <- scanner.Text()
		}
	}()
	t.Cleanup(func() {
		stdin.Close()
		cmd.Process.Kill()
		<-done
		cmd.Wait()
	})
	return w
}

func (w *workloadProcess) say(t testing.TB, line string) {
	t.Helper()
	if _, err := fmt.Fprintln(w.stdin, line); err != nil {
		t.Fatal(err)
	}
}

// next returns what the child says next; an error if it has ended or says nothing until ctx ends.
func (w *workloadProcess) next(ctx context.Context) (string, error) {
	select {
	case line, ok := <-w.lines:
		if !ok {
			return "", errors.New("the child has ended")
		}
		return line, nil
	case <-ctx.Done():
		return "", fmt.Errorf("the child says nothing: %w", ctx.Err())
	}
}

func (w *workloadProcess) want(t testing.TB, prefix string) string {
	t.Helper()
	line, err := w.next(spiffeCtx(t))
	if err != nil || !strings.HasPrefix(line, prefix) {
		t.Fatalf("the child says %q (%v), want %q", line, err, prefix)
	}
	return line
}

// within returns what comes over c. A test that waits in vain fails, and says for what.
func within[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-spiffeCtx(t).Done():
		t.Fatalf("%s did not come", what)
	}
	panic("unreachable")
}

// copyOfSelf puts a copy of the test binary where any user may run it.
func copyOfSelf(t testing.TB, name string) string {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, self, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}
