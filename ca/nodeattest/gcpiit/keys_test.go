package gcpiit

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/signet-id/signet/ca/nodeattest"
	"github.com/signet-id/signet/test/cloudtest"
)

// A clock that the test moves.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

// serve starts a server for Google's keys, and an attestor that fetches them there.
func serve(t *testing.T, google *cloudtest.Google) (*Attestor, *clock) {
	t.Helper()
	server := httptest.NewTLSServer(google)
	t.Cleanup(server.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	c := &clock{t: time.Now()}
	return newAttestor(t, Config{KeysURL: server.URL, KeysURLCAFile: ca, Now: c.now}), c
}

func TestKeysAreFetchedAndKept(t *testing.T) {
	google := cloudtest.NewGoogle(t)
	a, clock := serve(t, google)
	show := func(kid string) error {
		_, err := attest(a, google.Token(t, kid, cloudtest.Claims(DefaultAudience, project, instance, clock.now())))
		return err
	}
	wantServed := func(step string, n int) {
		t.Helper()
		if got := google.Served(); got != n {
			t.Errorf("%s: the keys were fetched %d times, want %d", step, got, n)
		}
	}
	if n := google.Served(); n != 0 {
		t.Errorf("the keys were fetched %d times before anybody came", n)
	}
	for range 5 {
		if err := show("key-1"); err != nil {
			t.Fatal(err)
		}
	}
	wantServed("five nodes", 1)

	// Google's new key is found at once, when a node comes with a token of it.
	clock.add(time.Minute)
	google.Rotate(t, "key-2")
	if err := show("key-2"); err != nil {
		t.Errorf("the new key: %v", err)
	}
	wantServed("a new key", 2)

	// Key IDs that strangers make up cost one fetch in a while, no more.
	for i := range 50 {
		token := cloudtest.Sign(t, jose.RS256, jose.JSONWebKey{Key: google.Key("key-2"), KeyID: fmt.Sprintf("made-up-%d", i)}, []byte("{}"))
		if _, err := attest(a, token); err == nil {
			t.Fatal("let in")
		}
	}
	wantServed("made-up key IDs", 2)

	// After their time the keys are fetched again, and while that fails the old ones do.
	clock.add(20 * time.Minute)
	if err := show("key-2"); err != nil {
		t.Error(err)
	}
	wantServed("after max-age", 3)
	google.SetFault(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusServiceUnavailable) })
	clock.add(20 * time.Minute)
	for range 5 {
		if err := show("key-2"); err != nil {
			t.Errorf("while the keys cannot be fetched: %v", err)
		}
	}
	wantServed("a failure", 4)

	// Not for ever: a key that was withdrawn must not count because nobody could hear of it.
	clock.add(maxStale)
	r, ok := errors.AsType[*nodeattest.Refusal](show("key-2"))
	if !ok || r.Kind != nodeattest.Unavailable || !strings.Contains(r.Error(), "503") || strings.Contains(r.Text, "503") {
		t.Errorf("with keys of yesterday: %v", r)
	}
	google.SetFault(nil)
	clock.add(time.Minute)
	if err := show("key-2"); err != nil {
		t.Errorf("after the fault: %v", err)
	}
}

// A clock that is set back does not stop the fetching.
func TestKeysAfterTheClockIsSetBack(t *testing.T) {
	google := cloudtest.NewGoogle(t)
	a, clock := serve(t, google)
	source := a.keys
	if _, err := source.key(t.Context(), "key-1"); err != nil {
		t.Fatal(err)
	}
	google.Rotate(t, "key-2")
	clock.add(-48 * time.Hour)
	if _, err := source.key(t.Context(), "key-2"); err != nil {
		t.Error(err)
	}
}

// A caller that goes away does not take the fetch with it, and many at once make one.
func TestKeysManyCallers(t *testing.T) {
	google := cloudtest.NewGoogle(t)
	a, _ := serve(t, google)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			if i == 0 {
				a.keys.key(gone, "key-1") // either answer is right
			} else if _, err := a.keys.key(t.Context(), "key-1"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := google.Served(); n != 1 {
		t.Errorf("the keys were fetched %d times, want once", n)
	}
}

// Whatever the server of the keys answers, nobody is let in for it.
func TestKeysHostileServer(t *testing.T) {
	endless := func(w http.ResponseWriter, r *http.Request) {
		chunk := []byte(strings.Repeat("a", 64<<10))
		for r.Context().Err() == nil {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}
	for _, tt := range []struct {
		name  string
		fault http.HandlerFunc
		want  string
	}{
		{"garbage", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") }, "not a JSON object"},
		{"nothing", func(http.ResponseWriter, *http.Request) {}, "not a JSON object"},
		{"no keys", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"keys":[]}`) }, "no key in it"},
		{"without end", endless, "larger than"},
		{"hangs up", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "EOF"},
		{"sends us elsewhere", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://127.0.0.1:1/", http.StatusFound)
		}, "302"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			google := cloudtest.NewGoogle(t)
			google.SetFault(tt.fault)
			a, clock := serve(t, google)
			_, err := attest(a, google.Token(t, "key-1", cloudtest.Claims(DefaultAudience, project, instance, clock.now())))
			r, ok := errors.AsType[*nodeattest.Refusal](err)
			if !ok || r.Kind != nodeattest.Unavailable || !strings.Contains(r.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
		})
	}
}

func TestParseKeys(t *testing.T) {
	google := cloudtest.NewGoogle(t)
	aws := cloudtest.NewAWS(t) // any certificate of an RSA key
	certs, err := json.Marshal(map[string]string{"a": string(aws.PEM())})
	if err != nil {
		t.Fatal(err)
	}
	jwk := func(k jose.JSONWebKey) string {
		data, err := k.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	short, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	good := google.Key("key-1")
	public := jwk(jose.JSONWebKey{Key: good.Public(), KeyID: "a"})
	tests := []struct{ name, text, want string }{
		{"JWK Set", string(google.JWKS(t)), ""},
		{"certificates", string(certs), ""},
		{"a key for something else beside it", `{"keys":[` + public + `,` + jwk(jose.JSONWebKey{Key: ec.Public(), KeyID: "b", Algorithm: "ES256"}) + `]}`, ""},
		{"an EC key", `{"keys":[` + jwk(jose.JSONWebKey{Key: ec.Public(), KeyID: "b"}) + `]}`, "not an RSA public key"},
		{"a short key", `{"keys":[` + jwk(jose.JSONWebKey{Key: short.Public(), KeyID: "b"}) + `]}`, "2048 bits"},
		{"a private key", `{"keys":[` + jwk(jose.JSONWebKey{Key: good, KeyID: "b"}) + `]}`, "not an RSA public key"},
		{"a secret", `{"keys":[` + jwk(jose.JSONWebKey{Key: []byte("x"), KeyID: "b"}) + `]}`, "not an RSA public key"},
		{"no ID", `{"keys":[` + jwk(jose.JSONWebKey{Key: good.Public()}) + `]}`, "no ID"},
		{"one ID twice", `{"keys":[` + public + `,` + public + `]}`, "two keys"},
		{"many", `{"keys":[` + many(t, good, maxKeys+1) + `]}`, "more than"},
		{"keys that are none", `{"keys":{}}`, "not a JWK Set"},
		{"the keys twice", `{"keys":[` + public + `],"keys":[]}`, "occurs once"},
		{"not PEM", `{"a":"x"}`, "not a certificate"},
		{"not text", `{"a":1}`, "neither"},
		{"a certificate that is none", `{"a":"-----BEGIN CERTIFICATE-----\neA==\n-----END CERTIFICATE-----\n"}`, `key "a"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			keys, err := parseKeys([]byte(tt.text))
			if tt.want == "" && (err != nil || len(keys) != 1) || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("parseKeys: %d keys, error %v; want %q", len(keys), err, tt.want)
			}
		})
	}
}

func many(t *testing.T, key *rsa.PrivateKey, n int) string {
	t.Helper()
	var out []string
	for i := range n {
		data, err := (&jose.JSONWebKey{Key: key.Public(), KeyID: fmt.Sprint(i)}).MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, string(data))
	}
	return strings.Join(out, ",")
}

func TestMaxAge(t *testing.T) {
	for header, want := range map[string]time.Duration{
		"public, max-age=19000, must-revalidate": 19000 * time.Second, "Max-Age=5": 5 * time.Second, "": 0, "max-age=": 0, "max-age=-1": 0,
		"max-age=99999999999999999999": 0, "s-maxage=7": 0,
	} {
		if got := maxAge(header); got != want {
			t.Errorf("maxAge(%q) = %v, want %v", header, got, want)
		}
	}
}

// What is accepted are RSA public keys that are long enough, each with an ID.
func FuzzKeys(f *testing.F) {
	google := cloudtest.NewGoogle(f)
	f.Add(google.JWKS(f))
	certs, err := json.Marshal(map[string]string{"a": string(cloudtest.NewAWS(f).PEM())})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(certs)
	f.Add([]byte(`{"keys":[{"kty":"oct","k":"eA","kid":"a"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		keys, err := parseKeys(data)
		if err != nil {
			return
		}
		if len(keys) == 0 || len(keys) > maxKeys {
			t.Fatalf("parseKeys(%q): %d keys", data, len(keys))
		}
		for kid, k := range keys {
			if kid == "" || k == nil || k.N.BitLen() < minKeyBits {
				t.Fatalf("parseKeys(%q): key %q", data, kid)
			}
		}
	})
}
