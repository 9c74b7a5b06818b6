package cloudtest

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// Google stands in for the keys with which Google signs identity tokens, and serves them.
type Google struct {
	// Fault answers instead of the keys, if it is not nil.
	Fault http.HandlerFunc

	mu     sync.Mutex
	keys   map[string]*rsa.PrivateKey
	served int
}

// NewGoogle makes one key, with ID key-1.
func NewGoogle(t testing.TB) *Google {
	t.Helper()
	g := &Google{keys: map[string]*rsa.PrivateKey{}}
	g.Rotate(t, "key-1")
	return g
}

// Rotate replaces the keys by a new one.
func (g *Google) Rotate(t testing.TB, kid string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.keys = map[string]*rsa.PrivateKey{kid: key}
}

// Key returns a key, to be misused.
func (g *Google) Key(kid string) *rsa.PrivateKey {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.keys[kid]
}

// JWKS is the JWK Set with the public keys.
func (g *Google) JWKS(t testing.TB) []byte {
	t.Helper()
	data, err := g.jwks()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func (g *Google) jwks() ([]byte, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	set := jose.JSONWebKeySet{}
	for kid, key := range g.keys {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: key.Public(), KeyID: kid, Algorithm: "RS256", Use: "sig"})
	}
	return json.Marshal(set)
}

// File writes the JWK Set to a file and returns its path.
func (g *Google) File(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "jwks.json")
	if err := os.WriteFile(path, g.JWKS(t), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// ServeHTTP serves the keys.
func (g *Google) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	g.served++
	fault := g.Fault
	g.mu.Unlock()
	if fault != nil {
		fault(w, r)
		return
	}
	data, err := g.jwks()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Cache-Control", "public, max-age=600, must-revalidate")
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(data) // who asked may have gone
}

// SetFault sets Fault while the keys are being served.
func (g *Google) SetFault(f http.HandlerFunc) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.Fault = f
}

// Served is how often the keys were asked for.
func (g *Google) Served() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.served
}

// Claims are those of a token for an instance of a project, valid from now for an hour.
func Claims(audience, project, instanceID string, now time.Time) map[string]any {
	return map[string]any{
		"iss": "https://accounts.google.com", "aud": audience, "sub": "112233445566778899", "azp": "112233445566778899",
		"iat": now.Unix(), "exp": now.Add(time.Hour).Unix(), "email": "12345-compute@developer.gserviceaccount.com", "email_verified": true,
		"google": map[string]any{"compute_engine": map[string]any{
			"project_id": project, "project_number": 12345, "zone": "europe-west3-a", "instance_id": instanceID, "instance_name": "web-1",
			"instance_creation_timestamp": now.Add(-time.Hour).Unix(),
		}},
	}
}

// Token signs claims as Google does.
func (g *Google) Token(t testing.TB, kid string, claims map[string]any) string {
	t.Helper()
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	return Sign(t, jose.RS256, jose.JSONWebKey{Key: g.Key(kid), KeyID: kid}, payload)
}

// Sign makes a JWT of any payload with any algorithm and key.
func Sign(t testing.TB, alg jose.SignatureAlgorithm, key any, payload []byte) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	token, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// With returns claims with some changed; a nil removes one.
func With(claims map[string]any, changes map[string]any) map[string]any {
	out := maps.Clone(claims)
	for k, v := range changes {
		if v == nil {
			delete(out, k)
		} else {
			out[k] = v
		}
	}
	return out
}

// Machine returns claims with parts of google.compute_engine changed.
func Machine(t testing.TB, claims map[string]any, changes map[string]any) map[string]any {
	t.Helper()
	google, ok := claims["google"].(map[string]any)
	if !ok {
		t.Fatalf("no google in %v", claims)
	}
	machine, ok := google["compute_engine"].(map[string]any)
	if !ok {
		t.Fatalf("no compute_engine in %v", claims)
	}
	return With(claims, map[string]any{"google": map[string]any{"compute_engine": With(machine, changes)}})
}
