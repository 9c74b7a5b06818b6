package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/test/spireclient"
)

// What SPIRE's agents ask the CA to sign, over the real port. [SPIRE-PROTOCOL §6, §7, §17.4, §17.7]

func requestFor(t *testing.T, k crypto.Signer, template *x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, k)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func uri(t *testing.T, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func (h *harness) batch(a *spireclient.Agent, params ...*svidv1.NewX509SVIDParams) []*svidv1.BatchNewX509SVIDResponse_Result {
	h.t.Helper()
	r, err := a.SVIDAPI().BatchNewX509SVID(h.t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: params})
	if err != nil {
		h.t.Fatal(err)
	}
	if len(r.Results) != len(params) {
		h.t.Fatalf("%d results for %d items", len(r.Results), len(params))
	}
	for i, x := range r.Results {
		if x.Status == nil || (x.Status.Code == 0) != (x.Svid != nil) {
			h.t.Fatalf("result %d: status %v, svid %t", i, x.Status, x.Svid != nil)
		}
	}
	return r.Results
}

func TestSPIREBatchNewX509SVID(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a, b := h.join(), h.join()
	web := under(a.ID.Path(), "web", "/web", "unix:uid:1")
	web.DnsNames, web.X509SvidTtl = []string{"web.internal", "*.web.internal"}, 600
	h.create(web, under(a.ID.Path(), "db", "/db", "unix:uid:2"), under(b.ID.Path(), "foreign", "/foreign", "unix:uid:3"))
	mustSync(t, a)
	results, err := a.X509SVIDs(t.Context(), "web", "foreign", "db", "nobody")
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []codes.Code{codes.OK, codes.NotFound, codes.OK, codes.NotFound} {
		if st := results[i].Status; codes.Code(st.Code) != want || want == codes.NotFound && st.Message != "entry not found or not authorized" {
			t.Errorf("result %d: %v, want %v", i, st, want)
		}
	}
	svid := results[0].Svid
	leaf, err := x509.ParseCertificate(svid.CertChain[0])
	if err != nil {
		t.Fatal(err)
	}
	if id, err := spiffe.CheckX509SVIDLeaf(leaf); err != nil || id.String() != "spiffe://example.org/web" || svid.Id.TrustDomain != "example.org" || svid.Id.Path != "/web" {
		t.Errorf("ID in the SVID %v (%v), beside it %v", id, err, svid.Id)
	}
	if !slices.Equal(leaf.DNSNames, web.DnsNames) {
		t.Errorf("DNS names %v, want %v", leaf.DNSNames, web.DnsNames)
	}
	if svid.ExpiresAt != leaf.NotAfter.Unix() || time.Until(leaf.NotAfter).Round(time.Minute) != 10*time.Minute || !leaf.NotBefore.Before(time.Now().Add(-10*time.Second)) {
		t.Errorf("valid from %v to %v, expires_at %d", leaf.NotBefore, leaf.NotAfter, svid.ExpiresAt)
	}
	for _, der := range svid.CertChain {
		for _, root := range a.Bundle.X509Authorities {
			if string(der) == string(root.Asn1) {
				t.Error("the chain holds a root")
			}
		}
	}
	// It is in the audit log as our own RPC's are, and so is the refusal.
	r := slices.DeleteFunc(h.audit("x509svid.issued"), func(r map[string]any) bool { return r["actor_kind"] == "system" }) // the CA's own
	if len(r) != 2 || r[0]["subject"] != "spiffe://example.org/web" || r[0]["actor"] != a.ID.String() || r[0]["details"].(map[string]any)["by"] != "csr" ||
		r[0]["details"].(map[string]any)["serial"] != leaf.SerialNumber.String() {
		t.Errorf("audit of what was issued: %v", r)
	}
	if r := h.audit("x509svid.refused"); len(r) != 2 || r[0]["subject"] != "foreign" {
		t.Errorf("audit of what was refused: %v", r)
	}
}

// TestSPIREKeysOfWorkloads: agents can be configured for other kinds of keys than P-256.
func TestSPIREKeysOfWorkloads(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a := h.join()
	h.create(under(a.ID.Path(), "web", "/web", "unix:uid:1"))
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	rsa2048, _ := rsa.GenerateKey(rand.Reader, 2048)
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	var params []*svidv1.NewX509SVIDParams
	keys := []crypto.Signer{key(t), p384, rsa2048, ed}
	for _, k := range keys {
		params = append(params, &svidv1.NewX509SVIDParams{EntryId: "web", Csr: requestFor(t, k, &x509.CertificateRequest{URIs: []*url.URL{uri(t, "spiffe://example.org/web")}})})
	}
	for i, r := range h.batch(a, params...) {
		if r.Status.Code != 0 {
			t.Errorf("%T: %v", keys[i], r.Status)
			continue
		}
		leaf, err := x509.ParseCertificate(r.Svid.CertChain[0])
		if err != nil || !keys[i].Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(leaf.PublicKey) {
			t.Errorf("%T: another key in the SVID (%v)", keys[i], err)
		}
	}
}

// TestX509_27_HostileCSRs: what a CSR asks for besides its key never gets into an SVID, and one that lies is refused alone.
func TestX509_27_HostileCSRs(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a := h.join()
	h.create(under(a.ID.Path(), "web", "/web", "unix:uid:1"))
	k := key(t)
	good := csr(t, k)
	own := []*url.URL{uri(t, "spiffe://example.org/web")}
	weakEC, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	weakRSA, _ := rsa.GenerateKey(rand.Reader, 1024)
	badSignature := slices.Clone(good)
	badSignature[len(badSignature)-1] ^= 1
	other, err := x509.ParseCertificateRequest(csr(t, key(t)))
	if err != nil {
		t.Fatal(err)
	}
	swapped := slices.Clone(good)
	parsed, _ := x509.ParseCertificateRequest(good)
	at := strings.Index(string(swapped), string(parsed.RawSubjectPublicKeyInfo))
	copy(swapped[at:], other.RawSubjectPublicKeyInfo) // another's key under this one's signature
	ca, err := asn1.Marshal(struct {
		CA bool
	}{true})
	if err != nil {
		t.Fatal(err)
	}
	asCA := requestFor(t, k, &x509.CertificateRequest{URIs: own, DNSNames: []string{"stolen.example"}, Subject: pkix.Name{CommonName: "root"}, ExtraExtensions: []pkix.Extension{
		{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: ca},
		{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true, Value: []byte{3, 2, 1, 6}}, // keyCertSign, cRLSign
	}})
	tests := []struct {
		name string
		csr  []byte
		want codes.Code
	}{
		{"foreign URI SAN", requestFor(t, k, &x509.CertificateRequest{URIs: []*url.URL{uri(t, "spiffe://example.org/admin")}}), codes.InvalidArgument},
		{"URI SAN of another trust domain", requestFor(t, k, &x509.CertificateRequest{URIs: []*url.URL{uri(t, "spiffe://other.org/web")}}), codes.InvalidArgument},
		{"two URI SANs", requestFor(t, k, &x509.CertificateRequest{URIs: []*url.URL{own[0], uri(t, "spiffe://example.org/admin")}}), codes.InvalidArgument},
		{"CA bit, key usages, subject and DNS name of its own", asCA, codes.OK},
		{"weak curve", requestFor(t, weakEC, &x509.CertificateRequest{URIs: own}), codes.InvalidArgument},
		{"weak RSA", requestFor(t, weakRSA, &x509.CertificateRequest{URIs: own}), codes.InvalidArgument},
		{"bad signature", badSignature, codes.InvalidArgument},
		{"another's key", swapped, codes.InvalidArgument},
		{"no CSR", nil, codes.InvalidArgument},
		{"nonsense", []byte("no"), codes.InvalidArgument},
		{"rest behind it", append(slices.Clone(good), 0), codes.InvalidArgument},
		{"too large", make([]byte, 17<<10), codes.InvalidArgument},
		{"good", good, codes.OK},
	}
	var params []*svidv1.NewX509SVIDParams
	for _, tt := range tests {
		params = append(params, &svidv1.NewX509SVIDParams{EntryId: "web", Csr: tt.csr})
	}
	params = append(params, &svidv1.NewX509SVIDParams{Csr: good}, nil)
	results := h.batch(a, params...)
	for i, tt := range tests {
		if got := codes.Code(results[i].Status.Code); got != tt.want {
			t.Errorf("%s: %v %q, want %v", tt.name, got, results[i].Status.Message, tt.want)
		}
		if tt.want != codes.OK || results[i].Svid == nil {
			continue
		}
		leaf, err := x509.ParseCertificate(results[i].Svid.CertChain[0])
		if err != nil {
			t.Fatal(err)
		}
		if leaf.IsCA || leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 || len(leaf.DNSNames) != 0 || leaf.Subject.CommonName != "" || len(leaf.URIs) != 1 {
			t.Errorf("%s: the SVID took over from the CSR: CA %t, key usage %d, DNS %v, subject %v", tt.name, leaf.IsCA, leaf.KeyUsage, leaf.DNSNames, leaf.Subject)
		}
	}
	for i, want := range []string{"missing entry ID", "missing entry ID"} {
		if st := results[len(tests)+i].Status; codes.Code(st.Code) != codes.InvalidArgument || !strings.Contains(st.Message, want) {
			t.Errorf("item without an entry ID: %v", st)
		}
	}
}

func TestSPIREBatchLimits(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a := h.join()
	h.create(under(a.ID.Path(), "web", "/web", "unix:uid:1"))
	req := csr(t, key(t))
	call := func(n int) error {
		r, err := a.SVIDAPI().BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: slices.Repeat([]*svidv1.NewX509SVIDParams{{EntryId: "web", Csr: req}}, n)})
		if err != nil {
			return err
		}
		serials := map[string]bool{}
		for i, x := range r.Results {
			if x.Status.Code != 0 {
				t.Errorf("item %d of %d: %v", i, n, x.Status)
				continue
			}
			leaf, err := x509.ParseCertificate(x.Svid.CertChain[0])
			if err != nil {
				t.Fatal(err)
			}
			serials[leaf.SerialNumber.String()] = true
		}
		if len(serials) != n {
			t.Errorf("%d items: %d serial numbers", n, len(serials))
		}
		if size := proto.Size(r); size > 4<<20 {
			t.Errorf("%d items: an answer of %d bytes; SPIRE's agents take 4 MiB", n, size)
		}
		return nil
	}
	for n, want := range map[int]codes.Code{0: codes.InvalidArgument, 1: codes.OK, 500: codes.OK, 501: codes.ResourceExhausted, 10_000: codes.ResourceExhausted} {
		if err := call(n); code(err) != want {
			t.Errorf("a batch of %d: %v, want %v", n, err, want)
		}
	}
}

func TestSPIRERenewAgent(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a := h.join()
	mustSync(t, a)
	former, err := a.Renew(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { former.Close() })
	if _, err := former.Sync(t.Context()); err != nil {
		t.Errorf("the old SVID before the first use of the new one: %v", err)
	}
	mustSync(t, a)
	_, err = former.Sync(t.Context())
	if det := status.Convert(err).Details(); code(err) != codes.PermissionDenied || len(det) != 1 || det[0].(*types.PermissionDeniedDetails).Reason != types.PermissionDeniedDetails_AGENT_NOT_ACTIVE {
		t.Errorf("the old SVID after it: %v %v", err, det)
	}
	if _, err := agentv1.NewAgentClient(h.admin).DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: pid(a.ID.Path())}); err != nil {
		t.Fatal(err)
	}
	_, err = a.X509SVIDs(t.Context(), "x")
	if det := status.Convert(err).Details(); code(err) != codes.PermissionDenied || len(det) != 1 || det[0].(*types.PermissionDeniedDetails).Reason != types.PermissionDeniedDetails_AGENT_NOT_ATTESTED {
		t.Errorf("after an evict: %v %v", err, det)
	}
}

func TestSPIRENewJWTSVID(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a := h.join()
	jti := under(a.ID.Path(), "jti", "/jti", "unix:uid:2")
	jti.AdditionalAttributes, jti.JwtSvidTtl = &types.Entry_AdditionalAttributes{JwtSvidIncludeJti: true}, 60
	h.create(under(a.ID.Path(), "web", "/web", "unix:uid:1"), jti)
	for _, tt := range []struct {
		name    string
		request *svidv1.NewJWTSVIDRequest
		want    codes.Code
	}{
		{"no entry", &svidv1.NewJWTSVIDRequest{Audience: []string{"db"}}, codes.InvalidArgument},
		{"no audience", &svidv1.NewJWTSVIDRequest{EntryId: "web"}, codes.InvalidArgument},
		{"empty audience", &svidv1.NewJWTSVIDRequest{EntryId: "web", Audience: []string{""}}, codes.InvalidArgument},
		{"too many audiences", &svidv1.NewJWTSVIDRequest{EntryId: "web", Audience: slices.Repeat([]string{"db"}, 10_000)}, codes.InvalidArgument},
		{"not authorized", &svidv1.NewJWTSVIDRequest{EntryId: "foreign", Audience: []string{"db"}}, codes.NotFound},
	} {
		if _, err := a.SVIDAPI().NewJWTSVID(t.Context(), tt.request); code(err) != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
	seen := map[string]bool{}
	for i, tt := range []struct {
		entry string
		ttl   time.Duration
		jti   bool
	}{{"web", 5 * time.Minute, false}, {"jti", time.Minute, true}, {"jti", time.Minute, true}} {
		r, err := a.SVIDAPI().NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: tt.entry, Audience: []string{"db", "spiffe://example.org/queue"}})
		if err != nil {
			t.Fatal(err)
		}
		s := r.Svid
		header, claims := jwtParts(t, s.Token)
		if header["typ"] != "JWT" || header["alg"] != "ES256" || !slices.ContainsFunc(a.Bundle.JwtAuthorities, func(k *types.JWTKey) bool { return k.KeyId == header["kid"] }) {
			t.Errorf("%d: header %v", i, header)
		}
		if claims["sub"] != "spiffe://example.org/"+tt.entry || fmt.Sprint(claims["aud"]) != "[db spiffe://example.org/queue]" || s.Id.Path != "/"+tt.entry {
			t.Errorf("%d: claims %v", i, claims)
		}
		if s.IssuedAt == 0 || s.ExpiresAt <= s.IssuedAt || claims["exp"] != float64(s.ExpiresAt) || claims["iat"] != float64(s.IssuedAt) ||
			time.Until(time.Unix(s.ExpiresAt, 0)).Round(10*time.Second) != tt.ttl {
			t.Errorf("%d: issued %d, expires %d, claims %v", i, s.IssuedAt, s.ExpiresAt, claims)
		}
		id, _ := claims["jti"].(string)
		if (id != "") != tt.jti || seen[id] {
			t.Errorf("%d: jti %q", i, id)
		}
		seen[id] = true
	}
}

func jwtParts(t *testing.T, token string) (header, claims map[string]any) {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("%d parts", len(parts))
	}
	for i, into := range []*map[string]any{&header, &claims} {
		b, err := base64.RawURLEncoding.DecodeString(parts[i])
		if err == nil {
			err = json.Unmarshal(b, into)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return header, claims
}

func TestSPIREWITSVIDsAreOffUnlessSwitchedOn(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a := h.join()
	if _, err := a.SVIDAPI().BatchNewWITSVID(t.Context(), &svidv1.BatchNewWITSVIDRequest{}); code(err) != codes.Unimplemented {
		t.Errorf("BatchNewWITSVID: %v", err)
	}
	if _, err := svidv1.NewSVIDClient(h.admin).MintWITSVID(t.Context(), &svidv1.MintWITSVIDRequest{}); code(err) != codes.Unimplemented {
		t.Errorf("MintWITSVID: %v", err)
	}
}

// TestSPIREWhoMayCall is the table of §10 for the Entry and SVID services.
func TestSPIREWhoMayCall(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a := h.join()
	anyone := h.dial(nil, nil)
	agents := []string{"entry.v1.Entry/GetAuthorizedEntries", "svid.v1.SVID/BatchNewX509SVID", "svid.v1.SVID/NewJWTSVID", "svid.v1.SVID/BatchNewWITSVID"}
	admins := []string{"entry.v1.Entry/CountEntries", "entry.v1.Entry/ListEntries", "entry.v1.Entry/GetEntry", "entry.v1.Entry/BatchCreateEntry", "entry.v1.Entry/BatchUpdateEntry",
		"entry.v1.Entry/BatchDeleteEntry", "svid.v1.SVID/MintX509SVID", "svid.v1.SVID/MintJWTSVID", "svid.v1.SVID/MintWITSVID"}
	type caller interface {
		Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error
	}
	try := func(conn caller, method string) (denied bool) {
		full := "/spire.api.server." + method
		// All requests without fields have the same bytes: none.
		err := conn.Invoke(t.Context(), full, &svidv1.NewJWTSVIDRequest{}, &svidv1.NewJWTSVIDResponse{})
		return code(err) == codes.PermissionDenied && status.Convert(err).Message() == "authorization denied for method "+full
	}
	for who, tt := range map[string]struct {
		conn         caller
		agent, admin bool
	}{"anyone": {anyone, false, false}, "an agent": {a.Conn, true, false}, "the admin socket": {h.admin, false, true}} {
		for _, m := range agents {
			if try(tt.conn, m) == tt.agent {
				t.Errorf("%s by %s: denied %t", m, who, tt.agent)
			}
		}
		for _, m := range admins {
			if try(tt.conn, m) == tt.admin {
				t.Errorf("%s by %s: denied %t", m, who, tt.admin)
			}
		}
	}
	s, err := (&spireclient.Agent{Conn: h.admin}).Sync(t.Context())
	if code(err) != codes.PermissionDenied {
		t.Errorf("SyncAuthorizedEntries by an admin: %v %v", s, err)
	}
}
