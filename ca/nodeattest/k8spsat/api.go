package k8spsat

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"time"

	"github.com/go-jose/go-jose/v4/json"
)

const (
	// maxAnswerBytes bounds an answer of the API server. etcd does not hold larger objects than 1.5 MiB.
	maxAnswerBytes  = 2 << 20
	maxHeaderBytes  = 64 << 10
	maxErrorBytes   = 4 << 10
	requestTimeout  = 5 * time.Second
	maxTries        = 4
	firstRetryDelay = 100 * time.Millisecond
)

// errNotFound says that the API server knows no such object.
var errNotFound = errors.New("no such object")

// A session is one connection to an API server with the credentials of this moment, for one attestation.
type session struct {
	credentials *credentials
	transport   *http.Transport
	client      *http.Client
}

func open(c *credentials) *session {
	t := &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		TLSClientConfig: &tls.Config{
			MinVersion: tls.VersionTLS12, RootCAs: c.roots, ServerName: c.serverName, Certificates: c.certificates,
		},
		ForceAttemptHTTP2:      true,
		TLSHandshakeTimeout:    requestTimeout,
		ResponseHeaderTimeout:  requestTimeout,
		MaxResponseHeaderBytes: maxHeaderBytes,
		MaxConnsPerHost:        1,
		DisableCompression:     true, // so that maxAnswerBytes is also what came over the wire
	}
	return &session{credentials: c, transport: t, client: &http.Client{
		Transport: t,
		// An API server does not redirect; somebody else must not get our token.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

func (s *session) close() { s.transport.CloseIdleConnections() }

// review asks who a token is for.
func (s *session) review(ctx context.Context, token string, audiences []string) (*tokenReviewJSON, error) {
	body, err := json.Marshal(tokenReview{
		APIVersion: "authentication.k8s.io/v1", Kind: "TokenReview", Spec: &reviewSpec{Token: token, Audiences: audiences},
	})
	if err != nil {
		return nil, errors.New("the token cannot be sent")
	}
	var r tokenReview
	if err := s.call(ctx, http.MethodPost, "/apis/authentication.k8s.io/v1/tokenreviews", body, token, &r); err != nil {
		return nil, err
	}
	if r.Kind != "TokenReview" || r.APIVersion != "authentication.k8s.io/v1" {
		return nil, fmt.Errorf("the API server answered a TokenReview with an object of kind %q, version %q", clip(r.Kind), clip(r.APIVersion))
	}
	return &r.Status, nil
}

func (s *session) pod(ctx context.Context, namespace, name string) (*pod, error) {
	if !isDNSName(namespace) || !isDNSName(name) {
		return nil, errors.New("the name of the pod is none that an object can have")
	}
	var p pod
	if err := s.call(ctx, http.MethodGet, "/api/v1/namespaces/"+namespace+"/pods/"+name, nil, "", &p); err != nil {
		return nil, err
	}
	if p.Kind != "Pod" {
		return nil, fmt.Errorf("the API server answered with an object of kind %q, not a Pod", clip(p.Kind))
	}
	return &p, nil
}

func (s *session) node(ctx context.Context, name string) (*node, error) {
	if !isDNSName(name) {
		return nil, errors.New("the name of the node is none that an object can have")
	}
	var n node
	if err := s.call(ctx, http.MethodGet, "/api/v1/nodes/"+name, nil, "", &n); err != nil {
		return nil, err
	}
	if n.Kind != "Node" {
		return nil, fmt.Errorf("the API server answered with an object of kind %q, not a Node", clip(n.Kind))
	}
	return &n, nil
}

// call makes one request, and makes it again where the fault may pass. No error of it repeats secret.
func (s *session) call(ctx context.Context, method, path string, body []byte, secret string, into any) error {
	for try, delay := 1, firstRetryDelay; ; try, delay = try+1, 2*delay {
		err := s.once(ctx, method, path, body, secret, into)
		if t, ok := errors.AsType[*transientError](err); !ok || try == maxTries || ctx.Err() != nil {
			return err
		} else if err := pause(ctx, delay/2+rand.N(delay)); err != nil {
			return fmt.Errorf("%w, and there is no time to try again: %w", t, err)
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// A transientError is a fault that may pass by itself.
type transientError struct{ err error }

func (e *transientError) Error() string { return e.err.Error() }
func (e *transientError) Unwrap() error { return e.err }

func (s *session) once(ctx context.Context, method, path string, body []byte, secret string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, s.credentials.server+path, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("asking the API server: %w", err)
	}
	req.Header.Set("Accept", "application/json")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if s.credentials.token != "" {
		req.Header.Set("Authorization", "Bearer "+s.credentials.token)
	}
	resp, err := s.client.Do(req)
	if err != nil {
		err = fmt.Errorf("asking the API server: %w", err)
		if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
			return err // it will not be another one in a second
		}
		return &transientError{err}
	}
	defer func() { _ = resp.Body.Close() }() // it was read, or is of no use
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusCreated {
		return s.refused(resp, method, path, secret)
	}
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes+1))
	if err != nil {
		return &transientError{fmt.Errorf("reading the API server's answer to %s %s: %w", method, path, err)}
	}
	if len(answer) > maxAnswerBytes {
		return fmt.Errorf("the API server's answer to %s %s is larger than %d bytes", method, path, maxAnswerBytes)
	}
	if err := json.Unmarshal(answer, into); err != nil {
		return fmt.Errorf("the API server's answer to %s %s is not the JSON object that it should be", method, path)
	}
	return nil
}

// refused reads an answer that is no success.
func (s *session) refused(resp *http.Response, method, path, secret string) error {
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBytes)) // what could be read is shown
	var status struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(text, &status) != nil || status.Message == "" {
		status.Message = string(text)
	}
	err := fmt.Errorf("the API server answers %s %s with %d: %s", method, path, resp.StatusCode, excerpt(status.Message, secret, s.credentials.token))
	switch resp.StatusCode {
	case http.StatusNotFound:
		return fmt.Errorf("%w: %w", errNotFound, err)
	case http.StatusUnauthorized:
		return fmt.Errorf("%w (are the CA's credentials for this cluster still good?)", err)
	case http.StatusForbidden:
		return fmt.Errorf("%w (the CA needs create on tokenreviews, get on pods and get on nodes)", err)
	case http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return &transientError{err}
	}
	return err
}
