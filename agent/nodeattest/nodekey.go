package nodeattest

import (
	"context"
	"crypto"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/internal/nodekey"
)

// A NodeKey wins a lost or expired SVID back with the key of the last one. The CA knows that key, and refuses it after
// an evict or ban, or when the SVID has been over for too long. [DESIGN §7]
type NodeKey struct {
	ID  spiffeid.ID
	Key crypto.Signer
	// CSR is the one of the attestation: the proof is good for it alone.
	CSR []byte
}

// Type is the attestor's name at the CA.
func (NodeKey) Type() string { return nodekey.Attestor }

// Payload names the node.
func (k NodeKey) Payload(context.Context) ([]byte, error) { return []byte(k.ID.String()), nil }

// Respond proves possession of the key.
func (k NodeKey) Respond(_ context.Context, challenge []byte) ([]byte, error) {
	return nodekey.Sign(k.Key, k.ID, challenge, k.CSR)
}
