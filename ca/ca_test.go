package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/spiffe"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(killedVariable); dir != "" {
		serveUntilKilled(dir)
	}
	goleak.VerifyTestMain(m)
}

var td = spiffeid.RequireTrustDomainFromString("example.org")

// A harness is a running CA with an admin's connection.
type harness struct {
	t     *testing.T
	dir   string
	ca    *CA
	admin *grpc.ClientConn
	stop  context.CancelFunc
	done  chan error
}

func config(dir string) Config {
	return Config{TrustDomain: "example.org", Listen: "127.0.0.1:0", DataDir: dir, AdminSocket: AdminSocket{Path: filepath.Join(dir, "admin", "ca.sock")}, Seal: Seal{KeyFile: filepath.Join(dir, "seal.key"), Create: true},
		Audit: Audit{Reserve: 1 << 20}, Limits: unlimited(), Log: slog.New(slog.DiscardHandler)}
}

// unlimited is for tests that call as often as they can from one address.
func unlimited() (l Limits) {
	l.each(func(_ string, one *Limit) { one.Rate = Unlimited })
	return l
}

func start(t *testing.T, c Config) *harness { return startWith(t, c, func(*CA) {}) }

// startWith starts a CA after a change that no configuration can make.
func startWith(t *testing.T, c Config, change func(*CA)) *harness {
	t.Helper()
	ca, err := New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	change(ca)
	h := &harness{t: t, dir: c.DataDir, ca: ca, done: make(chan error, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	h.stop = cancel
	go func() { h.done <- ca.Run(ctx) }()
	h.admin, err = grpc.NewClient("unix://"+ca.AdminSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	return h
}

func (h *harness) close() {
	if h.done == nil {
		return
	}
	h.admin.Close()
	h.stop()
	if err := <-h.done; err != nil {
		h.t.Errorf("Run: %v", err)
	}
	h.done = nil
}

func key(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func csr(t *testing.T, k crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// dial connects to the port, with a client certificate or without.
func (h *harness) dial(chain [][]byte, k crypto.PrivateKey, options ...grpc.DialOption) *grpc.ClientConn {
	h.t.Helper()
	c := &tls.Config{InsecureSkipVerify: true, Time: h.ca.c.Now, VerifyPeerCertificate: spiffe.VerifyPeer(h.ca.set, h.ca.c.Now, func(id spiffeid.ID, _ [][]*x509.Certificate) error {
		if id.String() != "spiffe://example.org/spire/server" {
			h.t.Errorf("server ID %s", id)
		}
		return nil
	})}
	if chain != nil {
		c.Certificates = []tls.Certificate{{Certificate: chain, PrivateKey: k}}
	}
	options = append([]grpc.DialOption{grpc.WithTransportCredentials(credentials.NewTLS(c)),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		})}, options...)
	conn, err := grpc.NewClient("passthrough:///"+h.ca.Addr().String(), options...)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	return conn
}

func (h *harness) token(groups ...string) string {
	h.t.Helper()
	r, err := adminv1.NewAdminClient(h.admin).CreateJoinToken(h.t.Context(), &adminv1.CreateJoinTokenRequest{NodeGroups: groups})
	if err != nil {
		h.t.Fatal(err)
	}
	return r.Token
}

func attest(ctx context.Context, conn *grpc.ClientConn, token string, csr []byte) (*types.X509SVID, error) {
	s, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	s.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &types.AttestationData{Type: "join_token", Payload: []byte(token)}, Params: &agentv1.AgentX509SVIDParams{Csr: csr}}}})
	r, err := s.Recv()
	if err != nil {
		return nil, err
	}
	return r.GetResult().Svid, nil
}

// an agent that attested.
type testAgent struct {
	id    spiffeid.ID
	key   *ecdsa.PrivateKey
	chain [][]byte
	conn  *grpc.ClientConn
}

func ids(t *testing.T, path string) spiffeid.ID {
	t.Helper()
	return spiffeid.RequireFromPath(td, path)
}

// A movedClock is a Config.Now that tests move: ahead of the machine's clock by what it was moved to.
type movedClock struct{ ahead atomic.Int64 }

func (c *movedClock) now() time.Time       { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *movedClock) move(d time.Duration) { c.ahead.Store(int64(d)) }

func (h *harness) agent(groups ...string) *testAgent {
	h.t.Helper()
	k := key(h.t)
	svid, err := attest(h.t.Context(), h.dial(nil, nil), h.token(groups...), csr(h.t, k))
	if err != nil {
		h.t.Fatal(err)
	}
	return &testAgent{spiffeid.RequireFromPath(td, svid.Id.Path), k, svid.CertChain, h.dial(svid.CertChain, k)}
}

func (h *harness) apply(docs string) *adminv1.ApplyResponse {
	h.t.Helper()
	r, err := adminv1.NewAdminClient(h.admin).Apply(h.t.Context(), &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(docs), File: "test.yaml"}}})
	if err != nil {
		h.t.Fatal(err)
	}
	return r
}

func code(err error) codes.Code { return status.Code(err) }

func TestJoinTokenSameKeyRetriesOtherKeyNever(t *testing.T) {
	h := start(t, config(t.TempDir()))
	token := h.token()
	k, other := key(t), key(t)
	anon := h.dial(nil, nil)
	first, err := attest(t.Context(), anon, token, csr(t, k))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(first.Id.Path, strings.Split(token, ".")[1]) {
		t.Error("the agent's ID holds the token's secret")
	}
	if _, err := attest(t.Context(), anon, token, csr(t, other)); code(err) != codes.InvalidArgument {
		t.Errorf("another key with a used token: %v", err)
	}
	// The reply was lost: the same key gets in again, with a new SVID that supersedes the first.
	second, err := attest(t.Context(), anon, token, csr(t, k))
	if err != nil {
		t.Fatalf("the same key again: %v", err)
	}
	renew := func(chain [][]byte) error {
		_, err := agentv1.NewAgentClient(h.dial(chain, k)).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr(t, k)}})
		return err
	}
	if err := renew(first.CertChain); code(err) != codes.PermissionDenied {
		t.Errorf("the superseded SVID: %v", err)
	}
	if err := renew(second.CertChain); err != nil {
		t.Errorf("the second SVID: %v", err)
	}
	// After the first mTLS call not even the same key comes back with the token.
	if _, err := attest(t.Context(), anon, token, csr(t, k)); code(err) != codes.InvalidArgument {
		t.Errorf("the same key after its first call: %v", err)
	}
}

func TestJoinTokenRefusals(t *testing.T) {
	h := start(t, config(t.TempDir()))
	good := strings.Split(h.token(), ".")
	anon := h.dial(nil, nil)
	for name, token := range map[string]string{
		"guessed secret": good[0] + ".aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa." + good[2],
		"unknown id":     "aaaaaaaaaaaaa." + good[1] + "." + good[2],
		"wrong pin":      good[0] + "." + good[1] + "." + strings.Repeat("0", 64),
		"garbage":        "\x00\xff",
		"no secret":      good[0],
	} {
		_, err := attest(t.Context(), anon, token, csr(t, key(t)))
		if code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v, want InvalidArgument", name, err)
		}
		if err != nil && strings.Contains(err.Error(), good[1]) {
			t.Errorf("%s: the error repeats the secret", name)
		}
	}
	if _, err := attest(t.Context(), anon, strings.Join(good[:2], "."), csr(t, key(t))); err != nil {
		t.Errorf("without a pin: %v", err)
	}
}

func TestIssueByPublicKeyAndByScope(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a, b := h.agent("backend"), h.agent()
	h.apply("kind: Identity\nname: web\nspiffeID: /web\nmatch: [\"unix:uid:1\"]\non: [\"node:group:backend\"]\n---\nkind: Identity\nname: all\nspiffeID: /all\nmatch: [\"unix:uid:2\"]\n")
	k := key(t)
	spki, _ := x509.MarshalPKIXPublicKey(k.Public())
	weak, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	weakSPKI, _ := x509.MarshalPKIXPublicKey(weak.Public())
	issue := func(ag *testAgent, items ...*nodev1.IssueX509SVIDsRequest_Item) []*nodev1.IssueX509SVIDsResponse_Result {
		r, err := nodev1.NewNodeClient(ag.conn).IssueX509SVIDs(t.Context(), &nodev1.IssueX509SVIDsRequest{Items: items})
		if err != nil {
			t.Fatal(err)
		}
		return r.Results
	}
	got := issue(a, &nodev1.IssueX509SVIDsRequest_Item{EntryId: "identity.web", PublicKey: spki}, &nodev1.IssueX509SVIDsRequest_Item{EntryId: "identity.all", PublicKey: weakSPKI},
		&nodev1.IssueX509SVIDsRequest_Item{EntryId: "identity.all", PublicKey: spki}, &nodev1.IssueX509SVIDsRequest_Item{EntryId: "nope", PublicKey: spki})
	for i, want := range []codes.Code{codes.OK, codes.InvalidArgument, codes.OK, codes.NotFound} {
		if codes.Code(got[i].Code) != want {
			t.Errorf("item %d: %v %s, want %v", i, codes.Code(got[i].Code), got[i].Message, want)
		}
	}
	leaf, err := x509.ParseCertificate(got[0].CertChain[0])
	if err != nil || leaf.URIs[0].String() != "spiffe://example.org/web" {
		t.Errorf("leaf: %v %v", leaf.URIs, err)
	}
	if r := issue(b, &nodev1.IssueX509SVIDsRequest_Item{EntryId: "identity.web", PublicKey: spki}); codes.Code(r[0].Code) != codes.NotFound {
		t.Errorf("a foreign node got an entry that is not its own: %v", r[0])
	}
	if _, err := svidv1.NewSVIDClient(b.conn).NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: "identity.web", Audience: []string{"x"}}); code(err) != codes.NotFound {
		t.Errorf("JWT-SVID of a foreign entry: %v", err)
	}
	if _, err := svidv1.NewSVIDClient(a.conn).NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: "identity.web", Audience: []string{"x"}}); err != nil {
		t.Errorf("JWT-SVID: %v", err)
	}
	// The refusal is in the audit log.
	s, err := adminv1.NewAdminClient(h.admin).SearchAudit(t.Context(), &adminv1.SearchAuditRequest{Events: []string{"x509svid.refused"}, Text: b.id.String()})
	if err != nil {
		t.Fatal(err)
	}
	rec, err := s.Recv()
	if err != nil || !strings.Contains(string(rec.GetJson()), "identity.web") {
		t.Errorf("audit of the refusal: %s %v", rec.GetJson(), err)
	}
}

func TestAuthorizationByMethod(t *testing.T) {
	h := start(t, config(t.TempDir()))
	anon, ag := h.dial(nil, nil), h.agent()
	if _, err := bundlev1.NewBundleClient(anon).GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil {
		t.Errorf("GetBundle from anyone: %v", err)
	}
	list := func(c *grpc.ClientConn) error {
		_, err := entryv1.NewEntryClient(c).ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
		return err
	}
	for name, tt := range map[string]struct {
		conn *grpc.ClientConn
		want codes.Code
	}{"anyone": {anon, codes.PermissionDenied}, "agent": {ag.conn, codes.PermissionDenied}, "admin socket": {h.admin, codes.OK}} {
		if got := code(list(tt.conn)); got != tt.want {
			t.Errorf("ListEntries by %s: %v, want %v", name, got, tt.want)
		}
	}
	if _, err := nodev1.NewNodeClient(h.admin).IssueX509SVIDs(t.Context(), &nodev1.IssueX509SVIDsRequest{}); code(err) != codes.PermissionDenied {
		t.Errorf("an admin on the socket is never an agent: %v", err)
	}
}

// follow reads until a message that is complete.
func follow(t *testing.T, s nodev1.Node_FollowClient) *nodev1.FollowResponse {
	t.Helper()
	all := &nodev1.FollowResponse{}
	for {
		m, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		all.Entries = append(all.Entries, m.Entries...)
		all.Policies = append(all.Policies, m.Policies...)
		all.Bundles = append(all.Bundles, m.Bundles...)
		all.RemovedEntryIds = append(all.RemovedEntryIds, m.RemovedEntryIds...)
		all.RemovedPolicies = append(all.RemovedPolicies, m.RemovedPolicies...)
		all.Epoch, all.From, all.To, all.Snapshot = m.Epoch, m.From, m.To, m.Snapshot
		all.Position, all.UnknownEntryPrefixes = m.Position, m.UnknownEntryPrefixes
		if m.Complete {
			return all
		}
	}
}

func hello(t *testing.T, a *testAgent, epoch string, rev int64) nodev1.Node_FollowClient {
	t.Helper()
	s, err := nodev1.NewNodeClient(a.conn).Follow(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&nodev1.FollowRequest{Message: &nodev1.FollowRequest_Hello_{Hello: &nodev1.FollowRequest_Hello{Format: 1, Epoch: epoch, Revision: rev, AgentVersion: "9.8.7"}}}); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestFollowScopeContinuationAndEnd(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a, b := h.agent("backend"), h.agent("front")
	h.apply(`
kind: Identity
name: docs
spiffeID: /docs
match: ["unix:uid:1"]
on: ["node:group:backend"]
---
kind: Identity
name: shop
spiffeID: /shop
match: ["unix:uid:1"]
on: ["node:group:front"]
---
kind: CallPolicy
name: calls
service: [/docs, /shop]
allow:
  - from: [/caller]
---
kind: CallPolicy
name: secret
service: /shop
allow:
  - from: [/vip]
`)
	sa, sb := hello(t, a, "", 0), hello(t, b, "", 0)
	ma, mb := follow(t, sa), follow(t, sb)
	if !ma.Snapshot || len(ma.Entries) != 1 || ma.Entries[0].SpiffeId != "spiffe://example.org/docs" || len(ma.Bundles) != 1 {
		t.Errorf("backend's snapshot: %v", ma)
	}
	if len(ma.Policies) != 1 || len(ma.Policies[0].Services) != 1 || ma.Policies[0].Services[0] != "spiffe://example.org/docs" {
		t.Errorf("backend's policies say more than concerns it: %v", ma.Policies)
	}
	if len(mb.Entries) != 1 || len(mb.Policies) != 2 {
		t.Errorf("front's snapshot: %v", mb)
	}
	for _, m := range []*nodev1.FollowResponse{ma} {
		if strings.Contains(m.String(), "shop") || strings.Contains(m.String(), "vip") {
			t.Error("the backend node learned of the shop")
		}
	}
	// A change arrives as a difference from what is held.
	h.apply("kind: Identity\nname: docs2\nspiffeID: /docs2\nmatch: [\"unix:uid:2\"]\non: [\"node:group:backend\"]\n")
	d := follow(t, sa)
	if d.Snapshot || d.From != ma.To || len(d.Entries) != 1 || d.Entries[0].Id != "identity.docs2" {
		t.Errorf("difference: %v", d)
	}
	// Reconnecting continues: from the newest nothing is repeated, from an older one what it lacks.
	sa.CloseSend()
	for range 2 {
		if _, err := sa.Recv(); err == nil {
			t.Fatal("the stream goes on after CloseSend")
		}
	}
	sa = hello(t, a, ma.Epoch, ma.To)
	if again := follow(t, sa); again.Snapshot || again.From != ma.To || len(again.Entries) != 1 || again.Entries[0].Id != "identity.docs2" {
		t.Errorf("continued from an older revision: %v", again)
	}
	if _, err := adminv1.NewAdminClient(h.admin).DeleteResource(t.Context(), &adminv1.DeleteResourceRequest{Kind: "Identity", Name: "docs2"}); err != nil {
		t.Fatal(err)
	}
	if gone := follow(t, sa); len(gone.RemovedEntryIds) != 1 || gone.RemovedEntryIds[0] != "identity.docs2" {
		t.Errorf("removal: %v", gone)
	}
	// A sync is answered with the revision of now although nothing changed for this agent.
	h.apply("kind: Identity\nname: shop2\nspiffeID: /shop2\nmatch: [\"unix:uid:2\"]\non: [\"node:group:front\"]\n")
	sa.Send(&nodev1.FollowRequest{Message: &nodev1.FollowRequest_Sync_{Sync: &nodev1.FollowRequest_Sync{Id: 7}}})
	m, err := sa.Recv()
	if err != nil || len(m.SyncIds) != 1 || m.SyncIds[0] != 7 || m.To <= d.To || len(m.Entries) != 0 {
		t.Errorf("sync: %v %v", m, err)
	}
	// Another epoch, or a revision of the future: a snapshot.
	for _, c := range []struct {
		epoch string
		rev   int64
	}{{"other", ma.To}, {ma.Epoch, 1 << 40}} {
		if m := follow(t, hello(t, a, c.epoch, c.rev)); !m.Snapshot {
			t.Errorf("hello(%q, %d): no snapshot", c.epoch, c.rev)
		}
	}
	// A ban ends the stream at once.
	if _, err := agentv1.NewAgentClient(h.admin).BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: &types.SPIFFEID{TrustDomain: "example.org", Path: b.id.Path()}}); err != nil {
		t.Fatal(err)
	}
	var last error
	for last == nil {
		_, last = sb.Recv()
	}
	det := status.Convert(last).Details()
	if code(last) != codes.PermissionDenied || len(det) != 1 || det[0].(*types.PermissionDeniedDetails).Reason != types.PermissionDeniedDetails_AGENT_BANNED {
		t.Errorf("after a ban: %v %v", last, det)
	}
}

func TestNothingAcknowledgedIsLostOverRestart(t *testing.T) {
	dir := t.TempDir()
	h := start(t, config(dir))
	h.apply("kind: Identity\nname: web\nspiffeID: /web\nmatch: [\"unix:uid:1\"]\n")
	a := h.agent()
	pin := h.ca.set.Pin()
	h.close()
	h = start(t, config(dir))
	if h.ca.set.Pin() != pin {
		t.Error("another authority after the restart")
	}
	if e, n, _ := h.ca.reg.Counts(); e != 1 || n != 1 {
		t.Errorf("%d entries, %d nodes; want 1, 1", e, n)
	}
	if _, err := h.ca.reg.Node(a.id); err != nil {
		t.Error(err)
	}
	c := config(dir)
	c.AdminSocket.Path = filepath.Join(t.TempDir(), "x.sock")
	if _, err := New(t.Context(), c); err == nil || !strings.Contains(err.Error(), "another CA") {
		t.Errorf("two CAs on one data directory: %v", err)
	}
}

// TestLostSealKeyIsNotReplaced: seal.create is for the first start, and stays in configurations after it.
func TestLostSealKeyIsNotReplaced(t *testing.T) {
	dir := t.TempDir()
	c := Config{TrustDomain: "example.org", Listen: "127.0.0.1:0", DataDir: dir, AdminSocket: AdminSocket{Path: filepath.Join(dir, "s")}, Seal: Seal{KeyFile: filepath.Join(dir, "seal.key"), Create: true}}
	first, err := New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_ = first.Run(ctx)
	if err := os.Rename(c.Seal.KeyFile, c.Seal.KeyFile+".lost"); err != nil {
		t.Fatal(err)
	}
	if _, err := New(t.Context(), c); err == nil || !strings.Contains(err.Error(), "put it back") {
		t.Errorf("New without the seal key: %v; want that it has to be put back", err)
	}
	if _, err := os.Stat(c.Seal.KeyFile); !os.IsNotExist(err) {
		t.Errorf("a new seal key lies where the lost one has to be put back (%v)", err)
	}
}

// TestNothingIsMadeWhenAnAddressIsTaken: a CA that cannot serve leaves nothing behind.
func TestNothingIsMadeWhenAnAddressIsTaken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dir := filepath.Join(t.TempDir(), "data")
	c := config(dir)
	c.Listen = l.Addr().String()
	c.AdminSocket.Path = filepath.Join(t.TempDir(), "x.sock")
	if _, err := New(t.Context(), c); err == nil || !strings.Contains(err.Error(), "listen:") {
		t.Errorf("New on a taken port: %v", err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("data_dir was made all the same: %v", err)
	}
}
