package nodeapi

import (
	"crypto/rand"
	"errors"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/nodekey"
	"github.com/signet-id/signet/spiffe"
)

// errNoProof is all that somebody without the key learns: not whether the node exists.
var errNoProof = status.Error(codes.PermissionDenied, "failed to attest: no such node, or not its key; attest with a fresh join token")

// attestByKey gives a node that lost its SVID, or whose SVID has expired, a new one for its key, so that no clock jump
// and no long sleep needs a person. What an operator evicted or banned stays out. [DESIGN §7]
func (a *API) attestByKey(s agentv1.Agent_AttestAgentServer, payload, csr []byte) (*authority.X509SVID, spiffeid.ID, error) {
	ctx := s.Context()
	id, err := spiffe.ParseWorkloadID(string(payload))
	if err != nil || id.TrustDomain() != a.c.TrustDomain || !registry.IsAgentID(id) {
		return nil, spiffeid.ID{}, errNoProof
	}
	nonce := make([]byte, nodekey.NonceBytes)
	rand.Read(nonce) // never fails since Go 1.24
	sig, err := ask(ctx, s, nonce)
	if err != nil {
		return nil, id, err
	}
	const attempts = 4
	for range attempts {
		node, err := a.c.Registry.NodeNow(ctx, id)
		if errors.Is(err, registry.ErrNotFound) {
			return nil, id, errNoProof
		}
		if err != nil {
			return nil, id, err
		}
		switch {
		case a.holds(node.Key, id, nonce, csr, sig):
		case a.holds(node.NewKey, id, nonce, csr, sig): // the agent has the renewed one: this is its first use
			node.Promote(access.From(ctx).Place())
		case a.holds(node.FormerKey, id, nonce, csr, sig): // a copy of the node's disk, or an old one that was put back
			if c := access.From(ctx); a.c.Leaks != nil && !node.Banned && !node.Knows(c.Place()) {
				a.c.Leaks.OldKey(ctx, id, c.Address)
			}
			return nil, id, errNoProof
		default:
			return nil, id, errNoProof
		}
		if node.Banned { // only who has the key learns of it
			return nil, id, errBanned
		}
		if name, revoked := a.c.Registry.RevokedSerials(node.Serial, node.NewSerial); revoked { // and with it, its key
			return nil, id, status.Errorf(codes.PermissionDenied, "failed to attest: the node's X509-SVID is revoked (Revocation %q); attest with a fresh join token after an evict", name)
		}
		if node.CanReattest { // its evidence must hold still, which the key does not show
			return nil, id, status.Errorf(codes.PermissionDenied, "failed to attest: the node attests by %s, again and again; its key alone is not enough", node.Attestation)
		}
		if a.c.Now().After(node.ExpiresAt.Add(a.c.Recovery)) {
			return nil, id, status.Errorf(codes.PermissionDenied, "failed to attest: the node's X509-SVID ended more than %v ago; attest with a fresh join token", a.c.Recovery)
		}
		key, err := authority.CheckCSR(csr, spiffeid.ID{})
		if err != nil {
			return nil, id, err
		}
		spki, err := marshalKey(key)
		if err != nil {
			return nil, id, err
		}
		svid, err := a.signAgent(ctx, id, key)
		if err != nil {
			return nil, id, err
		}
		// The key that was proven stays good until the new SVID is first used: this reply can be lost, too.
		node.NewSerial, node.NewExpiresAt, node.NewKey, node.NewPlace = svid.SerialNumber, svid.NotAfter, spki, access.From(ctx).Place()
		if err = a.c.Registry.PutNode(store.WithReserve(ctx), node, nil); errors.Is(err, registry.ErrConflict) {
			continue
		}
		if err != nil {
			return nil, id, err
		}
		return svid, id, a.auditAgent(ctx, auditlog.Essential, "agent.recovered", id, svid, map[string]any{"attestor": nodekey.Attestor})
	}
	return nil, id, registry.ErrConflict
}

// holds tells whether the signature proves possession of a stored key.
func (a *API) holds(spki []byte, id spiffeid.ID, nonce, csr, signature []byte) bool {
	if len(spki) == 0 || len(signature) == 0 {
		return false
	}
	key, err := authority.ParsePublicKey(spki)
	return err == nil && nodekey.Verify(key, id, nonce, csr, signature)
}
