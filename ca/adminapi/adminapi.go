// Package adminapi is the door for operators: SPIRE's Server API as far as admins call it (entries, agents, bundles,
// minting) and signet.admin.v1. The same services answer on the admin socket and, for admins, over mTLS. Package
// access has admitted the caller before any of it runs. Every change is in the audit log before its answer leaves.
package adminapi

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/rotation"
	"github.com/signet-id/signet/ca/spireproto"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

// Config says what the API works on. All fields but Observations and Pods are needed.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Registry    *registry.Registry
	Authority   *authority.Set
	Rotation    *rotation.Rotator
	Audit       *auditlog.Log
	Epoch       string
	Version     string
	// Following returns which agents follow this replica.
	Following func() map[spiffeid.ID]Following
	// OwnBundle returns the trust domain's own bundle as GetBundle does.
	OwnBundle func(*types.BundleMask) (*types.Bundle, error)
	// Refresh fetches the bundle of a trust domain with which there is a relationship, or returns registry.ErrNotFound.
	Refresh func(context.Context, spiffeid.TrustDomain) error
	// FederationStatus returns how each relationship's bundle was last fetched, in order of trust domain.
	FederationStatus func() []FederationStatus
	// Observations has what enforcement points decided. Nil: that is off.
	Observations Observations
	// Pods explains pods. Nil: no cluster is watched.
	Pods Pods
	// Canary is told of an SVID that was minted for an ID that nobody should ever hold.
	Canary func(ctx context.Context, id spiffeid.ID, kind, by, address string)
	// LogLevel is how much is logged.
	LogLevel LogLevel
	// Certificate returns the CA's own SVID with its chain, and Started when the CA began.
	Certificate func() (*tls.Certificate, error)
	Started     time.Time
	Now         func() time.Time
	Log         *slog.Logger
	Issued      func(kind, reason string, n int)
	// Stop is closed when the CA shuts down: streams then end with Unavailable.
	Stop <-chan struct{}
}

// Following is what is known of an agent that follows.
type Following struct {
	Acknowledged store.Revision
	Version      string
	Address      string
	Entries      int
}

// API implements the RPCs. It is safe for concurrent use.
type API struct {
	adminv1.UnimplementedAdminServer
	c Config
}

// New returns the API.
func New(c Config) *API { return &API{c: c} }

// toStatus is the one place where errors become gRPC codes. The caller is an admin, so validation errors keep their
// text; what is not known leaves without it and is logged.
func (a *API) toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	if v, ok := errors.AsType[*registry.ValidationError](err); ok {
		return status.Error(codes.InvalidArgument, v.Error())
	}
	if x, ok := errors.AsType[*registry.ExistsError](err); ok {
		return status.Error(codes.AlreadyExists, x.Error())
	}
	if r, ok := errors.AsType[*registry.RevokedError](err); ok {
		return status.Error(codes.FailedPrecondition, r.Error()+"; `signet unrevoke "+r.Revocation+"` lifts it")
	}
	if o, ok := errors.AsType[*registry.OwnedError](err); ok && !errors.Is(err, errDocument) {
		return status.Error(codes.FailedPrecondition, o.Error())
	}
	switch {
	case errors.Is(err, registry.ErrCommitTooLarge):
		return status.Error(codes.OutOfRange, err.Error()) // a code of its own: signet apply sends the documents in smaller parts then
	case errors.Is(err, errDocument), errors.Is(err, authority.ErrRefused), errors.Is(err, registry.ErrServiceTooLarge), errors.Is(err, registry.ErrTooMany), errors.Is(err, registry.ErrTooManyRevocations):
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, authority.ErrNoWIT):
		return status.Error(codes.Unimplemented, authority.ErrNoWIT.Error())
	case errors.Is(err, registry.ErrNotFound):
		return status.Error(codes.NotFound, err.Error())
	case errors.Is(err, registry.ErrInRollout), errors.Is(err, registry.ErrRolloutOver):
		return status.Error(codes.FailedPrecondition, err.Error())
	case errors.Is(err, registry.ErrConflict):
		return status.Error(codes.Aborted, err.Error())
	case errors.Is(err, registry.ErrNotReady):
		return status.Error(codes.Unavailable, registry.ErrNotReady.Error())
	case errors.Is(err, auditlog.ErrDisk), errors.Is(err, store.ErrDiskFull):
		a.c.Log.Error("the disk is full", "err", err)
		return status.Error(codes.Unavailable, "the CA's disk is full: free room on it and try again")
	case errors.Is(err, store.ErrUnavailable):
		a.c.Log.Error("the store does not answer", "err", err)
		return status.Error(codes.Unavailable, "the store does not answer: whether anything was changed is not known; look, and try again")
	case errors.Is(err, store.ErrTooLarge):
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, authority.ErrUnavailable):
		a.c.Log.Error("a key store or the upstream CA is needed and does not answer", "err", err)
		return status.Error(codes.Unavailable, err.Error())
	case errors.Is(err, authority.ErrNoActive), errors.Is(err, authority.ErrExpired), errors.Is(err, authority.ErrStopped):
		return status.Error(codes.FailedPrecondition, err.Error())
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	}
	a.c.Log.Error("internal error", "err", err)
	return status.Error(codes.Internal, "internal error; the CA's log says more")
}

func (a *API) itemStatus(err error) *types.Status {
	st := status.Convert(a.toStatus(err))
	msg := st.Message()
	if err == nil {
		msg = "OK"
	}
	return &types.Status{Code: int32(st.Code()), Message: msg}
}

// record builds the audit record of an admin's act.
func (a *API) record(ctx context.Context, event, subject string, err error, details map[string]any) auditlog.Record {
	c := access.From(ctx)
	if details == nil {
		details = map[string]any{}
	}
	if s, ok := ctx.Value(sourceKey{}).(Source); ok {
		return s.record(a, event, subject, err, details)
	}
	details["address"] = c.Address
	outcome := auditlog.Done
	if err != nil {
		outcome = auditlog.Refused
		details["reason"] = bounded([]string{status.Convert(a.toStatus(err)).Message()})[0]
	}
	return auditlog.Record{Time: a.c.Now(), Event: event, Actor: c.String(), ActorKind: c.KindName(), Subject: subject, Outcome: outcome, Details: details}
}

// intend writes to the audit log what is about to be changed, and with it makes sure that there is room to log at
// all: a change that cannot be logged is not made. The outcome follows in a second record.
// More subjects than one record can hold take several, written together.
func (a *API) intend(ctx context.Context, class auditlog.Class, event string, subjects []string, details map[string]any) error {
	var records []auditlog.Record
	for more := true; more; more = len(subjects) > 0 {
		n, size := 0, 0
		for n < len(subjects) && (n == 0 || size+len(subjects[n]) <= maxDetailBytes) {
			size += len(subjects[n])
			n++
		}
		d := maps.Clone(details)
		if d == nil {
			d = map[string]any{}
		}
		d["subjects"] = subjects[:n]
		records = append(records, a.record(ctx, event+".begin", "", nil, d))
		subjects = subjects[n:]
	}
	return a.c.Audit.Append(ctx, class, records...)
}

// maxDetailBytes bounds one detail of an audit record so that the record, in which escapes can make it six times as
// long, stays below auditlog.MaxRecordBytes: one that does not fit would take its whole batch out of the log.
const maxDetailBytes = 6 << 10

// bounded cuts what one detail of an audit record may say.
func bounded(ss []string) []string {
	size := 0
	for i, s := range ss {
		if size += len(s) + 1; size > maxDetailBytes {
			out := slices.Clone(ss[:i])
			if i == 0 {
				out = append(out, strings.ToValidUTF8(s[:maxDetailBytes], "")+"...")
			}
			if n := len(ss) - len(out); n > 0 {
				out = append(out, fmt.Sprintf("... and %d more", n))
			}
			return out
		}
	}
	return ss
}

// outcome logs what became of an act. The change is done or refused already, so a failure here is only reported.
func (a *API) outcome(ctx context.Context, class auditlog.Class, records ...auditlog.Record) {
	if len(records) == 0 {
		return
	}
	if err := a.c.Audit.Append(context.WithoutCancel(ctx), class, records...); err != nil {
		a.c.Log.Error("audit of an outcome; its begin record is in the log", "event", records[0].Event, "err", err)
	}
}

func (a *API) ownID(field string, id *types.SPIFFEID) (spiffeid.ID, error) {
	if id == nil {
		return spiffeid.ID{}, &registry.ValidationError{Field: field, Problem: "missing"}
	}
	s := "spiffe://" + id.TrustDomain + id.Path
	out, err := spiffe.ParseID(s)
	if err != nil {
		return spiffeid.ID{}, &registry.ValidationError{Field: field, Value: s, Problem: err.Error()}
	}
	if out.TrustDomain() != a.c.TrustDomain {
		return spiffeid.ID{}, &registry.ValidationError{Field: field, Value: s, Problem: "must be in trust domain " + a.c.TrustDomain.Name()}
	}
	return out, nil
}

func protoID(id spiffeid.ID) *types.SPIFFEID { return spireproto.ID(id) }

// Bounds of lists.
const (
	maxPage = 5000
	// maxUnpaged is how much a list may hold if its caller does not page: SPIRE's answer to page_size 0 is everything.
	maxUnpaged = 10000
	// maxPageBytes ends a page early: gRPC's clients take messages of 4 MiB unless they are told otherwise.
	maxPageBytes = 2 << 20
	// maxUnpagedBytes is the most that a caller who does not page is sent.
	maxUnpagedBytes = 7 << 19
)

func pageSize(asked int32) (int, error) {
	switch {
	case asked < 0:
		return 0, &registry.ValidationError{Field: "page_size", Problem: "must not be negative"}
	case asked == 0:
		return maxUnpaged, nil
	}
	return min(int(asked), maxPage), nil
}

func checkUnpaged(asked int32, more bool) error {
	if asked == 0 && more {
		return status.Errorf(codes.ResourceExhausted, "page_size: the results are more than %d or too large for one message; set page_size and follow next_page_token", maxUnpaged)
	}
	return nil
}
