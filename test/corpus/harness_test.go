package corpus

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/source"
	"github.com/signet-id/signet/test/signettest"
)

// within bounds everything that waits for a connection.
const within = 30 * time.Second

const partner = "partner.example"

// A fleet is a CA and an agent with the policies of testdata, of whose services this process is every one, and a second
// trust domain that it federates with.
type fleet struct {
	*signettest.Signet
	partner  *signettest.Signet
	svids    *workloadapi.X509Source
	tokens   *workloadapi.JWTSource
	policies *source.Source

	login jose.Signer // of users' tokens

	mu    sync.Mutex
	certs map[spiffeid.ID]*tls.Certificate
	jwts  map[string]string
}

// start brings a fleet up for the services of the cases, with registration entries for callers that have hints.
func start(t *testing.T, documents string, services []spiffeid.ID, hints map[spiffeid.ID]string) *fleet {
	t.Helper()
	f := &fleet{Signet: signettest.Start(t, signettest.Config{}), certs: map[spiffeid.ID]*tls.Certificate{}, jwts: map[string]string{}}
	f.partner = signettest.Start(t, signettest.Config{TrustDomain: partner})
	foreign, err := bundlev1.NewBundleClient(f.partner.AdminConn()).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bundlev1.NewBundleClient(f.AdminConn()).BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{foreign}}); err != nil {
		t.Fatal(err)
	}
	f.Apply(f.userIssuer(t))
	f.Apply(documents)
	var identities strings.Builder
	for i, id := range slices.SortedFunc(maps.Keys(hints), func(a, b spiffeid.ID) int { return strings.Compare(a.String(), b.String()) }) {
		fmt.Fprintf(&identities, "kind: Identity\nname: h%d\nspiffeID: %s\nmatch: [unix:path:/nowhere]\nhint: %s\n---\n", i, id, hints[id])
	}
	for i, id := range services {
		fmt.Fprintf(&identities, "kind: Identity\nname: s%d\nspiffeID: %s\nmatch: [unix:uid:%d]\nfederatesWith: [%s]\njwtIncludeJTI: true\n---\n", i, id, os.Getuid(), partner)
	}
	revision := f.Apply(identities.String())
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	if f.policies, err = source.New(ctx, source.Options{Addr: f.WorkloadAPI()}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.policies.Close() })
	for {
		if _, r := f.policies.Policies().Revision(); r >= revision && len(f.policies.ServiceIDs()) == len(services) {
			break
		}
		select {
		case <-f.policies.Updated():
		case <-ctx.Done():
			t.Fatalf("policies of %d services at revision %d: have %v", len(services), revision, f.policies.ServiceIDs())
		}
	}
	if f.svids, err = workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(f.WorkloadAPI()))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.svids.Close() })
	if f.tokens, err = workloadapi.NewJWTSource(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(f.WorkloadAPI()))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.tokens.Close() })
	return f
}

func (f *fleet) of(id spiffeid.ID) *signettest.Signet {
	if id.TrustDomain().Name() == partner {
		return f.partner
	}
	return f.Signet
}

// cert returns an X509-SVID of a caller.
func (f *fleet) cert(t *testing.T, id spiffeid.ID) *tls.Certificate {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.certs[id]; c != nil {
		return c
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{id.URL()}}, key)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := svidv1.NewSVIDClient(f.of(id).AdminConn()).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: csr})
	if err != nil {
		t.Fatalf("an SVID for %s: %v", id, err)
	}
	c := &tls.Certificate{Certificate: answer.GetSvid().GetCertChain(), PrivateKey: key}
	f.certs[id] = c
	return c
}

// jwt returns a JWT-SVID such as the case wants.
func (f *fleet) jwt(t *testing.T, token *policy.Token) string {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	key := tokenKey(token)
	if s := f.jwts[key]; s != "" {
		return s
	}
	answer, err := svidv1.NewSVIDClient(f.of(token.ID).AdminConn()).MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{
		Id: &types.SPIFFEID{TrustDomain: token.ID.TrustDomain().Name(), Path: token.ID.Path()}, Audience: token.Audience})
	if err != nil {
		t.Fatalf("a JWT-SVID for %s: %v", token.ID, err)
	}
	f.jwts[key] = answer.GetSvid().GetToken()
	return f.jwts[key]
}

func tokenKey(token *policy.Token) string {
	return token.ID.String() + " " + strings.Join(token.Audience, " ")
}

// client is the TLS side of a caller. Whom it calls is of no interest here.
func (f *fleet) client(t *testing.T, id spiffeid.ID, protocols ...string) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{*f.cert(t, id)}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS12, NextProtos: protocols}
}

// A field is one header line.
type field struct{ name, value string }

// fields are the headers of a case, in the order in which they are sent.
func (f *fleet) fields(t *testing.T, c *policy.TestCase) []field {
	t.Helper()
	var out []field
	for _, v := range c.Request.ContentTypes {
		out = append(out, field{"content-type", v})
	}
	if c.Request.HasMethodOverride {
		out = append(out, field{"x-http-method-override", "DELETE"})
	}
	for _, name := range slices.Sorted(maps.Keys(c.Headers)) {
		for _, v := range c.Headers[name] {
			out = append(out, field{name, v})
		}
	}
	if c.Request.Token != nil {
		out = append(out, field{"authorization", "Bearer " + f.jwt(t, c.Request.Token)})
	}
	if c.Request.User != nil {
		out = append(out, field{"x-user-token", f.userToken(t, c.Request.User)})
	}
	return out
}

// userIssuer makes the key of an issuer of users' tokens, and returns its document.
func (f *fleet) userIssuer(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "one", Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		t.Fatal(err)
	}
	if f.login, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "one"}}, (&jose.SignerOptions{}).WithType("JWT")); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("kind: UserIssuer\nname: login\nissuer: https://login.example.com\naudience: [corpus]\nheader: X-User-Token\njwks: '%s'\n", keys)
}

// userToken signs what the case says of its user.
func (f *fleet) userToken(t *testing.T, u *policy.User) string {
	t.Helper()
	claims := maps.Clone(u.Claims)
	if claims == nil {
		claims = map[string]any{}
	}
	claims["iss"], claims["aud"], claims["sub"], claims["exp"] = u.Issuer, "corpus", "somebody", time.Now().Add(time.Hour).Unix()
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := f.login.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	token, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// An answer is what a caller gets of an enforcement point.
type answer struct {
	// allowed: the service was reached. Otherwise the call was denied, or refused as malformed.
	allowed bool
	// what the point said, for messages.
	what string
}

// A backend is the service behind an enforcement point. It notes what reaches it.
type backend struct {
	mu      sync.Mutex
	reached []string
}

func (b *backend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	b.reached = append(b.reached, r.Method+" "+r.RequestURI)
	b.mu.Unlock()
	w.Header().Set("Reached", "yes")
}

// take returns what has reached the service since the last call.
func (b *backend) take() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := b.reached
	b.reached = nil
	return out
}

func http1(t *testing.T, addr string, config *tls.Config, r *policy.Request, fields []field) answer {
	t.Helper()
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: within}, "tcp", addr, config)
	if err != nil {
		return answer{what: "handshake: " + err.Error()}
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(within))
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: service\r\nConnection: close\r\n", r.Method, r.Path)
	for _, f := range fields {
		fmt.Fprintf(&b, "%s: %s\r\n", f.name, f.value)
	}
	b.WriteString("\r\n")
	if _, err := conn.Write(b.Bytes()); err != nil {
		return answer{what: "write: " + err.Error()}
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: r.Method})
	if err != nil {
		return answer{what: "read: " + err.Error()}
	}
	io.Copy(io.Discard, io.LimitReader(response.Body, 1<<16))
	response.Body.Close()
	return answer{allowed: response.StatusCode == http.StatusOK, what: response.Status}
}

// http2Call sends one request as frames, as no client library would.
func http2Call(t *testing.T, addr string, config *tls.Config, r *policy.Request, fields []field) answer {
	t.Helper()
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: within}, "tcp", addr, config)
	if err != nil {
		return answer{what: "handshake: " + err.Error()}
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(within))
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		return answer{what: "write: " + err.Error()}
	}
	framer := http2.NewFramer(conn, conn)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for _, f := range append([]field{{":method", r.Method}, {":scheme", "https"}, {":authority", "service"}, {":path", r.Path}}, fields...) {
		encoder.WriteField(hpack.HeaderField{Name: f.name, Value: f.value})
	}
	if slices.Contains(r.ContentTypes, "application/grpc") {
		encoder.WriteField(hpack.HeaderField{Name: "te", Value: "trailers"})
	}
	if err := framer.WriteSettings(); err != nil {
		return answer{what: "write: " + err.Error()}
	}
	if err := framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true}); err != nil {
		return answer{what: "write: " + err.Error()}
	}
	var a answer
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			a.what += " read: " + err.Error()
			return a
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				framer.WriteSettingsAck()
			}
		case *http2.MetaHeadersFrame:
			for _, h := range frame.Fields {
				switch {
				case h.Name == ":status":
					a.what += " status " + h.Value
				case h.Name == "reached":
					a.allowed = true
				case h.Name == "grpc-status":
					// What our service does not know it answers with Unimplemented; a denial is PermissionDenied.
					a.what += " grpc-status " + h.Value
				}
			}
			if frame.StreamEnded() {
				return a
			}
		case *http2.DataFrame:
			if frame.StreamEnded() {
				return a
			}
		case *http2.RSTStreamFrame:
			a.what += " reset " + frame.ErrCode.String()
			return a
		case *http2.GoAwayFrame:
			a.what += " goaway " + frame.ErrCode.String()
			return a
		}
	}
}

// tables reads the cases of testdata.
func tables(t *testing.T) (documents string, cases []policy.TestCase) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "policies.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join("testdata", "*.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if filepath.Base(file) == "policies.yaml" {
			continue
		}
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		docs, err := strictyaml.Split(content, file, 1)
		if err != nil {
			t.Fatal(err)
		}
		for _, doc := range docs {
			table, err := policy.ParseTests(doc)
			if err != nil {
				t.Fatal(err)
			}
			cases = append(cases, table.Cases...)
		}
	}
	return string(b), cases
}
