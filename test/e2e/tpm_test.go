package e2e

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/agent/nodeattest"
	"github.com/signet-id/signet/agent/nodeattest/tpm"
	"github.com/signet-id/signet/ca"
	wire "github.com/signet-id/signet/internal/tpmwire"
	"github.com/signet-id/signet/test/keystores"
	"github.com/signet-id/signet/test/signettest"
)

func TestNodeLifeByTPM(t *testing.T) {
	t.Parallel()
	sw := keystores.CertifiedSWTPM(t)
	nodeLife(t, "tpm", func(c *ca.Config) { c.NodeAttestors.TPM = &ca.TPM{CABundlePaths: []string{sw.EKRoots}} },
		func(c *agent.Config) { c.NodeAttestation.TPM = &agent.TPM{Device: sw.Socket} })
}

// A tpmNode is evidence of a TPM, taken apart.
type tpmNode struct {
	nodeattest.Evidence
	payload *wire.Payload
	hash    string
}

func openTPM(t *testing.T, sw *keystores.TPM) *tpmNode {
	t.Helper()
	e, err := tpm.Attestor{Device: sw.Socket, Dir: filepath.Join(t.TempDir(), "tpm")}.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.(io.Closer).Close() })
	data, err := e.Payload(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n := &tpmNode{Evidence: e}
	if n.payload, err = wire.ParsePayload(data); err != nil {
		t.Fatal(err)
	}
	public, _, err := wire.ParseEK(n.payload.EK)
	if err != nil {
		t.Fatal(err)
	}
	if n.hash, err = wire.PubHash(public); err != nil {
		t.Fatal(err)
	}
	return n
}

// attestTPM shows a payload to the CA; answer is asked for the challenge.
func attestTPM(ctx context.Context, t *testing.T, s *signettest.Signet, payload any, answer func(challenge []byte) []byte) (*agentv1.AttestAgentResponse_Result, error) {
	t.Helper()
	conn, err := grpc.NewClient(s.CAAddr(), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}))) // the CA has no part in what is tested
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	data, raw := payload.([]byte)
	if !raw {
		if data, err = json.Marshal(payload); err != nil {
			t.Fatal(err)
		}
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, p256(t))
	if err != nil {
		t.Fatal(err)
	}
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		t.Fatal(err)
	}
	stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &types.AttestationData{Type: "tpm", Payload: data}, Params: &agentv1.AgentX509SVIDParams{Csr: csr}}}})
	for {
		m, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		if r := m.GetResult(); r != nil {
			return r, nil
		}
		stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: answer(m.GetChallenge())}})
	}
}

func TestTPM(t *testing.T) {
	certified, bare, foreign := keystores.CertifiedSWTPM(t), keystores.SWTPM(t), keystores.CertifiedSWTPM(t)
	hashes := t.TempDir()
	s := signettest.Start(t, signettest.Config{CA: func(c *ca.Config) {
		c.NodeAttestors.TPM = &ca.TPM{CABundlePaths: []string{certified.EKRoots}, HashPath: hashes, Hashes: []string{strings.Repeat("0", 64)}}
	}})
	ctx := bounded(t, 100*time.Second)
	good, known, other := openTPM(t, certified), openTPM(t, bare), openTPM(t, foreign)
	honest := func(n *tpmNode) func([]byte) []byte {
		return func(challenge []byte) []byte {
			answer, err := n.Respond(ctx, challenge)
			if err != nil {
				return []byte(`{"Secret":"AAAA"}`) // its TPM refuses; an attacker says something
			}
			return answer
		}
	}
	lets := func(n *tpmNode) {
		t.Helper()
		r, err := attestTPM(ctx, t, s, n.payload, honest(n))
		if err != nil || r.Svid.Id.Path != "/spire/agent/tpm/"+n.hash || !r.Reattestable {
			t.Fatalf("%v, %v", r, err)
		}
		got, err := agentv1.NewAgentClient(s.AdminConn()).GetAgent(ctx, &agentv1.GetAgentRequest{Id: r.Svid.Id})
		if err != nil || len(got.Selectors) != 1 || got.Selectors[0].Type != "tpm" || got.Selectors[0].Value != "pub_hash:"+n.hash {
			t.Errorf("the CA holds %v, %v", got, err)
		}
	}
	lets(good)
	if _, err := attestTPM(ctx, t, s, known.payload, honest(known)); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), known.hash) {
		t.Errorf("a TPM that nobody knows: %v; want PermissionDenied with its hash", err)
	}
	if err := os.WriteFile(filepath.Join(hashes, known.hash), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	lets(known)

	var replay []byte
	if _, err := attestTPM(ctx, t, s, good.payload, func(c []byte) []byte { replay = honest(good)(c); return replay }); err != nil {
		t.Fatal(err)
	}
	certOf := func(n *tpmNode) []byte { block, _ := pem.Decode(n.payload.EK); return pem.EncodeToMemory(block) }
	keyOf := func(n *tpmNode) []byte {
		rest := n.payload.EK
		var block *pem.Block
		for block, rest = pem.Decode(rest); block.Type != "PUBLIC KEY"; block, rest = pem.Decode(rest) {
		}
		return pem.EncodeToMemory(block)
	}
	_, foreignCert, err := wire.ParseEK(other.payload.EK)
	if err != nil {
		t.Fatal(err)
	}
	soft, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		payload any
		answer  func([]byte) []byte
		code    codes.Code
		want    string
	}{
		{"garbage", []byte("garbage"), nil, codes.InvalidArgument, "not tpm's JSON"},
		{"nothing", wire.Payload{}, nil, codes.InvalidArgument, "no EK or no AK"},
		{"an oversized EK", wire.Payload{EK: make([]byte, 40<<10), AK: good.payload.AK}, nil, codes.InvalidArgument, "at most"},
		{"another manufacturer", other.payload, honest(other), codes.PermissionDenied, "does not verify"},
		{"a certified EK that is not shown to be", wire.Payload{EK: keyOf(other), AK: other.payload.AK}, honest(other), codes.PermissionDenied, "shows no certificate"},
		{"a stolen certificate beside an own key", wire.Payload{EK: append(certOf(good), keyOf(other)...), AK: other.payload.AK}, honest(other), codes.InvalidArgument, "for another key"},
		{"a stolen EK with an own AK", wire.Payload{EK: good.payload.EK, AK: other.payload.AK}, honest(other), codes.PermissionDenied, "does not prove"},
		{"an own EK with a stolen AK", wire.Payload{EK: known.payload.EK, AK: good.payload.AK}, honest(known), codes.PermissionDenied, "does not prove"},
		{"a stolen EK and AK", good.payload, honest(other), codes.PermissionDenied, "does not prove"},
		{"a replayed answer", good.payload, func([]byte) []byte { return replay }, codes.PermissionDenied, "does not prove"},
		{"an answer that is garbage", good.payload, func([]byte) []byte { return []byte("{") }, codes.InvalidArgument, "not tpm's JSON"},
		{"silence", good.payload, func([]byte) []byte { return nil }, codes.InvalidArgument, "no answer"},
		{"an EK made in software, with a foreign certificate for it", wire.Payload{EK: signed(t, foreignCert, soft), AK: good.payload.AK}, honest(good), codes.PermissionDenied, "does not verify"},
		{"an AK with changed attributes", wire.Payload{EK: good.payload.EK, AK: changed(good.payload.AK)}, honest(good), codes.PermissionDenied, "not one that a TPM keeps"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := attestTPM(ctx, t, s, tt.payload, tt.answer)
			if status.Code(err) != tt.code || !strings.Contains(err.Error(), "failed to attest: ") || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %v %q", err, tt.code, tt.want)
			}
		})
	}

	if _, err := agentv1.NewAgentClient(s.AdminConn()).BanAgent(ctx, &agentv1.BanAgentRequest{Id: &types.SPIFFEID{TrustDomain: "example.org", Path: "/spire/agent/tpm/" + good.hash}}); err != nil {
		t.Fatal(err)
	}
	if _, err := attestTPM(ctx, t, s, good.payload, honest(good)); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "agent is banned") {
		t.Errorf("banned: %v", err)
	}
	if err := os.Remove(filepath.Join(hashes, known.hash)); err != nil {
		t.Fatal(err)
	}
	if _, err := attestTPM(ctx, t, s, known.payload, honest(known)); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a TPM that is not known any more: %v", err)
	}
}

// signed is an EK in software with a certificate by an issuer of the same name as a real one's.
func signed(t *testing.T, like *x509.Certificate, ek *rsa.PrivateKey) []byte {
	t.Helper()
	issuer := &x509.Certificate{Subject: like.Issuer, RawSubject: like.RawIssuer, SerialNumber: big.NewInt(1)}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "EK"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageKeyEncipherment}
	der, err := x509.CreateCertificate(rand.Reader, leaf, issuer, ek.Public(), p256(t))
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	out, err := wire.EncodeEK(ek.Public(), c)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// changed is an AK whose attributes say that it is not restricted.
func changed(ak *wire.AK) *wire.AK {
	out := *ak
	out.Public = append([]byte(nil), ak.Public...)
	out.Public[5] &^= 0x01 // TPMA_OBJECT, bit 16
	return &out
}

func TestTPMConfig(t *testing.T) {
	for _, tt := range []struct {
		config ca.TPM
		want   string
	}{
		{ca.TPM{}, "node_attestors.tpm.hashes: missing"},
		{ca.TPM{Hashes: []string{"abc"}}, `node_attestors.tpm.hashes[0]: "abc" is not a SHA-256`},
		{ca.TPM{Hashes: []string{strings.Repeat("A", 64)}}, "lower-case"},
		{ca.TPM{HashPath: "hashes"}, `node_attestors.tpm.hash_path: "hashes" must be absolute`},
		{ca.TPM{CABundlePaths: []string{"/a.pem", "b.pem"}}, `node_attestors.tpm.ca_bundle_paths[1]: "b.pem" must be absolute`},
	} {
		c := ca.Config{TrustDomain: "example.org", DataDir: "/d", Seal: ca.Seal{KeyFile: "/k"}, NodeAttestors: ca.NodeAttestors{TPM: &tt.config}}
		if err := c.Check(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %q", tt.config, err, tt.want)
		}
	}
	for path, want := range map[string]string{"/nowhere/hashes": "no such file", "/dev/null": "not a folder"} {
		dir := t.TempDir()
		c := ca.Config{TrustDomain: "example.org", Listen: "127.0.0.1:0", DataDir: filepath.Join(dir, "d"), AdminSocket: ca.AdminSocket{Path: filepath.Join(dir, "s")},
			Seal: ca.Seal{KeyFile: filepath.Join(dir, "k"), Create: true}, NodeAttestors: ca.NodeAttestors{TPM: &ca.TPM{HashPath: path}}}
		instance, err := ca.New(t.Context(), c)
		if instance != nil {
			instance.Close()
		}
		if err == nil || !strings.Contains(err.Error(), "node_attestors.tpm.hash_path: ") || !strings.Contains(err.Error(), want) {
			t.Errorf("hash_path %s: %v", path, err)
		}
	}
	ac := agent.Config{TrustDomain: "example.org", ServerAddress: "ca", DataDir: "/d", NodeAttestation: agent.NodeAttestation{TPM: &agent.TPM{Device: "tpm0"}}}
	if err := ac.Check(); err == nil || !strings.Contains(err.Error(), `node_attestation.tpm.device: "tpm0" must be absolute`) || !strings.Contains(err.Error(), "trust_bundle_path: missing") {
		t.Errorf("%v", err)
	}
}
