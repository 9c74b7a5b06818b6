package nodeattest

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/big"
	"strings"
	"testing"
)

var testPin = strings.Repeat("0a", sha256.Size)

func TestParseJoinToken(t *testing.T) {
	tests := []struct {
		name    string
		in      Secret
		id      string
		pinned  bool
		wantErr string
	}{
		{name: "signet's form", in: Secret("n1.s3cret." + testPin), id: "n1", pinned: true},
		{name: "a file's line break is cut off", in: Secret("n1.s3cret." + testPin + "\n"), id: "n1", pinned: true},
		{name: "a SPIRE server's UUID", in: "0f5ad9b2-6a2f-4a51-9f3d-1a2b3c4d5e6f", id: "0f5ad9b2-6a2f-4a51-9f3d-1a2b3c4d5e6f"},
		{name: "one dot is no pin", in: "a.b", id: "a.b"},
		{name: "empty", in: " \n", wantErr: "is empty"},
		{name: "upper-case pin", in: Secret("n1.s." + strings.ToUpper(testPin)), wantErr: "<id>.<secret>.<pin>"},
		{name: "short pin", in: Secret("n1.s." + testPin[:10]), wantErr: "copied completely"},
		{name: "no id", in: Secret(".s." + testPin), wantErr: "<id>.<secret>.<pin>"},
		{name: "quotes", in: `"n1"`, wantErr: "offset 0"},
		{name: "slash", in: "a/b", wantErr: "offset 1"},
		{name: "too long", in: Secret(strings.Repeat("a", MaxJoinTokenBytes+1)), wantErr: "more than"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseJoinToken(tt.in)
			if tt.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
					t.Fatalf("ParseJoinToken() error = %v, want one with %q", err, tt.wantErr)
				}
				return
			}
			if err != nil || got.id != tt.id || got.Pinned() != tt.pinned {
				t.Errorf("ParseJoinToken() = id %q, pinned %t, %v; want %q, %t", got.id, got.Pinned(), err, tt.id, tt.pinned)
			}
		})
	}
}

func TestJoinTokenNeverPrintsItself(t *testing.T) {
	const secret = "n1.verysecret."
	tok, err := ParseJoinToken(Secret(secret + testPin))
	if err != nil {
		t.Fatal(err)
	}
	type config struct {
		A Secret
		B JoinToken
	}
	c := config{A: Secret(secret + testPin), B: tok}
	var out strings.Builder
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&out, verb+verb+verb+verb+"\n", c, &c, c.A, c.B)
	}
	l := slog.New(slog.NewJSONHandler(&out, nil))
	l.Info("x", "config", c, "a", c.A, "b", c.B)
	j, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	out.Write(j)
	hexed := hex.EncodeToString([]byte("verysecret"))
	if s := out.String(); strings.Contains(s, "verysecret") || strings.Contains(strings.ToLower(s), hexed) {
		t.Errorf("the join token was printed:\n%s", s)
	}
	if !strings.Contains(out.String(), "[join token]") {
		t.Errorf("the join token does not print as [join token]:\n%s", out.String())
	}
}

func TestPinMatchesTheAuthorityAndNoOther(t *testing.T) {
	certs := make([]*x509.Certificate, 2)
	for i := range certs {
		key, err := NewKey()
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "x"}},
			&x509.Certificate{}, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		if certs[i], err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
	}
	sum := sha256.Sum256(certs[0].RawSubjectPublicKeyInfo)
	tok, err := ParseJoinToken(Secret("a.b." + hex.EncodeToString(sum[:])))
	if err != nil {
		t.Fatal(err)
	}
	if !tok.PinMatches(certs[0]) || tok.PinMatches(certs[1]) {
		t.Errorf("PinMatches = %t, %t; want true, false", tok.PinMatches(certs[0]), tok.PinMatches(certs[1]))
	}
	plain, err := ParseJoinToken("plain")
	if err != nil {
		t.Fatal(err)
	}
	if plain.PinMatches(certs[0]) {
		t.Error("a token without a pin matches an authority")
	}
}

func TestKeyRoundTripAndCSR(t *testing.T) {
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	text, err := MarshalKey(key)
	if err != nil {
		t.Fatal(err)
	}
	back, err := ParseKey(text)
	if err != nil || !back.Equal(key) {
		t.Fatalf("ParseKey(MarshalKey(key)) = %v, equal %t", err, err == nil && back.Equal(key))
	}
	der, err := CSR(key)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	if err := csr.CheckSignature(); err != nil || len(csr.URIs) != 0 || !key.PublicKey.Equal(csr.PublicKey) {
		t.Errorf("CSR: signature %v, %d URIs, own key %t", err, len(csr.URIs), key.PublicKey.Equal(csr.PublicKey))
	}
	for _, bad := range []string{"", "x", string(text[:40]), "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", strings.Repeat("x", MaxKeyBytes+1)} {
		if _, err := ParseKey([]byte(bad)); err == nil {
			t.Errorf("ParseKey(%.20q...) was accepted", bad)
		}
	}
}

func FuzzParseJoinToken(f *testing.F) {
	f.Add("n1.s." + testPin)
	f.Add("0f5ad9b2-6a2f-4a51-9f3d-1a2b3c4d5e6f")
	f.Add("a..b")
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := ParseJoinToken(Secret(s))
		if err != nil {
			return
		}
		if tok.Reveal() != strings.TrimSpace(s) {
			t.Errorf("ParseJoinToken(%q) reveals %q", s, tok.Reveal())
		}
		if tok.Pinned() && !strings.HasSuffix(tok.Reveal(), "."+tok.pin) {
			t.Errorf("token %q is pinned to %q", s, tok.pin)
		}
		again, err := ParseJoinToken(Secret(tok.Reveal()))
		if err != nil || again != tok {
			t.Errorf("ParseJoinToken(%q) is not stable: %v", s, err)
		}
	})
}

func FuzzParseKey(f *testing.F) {
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		key, err := ParseKey(text)
		if err != nil {
			return
		}
		out, err := MarshalKey(key)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := ParseKey(out); err != nil || !back.Equal(key) {
			t.Errorf("a key that parses does not survive a round trip: %v", err)
		}
	})
}
