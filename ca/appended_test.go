package ca

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/authority"
)

// A spireRoot stands for the root of a SPIRE server of the same trust domain.
type spireRoot struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newSPIRERoot(t *testing.T, change ...func(*x509.Certificate)) *spireRoot {
	t.Helper()
	k := key(t)
	now := time.Now()
	template := &x509.Certificate{SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIFFE"}},
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true, IsCA: true, URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org"}}}
	for _, c := range change {
		c(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &spireRoot{t, cert, k}
}

// svid signs an X509-SVID as a SPIRE server would.
func (r *spireRoot) svid(path string, serial *big.Int) ([][]byte, *ecdsa.PrivateKey) {
	r.t.Helper()
	k := key(r.t)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: serial, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: path}}}, r.cert, k.Public(), r.key)
	if err != nil {
		r.t.Fatal(err)
	}
	return [][]byte{der}, k
}

func spki(t *testing.T, k any) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// deniedReason returns SPIRE's reason in a refusal's details.
func deniedReason(err error) types.PermissionDeniedDetails_Reason {
	for _, d := range status.Convert(err).Details() {
		if p, ok := d.(*types.PermissionDeniedDetails); ok {
			return p.Reason
		}
	}
	return types.PermissionDeniedDetails_UNKNOWN
}

func (h *harness) bundle() *types.Bundle {
	h.t.Helper()
	b, err := bundlev1.NewBundleClient(h.dial(nil, nil)).GetBundle(h.t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		h.t.Fatal(err)
	}
	return b
}

func holdsX509(b *types.Bundle, cert *x509.Certificate) (there, tainted bool) {
	for _, x := range b.X509Authorities {
		if string(x.Asn1) == string(cert.Raw) {
			return true, x.Tainted
		}
	}
	return false, false
}

// A trust domain moves from a SPIRE server one node at a time: both roots are in the bundle here, before and after a
// restart, until the old one is revoked. Every change raises the sequence and is pushed to agents. [TDB-05]
func TestAppendedAuthoritiesAreTheMigrationPath(t *testing.T) {
	dir := t.TempDir()
	h := start(t, config(dir))
	root, jwtKey := newSPIRERoot(t), key(t)
	before := h.bundle()
	follower := hello(t, h.agent(), "", 0)
	follow(t, follower)
	client := bundlev1.NewBundleClient(h.admin)
	req := &bundlev1.AppendBundleRequest{X509Authorities: []*types.X509Certificate{{Asn1: root.cert.Raw}},
		JwtAuthorities: []*types.JWTKey{{KeyId: "spire-1", PublicKey: spki(t, jwtKey.Public())}, {KeyId: "spire-2", PublicKey: spki(t, key(t).Public()), ExpiresAt: time.Now().Add(time.Hour).Unix()}}}
	got, err := client.AppendBundle(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if there, tainted := holdsX509(got, root.cert); !there || tainted || len(got.X509Authorities) != 2 || len(got.JwtAuthorities) != 3 || got.SequenceNumber <= before.SequenceNumber {
		t.Fatalf("AppendBundle answers %v", got)
	}
	for _, j := range got.JwtAuthorities {
		if j.KeyId == "spire-1" && (j.ExpiresAt != 0 || string(j.PublicKey) != string(spki(t, jwtKey.Public()))) {
			t.Errorf("an end that was not told is shown as %d", j.ExpiresAt)
		}
	}
	if d := follow(t, follower); len(d.Bundles) != 1 || len(d.Bundles[0].X509Authorities) != 2 || len(d.Bundles[0].JwtAuthorities) != 3 {
		t.Errorf("an agent that follows is told %v", d)
	}
	// The same again changes nothing; a mask is kept to.
	again, err := client.AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{X509Authorities: req.X509Authorities, JwtAuthorities: req.JwtAuthorities, OutputMask: &types.BundleMask{SequenceNumber: true}})
	if err != nil || again.SequenceNumber != got.SequenceNumber || again.X509Authorities != nil || again.JwtAuthorities != nil || again.RefreshHint != 0 {
		t.Errorf("the same again: %v %v", again, err)
	}
	admin := adminv1.NewAdminClient(h.admin)
	list, err := admin.ListAppendedAuthorities(t.Context(), &adminv1.ListAppendedAuthoritiesRequest{})
	if err != nil || len(list.Authorities) != 3 || !strings.HasPrefix(list.Authorities[0].Source, "uid:") {
		t.Fatalf("list: %v %v", list, err)
	}
	if n := len(h.audit("authority.append")); n != 3 {
		t.Errorf("%d audit records of authority.append, want one for each of 3", n)
	}

	h.close()
	h = start(t, config(dir))
	if b := h.bundle(); b.SequenceNumber != got.SequenceNumber || len(b.X509Authorities) != 2 || len(b.JwtAuthorities) != 3 {
		t.Fatalf("after a restart: %v", b)
	}
	// Nothing is signed with it, and its pin lets nobody be fooled.
	if pins := h.ca.set.Pins(); len(pins) != 1 || pins[0] != h.ca.set.Pin() {
		t.Errorf("pins %v", pins)
	}
	if err := h.ca.Health(); err != nil {
		t.Error(err)
	}

	admin = adminv1.NewAdminClient(h.admin)
	id := fmt.Sprintf("%x", root.cert.SubjectKeyId)
	const x = adminv1.AuthorityType_AUTHORITY_TYPE_X509
	if _, err := admin.TaintAppendedAuthority(t.Context(), &adminv1.TaintAppendedAuthorityRequest{Type: x, AuthorityId: id}); err != nil {
		t.Fatal(err)
	}
	tainted := h.bundle()
	if there, is := holdsX509(tainted, root.cert); !there || !is || tainted.SequenceNumber <= got.SequenceNumber {
		t.Errorf("tainted: %v", tainted)
	}
	if _, err := admin.RevokeAppendedAuthority(t.Context(), &adminv1.RevokeAppendedAuthorityRequest{Type: x, AuthorityId: id}); err != nil {
		t.Fatal(err)
	}
	revoked := h.bundle()
	if there, _ := holdsX509(revoked, root.cert); there || revoked.SequenceNumber <= tainted.SequenceNumber {
		t.Errorf("revoked: %v", revoked)
	}
	for name, r := range map[string]*adminv1.RevokeAppendedAuthorityRequest{"again": {Type: x, AuthorityId: id}, "one of our own": {Type: x, AuthorityId: h.ca.set.Bundle().X509[0].ID},
		"of another kind": {Type: x, AuthorityId: "spire-1"}} {
		if _, err := admin.RevokeAppendedAuthority(t.Context(), r); code(err) != codes.NotFound {
			t.Errorf("revoking %s: %v", name, err)
		}
	}
	for name, r := range map[string]*adminv1.RevokeAppendedAuthorityRequest{"no type": {AuthorityId: id}, "no id": {Type: x}} {
		if _, err := admin.RevokeAppendedAuthority(t.Context(), r); code(err) != codes.InvalidArgument {
			t.Errorf("revoking with %s: %v", name, err)
		}
	}
	h.close()
	h = start(t, config(dir))
	if b := h.bundle(); b.SequenceNumber != revoked.SequenceNumber || len(b.X509Authorities) != 1 {
		t.Errorf("after the second restart: %v, want sequence %d", b, revoked.SequenceNumber)
	}
}

// Who holds an appended key can sign any ID of the trust domain. On the CA's own port that must be worth nothing.
func TestAppendedAuthorityGivesNoRightsAtTheCA(t *testing.T) {
	c := config(t.TempDir())
	c.AdminIDs = []string{"spiffe://example.org/ops"}
	h := start(t, c)
	root := newSPIRERoot(t)
	ag := h.agent()
	if _, err := agentv1.NewAgentClient(ag.conn).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr(t, ag.key)}}); err != nil {
		t.Fatal(err)
	}
	node, err := h.ca.reg.Node(ag.id)
	if err != nil {
		t.Fatal(err)
	}
	serial, _ := new(big.Int).SetString(node.Serial, 10)
	e := entry("/entry-admin", "unix:uid:1")
	e.Admin = true
	if r, err := entryv1.NewEntryClient(h.admin).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}}); err != nil || r.Results[0].Status.Code != 0 {
		t.Fatal(r, err)
	}
	renew := func(path string) error {
		chain, k := root.svid(path, serial)
		_, err := agentv1.NewAgentClient(h.dial(chain, k)).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr(t, k)}})
		return err
	}
	if err := renew(ag.id.Path()); code(err) != codes.Unavailable {
		t.Errorf("before it is appended the handshake fails: %v", err)
	}
	if _, err := bundlev1.NewBundleClient(h.admin).AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{X509Authorities: []*types.X509Certificate{{Asn1: root.cert.Raw}}}); err != nil {
		t.Fatal(err)
	}
	// A SPIRE agent that comes over is told to attest, also one that shows the ID and serial number of one of ours.
	for _, path := range []string{ag.id.Path(), "/spire/agent/x509pop/0123"} {
		if err := renew(path); code(err) != codes.PermissionDenied || deniedReason(err) != types.PermissionDeniedDetails_AGENT_NOT_ATTESTED {
			t.Errorf("agent %s with an SVID of the appended authority: %v %v", path, err, deniedReason(err))
		}
	}
	for _, path := range []string{"/ops", "/entry-admin", "/spire/server", ag.id.Path()} {
		chain, k := root.svid(path, big.NewInt(7))
		conn := h.dial(chain, k)
		if _, err := entryv1.NewEntryClient(conn).ListEntries(t.Context(), &entryv1.ListEntriesRequest{}); code(err) != codes.PermissionDenied {
			t.Errorf("ListEntries as %s with an SVID of the appended authority: %v", path, err)
		}
		if _, err := bundlev1.NewBundleClient(conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil {
			t.Errorf("GetBundle, which anyone may: %v", err)
		}
	}
	// Ours go on working.
	if _, err := agentv1.NewAgentClient(ag.conn).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr(t, ag.key)}}); err != nil {
		t.Errorf("our own agent: %v", err)
	}
}

func TestAppendBundleRefusesWhatWouldHarm(t *testing.T) {
	h := start(t, config(t.TempDir()))
	own := h.bundle()
	ownKey := h.ca.set.Bundle().X509[0].Certificate
	root := newSPIRERoot(t)
	leafChain, _ := root.svid("/web", big.NewInt(1))
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	weak, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	x := func(der []byte) *bundlev1.AppendBundleRequest {
		return &bundlev1.AppendBundleRequest{X509Authorities: []*types.X509Certificate{{Asn1: newSPIRERoot(t).cert.Raw}, {Asn1: der}}}
	}
	j := func(k *types.JWTKey) *bundlev1.AppendBundleRequest {
		return &bundlev1.AppendBundleRequest{JwtAuthorities: []*types.JWTKey{{KeyId: "good", PublicKey: spki(t, key(t).Public())}, k}}
	}
	pub := spki(t, key(t).Public())
	many := &bundlev1.AppendBundleRequest{}
	for i := range 10_000 {
		many.JwtAuthorities = append(many.JwtAuthorities, &types.JWTKey{KeyId: fmt.Sprint(i), PublicKey: pub})
	}
	for name, tt := range map[string]struct {
		req  *bundlev1.AppendBundleRequest
		want codes.Code
		text string
	}{
		"nothing":                 {&bundlev1.AppendBundleRequest{}, codes.InvalidArgument, "nothing"},
		"10,000":                  {many, codes.InvalidArgument, "64"},
		"garbage":                 {x([]byte("garbage")), codes.InvalidArgument, "x509_authorities"},
		"huge":                    {x(make([]byte, 1<<20)), codes.InvalidArgument, "bytes"},
		"a leaf":                  {x(leafChain[0]), codes.InvalidArgument, "X509-68"},
		"of another trust domain": {x(newSPIRERoot(t, func(c *x509.Certificate) { c.URIs[0].Host = "other.org" }).cert.Raw), codes.InvalidArgument, "other.org"},
		"ended": {x(newSPIRERoot(t, func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
		}).cert.Raw), codes.InvalidArgument, "ended"},
		"subject key id of ours":    {x(newSPIRERoot(t, func(c *x509.Certificate) { c.SubjectKeyId = ownKey.SubjectKeyId }).cert.Raw), codes.InvalidArgument, "own authority"},
		"tainted":                   {&bundlev1.AppendBundleRequest{X509Authorities: []*types.X509Certificate{{Asn1: root.cert.Raw, Tainted: true}}}, codes.InvalidArgument, "tainted"},
		"JWT without kid":           {j(&types.JWTKey{PublicKey: pub}), codes.InvalidArgument, "key_id"},
		"JWT kid of 256 bytes":      {j(&types.JWTKey{KeyId: strings.Repeat("k", 256), PublicKey: pub}), codes.InvalidArgument, "255"},
		"JWT garbage":               {j(&types.JWTKey{KeyId: "g", PublicKey: []byte("x")}), codes.InvalidArgument, "public key"},
		"JWT Ed25519":               {j(&types.JWTKey{KeyId: "e", PublicKey: spki(t, ed.Public())}), codes.InvalidArgument, "e"},
		"JWT P-224":                 {j(&types.JWTKey{KeyId: "p", PublicKey: spki(t, weak.Public())}), codes.InvalidArgument, "key"},
		"JWT ended":                 {j(&types.JWTKey{KeyId: "old", PublicKey: pub, ExpiresAt: 1}), codes.InvalidArgument, "ended"},
		"JWT negative end":          {j(&types.JWTKey{KeyId: "old", PublicKey: pub, ExpiresAt: -1}), codes.InvalidArgument, "negative"},
		"JWT kid of ours":           {j(&types.JWTKey{KeyId: own.JwtAuthorities[0].KeyId, PublicKey: pub}), codes.InvalidArgument, "own authority"},
		"JWT key of ours":           {j(&types.JWTKey{KeyId: "mine", PublicKey: own.JwtAuthorities[0].PublicKey}), codes.InvalidArgument, "own authority"},
		"JWT one kid for two keys":  {&bundlev1.AppendBundleRequest{JwtAuthorities: []*types.JWTKey{{KeyId: "k", PublicKey: pub}, {KeyId: "k", PublicKey: spki(t, key(t).Public())}}}, codes.InvalidArgument, "another key"},
		"WIT":                       {&bundlev1.AppendBundleRequest{WitAuthorities: []*types.WITKey{{KeyId: "w", PublicKey: pub}}}, codes.Unimplemented, "WIT"},
		"an element that is absent": {&bundlev1.AppendBundleRequest{X509Authorities: []*types.X509Certificate{nil}}, codes.InvalidArgument, "x509_authorities"},
	} {
		_, err := bundlev1.NewBundleClient(h.admin).AppendBundle(t.Context(), tt.req)
		if code(err) != tt.want || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: %v; want %v with %q", name, err, tt.want, tt.text)
		}
	}
	if b := h.bundle(); b.SequenceNumber != own.SequenceNumber || len(b.X509Authorities) != 1 || len(b.JwtAuthorities) != 1 {
		t.Errorf("after refusals: %v", b)
	}
	// What is ours already is no change and no error.
	if b, err := bundlev1.NewBundleClient(h.admin).AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{X509Authorities: own.X509Authorities, JwtAuthorities: own.JwtAuthorities}); err != nil || b.SequenceNumber != own.SequenceNumber {
		t.Errorf("our own: %v %v", b, err)
	}
	for name, conn := range map[string]bundlev1.BundleClient{"anyone": bundlev1.NewBundleClient(h.dial(nil, nil)), "an agent": bundlev1.NewBundleClient(h.agent().conn)} {
		if _, err := conn.AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{X509Authorities: []*types.X509Certificate{{Asn1: root.cert.Raw}}}); code(err) != codes.PermissionDenied {
			t.Errorf("AppendBundle by %s: %v", name, err)
		}
	}
	// The number is bounded in all, not only in one call.
	for i := range 2 {
		req := &bundlev1.AppendBundleRequest{}
		for n := range 40 {
			req.JwtAuthorities = append(req.JwtAuthorities, &types.JWTKey{KeyId: fmt.Sprint(i, n), PublicKey: spki(t, key(t).Public())})
		}
		if _, err := bundlev1.NewBundleClient(h.admin).AppendBundle(t.Context(), req); (err != nil) != (i == 1) {
			t.Errorf("call %d of 40 keys: %v", i, err)
		}
	}
}

// What ended leaves the bundle a day later, so that a clock set right again has destroyed nothing; the audit log says so.
func TestAppendedAuthorityThatEndedIsForgotten(t *testing.T) {
	var offset atomic.Int64
	c := config(t.TempDir())
	c.Now = func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	h := start(t, c)
	root := newSPIRERoot(t)
	if _, err := bundlev1.NewBundleClient(h.admin).AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{X509Authorities: []*types.X509Certificate{{Asn1: root.cert.Raw}}}); err != nil {
		t.Fatal(err)
	}
	for _, at := range []struct {
		after time.Duration
		there bool
	}{{23 * time.Hour, true}, {47 * time.Hour, true}, {49 * time.Hour, false}} {
		offset.Store(int64(at.after))
		h.ca.sweepAppended(t.Context())
		if there := slices.ContainsFunc(h.ca.set.Appended(), func(a *authority.Appended) bool { return a.Certificate.Equal(root.cert) }); there != at.there {
			t.Errorf("after %v: in the bundle %t, want %t", at.after, there, at.there)
		}
		offset.Store(0)
	}
	// The CA sweeps by itself too. Whichever of the two was first makes the record, and it alone.
	until(t, "the audit record", func() bool { return len(h.audit("authority.ended")) > 0 })
	if got := h.audit("authority.ended"); len(got) != 1 {
		t.Errorf("audit: %v", got)
	}
}
