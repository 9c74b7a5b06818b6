package ca

import (
	"context"
	"crypto/ecdsa"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/signet-id/signet/internal/nodekey"
)

// recovery attests with the key of the last SVID.
func recovery(ctx context.Context, conn *grpc.ClientConn, id spiffeid.ID, key *ecdsa.PrivateKey, csr []byte) (*types.X509SVID, error) {
	s, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	s.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &types.AttestationData{Type: nodekey.Attestor, Payload: []byte(id.String())}, Params: &agentv1.AgentX509SVIDParams{Csr: csr}}}})
	m, err := s.Recv()
	if err != nil {
		return nil, err
	}
	sig, err := nodekey.Sign(key, id, m.GetChallenge(), csr)
	if err != nil {
		return nil, err
	}
	s.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: sig}})
	if m, err = s.Recv(); err != nil {
		return nil, err
	}
	return m.GetResult().Svid, nil
}

func TestNodeKeyWinsAnSVIDBack(t *testing.T) {
	var offset atomic.Int64
	c := config(t.TempDir())
	c.Now = func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	h := start(t, c)
	a := h.agent()
	anon := h.dial(nil, nil)
	k2, k3 := key(t), key(t)
	// A renewal whose SVID was never used, then a long sleep: the agent has the new key, the CA knows both.
	r, err := agentv1.NewAgentClient(a.conn).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr(t, k2)}})
	if err != nil || r.Svid == nil {
		t.Fatal(err)
	}
	offset.Store(int64(3 * 24 * time.Hour))
	for range 2 { // the first reply is lost
		if _, err := recovery(t.Context(), anon, a.id, k2, csr(t, k3)); err != nil {
			t.Fatalf("with the renewed key: %v", err)
		}
	}
	if _, err := recovery(t.Context(), anon, a.id, a.key, csr(t, k3)); code(err) != codes.PermissionDenied {
		t.Errorf("with the key from before: %v", err)
	}
	if _, err := recovery(t.Context(), anon, a.id, key(t), csr(t, k3)); code(err) != codes.PermissionDenied {
		t.Errorf("with a stranger's key: %v", err)
	}
	other := spiffeid.RequireFromPath(td, "/spire/agent/join_token/nobody")
	if _, err := recovery(t.Context(), anon, other, k3, csr(t, k3)); code(err) != codes.PermissionDenied {
		t.Errorf("an unknown node: %v", err)
	}
	if _, err := recovery(t.Context(), anon, spiffeid.RequireFromPath(td, "/web"), k3, csr(t, k3)); code(err) != codes.PermissionDenied {
		t.Errorf("what is no node: %v", err)
	}
	offset.Store(int64(20 * 24 * time.Hour))
	if _, err := recovery(t.Context(), anon, a.id, k2, csr(t, k3)); code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "join token") {
		t.Errorf("long after the end: %v", err)
	}
}

func TestNodeKeyIsDeadAfterEvictAndBan(t *testing.T) {
	h := start(t, config(t.TempDir()))
	anon := h.dial(nil, nil)
	for _, kill := range []string{"evict", "ban"} {
		a := h.agent()
		if _, err := recovery(t.Context(), anon, a.id, a.key, csr(t, a.key)); err != nil {
			t.Fatalf("before the %s: %v", kill, err)
		}
		var err error
		api := agentv1.NewAgentClient(h.admin)
		if kill == "evict" {
			_, err = api.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: pid(a.id.Path())})
		} else {
			_, err = api.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: pid(a.id.Path())})
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := recovery(t.Context(), anon, a.id, a.key, csr(t, a.key)); code(err) != codes.PermissionDenied {
			t.Errorf("after the %s: %v", kill, err)
		} else if banned := strings.Contains(err.Error(), "banned"); banned != (kill == "ban") {
			t.Errorf("after the %s its owner is told: %v", kill, err)
		}
		// A stranger learns of neither.
		nobody := spiffeid.RequireFromPath(td, "/spire/agent/join_token/nobody")
		_, known := recovery(t.Context(), anon, a.id, key(t), csr(t, a.key))
		_, unknown := recovery(t.Context(), anon, nobody, key(t), csr(t, a.key))
		if known == nil || unknown == nil || known.Error() != unknown.Error() {
			t.Errorf("after the %s a stranger is told %v, and of a node that there is not %v", kill, known, unknown)
		}
	}
}

// TestExpiredJoinToken: a token past its end lets nobody in, neither a new key nor the one that used it before and
// never came back, and the refusal is logged without the token.
func TestExpiredJoinToken(t *testing.T) {
	var offset atomic.Int64
	c := config(t.TempDir())
	c.Now = func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	h := start(t, c)
	unused, used := h.token(), h.token()
	k := key(t)
	if _, err := attest(t.Context(), h.dial(nil, nil), used, csr(t, k)); err != nil {
		t.Fatal(err)
	}
	offset.Store(int64(11 * time.Minute)) // tokens last ten
	anon := h.dial(nil, nil)
	for name, tt := range map[string]struct {
		token string
		key   *ecdsa.PrivateKey
	}{"unused": {unused, key(t)}, "used by this key": {used, k}} {
		_, err := attest(t.Context(), anon, tt.token, csr(t, tt.key))
		if code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "join token expired") {
			t.Errorf("%s: %v, want InvalidArgument that says expired", name, err)
		}
	}
	refused := h.audit("agent.attest")
	if len(refused) != 2 {
		t.Errorf("%d refusals in the audit log, want 2", len(refused))
	}
	for _, r := range refused {
		for _, token := range []string{unused, used} {
			if strings.Contains(fmt.Sprint(r), strings.Split(token, ".")[1]) {
				t.Error("the audit log holds a token's secret")
			}
		}
	}
}
