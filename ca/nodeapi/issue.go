package nodeapi

import (
	"context"
	"crypto"
	"errors"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/registry"
)

// MaxBatch is the most SVIDs one RPC signs. [SPIRE-PROTOCOL §6, §11]
const MaxBatch = 500

// From how many items on the work on them is spread over the processors: verifying a CSR takes longer than to start a
// goroutine; public keys only have to be read.
const (
	parallelCSRs = 4
	parallelKeys = 32
	parallelJWTs = 32
)

// IssueX509SVIDs signs an X509-SVID per item by public key. The agent made the keys itself and is authenticated by its
// SVID: it acts as registration authority, and the audit log says so. [DESIGN §6]
func (a *API) IssueX509SVIDs(ctx context.Context, req *nodev1.IssueX509SVIDsRequest) (*nodev1.IssueX509SVIDsResponse, error) {
	ids := make([]registry.EntryID, len(req.Items))
	for i, it := range req.Items {
		ids[i] = registry.EntryID(it.GetEntryId())
	}
	issued, err := a.issueX509(ctx, "items", ids, x509Issue{by: "public_key", parallelFrom: parallelKeys,
		key: func(i int, _ *registry.Entry) (crypto.PublicKey, error) {
			return authority.ParsePublicKey(req.Items[i].GetPublicKey())
		}})
	if err != nil {
		return nil, err
	}
	out := &nodev1.IssueX509SVIDsResponse{Results: make([]*nodev1.IssueX509SVIDsResponse_Result, len(req.Items))}
	for i, x := range issued {
		if x.err != nil {
			out.Results[i] = &nodev1.IssueX509SVIDsResponse_Result{Code: int32(x.err.Code()), Message: x.err.Message()}
			continue
		}
		out.Results[i] = &nodev1.IssueX509SVIDsResponse_Result{CertChain: x.svid.Chain, NotBefore: x.svid.NotBefore.Unix(),
			NotAfter: x.svid.NotAfter.Unix(), EntryRevision: int64(x.entry.Revision)}
	}
	return out, nil
}

// BatchNewX509SVID signs an X509-SVID per item by CSR, as SPIRE's agents ask for them. The CSR proves possession of its
// key and carries nothing else into the SVID; one that asks for another SPIFFE ID is refused. [SPIRE-PROTOCOL §6, X509-27]
func (a *API) BatchNewX509SVID(ctx context.Context, req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	ids := make([]registry.EntryID, len(req.Params))
	for i, p := range req.Params {
		ids[i] = registry.EntryID(p.GetEntryId())
	}
	issued, err := a.issueX509(ctx, "params", ids, x509Issue{by: "csr", parallelFrom: parallelCSRs, check: func(i int) error {
		switch p := req.Params[i]; {
		case p.GetEntryId() == "":
			return status.Error(codes.InvalidArgument, "malformed param: missing entry ID")
		case len(p.GetCsr()) == 0:
			return status.Error(codes.InvalidArgument, "malformed param: missing CSR")
		}
		return nil
	}, key: func(i int, e *registry.Entry) (crypto.PublicKey, error) {
		return authority.CheckCSR(req.Params[i].Csr, e.SPIFFEID)
	}})
	if err != nil {
		return nil, err
	}
	out := &svidv1.BatchNewX509SVIDResponse{Results: make([]*svidv1.BatchNewX509SVIDResponse_Result, len(req.Params))}
	for i, x := range issued {
		if x.err != nil {
			out.Results[i] = &svidv1.BatchNewX509SVIDResponse_Result{Status: &types.Status{Code: int32(x.err.Code()), Message: x.err.Message()}}
			continue
		}
		// The status is there on success, too: SPIRE's agents read it without looking.
		out.Results[i] = &svidv1.BatchNewX509SVIDResponse_Result{Status: &types.Status{Code: int32(codes.OK), Message: "OK"}, Svid: joinChain(x.svid, x.entry.SPIFFEID)}
	}
	return out, nil
}

// x509Issue says how a batch of X509-SVIDs comes by its keys.
type x509Issue struct {
	// by is what the audit log calls it.
	by string
	// check refuses an item for its form, before its entry is looked at; nil: there is nothing to refuse.
	check func(i int) error
	// key returns what item i, for entry e, is issued for. It is called from several goroutines.
	key func(i int, e *registry.Entry) (crypto.PublicKey, error)
	// parallelFrom is the number of items from which key is called in parallel.
	parallelFrom int
}

// An issuedX509 is what became of one item: an SVID for an entry, or a status that is not OK.
type issuedX509 struct {
	entry *registry.Entry
	svid  *authority.X509SVID
	err   *status.Status
}

// issueX509 signs what the calling agent may have of ids, and returns an outcome for each. field is what the request
// calls them. When it returns, what was issued is in the audit log.
func (a *API) issueX509(ctx context.Context, field string, ids []registry.EntryID, how x509Issue) ([]issuedX509, error) {
	c := access.From(ctx)
	entries, err := a.authorizedEntries(ctx, c, field, ids)
	if err != nil {
		return nil, err
	}
	prefix := a.c.Registry.SerialPrefix(c.ID)
	checked, errs := make([]authority.PreparedX509, len(ids)), make([]error, len(ids))
	spread(len(ids), how.parallelFrom, func(i int) {
		if how.check != nil {
			if errs[i] = how.check(i); errs[i] != nil {
				return
			}
		}
		e := entries[i]
		if e == nil {
			errs[i] = a.c.Registry.Missing(c.ID, ids[i])
			return
		}
		if errs[i] = ctx.Err(); errs[i] != nil {
			return // nobody waits for it any more
		}
		var key crypto.PublicKey
		if key, errs[i] = how.key(i, e); errs[i] == nil {
			checked[i], errs[i] = a.checkX509(e, key, prefix)
		}
	})
	prepared, index := make([]authority.PreparedX509, 0, len(ids)), make([]int, 0, len(ids))
	for i, err := range errs {
		if err == nil {
			prepared, index = append(prepared, checked[i]), append(index, i)
		}
	}
	svids, signErrs := a.c.Authority.SignX509Batch(ctx, prepared)
	out := make([]issuedX509, len(ids))
	for j, i := range index {
		out[i].entry, out[i].svid, errs[i] = entries[i], svids[j], signErrs[j]
	}
	now := a.c.Now()
	var records, refusals []auditlog.Record
	for i, err := range errs {
		if err == nil && entries[i].Canary {
			a.canary(ctx, c, entries[i], "x509")
		}
		if err != nil {
			out[i] = issuedX509{err: status.Convert(a.toStatus(err))}
			refusals = append(refusals, auditlog.Record{Time: now, Event: "x509svid.refused", Actor: c.ID.String(), ActorKind: "agent",
				Subject: clip(string(ids[i])), Outcome: auditlog.Refused, Details: map[string]any{"reason": excerpt(out[i].err.Message())}})
			continue
		}
		e, svid := out[i].entry, out[i].svid
		records = append(records, auditlog.Record{Time: now, Event: "x509svid.issued", Actor: c.ID.String(), ActorKind: "agent",
			Subject: e.SPIFFEID.String(), Outcome: auditlog.Done, Details: map[string]any{
				"entry_id": string(e.ID), "serial": svid.SerialNumber, "not_after": svid.NotAfter.Unix(), "authority": svid.AuthorityID, "by": how.by}})
	}
	if err := a.audit(ctx, auditlog.Essential, records...); err != nil {
		return nil, a.toStatus(err) // nothing leaves unlogged
	}
	if err := a.stillAdmitted(c); err != nil {
		return nil, err
	}
	a.auditRefused(ctx, refusals)
	a.c.Issued("x509", "", len(records))
	a.c.Issued("x509", "refused", len(refusals))
	return out, nil
}

// auditRefused logs the refused items of a batch. They get nothing of the reserve: otherwise an agent that asks for what
// is not its own could spend it, and stop all renewals on a full disk. [DESIGN §6] That it hangs up changes nothing.
func (a *API) auditRefused(ctx context.Context, refusals []auditlog.Record) {
	if err := a.audit(context.WithoutCancel(ctx), auditlog.New, refusals...); err != nil {
		a.c.Log.Error("audit of refusals", "event", refusals[0].Event, "count", len(refusals), "err", err)
	}
}

// NewJWTSVID signs a JWT-SVID for an entry of the calling agent. [SPIRE-PROTOCOL §7]
func (a *API) NewJWTSVID(ctx context.Context, req *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	c := access.From(ctx)
	fail := func(err error) (*svidv1.NewJWTSVIDResponse, error) {
		a.c.Issued("jwt", "refused", 1)
		return nil, a.refuse(ctx, "jwtsvid.refused", clip(req.EntryId), err, nil)
	}
	switch {
	case req.EntryId == "":
		return fail(status.Error(codes.InvalidArgument, "malformed param: missing entry ID"))
	case len(req.Audience) == 0:
		return fail(status.Error(codes.InvalidArgument, "malformed param: at least one audience is required"))
	}
	e, err := a.c.Registry.AuthorizedEntry(c.ID, registry.EntryID(req.EntryId))
	if errors.Is(err, registry.ErrNotFound) {
		if _, err = a.c.Registry.Barrier(ctx); err == nil {
			e, err = a.c.Registry.AuthorizedEntry(c.ID, registry.EntryID(req.EntryId))
		}
		if errors.Is(err, registry.ErrNotFound) {
			err = a.c.Registry.Missing(c.ID, registry.EntryID(req.EntryId))
		}
	}
	if err != nil {
		return fail(err)
	}
	svid, err := a.signJWT(ctx, e, req.Audience)
	if err != nil {
		return fail(err)
	}
	a.canary(ctx, c, e, "jwt")
	rec := JWTRecord(a.c.Now(), c, e.SPIFFEID.String(), req.Audience, svid)
	rec.Details["entry_id"] = string(e.ID)
	if err := a.audit(ctx, auditlog.Essential, rec); err != nil {
		return fail(err)
	}
	if err := a.stillAdmitted(c); err != nil {
		return fail(err)
	}
	a.c.Issued("jwt", "", 1)
	return &svidv1.NewJWTSVIDResponse{Svid: &types.JWTSVID{Token: svid.Token, Id: protoID(e.SPIFFEID), ExpiresAt: svid.Expiry.Unix(), IssuedAt: svid.IssuedAt.Unix()}}, nil
}

// IssueJWTSVIDs signs a JWT-SVID per item. [DESIGN §6]
func (a *API) IssueJWTSVIDs(ctx context.Context, req *nodev1.IssueJWTSVIDsRequest) (*nodev1.IssueJWTSVIDsResponse, error) {
	c := access.From(ctx)
	ids := make([]registry.EntryID, len(req.Items))
	for i, it := range req.Items {
		ids[i] = registry.EntryID(it.GetEntryId())
	}
	entries, err := a.authorizedEntries(ctx, c, "items", ids)
	if err != nil {
		return nil, err
	}
	out := &nodev1.IssueJWTSVIDsResponse{Results: make([]*nodev1.IssueJWTSVIDsResponse_Result, len(req.Items))}
	records := make([]auditlog.Record, len(req.Items))
	sign := func(i int) {
		now := a.c.Now()
		var svid *authority.JWTSVID
		err := error(nil)
		if e := entries[i]; e == nil {
			err = a.c.Registry.Missing(c.ID, ids[i])
		} else {
			svid, err = a.signJWT(ctx, e, req.Items[i].GetAudience())
		}
		if err != nil {
			st := status.Convert(a.toStatus(err))
			out.Results[i] = &nodev1.IssueJWTSVIDsResponse_Result{Code: int32(st.Code()), Message: st.Message()}
			records[i] = auditlog.Record{Time: now, Event: "jwtsvid.refused", Actor: c.ID.String(), ActorKind: "agent", Subject: clip(req.Items[i].GetEntryId()),
				Outcome: auditlog.Refused, Details: map[string]any{"reason": excerpt(st.Message())}}
			return
		}
		out.Results[i] = &nodev1.IssueJWTSVIDsResponse_Result{Token: svid.Token, IssuedAt: svid.IssuedAt.Unix(), ExpiresAt: svid.Expiry.Unix()}
		records[i] = JWTRecord(now, c, entries[i].SPIFFEID.String(), req.Items[i].GetAudience(), svid)
		records[i].Details["entry_id"] = string(entries[i].ID)
	}
	spread(len(req.Items), parallelJWTs, sign)
	var issued, refusals []auditlog.Record
	for i, r := range out.Results {
		if r.Code == 0 {
			a.canary(ctx, c, entries[i], "jwt")
			issued = append(issued, records[i])
		} else {
			refusals = append(refusals, records[i])
		}
	}
	if err := a.audit(ctx, auditlog.Essential, issued...); err != nil {
		return nil, a.toStatus(err) // nothing leaves unlogged
	}
	if err := a.stillAdmitted(c); err != nil {
		return nil, err
	}
	a.auditRefused(ctx, refusals)
	a.c.Issued("jwt", "", len(issued))
	a.c.Issued("jwt", "refused", len(refusals))
	return out, nil
}

// spread calls f for 0 to n-1, from as many goroutines as there are processors if there are enough of them.
func spread(n, parallelFrom int, f func(int)) {
	workers := runtime.GOMAXPROCS(0)
	if n < parallelFrom {
		workers = 1
	}
	var next atomic.Int64
	work := func() {
		for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
			f(i)
		}
	}
	var wg sync.WaitGroup
	for range workers - 1 {
		wg.Go(work)
	}
	work()
	wg.Wait()
}

// authorizedEntries returns, positionally, those of the calling agent's entries that are asked for, nil for others.
// field is what the request calls the list.
func (a *API) authorizedEntries(ctx context.Context, c *access.Caller, field string, ids []registry.EntryID) ([]*registry.Entry, error) {
	switch n := len(ids); {
	case n == 0:
		return nil, status.Errorf(codes.InvalidArgument, "%s: at least one is needed", field)
	case n > MaxBatch:
		return nil, status.Errorf(codes.ResourceExhausted, "%s: %d in one call, at most %d are allowed", field, n, MaxBatch)
	}
	entries := a.c.Registry.AuthorizedEntries(c.ID, ids)
	if slices.Contains(entries, nil) {
		// Never refuse from an index that lags: what was created before this call is found.
		if _, err := a.c.Registry.Barrier(ctx); err != nil {
			return nil, a.toStatus(err)
		}
		entries = a.c.Registry.AuthorizedEntries(c.ID, ids)
	}
	return entries, nil
}

// JWTRecord is the audit record of an issued JWT-SVID. The token itself is not in it.
func JWTRecord(now time.Time, c *access.Caller, subject string, audience []string, svid *authority.JWTSVID) auditlog.Record {
	d := map[string]any{"audience": audience, "not_after": svid.Expiry.Unix(), "authority": svid.KeyID}
	if svid.JTI != "" {
		d["jti"] = svid.JTI
	}
	return auditlog.Record{Time: now, Event: "jwtsvid.issued", Actor: c.String(), ActorKind: c.KindName(), Subject: subject, Outcome: auditlog.Done, Details: d}
}
