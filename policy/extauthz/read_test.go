package extauthz

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/test/envoycheck"
	"github.com/signet-id/signet/workloadapi"
)

// certificate is self-signed: who issued it the Envoy has looked at.
func certificate(t testing.TB, notBefore, notAfter time.Time, uris ...string) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(0x1234), NotBefore: notBefore, NotAfter: notAfter, KeyUsage: x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true, DNSNames: []string{"spiffe.example"}}
	for _, s := range uris {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = append(template.URIs, u)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

var start = time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)

// A sound call to a service that allows everybody in.
func soundCheck(t testing.TB) (*Service, *known, envoycheck.Call) {
	t.Helper()
	s, err := New(Config{Source: noSource{}, Now: func() time.Time { return start }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	set := &policyv1.PolicySet{Format: policy.Format, TrustDomain: "example.org", Epoch: "e", Revision: 7, Policies: []*policyv1.Policy{{
		Name: "all", Services: []string{"spiffe://example.org/web"}, Mode: policyv1.Mode_MODE_ENFORCE,
		Rules: []*policyv1.Rule{{Effect: policyv1.Effect_EFFECT_ALLOW, From: []string{"spiffe://example.org/**", "spiffe://partner.example/**"}}},
	}}}
	k := s.envoys.know(update(set, "spiffe://example.org/web"), nil)
	return s, k, envoycheck.Call{Peer: certificate(t, start.Add(-time.Hour), start.Add(time.Hour), "spiffe://example.org/caller"),
		Local: certificate(t, start.Add(-time.Hour), start.Add(time.Hour), "spiffe://example.org/web"), Method: "GET", Path: "/x", RawHeaders: true}
}

type noSource struct{ workloadapi.Source }

func update(set *policyv1.PolicySet, ids ...string) workloadapi.Update {
	u := workloadapi.Update{Policies: set}
	for _, id := range ids {
		u.Identities = append(u.Identities, workloadapi.Identity{ID: spiffeid.RequireFromString(id)})
	}
	return u
}

// TestWhoThePeerIs changes one thing of a sound check after the other.
func TestWhoThePeerIs(t *testing.T) {
	s, k, sound := soundCheck(t)
	if v := s.judge(k, sound.Request()); !v.decision.Allowed || v.request.Certificate == nil {
		t.Fatalf("a sound check: %+v, %v", v.decision, v.err)
	}
	hour := time.Hour
	for _, tt := range []struct {
		name   string
		change func(*authv3.AttributeContext)
		want   policy.Reason
		text   string
	}{
		{"no principal", func(a *authv3.AttributeContext) { a.Source.Principal = "" }, policy.ReasonInvalidPeer, "require_client_certificate"},
		{"no source", func(a *authv3.AttributeContext) { a.Source = nil }, policy.ReasonInvalidPeer, "source.principal is empty"},
		{"a DNS name", func(a *authv3.AttributeContext) { a.Source.Principal = "caller.example.org" }, policy.ReasonInvalidPeer, "source.principal"},
		{"a subject", func(a *authv3.AttributeContext) { a.Source.Principal = "CN=caller,O=spiffe://example.org/caller" }, policy.ReasonInvalidPeer, "source.principal"},
		{"several IDs in a list", func(a *authv3.AttributeContext) { a.Source.Principal += ",spiffe://example.org/admin" }, policy.ReasonInvalidPeer, "source.principal"},
		{"another case", func(a *authv3.AttributeContext) { a.Source.Principal = "SPIFFE://example.org/caller" }, policy.ReasonInvalidPeer, "source.principal"},
		{"a trust domain alone", func(a *authv3.AttributeContext) { a.Source.Principal = "spiffe://example.org" }, policy.ReasonInvalidSVID, "source.certificate is that of"},
		{"another's certificate", func(a *authv3.AttributeContext) { a.Source.Principal = "spiffe://example.org/admin" }, policy.ReasonInvalidSVID, "source.certificate is that of"},
		{"no certificate", func(a *authv3.AttributeContext) { a.Source.Certificate = "" }, policy.ReasonInvalidSVID, "include_peer_certificate"},
		{"no URL encoding", func(a *authv3.AttributeContext) { a.Source.Certificate = "%zz" }, policy.ReasonInvalidSVID, "URL encoding"},
		{"no PEM", func(a *authv3.AttributeContext) { a.Source.Certificate = "hello" }, policy.ReasonInvalidSVID, "PEM"},
		{"two certificates", func(a *authv3.AttributeContext) { a.Source.Certificate += a.Source.Certificate }, policy.ReasonInvalidSVID, "not one certificate"},
		{"too long a certificate", func(a *authv3.AttributeContext) { a.Source.Certificate = strings.Repeat("A", maxCertificate+1) }, policy.ReasonInvalidSVID, "at most"},
		{"expired", func(a *authv3.AttributeContext) {
			a.Source.Certificate = envoycheck.Certificate(certificate(t, start.Add(-2*hour), start.Add(-time.Second), "spiffe://example.org/caller"))
		}, policy.ReasonInvalidSVID, "expired at 2026-11-29T11:59:59Z"},
		{"not valid yet", func(a *authv3.AttributeContext) {
			a.Source.Certificate = envoycheck.Certificate(certificate(t, start.Add(time.Second), start.Add(hour), "spiffe://example.org/caller"))
		}, policy.ReasonInvalidSVID, "not valid before"},
		{"two IDs in one certificate", func(a *authv3.AttributeContext) {
			a.Source.Certificate = envoycheck.Certificate(certificate(t, start, start.Add(hour), "spiffe://example.org/caller", "spiffe://example.org/admin"))
		}, policy.ReasonInvalidSVID, "2 URI SANs"},
		{"a foreign destination", func(a *authv3.AttributeContext) { a.Destination.Principal = "spiffe://example.org/db" }, policy.ReasonForeignService, "spiffe://example.org/web"},
		{"a destination in capitals", func(a *authv3.AttributeContext) { a.Destination.Principal = "SPIFFE://example.org/web" }, policy.ReasonForeignService, "not its own"},
		{"a destination for browsers", func(a *authv3.AttributeContext) { a.Destination.Principal = "www.example.org" }, policy.ReasonAllowed, ""},
		{"no destination", func(a *authv3.AttributeContext) { a.Destination = nil }, policy.ReasonAllowed, ""},
		{"two methods", func(a *authv3.AttributeContext) {
			h := a.Request.Http.HeaderMap
			h.Headers = append(h.Headers, &corev3.HeaderValue{Key: ":method", RawValue: []byte("POST")})
		}, policy.ReasonPath, "contradicts"},
		{"another path in the header", func(a *authv3.AttributeContext) { a.Request.Http.Path = "/y" }, policy.ReasonPath, "contradicts"},
		{"no path", func(a *authv3.AttributeContext) { a.Request.Http.Path, a.Request.Http.HeaderMap = "", nil }, policy.ReasonPath, ""},
		{"an empty request", func(a *authv3.AttributeContext) { a.Request.Http = &authv3.AttributeContext_HttpRequest{} }, policy.ReasonPath, ""},
		{"no attributes of a request: a connection", func(a *authv3.AttributeContext) { a.Request = nil }, policy.ReasonAllowed, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			req := sound.Request()
			tt.change(req.Attributes)
			v := s.judge(k, req)
			if v.decision.Reason != tt.want || v.decision.Allowed != (tt.want == policy.ReasonAllowed) {
				t.Fatalf("%s (%v), want %s", v.decision.Reason, v.err, tt.want)
			}
			if tt.text != "" && (v.err == nil || !strings.Contains(v.err.Error(), tt.text)) {
				t.Errorf("%v does not say %q", v.err, tt.text)
			}
			if v.decision.Revision != 7 {
				t.Errorf("revision %d, want 7", v.decision.Revision)
			}
		})
	}
}

// TestRevokedBySerial: the certificate is what a revocation by serial number needs.
func TestRevokedBySerial(t *testing.T) {
	s, k, sound := soundCheck(t)
	td := spiffeid.RequireTrustDomainFromString("example.org")
	u := update(k.set, "spiffe://example.org/web")
	u.Revocations = policy.CompileRevocations(&policyv1.RevocationSet{Revocations: []*policyv1.Revocation{
		{Name: "stolen", Target: &policyv1.Revocation_Serial{Serial: []byte{0x12, 0x34}}}}}, td)
	revoked := s.envoys.know(u, k)
	revoked = s.envoys.know(update(k.set, "spiffe://example.org/web"), revoked) // no word on revocations revives nobody
	if v := s.judge(revoked, sound.Request()); v.decision.Allowed || v.decision.Reason != policy.ReasonRevoked || v.decision.Revocation != "stolen" {
		t.Errorf("a revoked peer: %+v", v.decision)
	}
	sound.NoCertificate = true
	s.config.AllowMissingCertificate = true
	if v := s.judge(revoked, sound.Request()); !v.decision.Allowed || v.request.Certificate != nil {
		t.Errorf("with allow_missing_certificate, of which the documentation says what is lost: %+v, %v", v.decision, v.err)
	}
}

// TestOldPolicies: nothing known denies, what is known stays in force without contact, and not for ever; what cannot be
// read does not replace what could.
func TestOldPolicies(t *testing.T) {
	s, k, sound := soundCheck(t)
	now := start
	s.config.Now = func() time.Time { return now }
	s.envoys.config.Now = s.config.Now
	sound.Peer = certificate(t, start, start.Add(100*time.Hour), "spiffe://example.org/caller")
	want := func(k *known, reason policy.Reason) {
		t.Helper()
		if v := s.judge(k, sound.Request()); v.decision.Reason != reason {
			t.Errorf("%s (%v), want %s", v.decision.Reason, v.err, reason)
		}
	}
	want(s.envoys.know(update(nil, "spiffe://example.org/web"), nil), policy.ReasonUnknownPolicy)
	offline := update(k.set, "spiffe://example.org/web")
	offline.Offline = start
	off := s.envoys.know(offline, k)
	if off.bare != k.bare {
		t.Error("the same policies were compiled again")
	}
	want(off, policy.ReasonAllowed)
	now = start.Add(time.Hour)
	want(off, policy.ReasonAllowed)
	s.config.MaxRevocationStaleness = time.Minute
	want(off, policy.ReasonStalePolicy)
	s.config.MaxRevocationStaleness = 0
	now = start.Add(25 * time.Hour)
	want(off, policy.ReasonStalePolicy)
	want(s.envoys.know(update(k.set, "spiffe://example.org/web"), off), policy.ReasonAllowed)

	newer := proto.CloneOf(k.set)
	newer.Format = policy.Format + 1
	refused := s.envoys.know(update(newer, "spiffe://example.org/web"), k)
	want(refused, policy.ReasonAllowed)
	now = now.Add(25 * time.Hour)
	want(refused, policy.ReasonStalePolicy)
	want(s.envoys.know(update(newer, "spiffe://example.org/web"), refused), policy.ReasonStalePolicy)
	want(s.envoys.know(update(k.set, "spiffe://example.org/web"), refused), policy.ReasonAllowed)
	want(s.envoys.know(update(newer, "spiffe://example.org/web"), nil), policy.ReasonUnknownPolicy)
}

func TestHeaders(t *testing.T) {
	call := envoycheck.Call{Method: "GET", Path: "/", Header: []envoycheck.Field{{Name: "X-Role", Value: "a"}, {Name: "x-role", Value: "b"}, {Name: "X-One", Value: "c"}}}
	for _, raw := range []bool{true, false} {
		call.RawHeaders = raw
		h := newHeaders(call.Request().Attributes.Request.Http)
		want := []string{"a,b"}
		if raw {
			want = []string{"a", "b"}
		}
		if got := h.Values("x-role"); !slices.Equal(got, want) {
			t.Errorf("raw %t: x-role has the lines %q, want %q", raw, got, want)
		}
		if got := h.Values("x-one"); !slices.Equal(got, []string{"c"}) {
			t.Errorf("raw %t: x-one has the lines %q", raw, got)
		}
		if got := h.Values("x-none"); len(got) > 0 || h.override {
			t.Errorf("raw %t: x-none has the lines %q, and overridden is %t", raw, got, h.override)
		}
	}
	h := newHeaders(&authv3.AttributeContext_HttpRequest{Headers: map[string]string{"X-Role": "a", "x-http-method": "PUT"},
		HeaderMap: &corev3.HeaderMap{Headers: []*corev3.HeaderValue{{Key: "X-role", Value: "b"}}}})
	got := h.Values("x-role")
	slices.Sort(got)
	if !slices.Equal(got, []string{"a", "b"}) || !h.override {
		t.Errorf("lines %q, overridden %t", got, h.override)
	}
}

// FuzzRead: whatever a message holds, the peer is what source.principal says and its certificate proves, the service is
// the process's own, and what is let through has a path and a method that stand in the message.
func FuzzRead(f *testing.F) {
	s, k, sound := soundCheck(f)
	for _, change := range []func(*envoycheck.Call){
		func(*envoycheck.Call) {}, func(c *envoycheck.Call) { c.RawHeaders = false }, func(c *envoycheck.Call) { c.TCP = true },
		func(c *envoycheck.Call) { c.Path = "/a\xff" }, func(c *envoycheck.Call) { c.Peer = nil }, func(c *envoycheck.Call) { c.Local = nil },
	} {
		c := sound
		change(&c)
		raw, err := proto.Marshal(c.Request())
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var req authv3.CheckRequest
		if proto.Unmarshal(raw, &req) != nil {
			return
		}
		v := s.judge(k, &req)
		resp := s.tell(t.Context(), &v)
		if err := resp.Validate(); err != nil {
			t.Fatalf("Envoy would refuse the answer: %v", err)
		}
		if passed := resp.Status.Code == 0; passed != v.decision.Allowed {
			t.Fatalf("the answer is %v, and the decision %+v", resp, v.decision)
		}
		if !v.decision.Allowed {
			return
		}
		a := req.Attributes
		if v.err != nil || v.request.Peer.String() != a.Source.Principal || v.request.Service.String() != "spiffe://example.org/web" || v.request.Certificate == nil {
			t.Fatalf("%v allows %+v", v.err, v.request)
		}
		if call := a.GetRequest().GetHttp(); call != nil {
			h := newHeaders(call)
			if v.request.Path != call.Path && !slices.Contains(h.Values(":path"), v.request.Path) || len(h.Values(":path")) > 1 || len(h.Values(":method")) > 1 {
				t.Fatalf("the path %q was judged of %v", v.request.Path, call)
			}
		} else if v.request.Protocol != policy.ProtocolTLS {
			t.Fatalf("a connection was judged as %v", v.request.Protocol)
		}
	})
}

// FuzzCertificate: what is taken is the certificate that x509 reads, with the one ID that it has.
func FuzzCertificate(f *testing.F) {
	_, _, sound := soundCheck(f)
	f.Add(envoycheck.Certificate(sound.Peer))
	f.Add("%zz")
	f.Add("-----BEGIN CERTIFICATE-----%0A-----END CERTIFICATE-----%0A")
	f.Fuzz(func(t *testing.T, text string) {
		var c certificates
		id := spiffeid.RequireFromString("spiffe://example.org/caller")
		cert, err := c.check(text, id, start)
		if (cert == nil) != (err != nil) {
			t.Fatalf("%v, %v", cert, err)
		}
		if err == nil && (len(cert.URIs) != 1 || cert.URIs[0].String() != id.String() || start.After(cert.NotAfter)) {
			t.Fatalf("%v is taken for %s", cert.URIs, id)
		}
	})
}

func TestCertificatesAreBounded(t *testing.T) {
	c := certificates{known: map[string]*leaf{}}
	for i := range maxCertificates {
		c.known[strconv.Itoa(i)] = &leaf{}
	}
	cert := envoycheck.Certificate(certificate(t, start, start.Add(time.Hour), "spiffe://example.org/caller"))
	if _, err := c.check(cert, spiffeid.RequireFromString("spiffe://example.org/caller"), start); err != nil {
		t.Fatal(err)
	}
	if n := len(c.known); n != maxCertificates || c.known[cert] == nil {
		t.Errorf("%d certificates are kept, the last one among them: %t", n, c.known[cert] != nil)
	}
	if _, err := c.check("nothing", spiffeid.RequireFromString("spiffe://example.org/caller"), start); err == nil || c.known["nothing"] != nil {
		t.Errorf("%v; what is no certificate is kept", err)
	}
}

func TestConfigIsChecked(t *testing.T) {
	if _, err := New(Config{}); err == nil || !strings.Contains(err.Error(), "Source") {
		t.Errorf("without a source: %v", err)
	}
	if _, err := New(Config{Source: noSource{}, MaxOffline: -1}); err == nil || !strings.Contains(err.Error(), "MaxOffline") {
		t.Errorf("with a negative MaxOffline: %v", err)
	}
}

// A clock that is set back does not lengthen the time for which what may be out of date is relied on.
func TestAClockSetBackKeepsNothingYoung(t *testing.T) {
	now := time.Now()
	e := &envoys{}
	set := &policyv1.PolicySet{Format: policy.Format, TrustDomain: "example.org"}
	bare, err := policy.Compile(set)
	if err != nil {
		t.Fatal(err)
	}
	k := e.know(workloadapi.Update{Policies: set, Offline: now}, &known{set: set, bare: bare})
	if k.apart.IsZero() || k.stale == k.policies {
		t.Fatal("it is not noted since when there has been no contact")
	}
	k.apart = k.apart.Add(-2 * time.Minute)
	if k.at(now.Add(-time.Hour), time.Hour, time.Minute) != k.stale || k.at(now.Add(-time.Hour), time.Minute, 0) != k.stale {
		t.Error("what is two minutes old counts as young after the clock went back")
	}
	if again := e.know(workloadapi.Update{Policies: set, Offline: now}, k); !again.apart.Equal(k.apart) {
		t.Error("the next update made it young")
	}
	if back := e.know(workloadapi.Update{Policies: set}, k); !back.apart.IsZero() || back.at(now.Add(-time.Hour), time.Hour, time.Minute) != back.policies {
		t.Error("with contact it counts as old")
	}
}

// TestWhyATokenDidNotCount: whoever asks later why a call was denied is told what was wrong with its token.
func TestWhyATokenDidNotCount(t *testing.T) {
	var told []policy.Judgement
	s, err := New(Config{Source: noSource{}, Now: func() time.Time { return start }, OnDecision: func(j policy.Judgement) { told = append(told, j) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	_, _, sound := soundCheck(t)
	k := s.envoys.know(update(&policyv1.PolicySet{Format: policy.Format, TrustDomain: "example.org", Epoch: "e", Revision: 7, Policies: []*policyv1.Policy{{
		Name: "token", Services: []string{"spiffe://example.org/web"}, Mode: policyv1.Mode_MODE_ENFORCE,
		Rules: []*policyv1.Rule{{Effect: policyv1.Effect_EFFECT_ALLOW, From: []string{"spiffe://example.org/**"},
			Jwt: &policyv1.JWTMatch{Audience: []string{"web"}, Subject: policyv1.SubjectBinding_SUBJECT_BINDING_PEER}}},
	}}}, "spiffe://example.org/web"), nil)
	for _, tt := range []struct{ authorization, want string }{
		{"", "none"},
		{"Basic eDp5", "not of the kind Bearer"},
		{"Bearer e30.e30.x", "JWT"},
	} {
		call := sound
		if tt.authorization != "" {
			call.Header = []envoycheck.Field{{Name: "authorization", Value: tt.authorization}}
		}
		v := s.judge(k, call.Request())
		if s.tell(t.Context(), &v); v.decision.Allowed {
			t.Fatalf("%q: allowed", tt.authorization)
		}
		if j := told[len(told)-1]; !strings.Contains(j.Call.Token, tt.want) || strings.Contains(j.Call.Token, "e30.") {
			t.Errorf("%q: told %q, want %q and nothing of the token", tt.authorization, j.Call.Token, tt.want)
		}
	}
}
