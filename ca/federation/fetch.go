// Package federation fetches the bundles of foreign trust domains from their bundle endpoints and keeps them up to date in
// the registry. It polls for as long as it runs, and fetches at once when it is asked to. It never decides whom the trust
// domain federates with: that is what operators wrote into the registry.
package federation

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/spiffe"
)

// Bounds of one fetch. The bundle itself is bounded by spiffe.MaxBundleBytes.
const (
	fetchTimeout   = 30 * time.Second
	maxHeaderBytes = 32 << 10
	maxShownBytes  = 200
)

// A Fetcher fetches bundles. It is safe for concurrent use.
type Fetcher struct {
	// Bundles verify endpoints that prove who they are with an X509-SVID, as of the moment of the handshake. [FED-55]
	Bundles x509bundle.Source
	// WebRoots verify the others. Nil: those of the system. Bundles are never among them. [FED-44]
	WebRoots *x509.CertPool
	// Timeout bounds a fetch from the first byte to the last. Zero: 30 seconds.
	Timeout time.Duration
	Now     func() time.Time // nil: time.Now
}

// Fetch gets the bundle of f's trust domain from its endpoint. The second result is what the bundle holds that cannot be
// used, and was left out.
//
// Only the answer 200 of exactly the configured URL counts. A redirect is an error that names its target: an endpoint that can
// send the CA elsewhere could make it knock at any door of the operator's network. [docs/decisions/0013]
func (f *Fetcher) Fetch(ctx context.Context, rel *registry.Federation) (*spiffebundle.Bundle, []error, error) {
	if err := registry.CheckEndpointURL(rel.URL); err != nil {
		return nil, nil, err
	}
	doc, err := f.get(ctx, rel.URL, f.tlsConfig(rel), spiffe.MaxBundleBytes)
	if err != nil {
		return nil, nil, err
	}
	return spiffe.ParseBundle(rel.TrustDomain, doc)
}

// FetchWeb gets a document of at most limit bytes, and one more of a longer one, from a server that the roots of the web
// verify, by the same rules as a bundle.
func (f *Fetcher) FetchWeb(ctx context.Context, url string, limit int64) ([]byte, error) {
	return f.get(ctx, url, f.tlsConfig(&registry.Federation{Profile: registry.ProfileWeb}), limit)
}

// get gets a document and one byte more if it is longer than limit.
func (f *Fetcher) get(ctx context.Context, url string, config *tls.Config, limit int64) ([]byte, error) {
	timeout := f.Timeout
	if timeout == 0 {
		timeout = fetchTimeout
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("the endpoint took longer than %v", timeout))
	defer cancel()
	transport := &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		TLSClientConfig:        config,
		DisableKeepAlives:      true, // each fetch is judged by the authorities of its own moment
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHeaderBytes,
	}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		return nil, why(ctx, err)
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode >= 300 && resp.StatusCode < 400:
		return nil, fmt.Errorf("the endpoint redirects to %q, which is not followed; set that URL, if it is right", clip(resp.Header.Get("Location")))
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("the endpoint answered %d instead of 200", resp.StatusCode)
	}
	doc, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err == nil {
		err = ctx.Err() // an answer that was cut by our own end can look complete
	}
	if err != nil {
		return nil, why(ctx, err)
	}
	return doc, nil
}

// why prefers the reason for which ctx ended to what came of it.
func why(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// tlsConfig verifies the endpoint as its profile says, and never as the other one. [FED-15, FED-43, FED-54]
func (f *Fetcher) tlsConfig(rel *registry.Federation) *tls.Config {
	c := &tls.Config{
		MinVersion: tls.VersionTLS12,
		CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305},
		Time: f.Now,
	}
	if rel.Profile == registry.ProfileWeb {
		c.RootCAs = f.WebRoots
		return c
	}
	c.InsecureSkipVerify = true // the host's name plays no part; what follows verifies
	c.VerifyPeerCertificate = spiffe.VerifyPeer(f.Bundles, f.Now, func(id spiffeid.ID, _ [][]*x509.Certificate) error {
		if id != rel.EndpointID {
			return fmt.Errorf("the endpoint is %q, not %q", id, rel.EndpointID)
		}
		return nil
	})
	return c
}

func clip(s string) string {
	if len(s) > maxShownBytes {
		return strings.ToValidUTF8(s[:maxShownBytes], "") + "..."
	}
	return s
}

// errStale says that an old document came back, which is something to raise an alarm about. [FED-08]
var errStale = errors.New("not adopted")
