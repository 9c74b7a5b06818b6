package authority

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/spiffe"
)

// published returns the document of the Set's bundle and its keys as they are on the wire.
func published(t *testing.T, s *Set) (doc []byte, keys []map[string]any) {
	t.Helper()
	doc, err := spiffe.MarshalBundle(s.Bundle().SPIFFE())
	if err != nil {
		t.Fatal(err)
	}
	var parsed struct{ Keys []map[string]any }
	if err := json.Unmarshal(doc, &parsed); err != nil {
		t.Fatal(err)
	}
	return doc, parsed.Keys
}

func byUse(keys []map[string]any, use string) (found []map[string]any) {
	for _, k := range keys {
		if k["use"] == use {
			found = append(found, k)
		}
	}
	return found
}

func TestX509_60_61_62_63_64_BundleEntryOfAnAuthority(t *testing.T) {
	f := follow(t)
	writes, _ := f.newX509()
	f.must(f.commit(writes...))
	_, all := published(t, f.set)
	entries := byUse(all, "x509-svid")
	if len(entries) != 2 {
		t.Fatalf("%d x509-svid entries, want one for each of 2 authorities", len(entries))
	}
	for _, entry := range entries {
		if _, there := entry["kid"]; there {
			t.Errorf("entry has kid %v", entry["kid"])
		}
		chain, _ := entry["x5c"].([]any)
		if len(chain) != 1 {
			t.Fatalf("x5c has %d certificates, want 1", len(chain))
		}
		der, err := base64.StdEncoding.DecodeString(chain[0].(string))
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if err := cert.CheckSignatureFrom(cert); err != nil {
			t.Errorf("the certificate is not self-signed: %v", err)
		}
		if !slices.ContainsFunc(f.set.Bundle().X509, func(a X509Authority) bool { return a.Certificate.Equal(cert) }) {
			t.Error("the certificate is none of the authorities")
		}
		checkMembers(t, entry, cert.PublicKey)
	}
}

func TestJWT_27_28_BundleEntryOfAKey(t *testing.T) {
	s := openSet(t)
	_, all := published(t, s)
	entries := byUse(all, "jwt-svid")
	if len(entries) != 1 || entries[0]["kid"] != s.Bundle().JWT[0].KeyID {
		t.Fatalf("jwt-svid entries %v, want one with kid %s", entries, s.Bundle().JWT[0].KeyID)
	}
	checkMembers(t, entries[0], s.Bundle().JWT[0].PublicKey)
	for _, entry := range all {
		for _, private := range []string{"d", "p", "q", "dp", "dq", "qi", "k", "oth"} {
			if _, there := entry[private]; there {
				t.Errorf("entry has the private member %q", private)
			}
		}
	}
}

// checkMembers holds that a JWK has the key that it should.
func checkMembers(t *testing.T, entry map[string]any, key any) {
	t.Helper()
	point, err := key.(interface{ Bytes() ([]byte, error) }).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	if entry["kty"] != "EC" || entry["crv"] != "P-256" || entry["x"] != b64(point[1:33]) || entry["y"] != b64(point[33:]) {
		t.Errorf("key members of %v are not those of the key %x", entry, point)
	}
}

func TestBundleReadsBackAsItIs(t *testing.T) {
	s := openSet(t)
	doc, _ := published(t, s)
	parsed, skipped, err := spiffe.ParseBundle(testTD, doc)
	if err != nil || len(skipped) != 0 {
		t.Fatal(err, skipped)
	}
	if !parsed.Equal(s.Bundle().SPIFFE()) {
		t.Errorf("bundle %s reads back as another", doc)
	}
	if hint, ok := parsed.RefreshHint(); !ok || hint != 5*time.Minute {
		t.Errorf("refresh hint %v, %t", hint, ok)
	}
	if n, ok := parsed.SequenceNumber(); !ok || n == 0 || n != s.Bundle().Sequence {
		t.Errorf("sequence number %d, %t; want %d", n, ok, s.Bundle().Sequence)
	}
}

func TestCallersCannotChangeTheSet(t *testing.T) {
	s := openSet(t)
	b := s.Bundle()
	want := b.X509[0]
	b.X509[0], b.JWT[0] = X509Authority{}, JWTAuthority{}
	source, err := s.GetX509BundleForTrustDomain(testTD)
	if err != nil {
		t.Fatal(err)
	}
	source.RemoveX509Authority(want.Certificate)
	keys, err := s.GetJWTBundleForTrustDomain(testTD)
	if err != nil {
		t.Fatal(err)
	}
	keys.RemoveJWTAuthority(s.Bundle().JWT[0].KeyID)
	if again := s.Bundle(); again.X509[0] != want || again.JWT[0].KeyID == "" {
		t.Error("a caller changed the bundle of the Set")
	}
	if source, _ := s.GetX509BundleForTrustDomain(testTD); len(source.X509Authorities()) != 1 {
		t.Error("a caller changed the X.509 bundle of the Set")
	}
	if keys, _ := s.GetJWTBundleForTrustDomain(testTD); len(keys.JWTAuthorities()) != 1 {
		t.Error("a caller changed the JWT bundle of the Set")
	}
}

func TestSVID01_NoBundleForOtherTrustDomains(t *testing.T) {
	s := openSet(t)
	other := spiffeid.RequireTrustDomainFromString("example.com")
	if b, err := s.GetX509BundleForTrustDomain(other); err == nil {
		t.Errorf("X.509 bundle of another trust domain: %v", b)
	}
	if b, err := s.GetJWTBundleForTrustDomain(other); err == nil {
		t.Errorf("JWT bundle of another trust domain: %v", b)
	}
}

func TestPinIsTheHashOfThePublicKey(t *testing.T) {
	s := openSet(t)
	sum := sha256.Sum256(marshalKey(t, s.Bundle().X509[0].Certificate.PublicKey))
	if want := hex.EncodeToString(sum[:]); s.Pin() != want || !slices.Equal(s.Pins(), []string{want}) {
		t.Errorf("pin %s, pins %v; want %s", s.Pin(), s.Pins(), want)
	}
	if id, err := hex.DecodeString(s.Bundle().X509[0].ID); err != nil || !bytes.Equal(id, s.Bundle().X509[0].Certificate.SubjectKeyId) {
		t.Errorf("authority id %s is not the subject key id", s.Bundle().X509[0].ID)
	}
}
