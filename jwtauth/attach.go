package jwtauth

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"

	"google.golang.org/grpc/credentials"
)

// Audiences says under which name a callee takes tokens, by its host, as in a URL: with its port, unless that is 443. A callee
// that is not there gets none.
type Audiences map[string]string

// hostPort writes a callee as host and port.
func hostPort(callee string) string {
	callee = strings.ToLower(callee)
	if _, _, err := net.SplitHostPort(callee); err == nil {
		return callee
	}
	return net.JoinHostPort(strings.Trim(callee, "[]"), "443")
}

// byHost returns the function that looks a callee up.
func (a Audiences) byHost() func(*url.URL) (string, bool) {
	audiences := make(map[string]string, len(a))
	for callee, audience := range a {
		audiences[hostPort(callee)] = audience
	}
	return func(u *url.URL) (string, bool) {
		audience, ok := audiences[hostPort(u.Host)]
		return audience, ok
	}
}

// TransportConfig says what a Transport attaches to which requests.
type TransportConfig struct {
	// Cache has the tokens. Required.
	Cache *Cache
	// Audiences are the callees that get a token. Audience, if it is not nil, is asked instead; false means no token.
	Audiences Audiences
	Audience  func(*url.URL) (audience string, ok bool)
	// Base sends the requests. Nil means http.DefaultTransport.
	Base http.RoundTripper
}

// A Transport attaches a JWT-SVID to each request to a callee that has an audience, and to no other: a redirect to another
// host is a request of its own, and is judged by its own host. It is safe for concurrent use.
type Transport struct{ c TransportConfig }

// NewTransport returns a Transport. The error names the field that is wrong.
func NewTransport(c TransportConfig) (*Transport, error) {
	switch {
	case c.Cache == nil:
		return nil, errors.New("jwtauth: config field Cache is nil")
	case c.Audience == nil && len(c.Audiences) == 0:
		return nil, errors.New("jwtauth: config fields Audiences and Audience are both empty; name the callees that get a token")
	case c.Audience != nil && len(c.Audiences) > 0:
		return nil, errors.New("jwtauth: config fields Audiences and Audience exclude each other")
	}
	if c.Audience == nil {
		c.Audience = c.Audiences.byHost()
	}
	if c.Base == nil {
		c.Base = http.DefaultTransport
	}
	return &Transport{c}, nil
}

// RoundTrip implements http.RoundTripper. A request that must have a token and would go out in clear, or that has another
// Authorization, is refused and not sent.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	audience, ok := t.c.Audience(r.URL)
	if !ok {
		return t.c.Base.RoundTrip(r)
	}
	token, err := t.token(r, audience)
	if err != nil {
		if r.Body != nil {
			r.Body.Close() // as every RoundTripper must
		}
		return nil, err
	}
	with := r.Clone(r.Context()) // the caller's request, and so what a redirect repeats, stays without it
	with.Header.Set("Authorization", token.header())
	resp, err := t.c.Base.RoundTrip(with)
	if err == nil && resp.StatusCode == http.StatusUnauthorized {
		t.c.Cache.Refused(audience, token)
	}
	return resp, err
}

func (t *Transport) token(r *http.Request, audience string) (*Token, error) {
	switch {
	case r.URL.Scheme != "https":
		return nil, fmt.Errorf("jwtauth: %s has the audience %q, but its scheme is %q; a JWT-SVID goes over https only", r.URL.Host, audience, r.URL.Scheme)
	case len(r.Header["Authorization"]) > 0:
		return nil, fmt.Errorf("jwtauth: the request to %s has an Authorization already; leave it out, or give the callee no audience", r.URL.Host)
	}
	return t.c.Cache.Token(r.Context(), audience)
}

// PerRPCConfig says what is attached to which RPCs.
type PerRPCConfig struct {
	// Cache has the tokens. Required.
	Cache *Cache
	// Audiences are the callees that get a token, by the authority of the connection. Audience, if it is not nil, is asked
	// instead; false means no token.
	Audiences Audiences
	Audience  func(authority string) (audience string, ok bool)
}

// NewPerRPC returns credentials for grpc.WithPerRPCCredentials that attach a JWT-SVID to RPCs over TLS.
func NewPerRPC(c PerRPCConfig) (credentials.PerRPCCredentials, error) {
	var byURL func(*url.URL) (string, bool)
	if c.Audience != nil {
		byURL = func(u *url.URL) (string, bool) { return c.Audience(u.Host) }
	}
	// What is wrong with the one is wrong with the other.
	t, err := NewTransport(TransportConfig{Cache: c.Cache, Audiences: c.Audiences, Audience: byURL})
	if err != nil {
		return nil, err
	}
	return perRPC{t}, nil
}

type perRPC struct{ t *Transport }

// RequireTransportSecurity says that gRPC must not use these credentials on a connection in clear.
func (perRPC) RequireTransportSecurity() bool { return true }

// GetRequestMetadata returns the header for an RPC to a service at uri.
func (p perRPC) GetRequestMetadata(ctx context.Context, uri ...string) (map[string]string, error) {
	info, ok := credentials.RequestInfoFromContext(ctx)
	if !ok {
		return nil, errors.New("jwtauth: these credentials are for gRPC clients")
	}
	// Of TLS to a server whose certificate was not asked for by anybody this does not warn: who dials decides whom to trust.
	if err := credentials.CheckSecurityLevel(info.AuthInfo, credentials.PrivacyAndIntegrity); err != nil {
		return nil, fmt.Errorf("jwtauth: a JWT-SVID goes over TLS only: %w", err)
	}
	if len(uri) == 0 {
		return nil, nil
	}
	u, err := url.Parse(uri[0])
	if err != nil {
		return nil, fmt.Errorf("jwtauth: the RPC's URI %q is none", uri[0])
	}
	audience, ok := p.t.c.Audience(u)
	if !ok {
		return nil, nil
	}
	token, err := p.t.c.Cache.Token(ctx, audience)
	if err != nil {
		return nil, err
	}
	return map[string]string{"authorization": token.header()}, nil
}
