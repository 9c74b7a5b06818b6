package gcpiit

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"

	"github.com/signet-id/signet/ca/nodeattest"
	"github.com/signet-id/signet/test/cloudtest"
)

const (
	project  = "shop-prod"
	instance = "1234567890123456789"
)

func newAttestor(t testing.TB, c Config) *Attestor {
	t.Helper()
	c.Projects = []string{project}
	a, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func attest(a *Attestor, payload string) (*nodeattest.Evidence, error) {
	return a.Attest(context.Background(), nodeattest.Attempt{Payload: []byte(payload)})
}

func TestAttest(t *testing.T) {
	google := cloudtest.NewGoogle(t)
	a := newAttestor(t, Config{KeysFile: google.File(t)})
	claims := cloudtest.Claims(DefaultAudience, project, instance, time.Now())
	want := &nodeattest.Evidence{
		Path:      []string{"gcp_iit", project, instance},
		Selectors: []string{"project-id:shop-prod", "zone:europe-west3-a", "instance-name:web-1", "sa:12345-compute@developer.gserviceaccount.com"},
		Facts:     map[string]any{"project": project, "zone": "europe-west3-a", "instance": "web-1", "instance_id": instance},
	}
	got, err := attest(a, google.Token(t, "key-1", claims))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("evidence (-want +got):\n%s", diff)
	}
	if _, err := got.Check(Type); err != nil {
		t.Errorf("evidence: %v", err)
	}

	got, err = attest(a, google.Token(t, "key-1", cloudtest.With(claims, map[string]any{"email_verified": false})))
	if err != nil || slices.ContainsFunc(got.Selectors, func(s string) bool { return strings.HasPrefix(s, "sa:") }) {
		t.Errorf("with an e-mail address that Google has not verified: %+v, %v", got, err)
	}
	own := newAttestor(t, Config{KeysFile: google.File(t), Audience: "spiffe://example.org", AllowReattestation: true})
	got, err = attest(own, google.Token(t, "key-1", cloudtest.With(claims, map[string]any{"aud": "spiffe://example.org"})))
	if err != nil || !got.CanReattest {
		t.Errorf("with an audience of our own and allow_reattestation: %+v, %v", got, err)
	}
}

func TestAttestRefusals(t *testing.T) {
	google := cloudtest.NewGoogle(t)
	file := google.File(t)
	a := newAttestor(t, Config{KeysFile: file})
	now := time.Now()
	claims := cloudtest.Claims(DefaultAudience, project, instance, now)
	good := google.Token(t, "key-1", claims)
	with := func(changes map[string]any) string { return google.Token(t, "key-1", cloudtest.With(claims, changes)) }
	machine := func(changes map[string]any) string {
		return google.Token(t, "key-1", cloudtest.Machine(t, claims, changes))
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	key := google.Key("key-1")
	raw := func(header string, payload []byte, signature string) string {
		return base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString(payload) + "." + signature
	}
	parts := strings.Split(good, ".")
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	keyed := func(k *rsa.PrivateKey, kid string) jose.JSONWebKey { return jose.JSONWebKey{Key: k, KeyID: kid} }
	twice := []byte(strings.Replace(string(payload), `"aud":`, `"aud":"x","aud":`, 1))
	inside := []byte(strings.Replace(string(payload), `"project_id":`, `"project_id":"x","project_id":`, 1))

	tests := []struct {
		name, token string
		kind        nodeattest.Kind
		want        string
	}{
		{"nothing like it", "hello", nodeattest.Malformed, "unable to parse"},
		{"JSON serialization", `{"payload":"e30","signatures":[]}`, nodeattest.Malformed, "unable to parse"},
		{"huge", good + strings.Repeat("A", maxTokenBytes), nodeattest.Malformed, "at most"},
		{"alg none", raw(`{"alg":"none","kid":"key-1"}`, payload, ""), nodeattest.Malformed, "unable to parse"},
		{"alg none with a signature", raw(`{"alg":"none","kid":"key-1"}`, payload, parts[2]), nodeattest.Malformed, "unable to parse"},
		{"HS256 with the public key in PEM", cloudtest.Sign(t, jose.HS256, jose.JSONWebKey{Key: pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}), KeyID: "key-1"}, payload), nodeattest.Malformed, "unable to parse"},
		{"HS256 with the public key in DER", cloudtest.Sign(t, jose.HS256, jose.JSONWebKey{Key: spki, KeyID: "key-1"}, payload), nodeattest.Malformed, "unable to parse"},
		{"PS256", cloudtest.Sign(t, jose.PS256, keyed(key, "key-1"), payload), nodeattest.Malformed, "unable to parse"},
		{"RS256 in the header only", raw(`{"alg":"RS256","kid":"key-1"}`, payload, strings.Split(cloudtest.Sign(t, jose.PS256, keyed(key, "key-1"), payload), ".")[2]), nodeattest.Malformed, "signature"},
		{"alg twice", raw(`{"alg":"none","alg":"RS256","kid":"key-1"}`, payload, parts[2]), nodeattest.Malformed, "unable to parse"},
		{"no kid", cloudtest.Sign(t, jose.RS256, key, payload), nodeattest.Malformed, "no kid"},
		{"unknown kid", cloudtest.Sign(t, jose.RS256, keyed(key, "key-2"), payload), nodeattest.Malformed, `no key with ID "key-2"`},
		{"a stranger's key under Google's kid", cloudtest.Sign(t, jose.RS256, keyed(stranger, "key-1"), payload), nodeattest.Malformed, "signature"},
		{"a stranger's key in the header", embedded(t, stranger, payload), nodeattest.Malformed, "signature"},
		{"unknown crit", raw(`{"alg":"RS256","kid":"key-1","crit":["x"],"x":1}`, payload, parts[2]), nodeattest.Malformed, "signature"},
		{"other claims under that signature", parts[0] + "." + strings.Split(machine(map[string]any{"project_id": "x"}), ".")[1] + "." + parts[2], nodeattest.Malformed, "signature"},
		{"a claim twice", cloudtest.Sign(t, jose.RS256, keyed(key, "key-1"), twice), nodeattest.Malformed, "signature"},
		{"a claim twice, further in", cloudtest.Sign(t, jose.RS256, keyed(key, "key-1"), inside), nodeattest.Malformed, "signature"},
		{"claims that are none", cloudtest.Sign(t, jose.RS256, keyed(key, "key-1"), []byte(`[]`)), nodeattest.Malformed, "signature"},

		{"other issuer", with(map[string]any{"iss": "https://accounts.example"}), nodeattest.Denied, "issuer"},
		{"no issuer", with(map[string]any{"iss": nil}), nodeattest.Denied, "issuer"},
		{"other audience", with(map[string]any{"aud": "vault"}), nodeattest.Denied, "audience"},
		{"two audiences", with(map[string]any{"aud": []string{DefaultAudience, "vault"}}), nodeattest.Denied, "audience"},
		{"no audience", with(map[string]any{"aud": nil}), nodeattest.Denied, "audience"},
		{"expired", with(map[string]any{"iat": now.Add(-2 * time.Hour).Unix(), "exp": now.Add(-time.Hour).Unix()}), nodeattest.Denied, "has expired"},
		{"no expiry", with(map[string]any{"exp": nil}), nodeattest.Denied, "exp or iat"},
		{"no time of issue", with(map[string]any{"iat": nil}), nodeattest.Denied, "exp or iat"},
		{"issued tomorrow", with(map[string]any{"iat": now.Add(24 * time.Hour).Unix(), "exp": now.Add(25 * time.Hour).Unix()}), nodeattest.Denied, "future"},
		{"not valid yet", with(map[string]any{"nbf": now.Add(30 * time.Minute).Unix()}), nodeattest.Denied, "not valid yet"},
		{"valid for a year", with(map[string]any{"exp": now.AddDate(1, 0, 0).Unix()}), nodeattest.Denied, "longer than"},
		{"of a person", with(map[string]any{"google": nil}), nodeattest.Denied, "compute_engine"},
		{"other project", machine(map[string]any{"project_id": "shop-test"}), nodeattest.Denied, `"shop-test" is not in the allow list`},
		{"no project", machine(map[string]any{"project_id": nil}), nodeattest.Denied, "project_id"},
		{"no instance", machine(map[string]any{"instance_id": nil}), nodeattest.Denied, "instance_id"},
		{"an instance that leads elsewhere", machine(map[string]any{"instance_id": "../x509pop/a"}), nodeattest.Denied, "instance_id"},
		{"no zone", machine(map[string]any{"zone": nil}), nodeattest.Denied, "zone"},
		{"a zone that is two selectors", machine(map[string]any{"zone": "a\nb"}), nodeattest.Denied, "zone"},
		{"no name", machine(map[string]any{"instance_name": ""}), nodeattest.Denied, "instance_name"},
		{"an e-mail address with a line break", with(map[string]any{"email": "a@b\nc"}), nodeattest.Denied, "email"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := attest(a, tt.token)
			if err == nil {
				t.Fatalf("let in as %v", got.Path)
			}
			r, ok := errors.AsType[*nodeattest.Refusal](err)
			if !ok || r.Kind != tt.kind || !strings.Contains(r.Text, tt.want) {
				t.Errorf("error %v, want a refusal of kind %d with %q", err, tt.kind, tt.want)
			}
			if p := strings.Split(tt.token, "."); len(p) == 3 && p[2] != "" && strings.Contains(err.Error(), p[2]) {
				t.Errorf("the error %q repeats the token", err)
			}
		})
	}

	if err := os.WriteFile(file, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = attest(a, good)
	if r, ok := errors.AsType[*nodeattest.Refusal](err); !ok || r.Kind != nodeattest.Unavailable || strings.Contains(r.Text, file) {
		t.Errorf("with a broken file of keys: %v", err)
	}
}

// embedded is a token that brings its own key.
func embedded(t *testing.T, key *rsa.PrivateKey, payload []byte) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: "key-1"}},
		(&jose.SignerOptions{EmbedJWK: true}).WithHeader("kid", "key-1"))
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

func TestConfig(t *testing.T) {
	google := cloudtest.NewGoogle(t)
	file := google.File(t)
	tests := []struct {
		name   string
		config Config
		want   string // told by Check or New; empty: nothing
	}{
		{"good", Config{Projects: []string{project}}, ""},
		{"file", Config{Projects: []string{project}, KeysFile: file}, ""},
		{"old project", Config{Projects: []string{"example.com:shop"}}, ""},
		{"nobody", Config{}, "projects: missing"},
		{"everybody", Config{Projects: []string{"*"}}, "not the ID of a project"},
		{"in clear", Config{Projects: []string{project}, KeysURL: "http://keys"}, "https"},
		{"relative", Config{Projects: []string{project}, KeysFile: "keys"}, "absolute"},
		{"two sources", Config{Projects: []string{project}, KeysFile: file, KeysURL: "https://keys"}, "excludes"},
		{"no file", Config{Projects: []string{project}, KeysFile: file + "x"}, "no such file"},
		{"no CA file", Config{Projects: []string{project}, KeysURLCAFile: file + "x"}, "no such file"},
		{"no CA in the file", Config{Projects: []string{project}, KeysURLCAFile: file}, "no certificate"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var told []string
			tt.config.Check(func(field, format string, args ...any) { told = append(told, field+": "+fmt.Sprintf(format, args...)) })
			if len(told) == 0 {
				if _, err := New(tt.config); err != nil {
					told = append(told, err.Error())
				}
			}
			if got := strings.Join(told, "\n"); (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
				t.Errorf("told %q, want %q", got, tt.want)
			}
		})
	}
}

// What is let in was signed by Google, for us, and its name can stand in a SPIFFE ID.
func FuzzAttest(f *testing.F) {
	google := cloudtest.NewGoogle(f)
	path := filepath.Join(f.TempDir(), "keys")
	if err := os.WriteFile(path, google.JWKS(f), 0o600); err != nil {
		f.Fatal(err)
	}
	a := newAttestor(f, Config{KeysFile: path})
	good := google.Token(f, "key-1", cloudtest.Claims(DefaultAudience, project, instance, time.Now()))
	f.Add([]byte(good))
	f.Add([]byte("e30.e30."))
	f.Add([]byte(`{"payload":"","protected":"","signature":""}`))
	f.Fuzz(func(t *testing.T, payload []byte) {
		e, err := attest(a, string(payload))
		if err != nil {
			if _, ok := errors.AsType[*nodeattest.Refusal](err); !ok {
				t.Fatalf("Attest(%q): %v is no refusal", payload, err)
			}
			return
		}
		if !slices.Equal(e.Path, []string{Type, project, instance}) {
			t.Fatalf("Attest(%q): let in as %v", payload, e.Path)
		}
	})
}
