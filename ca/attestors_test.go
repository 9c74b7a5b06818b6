package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/nodeattest"
)

// prove attests with any evidence; answer is asked for each challenge.
func prove(ctx context.Context, conn *grpc.ClientConn, typ string, payload, csr []byte, answer func([]byte) []byte) (*agentv1.AttestAgentResponse_Result, error) {
	s, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	s.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &types.AttestationData{Type: typ, Payload: payload}, Params: &agentv1.AgentX509SVIDParams{Csr: csr}}}})
	for {
		m, err := s.Recv()
		if err != nil {
			return nil, err
		}
		if r := m.GetResult(); r != nil {
			if _, err := s.Recv(); !errors.Is(err, io.EOF) {
				return nil, fmt.Errorf("after the result: %w", err)
			}
			return r, nil
		}
		s.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: answer(m.GetChallenge())}})
	}
}

func noAnswer([]byte) []byte { return nil }

// told is an attestor that believes what it is told: for what happens around attestors. The payload is the node's name.
type told struct {
	reattest  bool
	selectors func() []string
	before    func(nodeattest.Attempt) error
}

func (told) Type() string { return "told" }

func (t told) Attest(_ context.Context, a nodeattest.Attempt) (*nodeattest.Evidence, error) {
	if t.before != nil {
		if err := t.before(a); err != nil {
			return nil, err
		}
	}
	e := &nodeattest.Evidence{Path: strings.Split(string(a.Payload), "/"), CanReattest: t.reattest}
	if t.selectors != nil {
		e.Selectors = t.selectors()
	}
	return e, nil
}

func startTold(t *testing.T, a told) *harness {
	t.Helper()
	c := config(t.TempDir())
	c.attestors = []nodeattest.Attestor{a}
	return start(t, c)
}

func renew(ctx context.Context, h *harness, svid *types.X509SVID, k *ecdsa.PrivateKey) error {
	_, err := agentv1.NewAgentClient(h.dial(svid.CertChain, k)).RenewAgent(ctx, &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr(h.t, k)}})
	return err
}

// reasonOf is SPIRE's detail of a refusal.
func reasonOf(err error) types.PermissionDeniedDetails_Reason {
	for _, d := range status.Convert(err).Details() {
		if p, ok := d.(*types.PermissionDeniedDetails); ok {
			return p.Reason
		}
	}
	return types.PermissionDeniedDetails_UNKNOWN
}

func TestReattestation(t *testing.T) {
	round := atomic.Int32{}
	h := startTold(t, told{reattest: true, selectors: func() []string { return []string{"x", fmt.Sprintf("round:%d", round.Add(1)), "x"} }})
	anon, k, k2 := h.dial(nil, nil), key(t), key(t)
	first, err := prove(t.Context(), anon, "told", []byte("told/n1"), csr(t, k), noAnswer)
	if err != nil || !first.Reattestable || first.Svid.Id.Path != "/spire/agent/told/n1" {
		t.Fatalf("first attestation: %v, %v", first, err)
	}
	if err := renew(t.Context(), h, first.Svid, k); reasonOf(err) != types.PermissionDeniedDetails_AGENT_MUST_REATTEST {
		t.Errorf("RenewAgent of a node that attests again: %v", err)
	}
	second, err := prove(t.Context(), anon, "told", []byte("told/n1"), csr(t, k2), noAnswer)
	if err != nil {
		t.Fatal(err)
	}
	if err := renew(t.Context(), h, first.Svid, k); reasonOf(err) != types.PermissionDeniedDetails_AGENT_NOT_ACTIVE {
		t.Errorf("the SVID of before the re-attestation: %v", err)
	}
	if err := renew(t.Context(), h, second.Svid, k2); reasonOf(err) != types.PermissionDeniedDetails_AGENT_MUST_REATTEST {
		t.Errorf("the SVID of the re-attestation: %v", err)
	}
	got, err := agentv1.NewAgentClient(h.admin).GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: pid("/spire/agent/told/n1")})
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Selectors) != 2 || got.Selectors[1].Value != "round:2" || got.Selectors[1].Type != "told" || !got.CanReattest || got.AttestationType != "told" {
		t.Errorf("the CA holds %v", got)
	}
	// The key alone does not replace evidence that must hold still.
	id := spiffeid.RequireFromPath(td, "/spire/agent/told/n1")
	if _, err := recovery(t.Context(), anon, id, k2, csr(t, k2)); code(err) != codes.PermissionDenied {
		t.Errorf("recovery by key: %v", err)
	}
	for event, want := range map[string]int{"agent.attested": 1, "agent.reattested": 1} {
		if lines := h.audit(event); len(lines) != want {
			t.Errorf("%s: %d records, want %d", event, len(lines), want)
		}
	}
	// An evicted node may come back; a banned one not, until it is unbanned.
	if _, err := agentv1.NewAgentClient(h.admin).DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: pid("/spire/agent/told/n1")}); err != nil {
		t.Fatal(err)
	}
	if err := renew(t.Context(), h, second.Svid, k2); reasonOf(err) != types.PermissionDeniedDetails_AGENT_NOT_ATTESTED {
		t.Errorf("the SVID of before the evict: %v", err)
	}
	if _, err := prove(t.Context(), anon, "told", []byte("told/n1"), csr(t, k), noAnswer); err != nil {
		t.Errorf("after the evict: %v", err)
	}
	if _, err := agentv1.NewAgentClient(h.admin).BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: pid("/spire/agent/told/n1")}); err != nil {
		t.Fatal(err)
	}
	if _, err := prove(t.Context(), anon, "told", []byte("told/n1"), csr(t, k), noAnswer); code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "failed to attest: agent is banned") {
		t.Errorf("while banned: %v", err)
	}
	if _, err := adminv1.NewAdminClient(h.admin).UnbanAgent(t.Context(), &adminv1.UnbanAgentRequest{AgentId: id.String()}); err != nil {
		t.Fatal(err)
	}
	if _, err := prove(t.Context(), anon, "told", []byte("told/n1"), csr(t, k), noAnswer); err != nil {
		t.Errorf("after the unban: %v", err)
	}
}

func TestEvidenceThatCountsOnce(t *testing.T) {
	h := startTold(t, told{})
	anon, k := h.dial(nil, nil), key(t)
	payload := []byte("told/n1")
	var svid *types.X509SVID
	for range 2 { // the first reply is lost
		r, err := prove(t.Context(), anon, "told", payload, csr(t, k), noAnswer)
		if err != nil || r.Reattestable {
			t.Fatal(r, err)
		}
		svid = r.Svid
	}
	stolen := func(when string, k *ecdsa.PrivateKey) {
		t.Helper()
		if _, err := prove(t.Context(), anon, "told", payload, csr(t, k), noAnswer); code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "already been used") {
			t.Errorf("%s: %v", when, err)
		}
	}
	stolen("another key, before the first use", key(t))
	if err := renew(t.Context(), h, svid, k); err != nil {
		t.Fatal(err)
	}
	stolen("another key, after the first use", key(t))
	stolen("the same key, after the first use", k)
	if _, err := recovery(t.Context(), anon, spiffeid.RequireFromPath(td, "/spire/agent/told/n1"), k, csr(t, key(t))); err != nil {
		t.Errorf("the node wins its SVID back with its key: %v", err)
	}
}

func TestTwoAttestOnceWithTheSameEvidence(t *testing.T) {
	gate := make(chan struct{})
	h := startTold(t, told{before: func(nodeattest.Attempt) error { <-gate; return nil }})
	const n = 8
	errs := make(chan error, n)
	for range n {
		k := key(t)
		go func() {
			_, err := prove(t.Context(), h.dial(nil, nil), "told", []byte("told/n1"), csr(t, k), noAnswer)
			errs <- err
		}()
	}
	close(gate)
	in := 0
	for range n {
		if err := <-errs; err == nil {
			in++
		} else if code(err) != codes.PermissionDenied {
			t.Errorf("a loser hears %v", err)
		}
	}
	if in != 1 {
		t.Errorf("%d of %d keys got in with evidence that counts once", in, n)
	}
}

func TestAttestorsCannotSpeakForEachOther(t *testing.T) {
	h := startTold(t, told{reattest: true})
	token := h.agent()
	for _, name := range []string{"join_token/x", strings.TrimPrefix(token.id.Path(), "/spire/agent/"), "signet_node_key/x", "told", "told/", "told//x", "told/../x", "told/ü", "/told/x"} {
		if r, err := prove(t.Context(), h.dial(nil, nil), "told", []byte(name), csr(t, key(t)), noAnswer); err == nil {
			t.Errorf("%q gave %v", name, r.Svid.Id)
		}
	}
	if _, err := agentv1.NewAgentClient(h.admin).GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: pid(token.id.Path())}); err != nil {
		t.Error(err)
	}
}

// TestSelectorsFromOutside: names that came from a certificate can be anything. They neither spoil the audit record, after the
// node was stored, nor pass for an error of the CA's.
func TestSelectorsFromOutside(t *testing.T) {
	var values atomic.Pointer[[]string]
	h := startTold(t, told{reattest: true, selectors: func() []string { return *values.Load() }})
	many := []string{"first"}
	for i := range 20 {
		many = append(many, fmt.Sprintf("%d:%s", i, strings.Repeat("\x01", 4000)))
	}
	for _, tt := range []struct {
		values []string
		code   codes.Code
	}{
		{many, codes.OK}, {[]string{strings.Repeat("x", 5000)}, codes.PermissionDenied}, {[]string{"\xff"}, codes.PermissionDenied}, {[]string{""}, codes.PermissionDenied},
		{make([]string, 2000), codes.PermissionDenied},
	} {
		values.Store(&tt.values)
		if _, err := prove(t.Context(), h.dial(nil, nil), "told", []byte("told/x"), csr(t, key(t)), noAnswer); code(err) != tt.code {
			t.Errorf("%d selectors, the first %.20q: %v, want %v", len(tt.values), tt.values[0], err, tt.code)
		}
	}
	got, err := agentv1.NewAgentClient(h.admin).GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: pid("/spire/agent/told/x")})
	if err != nil || len(got.Selectors) != len(many) {
		t.Errorf("%d selectors are kept of %d: %v", len(got.GetSelectors()), len(many), err)
	}
	if lines := h.audit("agent.attested"); len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0]), "and 2") {
		t.Errorf("the audit log has %d records of the attestation", len(lines))
	}
}

func TestRefusalsReachTheRightPeople(t *testing.T) {
	kinds := map[nodeattest.Kind]codes.Code{nodeattest.Malformed: codes.InvalidArgument, nodeattest.Denied: codes.PermissionDenied,
		nodeattest.Unavailable: codes.Unavailable, nodeattest.Internal: codes.Internal}
	var next atomic.Pointer[error]
	h := startTold(t, told{before: func(nodeattest.Attempt) error { return *next.Load() }})
	for kind, want := range kinds {
		var err error = nodeattest.Refuse(kind, "for the node").Because(errors.New("for the operator"))
		next.Store(&err)
		_, got := prove(t.Context(), h.dial(nil, nil), "told", []byte("told/x"), csr(t, key(t)), noAnswer)
		if code(got) != want || !strings.Contains(got.Error(), "failed to attest: for the node") || strings.Contains(got.Error(), "operator") {
			t.Errorf("kind %d: %v, want %v", kind, got, want)
		}
	}
	err := errors.New("an error that nobody foresaw")
	next.Store(&err)
	if _, got := prove(t.Context(), h.dial(nil, nil), "told", []byte("told/x"), csr(t, key(t)), noAnswer); code(got) != codes.Internal || strings.Contains(got.Error(), "foresaw") {
		t.Errorf("an unknown error: %v", got)
	}
	lines := h.audit("agent.attest")
	if len(lines) != len(kinds)+1 || !strings.Contains(fmt.Sprint(lines), "for the operator") {
		t.Errorf("the audit log has %v", lines)
	}
}

func TestChallengesAreBounded(t *testing.T) {
	asked := 0
	h := startTold(t, told{before: func(a nodeattest.Attempt) error {
		for {
			asked++
			if _, err := a.Challenge([]byte("again?")); err != nil {
				return err
			}
		}
	}})
	if _, err := prove(t.Context(), h.dial(nil, nil), "told", []byte("told/x"), csr(t, key(t)), func([]byte) []byte { return []byte("yes") }); code(err) != codes.Internal || asked != nodeattest.MaxChallenges+1 {
		t.Errorf("%d challenges, then %v", asked, err)
	}
	for name, answer := range map[string][]byte{"empty": nil, "huge": make([]byte, nodeattest.MaxResponseBytes+1)} {
		if _, err := prove(t.Context(), h.dial(nil, nil), "told", []byte("told/x"), csr(t, key(t)), func([]byte) []byte { return answer }); code(err) != codes.InvalidArgument {
			t.Errorf("an answer that is %s: %v", name, err)
		}
	}
}

// TestAttestationFloodFromOneAddress: streams that say nothing take the seats of their own address only, and leave them.
func TestAttestationFloodFromOneAddress(t *testing.T) {
	h := startTold(t, told{reattest: true})
	ctx, cancel := context.WithCancel(t.Context())
	conn := h.dial(nil, nil)
	flood := func(n int) {
		for range n {
			if _, err := agentv1.NewAgentClient(conn).AttestAgent(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	flood(128)
	attempt := func() error {
		_, err := prove(t.Context(), conn, "told", []byte("told/x"), csr(t, key(t)), noAnswer)
		return err
	}
	until(t, "one more is refused", func() bool {
		flood(1) // into the seat that the attempt has had, if it came before one of the others
		return code(attempt()) == codes.ResourceExhausted
	})
	cancel()
	until(t, "the seats are free again", func() bool { return attempt() == nil })
}

func TestAttestParamsAreCheckedInSPIREsOrder(t *testing.T) {
	h := startTold(t, told{})
	data := func(typ string, payload []byte) *types.AttestationData {
		return &types.AttestationData{Type: typ, Payload: payload}
	}
	with := &agentv1.AgentX509SVIDParams{Csr: csr(t, key(t))}
	for _, tt := range []struct {
		params *agentv1.AttestAgentRequest_Params
		code   codes.Code
		want   string
	}{
		{nil, codes.InvalidArgument, "malformed param: missing params"},
		{&agentv1.AttestAgentRequest_Params{}, codes.InvalidArgument, "malformed param: missing attestation data"},
		{&agentv1.AttestAgentRequest_Params{Data: data("", nil)}, codes.InvalidArgument, "malformed param: missing X509-SVID parameters"},
		{&agentv1.AttestAgentRequest_Params{Data: data("", nil), Params: &agentv1.AgentX509SVIDParams{}}, codes.InvalidArgument, "malformed param: missing CSR"},
		{&agentv1.AttestAgentRequest_Params{Data: data("", nil), Params: with}, codes.InvalidArgument, "malformed param: missing attestation data type"},
		{&agentv1.AttestAgentRequest_Params{Data: data("told", nil), Params: with}, codes.InvalidArgument, "malformed param: missing attestation data payload"},
		{&agentv1.AttestAgentRequest_Params{Data: data("told", make([]byte, nodeattest.MaxPayloadBytes+1)), Params: with}, codes.InvalidArgument, "malformed param: attestation data payload has"},
		{&agentv1.AttestAgentRequest_Params{Data: data("other", []byte("x")), Params: with}, codes.FailedPrecondition, `error getting node attestor: could not find node attestor type "other"`},
		{&agentv1.AttestAgentRequest_Params{Data: data("told", []byte("told/x")), Params: &agentv1.AgentX509SVIDParams{Csr: []byte("x")}}, codes.InvalidArgument, ""},
	} {
		s, err := agentv1.NewAgentClient(h.dial(nil, nil)).AttestAgent(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		req := &agentv1.AttestAgentRequest{}
		if tt.params != nil {
			req.Step = &agentv1.AttestAgentRequest_Params_{Params: tt.params}
		}
		s.Send(req)
		if _, err := s.Recv(); code(err) != tt.code || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: %v, want %v %q", tt.params, err, tt.code, tt.want)
		}
	}
}

// A pki is an organisation's: a root, an intermediate, and certificates of nodes.
type pki struct {
	t                 *testing.T
	root, mid         *x509.Certificate
	rootKey, midKey   *ecdsa.PrivateKey
	serial            int64
	now               func() time.Time
	rootFile, midFile string
}

func newPKI(t *testing.T) *pki {
	t.Helper()
	p := &pki{t: t, rootKey: key(t), midKey: key(t), now: time.Now}
	dir := t.TempDir()
	p.root = p.ca("root", nil, p.rootKey.Public(), p.rootKey)
	p.mid = p.ca("mid", p.root, p.midKey.Public(), p.rootKey)
	p.rootFile, p.midFile = filepath.Join(dir, "root.pem"), filepath.Join(dir, "mid.pem")
	writePEM(t, p.rootFile, p.root.Raw)
	writePEM(t, p.midFile, p.mid.Raw)
	return p
}

func writePEM(t *testing.T, path string, ders ...[]byte) {
	t.Helper()
	var out []byte
	for _, der := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	if err := os.WriteFile(path, out, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (p *pki) ca(name string, parent *x509.Certificate, public crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	p.t.Helper()
	p.serial++
	c := &x509.Certificate{SerialNumber: big.NewInt(p.serial), Subject: pkix.Name{CommonName: name}, NotBefore: p.now().Add(-time.Hour), NotAfter: p.now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, public, signer)
	if err != nil {
		p.t.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		p.t.Fatal(err)
	}
	return out
}

// node issues a certificate by the intermediate and returns the chain without the root.
func (p *pki) node(public crypto.PublicKey, change func(*x509.Certificate)) [][]byte {
	p.t.Helper()
	p.serial++
	c := &x509.Certificate{SerialNumber: big.NewInt(0xabc00 + p.serial), Subject: pkix.Name{CommonName: "node-1"}, NotBefore: p.now().Add(-time.Hour), NotAfter: p.now().Add(time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if change != nil {
		change(c)
	}
	der, err := x509.CreateCertificate(rand.Reader, c, p.mid, public, p.midKey)
	if err != nil {
		p.t.Fatal(err)
	}
	return [][]byte{der, p.mid.Raw}
}

func selectorValues(in []*types.Selector) (out []string) {
	for _, s := range in {
		out = append(out, s.Type+":"+s.Value)
	}
	slices.Sort(out)
	return out
}
