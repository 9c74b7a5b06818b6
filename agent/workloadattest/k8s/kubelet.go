package k8s

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/signet-id/signet/internal/durable"
)

const (
	// requestTimeout bounds a request with its answer. It is less than the attestor's timeout, so that a connection that hangs
	// does not fail a whole attestation.
	requestTimeout = 4 * time.Second

	maxFileBytes   = 1 << 20
	maxTokenBytes  = 64 << 10
	maxHeaderBytes = 64 << 10
	maxErrorBytes  = 4 << 10
)

// A kubelet is asked for the pods of its node.
type kubelet struct {
	url, nodeName string
	door          *door
}

func newKubelet(cfg Config) *kubelet {
	d := &door{whom: "the kubelet", serverName: cfg.kubeletName(), caPath: cfg.KubeletCAPath, skipVerification: cfg.SkipKubeletVerification,
		tokenPath: cfg.TokenPath, certificatePath: cfg.CertificatePath, keyPath: cfg.PrivateKeyPath, forbidden: "the agent's service account needs get on nodes/pods, or before Kubernetes 1.33 on nodes/proxy"}
	if cfg.ReadOnlyPort != 0 {
		d.plain = true
	}
	return &kubelet{url: cfg.kubeletURL(), nodeName: cfg.NodeName, door: d}
}

// list asks for the pods.
func (k *kubelet) list(ctx context.Context) (*podList, error) {
	l := newPodList(time.Now())
	err := k.door.get(ctx, k.url, func(body io.Reader) error {
		return decodePods(body, func(p *pod) error {
			if k.nodeName != "" && p.nodeName != "" && p.nodeName != k.nodeName {
				return fmt.Errorf("it has pods of node %.100q, and node_name is %q: this is the kubelet of another node", p.nodeName, k.nodeName)
			}
			return l.add(p)
		})
	})
	if err != nil {
		return nil, err
	}
	return l, nil
}

// A door is a way to the kubelet or to the API server. Files are read for each request: they rotate.
type door struct {
	whom, serverName         string
	caPath                   string
	tokenPath                string
	certificatePath, keyPath string // instead of the token
	forbidden                string // what helps against a 403
	skipVerification, plain  bool
	timeout                  time.Duration // not changed once it is used; zero means requestTimeout

	mu sync.Mutex
	// client is the one for shown, which are the files that it was made of.
	client *http.Client
	shown  [3][]byte
}

// get makes a request and hands on the body of its answer.
func (d *door) get(ctx context.Context, url string, read func(io.Reader) error) error {
	timeout := cmp.Or(d.timeout, requestTimeout)
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("%s did not answer within %s", d.whom, timeout))
	defer cancel()
	client, err := d.open()
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return fmt.Errorf("asking %s: %w", d.whom, err)
	}
	req.Header.Set("Accept", "application/json")
	token := ""
	if !d.plain && d.certificatePath == "" {
		if token, err = readToken(d.tokenPath); err != nil {
			return err
		}
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := client.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
			return fmt.Errorf("asking %s: %w (%s)", d.whom, err, d.certificateHint())
		}
		return fmt.Errorf("asking %s: %w", d.whom, err)
	}
	defer func() { _ = resp.Body.Close() }() // it was read, or is of no use
	if resp.StatusCode != http.StatusOK {
		return d.refused(resp, token)
	}
	if err := read(resp.Body); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("reading what %s answers: %w", d.whom, err)
	}
	return nil
}

func (d *door) certificateHint() string {
	return fmt.Sprintf("does %s hold the authorities of its certificate, and is its name there %q?", d.caPath, d.serverName)
}

func (d *door) refused(resp *http.Response, token string) error {
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBytes)) // what could be read is shown
	said := fmt.Sprintf("%.300q", strings.TrimSpace(string(text)))
	if token != "" && bytes.Contains(text, []byte(token[:min(len(token), 16)])) {
		said = "[a text with the token in it]"
	}
	err := fmt.Errorf("%s answers %d: %s", d.whom, resp.StatusCode, said)
	switch resp.StatusCode {
	case http.StatusUnauthorized:
		return fmt.Errorf("%w (is the token still good, and does the kubelet have authentication.webhook.enabled?)", err)
	case http.StatusForbidden:
		return fmt.Errorf("%w (%s)", err, d.forbidden)
	}
	return err
}

// open returns a client for what the files hold now.
func (d *door) open() (*http.Client, error) {
	var files [3][]byte
	if !d.plain {
		for i, path := range []string{d.caPath, d.certificatePath, d.keyPath} {
			if path == "" || i == 0 && d.skipVerification {
				continue
			}
			var err error
			if files[i], err = durable.ReadFile(path, maxFileBytes); err != nil {
				return nil, fmt.Errorf("asking %s: %w", d.whom, err)
			}
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.client != nil && bytes.Equal(files[0], d.shown[0]) && bytes.Equal(files[1], d.shown[1]) && bytes.Equal(files[2], d.shown[2]) {
		return d.client, nil
	}
	t := &http.Transport{
		DialContext:            (&net.Dialer{Timeout: requestTimeout}).DialContext,
		TLSHandshakeTimeout:    requestTimeout,
		MaxResponseHeaderBytes: maxHeaderBytes,
		MaxConnsPerHost:        2,
		MaxIdleConnsPerHost:    1,
		IdleConnTimeout:        30 * time.Second,
		DisableCompression:     true, // so that a bound on what is read is one on what comes over the wire
	}
	if !d.plain {
		var err error
		if t.TLSClientConfig, err = d.tls(files); err != nil {
			return nil, err
		}
	}
	d.closeIdle()
	d.shown, d.client = files, &http.Client{
		Transport: t,
		// Neither redirects; somebody else must not get the token.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return d.client, nil
}

func (d *door) tls(files [3][]byte) (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: d.serverName, InsecureSkipVerify: d.skipVerification}
	if !d.skipVerification {
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(files[0]) {
			return nil, fmt.Errorf("asking %s: %s holds no certificate in PEM form", d.whom, d.caPath)
		}
	}
	if d.certificatePath != "" {
		pair, err := tls.X509KeyPair(files[1], files[2])
		if err != nil {
			return nil, fmt.Errorf("asking %s: %s and %s are not a certificate and its key, both in PEM form", d.whom, d.certificatePath, d.keyPath)
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	return cfg, nil
}

// closeIdle gives up connections that nothing uses now. d.mu is held.
func (d *door) closeIdle() {
	if d.client != nil {
		d.client.CloseIdleConnections()
	}
}

func (d *door) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closeIdle()
}

// readToken reads a bearer token. Its error never repeats it.
func readToken(path string) (string, error) {
	data, err := durable.ReadFile(path, maxTokenBytes)
	if err != nil {
		return "", fmt.Errorf("token_path: %w", err)
	}
	token := strings.TrimSpace(string(data))
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("token_path: %s holds no bearer token", path)
	}
	return token, nil
}
