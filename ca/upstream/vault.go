package upstream

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	maxVaultAnswerBytes = 1 << 20
	vaultTimeout        = 20 * time.Second
)

// VaultConfig says how a Vault or OpenBao server is reached, and which of its CAs signs.
type VaultConfig struct {
	TrustDomain spiffeid.TrustDomain
	// Address is its URL. http is taken for loopback addresses only.
	Address string
	// Mount is the path of the PKI secrets engine. Empty means pki.
	Mount string
	// Issuer is the issuer of that engine, by name or id. Empty means its default.
	Issuer string
	// Namespace is for Vault Enterprise and OpenBao namespaces.
	Namespace string
	// CAFile is a PEM file with the CAs that verify the server's certificate. Empty means those of the system.
	CAFile string
	// RootFile is a PEM file with the roots of the signing CA. Empty means that the engine knows its chain up to the root.
	RootFile string
	// Login says how to come by a token.
	Login Login
	Now   func() time.Time
}

// A Vault is a PKI secrets engine of a Vault or OpenBao server above this CA. One call of its methods is made at a time.
type Vault struct {
	c      VaultConfig
	base   *url.URL
	client *http.Client
	token  token
}

// NewVault checks the configuration. It connects when it is first asked.
func NewVault(c VaultConfig) (*Vault, error) {
	if c.Mount == "" {
		c.Mount = "pki"
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	base, err := CheckVaultAddress(c.Address)
	if err != nil {
		return nil, fmt.Errorf("address: %w", err)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, Time: c.Now}
	if c.CAFile != "" {
		text, err := readFile(c.CAFile, maxPEMBytes)
		if err != nil {
			return nil, fmt.Errorf("ca_file: %w", err)
		}
		certs, err := ParseCertificates(text, "ca_file "+c.CAFile)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		for _, cert := range certs {
			config.RootCAs.AddCert(cert)
		}
	}
	c.Login.clientCertificate(config)
	return &Vault{c: c, base: base, client: &http.Client{
		Timeout:   vaultTimeout,
		Transport: &http.Transport{TLSClientConfig: config, MaxIdleConns: 2, IdleConnTimeout: time.Minute, TLSHandshakeTimeout: 10 * time.Second, Proxy: http.ProxyFromEnvironment, MaxResponseHeaderBytes: 64 << 10},
		// A redirect would take the token along to wherever it points.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// CheckVaultAddress reads the URL of a server.
func CheckVaultAddress(address string) (*url.URL, error) {
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" {
		return nil, fmt.Errorf("%q is not a URL such as https://vault.example.org:8200", address)
	}
	switch u.Scheme {
	case "https":
		return u, nil
	case "http":
		if ip := net.ParseIP(u.Hostname()); u.Hostname() == "localhost" || ip != nil && ip.IsLoopback() {
			return u, nil
		}
		return nil, fmt.Errorf("%q is not encrypted, and the token would be read on the way; use https", address)
	}
	return nil, fmt.Errorf("%q is neither https nor http", address)
}

// Format names the server, and hides the token, whatever the verb.
func (v *Vault) Format(f fmt.State, _ rune) { io.WriteString(f, v.Name()) }

// Name implements authority.Upstream.
func (v *Vault) Name() string { return "Vault " + v.base.Host + ", mount " + v.c.Mount }

// Close lets go of connections. The token is left to its end: the next start of the CA may use it from its file.
func (v *Vault) Close() error {
	v.client.CloseIdleConnections()
	return nil
}

// Mint has the engine sign an intermediate.
func (v *Vault) Mint(ctx context.Context, csr []byte, ttl time.Duration) (chain, roots []*x509.Certificate, err error) {
	path := v.c.Mount + "/root/sign-intermediate"
	if v.c.Issuer != "" {
		path = v.c.Mount + "/issuer/" + v.c.Issuer + "/sign-intermediate"
	}
	request := map[string]any{
		"csr":                  string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})),
		"common_name":          v.c.TrustDomain.Name() + " X.509 authority",
		"organization":         "signet",
		"uri_sans":             v.c.TrustDomain.IDString(),
		"exclude_cn_from_sans": true,
		"use_csr_values":       false,
		"format":               "pem",
		"ttl":                  fmt.Sprintf("%ds", int64(ttl/time.Second)),
	}
	if len(v.c.TrustDomain.Name()) > 40 { // ub-common-name
		request["common_name"] = "X.509 authority"
	}
	var answer signAnswer
	if err := v.authorized(ctx, http.MethodPost, path, request, &answer); err != nil {
		return nil, nil, err
	}
	return answer.read(v.roots)
}

// A signAnswer is what sign-intermediate answers, and what is read of an issuer.
type signAnswer struct {
	Data struct {
		Certificate string   `json:"certificate"`
		IssuingCA   string   `json:"issuing_ca"`
		CAChain     []string `json:"ca_chain"`
	} `json:"data"`
}

// read returns the new certificate with those above it, and the roots.
func (a signAnswer) read(configured func() ([]*x509.Certificate, error)) (chain, roots []*x509.Certificate, err error) {
	if chain, err = ParseCertificates([]byte(a.Data.Certificate), "data.certificate"); err != nil {
		return nil, nil, err
	}
	above, err := a.above()
	if err != nil {
		return nil, nil, err
	}
	if roots, err = configured(); err != nil {
		return nil, nil, err
	}
	for _, c := range above {
		if !bytes.Equal(c.RawIssuer, c.RawSubject) {
			chain = append(chain, c)
		} else if roots == nil {
			roots = append(roots, c)
		}
	}
	if len(roots) == 0 {
		return nil, nil, errors.New("the answer holds no root, as the engine does not know the chain of its CA; name the root with root_file, or set the chain there (set-signed with the whole chain)")
	}
	if len(chain) > maxCertificates {
		return nil, nil, fmt.Errorf("the answer holds %d certificates, more than %d", len(chain), maxCertificates)
	}
	return chain, roots, nil
}

// above returns the certificates of issuing_ca and ca_chain, each once.
func (a signAnswer) above() ([]*x509.Certificate, error) {
	if len(a.Data.CAChain) > maxCertificates {
		return nil, fmt.Errorf("data.ca_chain has %d certificates, more than %d", len(a.Data.CAChain), maxCertificates)
	}
	var out []*x509.Certificate
	for i, text := range append([]string{a.Data.IssuingCA}, a.Data.CAChain...) {
		if strings.TrimSpace(text) == "" {
			continue
		}
		certs, err := ParseCertificates([]byte(text), fmt.Sprintf("certificate %d above", i))
		if err != nil {
			return nil, err
		}
		for _, c := range certs {
			if !contains(out, c) {
				out = append(out, c)
			}
		}
	}
	return out, nil
}

func contains(list []*x509.Certificate, cert *x509.Certificate) bool {
	for _, c := range list {
		if c.Equal(cert) {
			return true
		}
	}
	return false
}

// roots returns those of RootFile, or nil.
func (v *Vault) roots() ([]*x509.Certificate, error) {
	if v.c.RootFile == "" {
		return nil, nil
	}
	text, err := readFile(v.c.RootFile, maxPEMBytes)
	if err != nil {
		return nil, fmt.Errorf("root_file: %w", err)
	}
	return ParseCertificates(text, "root_file "+v.c.RootFile)
}

// Follow returns the roots of the signing CA now, and sees to it that the token stays good.
func (v *Vault) Follow(ctx context.Context) ([]*x509.Certificate, []JWTKey, error) {
	if err := v.keepToken(ctx); err != nil {
		return nil, nil, err
	}
	roots, err := v.roots()
	if err != nil || roots != nil {
		return roots, nil, err
	}
	issuer := v.c.Issuer
	if issuer == "" {
		issuer = "default"
	}
	var answer signAnswer
	if err := v.call(ctx, http.MethodGet, v.c.Mount+"/issuer/"+issuer+"/json", nil, "", &answer); err != nil {
		return nil, nil, err
	}
	above, err := answer.above()
	if err != nil {
		return nil, nil, err
	}
	for _, c := range above {
		if bytes.Equal(c.RawIssuer, c.RawSubject) {
			roots = append(roots, c)
		}
	}
	return roots, nil, nil
}

// A vaultError is an answer other than success.
type vaultError struct {
	code int
	text string
}

func (e *vaultError) Error() string { return fmt.Sprintf("HTTP status %d: %s", e.code, e.text) }

// Is reports a status after which the same may succeed.
func (e *vaultError) Is(target error) bool {
	return target == errTemporary && (e.code == http.StatusTooManyRequests || e.code >= 500 && e.code != http.StatusNotImplemented)
}

// call makes one request, again if it failed for the time being, and reads the answer.
func (v *Vault) call(ctx context.Context, method, path string, request any, token secret, answer any) error {
	_, err := retry(ctx, func() (struct{}, error) {
		return struct{}{}, v.callOnce(ctx, method, path, request, token, answer)
	})
	if err != nil {
		return fmt.Errorf("%s /v1/%s: %w", method, path, err)
	}
	return nil
}

func (v *Vault) callOnce(ctx context.Context, method, path string, request any, token secret, answer any) error {
	var body io.Reader
	if request != nil {
		text, err := json.Marshal(request)
		if err != nil {
			return err
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, v.base.JoinPath("v1", path).String(), body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-Vault-Request", "true")
	if v.c.Namespace != "" {
		req.Header.Set("X-Vault-Namespace", v.c.Namespace)
	}
	if token != "" {
		req.Header.Set("X-Vault-Token", string(token))
	}
	r, err := v.client.Do(req)
	if err != nil {
		var unknown *tls.CertificateVerificationError
		if errors.As(err, &unknown) {
			return fmt.Errorf("%w (see ca_file)", unwrapURL(err))
		}
		return fmt.Errorf("%w%w", unwrapURL(err), hidden{errTemporary})
	}
	defer r.Body.Close()
	text, err := io.ReadAll(io.LimitReader(r.Body, maxVaultAnswerBytes+1))
	switch {
	case err != nil:
		return fmt.Errorf("reading the answer: %w%w", err, hidden{errTemporary})
	case len(text) > maxVaultAnswerBytes:
		return fmt.Errorf("the answer has more than %d bytes", maxVaultAnswerBytes)
	case r.StatusCode >= 300 && r.StatusCode < 400:
		return &vaultError{r.StatusCode, "it redirects, which is not followed since the token would go along; set address to the server that answers"}
	case r.StatusCode < 200 || r.StatusCode >= 300:
		return &vaultError{r.StatusCode, vaultErrors(text)}
	}
	return readVault(text, answer)
}

// hidden keeps an error in the chain without its text.
type hidden struct{ error }

func (hidden) Error() string   { return "" }
func (h hidden) Unwrap() error { return h.error }

// unwrapURL leaves out the URL, which the caller names.
func unwrapURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// readVault reads a JSON answer.
func readVault(text []byte, answer any) error {
	if err := json.Unmarshal(text, answer); err != nil {
		return errors.New("the answer is not the JSON that was expected") // the parser's text may hold a part of a token
	}
	return nil
}

// vaultErrors returns what the server says is wrong, printable and bounded.
func vaultErrors(text []byte) string {
	var answer struct {
		Errors []string `json:"errors"`
	}
	if json.Unmarshal(text, &answer) != nil || len(answer.Errors) == 0 {
		return "(no reason given)"
	}
	return fmt.Sprintf("%.300q", strings.Join(answer.Errors[:min(len(answer.Errors), 3)], "; "))
}
