package userkeys

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/federation"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store/bolt"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/spiffe"
)

func keySet(t *testing.T, kid string) string {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := k.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	return fmt.Sprintf(`{"keys": [{"kty": "EC", "crv": "P-256", "kid": %q, "use": "sig", "x": %q, "y": %q}]}`, kid, b64(raw[1:33]), b64(raw[33:]))
}

// TestKeysAreFetchedAndTheLastGoodOnesStay fetches from a real HTTPS server, which rotates its key and then answers in ways
// that bring no keys.
func TestKeysAreFetchedAndTheLastGoodOnesStay(t *testing.T) {
	var answer atomic.Pointer[http.HandlerFunc]
	says := func(h http.HandlerFunc) { answer.Store(&h) }
	text := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, s) }
	}
	var elsewhere atomic.Int64
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.URL.Path != "/keys" {
			elsewhere.Add(1)
			fmt.Fprint(w, keySet(t, "elsewhere"))
			return
		}
		(*answer.Load())(w, q)
	}))
	defer srv.Close()
	s, err := bolt.Open(bolt.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	td := spiffeid.RequireTrustDomainFromString("example.org")
	reg, err := registry.Open(t.Context(), registry.Config{TrustDomain: td, Store: s})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- reg.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	docs, err := strictyaml.Split([]byte("kind: UserIssuer\nname: login\nissuer: https://login.example.com\naudience: [api]\njwksURL: "+srv.URL+"/keys\n"), "u.yaml", 1)
	if err != nil {
		t.Fatal(err)
	}
	plan, err := reg.Plan(docs, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := reg.Apply(t.Context(), plan); err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())
	events := 0
	p := New(Config{Registry: reg, Fetch: (&federation.Fetcher{WebRoots: roots, Timeout: 500 * time.Millisecond}).FetchWeb, Actor: "test",
		Audit: func(context.Context, auditlog.Record) error { events++; return nil }})
	fetch := func() error {
		u, err := reg.UserIssuer("login")
		if err != nil {
			t.Fatal(err)
		}
		return p.fetchInto(t.Context(), u)
	}
	has := func(kid string) {
		t.Helper()
		u, err := reg.UserIssuer("login")
		if err != nil || len(u.Compiled.Keys) != 1 || u.Compiled.Keys[0].KeyId != kid {
			t.Errorf("keys are %v (%v), want %s", u.Compiled.GetKeys(), err, kid)
		}
	}
	first := keySet(t, "first")
	for range 2 { // the second time brings nothing new, and writes nothing
		says(text(first))
		if err := fetch(); err != nil {
			t.Fatal(err)
		}
		has("first")
	}
	if events != 1 {
		t.Errorf("%d records of one change", events)
	}
	says(text(keySet(t, "second")))
	if err := fetch(); err != nil {
		t.Fatal(err)
	}
	has("second")
	release := make(chan struct{})
	defer close(release)
	for name, h := range map[string]http.HandlerFunc{
		"an error":   func(w http.ResponseWriter, _ *http.Request) { http.Error(w, first, http.StatusInternalServerError) },
		"a redirect": func(w http.ResponseWriter, q *http.Request) { http.Redirect(w, q, "/other", http.StatusFound) },
		"too much":   text(strings.Repeat(" ", spiffe.MaxUserKeysBytes) + first),
		"no key set": text("<html>"),
		"no key":     text(`{"keys": []}`),
		"a body for ever": func(w http.ResponseWriter, q *http.Request) {
			w.WriteHeader(http.StatusOK)
			w.(http.Flusher).Flush()
			select {
			case <-release:
			case <-q.Context().Done():
			}
		},
	} {
		says(h)
		if err := fetch(); err == nil {
			t.Errorf("%s is taken for keys", name)
		}
		has("second")
	}
	if elsewhere.Load() != 0 {
		t.Error("a redirect was followed")
	}
	p.c.Fetch = (&federation.Fetcher{WebRoots: x509.NewCertPool()}).FetchWeb
	says(text(first))
	if err := fetch(); err == nil {
		t.Error("a server that no root of the web verifies is believed")
	}
	has("second")
}
