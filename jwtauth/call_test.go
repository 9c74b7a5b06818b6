package jwtauth_test

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/jwtauth"
	"github.com/signet-id/signet/policy"
)

// sources of this process's SVIDs and bundles.
func (w *world) sources(t *testing.T) (*workloadapi.X509Source, *workloadapi.JWTSource) {
	t.Helper()
	o := workloadapi.WithClientOptions(workloadapi.WithAddr(w.WorkloadAPI()))
	x, err := workloadapi.NewX509Source(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.Close() })
	j, err := workloadapi.NewJWTSource(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return x, j
}

// withdrawn is a source of policies with revocations.
type withdrawn struct{ policies *policy.Policies }

func (w *withdrawn) Policies() *policy.Policies { return w.policies }

func revoking(t *testing.T, rs ...*policyv1.Revocation) *policy.Policies {
	t.Helper()
	p, err := policy.Compile(&policyv1.PolicySet{Format: policy.Format, TrustDomain: "example.org"})
	if err != nil {
		t.Fatal(err)
	}
	return p.WithRevocations(policy.CompileRevocations(&policyv1.RevocationSet{Revocations: rs}, spiffeid.RequireTrustDomainFromString("example.org")))
}

func TestHTTP(t *testing.T) {
	w := newWorld(t)
	x, j := w.sources(t)
	revoked := &withdrawn{revoking(t)}
	verifier, err := jwtauth.NewVerifier(jwtauth.VerifierConfig{Audience: []string{"documents"}, JWTBundles: j, X509Bundles: x, Policies: revoked, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: verifier.Middleware(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		svid, ok := jwtauth.SVIDFrom(r.Context())
		if !ok {
			t.Error("no SVID in the context")
			return
		}
		io.WriteString(w, svid.ID.String())
	})), TLSConfig: tlsconfig.MTLSServerConfig(x, x, tlsconfig.AuthorizeAny()), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go server.ServeTLS(l, "", "")
	defer server.Close()
	host := l.Addr().String()
	c := w.cache(t, nil)
	base := &http.Transport{TLSClientConfig: tlsconfig.MTLSClientConfig(x, x, tlsconfig.AuthorizeAny())}
	defer base.CloseIdleConnections()
	transport, err := jwtauth.NewTransport(jwtauth.TransportConfig{Cache: c, Audiences: jwtauth.Audiences{host: "documents"}, Base: base})
	if err != nil {
		t.Fatal(err)
	}
	get := func(rt http.RoundTripper, headers ...string) (int, string) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), "GET", "https://"+host+"/v1", http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range headers {
			r.Header.Add("Authorization", h)
		}
		resp, err := rt.RoundTrip(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body)
	}
	if code, body := get(transport); code != 200 || body != w.ID("/me").String() {
		t.Errorf("%d %s", code, body)
	}
	good := token(t, c, "documents").AccessToken
	parts := strings.Split(good, ".")
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`))
	for name, headers := range map[string][]string{
		"none at all":          nil,
		"another scheme":       {"Basic " + good},
		"the token alone":      {good},
		"two lines":            {"Bearer " + good, "Bearer " + good},
		"an empty one":         {"Bearer "},
		"another audience":     {"Bearer " + token(t, c, "mail").AccessToken},
		"no signature":         {"Bearer " + none + "." + parts[1] + "."},
		"another's signature":  {"Bearer " + parts[0] + "." + parts[1] + "." + base64.RawURLEncoding.EncodeToString(make([]byte, 64))},
		"other claims":         {"Bearer " + parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"spiffe://example.org/me","aud":["documents"],"exp":4000000000}`)) + "." + parts[2]},
		"a megabyte":           {"Bearer " + strings.Repeat("a", 900_000)},
		"a token with a space": {"Bearer " + good + " x"},
	} {
		if code, body := get(base, headers...); code != 401 && code != 431 || strings.Contains(body, "example.org") {
			t.Errorf("%s: %d %s", name, code, body)
		}
	}
	if code, _ := get(base, "bearer "+good); code != 200 { // the scheme's case does not count [RFC 9110 §11.1]
		t.Errorf("bearer: %d", code)
	}
	for name, r := range map[string]*policyv1.Revocation{
		"the ID is revoked":       {Name: "r", Target: &policyv1.Revocation_SpiffeId{SpiffeId: "spiffe://example.org/me"}},
		"its tokens are revoked":  {Name: "r", Target: &policyv1.Revocation_SpiffeId{SpiffeId: "spiffe://example.org/me"}, TokensOnly: true},
		"it is too old":           {Name: "r", Target: &policyv1.Revocation_SpiffeId{SpiffeId: "spiffe://example.org/**"}, IssuedBefore: time.Now().Add(time.Hour).Unix()},
		"what nobody understands": {Name: "r"},
	} {
		revoked.policies = revoking(t, r)
		if code, _ := get(transport); code != 401 {
			t.Errorf("%s: %d", name, code)
		}
	}
	revoked.policies = nil
	if code, _ := get(transport); code != 401 {
		t.Errorf("revocations are not known: %d", code)
	}
	revoked.policies = revoking(t)

	// The token of one workload on the connection of another.
	w.Apply("kind: Identity\nname: me\nspiffeID: /thief\nmatch: [\"unix:uid:" + uid() + "\"]\n")
	for svid, err := x.GetX509SVID(); err != nil || svid.ID.Path() != "/thief"; svid, err = x.GetX509SVID() {
		select {
		case <-x.Updated():
		case <-t.Context().Done():
			t.Fatal("no other SVID")
		}
	}
	base.CloseIdleConnections()
	if code, _ := get(base, "Bearer "+good); code != 401 {
		t.Errorf("a stolen token: %d", code)
	}
	any, err := jwtauth.NewVerifier(jwtauth.VerifierConfig{Audience: []string{"documents"}, JWTBundles: j, AllowAnySubject: true, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if svid, err := any.Verify([]string{"Bearer " + good}, nil); err != nil || svid.ID.Path() != "/me" {
		t.Errorf("any subject, by the operator's will: %v", err)
	}
	if _, err := verifier.Verify([]string{"Bearer " + good}, &tls.ConnectionState{}); err == nil {
		t.Error("no peer, and nevertheless its token")
	}
	svid, _ := x.GetX509SVID()
	forged := *svid.Certificates[0]
	forged.RawTBSCertificate = append([]byte{}, forged.RawTBSCertificate...)
	forged.RawTBSCertificate[20] ^= 1
	forged.Raw = append([]byte{}, forged.Raw...)
	forged.Raw[30] ^= 1
	if _, err := verifier.Verify([]string{"Bearer " + good}, &tls.ConnectionState{PeerCertificates: append(svid.Certificates[:0:0], &forged)}); err == nil {
		t.Error("a server that does not verify its peers, and a peer that nobody signed")
	}
}

func TestNobodyElseGetsTheToken(t *testing.T) {
	w := newWorld(t)
	c := w.cache(t, nil)
	got := make(chan string, 16)
	record := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got <- r.Header.Get("Authorization") })
	other := httptest.NewTLSServer(record)
	defer other.Close()
	plain := httptest.NewServer(record)
	defer plain.Close()
	first := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got <- r.Header.Get("Authorization")
		http.Redirect(w, r, map[string]string{"/tls": other.URL, "/plain": plain.URL}[r.URL.Path], http.StatusTemporaryRedirect)
	}))
	defer first.Close()
	host := strings.TrimPrefix(first.URL, "https://")
	base := first.Client().Transport.(*http.Transport).Clone()
	base.TLSClientConfig.InsecureSkipVerify = true // of interest is only who gets what
	defer base.CloseIdleConnections()
	transport, err := jwtauth.NewTransport(jwtauth.TransportConfig{Cache: c, Audiences: jwtauth.Audiences{strings.ToUpper(host): "documents"}, Base: base})
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: transport}
	for _, path := range []string{"/tls", "/plain"} {
		resp, err := client.Get(first.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if a := <-got; a != "Bearer "+token(t, c, "documents").AccessToken {
			t.Errorf("%s: the callee got %d bytes", path, len(a))
		}
		if a := <-got; a != "" {
			t.Errorf("%s: whoever it redirects to got a token", path)
		}
	}
	body := &closed{Reader: strings.NewReader("x")}
	for name, url := range map[string]string{"http": "http://" + host, "ftp": "ftp://" + host} {
		r, _ := http.NewRequest("POST", url, body)
		if _, err := transport.RoundTrip(r); err == nil || !strings.Contains(err.Error(), "https only") || !body.is {
			t.Errorf("%s: %v, body closed %t", name, err, body.is)
		}
	}
	r, _ := http.NewRequest("GET", first.URL+"/tls", http.NoBody)
	r.Header.Set("Authorization", "Basic eA==")
	if _, err := transport.RoundTrip(r); err == nil || strings.Contains(err.Error(), "eA==") {
		t.Errorf("two Authorizations: %v", err)
	}
	for name, config := range map[string]jwtauth.TransportConfig{
		"Cache":      {Audiences: jwtauth.Audiences{"a": "b"}},
		"both empty": {Cache: c},
		"exclude":    {Cache: c, Audiences: jwtauth.Audiences{"a": "b"}, Audience: func(*url.URL) (string, bool) { return "", false }},
	} {
		if _, err := jwtauth.NewTransport(config); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

type closed struct {
	io.Reader
	is bool
}

func (c *closed) Close() error { c.is = true; return nil }

func TestGRPC(t *testing.T) {
	w := newWorld(t)
	x, j := w.sources(t)
	verifier, err := jwtauth.NewVerifier(jwtauth.VerifierConfig{Audience: []string{"documents"}, JWTBundles: j, X509Bundles: x, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	seen := make(chan string, 4)
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(tlsconfig.MTLSServerConfig(x, x, tlsconfig.AuthorizeAny()))),
		grpc.ChainUnaryInterceptor(verifier.Unary, func(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			svid, ok := jwtauth.SVIDFrom(ctx)
			if !ok {
				t.Error("no SVID in the context")
			}
			seen <- svid.ID.Path()
			return handler(ctx, request)
		}), grpc.ChainStreamInterceptor(verifier.Stream))
	healthv1.RegisterHealthServer(server, health.NewServer())
	go server.Serve(l)
	defer server.Stop()
	c := w.cache(t, nil)
	dial := func(audiences jwtauth.Audiences) healthv1.HealthClient {
		t.Helper()
		per, err := jwtauth.NewPerRPC(jwtauth.PerRPCConfig{Cache: c, Audiences: audiences})
		if err != nil {
			t.Fatal(err)
		}
		conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.MTLSClientConfig(x, x, tlsconfig.AuthorizeAny()))), grpc.WithPerRPCCredentials(per))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return healthv1.NewHealthClient(conn)
	}
	known := dial(jwtauth.Audiences{l.Addr().String(): "documents"})
	if _, err := known.Check(t.Context(), &healthv1.HealthCheckRequest{}); err != nil || <-seen != "/me" {
		t.Errorf("unary: %v", err)
	}
	stream, err := known.Watch(t.Context(), &healthv1.HealthCheckRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	if err != nil {
		t.Errorf("stream: %v", err)
	}
	for name, audiences := range map[string]jwtauth.Audiences{"no audience": {"elsewhere.example": "documents"}, "another audience": {l.Addr().String(): "mail"}} {
		if _, err := dial(audiences).Check(t.Context(), &healthv1.HealthCheckRequest{}); status.Code(err) != codes.Unauthenticated {
			t.Errorf("%s: %v", name, err)
		}
		stream, err := dial(audiences).Watch(t.Context(), &healthv1.HealthCheckRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		if status.Code(err) != codes.Unauthenticated {
			t.Errorf("%s, stream: %v", name, err)
		}
	}
	per, err := jwtauth.NewPerRPC(jwtauth.PerRPCConfig{Cache: c, Audience: func(string) (string, bool) { return "documents", true }})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithPerRPCCredentials(per)); err == nil {
		t.Error("a connection in clear takes these credentials")
	}
	if _, err := per.GetRequestMetadata(t.Context(), "https://a/b"); err == nil {
		t.Error("a token without a connection")
	}
}
