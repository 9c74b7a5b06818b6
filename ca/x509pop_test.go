package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/internal/x509pop"
)

// possess answers x509pop's challenges as an agent with that key does.
func possess(t *testing.T, k crypto.Signer) func([]byte) []byte {
	return func(question []byte) []byte {
		c, err := x509pop.ParseChallenge(question)
		if err != nil {
			t.Errorf("challenge %q: %v", question, err)
			return nil
		}
		r, err := x509pop.Respond(k, c)
		if err != nil {
			t.Errorf("answering %q: %v", question, err)
			return nil
		}
		out, err := json.Marshal(r)
		if err != nil {
			t.Error(err)
		}
		return out
	}
}

func popPayload(t *testing.T, chain [][]byte) []byte {
	t.Helper()
	out, err := json.Marshal(x509pop.Payload{Certificates: chain})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func popConfig(t *testing.T, p *pki) Config {
	c := config(t.TempDir())
	c.NodeAttestors.X509POP = &X509POP{CABundlePath: p.rootFile}
	return c
}

func sha1hex(der []byte) string {
	sum := sha1.Sum(der)
	return hex.EncodeToString(sum[:])
}

func rsaKey(t *testing.T, bits int) *rsa.PrivateKey {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestX509POP(t *testing.T) {
	p := newPKI(t)
	h := start(t, popConfig(t, p))
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, k := range map[string]crypto.Signer{"P-256": key(t), "P-384": p384, "RSA 2048": rsaKey(t, 2048)} {
		t.Run(name, func(t *testing.T) {
			chain := p.node(k.Public(), func(c *x509.Certificate) {
				c.URIs = []*url.URL{{Scheme: "x509pop", Host: "example.org", Path: "/env/prod/eu"}, {Scheme: "x509pop", Host: "other.example", Path: "/env/no"},
					{Scheme: "x509pop", Host: "example.org", Path: "/alone"}, {Scheme: "https", Host: "example.org", Path: "/x/y"}}
			})
			r, err := prove(t.Context(), h.dial(nil, nil), "x509pop", popPayload(t, chain), csr(t, key(t)), possess(t, k))
			if err != nil {
				t.Fatal(err)
			}
			if want := "/spire/agent/x509pop/" + sha1hex(chain[0]); r.Svid.Id.Path != want || !r.Reattestable {
				t.Errorf("agent %q, reattestable %t; want %q", r.Svid.Id.Path, r.Reattestable, want)
			}
			got, err := agentv1.NewAgentClient(h.admin).GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: r.Svid.Id})
			if err != nil {
				t.Fatal(err)
			}
			leaf, err := x509.ParseCertificate(chain[0])
			if err != nil {
				t.Fatal(err)
			}
			want := []string{"x509pop:subject:cn:node-1", "x509pop:ca:fingerprint:" + sha1hex(p.mid.Raw), "x509pop:ca:fingerprint:" + sha1hex(p.root.Raw),
				fmt.Sprintf("x509pop:serialnumber:0%x", leaf.SerialNumber), "x509pop:san:env:prod/eu"}
			slices.Sort(want)
			if have := selectorValues(got.Selectors); !slices.Equal(have, want) {
				t.Errorf("selectors %q,\nwant %q", have, want)
			}
		})
	}
}

func TestX509POPRefuses(t *testing.T) {
	p, foreign := newPKI(t), newPKI(t)
	c := popConfig(t, p)
	c.NodeAttestors.X509POP.VerifyClientIP, c.NodeAttestors.X509POP.MaxRSAKeySize = true, 2048
	h := start(t, c)
	local := func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.ParseIP("127.0.0.1")} }
	with := func(change func(*x509.Certificate)) func(*x509.Certificate) {
		return func(c *x509.Certificate) { local(c); change(c) }
	}
	k := key(t)
	good := p.node(k.Public(), local)
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	large, weak := rsaKey(t, 2056), weakRSA(t)
	long := slices.Concat(good, slices.Repeat([][]byte{p.mid.Raw}, 4))
	var lastQuestion, lastAnswer []byte
	record := func(q []byte) []byte {
		lastQuestion, lastAnswer = q, possess(t, k)(q)
		return lastAnswer
	}
	if _, err := prove(t.Context(), h.dial(nil, nil), "x509pop", popPayload(t, good), csr(t, key(t)), record); err != nil {
		t.Fatalf("the good one: %v", err)
	}
	before := len(h.audit("agent.attested"))
	for _, tt := range []struct {
		name    string
		payload []byte
		answer  func([]byte) []byte
		code    codes.Code
		want    string
	}{
		{"garbage", []byte("garbage"), noAnswer, codes.InvalidArgument, "not x509pop's JSON"},
		{"null", []byte("null"), noAnswer, codes.InvalidArgument, "no certificate"},
		{"no certificate", popPayload(t, nil), noAnswer, codes.InvalidArgument, "no certificate"},
		{"a broken certificate", popPayload(t, [][]byte{good[0][:100]}), noAnswer, codes.InvalidArgument, "certificate 0 of the chain is not X.509"},
		{"a broken intermediate", popPayload(t, [][]byte{good[0], good[0][:100]}), noAnswer, codes.InvalidArgument, "certificate 1 of the chain is not X.509"},
		{"an oversized chain", popPayload(t, long), noAnswer, codes.InvalidArgument, "5 intermediate certificates, at most 4"},
		{"no intermediate", popPayload(t, good[:1]), noAnswer, codes.PermissionDenied, "not issued by a CA"},
		{"a foreign CA", popPayload(t, foreign.node(k.Public(), local)), noAnswer, codes.PermissionDenied, "not issued by a CA"},
		{"expired", popPayload(t, p.node(k.Public(), with(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }))), noAnswer, codes.PermissionDenied, "not valid now"},
		{"not valid yet", popPayload(t, p.node(k.Public(), with(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }))), noAnswer, codes.PermissionDenied, "not valid now"},
		{"no digitalSignature", popPayload(t, p.node(k.Public(), with(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }))), noAnswer, codes.PermissionDenied, "digitalSignature"},
		{"another address", popPayload(t, p.node(k.Public(), func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.ParseIP("192.0.2.1")} })), noAnswer, codes.PermissionDenied, "not for the address 127.0.0.1"},
		{"no address", popPayload(t, p.node(k.Public(), nil)), noAnswer, codes.PermissionDenied, "not for the address"},
		{"Ed25519", popPayload(t, p.node(ed.Public(), local)), noAnswer, codes.InvalidArgument, "RSA and ECDSA"},
		{"P-224", popPayload(t, p.node(p224.Public(), local)), noAnswer, codes.InvalidArgument, "too weak"},
		{"RSA 1024", popPayload(t, p.node(weak.Public(), local)), noAnswer, codes.InvalidArgument, "1024 bits"},
		{"RSA 2056", popPayload(t, p.node(large.Public(), local)), noAnswer, codes.InvalidArgument, "2056 bits, not 2048 to 2048"},
		{"a stolen certificate", popPayload(t, good), possess(t, key(t)), codes.PermissionDenied, "does not prove"},
		{"a replayed answer", popPayload(t, good), func([]byte) []byte { return lastAnswer }, codes.PermissionDenied, "does not prove"},
		{"a mirrored challenge", popPayload(t, good), func(q []byte) []byte { return q }, codes.PermissionDenied, "does not prove"},
		{"silence", popPayload(t, good), noAnswer, codes.InvalidArgument, "no answer"},
		{"an answer that is garbage", popPayload(t, good), func([]byte) []byte { return []byte("{") }, codes.InvalidArgument, "not x509pop's JSON"},
		{"an answer with no nonce", popPayload(t, good), func(q []byte) []byte { return []byte(`{"ecdsa_signature":{"nonce":"","r":"AQ==","s":"AQ=="}}`) }, codes.PermissionDenied, "nonces"},
		{"an answer of RSA", popPayload(t, good), func(q []byte) []byte { return []byte(`{"rsa_signature":{"nonce":"","signature":"AQ=="}}`) }, codes.PermissionDenied, "no ECDSA"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := prove(t.Context(), h.dial(nil, nil), "x509pop", tt.payload, csr(t, key(t)), tt.answer)
			if code(err) != tt.code || !strings.Contains(err.Error(), "failed to attest: ") || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %v %q", err, tt.code, tt.want)
			}
		})
	}
	if after := len(h.audit("agent.attested")); after != before {
		t.Errorf("%d agents joined", after-before)
	}
	if len(lastQuestion) == 0 || bytes.Contains(lastQuestion, []byte(`"rsa_signature":{`)) {
		t.Errorf("the challenge for an EC key is %s", lastQuestion)
	}
}

// TestX509POPAddressOfIPv6: the whole address counts. What tells callers apart for limits, the network, would let no node in
// whose certificate names its address, and every node of the network that shows a certificate for the network's own one.
func TestX509POPAddressOfIPv6(t *testing.T) {
	p := newPKI(t)
	c := popConfig(t, p)
	c.Listen, c.NodeAttestors.X509POP.VerifyClientIP = "[::1]:0", true
	h := start(t, c)
	for _, tt := range []struct {
		san  string
		want codes.Code
	}{{"::1", codes.OK}, {"::", codes.PermissionDenied}, {"::2", codes.PermissionDenied}} {
		k := key(t)
		chain := p.node(k.Public(), func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.ParseIP(tt.san)} })
		if _, err := prove(t.Context(), h.dial(nil, nil), "x509pop", popPayload(t, chain), csr(t, key(t)), possess(t, k)); code(err) != tt.want {
			t.Errorf("from ::1 with a certificate for %s: %v, want %v", tt.san, err, tt.want)
		}
	}
}

// weakRSA makes a key that Go makes only when it is told to.
func weakRSA(t *testing.T) *rsa.PrivateKey {
	t.Helper()
	t.Setenv("GODEBUG", "rsa1024min=0")
	return rsaKey(t, 1024)
}

func TestX509POPBundleIsReadAgain(t *testing.T) {
	p, next := newPKI(t), newPKI(t)
	h := start(t, popConfig(t, p))
	try := func(p *pki) error {
		k := key(t)
		_, err := prove(t.Context(), h.dial(nil, nil), "x509pop", popPayload(t, p.node(k.Public(), nil)), csr(t, key(t)), possess(t, k))
		return err
	}
	if try(p) != nil || try(next) == nil {
		t.Fatal("before the change")
	}
	replace := func(content []byte) {
		t.Helper()
		tmp := p.rootFile + ".new"
		if err := os.WriteFile(tmp, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(tmp, p.rootFile); err != nil {
			t.Fatal(err)
		}
	}
	replace([]byte("half a wri"))
	if err := try(p); err != nil {
		t.Errorf("while the file is broken: %v", err)
	}
	content, err := os.ReadFile(next.rootFile)
	if err != nil {
		t.Fatal(err)
	}
	replace(content)
	if try(p) == nil {
		t.Error("a CA that was removed from the file still counts")
	}
	if err := try(next); err != nil {
		t.Errorf("a CA that was added: %v", err)
	}
}

func TestX509POPPathTemplate(t *testing.T) {
	p := newPKI(t)
	c := popConfig(t, p)
	c.NodeAttestors.X509POP.AgentPathTemplate = "/cn/{{ .Subject.CommonName }}/{{ .URISanSelectors.env }}"
	h := start(t, c)
	for _, tt := range []struct{ cn, env, want string }{
		{"web-1", "prod", "/spire/agent/cn/web-1/prod"},
		{"web-1", "prod/eu", "/spire/agent/cn/web-1/prod/eu"},
		{"../join_token/x", "prod", ""},
		{"web 1", "prod", ""},
		{"", "prod", ""},
		{"web-1", "", ""},
	} {
		k := key(t)
		chain := p.node(k.Public(), func(c *x509.Certificate) {
			c.Subject.CommonName = tt.cn
			if tt.env != "" {
				c.URIs = []*url.URL{{Scheme: "x509pop", Host: "example.org", Path: "/env/" + tt.env}}
			}
		})
		r, err := prove(t.Context(), h.dial(nil, nil), "x509pop", popPayload(t, chain), csr(t, key(t)), possess(t, k))
		if tt.want == "" {
			if code(err) != codes.PermissionDenied {
				t.Errorf("CN %q, env %q: %v, %v", tt.cn, tt.env, r, err)
			}
		} else if err != nil || r.Svid.Id.Path != tt.want {
			t.Errorf("CN %q, env %q: %v, %v; want %s", tt.cn, tt.env, r, err, tt.want)
		}
	}
}

func TestX509POPOfSVIDs(t *testing.T) {
	c := config(t.TempDir())
	c.NodeAttestors.X509POP = &X509POP{Mode: "spiffe"}
	h := start(t, c)
	mint := func(id string, k crypto.Signer) [][]byte {
		t.Helper()
		u, err := url.Parse(id)
		if err != nil {
			t.Fatal(err)
		}
		req, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{u}}, k)
		if err != nil {
			t.Fatal(err)
		}
		r, err := svidv1.NewSVIDClient(h.admin).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: req})
		if err != nil {
			t.Fatal(err)
		}
		return r.Svid.CertChain
	}
	k := key(t)
	r, err := prove(t.Context(), h.dial(nil, nil), "x509pop", popPayload(t, mint("spiffe://example.org/spire-exchange/host/a", k)), csr(t, key(t)), possess(t, k))
	if err != nil || r.Svid.Id.Path != "/spire/agent/x509pop/host/a" {
		t.Fatalf("%v, %v", r, err)
	}
	for _, id := range []string{"spiffe://example.org/other/a", "spiffe://example.org/spire-exchange-x/a"} {
		if r, err := prove(t.Context(), h.dial(nil, nil), "x509pop", popPayload(t, mint(id, k)), csr(t, key(t)), possess(t, k)); code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v, %v", id, r, err)
		}
	}
	// The SVID of an agent is not evidence of another one.
	if r, err = prove(t.Context(), h.dial(nil, nil), "x509pop", popPayload(t, r.Svid.CertChain), csr(t, key(t)), possess(t, k)); code(err) != codes.PermissionDenied {
		t.Errorf("an agent's own SVID: %v, %v", r, err)
	}
	p := newPKI(t)
	if r, err = prove(t.Context(), h.dial(nil, nil), "x509pop", popPayload(t, p.node(k.Public(), nil)), csr(t, key(t)), possess(t, k)); code(err) != codes.PermissionDenied {
		t.Errorf("a certificate that is no SVID: %v, %v", r, err)
	}
	// What another server of the trust domain signs is good for workloads, and makes nobody a node here.
	other := newSPIRERoot(t)
	if _, err := bundlev1.NewBundleClient(h.admin).AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{X509Authorities: []*types.X509Certificate{{Asn1: other.cert.Raw}}}); err != nil {
		t.Fatal(err)
	}
	chain, ok := other.svid("/spire-exchange/host/b", big.NewInt(7))
	if r, err = prove(t.Context(), h.dial(nil, nil), "x509pop", popPayload(t, chain), csr(t, key(t)), possess(t, ok)); code(err) != codes.PermissionDenied {
		t.Errorf("an SVID of an appended authority: %v, %v", r, err)
	}
	// Nor does what a stolen authority of our own has signed.
	before := mint("spiffe://example.org/spire-exchange/host/c", k)
	first := h.ca.set.Authorities(authority.KindX509)[0]
	next, err := h.ca.set.Prepare(t.Context(), authority.KindX509)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.ca.set.Activate(t.Context(), authority.KindX509, next.ID); err != nil {
		t.Fatal(err)
	}
	tainted, err := h.ca.set.Taint(t.Context(), authority.KindX509, first.ID)
	if err != nil || tainted.State != authority.StateTainted {
		t.Fatal(tainted, err)
	}
	until(t, "the taint is followed", func() bool {
		_, err := prove(t.Context(), h.dial(nil, nil), "x509pop", popPayload(t, before), csr(t, key(t)), possess(t, k))
		return code(err) == codes.PermissionDenied
	})
	if r, err = prove(t.Context(), h.dial(nil, nil), "x509pop", popPayload(t, mint("spiffe://example.org/spire-exchange/host/c", k)), csr(t, key(t)), possess(t, k)); err != nil {
		t.Errorf("an SVID of the new authority: %v, %v", r, err)
	}
}

func TestX509POPConfig(t *testing.T) {
	for _, tt := range []struct {
		config X509POP
		want   string
	}{
		{X509POP{}, "node_attestors.x509pop.ca_bundle_path: missing"},
		{X509POP{CABundlePath: "ca.pem"}, `"ca.pem" must be absolute`},
		{X509POP{CABundlePath: "/ca.pem", CABundlePaths: []string{"/b.pem"}}, "node_attestors.x509pop.ca_bundle_paths: excludes ca_bundle_path"},
		{X509POP{Mode: "other"}, `node_attestors.x509pop.mode: "other" is not external_pki or spiffe`},
		{X509POP{Mode: "spiffe", CABundlePath: "/ca.pem"}, `"/ca.pem" has no meaning with mode spiffe`},
		{X509POP{Mode: "spiffe", SVIDPrefix: "x"}, `node_attestors.x509pop.svid_prefix: "x" does not begin with a slash`},
		{X509POP{CABundlePath: "/ca.pem", SVIDPrefix: "/x"}, "svid_prefix"},
		{X509POP{CABundlePath: "/ca.pem", MaxIntermediates: -1}, "node_attestors.x509pop.max_intermediates: -1 is not between"},
		{X509POP{CABundlePath: "/ca.pem", MaxRSAKeySize: 1024}, "node_attestors.x509pop.max_rsa_key_size: 1024 is not between 2048"},
		{X509POP{CABundlePath: "/ca.pem", AgentPathTemplate: "/x509pop/{{ .Fingerprnt }}"}, "node_attestors.x509pop.agent_path_template: "},
		{X509POP{CABundlePath: "/ca.pem", AgentPathTemplate: "/cn/{{ lower .Subject.CommonName }}"}, "functions are not understood"},
		{X509POP{CABundlePath: "/ca.pem", AgentPathTemplate: "/{{ .Subject.CommonName }}/x"}, "must begin with a fixed segment"},
		{X509POP{CABundlePath: "/ca.pem", AgentPathTemplate: "/{{ .Fingerprint"}, "without }}"},
	} {
		c := config(t.TempDir())
		c.NodeAttestors.X509POP = &tt.config
		if err := c.Check(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %q", tt.config, err, tt.want)
		}
	}
	c := config(t.TempDir())
	c.NodeAttestors.X509POP = &X509POP{CABundlePath: filepath.Join(t.TempDir(), "none.pem")}
	if ca, err := New(t.Context(), c); err == nil || !strings.Contains(err.Error(), "node_attestors.x509pop.ca_bundle_path: ") {
		if ca != nil {
			ca.Close()
		}
		t.Errorf("a bundle that is not there: %v", err)
	}
	if _, err := ReadConfig([]byte("trust_domain: example.org\ndata_dir: /d\nseal: {key_file: /k}\nnode_attestors: {x509pop: {ca_bundle_path: /c.pem, colour: red}}\n"), "ca.yaml"); err == nil || !strings.Contains(err.Error(), "colour") {
		t.Errorf("an unknown key: %v", err)
	}
}
