package nodeapi

import (
	"context"
	"crypto"
	"errors"
	"io"
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
	"github.com/signet-id/signet/internal/nodekey"
)

// AttestAgent judges evidence and answers with an agent X509-SVID. [SPIRE-PROTOCOL §3]
func (a *API) AttestAgent(s agentv1.Agent_AttestAgentServer) error {
	leave, err := a.seats.take(callerAddress(s.Context()))
	if err != nil {
		a.c.Issued("agent", "refused", 1)
		return err
	}
	defer leave()
	req, err := receiveSoon(s.Context(), s.Recv, maxAttestation, errSilent)
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
	reattestable := false
	switch attestor := a.attestors[p.Data.Type]; {
	case p.Data.Type == joinToken:
		svid, id, err = a.attestByToken(s.Context(), p.Data.Payload, p.Params.Csr)
	case p.Data.Type == nodekey.Attestor:
		svid, id, err = a.attestByKey(s, p.Data.Payload, p.Params.Csr)
	case attestor != nil:
		svid, id, reattestable, err = a.attestByEvidence(s, attestor, p.Data.Payload, p.Params.Csr)
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
		Result: &agentv1.AttestAgentResponse_Result{Svid: joinChain(svid, id), Reattestable: reattestable},
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
	errNoReply = status.Error(codes.InvalidArgument, "failed to attest: there is no answer to the challenge")
)

// receiveSoon is a stream's Recv that gives up after most, with the error silent. The handler then returns, which ends the
// Recv.
func receiveSoon[M any](ctx context.Context, recv func() (*M, error), most time.Duration, silent error) (*M, error) {
	type received struct {
		m   *M
		err error
	}
	got := make(chan received, 1)
	go func() {
		m, err := recv()
		got <- received{m, err}
	}()
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case r := <-got:
		return r.m, r.err
	case <-timer.C:
		return nil, silent
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

// ask sends one challenge and returns the answer.
func ask(ctx context.Context, s agentv1.Agent_AttestAgentServer, question []byte) ([]byte, error) {
	if err := s.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Challenge{Challenge: question}}); err != nil {
		return nil, err
	}
	m, err := receiveSoon(ctx, s.Recv, maxAttestation, errSilent)
	if errors.Is(err, io.EOF) {
		return nil, errNoReply
	}
	if err != nil {
		return nil, err
	}
	answer := m.GetChallengeResponse()
	switch {
	case len(answer) == 0:
		return nil, errNoReply
	case len(answer) > nodeattest.MaxResponseBytes:
		return nil, status.Errorf(codes.InvalidArgument, "failed to attest: the answer to the challenge has %d bytes, at most %d are allowed",
			len(answer), nodeattest.MaxResponseBytes)
	}
	return answer, nil
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
	case len(p.Data.Payload) > nodeattest.MaxPayloadBytes:
		return status.Errorf(codes.InvalidArgument, "malformed param: attestation data payload has %d bytes, at most %d are allowed", len(p.Data.Payload), nodeattest.MaxPayloadBytes)
	}
	return nil
}

func (a *API) signAgent(ctx context.Context, id spiffeid.ID, key crypto.PublicKey) (*authority.X509SVID, error) {
	prefix := a.c.Registry.SerialPrefix(id)
	notBefore, _, err := a.terms(id, prefix)
	if err != nil {
		return nil, err
	}
	prepared, err := a.c.Authority.CheckX509(authority.X509Request{ID: id, PublicKey: key, TTL: a.c.AgentTTL, SerialPrefix: prefix, NotBefore: notBefore, Reserved: true})
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
