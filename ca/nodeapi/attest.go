package nodeapi

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
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

const joinToken = "join_token"

// maxPayloadBytes bounds what an unauthenticated caller can make us look at.
const maxPayloadBytes = 64 << 10

// AttestAgent judges evidence and answers with an agent X509-SVID. [SPIRE-PROTOCOL §3]
func (a *API) AttestAgent(s agentv1.Agent_AttestAgentServer) error {
	req, err := receiveSoon(s)
	if errors.Is(err, errSilent) {
		return err
	}
	if err != nil {
		return status.Error(codes.InvalidArgument, "malformed param: missing params")
	}
	p := req.GetParams()
	if err := checkAttestParams(p); err != nil {
		return a.refuse(s.Context(), "agent.attest", "", err, nil)
	}
	var svid *authority.X509SVID
	var id spiffeid.ID
	switch p.Data.Type {
	case joinToken:
		svid, id, err = a.attestByToken(s.Context(), p.Data.Payload, p.Params.Csr)
	case nodekey.Attestor:
		svid, id, err = a.attestByKey(s, p.Data.Payload, p.Params.Csr)
	default:
		err = status.Errorf(codes.FailedPrecondition, "error getting node attestor: could not find node attestor type %q", clip(p.Data.Type))
	}
	if err != nil {
		subject := ""
		if !id.IsZero() {
			subject = id.String()
		}
		a.c.Issued("agent", "refused", 1)
		return a.refuse(s.Context(), "agent.attest", subject, err, map[string]any{"attestor": clip(p.Data.Type)})
	}
	a.c.Issued("agent", "", 1)
	return s.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{
		Result: &agentv1.AttestAgentResponse_Result{Svid: joinChain(svid, id)},
	}})
}

func clip(s string) string {
	if len(s) > 64 {
		return strings.ToValidUTF8(s[:64], "") + "..." // half a character would make every message with it unsendable
	}
	return s
}

// maxAttestation bounds each wait for the caller, who need not be anybody: without a bound, streams that say nothing
// would pile up.
const maxAttestation = 30 * time.Second

var (
	errSilent  = status.Errorf(codes.DeadlineExceeded, "nothing came for %v; attest again", maxAttestation)
	errNoReply = status.Error(codes.InvalidArgument, "failed to attest: the stream ended without an answer to the challenge")
)

// receiveSoon is Recv that gives up. The handler then returns, which ends the Recv.
func receiveSoon(s agentv1.Agent_AttestAgentServer) (*agentv1.AttestAgentRequest, error) {
	type received struct {
		m   *agentv1.AttestAgentRequest
		err error
	}
	got := make(chan received, 1)
	go func() {
		m, err := s.Recv()
		got <- received{m, err}
	}()
	timer := time.NewTimer(maxAttestation)
	defer timer.Stop()
	select {
	case r := <-got:
		return r.m, r.err
	case <-timer.C:
		return nil, errSilent
	}
}

func checkAttestParams(p *agentv1.AttestAgentRequest_Params) error {
	missing := func(what string) error {
		return status.Error(codes.InvalidArgument, "malformed param: missing "+what)
	}
	switch {
	case p == nil:
		return missing("params")
	case p.Data == nil:
		return missing("attestation data")
	case p.Params == nil:
		return missing("X509-SVID parameters")
	case len(p.Params.Csr) == 0:
		return missing("CSR")
	case p.Data.Type == "":
		return missing("attestation data type")
	case len(p.Data.Payload) == 0:
		return missing("attestation data payload")
	case len(p.Data.Payload) > maxPayloadBytes:
		return status.Errorf(codes.InvalidArgument, "malformed param: attestation data payload has %d bytes, at most %d are allowed", len(p.Data.Payload), maxPayloadBytes)
	}
	return nil
}

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
	case token.UsedBy != nil && (subtle.ConstantTimeCompare(token.UsedBy, hash) != 1 || node == nil || node.Active):
		return nil, errTokenUnknown
	case token.UsedBy == nil && node != nil:
		return nil, errTokenUnknown // a node of that name that did not come by this token
	}
	svid, err := a.signAgent(ctx, id, key)
	if err != nil {
		return nil, err
	}
	fresh := &registry.Node{ID: id, Attestation: joinToken, Serial: svid.SerialNumber, ExpiresAt: svid.NotAfter, Key: spki, CreatedAt: a.c.Now()}
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
	if err := s.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Challenge{Challenge: nonce}}); err != nil {
		return nil, id, err
	}
	answer, err := receiveSoon(s)
	if errors.Is(err, io.EOF) {
		err = errNoReply
	}
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
		if node.Banned {
			return nil, id, errBanned
		}
		switch sig := answer.GetChallengeResponse(); {
		case a.holds(node.Key, id, nonce, csr, sig):
		case a.holds(node.NewKey, id, nonce, csr, sig): // the agent has the renewed one: this is its first use
			node.Key, node.Serial, node.ExpiresAt = node.NewKey, node.NewSerial, node.NewExpiresAt
		default:
			return nil, id, errNoProof
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
		node.NewSerial, node.NewExpiresAt, node.NewKey = svid.SerialNumber, svid.NotAfter, spki
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

func (a *API) signAgent(ctx context.Context, id spiffeid.ID, key crypto.PublicKey) (*authority.X509SVID, error) {
	prepared, err := a.c.Authority.CheckX509(authority.X509Request{ID: id, PublicKey: key, TTL: a.c.AgentTTL, Reserved: true})
	if err != nil {
		return nil, err
	}
	return a.c.Authority.SignX509(ctx, prepared)
}

func (a *API) auditAgent(ctx context.Context, class auditlog.Class, event string, id spiffeid.ID, svid *authority.X509SVID, details map[string]any) error {
	c := access.From(ctx)
	details["serial"] = svid.SerialNumber
	details["not_after"] = svid.NotAfter.Unix()
	details["authority"] = svid.AuthorityID
	details["address"] = c.Address
	return a.audit(ctx, class, auditlog.Record{Time: a.c.Now(), Event: event, Actor: id.String(), ActorKind: "agent", Subject: id.String(), Outcome: auditlog.Done, Details: details})
}

// RenewAgent signs a new SVID for the calling agent. The old one stays valid until the new one is first used.
// [SPIRE-PROTOCOL §4]
func (a *API) RenewAgent(ctx context.Context, req *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	c := access.From(ctx)
	fail := func(err error) (*agentv1.RenewAgentResponse, error) {
		a.c.Issued("agent", "refused", 1)
		return nil, a.refuse(ctx, "agent.renew", c.ID.String(), err, nil)
	}
	if req.GetParams() == nil || len(req.Params.Csr) == 0 {
		return fail(status.Error(codes.InvalidArgument, "malformed param: missing CSR"))
	}
	if c.Node.CanReattest {
		return fail(access.Denied(types.PermissionDeniedDetails_AGENT_MUST_REATTEST, "agent %s must attest again instead of renewing", c.ID))
	}
	key, err := authority.CheckCSR(req.Params.Csr, spiffeid.ID{})
	if err != nil {
		return fail(err)
	}
	spki, err := marshalKey(key)
	if err != nil {
		return fail(err)
	}
	svid, err := a.signAgent(ctx, c.ID, key)
	if err != nil {
		return fail(err)
	}
	node := *c.Node
	const attempts = 4
	for range attempts {
		node.NewSerial, node.NewExpiresAt, node.NewKey = svid.SerialNumber, svid.NotAfter, spki
		if err = a.c.Registry.PutNode(store.WithReserve(ctx), &node, nil); !errors.Is(err, registry.ErrConflict) {
			break
		}
		// Somebody banned or evicted it meanwhile, or its SVID was promoted: judge it again.
		fresh, cerr := a.c.Guard.CheckAgent(ctx, c)
		if cerr != nil {
			return fail(cerr)
		}
		node = *fresh
	}
	if err != nil {
		return fail(err)
	}
	if err := a.auditAgent(ctx, auditlog.Essential, "agent.renewed", c.ID, svid, map[string]any{}); err != nil {
		return fail(err)
	}
	a.c.Issued("agent", "", 1)
	return &agentv1.RenewAgentResponse{Svid: joinChain(svid, c.ID)}, nil
}
