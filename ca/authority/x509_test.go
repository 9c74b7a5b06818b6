package authority

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-id/signet/spiffe"
)

// issue checks and signs, and holds what is true of every X509-SVID.
func issue(t testing.TB, s *Set, r X509Request) *X509SVID {
	t.Helper()
	prepared, err := s.CheckX509(r)
	if err != nil {
		t.Fatal(err)
	}
	svid, err := s.SignX509(t.Context(), prepared)
	if err != nil {
		t.Fatal(err)
	}
	checkSVID(t, s, r.ID, svid)
	return svid
}

// checkSVID holds that verifiers accept an SVID as that ID, and that what is said of it is what is in it.
func checkSVID(t testing.TB, s *Set, id spiffeid.ID, svid *X509SVID) {
	t.Helper()
	leaf := parse(t, svid)
	at := s.config.Now()
	got, _, err := spiffe.VerifyX509SVID([]*x509.Certificate{leaf}, s, spiffe.X509Options{Now: at})
	if err != nil || got != id {
		t.Errorf("signet verifies the SVID of %q as %q, %v", id, got, err)
	}
	got, _, err = x509svid.Verify([]*x509.Certificate{leaf}, s, x509svid.WithTime(at))
	if err != nil || got != id {
		t.Errorf("go-spiffe verifies the SVID of %q as %q, %v", id, got, err)
	}
	if findings := spiffe.InspectX509SVID([]*x509.Certificate{leaf}, at); len(findings) > 0 {
		t.Errorf("the SVID of %q breaks rules: %v", id, findings)
	}
	if leaf.SerialNumber.String() != svid.SerialNumber || !leaf.NotBefore.Equal(svid.NotBefore) || !leaf.NotAfter.Equal(svid.NotAfter) {
		t.Errorf("SVID says %s, %v to %v; certificate says %s, %v to %v", svid.SerialNumber, svid.NotBefore, svid.NotAfter, leaf.SerialNumber, leaf.NotBefore, leaf.NotAfter)
	}
	if got := hex.EncodeToString(leaf.AuthorityKeyId); got != svid.AuthorityID {
		t.Errorf("SVID says authority %s; certificate says %s", svid.AuthorityID, got)
	}
}

func parse(t testing.TB, svid *X509SVID) *x509.Certificate {
	t.Helper()
	if len(svid.Chain) != 1 {
		t.Fatalf("the chain has %d certificates, want the leaf alone", len(svid.Chain))
	}
	leaf, err := x509.ParseCertificate(svid.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

// extension returns the one extension with that OID.
func extension(t *testing.T, cert *x509.Certificate, oid ...int) (value []byte, critical bool) {
	t.Helper()
	count := 0
	for _, e := range cert.Extensions {
		if e.Id.Equal(asn1.ObjectIdentifier(oid)) {
			value, critical = e.Value, e.Critical
			count++
		}
	}
	if count != 1 {
		t.Fatalf("extension %v is there %d times, want once", oid, count)
	}
	return value, critical
}

func webLeaf(t *testing.T, s *Set) *x509.Certificate {
	t.Helper()
	return parse(t, issue(t, s, X509Request{ID: mustID(t, "/web"), PublicKey: newPublicKey(t)}))
}

func authorityCert(s *Set) *x509.Certificate { return s.Bundle().X509[0].Certificate }

func TestX509_01_IDIsURISubjectAlternativeName(t *testing.T) {
	value, _ := extension(t, webLeaf(t, openSet(t)), 2, 5, 29, 17)
	want := append([]byte{0x30, 24, 0x86, 22}, "spiffe://example.org/web"...)
	want[1], want[3] = byte(len(want)-2), byte(len(want)-4)
	if !bytes.Equal(value, want) {
		t.Errorf("SAN is %x, want %x", value, want)
	}
}

func TestX509_02_ExactlyOneURI(t *testing.T) {
	s := openSet(t)
	leaf := parse(t, issue(t, s, X509Request{ID: mustID(t, "/web"), PublicKey: newPublicKey(t), DNSNames: []string{"web.internal"}}))
	if len(leaf.URIs) != 1 {
		t.Errorf("leaf has %d URIs, want 1", len(leaf.URIs))
	}
}

func TestX509_03_DNSNamesIssued(t *testing.T) {
	s := openSet(t)
	names := []string{"web.internal", "*.web.internal", "_srv.web"}
	leaf := parse(t, issue(t, s, X509Request{ID: mustID(t, "/web"), PublicKey: newPublicKey(t), DNSNames: append(names, names[0])}))
	if !slices.Equal(leaf.DNSNames, names) {
		t.Errorf("DNS names %q, want %q", leaf.DNSNames, names)
	}
	if len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 {
		t.Error("leaf has names that nobody asked for")
	}
}

func TestX509_04_CriticalSANWithEmptySubject(t *testing.T) {
	leaf := webLeaf(t, openSet(t))
	if !bytes.Equal(leaf.RawSubject, []byte{0x30, 0}) {
		t.Errorf("subject is %x, want it empty", leaf.RawSubject)
	}
	if _, critical := extension(t, leaf, 2, 5, 29, 17); !critical {
		t.Error("SAN is not critical")
	}
}

func TestX509_05_LeafIsNoCA(t *testing.T) {
	leaf := webLeaf(t, openSet(t))
	if _, critical := extension(t, leaf, 2, 5, 29, 19); !critical || !leaf.BasicConstraintsValid || leaf.IsCA {
		t.Errorf("basic constraints: critical %t, valid %t, cA %t", critical, leaf.BasicConstraintsValid, leaf.IsCA)
	}
}

func TestX509_06_KeyUsageCritical(t *testing.T) {
	s := openSet(t)
	for name, cert := range map[string]*x509.Certificate{"leaf": webLeaf(t, s), "authority": authorityCert(s)} {
		if _, critical := extension(t, cert, 2, 5, 29, 15); !critical {
			t.Errorf("key usage of the %s is not critical", name)
		}
	}
}

func TestX509_07_PathlessLeafRejected(t *testing.T) {
	s := openSet(t)
	_, err := s.CheckX509(X509Request{ID: testTD.ID(), PublicKey: newPublicKey(t), Reserved: true})
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "has no path") {
		t.Errorf("CheckX509 of the trust domain's own ID = %v, want a refusal", err)
	}
}

func TestX509_08_09_10_LeafKeyUsageIsDigitalSignatureAlone(t *testing.T) {
	s := openSet(t)
	for name, key := range testKeys(t) {
		leaf := parse(t, issue(t, s, X509Request{ID: mustID(t, "/web"), PublicKey: key}))
		if leaf.KeyUsage != x509.KeyUsageDigitalSignature {
			t.Errorf("%s leaf has key usage %b", name, leaf.KeyUsage)
		}
	}
}

func TestX509_11_12_LeafHasBothExtendedKeyUsages(t *testing.T) {
	leaf := webLeaf(t, openSet(t))
	want := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	if !slices.Equal(leaf.ExtKeyUsage, want) || len(leaf.UnknownExtKeyUsage) != 0 {
		t.Errorf("extended key usage %v, want serverAuth and clientAuth", leaf.ExtKeyUsage)
	}
}

func TestX509_14_15_16_AuthorityKeyUsage(t *testing.T) {
	cert := authorityCert(openSet(t))
	if cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign {
		t.Errorf("authority has key usage %b, want keyCertSign and cRLSign alone", cert.KeyUsage)
	}
	if _, critical := extension(t, cert, 2, 5, 29, 19); !critical || !cert.IsCA || !cert.BasicConstraintsValid {
		t.Errorf("authority: basic constraints critical %t, cA %t", critical, cert.IsCA)
	}
}

func TestX509_17_18_SVID02_03_AuthorityHasThePathlessID(t *testing.T) {
	value, _ := extension(t, authorityCert(openSet(t)), 2, 5, 29, 17)
	want := append([]byte{0x30, 22, 0x86, 20}, "spiffe://example.org"...)
	if !bytes.Equal(value, want) {
		t.Errorf("SAN of the authority is %x, want %x", value, want)
	}
}

func TestX509_19_ForeignIDRefused(t *testing.T) {
	s := openSet(t)
	foreign := spiffeid.RequireFromString("spiffe://example.com/web")
	_, err := s.CheckX509(X509Request{ID: foreign, PublicKey: newPublicKey(t)})
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), `not in trust domain "example.org"`) {
		t.Errorf("CheckX509 of %s = %v, want a refusal", foreign, err)
	}
}

func TestX509_21_22_23_AuthorityHasNoConstraintsAndNoExtendedKeyUsage(t *testing.T) {
	cert := authorityCert(openSet(t))
	if cert.MaxPathLen != -1 || cert.MaxPathLenZero || len(cert.PermittedURIDomains)+len(cert.ExcludedURIDomains) != 0 || len(cert.ExtKeyUsage)+len(cert.UnknownExtKeyUsage) != 0 {
		t.Errorf("authority has pathLen %d, name constraints %v, extended key usage %v", cert.MaxPathLen, cert.PermittedURIDomains, cert.ExtKeyUsage)
	}
	if findings := spiffe.InspectX509Authority(cert, testTD); len(findings) > 0 {
		t.Errorf("the authority breaks rules: %v", findings)
	}
	if !strings.Contains(cert.Subject.String(), "O=signet") || !strings.Contains(cert.Subject.CommonName, "example.org") {
		t.Errorf("subject %q tells nobody whose it is", cert.Subject)
	}
}

func TestX509_24_LeafValidityInsideAuthority(t *testing.T) {
	at := newClock(testNow)
	s := openSet(t, func(c *Config) { c.Now = at.now; c.X509Lifetime = 48 * time.Hour; c.MaxX509TTL = 24 * time.Hour })
	end := authorityCert(s).NotAfter
	for _, tt := range []struct {
		name       string
		at         time.Time
		ttl        time.Duration
		begin, end time.Time
	}{
		{"default TTL", testNow, 0, testNow.Add(-Backdate), testNow.Add(time.Hour)},
		{"asked TTL", testNow.Add(time.Minute), 90 * time.Minute, testNow.Add(30 * time.Second), testNow.Add(91 * time.Minute)},
		{"over the maximum", testNow, 100 * time.Hour, testNow.Add(-Backdate), testNow.Add(24 * time.Hour)},
		{"over the authority", end.Add(-time.Minute), time.Hour, end.Add(-90 * time.Second), end},
		{"below a second", testNow, time.Nanosecond, testNow.Add(-Backdate), testNow.Add(time.Second)},
		{"clock behind the authority's begin by less than the backdate", testNow.Add(-20 * time.Second), 0, testNow.Add(-Backdate), testNow.Add(time.Hour - 20*time.Second)},
	} {
		at.set(tt.at)
		svid := issue(t, s, X509Request{ID: mustID(t, "/web"), PublicKey: newPublicKey(t), TTL: tt.ttl})
		if !svid.NotBefore.Equal(tt.begin.Truncate(time.Second)) || !svid.NotAfter.Equal(tt.end.Truncate(time.Second)) {
			t.Errorf("%s: valid from %v to %v, want %v to %v", tt.name, svid.NotBefore, svid.NotAfter, tt.begin, tt.end)
		}
	}
	for _, tt := range []time.Time{end, end.Add(time.Hour), testNow.Add(-time.Minute)} {
		at.set(testNow)
		prepared, err := s.CheckX509(X509Request{ID: mustID(t, "/web"), PublicKey: newPublicKey(t)})
		if err != nil {
			t.Fatal(err)
		}
		at.set(tt)
		if _, err := s.SignX509(t.Context(), prepared); !errors.Is(err, ErrExpired) {
			t.Errorf("SignX509 at %v, with an authority to %v: %v, want ErrExpired", tt, end, err)
		}
		if _, err := s.CheckX509(X509Request{ID: mustID(t, "/web"), PublicKey: newPublicKey(t)}); !errors.Is(err, ErrExpired) {
			t.Errorf("CheckX509 at %v: %v, want ErrExpired", tt, err)
		}
	}
}

func TestTTLThatWouldBeCutIsRefusedAsConfiguration(t *testing.T) {
	at := newClock(testNow)
	s := openSet(t, func(c *Config) { c.Now = at.now })
	for _, tt := range []struct {
		at   time.Time
		ttl  time.Duration
		want string
	}{
		{testNow, 0, ""},
		{testNow, 24 * time.Hour, ""},
		{testNow, -time.Second, "negative"},
		{testNow, 24*time.Hour + time.Second, "longer than the maximum"},
		{testNow.Add(DefaultX509Lifetime - time.Hour), time.Hour + time.Minute, "rotate the authority"},
	} {
		at.set(tt.at)
		err := s.CheckTTL(tt.ttl)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("CheckTTL(%v) = %v, want %q", tt.ttl, err, tt.want)
		}
	}
	at.set(testNow.Add(DefaultX509Lifetime + time.Hour))
	if err := s.CheckTTL(time.Minute); !errors.Is(err, ErrExpired) {
		t.Errorf("CheckTTL past the authority's end = %v, want ErrExpired", err)
	}
}

func TestX509_25_SerialNumbers(t *testing.T) {
	seen := make(map[[serialBytes]byte]bool, 100_000)
	for range 100_000 {
		serial := newSerial()
		if seen[serial] {
			t.Fatalf("serial number %x came twice", serial)
		}
		seen[serial] = true
		if serial[0] >= 0x80 || serial[0] == 0 {
			t.Fatalf("serial number %x begins with %#x: negative or not minimal", serial, serial[0])
		}
	}
	leaf := webLeaf(t, openSet(t))
	if n := len(leaf.SerialNumber.Bytes()); leaf.SerialNumber.Sign() <= 0 || n > 20 || n < 16 {
		t.Errorf("serial number %v has %d bytes, want a positive one of 16 to 20", leaf.SerialNumber, n)
	}
	a, b := webLeaf(t, openSet(t)), webLeaf(t, openSet(t))
	if a.SerialNumber.Cmp(b.SerialNumber) == 0 || new(big.Int).Xor(a.SerialNumber, b.SerialNumber).BitLen() < 64 {
		t.Errorf("serial numbers %v and %v are not random", a.SerialNumber, b.SerialNumber)
	}
}

func TestX509_26_ChainsBuildWithTwoAuthoritiesOfOneName(t *testing.T) {
	f := follow(t)
	writes, second := f.newX509()
	f.must(f.commit(writes...))
	before := webLeaf(t, f.set)
	f.must(f.commit(f.moved(f.x509Key(), StateOld), f.moved(second, StateActive)))
	after := webLeaf(t, f.set) // verified against both by issue
	roots := f.set.Bundle().X509
	if len(roots) != 2 || !bytes.Equal(roots[0].Certificate.RawSubject, roots[1].Certificate.RawSubject) {
		t.Fatal("want two authorities of one name")
	}
	if !bytes.Equal(before.AuthorityKeyId, roots[0].Certificate.SubjectKeyId) || !bytes.Equal(after.AuthorityKeyId, roots[1].Certificate.SubjectKeyId) {
		t.Error("authority key ids are not the subject key ids of the issuers")
	}
	if len(roots[0].Certificate.SubjectKeyId) == 0 || bytes.Equal(roots[0].Certificate.SubjectKeyId, roots[1].Certificate.SubjectKeyId) {
		t.Error("the authorities do not have subject key ids of their own")
	}
	for _, leaf := range []*x509.Certificate{before, after} {
		if _, _, err := spiffe.VerifyX509SVID([]*x509.Certificate{leaf}, f.set, spiffe.X509Options{Now: testNow}); err != nil {
			t.Error(err)
		}
	}
}

func TestReservedIDsNeedTheSwitch(t *testing.T) {
	s := openSet(t)
	for _, path := range []string{"/spire", "/spire/server", "/spire/agent/join_token/x"} {
		if _, err := s.CheckX509(X509Request{ID: mustID(t, path), PublicKey: newPublicKey(t)}); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "reserved") {
			t.Errorf("CheckX509 of %s = %v, want a refusal", path, err)
		}
		issue(t, s, X509Request{ID: mustID(t, path), PublicKey: newPublicKey(t), Reserved: true})
	}
	issue(t, s, X509Request{ID: mustID(t, "/spired"), PublicKey: newPublicKey(t)})
}

func TestID18_LongestIDWorks(t *testing.T) {
	s := openSet(t)
	path := "/" + strings.Repeat("a", spiffe.MaxIDBytes-len("spiffe://example.org")-1)
	svid := issue(t, s, X509Request{ID: mustID(t, path), PublicKey: newPublicKey(t)})
	if got := parse(t, svid).URIs[0].String(); len(got) != spiffe.MaxIDBytes {
		t.Errorf("issued an ID of %d bytes, want %d", len(got), spiffe.MaxIDBytes)
	}
	if _, err := s.CheckX509(X509Request{ID: mustID(t, path+"a"), PublicKey: newPublicKey(t)}); !errors.Is(err, ErrRefused) {
		t.Errorf("ID19: CheckX509 of an ID of %d bytes = %v, want a refusal", spiffe.MaxIDBytes+1, err)
	}
}

func TestRequestsAreRefused(t *testing.T) {
	s := openSet(t)
	good := X509Request{ID: mustID(t, "/web"), PublicKey: newPublicKey(t)}
	for _, tt := range []struct {
		name   string
		change func(*X509Request)
		want   string
	}{
		{"no ID", func(r *X509Request) { r.ID = spiffeid.ID{} }, "no SPIFFE ID"},
		{"no key", func(r *X509Request) { r.PublicKey = nil }, "public key"},
		{"private key", func(r *X509Request) { r.PublicKey = newKey(t) }, "PrivateKey"},
		{"EC key without a curve", func(r *X509Request) { r.PublicKey = &ecdsa.PublicKey{} }, "public key"},
		{"RSA key without a modulus", func(r *X509Request) { r.PublicKey = &rsa.PublicKey{} }, "modulus"},
		{"short Ed25519 key", func(r *X509Request) { r.PublicKey = ed25519.PublicKey("short") }, "5 bytes"},
		{"negative TTL", func(r *X509Request) { r.TTL = -1 }, "negative"},
		{"unknown profile", func(r *X509Request) { r.Profile = 1 }, "unknown profile 1"},
		{"too many DNS names", func(r *X509Request) { r.DNSNames = make([]string, MaxDNSNames+1) }, "101 DNS names"},
		{"empty DNS name", func(r *X509Request) { r.DNSNames = []string{""} }, "0 bytes"},
		{"long DNS name", func(r *X509Request) { r.DNSNames = []string{strings.Repeat("a.", 127)} }, "254 bytes"},
		{"long label", func(r *X509Request) { r.DNSNames = []string{strings.Repeat("a", 64)} }, "1 to 63"},
		{"empty label", func(r *X509Request) { r.DNSNames = []string{"a..b"} }, `label ""`},
		{"trailing dot", func(r *X509Request) { r.DNSNames = []string{"a."} }, `label ""`},
		{"bare wildcard", func(r *X509Request) { r.DNSNames = []string{"*"} }, "'*'"},
		{"wildcard inside", func(r *X509Request) { r.DNSNames = []string{"a.*.b"} }, "'*'"},
		{"hyphen first", func(r *X509Request) { r.DNSNames = []string{"-a.b"} }, "hyphen"},
		{"control byte", func(r *X509Request) { r.DNSNames = []string{"a\x1bb"} }, `'\x1b'`},
		{"not ASCII", func(r *X509Request) { r.DNSNames = []string{"münchen.example"} }, "letters, digits"},
		{"slash", func(r *X509Request) { r.DNSNames = []string{"a/b"} }, "'/'"},
	} {
		r := good
		tt.change(&r)
		if _, err := s.CheckX509(r); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: CheckX509 = %v, want a refusal with %q", tt.name, err, tt.want)
		}
	}
}

func TestOnlyWhatWasCheckedIsSigned(t *testing.T) {
	s, other := openSet(t), openSet(t)
	prepared, err := other.CheckX509(X509Request{ID: mustID(t, "/web"), PublicKey: newPublicKey(t)})
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]PreparedX509{"the zero value": {}, "what other authorities checked": prepared} {
		if _, err := s.SignX509(t.Context(), p); !errors.Is(err, ErrRefused) {
			t.Errorf("SignX509 of %s = %v, want a refusal", name, err)
		}
	}
}

func TestBatchKeepsOrderAndNamesEachError(t *testing.T) {
	s := openSet(t)
	for _, n := range []int{0, 1, parallelFrom - 1, parallelFrom, 150} {
		batch := make([]PreparedX509, n)
		keys := make([]*ecdsa.PublicKey, n)
		for i := range batch {
			keys[i] = newKey(t).Public().(*ecdsa.PublicKey)
			var err error
			if batch[i], err = s.CheckX509(X509Request{ID: mustID(t, "/web"), PublicKey: keys[i]}); err != nil {
				t.Fatal(err)
			}
		}
		if n > 0 {
			batch[n/2] = PreparedX509{}
		}
		svids, errs := s.SignX509Batch(t.Context(), batch)
		if len(svids) != n || len(errs) != n {
			t.Fatalf("%d results and %d errors for %d items", len(svids), len(errs), n)
		}
		serials := map[string]bool{}
		for i := range batch {
			if i == n/2 {
				if svids[i] != nil || !errors.Is(errs[i], ErrRefused) {
					t.Errorf("item %d of %d: %v, %v; want a refusal", i, n, svids[i], errs[i])
				}
				continue
			}
			if errs[i] != nil {
				t.Errorf("item %d of %d: %v", i, n, errs[i])
				continue
			}
			checkSVID(t, s, batch[i].ID(), svids[i])
			if !keys[i].Equal(parse(t, svids[i]).PublicKey) {
				t.Errorf("item %d of %d has the key of another", i, n)
			}
			serials[svids[i].SerialNumber] = true
		}
		if n > 0 && len(serials) != n-1 {
			t.Errorf("%d serial numbers for %d SVIDs", len(serials), n-1)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		svids, errs = s.SignX509Batch(ctx, batch)
		for i := range batch {
			if svids[i] != nil || !errors.Is(errs[i], context.Canceled) {
				t.Errorf("item %d of %d after the context's end: %v, %v", i, n, svids[i], errs[i])
			}
		}
	}
}
