package authority

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/keys"
)

// sameAsStandard holds that our encoder signs, byte for byte, what crypto/x509 would, and that the whole is a certificate.
func sameAsStandard(t *testing.T, s *Set, p PreparedX509, notBefore, notAfter time.Time) {
	t.Helper()
	a := s.current.Load().activeX509
	if a.template == nil {
		t.Fatal("the authority has no template of ours")
	}
	serial := newSerial()
	ours, err := a.sign(&p, serial, notBefore, notAfter)
	if err != nil {
		t.Fatal(err)
	}
	standard, err := a.signStandard(&p, serial, notBefore, notAfter)
	if err != nil {
		t.Fatalf("crypto/x509 refuses what we issue: %v", err)
	}
	got, err := x509.ParseCertificate(ours)
	if err != nil {
		t.Fatalf("our certificate does not parse: %v\n%x", err, ours)
	}
	want, err := x509.ParseCertificate(standard)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.RawTBSCertificate, want.RawTBSCertificate) {
		t.Errorf("our to-be-signed part is\n%x\ncrypto/x509's is\n%x", got.RawTBSCertificate, want.RawTBSCertificate)
	}
	if got.SignatureAlgorithm != want.SignatureAlgorithm || !bytes.Equal(ours[:2], standard[:2]) {
		t.Errorf("outer parts differ: %v, %v", got.SignatureAlgorithm, want.SignatureAlgorithm)
	}
	if err := got.CheckSignatureFrom(a.certificate); err != nil {
		t.Error(err)
	}
	if err := selfCheck(a, &p, ours, notBefore, notAfter); err != nil {
		t.Errorf("self-check: %v", err)
	}
}

func TestEncoderSignsWhatTheStandardLibraryWould(t *testing.T) {
	s := openSet(t)
	long := func(n int) string { return "/" + strings.Repeat("a", n-len("spiffe://example.org/")) }
	for name, key := range testKeys(t) {
		// Sizes around every change of the length of a DER length.
		for _, path := range []string{"/a", long(120), long(121), long(122), long(127), long(128), long(247), long(255), long(256), long(2048)} {
			p, err := s.CheckX509(X509Request{ID: mustID(t, path), PublicKey: key, DNSNames: []string{"a.b", "*.c"}})
			if err != nil {
				t.Fatal(err)
			}
			sameAsStandard(t, s, p, testNow.Truncate(time.Second), testNow.Add(time.Hour).Truncate(time.Second))
			if t.Failed() {
				t.Fatalf("%s, %d bytes of path", name, len(path))
			}
		}
	}
	// The largest there can be, and validity beyond 2049.
	names := make([]string, MaxDNSNames)
	for i := range names {
		names[i] = strings.Repeat(string(rune('a'+i%26)), 60) + strings.Repeat("."+strings.Repeat("x", 50), 3) + "." + string(rune('a'+i/26))
	}
	p, err := s.CheckX509(X509Request{ID: mustID(t, long(2048)), PublicKey: rsaKey(t, 8192, 65537), DNSNames: names})
	if err != nil {
		t.Fatal(err)
	}
	sameAsStandard(t, s, p, time.Date(2049, 12, 31, 23, 59, 59, 0, time.UTC), time.Date(2050, 1, 1, 0, 0, 0, 0, time.UTC))
}

func TestLengthsOfEverySize(t *testing.T) {
	for _, n := range []int{0, 1, 127, 128, 255, 256, 65535, 65536, 1 << 20} {
		if got := len(appendTLV(nil, derOctetString, make([]byte, n))); got != tlvSize(n) {
			t.Errorf("tlvSize(%d) = %d, want %d", n, tlvSize(n), got)
		}
	}
}

// FuzzEncoder compares our encoder with crypto/x509 for whatever IDs, names, keys and times CheckX509 lets through.
func FuzzEncoder(f *testing.F) {
	s := openSet(f)
	all := testKeys(f)
	kinds := []string{"P-256", "P-384", "P-521", "RSA 2048", "Ed25519"}
	f.Add("/web", "", uint8(0), int64(0), uint32(3600))
	f.Add("/ns/prod/sa/web", "web.internal,*.web", uint8(1), int64(1_900_000_000), uint32(1))
	f.Add("/"+strings.Repeat("a", 2000), strings.Repeat("abc.def,", 50)+"x", uint8(3), int64(2_600_000_000), uint32(1<<31))
	f.Add("/a.b_c-d", "_x", uint8(4), int64(2_524_607_999), uint32(1))
	f.Fuzz(func(t *testing.T, path, names string, kind uint8, begin int64, seconds uint32) {
		id, err := spiffeid.FromPath(testTD, path)
		if err != nil {
			return
		}
		r := X509Request{ID: id, PublicKey: all[kinds[int(kind)%len(kinds)]], Reserved: true}
		if names != "" {
			r.DNSNames = strings.Split(names, ",")
		}
		p, err := s.CheckX509(r)
		if err != nil {
			if !errors.Is(err, ErrRefused) {
				t.Errorf("error %v is no refusal", err)
			}
			return
		}
		// 1970 to 3000: certificates know no year before 1950 or after 9999.
		notBefore := time.Unix(int64(uint64(begin)%32_503_680_000), 0).UTC()
		sameAsStandard(t, s, p, notBefore, notBefore.Add(time.Duration(seconds)*time.Second))
	})
}

// withKey makes key the X.509 and JWT key of a Set, as if its records named it.
func withKey(t *testing.T, s *Set, key *keys.Key) {
	t.Helper()
	der, err := selfSign(key, testTD, testNow, 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	template, err := newLeafTemplate(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	next := *s.current.Load()
	x := x509Authority{id: "x", generation: 1, state: StateActive, certificate: cert, key: key, template: template}
	j := jwtAuthority{id: "j", generation: 1, state: StateActive, public: key.Public(), expiresAt: testNow.Add(24 * time.Hour), key: key}
	if j.signer, err = newJWTSigner(keys.UseJWT, j.id, key); err != nil {
		t.Fatal(err)
	}
	next.x509, next.jwt = map[string]*x509Authority{"x": &x}, map[string]*jwtAuthority{"j": &j}
	next.activeX509, next.activeJWT = nil, nil
	if err := next.finish(s.config); err != nil {
		t.Fatal(err)
	}
	s.current.Store(&next)
}

func TestAuthoritiesThatOurEncoderDoesNotKnowSignToo(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, signer := range map[string]crypto.Signer{"P-384": p384, "RSA 2048": signers(t)["RSA 2048"], "P-256": newKey(t)} {
		s := openSet(t)
		withKey(t, s, keys.External(signer))
		if ours := s.current.Load().activeX509.template != nil; ours != (name == "P-256") {
			t.Errorf("%s: encoded by us: %t", name, ours)
		}
		p, err := s.CheckX509(X509Request{ID: mustID(t, "/web"), PublicKey: newPublicKey(t), DNSNames: []string{"web.internal"}})
		if err != nil {
			t.Fatal(err)
		}
		svid, err := s.SignX509(t.Context(), p)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := parse(t, svid).CheckSignatureFrom(s.Bundle().X509[0].Certificate); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		token, err := s.SignJWT(t.Context(), JWTRequest{ID: mustID(t, "/web"), Audience: []string{"db"}})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := s.current.Load().activeJWT.selfCheck(token.Token, mustID(t, "/web")); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A failingSigner signs the wrong bytes once it is told to, as failing hardware does.
type failingSigner struct {
	crypto.Signer
	fails bool
}

func (f *failingSigner) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if f.fails {
		other := sha256.Sum256(digest)
		digest = other[:]
	}
	return f.Signer.Sign(r, digest, opts)
}

func TestNoBadSignatureOfHardwareGetsOut(t *testing.T) {
	s := openSet(t)
	signer := &failingSigner{Signer: newKey(t)}
	withKey(t, s, keys.External(signer))
	p, err := s.CheckX509(X509Request{ID: mustID(t, "/web"), PublicKey: newPublicKey(t)})
	if err != nil {
		t.Fatal(err)
	}
	signer.fails = true
	for range 2 * sampleEvery {
		if svid, err := s.SignX509(t.Context(), p); !errors.Is(err, keys.ErrBadSignature) {
			t.Fatalf("SignX509 = %v, %v; want ErrBadSignature", svid, err)
		}
		if svid, err := s.SignJWT(t.Context(), JWTRequest{ID: mustID(t, "/web"), Audience: []string{"db"}}); !errors.Is(err, keys.ErrBadSignature) {
			t.Fatalf("SignJWT = %v, %v; want ErrBadSignature", svid, err)
		}
	}
}

func TestSelfCheckFindsEveryDifference(t *testing.T) {
	s := openSet(t)
	check := func(path string, key crypto.PublicKey, names ...string) PreparedX509 {
		p, err := s.CheckX509(X509Request{ID: mustID(t, path), PublicKey: key, DNSNames: names})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	a := s.current.Load().activeX509
	key := newPublicKey(t)
	p := check("/web", key, "web")
	begin, end := testNow.Truncate(time.Second), testNow.Add(time.Hour).Truncate(time.Second)
	leaf, err := a.sign(&p, newSerial(), begin, end)
	if err != nil {
		t.Fatal(err)
	}
	forged := bytes.Clone(leaf)
	forged[len(forged)-1] ^= 1
	otherID, otherKey, otherNames, noNames := check("/db", key, "web"), check("/web", newPublicKey(t), "web"), check("/web", key, "db"), check("/web", key)
	for _, tt := range []struct {
		name       string
		p          PreparedX509
		leaf       []byte
		begin, end time.Time
		want       string
	}{
		{"nothing", p, leaf, begin, end, ""},
		{"the ID", otherID, leaf, begin, end, "has the ID"},
		{"the key", otherKey, leaf, begin, end, "another public key"},
		{"the DNS names", otherNames, leaf, begin, end, "other DNS names"},
		{"DNS names where none were asked for", noNames, leaf, begin, end, "other DNS names"},
		{"the begin", p, leaf, begin.Add(time.Second), end, "valid from"},
		{"the end", p, leaf, begin, end.Add(time.Second), "valid from"},
		{"the signature", p, forged, begin, end, "x509"},
		{"its being a certificate", p, leaf[1:], begin, end, "x509"},
		{"its being a leaf", p, a.certificate.Raw, begin, end, "CA"},
	} {
		err := selfCheck(a, &tt.p, tt.leaf, tt.begin, tt.end)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("self-check of a certificate that differs in %s = %v, want %q", tt.name, err, tt.want)
		}
	}
}

func TestSampleIsSelfChecked(t *testing.T) {
	s := openSet(t)
	good := *s.current.Load()
	broken := *good.activeX509
	template := *broken.template
	template.fixedExtensions = bytes.Replace(template.fixedExtensions, derKeyUsage, bytes.Replace(derKeyUsage, []byte{0x07, 0x80}, []byte{0x01, 0x06}, 1), 1)
	broken.template = &template
	bad := good
	bad.activeX509 = &broken
	s.current.Store(&bad)
	p, err := s.CheckX509(X509Request{ID: mustID(t, "/web"), PublicKey: newPublicKey(t)})
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for range 2 * sampleEvery {
		if _, err := s.SignX509(t.Context(), p); err != nil {
			found++
		}
	}
	if found != 2 {
		t.Errorf("%d of %d certificates of an encoder that is broken were found, want 2", found, 2*sampleEvery)
	}
}
