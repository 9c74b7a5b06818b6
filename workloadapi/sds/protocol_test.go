package sds

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-id/signet/workloadapi"
)

var ours, theirs, others = spiffeid.RequireTrustDomainFromString("example.org"), spiffeid.RequireTrustDomainFromString("partner.example"), spiffeid.RequireTrustDomainFromString("other.example")

// made is one certificate with its key, self-signed: what is in it does not matter here.
func made(t testing.TB, uri string) (cert *x509.Certificate, key *ecdsa.PrivateKey, pkcs8 []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(uri)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, URIs: []*url.URL{u}, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCRLSign | x509.KeyUsageCertSign, SubjectKeyId: []byte{1}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	if pkcs8, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
		t.Fatal(err)
	}
	return cert, key, pkcs8
}

func identity(t testing.TB, path string) workloadapi.Identity {
	cert, _, key := made(t, ours.IDString()+path)
	return workloadapi.Identity{ID: spiffeid.RequireFromPath(ours, path), Chain: cert.Raw, Key: key, FederatesWith: []spiffeid.TrustDomain{theirs}}
}

func update(t testing.TB, paths ...string) workloadapi.Update {
	u := workloadapi.Update{TrustDomain: ours, X509Bundles: map[spiffeid.TrustDomain][]byte{}}
	for _, td := range []spiffeid.TrustDomain{ours, theirs, others} {
		cert, _, _ := made(t, td.IDString())
		u.X509Bundles[td] = cert.Raw
	}
	for _, p := range paths {
		u.Identities = append(u.Identities, identity(t, p))
	}
	return u
}

func testService(t testing.TB) *service {
	s := &service{}
	if err := s.cfg.Check(); err != nil {
		t.Fatal(err)
	}
	return s
}

// names of the resources of a response, and what is in them.
func secrets(t testing.TB, resp *discoveryv3.DiscoveryResponse) map[string]*tlsv3.Secret {
	t.Helper()
	out := map[string]*tlsv3.Secret{}
	for _, r := range resp.GetResources() {
		var s tlsv3.Secret
		if err := r.UnmarshalTo(&s); err != nil {
			t.Fatal(err)
		}
		out[s.Name] = &s
	}
	return out
}

func wantNames[V any](t testing.TB, got map[string]V, want ...string) {
	t.Helper()
	slices.Sort(want)
	if names := slices.Sorted(maps.Keys(got)); !slices.Equal(names, want) {
		t.Fatalf("resources %q, want %q", names, want)
	}
}

// ask sends a request and returns the response that is due, which the test then answers or not.
func (s *stateOfTheWorld) ask(t testing.TB, o *offer, req *discoveryv3.DiscoveryRequest) *discoveryv3.DiscoveryResponse {
	t.Helper()
	if _, err := s.request(req); err != nil {
		t.Fatal(err)
	}
	resp, err := s.respond(o)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

func TestStateOfTheWorldAnswersOnlyWhatIsNew(t *testing.T) {
	svc := testService(t)
	u := update(t, "/web", "/db")
	o := svc.offer(u, node{})
	s := &stateOfTheWorld{}
	first := s.ask(t, o, &discoveryv3.DiscoveryRequest{ResourceNames: []string{"default", "ROOTCA", "spiffe://example.org/nobody"}})
	wantNames(t, secrets(t, first), "default", "ROOTCA")
	if first.Nonce == "" || first.VersionInfo == "" || first.TypeUrl != secretType {
		t.Errorf("a response without nonce, version or type: %v", first)
	}
	names := []string{"default", "ROOTCA", "spiffe://example.org/nobody"}
	if resp := s.ask(t, o, &discoveryv3.DiscoveryRequest{ResourceNames: names, ResponseNonce: first.Nonce, VersionInfo: first.VersionInfo}); resp != nil {
		t.Errorf("an acknowledgement is answered with %v", resp)
	}

	// A new name brings all; giving one up brings nothing, and taking it up again brings all.
	names = append(names, "spiffe://example.org/db")
	second := s.ask(t, o, &discoveryv3.DiscoveryRequest{ResourceNames: names, ResponseNonce: first.Nonce})
	wantNames(t, secrets(t, second), "default", "ROOTCA", "spiffe://example.org/db")
	if second.Nonce == first.Nonce || second.VersionInfo == first.VersionInfo {
		t.Error("another response has the nonce or version of the first")
	}
	if resp := s.ask(t, o, &discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}, ResponseNonce: second.Nonce}); resp != nil {
		t.Errorf("giving up resources is answered with %v", resp)
	}
	third := s.ask(t, o, &discoveryv3.DiscoveryRequest{ResourceNames: names, ResponseNonce: second.Nonce})
	wantNames(t, secrets(t, third), "default", "ROOTCA", "spiffe://example.org/db")
	if third.VersionInfo != second.VersionInfo {
		t.Error("the same resources have another version")
	}

	// An answer to an older response is ignored, also what it asks for; so is a nonce that was never given.
	for _, nonce := range []string{first.Nonce, "99", "x", "0", "18446744073709551616"} {
		if resp := s.ask(t, o, &discoveryv3.DiscoveryRequest{ResourceNames: []string{"spiffe://example.org/web"}, ResponseNonce: nonce}); resp != nil {
			t.Errorf("nonce %q is answered with %v", nonce, resp)
		}
	}

	// A change of one brings all; the same again nothing.
	changed := u
	changed.Identities = []workloadapi.Identity{u.Identities[0], identity(t, "/db")}
	resp, err := s.respond(svc.offer(changed, node{}))
	if err != nil {
		t.Fatal(err)
	}
	wantNames(t, secrets(t, resp), "default", "ROOTCA", "spiffe://example.org/db")
	if resp, err := s.respond(svc.offer(changed, node{})); resp != nil || err != nil {
		t.Errorf("no change is answered with %v, %v", resp, err)
	}

	// What is gone is left out, and what comes is added.
	resp, _ = s.respond(svc.offer(workloadapi.Update{TrustDomain: u.TrustDomain, X509Bundles: u.X509Bundles, Identities: u.Identities[:1]}, node{}))
	wantNames(t, secrets(t, resp), "default", "ROOTCA")
	came := u
	came.Identities = append(slices.Clone(u.Identities), identity(t, "/nobody"))
	resp, _ = s.respond(svc.offer(came, node{}))
	wantNames(t, secrets(t, resp), "default", "ROOTCA", "spiffe://example.org/db", "spiffe://example.org/nobody")
}

func TestStateOfTheWorldWildcard(t *testing.T) {
	svc := testService(t)
	o := svc.offer(update(t, "/web", "/db"), node{})
	s := &stateOfTheWorld{}
	first := s.ask(t, o, &discoveryv3.DiscoveryRequest{})
	all := []string{"spiffe://example.org", "spiffe://partner.example", "spiffe://example.org/db", "spiffe://example.org/web"} // other.example is not the caller's
	wantNames(t, secrets(t, first), all...)
	if resp := s.ask(t, o, &discoveryv3.DiscoveryRequest{ResponseNonce: first.Nonce}); resp != nil {
		t.Errorf("an acknowledgement is answered with %v", resp)
	}
	second := s.ask(t, o, &discoveryv3.DiscoveryRequest{ResponseNonce: first.Nonce, ResourceNames: []string{"*", "default"}})
	wantNames(t, secrets(t, second), append(all, "default")...)
	// Once names were given, an empty list asks for nothing.
	if resp := s.ask(t, o, &discoveryv3.DiscoveryRequest{ResponseNonce: second.Nonce, ResourceNames: []string{"default"}}); resp != nil {
		t.Errorf("giving up resources is answered with %v", resp)
	}
	if resp := s.ask(t, o, &discoveryv3.DiscoveryRequest{ResponseNonce: second.Nonce}); resp != nil {
		t.Errorf("giving up everything is answered with %v", resp)
	}
	if s.wanted.all || len(s.wanted.named) != 0 {
		t.Errorf("the stream still wants %+v", s.wanted)
	}
}

func (d *delta) ask(t testing.TB, o *offer, req *discoveryv3.DeltaDiscoveryRequest) *discoveryv3.DeltaDiscoveryResponse {
	t.Helper()
	if _, err := d.request(req); err != nil {
		t.Fatal(err)
	}
	resp, err := d.respond(o)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

func wantDelta(t testing.TB, resp *discoveryv3.DeltaDiscoveryResponse, added, removed []string) {
	t.Helper()
	var names []string
	for _, r := range resp.GetResources() {
		names = append(names, r.Name)
		if r.Version == "" {
			t.Errorf("resource %q has no version", r.Name)
		}
	}
	slices.Sort(names)
	slices.Sort(added)
	if !slices.Equal(names, added) || !slices.Equal(resp.GetRemovedResources(), removed) {
		t.Fatalf("resources %q, removed %q; want %q and %q", names, resp.GetRemovedResources(), added, removed)
	}
}

func TestDelta(t *testing.T) {
	svc := testService(t)
	u := update(t, "/web", "/db")
	o := svc.offer(u, node{})
	d := &delta{}
	first := d.ask(t, o, &discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default", "ROOTCA", "spiffe://example.org/nobody"}})
	wantDelta(t, first, []string{"default", "ROOTCA"}, []string{"spiffe://example.org/nobody"})
	if resp := d.ask(t, o, &discoveryv3.DeltaDiscoveryRequest{ResponseNonce: first.Nonce}); resp != nil {
		t.Errorf("an acknowledgement is answered with %v", resp)
	}
	// Only what is new comes; who asks again gets it again.
	wantDelta(t, d.ask(t, o, &discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"spiffe://example.org/db"}}), []string{"spiffe://example.org/db"}, nil)
	wantDelta(t, d.ask(t, o, &discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default"}}), []string{"default"}, nil)

	// What comes into being, is replaced, and goes.
	came := u
	came.Identities = []workloadapi.Identity{identity(t, "/web"), u.Identities[1], identity(t, "/nobody")}
	resp, err := d.respond(svc.offer(came, node{}))
	if err != nil {
		t.Fatal(err)
	}
	wantDelta(t, resp, []string{"default", "spiffe://example.org/nobody"}, nil)
	resp, _ = d.respond(o)
	wantDelta(t, resp, []string{"default"}, []string{"spiffe://example.org/nobody"})
	if resp, _ := d.respond(o); resp != nil {
		t.Errorf("no change is answered with %v", resp)
	}
	// What is given up does not come any more.
	if resp := d.ask(t, o, &discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{"spiffe://example.org/db", "default", "never"}}); resp != nil {
		t.Errorf("giving up is answered with %v", resp)
	}
	came.Identities[1] = identity(t, "/db")
	resp, _ = d.respond(svc.offer(came, node{}))
	wantDelta(t, resp, []string{"spiffe://example.org/nobody"}, nil)
}

func TestDeltaTakesUpWhereAnEarlierStreamEnded(t *testing.T) {
	svc := testService(t)
	o := svc.offer(update(t, "/web", "/db"), node{})
	before := (&delta{}).ask(t, o, &discoveryv3.DeltaDiscoveryRequest{})
	wantDelta(t, before, []string{"spiffe://example.org", "spiffe://partner.example", "spiffe://example.org/db", "spiffe://example.org/web"}, nil)
	have := map[string]string{"spiffe://example.org/gone": "1"}
	for _, r := range before.Resources {
		have[r.Name] = r.Version
	}
	have["spiffe://example.org/db"] = "an older one"
	wantDelta(t, (&delta{}).ask(t, o, &discoveryv3.DeltaDiscoveryRequest{InitialResourceVersions: have}), []string{"spiffe://example.org/db"}, []string{"spiffe://example.org/gone"})
	// A stream that names what it wants is not told of the rest.
	wantDelta(t, (&delta{}).ask(t, o, &discoveryv3.DeltaDiscoveryRequest{InitialResourceVersions: have, ResourceNamesSubscribe: []string{"default", "spiffe://example.org/web"}}),
		[]string{"default"}, nil)

	// The wildcard is given up.
	d := &delta{}
	d.ask(t, o, &discoveryv3.DeltaDiscoveryRequest{})
	if resp := d.ask(t, o, &discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{"*"}}); resp != nil {
		t.Errorf("giving up everything is answered with %v", resp)
	}
	if len(d.sent) != 0 {
		t.Errorf("the stream still keeps %v", d.sent)
	}
}

func TestRefusalCountsOnce(t *testing.T) {
	svc := testService(t)
	o := svc.offer(update(t, "/web"), node{})
	bad := &rpcstatus.Status{Code: 3, Message: "no such key"}
	s, d := &stateOfTheWorld{}, &delta{}
	first := s.ask(t, o, &discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}})
	d.ask(t, o, &discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default"}})
	d.ask(t, o, &discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"ROOTCA"}})
	for i, want := range []bool{true, false} {
		refused, err := s.request(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}, ResponseNonce: first.Nonce, ErrorDetail: bad})
		if err != nil || (refused != nil) != want || want && refused.message != "no such key" {
			t.Errorf("refusal %d: %v, %v", i, refused, err)
		}
		if resp, err := s.respond(o); resp != nil || err != nil {
			t.Errorf("what was refused is sent again: %v, %v", resp, err)
		}
		refused, err = d.request(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: "1", ErrorDetail: bad}) // not the last response, but the client answers each
		if err != nil || (refused != nil) != want {
			t.Errorf("refusal %d: %v, %v", i, refused, err)
		}
		if resp, err := d.respond(o); resp != nil || err != nil {
			t.Errorf("what was refused is sent again: %v, %v", resp, err)
		}
	}
	if refused, _ := d.request(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: "3", ErrorDetail: bad}); refused != nil {
		t.Error("a response that was never sent is refused")
	}
}

func TestRequestsHaveBounds(t *testing.T) {
	many := make([]string, maxNames+1)
	long := make([]string, maxNamesBytes/maxNameBytes+1)
	have := map[string]string{}
	for i := range many {
		many[i] = fmt.Sprint("name", i)
		have[many[i]] = "1"
	}
	for i := range long {
		long[i] = strings.Repeat("x", maxNameBytes-2) + fmt.Sprintf("%02d", i)
	}
	wide := map[string]string{"a": strings.Repeat("x", maxNamesBytes)}
	for what, req := range map[string]*discoveryv3.DeltaDiscoveryRequest{
		"resources are named":                            {ResourceNamesSubscribe: many},
		"257 resources are named":                        {ResourceNamesUnsubscribe: many},
		"at most 256":                                    {InitialResourceVersions: have},
		"initial_resource_versions has more than":        {InitialResourceVersions: wide},
		"bytes together":                                 {ResourceNamesSubscribe: long},
		"has 2049 bytes: at most":                        {ResourceNamesSubscribe: []string{strings.Repeat("x", maxNameBytes+1)}},
		"is empty":                                       {ResourceNamesSubscribe: []string{"default", ""}},
		`type_url is a\x1b[2Jb: here are only resources`: {TypeUrl: "a\x1b[2Jb"},
	} {
		_, err := (&delta{}).request(req)
		if err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("delta: %v, want %q", err, what)
		}
		if len(req.ResourceNamesSubscribe) > 0 || req.TypeUrl != "" {
			_, err := (&stateOfTheWorld{}).request(&discoveryv3.DiscoveryRequest{ResourceNames: req.ResourceNamesSubscribe, TypeUrl: req.TypeUrl})
			if err == nil || !strings.Contains(err.Error(), what) {
				t.Errorf("state of the world: %v, want %q", err, what)
			}
		}
	}
	// The bound is of the stream, not of a request.
	d := &delta{}
	if _, err := d.request(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: many[:maxNames]}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.request(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: many[maxNames:]}); err == nil {
		t.Errorf("a stream may name %d resources one by one", maxNames+1)
	}
}

func envoy(major, minor uint32, metadata map[string]any) *corev3.Node {
	m, err := structpb.NewStruct(metadata)
	if err != nil {
		panic(err)
	}
	return &corev3.Node{Metadata: m, UserAgentVersionType: &corev3.Node_UserAgentBuildVersion{
		UserAgentBuildVersion: &corev3.BuildVersion{Version: &typev3.SemanticVersion{MajorNumber: major, MinorNumber: minor}}}}
}

func TestValidatorByEnvoysVersion(t *testing.T) {
	for _, tt := range []struct {
		name string
		node *corev3.Node
		want bool
	}{
		{"no word", nil, false},
		{"too old", envoy(1, 17, nil), false},
		{"first", envoy(1, 18, nil), true},
		{"new", envoy(2, 0, nil), true},
		{"not wanted", envoy(1, 36, map[string]any{"disable_spiffe_cert_validation": true}), false},
		{"not wanted, as text", envoy(1, 36, map[string]any{"disable_spiffe_cert_validation": "true"}), false},
		{"wanted", envoy(1, 36, map[string]any{"disable_spiffe_cert_validation": false}), true},
	} {
		if got := nodeOf(tt.node).spiffe; got != tt.want {
			t.Errorf("%s: the validator is used: %v, want %v", tt.name, got, tt.want)
		}
	}
}

func validatorOf(t testing.TB, s *tlsv3.Secret) map[string]string {
	t.Helper()
	custom := s.GetValidationContext().GetCustomValidatorConfig()
	if custom.GetName() != spiffeValidator || s.GetValidationContext().GetTrustedCa() != nil {
		t.Fatalf("%q has the validator %q", s.Name, custom.GetName())
	}
	var config tlsv3.SPIFFECertValidatorConfig
	if err := custom.GetTypedConfig().UnmarshalTo(&config); err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, td := range config.TrustDomains {
		out[td.Name] = string(td.TrustBundle.GetInlineBytes())
	}
	return out
}

func TestValidationContexts(t *testing.T) {
	svc := testService(t)
	u := update(t, "/web")
	pemOf := func(td spiffeid.TrustDomain) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: u.X509Bundles[td]}))
	}
	names := []string{"ROOTCA", "ALL", "spiffe://example.org", "spiffe://partner.example", "spiffe://other.example"}

	modern := secrets(t, (&stateOfTheWorld{}).ask(t, svc.offer(u, node{spiffe: true}), &discoveryv3.DiscoveryRequest{ResourceNames: names}))
	wantNames(t, modern, names[:4]...) // not other.example: no identity of the caller federates with it
	for name, tds := range map[string][]spiffeid.TrustDomain{"ROOTCA": {ours}, "spiffe://example.org": {ours}, "spiffe://partner.example": {theirs}, "ALL": {ours, theirs}} {
		got := validatorOf(t, modern[name])
		if len(got) != len(tds) {
			t.Errorf("%s is about %d trust domains, want %d", name, len(got), len(tds))
		}
		for _, td := range tds {
			if got[td.Name()] != pemOf(td) {
				t.Errorf("%s has for %s not its bundle", name, td.Name())
			}
		}
	}
	old := secrets(t, (&stateOfTheWorld{}).ask(t, svc.offer(u, node{}), &discoveryv3.DiscoveryRequest{ResourceNames: names}))
	wantNames(t, old, "ROOTCA", "spiffe://example.org", "spiffe://partner.example") // no ALL
	for name, td := range map[string]spiffeid.TrustDomain{"ROOTCA": ours, "spiffe://example.org": ours, "spiffe://partner.example": theirs} {
		if got := string(old[name].GetValidationContext().GetTrustedCa().GetInlineBytes()); got != pemOf(td) || old[name].GetValidationContext().GetCrl() != nil {
			t.Errorf("%s is not the bundle of %s alone", name, td.Name())
		}
	}
	svc.cfg.DisableSPIFFECertValidation = true
	off := secrets(t, (&stateOfTheWorld{}).ask(t, svc.offer(u, node{spiffe: true}), &discoveryv3.DiscoveryRequest{ResourceNames: names}))
	wantNames(t, off, "ROOTCA", "spiffe://example.org", "spiffe://partner.example")
}

func TestCRLsReachTheValidationContext(t *testing.T) {
	svc := testService(t)
	u := update(t, "/web")
	root, key, _ := made(t, ours.IDString())
	crl := func(number int64) []byte {
		der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour)}, root, key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	s := &stateOfTheWorld{}
	s.ask(t, svc.offer(u, node{spiffe: true}), &discoveryv3.DiscoveryRequest{ResourceNames: []string{"ROOTCA"}})
	for number := range int64(2) {
		u.CRLs = map[spiffeid.TrustDomain][][]byte{ours: {crl(number), crl(number + 10)}}
		resp, err := s.respond(svc.offer(u, node{spiffe: true}))
		if err != nil || resp == nil {
			t.Fatalf("new CRLs are not sent: %v", err)
		}
		// The SPIFFE certificate validator would not read them.
		v := secrets(t, resp)["ROOTCA"].GetValidationContext()
		if v.GetTrustedCa() == nil || v.GetCustomValidatorConfig() != nil || !v.GetOnlyVerifyLeafCertCrl() {
			t.Fatalf("the validation context with CRLs is %v", v)
		}
		rest := v.GetCrl().GetInlineBytes()
		for i := range int64(2) {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil || block.Type != "X509 CRL" {
				t.Fatal("a CRL is missing")
			}
			if list, err := x509.ParseRevocationList(block.Bytes); err != nil || list.Number.Int64() != number+10*i {
				t.Errorf("CRL %d: %v", i, err)
			}
		}
	}
}

func TestConfigCheck(t *testing.T) {
	for want, c := range map[string]Config{
		`default_bundle_name: "ALL" is the default_svid_name too`:     {DefaultSVIDName: "ALL", DefaultBundleName: "ALL", DefaultAllBundlesName: "x"},
		`default_all_bundles_name: "default" is the default_svid_nam`: {DefaultAllBundlesName: "default"},
		`default_svid_name: "*" names something else`:                 {DefaultSVIDName: "*"},
		`default_svid_name: "spiffe://example.org/a" names`:           {DefaultSVIDName: "spiffe://example.org/a"},
		`a name of 2049 bytes is longer`:                              {DefaultSVIDName: strings.Repeat("x", maxNameBytes+1)},
	} {
		if err := c.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Check = %v, want %q", err, want)
		}
	}
	if _, err := Service(Config{DefaultSVIDName: "*"}); err == nil {
		t.Error("Service takes a name that cannot work")
	}
}
