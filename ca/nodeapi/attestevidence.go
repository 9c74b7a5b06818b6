package nodeapi

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/nodeattest"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/nodekey"
	"github.com/signet-id/signet/spiffe"
)

// maxJudging bounds one attestation as a whole, with all its challenges and what the attestor asks of others.
const maxJudging = time.Minute

// errFirstUse is what everybody hears but the agent that came first. [SPIRE-PROTOCOL §3]
var errFirstUse = status.Error(codes.PermissionDenied, "failed to attest: attestation data has already been used to attest an agent")

// attestByEvidence lets a node in for what an attestor finds proven.
func (a *API) attestByEvidence(s agentv1.Agent_AttestAgentServer, attestor nodeattest.Attestor, payload, csr []byte) (*authority.X509SVID, spiffeid.ID, bool, error) {
	ctx, cancel := context.WithTimeout(s.Context(), maxJudging)
	defer cancel()
	asked := 0
	evidence, err := attestor.Attest(ctx, nodeattest.Attempt{Payload: payload, Address: callerAddress(ctx), Challenge: func(question []byte) ([]byte, error) {
		if asked++; asked > nodeattest.MaxChallenges {
			return nil, fmt.Errorf("attestor %s asks more than %d challenges", attestor.Type(), nodeattest.MaxChallenges)
		}
		if len(question) == 0 { // agents would take it for the result
			return nil, fmt.Errorf("attestor %s asks an empty challenge", attestor.Type())
		}
		return ask(ctx, s, question)
	}})
	if err != nil {
		return nil, spiffeid.ID{}, false, err
	}
	id, selectors, err := a.nodeOf(attestor.Type(), evidence)
	if err != nil {
		return nil, spiffeid.ID{}, false, err
	}
	const attempts = 4 // conflicts come from the same node attesting twice at the same moment, and from operators
	for range attempts {
		svid, err := a.tryEvidence(ctx, attestor.Type(), evidence, id, selectors, csr)
		if errors.Is(err, registry.ErrConflict) {
			continue
		}
		return svid, id, evidence.CanReattest, err
	}
	return nil, id, false, registry.ErrConflict
}

// nodeOf returns the ID and the selectors that evidence gives. An ID that could be that of a node of another attestor
// would let one attestor speak for the other.
func (a *API) nodeOf(attestor string, e *nodeattest.Evidence) (spiffeid.ID, []spiffe.Selector, error) {
	selectors, err := e.Check(attestor)
	if err != nil { // what it says of the node came from outside, such as a name in a certificate
		return spiffeid.ID{}, nil, nodeattest.Refuse(nodeattest.Denied, "what the evidence says of the node cannot be a name or a selector").Because(err)
	}
	if first := e.Path[0]; first != attestor && (first == joinToken || first == nodekey.Attestor || a.attestors[first] != nil) {
		return spiffeid.ID{}, nil, fmt.Errorf("attestor %s: path %q is of another attestor", attestor, e.Path)
	}
	id, err := registry.AgentID(a.c.TrustDomain, e.Path[0], strings.Join(e.Path[1:], "/"))
	if err == nil {
		_, err = spiffe.ParseWorkloadID(id.String())
	}
	if err != nil { // the names in it are the node's
		return spiffeid.ID{}, nil, nodeattest.Refuse(nodeattest.Denied, "the node's name cannot be a SPIFFE ID").Because(err)
	}
	return id, selectors, nil
}

func (a *API) tryEvidence(ctx context.Context, attestor string, e *nodeattest.Evidence, id spiffeid.ID, selectors []spiffe.Selector, csr []byte) (*authority.X509SVID, error) {
	node, err := a.c.Registry.NodeNow(ctx, id)
	switch {
	case errors.Is(err, registry.ErrNotFound):
		node = nil
	case err != nil:
		return nil, err
	case node.Banned:
		return nil, errBanned
	case node.Attestation != attestor:
		return nil, nodeattest.Refuse(nodeattest.Denied, "a node of that ID has attested in another way; an operator must evict it first")
	}
	key, err := authority.CheckCSR(csr, spiffeid.ID{})
	if err != nil {
		return nil, err
	}
	spki, err := marshalKey(key)
	if err != nil {
		return nil, err
	}
	if node != nil && !e.CanReattest && (node.Active || !sameKey(spki, node.Key)) {
		return nil, errFirstUse // what is left is the same agent, which did not get the answer
	}
	svid, err := a.signAgent(ctx, id, key)
	if err != nil {
		return nil, err
	}
	fresh := &registry.Node{ID: id, Attestation: attestor, Selectors: selectors, Serial: svid.SerialNumber, ExpiresAt: svid.NotAfter, Key: spki, Places: []string{access.From(ctx).Place()},
		CanReattest: e.CanReattest, CreatedAt: a.c.Now()}
	event, class := "agent.attested", auditlog.New
	if node != nil {
		fresh.Revision, fresh.CreatedAt, fresh.Version = node.Revision, node.CreatedAt, node.Version
		event, class = "agent.reattested", auditlog.Essential
		ctx = store.WithReserve(ctx) // on a full disk it is the renewal of an identity that exists
	}
	if err := a.c.Registry.PutNode(ctx, fresh, nil); err != nil {
		return nil, err
	}
	details := map[string]any{"attestor": attestor, "selectors": selectorTexts(selectors)}
	for k, v := range e.Facts {
		details[k] = v
	}
	return svid, a.auditAgent(ctx, class, event, id, svid, details)
}

// sameKey compares public keys; in constant time only so that nobody has to think about it.
func sameKey(a, b []byte) bool {
	x, y := sha256.Sum256(a), sha256.Sum256(b)
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}

// maxAuditedSelectors bounds what a node's selectors take up in one audit record, which has a limit.
const maxAuditedSelectors = 4 << 10

func selectorTexts(selectors []spiffe.Selector) []string {
	out := make([]string, len(selectors))
	for i, s := range selectors {
		out[i] = s.String()
	}
	slices.Sort(out)
	room := maxAuditedSelectors
	for i, s := range out {
		if room -= len(s); room < 0 {
			return append(out[:i:i], fmt.Sprintf("and %d more", len(out)-i))
		}
	}
	return out
}
