package upstream

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var testTD = spiffeid.RequireTrustDomainFromString("example.org")

// A vaultStandIn speaks the part of Vault's HTTP API that is used, over TLS, and signs for real with a root and an issuing
// CA of its own. Real servers answer the same fields.
type vaultStandIn struct {
	t      *testing.T
	server *httptest.Server
	dir    string

	mu      sync.Mutex
	root    *x509.Certificate
	issuing *x509.Certificate
	tokens  map[string]time.Time // and their end
	lease   time.Duration
	renewed int
	logins  []string
	asked   []map[string]any // of sign-intermediate
	broken  func(w http.ResponseWriter, r *http.Request) bool
	sign    func(csr *x509.CertificateRequest, ttl time.Duration) string
	noRoot  bool
}

func pemText(certs ...*x509.Certificate) string {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return string(out)
}

func startVault(t *testing.T) *vaultStandIn {
	t.Helper()
	v := &vaultStandIn{t: t, dir: t.TempDir(), tokens: map[string]time.Time{"root-token": {}}, lease: time.Hour}
	rootKey, issuingKey := newKey(t), newKey(t)
	ca := func(name string) *x509.Certificate {
		return &x509.Certificate{SerialNumber: newSerial(), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign}
	}
	create := func(template, parent *x509.Certificate, public, key any) *x509.Certificate {
		der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	template := ca("vault root")
	v.root = create(template, template, rootKey.Public(), rootKey)
	v.issuing = create(ca("vault issuing"), v.root, issuingKey.Public(), rootKey)
	v.sign = func(csr *x509.CertificateRequest, ttl time.Duration) string {
		c := ca(csr.Subject.CommonName)
		c.URIs, c.NotAfter = []*url.URL{{Scheme: "spiffe", Host: "example.org"}}, time.Now().Add(ttl)
		return pemText(create(c, v.issuing, csr.PublicKey, issuingKey))
	}
	v.server = httptest.NewUnstartedServer(http.HandlerFunc(v.handle))
	v.server.Config.ErrorLog = log.New(io.Discard, "", 0)
	v.server.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	v.server.StartTLS()
	t.Cleanup(v.server.Close)
	if err := os.WriteFile(v.file("ca.pem"), []byte(pemText(v.server.Certificate())), 0o600); err != nil {
		t.Fatal(err)
	}
	return v
}

func (v *vaultStandIn) file(name string) string { return filepath.Join(v.dir, name) }

func (v *vaultStandIn) write(name, text string) string {
	v.t.Helper()
	if err := os.WriteFile(v.file(name), []byte(text), 0o600); err != nil {
		v.t.Fatal(err)
	}
	return v.file(name)
}

func (v *vaultStandIn) handle(w http.ResponseWriter, r *http.Request) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.broken != nil && v.broken(w, r) {
		return
	}
	answer := func(code int, body any) {
		w.WriteHeader(code)
		json.NewEncoder(w).Encode(body)
	}
	refuse := func(code int, text string) { answer(code, map[string]any{"errors": []string{text}}) }
	var body map[string]any
	if r.Method == http.MethodPost && json.NewDecoder(r.Body).Decode(&body) != nil {
		refuse(400, "failed to parse JSON input")
		return
	}
	token := r.Header.Get("X-Vault-Token")
	end, good := v.tokens[token]
	good = good && (end.IsZero() || time.Now().Before(end))
	give := func() {
		fresh := fmt.Sprint("hvs.", len(v.tokens), rand.Text())
		v.tokens[fresh] = time.Now().Add(v.lease)
		answer(200, map[string]any{"auth": map[string]any{"client_token": fresh, "lease_duration": int(v.lease / time.Second), "renewable": true}})
	}
	path := strings.TrimPrefix(r.URL.Path, "/v1/")
	switch {
	case path == "auth/approle/login" && body["role_id"] == "role" && body["secret_id"] == "the-secret-id",
		path == "auth/kubernetes/login" && body["role"] == "signet" && body["jwt"] == "service.account.token",
		path == "auth/cert/login" && len(r.TLS.PeerCertificates) > 0 && r.TLS.PeerCertificates[0].Subject.CommonName == "signet":
		v.logins = append(v.logins, path)
		give()
	case strings.HasSuffix(path, "/login"):
		refuse(400, "invalid role or secret ID")
	case path == "pki/issuer/default/json":
		chain := []string{pemText(v.issuing), pemText(v.root)}
		answer(200, map[string]any{"data": map[string]any{"ca_chain": chain}})
	case !good:
		refuse(403, "permission denied")
	case path == "auth/token/lookup-self":
		answer(200, map[string]any{"data": map[string]any{"ttl": int(v.lease / time.Second), "renewable": true}})
	case path == "auth/token/renew-self":
		v.renewed++
		answer(200, map[string]any{"auth": map[string]any{"client_token": token, "lease_duration": int(v.lease / time.Second), "renewable": true}})
	case path == "pki/root/sign-intermediate":
		v.asked = append(v.asked, body)
		text, _ := body["csr"].(string)
		block, _ := pem.Decode([]byte(text))
		ttl, err := time.ParseDuration(fmt.Sprint(body["ttl"]))
		if block == nil || err != nil {
			refuse(400, "csr or ttl is malformed")
			return
		}
		csr, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil || csr.CheckSignature() != nil || body["uri_sans"] != "spiffe://example.org" {
			refuse(400, "csr could not be parsed, or its names are wrong")
			return
		}
		data := map[string]any{"certificate": v.sign(csr, ttl), "issuing_ca": pemText(v.issuing), "ca_chain": []string{pemText(v.issuing), pemText(v.root)}}
		if v.noRoot {
			data["ca_chain"] = []string{pemText(v.issuing)}
		}
		answer(200, map[string]any{"data": data})
	default:
		refuse(404, "no handler for route")
	}
}

func (v *vaultStandIn) open(t *testing.T, change func(*VaultConfig)) *Vault {
	t.Helper()
	c := VaultConfig{TrustDomain: testTD, Address: v.server.URL, CAFile: v.file("ca.pem"), Login: Login{TokenFile: v.write("token", "root-token\n")}}
	if change != nil {
		change(&c)
	}
	out, err := NewVault(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close() })
	return out
}

func TestVaultSigns(t *testing.T) {
	s := startVault(t)
	v := s.open(t, nil)
	key := newKey(t)
	chain, roots, err := v.Mint(t.Context(), request(t, key), 2*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if len(chain) != 2 || !chain[1].Equal(s.issuing) || len(roots) != 1 || !roots[0].Equal(s.root) || !key.PublicKey.Equal(chain[0].PublicKey) {
		t.Fatalf("%d certificates, %d roots", len(chain), len(roots))
	}
	pool, above := x509.NewCertPool(), x509.NewCertPool()
	pool.AddCert(roots[0])
	above.AddCert(chain[1])
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: above, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Error(err)
	}
	if asked := s.asked[0]; asked["ttl"] != "7200s" || asked["exclude_cn_from_sans"] != true || asked["use_csr_values"] != false {
		t.Errorf("it was asked %v", asked)
	}
	if roots, _, err := v.Follow(t.Context()); err != nil || len(roots) != 1 || !roots[0].Equal(s.root) {
		t.Errorf("Follow: %d roots, %v", len(roots), err)
	}
	// An engine that does not know its root: the operator names it.
	s.noRoot = true
	if _, _, err := v.Mint(t.Context(), request(t, key), time.Hour); err == nil || !strings.Contains(err.Error(), "root_file") {
		t.Errorf("without a root: %v", err)
	}
	withRoot := s.open(t, func(c *VaultConfig) { c.RootFile = s.write("root.pem", pemText(s.root)) })
	if _, roots, err := withRoot.Mint(t.Context(), request(t, key), time.Hour); err != nil || !roots[0].Equal(s.root) {
		t.Errorf("with root_file: %v", err)
	}
}

func TestVaultLogins(t *testing.T) {
	s := startVault(t)
	clientKey := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(5), Subject: pkix.Name{CommonName: "signet"}, NotAfter: time.Now().Add(time.Hour)},
		&x509.Certificate{SerialNumber: big.NewInt(5), Subject: pkix.Name{CommonName: "signet"}}, clientKey.Public(), clientKey)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(clientKey)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		login Login
		want  string
	}{
		{Login{RoleID: "role", SecretIDFile: s.write("secret-id", "the-secret-id\n")}, "auth/approle/login"},
		{Login{KubernetesRole: "signet", KubernetesTokenFile: s.write("sa", "service.account.token")}, "auth/kubernetes/login"},
		{Login{CertificateFile: s.write("client.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))),
			KeyFile: s.write("client.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})))}, "auth/cert/login"},
	} {
		s.logins = nil
		if err := tt.login.Check(); err != nil {
			t.Error(err)
		}
		v := s.open(t, func(c *VaultConfig) { c.Login = tt.login })
		for range 2 {
			if _, _, err := v.Mint(t.Context(), request(t, newKey(t)), time.Hour); err != nil {
				t.Errorf("%s: %v", tt.want, err)
			}
		}
		if len(s.logins) != 1 || s.logins[0] != tt.want {
			t.Errorf("logged in by %v, want once by %s", s.logins, tt.want)
		}
	}
	for _, l := range []Login{{}, {TokenFile: "/t", RoleID: "r", SecretIDFile: "/s"}, {RoleID: "r"}, {CertificateFile: "/c"}} {
		if l.Check() == nil {
			t.Errorf("%+v passes", l)
		}
	}
}

// Tokens are renewed at half of their life, got anew when they end or are revoked, and never shown.
func TestVaultTokenLife(t *testing.T) {
	s := startVault(t)
	now := time.Now()
	v := s.open(t, func(c *VaultConfig) {
		c.Login = Login{RoleID: "role", SecretIDFile: s.write("secret-id", "the-secret-id")}
		c.Now = func() time.Time { return now }
	})
	mint := func() {
		t.Helper()
		if _, _, err := v.Mint(t.Context(), request(t, newKey(t)), time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	mint()
	now = now.Add(31 * time.Minute)
	mint()
	if s.renewed != 1 || len(s.logins) != 1 {
		t.Errorf("after half of its life: %d renewals, %d logins; want 1 and 1", s.renewed, len(s.logins))
	}
	s.mu.Lock()
	clear(s.tokens) // all are revoked
	s.mu.Unlock()
	mint()
	if len(s.logins) != 2 {
		t.Errorf("after the revocation: %d logins, want 2", len(s.logins))
	}
	now = now.Add(2 * time.Hour)
	mint()
	if len(s.logins) != 3 {
		t.Errorf("after its end: %d logins, want 3", len(s.logins))
	}
	if text := fmt.Sprintf("%v %+v %#v %s %v %+v", v.token, v.token, v.token, v.token.value, v, v); strings.Contains(text, "hvs.") {
		t.Errorf("the token prints as %s", text)
	}
	// A token that the file's owner exchanges counts at once.
	w := s.open(t, func(c *VaultConfig) { c.Login.TokenFile = s.write("mine", "gone") })
	if _, _, err := w.Mint(t.Context(), request(t, newKey(t)), time.Hour); err == nil || !strings.Contains(err.Error(), "permission denied") || strings.Contains(err.Error(), "gone\"") {
		t.Errorf("a bad token: %v", err)
	}
	s.mu.Lock()
	s.tokens["fresh"] = time.Time{}
	s.mu.Unlock()
	s.write("mine", "fresh")
	if _, _, err := w.Mint(t.Context(), request(t, newKey(t)), time.Hour); err != nil {
		t.Errorf("an exchanged token: %v", err)
	}
}

func TestVaultThatIsNotWell(t *testing.T) {
	s := startVault(t)
	failures := 0
	onSign := func(f func(w http.ResponseWriter)) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "sign-intermediate") {
				return false
			}
			failures++
			f(w)
			return true
		}
	}
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("a redirect was followed, with the token %q", r.Header.Get("X-Vault-Token"))
	}))
	defer elsewhere.Close()
	text := func(s string) func(http.ResponseWriter) { return func(w http.ResponseWriter) { fmt.Fprint(w, s) } }
	status := func(code int, s string) func(http.ResponseWriter) {
		return func(w http.ResponseWriter) { w.WriteHeader(code); fmt.Fprint(w, s) }
	}
	for _, tt := range []struct {
		name  string
		f     func(http.ResponseWriter)
		want  string
		tries int
	}{
		{"sealed", status(503, `{"errors":["Vault is sealed"]}`), "Vault is sealed", attempts},
		{"refused", status(400, `{"errors":["common name not allowed"]}`), "common name not allowed", 1},
		{"an error that is none", status(500, `<html>`), "status 500", attempts},
		{"no JSON", text("<html>hello"), "not the JSON", 1},
		{"empty", text(""), "not the JSON", 1},
		{"no data", text(`{}`), "no PEM certificate", 1},
		{"null", text(`null`), "no PEM certificate", 1},
		{"another type", text(`{"data":{"certificate":7}}`), "not the JSON", 1},
		{"garbage", text(`{"data":{"certificate":"garbage"}}`), "no PEM certificate", 1},
		{"a key", text(`{"data":{"certificate":"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"}}`), "another kind", 1},
		{"a chain without end", text(`{"data":{"certificate":` + quote(pemText(s.root)) + `,"ca_chain":[` + strings.Repeat(`"",`, 100) + `""]}}`), "101 certificates", 1},
		{"an endless answer", text(`{"data":{"certificate":"` + strings.Repeat("A", maxVaultAnswerBytes)), "more than", 1},
		{"a redirect", func(w http.ResponseWriter) { w.Header().Set("Location", elsewhere.URL); w.WriteHeader(307) }, "redirects", 1},
		{"a long complaint", status(400, `{"errors":[`+quote(strings.Repeat("\\u001b[2J", 1000))+`]}`), "status 400", 1},
	} {
		failures = 0
		s.mu.Lock()
		s.broken = onSign(tt.f)
		s.mu.Unlock()
		v := s.open(t, nil)
		_, _, err := v.Mint(t.Context(), request(t, newKey(t)), time.Hour)
		if err == nil || !strings.Contains(err.Error(), tt.want) || failures != tt.tries {
			t.Errorf("%s: %v after %d tries; want an error with %q after %d", tt.name, err, failures, tt.want, tt.tries)
		}
		if err != nil && (len(err.Error()) > 1000 || strings.Contains(err.Error(), "\x1b") || strings.Contains(err.Error(), "root-token")) {
			t.Errorf("%s: the error is too long, moves the cursor or holds the token", tt.name)
		}
	}
	// After one failure it succeeds.
	s.mu.Lock()
	failures = 0
	first := onSign(status(503, `{"errors":["standby"]}`))
	s.broken = func(w http.ResponseWriter, r *http.Request) bool { return failures == 0 && first(w, r) }
	s.mu.Unlock()
	if _, _, err := s.open(t, nil).Mint(t.Context(), request(t, newKey(t)), time.Hour); err != nil {
		t.Errorf("one failure and then success: %v", err)
	}
}

func quote(s string) string {
	out, _ := json.Marshal(s)
	return string(out)
}

func TestVaultIsVerified(t *testing.T) {
	s := startVault(t)
	other := startVault(t)
	other.write("other.pem", pemText(other.root))
	v := s.open(t, func(c *VaultConfig) { c.CAFile = other.file("other.pem") })
	if _, _, err := v.Mint(t.Context(), request(t, newKey(t)), time.Hour); err == nil || !strings.Contains(err.Error(), "ca_file") {
		t.Errorf("a server that does not verify: %v", err)
	}
	if len(s.asked) != 0 {
		t.Error("it got the request")
	}
	for address, ok := range map[string]bool{"https://vault:8200": true, "https://vault:8200/": true, "http://127.0.0.1:8200": true, "http://[::1]:8200": true, "http://vault:8200": false,
		"vault:8200": false, "": false, "ftp://vault": false, "https://user:pw@vault": false, "https://vault/v1/pki": false, "https://vault?x=1": false} {
		if _, err := CheckVaultAddress(address); (err == nil) != ok {
			t.Errorf("address %q: %v, want it taken: %t", address, err, ok)
		}
	}
	// Nobody listens: temporary, named, and over soon.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone := "https://" + l.Addr().String()
	l.Close()
	v = s.open(t, func(c *VaultConfig) { c.Address = gone })
	if _, _, err := v.Mint(t.Context(), request(t, newKey(t)), time.Hour); !errors.Is(err, errTemporary) || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("a server that is gone: %v", err)
	}
}

// FuzzVaultAnswer holds that an answer gives either an error or certificates within the limits, roots among them.
func FuzzVaultAnswer(f *testing.F) {
	dir := opensslPKI(f)
	read := func(name string) string {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			f.Fatal(err)
		}
		return string(text)
	}
	answer := func(cert, issuing string, chain ...string) []byte {
		text, err := json.Marshal(map[string]any{"data": map[string]any{"certificate": cert, "issuing_ca": issuing, "ca_chain": chain}})
		if err != nil {
			f.Fatal(err)
		}
		return text
	}
	f.Add(answer(read("issuing.pem"), read("root.pem"), read("root.pem")))
	f.Add(answer(read("issuing.pem"), ""))
	f.Add(answer(read("issuing.key"), read("root.pem")))
	f.Add([]byte(`{"data":{"ca_chain":null}}`))
	f.Add([]byte(`{"auth":{"client_token":"x","lease_duration":-1}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var auth authAnswer
		if readVault(text, &auth) == nil {
			if l := lease(auth.Auth.LeaseDuration); l < 0 || l > 1000*24*time.Hour {
				t.Errorf("lease %v", l)
			}
		}
		var a signAnswer
		if readVault(text, &a) != nil {
			return
		}
		chain, roots, err := a.read(func() ([]*x509.Certificate, error) { return nil, nil })
		if err == nil && (len(chain) == 0 || len(chain) > maxCertificates || len(roots) == 0) {
			t.Errorf("%d certificates, %d roots", len(chain), len(roots))
		}
	})
}
