package federation

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/spiffe"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var discard = log.New(io.Discard, "", 0) // what servers say of clients that refuse them

var partner = spiffeid.RequireTrustDomainFromString("partner.example")

// An issuer signs certificates for endpoints.
type issuer struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newIssuer(t testing.TB, td spiffeid.TrustDomain) *issuer {
	t.Helper()
	k := newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: td.Name()}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, URIs: []*url.URL{{Scheme: "spiffe", Host: td.Name()}}}
	return &issuer{t, sign(t, template, nil, k, nil), k}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func sign(t testing.TB, template, parent *x509.Certificate, k, signer *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	if parent == nil {
		parent, signer = template, k
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, k.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// leaf signs a certificate with a SPIFFE ID, or with host names if there is none.
func (i *issuer) leaf(id string, change func(*x509.Certificate)) tls.Certificate {
	i.t.Helper()
	k := newKey(i.t)
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	if id != "" {
		u, err := url.Parse(id)
		if err != nil {
			i.t.Fatal(err)
		}
		template.URIs = []*url.URL{u}
	} else {
		template.DNSNames, template.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}
	}
	if change != nil {
		change(template)
	}
	return tls.Certificate{Certificate: [][]byte{sign(i.t, template, i.cert, k, i.key).Raw}, PrivateKey: k}
}

// serve runs a bundle endpoint and returns its URL.
func serve(t testing.TB, cert tls.Certificate, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	s.Config.ErrorLog = discard
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.URL
}

// document is a bundle of the partner with one authority.
func document(t testing.TB, root *x509.Certificate, sequence uint64) []byte {
	t.Helper()
	b := spiffebundle.New(partner)
	b.AddX509Authority(root)
	b.SetSequenceNumber(sequence)
	doc, err := spiffe.MarshalBundle(b)
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

func pool(certs ...*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c)
	}
	return p
}

func web(url string) *registry.Federation {
	return &registry.Federation{TrustDomain: partner, URL: url, Profile: registry.ProfileWeb}
}

func answer(doc []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.Write(doc) }
}

// FED-12, FED-43, FED-44: a Web PKI endpoint is verified by the host in its URL and the Web's roots, never by a bundle.
func TestFED_43_WebEndpointIsVerifiedByItsHost(t *testing.T) {
	webCA, root := newIssuer(t, spiffeid.RequireTrustDomainFromString("web.ca")), newIssuer(t, partner)
	doc := document(t, root.cert, 1)
	bundles := x509bundle.NewSet(x509bundle.FromX509Authorities(partner, []*x509.Certificate{root.cert}))
	for _, tt := range []struct {
		name string
		cert tls.Certificate
		host string
		text string
	}{
		{"good", webCA.leaf("", nil), "", ""},
		{"good by name", webCA.leaf("", nil), "localhost", ""},
		{"wrong host", webCA.leaf("", func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = []string{"other.example"}, nil }), "", "doesn't contain any IP SANs"},
		{"expired", webCA.leaf("", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), "", "expired"},
		{"of a foreign CA", newIssuer(t, partner).leaf("", nil), "", "unknown authority"},
		{"an SVID of the federated trust domain", root.leaf("spiffe://partner.example/bundle", func(c *x509.Certificate) {
			c.DNSNames, c.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}
		}), "", "unknown authority"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			u := serve(t, tt.cert, answer(doc))
			if tt.host != "" {
				u = strings.Replace(u, "127.0.0.1", tt.host, 1)
			}
			f := &Fetcher{Bundles: bundles, WebRoots: pool(webCA.cert)}
			got, skipped, err := f.Fetch(t.Context(), web(u))
			if tt.text != "" {
				if err == nil || !strings.Contains(err.Error(), tt.text) || got != nil {
					t.Errorf("Fetch = %v, %v; want an error with %q", got, err, tt.text)
				}
				return
			}
			if err != nil || len(skipped) > 0 || !got.HasX509Authority(root.cert) {
				t.Errorf("Fetch = %v, %v, %v", got, skipped, err)
			}
		})
	}
}

// FED-12, FED-53, FED-54, V152: a SPIFFE endpoint is verified by exactly one ID, whatever its host is called.
func TestFED_54_SPIFFEEndpointIsVerifiedByExactlyItsID(t *testing.T) {
	root, other := newIssuer(t, partner), newIssuer(t, spiffeid.RequireTrustDomainFromString("other.example"))
	bundles := x509bundle.NewSet(x509bundle.FromX509Authorities(partner, []*x509.Certificate{root.cert}),
		x509bundle.FromX509Authorities(spiffeid.RequireTrustDomainFromString("other.example"), []*x509.Certificate{other.cert}))
	doc := document(t, root.cert, 1)
	for _, tt := range []struct {
		name string
		cert tls.Certificate
		id   string
		text string
	}{
		{"self-serving", root.leaf("spiffe://partner.example/bundle", nil), "spiffe://partner.example/bundle", ""},
		{"served by another trust domain [FED-56]", other.leaf("spiffe://other.example/bundles", nil), "spiffe://other.example/bundles", ""},
		{"another ID of the same trust domain [V152]", root.leaf("spiffe://partner.example/web", nil), "spiffe://partner.example/bundle", "not \"spiffe://partner.example/bundle\""},
		{"signed by the wrong trust domain", other.leaf("spiffe://partner.example/bundle", nil), "spiffe://partner.example/bundle", "unknown authority"},
		{"of an unknown trust domain", root.leaf("spiffe://partner.example/bundle", nil), "spiffe://nobody.example/bundle", "not \"spiffe://nobody.example/bundle\""},
		{"a Web certificate", root.leaf("", nil), "spiffe://partner.example/bundle", "URI"},
		{"a CA certificate", root.leaf("spiffe://partner.example/bundle", func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
		}), "spiffe://partner.example/bundle", "CA"},
		{"expired", root.leaf("spiffe://partner.example/bundle", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), "spiffe://partner.example/bundle", "expired"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rel := &registry.Federation{TrustDomain: partner, URL: serve(t, tt.cert, answer(doc)), Profile: registry.ProfileSPIFFE, EndpointID: spiffeid.RequireFromString(tt.id)}
			got, _, err := (&Fetcher{Bundles: bundles}).Fetch(t.Context(), rel)
			if tt.text != "" {
				if err == nil || !strings.Contains(err.Error(), tt.text) || got != nil {
					t.Errorf("Fetch = %v, %v; want an error with %q", got, err, tt.text)
				}
				return
			}
			if err != nil || !got.HasX509Authority(root.cert) || got.TrustDomain() != partner {
				t.Errorf("Fetch = %v, %v", got, err)
			}
		})
	}
}

// What a hostile endpoint answers is never a bundle, and costs no more than its bound.
func TestHostileEndpoints(t *testing.T) {
	ca := newIssuer(t, spiffeid.RequireTrustDomainFromString("web.ca"))
	doc := document(t, newIssuer(t, partner).cert, 1)
	redirect := func(to string, status int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", to)
			w.WriteHeader(status)
			w.Write(doc)
		}
	}
	var knocked bool
	inside := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { knocked = true; w.Write(doc) }))
	defer inside.Close()
	other := serve(t, ca.leaf("", nil), func(w http.ResponseWriter, _ *http.Request) { knocked = true; w.Write(doc) })
	for _, tt := range []struct {
		name    string
		handler http.HandlerFunc
		text    string
	}{
		{"garbage", answer([]byte("<html>not found</html>")), "JSON"},
		{"nothing", answer(nil), "JSON"},
		{"two documents [TDB-22]", answer(append(bytes.Clone(doc), doc...)), "JSON"},
		{"no keys [TDB-10]", answer([]byte(`{"Keys":[]}`)), "keys"},
		{"a sequence that is none [V122]", answer([]byte(`{"keys":[],"spiffe_sequence":"1"}`)), "spiffe_sequence"},
		{"huge [TDB-21]", func(w http.ResponseWriter, _ *http.Request) {
			w.Write([]byte(`{"keys":[],"x":"`))
			for range 64 {
				if _, err := w.Write(bytes.Repeat([]byte("a"), 1<<20)); err != nil {
					return // the client has seen enough
				}
			}
		}, "bytes"},
		{"500 with a bundle [FED-22, V153]", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500); w.Write(doc) }, "500"},
		{"204", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) }, "204"},
		{"302 to http [FED-24, V150]", redirect(inside.URL, 302), inside.URL},
		{"308 to a valid URL", redirect(other, 308), "redirects"},
		{"301 with a location of 30 kB", redirect("https://"+strings.Repeat("a", 30<<10), 301), "redirects"},
		{"headers without end", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X", strings.Repeat("a", 1<<20))
			w.Write(doc)
		}, "header"},
		{"cut off", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(doc)))
			w.Write(doc[:len(doc)/2])
		}, "EOF"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := &Fetcher{WebRoots: pool(ca.cert)}
			got, _, err := f.Fetch(t.Context(), web(serve(t, ca.leaf("", nil), tt.handler)))
			if err == nil || !strings.Contains(err.Error(), tt.text) || got != nil {
				t.Fatalf("Fetch = %v, %v; want an error with %q", got, err, tt.text)
			}
			if len(err.Error()) > 1000 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
		})
	}
	if knocked {
		t.Error("a redirect was followed")
	}
}

// A fetch ends when its time is up or its caller is gone, whatever the endpoint does: says nothing after the connection, after
// the handshake, or drips.
func TestSlowEndpoints(t *testing.T) {
	ca := newIssuer(t, spiffeid.RequireTrustDomainFromString("web.ca"))
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close() // nobody accepts: the kernel does
	stuck := func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	drip := func(w http.ResponseWriter, r *http.Request) {
		w.Write([]byte(`{"keys":[`))
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}
	for name, u := range map[string]string{"no handshake": "https://" + silent.Addr().String(), "no answer": serve(t, ca.leaf("", nil), stuck), "half an answer": serve(t, ca.leaf("", nil), drip)} {
		f := &Fetcher{WebRoots: pool(ca.cert), Timeout: 200 * time.Millisecond}
		if _, _, err := f.Fetch(t.Context(), web(u)); err == nil || !strings.Contains(err.Error(), "longer than") {
			t.Errorf("%s: %v, want that it took too long", name, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, _, err := (&Fetcher{WebRoots: pool(ca.cert)}).Fetch(ctx, web(u)); !errors.Is(err, context.Canceled) {
			t.Errorf("%s, canceled: %v", name, err)
		}
	}
}

// FuzzFetch: whatever an endpoint answers, there is either an error or a bundle that can be stored and read again.
func FuzzFetch(f *testing.F) {
	ca := newIssuer(f, spiffeid.RequireTrustDomainFromString("web.ca"))
	bodies := make(chan []byte, 1)
	u := serve(f, ca.leaf("", nil), func(w http.ResponseWriter, _ *http.Request) { w.Write(<-bodies) })
	f.Add(document(f, ca.cert, 7))
	f.Add([]byte(`{"keys":[{"use":"jwt-svid","kid":"x"}],"spiffe_refresh_hint":-1}`))
	f.Add([]byte(`[`))
	fetcher := &Fetcher{WebRoots: pool(ca.cert)}
	f.Fuzz(func(t *testing.T, body []byte) {
		bodies <- body
		got, _, err := fetcher.Fetch(t.Context(), web(u))
		if err != nil {
			return
		}
		doc, err := spiffe.MarshalBundle(got)
		if err != nil {
			t.Fatalf("what was fetched cannot be stored: %v", err)
		}
		again, skipped, err := spiffe.ParseBundle(partner, doc)
		if err != nil || len(skipped) > 0 || !again.Equal(got) {
			t.Fatalf("stored and read again: %v, %v, %v", again, skipped, err)
		}
	})
}
