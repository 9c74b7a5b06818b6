package ca

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/internal/nodekey"
)

// until waits for something that no event announces.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick, most := time.NewTicker(5*time.Millisecond), time.NewTimer(10*time.Second)
	defer tick.Stop()
	defer most.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-most.C:
			t.Fatalf("after 10 s still not: %s", what)
		}
	}
}

// searchAudit returns the lines that a search finds, and its end.
func (h *harness) searchAudit(req *adminv1.SearchAuditRequest) (lines []string, err error) {
	h.t.Helper()
	s, err := adminv1.NewAdminClient(h.admin).SearchAudit(h.t.Context(), req)
	if err != nil {
		return nil, err
	}
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return lines, nil
		}
		if err != nil {
			return lines, err
		}
		lines = append(lines, string(r.Json))
	}
}

// heavy returns n entries below a parent, of about 36 KiB each.
func heavy(n int, parent string) (out []*types.Entry) {
	for i := range n {
		e := &types.Entry{SpiffeId: pid(fmt.Sprintf("/heavy/%d", i)), ParentId: pid(parent)}
		for j := range 9 {
			e.Selectors = append(e.Selectors, &types.Selector{Type: "unix", Value: fmt.Sprintf("path:/%d%s", j, strings.Repeat("x", 4000))})
		}
		out = append(out, e)
	}
	return out
}

func (h *harness) create(entries ...*types.Entry) {
	h.t.Helper()
	for part := range slices.Chunk(entries, 50) {
		r, err := entryv1.NewEntryClient(h.admin).BatchCreateEntry(h.t.Context(), &entryv1.BatchCreateEntryRequest{Entries: part})
		if err != nil {
			h.t.Fatal(err)
		}
		for _, x := range r.Results {
			if x.Status.Code != 0 {
				h.t.Fatal(x.Status)
			}
		}
	}
}

func TestLargeBatchesFitTheAuditLog(t *testing.T) {
	h := start(t, config(t.TempDir()))
	var batch []*types.Entry
	for i := range 999 {
		batch = append(batch, entry(fmt.Sprintf("/%s/%d", strings.Repeat("long", 50), i), "unix:uid:1"))
	}
	escaped := entry("/escaped")
	for i := range 7 {
		escaped.Selectors = append(escaped.Selectors, &types.Selector{Type: "unix", Value: fmt.Sprintf("path:/%d%s", i, strings.Repeat("\u200b", 1300))})
	}
	r, err := entryv1.NewEntryClient(h.admin).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: append(batch, escaped)})
	if err != nil {
		t.Fatal(err)
	}
	for i, x := range r.Results {
		if x.Status.Code != 0 {
			t.Fatalf("entry %d: %v", i, x.Status)
		}
	}
	for event, want := range map[string]int{"entry.create": 1000, "entry.create.begin": 1} {
		if lines, err := h.searchAudit(&adminv1.SearchAuditRequest{Events: []string{event}}); err != nil || len(lines) < want {
			t.Errorf("%s: %d records, want at least %d: %v", event, len(lines), want, err)
		}
	}
	policy := "kind: CallPolicy\nname: large\nservice: /large\nallow:\n"
	for i := range 2000 {
		policy += fmt.Sprintf("  - from: [/caller/with/a/long/name/%d]\n", i)
	}
	h.apply(policy)
	h.apply(strings.ReplaceAll(policy, "long", "longer"))
	if lines, err := h.searchAudit(&adminv1.SearchAuditRequest{Events: []string{"resource.change"}}); err != nil || len(lines) != 1 {
		t.Errorf("the change of a large policy: %d records, %v", len(lines), err)
	}
}

func TestAuditIsReadableAroundDamage(t *testing.T) {
	h := start(t, config(t.TempDir()))
	for i := range 10 {
		h.create(entry(fmt.Sprintf("/e%d", i), "unix:uid:1"))
	}
	files, err := filepath.Glob(filepath.Join(h.dir, "audit", "audit-*.jsonl"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	content, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(files[0], os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	damaged := strings.LastIndexByte(string(content)[:strings.Index(string(content), "example.org/e4")], '\n') + 1
	if _, err := f.WriteAt([]byte{'#'}, int64(damaged)); err != nil {
		t.Fatal(err)
	}
	lines, err := h.searchAudit(&adminv1.SearchAuditRequest{Events: []string{"entry.create"}})
	if len(lines) < 8 || code(err) != codes.DataLoss || !strings.Contains(err.Error(), filepath.Base(files[0])) {
		t.Errorf("%d records of a log with a damaged line, then %v; want those before and behind it, then where it is", len(lines), err)
	}
}

func TestAuditSearchIsBounded(t *testing.T) {
	h := start(t, config(t.TempDir()))
	for _, limit := range []int32{0, 10} {
		if _, err := h.searchAudit(&adminv1.SearchAuditRequest{Limit: limit, Events: make([]string, 65)}); code(err) != codes.InvalidArgument {
			t.Errorf("65 events with limit %d: %v", limit, err)
		}
	}
}

func TestOneHostileAudienceDoesNotSpoilABatch(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a := h.agent()
	h.create(&types.Entry{Id: "web", SpiffeId: pid("/web"), ParentId: pid(a.id.Path()), Selectors: sels("unix:uid:1")})
	hostile := slices.Repeat([]string{strings.Repeat("\x01", 2048)}, 16)
	r, err := nodev1.NewNodeClient(a.conn).IssueJWTSVIDs(t.Context(), &nodev1.IssueJWTSVIDsRequest{Items: []*nodev1.IssueJWTSVIDsRequest_Item{
		{EntryId: "web", Audience: hostile}, {EntryId: "web", Audience: []string{"db"}}}})
	if err != nil {
		t.Fatal(err)
	}
	if r.Results[0].Code != int32(codes.InvalidArgument) || r.Results[1].Token == "" {
		t.Errorf("hostile item: %d %s; good item: %d %s", r.Results[0].Code, r.Results[0].Message, r.Results[1].Code, r.Results[1].Message)
	}
}

func TestFollowStreamsThatNobodyReads(t *testing.T) {
	h := start(t, config(t.TempDir()))
	k := key(t)
	svid, err := attest(t.Context(), h.dial(nil, nil), h.token(), csr(t, k))
	if err != nil {
		t.Fatal(err)
	}
	h.create(heavy(130, svid.Id.Path)...)
	const streams, window = 20, 1 << 16 // a fixed window: gRPC buffers no more than that for who does not read
	for n := range streams {
		a := &testAgent{key: k, conn: h.dial(svid.CertChain, k, grpc.WithInitialWindowSize(window), grpc.WithInitialConnWindowSize(window))}
		s := hello(t, a, "", 0)
		if _, err := s.Recv(); err != nil { // begun, and no further
			t.Fatalf("stream %d: %v", n, err)
		}
		until(t, "only the newest stream of the agent is left", func() bool { return h.ca.reg.Followers() == 1 })
	}
}

func TestHostileAgentVersionDoesNotBreakTheStatus(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a := h.agent()
	s, err := nodev1.NewNodeClient(a.conn).Follow(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.Send(&nodev1.FollowRequest{Message: &nodev1.FollowRequest_Hello_{Hello: &nodev1.FollowRequest_Hello{Format: 1, AgentVersion: strings.Repeat("v", 63) + "ü"}}})
	follow(t, s)
	if st, err := adminv1.NewAdminClient(h.admin).ListAgentStatus(t.Context(), &adminv1.ListAgentStatusRequest{}); err != nil || !st.Agents[0].Connected {
		t.Errorf("status: %v %v", st, err)
	}
}

func TestLargeDifferencesComeInParts(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a := h.agent("backend")
	h.create(heavy(150, "/late")...)
	s := hello(t, a, "", 0)
	follow(t, s)
	h.create(&types.Entry{SpiffeId: pid("/late"), ParentId: pid("/spire/server"), Selectors: sels("node:group:backend")})
	held := 0
	for {
		m, err := s.Recv()
		if err != nil {
			t.Fatalf("after %d entries: %v", held, err)
		}
		if n := proto.Size(m); n > 3<<20 {
			t.Errorf("a message of %d bytes", n)
		}
		if held += len(m.Entries); m.Complete {
			break
		}
	}
	if held != 150 {
		t.Errorf("%d entries arrived, want 150", held)
	}
}

func TestAdminStreamEndsWithItsRights(t *testing.T) {
	h := start(t, config(t.TempDir()))
	h.apply("kind: Identity\nname: ops\nspiffeID: /ops\nmatch: [\"unix:uid:1\"]\nadmin: true\n")
	k := key(t)
	ops, _ := url.Parse("spiffe://example.org/ops")
	req, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{ops}}, k)
	if err != nil {
		t.Fatal(err)
	}
	minted, err := svidv1.NewSVIDClient(h.admin).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: req})
	if err != nil {
		t.Fatal(err)
	}
	s, err := adminv1.NewAdminClient(h.dial(minted.Svid.CertChain, k)).SearchAudit(t.Context(), &adminv1.SearchAuditRequest{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	if _, err := adminv1.NewAdminClient(h.admin).DeleteResource(t.Context(), &adminv1.DeleteResourceRequest{Kind: "Identity", Name: "ops"}); err != nil {
		t.Fatal(err)
	}
	h.create(entry("/after", "unix:uid:1"))
	for {
		r, err := s.Recv()
		if err != nil {
			if code(err) != codes.PermissionDenied {
				t.Errorf("the stream of a former admin ended with %v", err)
			}
			return
		}
		if strings.Contains(string(r.Json), "/after") {
			t.Fatal("a former admin still reads the audit log")
		}
	}
}

func TestLocalAdminRemovedByReload(t *testing.T) {
	c := config(t.TempDir())
	c.AdminSocket.UIDs = []uint32{4711}
	h := start(t, c)
	call := func() error {
		ctx := peer.NewContext(t.Context(), &peer.Peer{AuthInfo: access.LocalInfo{UID: 4711, GID: 4711}})
		_, err := h.ca.guard.Unary(ctx, nil, &grpc.UnaryServerInfo{FullMethod: entryv1.Entry_ListEntries_FullMethodName},
			func(context.Context, any) (any, error) { return nil, nil })
		return err
	}
	if err := call(); err != nil {
		t.Errorf("while configured: %v", err)
	}
	c.AdminSocket.UIDs = nil
	if rest, err := h.ca.Reload(c); err != nil || len(rest) != 0 {
		t.Fatal(rest, err)
	}
	if err := call(); code(err) != codes.PermissionDenied {
		t.Errorf("over the connection that was open when the uid was removed: %v", err)
	}
}

func TestForeignAdmin(t *testing.T) {
	c := config(t.TempDir())
	c.AdminIDs = []string{"spiffe://partner.example/ops"}
	h := start(t, c)
	root, rootKey := foreignRoot(t, "partner.example")
	dial := func(id string) error {
		k := key(t)
		u, _ := url.Parse(id)
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(2), URIs: []*url.URL{u}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true}, root, k.Public(), rootKey)
		if err != nil {
			t.Fatal(err)
		}
		_, err = entryv1.NewEntryClient(h.dial([][]byte{der}, k)).ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
		return err
	}
	if dial("spiffe://partner.example/ops") == nil {
		t.Error("an admin of a trust domain that is not federated was let in")
	}
	r, err := bundlev1.NewBundleClient(h.admin).BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{
		{TrustDomain: "partner.example", X509Authorities: []*types.X509Certificate{{Asn1: root.Raw}}}}})
	if err != nil || r.Results[0].Status.Code != 0 {
		t.Fatal(r, err)
	}
	if err := dial("spiffe://partner.example/ops"); err != nil {
		t.Errorf("an admin that admin_ids names, of a federated trust domain: %v", err)
	}
	for _, id := range []string{"spiffe://partner.example/other", "spiffe://example.org/ops", "spiffe://example.org/spire/server"} {
		if dial(id) == nil {
			t.Errorf("%s, signed by the partner, was let in", id)
		}
	}
}

func TestChallengeWithoutAnswer(t *testing.T) {
	h := start(t, config(t.TempDir()))
	s, err := agentv1.NewAgentClient(h.dial(nil, nil)).AttestAgent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &types.AttestationData{Type: nodekey.Attestor, Payload: []byte("spiffe://example.org/spire/agent/join_token/x")}, Params: &agentv1.AgentX509SVIDParams{Csr: csr(t, key(t))}}}})
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	s.CloseSend()
	if _, err := s.Recv(); code(err) != codes.InvalidArgument {
		t.Errorf("an anonymous caller that hangs up made an %v", err)
	}
}

func TestX509_49_MintRefusesAnEmptyFragment(t *testing.T) {
	h := start(t, config(t.TempDir()))
	for _, id := range []string{"spiffe://example.org/w", "spiffe://example.org/w#"} {
		san, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(id)}})
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: san}}}, key(t))
		if err != nil {
			t.Fatal(err)
		}
		_, err = svidv1.NewSVIDClient(h.admin).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: der})
		if want := map[bool]codes.Code{true: codes.InvalidArgument, false: codes.OK}[strings.HasSuffix(id, "#")]; code(err) != want {
			t.Errorf("CSR for %q: %v, want %v", id, err, want)
		}
	}
}

// TestSharedDirectoryKeepsItsGroup needs root to see a difference.
func TestSharedDirectoryKeepsItsGroup(t *testing.T) {
	shared := t.TempDir()
	gid := os.Getegid()
	if os.Geteuid() == 0 {
		gid = 4711
	}
	c := config(t.TempDir())
	c.AdminSocket = AdminSocket{Path: filepath.Join(shared, "ca.sock"), Group: fmt.Sprint(gid)}
	group := func(path string) uint32 {
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return st.Sys().(*syscall.Stat_t).Gid
	}
	before := group(shared)
	start(t, c)
	if got := group(shared); got != before {
		t.Errorf("a directory that was there has group %d now, had %d", got, before)
	}
	if got := group(c.AdminSocket.Path); got != uint32(gid) {
		t.Errorf("the socket has group %d, want %d", got, gid)
	}
}

func TestLifetimesAreCheckedBeforeAnythingIsStarted(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"ttl.agent":                func(c *Config) { c.TTL.Agent = 48 * time.Hour },
		"ttl.x509":                 func(c *Config) { c.TTL.X509 = -time.Minute },
		"ttl.jwt":                  func(c *Config) { c.TTL.JWT = 2 * time.Hour },
		"ttl.max_x509":             func(c *Config) { c.TTL.MaxX509, c.Authorities.X509Lifetime = 48*time.Hour, 24*time.Hour },
		"authorities.jwt_lifetime": func(c *Config) { c.Authorities.JWTLifetime = -1 },
		"authorities.refresh_hint": func(c *Config) { c.Authorities.RefreshHint = time.Millisecond },
		"audit":                    func(c *Config) { c.Audit.Reserve = -1 },
	} {
		dir := filepath.Join(t.TempDir(), "data")
		c := config(dir)
		change(&c)
		if err := c.Check(); err == nil || !strings.Contains(err.Error(), name+": ") {
			t.Errorf("%s: %v", name, err)
		}
		if ca, err := New(t.Context(), c); err == nil {
			ca.Close()
			t.Errorf("%s: started", name)
		}
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: data_dir was made: %v", name, err)
		}
	}
}

func TestPagesOfLargeItemsFitAMessage(t *testing.T) {
	h := start(t, config(t.TempDir()))
	const n = 130
	h.create(heavy(n, "/node")...)
	var got []string
	for token := ""; ; {
		r, err := entryv1.NewEntryClient(h.admin).ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 1000, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range r.Entries {
			got = append(got, e.Id)
		}
		if token = r.NextPageToken; token == "" {
			break
		}
	}
	slices.Sort(got)
	if got = slices.Compact(got); len(got) != n {
		t.Errorf("%d different entries in all pages, want %d", len(got), n)
	}
	rules := ""
	for i := range 2000 {
		rules += fmt.Sprintf("  - from: [/caller/with/a/long/name/%d]\n", i)
	}
	const policies = 50
	for i := range policies {
		h.apply(fmt.Sprintf("kind: CallPolicy\nname: p%d\nservice: /s%d\nallow:\n%s", i, i, rules))
	}
	names := map[string]bool{}
	for token := ""; ; {
		r, err := adminv1.NewAdminClient(h.admin).GetResources(t.Context(), &adminv1.GetResourcesRequest{Kind: "CallPolicy", PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range r.Resources {
			names[x.Name] = true
		}
		if token = r.NextPageToken; token == "" {
			break
		}
	}
	if len(names) != policies {
		t.Errorf("%d policies in all pages, want %d", len(names), policies)
	}
}

// TestReplyToAttestationLostAtAnyByte cuts the connection after so many bytes of what the CA says.
func TestReplyToAttestationLostAtAnyByte(t *testing.T) {
	h := start(t, config(t.TempDir()))
	lost := 0
	const step, most = 61, 6000
	for n := 0; n < most; n += step {
		token, k := h.token(), key(t)
		request := csr(t, k)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		cut := h.dial(nil, nil, grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
			return &cutConn{Conn: c, left: n}, err
		}))
		_, err := attest(ctx, cut, token, request)
		cancel()
		cut.Close()
		if err != nil {
			lost++
		}
		whole := h.dial(nil, nil)
		svid, again := attest(t.Context(), whole, token, request)
		if again != nil {
			t.Fatalf("the same key after %d bytes of the reply (%v): %v", n, err, again)
		}
		if _, err := attest(t.Context(), whole, token, csr(t, key(t))); err == nil {
			t.Fatalf("another key got in after the reply was cut at %d bytes", n)
		}
		whole.Close() // so many connections are more than one address may have open
		a := h.dial(svid.CertChain, k)
		if _, err := agentv1.NewAgentClient(a).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: request}}); err != nil {
			t.Fatalf("using the SVID that came after the cut at %d bytes: %v", n, err)
		}
		if _, err := attest(t.Context(), h.dial(nil, nil), token, request); err == nil {
			t.Fatalf("after its first use the token is good for another SVID, cut at %d bytes", n)
		}
	}
	if lost == 0 || lost*step >= most {
		t.Errorf("%d of %d replies were lost: the cuts do not span the reply", lost, most/step+1)
	}
}

// cutConn closes after so many bytes have been read.
type cutConn struct {
	net.Conn
	left int
}

func (c *cutConn) Read(b []byte) (int, error) {
	if c.left == 0 {
		c.Close()
		return 0, io.ErrUnexpectedEOF
	}
	n, err := c.Conn.Read(b[:min(len(b), c.left)])
	c.left -= n
	return n, err
}

// TestRefusalsAreLoggedWhateverTheyAreFor: a node that was stolen does not keep its attempts out of the audit log, by
// a request of which the refusal is larger than a record may be.
func TestRefusalsAreLoggedWhateverTheyAreFor(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a := h.join()
	h.create(under(a.ID.Path(), "own", "/own", "unix:uid:1"))
	uri, err := asn1.Marshal(asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(strings.Repeat("\x01", 15000))})
	if err != nil {
		t.Fatal(err)
	}
	san, err := asn1.Marshal(asn1.RawValue{Class: asn1.ClassUniversal, Tag: asn1.TagSequence, IsCompound: true, Bytes: uri})
	if err != nil {
		t.Fatal(err)
	}
	monster, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: san}}}, key(t))
	if err != nil {
		t.Fatal(err)
	}
	r, err := a.SVIDAPI().BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: "foreign", Csr: csr(t, key(t))}, {EntryId: "own", Csr: monster}}})
	if err != nil {
		t.Fatal(err)
	}
	for i, x := range r.Results {
		if x.Status.Code == 0 || len(x.Status.Message) > 4096 {
			t.Errorf("item %d: code %d, %d bytes of message", i, x.Status.Code, len(x.Status.Message))
		}
	}
	if n := len(h.audit("x509svid.refused")); n != 2 {
		t.Errorf("%d refusals are in the audit log, want 2", n)
	}
}
