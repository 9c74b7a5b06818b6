// Package nodeapi is the door for nodes: SPIRE's RPCs that agents call (attestation and renewal, the bundle, their
// entries, their workloads' SVIDs) and signet.node.v1. Package access has identified and admitted the caller before any
// of it runs, except that attestation and GetBundle come from anyone.
package nodeapi

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
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
	Now      func() time.Time
	Log      *slog.Logger
	// Issued counts what was issued and refused: kind is x509, jwt or agent; reason is empty on success.
	Issued func(kind, reason string, n int)
}

// API implements the RPCs. It is safe for concurrent use.
type API struct {
	nodev1.UnimplementedNodeServer
	c Config

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
	return &API{c: c, catchUp: catchUp, stop: make(chan struct{}), streams: map[spiffeid.ID]*followState{}, syncs: map[spiffeid.ID]int{}}
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
	switch {
	case errors.Is(err, authority.ErrRefused):
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, registry.ErrNotFound):
		return status.Error(codes.NotFound, "entry not found or not authorized")
	case errors.Is(err, registry.ErrNotReady):
		return status.Error(codes.Unavailable, registry.ErrNotReady.Error())
	case errors.Is(err, registry.ErrConflict):
		return status.Error(codes.Aborted, registry.ErrConflict.Error())
	case errors.Is(err, auditlog.ErrDisk), errors.Is(err, store.ErrDiskFull):
		a.c.Log.Error("nothing is issued that cannot be logged", "err", err)
		return status.Error(codes.Unavailable, "the CA's disk is full")
	case errors.Is(err, authority.ErrNoActive), errors.Is(err, authority.ErrExpired), errors.Is(err, authority.ErrStopped):
		a.c.Log.Error("cannot sign", "err", err)
		return status.Error(codes.Unavailable, "the CA cannot sign now")
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	}
	a.c.Log.Error("internal error", "err", err)
	return status.Error(codes.Internal, "internal error")
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
	details["reason"] = status.Convert(st).Message()
	details["address"] = c.Address
	a.c.Refusals.Record(ctx, c, auditlog.Record{Time: a.c.Now(), Event: event, Actor: c.String(), ActorKind: c.KindName(), Subject: subject, Outcome: auditlog.Refused, Details: details})
	a.c.Log.Debug("refused", "event", event, "actor", c.String(), "subject", subject, "reason", details["reason"])
	return st
}

func protoID(id spiffeid.ID) *types.SPIFFEID { return spireproto.ID(id) }

func joinChain(svid *authority.X509SVID, id spiffeid.ID) *types.X509SVID {
	return &types.X509SVID{Id: protoID(id), CertChain: svid.Chain, ExpiresAt: svid.NotAfter.Unix()}
}
