package kube

import (
	"bytes"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"sync"

	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"

	"github.com/signet-id/signet/internal/durable"
	"github.com/signet-id/signet/internal/version"
)

// A current transport sends each request by what the files say at that moment that reach the API server. client-go reads a
// kubeconfig and a cluster's authorities once, and both are replaced while a CA runs: authorities rotate.
type current struct {
	kubeconfig string // empty: in a pod of the cluster

	mu     sync.Mutex // guards what follows
	caFile string
	seen   [2][]byte // kubeconfig and authorities as they were taken
	server *url.URL
	next   http.RoundTripper
}

// maxFileBytes bounds a kubeconfig, and a file of authorities.
const maxFileBytes = 1 << 20

// files returns what a kubeconfig and a file of authorities hold; nothing of one without a name.
func files(paths ...string) (out [2][]byte, err error) {
	for i, p := range paths {
		if p == "" {
			continue
		}
		if out[i], err = durable.ReadFile(p, maxFileBytes); err != nil {
			return out, err
		}
	}
	return out, nil
}

// take makes the transport for what the files hold now. t.mu is held, or t is nobody else's yet.
func (t *current) take() (*rest.Config, error) {
	before, err := files(t.kubeconfig) // what is written after this is seen as another
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", t.kubeconfig, err)
	}
	c, err := load(t.kubeconfig)
	if err != nil {
		return nil, err
	}
	seen, err := files("", c.CAFile)
	if err != nil {
		return nil, fmt.Errorf("certificate-authority: %w", err)
	}
	server, _, err := rest.DefaultServerUrlFor(c)
	if err != nil {
		return nil, err
	}
	c.UserAgent = "signet-ca/" + version.String()
	next, err := rest.TransportFor(c)
	if err != nil {
		return nil, err
	}
	t.caFile, t.seen, t.server, t.next = c.CAFile, [2][]byte{before[0], seen[1]}, server, next
	return c, nil
}

// now returns the transport and where it leads. What cannot be read, as in the middle of being written, changes nothing.
func (t *current) now() (http.RoundTripper, *url.URL) {
	t.mu.Lock()
	defer t.mu.Unlock()
	seen, err := files(t.kubeconfig, t.caFile)
	if err == nil && !slices.EqualFunc(seen[:], t.seen[:], bytes.Equal) {
		former := t.next
		if _, err := t.take(); err == nil {
			utilnet.CloseIdleConnectionsFor(former)
		}
	}
	return t.next, t.server
}

// RoundTrip implements http.RoundTripper.
func (t *current) RoundTrip(req *http.Request) (*http.Response, error) {
	next, server := t.now()
	if req.URL.Scheme != server.Scheme || req.URL.Host != server.Host {
		u := *req.URL
		u.Scheme, u.Host = server.Scheme, server.Host
		req = req.WithContext(req.Context())
		req.URL, req.Host = &u, ""
	}
	return next.RoundTrip(req)
}

// WrappedRoundTripper lets client-go find the transport below.
func (t *current) WrappedRoundTripper() http.RoundTripper {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.next
}
