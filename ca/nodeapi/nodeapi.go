// Package nodeapi is the door for nodes: SPIRE's RPCs that agents call (attestation and renewal, the bundle, their
// entries, their workloads' SVIDs) and signet.node.v1. Package access has identified and admitted the caller before any
// of it runs, except that attestation and GetBundle come from anyone.
package nodeapi

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/nodeattest"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/spireproto"
	"github.com/signet-id/signet/ca/store"
)

// Config says what the API works on. All fields but Metrics are needed.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Registry    *registry.Registry
	Authority   *authority.Set
	Audit       *auditlog.Log
	Refusals    *access.Refusals
	Guard       *access.Guard
	Epoch       string
	// AgentTTL is the validity of agents' own X509-SVIDs.
	AgentTTL time.Duration
	// Recovery is how long after its end an agent may win its X509-SVID back with the key that it was for.
	Recovery time.Duration
	// SyncPage is how many entries a message of SyncAuthorizedEntries holds at most. Zero means DefaultSyncPage.
	SyncPage int
	// MaxDownstreamTTL is the longest validity of a downstream CA's certificate, DownstreamDepth how many levels of CAs may
	// be below this one.
	MaxDownstreamTTL time.Duration
	DownstreamDepth  int
	Now              func() time.Time
	Log              *slog.Logger
	// Attestors judge the evidence of nodes, besides join tokens. Each has a type of its own.
	Attestors []nodeattest.Attestor
	// Rotation hears of what agents have handed on.
	Rotation Rotation
	// Observations keeps what enforcement points decided. Nil: such reports are answered with Unimplemented.
	Observations Observations
	// Leaks hears of what looks like a stolen secret. Nil: nobody does.
	Leaks Leaks
	// ReissueRate is how many SVIDs of a tainted authority all agents together renew in a second.
	ReissueRate int
	// Issued counts what was issued and refused: kind is x509, jwt, agent or downstream; reason is empty on success.
	Issued func(kind, reason string, n int)
}

// Rotation learns which prepared authorities agents have. Its methods must not block.
type Rotation interface {
	// HandedOn is told what an agent that follows has written to every open stream.
	HandedOn(agent spiffeid.ID, authorities []string)
	// Fetched is told of an agent that has fetched a bundle with these authorities, with its SVID.
	Fetched(agent *registry.Node, authorities []string)
}

// Leaks is told of signs that a secret is in wrong hands. Its methods may take the time of a commit.
type Leaks interface {
	// OldKey: somebody who is not where the node was has proven the key before its present one.
	OldKey(ctx context.Context, agent spiffeid.ID, address string)
	// TokenReused: a join token that a node attested with was shown again, with its secret and another key.
	TokenReused(ctx context.Context, agent spiffeid.ID, address string, samePlace bool)
	// CanaryIssued: an SVID was issued for an ID that nobody should ever hold.
	CanaryIssued(ctx context.Context, id spiffeid.ID, kind, by, address string)
	// CanaryUsed: such an ID called a service, as an agent reports.
	CanaryUsed(ctx context.Context, agent spiffeid.ID, o *policyv1.Observation)
}

// API implements the RPCs. It is safe for concurrent use.
type API struct {
	nodev1.UnimplementedNodeServer
	c         Config
	attestors map[string]nodeattest.Attestor // by type; never changed
	seats     seats

	catchUp  time.Duration // how long a sync waits for the index to hold what was committed before it
	stop     chan struct{}
	stopOnce sync.Once

	mu      sync.Mutex
	streams map[spiffeid.ID]*followState
	syncs   map[spiffeid.ID]int // how many SyncAuthorizedEntries each agent has open
}

// New returns the API.
func New(c Config) *API {
	if c.SyncPage == 0 {
		c.SyncPage = DefaultSyncPage
	}
	a := &API{c: c, attestors: map[string]nodeattest.Attestor{}, catchUp: catchUp, stop: make(chan struct{}), streams: map[spiffeid.ID]*followState{}, syncs: map[spiffeid.ID]int{}}
	for _, attestor := range c.Attestors {
		a.attestors[attestor.Type()] = attestor
	}
	return a
}

// Shutdown ends every Follow stream with Unavailable.
func (a *API) Shutdown() { a.stopOnce.Do(func() { close(a.stop) }) }

// toStatus is the one place where errors become gRPC codes. An error it does not know leaves without its text, because
// it may tell what a node has no business to know; it is logged here.
func (a *API) toStatus(err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	if v, ok := errors.AsType[*registry.ValidationError](err); ok {
		return status.Error(codes.InvalidArgument, v.Error())
	}
	if r, ok := errors.AsType[*nodeattest.Refusal](err); ok {
		return a.refusalStatus(r)
	}
	if r, ok := errors.AsType[*registry.RevokedError](err); ok {
		return status.Error(codes.PermissionDenied, r.Error())
	}
	switch {
	case errors.Is(err, authority.ErrRefused):
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, authority.ErrNoWIT):
		return status.Error(codes.Unimplemented, authority.ErrNoWIT.Error())
	case errors.Is(err, registry.ErrNotFound):
		return status.Error(codes.NotFound, "entry not found or not authorized")
	case errors.Is(err, registry.ErrNotReady):
		return status.Error(codes.Unavailable, registry.ErrNotReady.Error())
	case errors.Is(err, registry.ErrConflict):
		return status.Error(codes.Aborted, registry.ErrConflict.Error())
	case errors.Is(err, auditlog.ErrDisk), errors.Is(err, store.ErrDiskFull):
		a.c.Log.Error("nothing is issued that cannot be logged", "err", err)
		return status.Error(codes.Unavailable, "the CA's disk is full")
	case errors.Is(err, store.ErrUnavailable):
		a.c.Log.Warn("the store does not answer", "err", err)
		return status.Error(codes.Unavailable, "the store does not answer; try again")
	case errors.Is(err, authority.ErrNoActive), errors.Is(err, authority.ErrExpired), errors.Is(err, authority.ErrStopped), errors.Is(err, authority.ErrUnavailable):
		a.c.Log.Error("cannot sign", "err", err)
		return status.Error(codes.Unavailable, "the CA cannot sign now")
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	}
	a.c.Log.Error("internal error", "err", err)
	return status.Error(codes.Internal, "internal error")
}

var refusalCodes = map[nodeattest.Kind]codes.Code{
	nodeattest.Malformed: codes.InvalidArgument, nodeattest.Denied: codes.PermissionDenied,
	nodeattest.Unavailable: codes.Unavailable, nodeattest.Internal: codes.Internal,
}

func (a *API) refusalStatus(r *nodeattest.Refusal) error {
	code, ok := refusalCodes[r.Kind]
	if !ok {
		code = codes.Internal
	}
	if code == codes.Unavailable || code == codes.Internal { // it is not the node's fault
		a.c.Log.Warn("evidence of a node could not be judged", "err", r)
	}
	return status.Error(code, "failed to attest: "+r.Text)
}

// audit writes records before their effect leaves the CA.
func (a *API) audit(ctx context.Context, class auditlog.Class, records ...auditlog.Record) error {
	return a.c.Audit.Append(ctx, class, records...)
}

// refuse notes a refusal and returns its status.
func (a *API) refuse(ctx context.Context, event string, subject string, err error, details map[string]any) error {
	st := a.toStatus(err)
	c := access.From(ctx)
	if details == nil {
		details = map[string]any{}
	}
	details["reason"] = excerpt(status.Convert(st).Message())
	details["address"] = c.Address
	if r, ok := errors.AsType[*nodeattest.Refusal](err); ok && r.Reason != nil {
		details["cause"] = excerpt(r.Reason.Error())
	}
	a.c.Refusals.Record(ctx, c, auditlog.Record{Time: a.c.Now(), Event: event, Actor: c.String(), ActorKind: c.KindName(), Subject: subject, Outcome: auditlog.Refused, Details: details})
	a.c.Log.Debug("refused", "event", event, "actor", c.String(), "subject", subject, "reason", details["reason"])
	return st
}

// excerpt bounds what foreign bytes can write into the audit log.
func excerpt(s string) string {
	const most = 1024
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

func protoID(id spiffeid.ID) *types.SPIFFEID { return spireproto.ID(id) }

func joinChain(svid *authority.X509SVID, id spiffeid.ID) *types.X509SVID {
	return &types.X509SVID{Id: protoID(id), CertChain: svid.Chain, ExpiresAt: svid.NotAfter.Unix()}
}
