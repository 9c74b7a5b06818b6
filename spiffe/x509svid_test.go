package spiffe

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

const webID = "spiffe://example.org/w"

// withoutBasicConstraints, withURIs and the like change the template of a leaf.
func withURIs(t testing.TB, more bool, uris ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.ExtraExtensions = []pkix.Extension{sanExtension(t, true, more, uris...)}
	}
}

func TestX509SVIDVectors(t *testing.T) {
	root := newRoot(t, "example.org", nil)
	other := newRoot(t, "other.org", nil)
	pathLen0 := newRoot(t, "example.org", func(c *x509.Certificate) { c.MaxPathLenZero = true })
	intermediate := root.intermediate(t, "example.org", nil)
	notCA := root.leaf(t, webID, func(c *x509.Certificate) { c.Subject.CommonName = "not a CA" })
	noCertSign := root.intermediate(t, "example.org", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign })
	bundles := x509Bundles(map[string]*issuer{"example.org": root, "other.org": other})
	shallow := x509Bundles(map[string]*issuer{"example.org": pathLen0})

	type change = func(*x509.Certificate)
	leaf := func(c change) []*x509.Certificate { return []*x509.Certificate{root.leaf(t, webID, c).cert} }
	uris := func(uris ...string) []*x509.Certificate { return leaf(withURIs(t, false, uris...)) }
	below := func(i *issuer, rest ...*issuer) []*x509.Certificate {
		chain := []*x509.Certificate{i.leaf(t, webID, nil).cert, i.cert}
		for _, r := range rest {
			chain = append(chain, r.cert)
		}
		return chain
	}
	// crypto/x509 does not sign with a certificate that is no CA, so these intermediates get their say by a copy that is.
	forged := func(i *issuer) []*x509.Certificate {
		signer := *i.cert
		signer.IsCA, signer.BasicConstraintsValid, signer.KeyUsage = true, true, x509.KeyUsageCertSign
		return []*x509.Certificate{(&issuer{cert: &signer, key: i.key}).leaf(t, webID, nil).cert, i.cert}
	}

	for _, v := range []struct {
		name    string
		chain   []*x509.Certificate
		bundles x509bundle.Source
		row     string // empty: valid
	}{
		{"V044", leaf(nil), bundles, ""},
		{"V045", leaf(withURIs(t, true, webID)), bundles, ""},
		{"V046", leaf(func(c *x509.Certificate) { c.ExtKeyUsage = nil }), bundles, ""},
		{"V047", leaf(func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }), bundles, ""},
		{"V048", leaf(func(c *x509.Certificate) { c.BasicConstraintsValid = false }), bundles, ""},
		{"V049", leaf(nil), bundles, ""},
		{"V050", uris(webID, "https://example.org/"), bundles, "X509-42"},
		{"V051", uris(webID, webID), bundles, "X509-42"},
		{"V052", leaf(withURIs(t, true)), bundles, "X509-43"},
		{"V053", uris("spiffe://example.org"), bundles, "X509-47"},
		{"V054", uris(webID + "#"), bundles, "X509-49"},
		{"V055", uris("https://example.org/w"), bundles, "X509-46"},
		{"V056", leaf(func(c *x509.Certificate) { c.IsCA = true; c.KeyUsage |= x509.KeyUsageCertSign }), bundles, "X509-44"},
		{"V057", leaf(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), bundles, "X509-45"},
		{"V058", leaf(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }), bundles, "X509-45"},
		{"V059", leaf(func(c *x509.Certificate) { c.KeyUsage = 0 }), bundles, "X509-52"},
		{"V060", leaf(func(c *x509.Certificate) { c.NotAfter = testNow.Add(-time.Second) }), bundles, "X509-40"},
		{"V061", leaf(func(c *x509.Certificate) { c.NotBefore = testNow.Add(10 * time.Minute) }), bundles, "X509-40"},
		{"V062", uris("spiffe://other.org/w"), bundles, "SVID-01"},
		{"V063", forged(notCA), bundles, "X509-53"},
		{"V064", below(pathLen0.intermediate(t, "example.org", nil)), shallow, "X509-40"},
		{"V065", leaf(func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 99999, 1}, Critical: true, Value: []byte{5, 0}})
		}), bundles, "X509-40"},
		{"V066", below(intermediate)[:1], bundles, "SVID-01"},

		{"X509-13 critical EKU", leaf(func(c *x509.Certificate) {
			c.ExtKeyUsage = nil
			c.ExtraExtensions = append(c.ExtraExtensions, criticalEKU(t))
		}), bundles, ""},
		{"X509-40 chain through an intermediate", below(intermediate), bundles, ""},
		{"X509-40 root sent along", below(intermediate, root), bundles, ""},
		{"X509-40 nothing sent", nil, bundles, "X509-40"},
		{"X509-40 far too many", slices.Repeat(leaf(nil), maxChainCertificates+1), bundles, "X509-40"},
		{"X509-41 no bundle of the domain", uris("spiffe://unknown.org/w"), bundles, "X509-41"},
		{"X509-41 no source", leaf(nil), nil, "X509-41"},
		{"X509-41 intermediate of a federated root", below(other.intermediate(t, "other.org", nil)), bundles, "SVID-01"},
		{"X509-46 mailto", uris("urn:x"), bundles, "X509-46"},
		{"X509-48 intermediate as identity", []*x509.Certificate{intermediate.cert}, bundles, "X509-44"},
		{"X509-48 root as identity", []*x509.Certificate{root.cert}, bundles, "X509-44"},
		{"X509-49 upper case scheme", uris("SPIFFE://example.org/w"), bundles, "X509-49"},
		{"X509-49 empty query", uris(webID + "?"), bundles, "X509-49"},
		{"X509-49 trailing slash", uris(webID + "/"), bundles, "X509-49"},
		{"X509-49 encoded byte", uris("spiffe://example.org/%77"), bundles, "X509-49"},
		{"X509-51 EKU of something else", leaf(func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageCodeSigning) }), bundles, ""},
		{"X509-52 no digitalSignature", leaf(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }), bundles, "X509-52"},
		{"X509-53 no keyCertSign", forged(noCertSign), bundles, "X509-53"},
		{"X509-53 useless extra certificate", append(leaf(nil), notCA.cert), bundles, "X509-53"},
		{"ID-18 longest ID", uris(long("spiffe://example.org/", MaxIDBytes)), bundles, ""},
		{"DEC-02 longer than the longest", uris(long("spiffe://example.org/", MaxIDBytes+1)), bundles, "X509-49"},
		{"TDB-11 empty bundle", leaf(nil), x509bundle.New(exampleOrg), "TDB-11"},
	} {
		t.Run(v.name, func(t *testing.T) {
			id, chains, err := VerifyX509SVID(v.chain, v.bundles, X509Options{Now: testNow})
			wantRow(t, "VerifyX509SVID", err, v.row)
			if err != nil {
				if !id.IsZero() || chains != nil {
					t.Errorf("VerifyX509SVID returned %q and %d chains beside an error", id, len(chains))
				}
				return
			}
			if len(chains) == 0 || !chains[0][len(chains[0])-1].Equal(root.cert) {
				t.Errorf("VerifyX509SVID returned %d chains, want one that ends at the root", len(chains))
			}
			theirs, _, err := x509svid.Verify(v.chain, v.bundles, x509svid.WithTime(testNow))
			if err != nil || theirs != id {
				t.Errorf("we say %q, go-spiffe says %q, %v", id, theirs, err)
			}
		})
	}
}

func criticalEKU(t testing.TB) pkix.Extension {
	t.Helper()
	value, err := asn1.Marshal([]asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 1}, {1, 3, 6, 1, 5, 5, 7, 3, 2}})
	if err != nil {
		t.Fatal(err)
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Critical: true, Value: value}
}

func TestX509_52_LenientOptionAllowsOnlyThat(t *testing.T) {
	root := newRoot(t, "example.org", nil)
	bundles := x509Bundles(map[string]*issuer{"example.org": root})
	o := X509Options{Now: testNow, AllowMissingKeyUsage: true}

	bare := root.leaf(t, webID, func(c *x509.Certificate) { c.KeyUsage = 0 })
	if id, _, err := VerifyX509SVID([]*x509.Certificate{bare.cert}, bundles, o); err != nil || id.String() != webID {
		t.Errorf("no key usage, lenient: %q, %v; want it accepted", id, err)
	}
	signer := root.leaf(t, webID, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCertSign })
	_, _, err := VerifyX509SVID([]*x509.Certificate{signer.cert}, bundles, o)
	wantRow(t, "keyCertSign, lenient", err, "X509-45")
}

// A leaf that someone has put among the authorities is not thereby trusted.
func TestX509_68_LeafInBundleIsNoTrustAnchor(t *testing.T) {
	root := newRoot(t, "example.org", nil)
	leaf := root.leaf(t, webID, nil).cert
	bundle := x509bundle.FromX509Authorities(exampleOrg, []*x509.Certificate{leaf})
	_, _, err := VerifyX509SVID([]*x509.Certificate{leaf}, bundle, X509Options{Now: testNow})
	wantRow(t, "leaf as its own authority", err, "TDB-11")
}

// misdirected is a source that answers with the bundle of another trust domain.
type misdirected struct{ bundle *x509bundle.Bundle }

func (m misdirected) GetX509BundleForTrustDomain(spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return m.bundle, nil
}

func TestX509_41_BundleOfAnotherDomainFromTheSource(t *testing.T) {
	root := newRoot(t, "example.org", nil)
	leaf := root.leaf(t, webID, nil).cert
	wrong := x509bundle.FromX509Authorities(spiffeid.RequireTrustDomainFromString("other.org"), []*x509.Certificate{root.cert})
	for name, source := range map[string]misdirected{"other": {wrong}, "none": {nil}} {
		_, _, err := VerifyX509SVID([]*x509.Certificate{leaf}, source, X509Options{Now: testNow})
		wantRow(t, name, err, "X509-41")
	}
}

func TestX509_22_NameConstraintsOfTheAuthorityHold(t *testing.T) {
	root := newRoot(t, "example.org", func(c *x509.Certificate) {
		c.PermittedURIDomains = []string{"elsewhere.org"}
		c.PermittedDNSDomainsCritical = true
	})
	_, _, err := VerifyX509SVID([]*x509.Certificate{root.leaf(t, webID, nil).cert}, x509Bundles(map[string]*issuer{"example.org": root}), X509Options{Now: testNow})
	wantRow(t, "leaf outside the name constraints", err, "X509-40")
}

func TestCheckX509SVIDLeaf(t *testing.T) {
	root := newRoot(t, "example.org", nil)
	if id, err := CheckX509SVIDLeaf(root.leaf(t, webID, nil).cert); err != nil || id.String() != webID {
		t.Errorf("good leaf: %q, %v", id, err)
	}
	_, err := CheckX509SVIDLeaf(root.leaf(t, "spiffe://example.org", nil).cert)
	wantRow(t, "path-less leaf", err, "X509-47")
	_, err = CheckX509SVIDLeaf(nil)
	wantRow(t, "nil", err, "X509-43")
}

func TestIDFromCertificateReadsTheBytes(t *testing.T) {
	root := newRoot(t, "example.org", nil)
	if id, err := IDFromCertificate(root.cert); err != nil || id.String() != "spiffe://example.org" {
		t.Errorf("root: %q, %v", id, err)
	}
	if cert := root.leaf(t, webID+"#", nil).cert; cert.URIs[0].String() != webID {
		t.Errorf("url.URL keeps the empty fragment now (%q), this package can be simpler", cert.URIs[0])
	}
	// URIs without an extension, as in a template, are nothing that was signed.
	_, err := IDFromCertificate(&x509.Certificate{URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/w"}}})
	wantRow(t, "template", err, "X509-43")
	_, err = IDFromCertificate(&x509.Certificate{Extensions: []pkix.Extension{{Id: oidSubjectAltName, Value: []byte{0x30, 0x05}}}})
	wantRow(t, "truncated extension", err, "X509-40")
}

// handshake makes one TLS connection between a client and a server that verify each other with the given configs.
func handshake(t *testing.T, client, server *tls.Config) (clientErr error, resumed bool) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		raw, err := listener.Accept()
		if err != nil {
			return
		}
		conn := tls.Server(raw, server)
		defer conn.Close()
		if conn.Handshake() == nil {
			conn.Write([]byte("x"))
		}
	}()
	defer func() { <-done }()
	conn, err := tls.Dial("tcp", listener.Addr().String(), client)
	if err != nil {
		return err, false
	}
	defer conn.Close()
	_, err = conn.Read(make([]byte, 1)) // also takes in the session ticket, and the server's verdict on us
	return err, conn.ConnectionState().DidResume
}

func certificateOf(i *issuer) []tls.Certificate {
	return []tls.Certificate{{Certificate: [][]byte{i.cert.Raw}, PrivateKey: i.key}}
}

func TestX509_50_VerifyPeerInHandshake(t *testing.T) {
	root := newRoot(t, "example.org", nil)
	bundles := x509Bundles(map[string]*issuer{"example.org": root})
	now := func() time.Time { return testNow }
	allow := func(spiffeid.ID, [][]*x509.Certificate) error { return nil }
	deny := errors.New("not you")

	for _, tt := range []struct {
		name      string
		server    *issuer
		authorize func(spiffeid.ID, [][]*x509.Certificate) error
		wantErr   string
	}{
		{"good peer, whatever its host name", root.leaf(t, webID, nil), allow, ""},
		{"X509-48 the authority itself", root, allow, "X509-44"},
		{"X509-47 path-less leaf", root.leaf(t, "spiffe://example.org", nil), allow, "X509-47"},
		{"refused by the authorizer", root.leaf(t, webID, nil), func(id spiffeid.ID, chains [][]*x509.Certificate) error {
			if id.String() != webID || len(chains) == 0 {
				t.Errorf("authorizer was asked about %q with %d chains", id, len(chains))
			}
			return deny
		}, deny.Error()},
		{"no authorizer", root.leaf(t, webID, nil), nil, "no authorizer"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			client := &tls.Config{InsecureSkipVerify: true, VerifyPeerCertificate: VerifyPeer(bundles, now, tt.authorize), MinVersion: tls.VersionTLS13}
			server := &tls.Config{Certificates: certificateOf(tt.server)}
			err, _ := handshake(t, client, server)
			if (err == nil) != (tt.wantErr == "") || err != nil && !strings.Contains(err.Error(), tt.wantErr) {
				t.Errorf("handshake: %v, want %q", err, tt.wantErr)
			}
		})
	}
	err := VerifyPeer(bundles, now, allow)([][]byte{{1, 2, 3}}, nil)
	wantRow(t, "malformed certificate", err, "X509-40")
	wantRow(t, "too many", VerifyPeer(bundles, now, allow)(make([][]byte, 99), nil), "X509-40")
	wantRow(t, "none", VerifyPeer(bundles, nil, allow)(nil, nil), "X509-40")
}

// A resumed session is verified against the bundle of that moment.
func TestX509_55_ResumptionAfterRootRemovalFails(t *testing.T) {
	root := newRoot(t, "example.org", nil)
	bundle := x509bundle.FromX509Authorities(exampleOrg, []*x509.Certificate{root.cert})
	now := func() time.Time { return testNow }
	verify := VerifyConnection(bundle, now, func(spiffeid.ID, [][]*x509.Certificate) error { return nil })
	client := &tls.Config{
		InsecureSkipVerify: true,
		VerifyConnection:   verify,
		MinVersion:         tls.VersionTLS13,
		ClientSessionCache: tls.NewLRUClientSessionCache(1),
		ServerName:         "example",
		Time:               now,
	}
	server := &tls.Config{Certificates: certificateOf(root.leaf(t, webID, nil)), Time: now}

	if err, resumed := handshake(t, client, server); err != nil || resumed {
		t.Fatalf("first connection: %v, resumed %t", err, resumed)
	}
	if err, resumed := handshake(t, client, server); err != nil || !resumed {
		t.Fatalf("second connection: %v, resumed %t, want a resumed one", err, resumed)
	}
	bundle.RemoveX509Authority(root.cert)
	if err, _ := handshake(t, client, server); RowOf(err) != "TDB-11" {
		t.Errorf("resumption after the root was removed: %v, want a refusal for TDB-11", err)
	}
}

// What we accept in a certificate, go-spiffe accepts, and it is what the URI says.
func FuzzIDFromCertificate(f *testing.F) {
	root := newRoot(f, "example.org", nil)
	f.Add(root.cert.Raw)
	f.Add(root.leaf(f, webID, nil).cert.Raw)
	f.Add(root.leaf(f, webID+"#", nil).cert.Raw)
	f.Add(root.leaf(f, "", withURIs(f, true, webID, webID)).cert.Raw)
	f.Fuzz(func(t *testing.T, der []byte) {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return
		}
		id, err := IDFromCertificate(cert)
		if err != nil {
			if RowOf(err) == "" {
				t.Errorf("error %v has no row", err)
			}
			return
		}
		theirs, err := x509svid.IDFromCert(cert)
		if err != nil || theirs != id || len(cert.URIs) != 1 {
			t.Errorf("we read %q, go-spiffe %q, %v", id, theirs, err)
		}
	})
}

// The SAN extension itself is foreign bytes, too: whatever it holds, an ID stands in it byte for byte.
func FuzzIDFromSANBytes(f *testing.F) {
	f.Add(sanExtension(f, true, true, webID).Value)
	f.Add(sanExtension(f, true, false, webID, webID).Value)
	f.Add([]byte{0x30, 0x80, 0x86})
	f.Fuzz(func(t *testing.T, value []byte) {
		id, err := IDFromCertificate(&x509.Certificate{Extensions: []pkix.Extension{{Id: oidSubjectAltName, Value: value}}})
		if err == nil && !strings.Contains(string(value), id.String()) {
			t.Errorf("%x gives %q, which is not in it", value, id)
		}
	})
}
