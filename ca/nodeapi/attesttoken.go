package nodeapi

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/spiffe"
)

const joinToken = "join_token"

// Texts that SPIRE's agents and operators know.
var (
	errTokenUnknown = status.Error(codes.InvalidArgument, "failed to attest: join token does not exist or has already been used")
	errTokenExpired = status.Error(codes.InvalidArgument, "join token expired")
	errBanned       = status.Error(codes.PermissionDenied, "failed to attest: agent is banned")
)

// attestByToken lets one key in per token. The same key may come again until it has used its SVID or the token has
// expired, because a reply can be lost at any byte; another key never. [DESIGN §4]
func (a *API) attestByToken(ctx context.Context, payload, csr []byte) (*authority.X509SVID, spiffeid.ID, error) {
	token, err := registry.ParseJoinToken(string(payload))
	if err != nil {
		return nil, spiffeid.ID{}, errTokenUnknown
	}
	// The token comes before the CSR, whose signature costs more to verify than a stranger may have for nothing.
	if known, err := a.c.Registry.TokenNow(ctx, token.ID()); errors.Is(err, registry.ErrNotFound) || err == nil && !known.Matches(token) {
		return nil, spiffeid.ID{}, errTokenUnknown
	}
	key, err := authority.CheckCSR(csr, spiffeid.ID{})
	if err != nil {
		return nil, spiffeid.ID{}, err
	}
	spki, err := marshalKey(key)
	if err != nil {
		return nil, spiffeid.ID{}, err
	}
	id, err := registry.AgentID(a.c.TrustDomain, joinToken, token.ID())
	if err != nil {
		return nil, spiffeid.ID{}, errTokenUnknown
	}
	const attempts = 4 // conflicts come only from the same token being used at the same moment
	for range attempts {
		svid, err := a.tryToken(ctx, token, id, key, spki)
		if errors.Is(err, registry.ErrConflict) {
			continue
		}
		return svid, id, err
	}
	return nil, id, registry.ErrConflict
}

func (a *API) tryToken(ctx context.Context, given registry.JoinToken, id spiffeid.ID, key crypto.PublicKey, spki []byte) (*authority.X509SVID, error) {
	sum := sha256.Sum256(spki)
	hash := sum[:]
	node, err := a.c.Registry.NodeNow(ctx, id)
	switch {
	case errors.Is(err, registry.ErrNotFound):
		node = nil
	case err != nil:
		return nil, err
	}
	token, err := a.c.Registry.TokenNow(ctx, given.ID())
	switch {
	case errors.Is(err, registry.ErrNotFound):
		return nil, errTokenUnknown
	case err != nil:
		return nil, err
	case !token.Matches(given):
		return nil, errTokenUnknown
	case node != nil && node.Banned: // only who knows the secret learns of the ban
		return nil, errBanned
	case given.Pin() != "" && !slices.Contains(a.c.Authority.Pins(), given.Pin()):
		return nil, status.Error(codes.InvalidArgument, "failed to attest: join token carries the pin of an authority that is not ours")
	case !a.c.Now().Before(token.ExpiresAt):
		return nil, errTokenExpired
	case token.UsedBy != nil && subtle.ConstantTimeCompare(token.UsedBy, hash) != 1:
		if c := access.From(ctx); a.c.Leaks != nil && node != nil {
			a.c.Leaks.TokenReused(ctx, id, c.Address, node.Knows(c.Place()))
		}
		return nil, errTokenUnknown
	case token.UsedBy != nil && (node == nil || node.Active):
		return nil, errTokenUnknown
	case token.UsedBy == nil && node != nil:
		return nil, errTokenUnknown // a node of that name that did not come by this token
	}
	svid, err := a.signAgent(ctx, id, key)
	if err != nil {
		return nil, err
	}
	fresh := &registry.Node{ID: id, Attestation: joinToken, Serial: svid.SerialNumber, ExpiresAt: svid.NotAfter, Key: spki, Places: []string{access.From(ctx).Place()}, CreatedAt: a.c.Now()}
	for _, g := range token.Groups {
		fresh.Selectors = append(fresh.Selectors, spiffe.Selector{Type: "node", Value: "group:" + g})
	}
	if node != nil {
		fresh.Revision, fresh.CreatedAt = node.Revision, node.CreatedAt
	}
	token.UsedBy = hash
	if err := a.c.Registry.PutNode(ctx, fresh, token); err != nil {
		return nil, err
	}
	return svid, a.auditAgent(ctx, auditlog.New, "agent.attested", id, svid, map[string]any{"attestor": joinToken})
}
