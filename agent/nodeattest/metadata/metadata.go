// Package metadata asks the metadata service that a cloud gives its instances, for the attestors in the folders beside
// it. The service is on the link itself and speaks plain HTTP: no proxy and no redirect is followed, and each answer has
// a bound.
package metadata

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

const (
	maxAnswerBytes  = 32 << 10
	maxHeaderBytes  = 16 << 10
	dialTimeout     = 2 * time.Second
	requestTimeout  = 4 * time.Second
	maxTries        = 3
	firstRetryDelay = 200 * time.Millisecond
)

// A Service is the metadata service at one address.
type Service struct {
	base   string
	client *http.Client
}

// A Request is one question.
type Request struct {
	Method string
	Path   string // with the query, if there is one
	Header map[string]string
}

// A StatusError is an answer that is no success.
type StatusError struct {
	Path string
	Code int
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("the metadata service answers %s with %d %s", e.Path, e.Code, http.StatusText(e.Code))
}

// CheckEndpoint says whether s can be the endpoint of a metadata service: http or https, and a host.
func CheckEndpoint(s string) error {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" {
		return fmt.Errorf("%q is not of the form http://host or http://host:port", s)
	}
	return nil
}

// Open returns the service at an endpoint that CheckEndpoint accepts. Close frees its connection.
func Open(endpoint string) *Service {
	return &Service{
		base: strings.TrimRight(endpoint, "/"),
		client: &http.Client{
			Transport: &http.Transport{
				Proxy:                  nil, // evidence is not shown to a proxy
				DialContext:            (&net.Dialer{Timeout: dialTimeout}).DialContext,
				MaxResponseHeaderBytes: maxHeaderBytes,
				MaxConnsPerHost:        1,
				DisableCompression:     true, // so that maxAnswerBytes is also what came over the wire
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
}

// Close ends idle connections.
func (s *Service) Close() { s.client.CloseIdleConnections() }

// Ask makes a request, again where the fault may pass, and returns the answer's header and body. Its errors repeat nothing
// that the service sent but the status.
func (s *Service) Ask(ctx context.Context, r Request) (http.Header, []byte, error) {
	for try, delay := 1, firstRetryDelay; ; try, delay = try+1, 2*delay {
		header, body, err := s.once(ctx, r)
		if err == nil || try == maxTries || ctx.Err() != nil || !transient(err) {
			return header, body, err
		}
		timer := time.NewTimer(delay/2 + rand.N(delay))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, nil, errors.Join(err, ctx.Err())
		}
	}
}

// transient says whether a fault may pass by itself. A service that does not answer at all is asked once more.
func transient(err error) bool {
	if s, ok := errors.AsType[*StatusError](err); ok {
		return s.Code == http.StatusTooManyRequests || s.Code >= http.StatusInternalServerError
	}
	return !errors.Is(err, errTooLarge)
}

var errTooLarge = fmt.Errorf("the metadata service's answer is larger than %d bytes", maxAnswerBytes)

func (s *Service) once(ctx context.Context, r Request) (http.Header, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, r.Method, s.base+r.Path, nil)
	if err != nil {
		return nil, nil, err
	}
	for name, value := range r.Header {
		req.Header.Set(name, value)
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, nil, fmt.Errorf("asking the metadata service: %w", err)
	}
	defer func() { _ = resp.Body.Close() }() // it was read, or is of no use
	if resp.StatusCode != http.StatusOK {
		path, _, _ := strings.Cut(r.Path, "?")
		return nil, nil, &StatusError{Path: path, Code: resp.StatusCode}
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes+1))
	if err != nil {
		return nil, nil, fmt.Errorf("reading the metadata service's answer: %w", err)
	}
	if len(body) > maxAnswerBytes {
		return nil, nil, errTooLarge
	}
	return resp.Header, body, nil
}
