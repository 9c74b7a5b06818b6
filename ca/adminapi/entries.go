package adminapi

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/spireproto"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

// maxBatch bounds the batch RPCs for entries.
const maxBatch = 1000

// fill sets those fields of e that the mask names from in. Nil is all.
func (a *API) fill(e *registry.Entry, in *types.Entry, m *types.EntryMask) error {
	if m == nil {
		m = spireproto.AllEntryFields()
	}
	var err error
	if m.SpiffeId {
		if e.SPIFFEID, err = a.ownID("spiffe_id", in.SpiffeId); err != nil {
			return err
		}
	}
	if m.ParentId {
		if e.ParentID, err = a.ownID("parent_id", in.ParentId); err != nil {
			return err
		}
	}
	if m.Selectors {
		if e.Selectors, err = selectors("selectors", in.Selectors); err != nil {
			return err
		}
	}
	if m.X509SvidTtl {
		e.X509TTL = time.Duration(in.X509SvidTtl) * time.Second
	}
	if m.JwtSvidTtl {
		e.JWTTTL = time.Duration(in.JwtSvidTtl) * time.Second
	}
	if m.FederatesWith {
		e.FederatesWith = nil
		for _, name := range in.FederatesWith {
			td, err := federated(name)
			if err != nil {
				return &registry.ValidationError{Field: "federates_with", Value: name, Problem: err.Error()}
			}
			e.FederatesWith = append(e.FederatesWith, td)
		}
	}
	if m.ExpiresAt {
		e.ExpiresAt = time.Time{}
		if in.ExpiresAt < 0 {
			return &registry.ValidationError{Field: "expires_at", Problem: "must not be negative; 0 means never"}
		}
		if in.ExpiresAt > 0 {
			e.ExpiresAt = time.Unix(in.ExpiresAt, 0).UTC()
		}
	}
	if m.DnsNames {
		e.DNSNames = in.DnsNames
	}
	if m.Hint {
		e.Hint = in.Hint
	}
	if m.Admin {
		e.Admin = in.Admin
	}
	if m.Downstream {
		e.Downstream = in.Downstream
	}
	if m.StoreSvid {
		e.StoreSVID = in.StoreSvid
	}
	if m.AdditionalAttributes {
		e.NoX509Prefetch = in.GetAdditionalAttributes().GetDisableX509SvidPrefetch()
		e.JWTIncludeJTI = in.GetAdditionalAttributes().GetJwtSvidIncludeJti()
	}
	return nil
}

func selectors(field string, in []*types.Selector) ([]spiffe.Selector, error) {
	var out []spiffe.Selector
	for _, s := range in {
		sel, err := spiffe.ParseSelector(s.GetType() + ":" + s.GetValue())
		if err != nil {
			return nil, &registry.ValidationError{Field: field, Value: s.GetType() + ":" + s.GetValue(), Problem: err.Error()}
		}
		if sel.Type != s.GetType() {
			return nil, &registry.ValidationError{Field: field, Value: s.GetType(), Problem: "a selector's type must not hold a colon"}
		}
		out = append(out, sel)
	}
	return out, nil
}

func entryDetails(e *registry.Entry) map[string]any {
	d := map[string]any{"entry_id": string(e.ID), "parent_id": e.ParentID.String()}
	var ss []string
	for _, s := range e.Selectors {
		ss = append(ss, s.String())
	}
	d["selectors"] = bounded(ss)
	if e.Admin {
		d["admin"] = true
	}
	if e.Downstream {
		d["downstream"] = true
	}
	return d
}

// BatchCreateEntry registers entries, each with its own status. [SPIRE-PROTOCOL §14]
func (a *API) BatchCreateEntry(ctx context.Context, req *entryv1.BatchCreateEntryRequest) (*entryv1.BatchCreateEntryResponse, error) {
	if len(req.Entries) > maxBatch {
		return nil, status.Errorf(codes.ResourceExhausted, "entries: %d in one call, at most %d are allowed", len(req.Entries), maxBatch)
	}
	out := &entryv1.BatchCreateEntryResponse{Results: make([]*entryv1.BatchCreateEntryResponse_Result, len(req.Entries))}
	var entries []*registry.Entry
	var index []int
	var subjects []string
	var records []auditlog.Record
	for i, in := range req.Entries {
		e := &registry.Entry{}
		if in == nil {
			in = &types.Entry{}
		}
		e.ID = registry.EntryID(in.Id)
		if err := a.fill(e, in, nil); err != nil {
			out.Results[i] = &entryv1.BatchCreateEntryResponse_Result{Status: a.itemStatus(err)}
			records = append(records, a.record(ctx, "entry.create", clip(givenID(in.SpiffeId)), err, nil))
			continue
		}
		entries, index, subjects = append(entries, e), append(index, i), append(subjects, e.SPIFFEID.String())
	}
	if len(entries) > 0 {
		if err := a.intend(ctx, auditlog.New, "entry.create", subjects, nil); err != nil {
			return nil, a.toStatus(err)
		}
	}
	for j, res := range a.c.Registry.CreateEntries(ctx, entries) {
		r := &entryv1.BatchCreateEntryResponse_Result{Status: a.itemStatus(res.Err)}
		shown := res.Entry
		if x, ok := errors.AsType[*registry.ExistsError](res.Err); ok {
			shown = x.Existing // SPIRE returns what stands in the way
		}
		if shown != nil && (res.Err == nil || shown != res.Entry) {
			r.Entry = spireproto.Entry(shown, req.OutputMask)
		}
		out.Results[index[j]] = r
		records = append(records, a.record(ctx, "entry.create", entries[j].SPIFFEID.String(), res.Err, entryDetails(entries[j])))
	}
	a.outcome(ctx, auditlog.New, records...)
	return out, nil
}

// BatchUpdateEntry changes those fields of entries that the input mask names. [SPIRE-PROTOCOL §14]
func (a *API) BatchUpdateEntry(ctx context.Context, req *entryv1.BatchUpdateEntryRequest) (*entryv1.BatchUpdateEntryResponse, error) {
	if len(req.Entries) > maxBatch {
		return nil, status.Errorf(codes.ResourceExhausted, "entries: %d in one call, at most %d are allowed", len(req.Entries), maxBatch)
	}
	var subjects []string
	for _, in := range req.Entries {
		subjects = append(subjects, clip(in.GetId()))
	}
	if err := a.intend(ctx, auditlog.New, "entry.update", subjects, nil); err != nil {
		return nil, a.toStatus(err)
	}
	out := &entryv1.BatchUpdateEntryResponse{}
	var records []auditlog.Record
	for _, in := range req.Entries {
		if in == nil {
			in = &types.Entry{}
		}
		var e *registry.Entry
		err := checkGivenID(in.Id)
		if err == nil {
			e, err = a.c.Registry.UpdateEntry(ctx, registry.EntryID(in.Id), func(e *registry.Entry) error { return a.fill(e, in, req.InputMask) })
		}
		r := &entryv1.BatchUpdateEntryResponse_Result{Status: a.itemStatus(err)}
		subject, details := clip(in.Id), map[string]any(nil)
		if err == nil {
			r.Entry = spireproto.Entry(e, req.OutputMask)
			subject, details = e.SPIFFEID.String(), entryDetails(e)
		}
		out.Results = append(out.Results, r)
		records = append(records, a.record(ctx, "entry.update", subject, err, details))
	}
	a.outcome(ctx, auditlog.New, records...)
	return out, nil
}

// BatchDeleteEntry removes entries. [SPIRE-PROTOCOL §14]
func (a *API) BatchDeleteEntry(ctx context.Context, req *entryv1.BatchDeleteEntryRequest) (*entryv1.BatchDeleteEntryResponse, error) {
	if len(req.Ids) > maxBatch {
		return nil, status.Errorf(codes.ResourceExhausted, "ids: %d in one call, at most %d are allowed", len(req.Ids), maxBatch)
	}
	subjects := make([]string, len(req.Ids))
	for i, id := range req.Ids {
		subjects[i] = clip(id)
	}
	if err := a.intend(ctx, auditlog.Essential, "entry.delete", subjects, nil); err != nil {
		return nil, a.toStatus(err)
	}
	out := &entryv1.BatchDeleteEntryResponse{}
	var records []auditlog.Record
	for _, id := range req.Ids {
		var e *registry.Entry
		err := checkGivenID(id)
		if err == nil {
			e, _, err = a.c.Registry.DeleteEntry(store.WithReserve(ctx), registry.EntryID(id))
		}
		out.Results = append(out.Results, &entryv1.BatchDeleteEntryResponse_Result{Id: id, Status: a.itemStatus(err)})
		subject, details := clip(id), map[string]any(nil)
		if e != nil {
			subject, details = e.SPIFFEID.String(), entryDetails(e)
		}
		records = append(records, a.record(ctx, "entry.delete", subject, err, details))
	}
	a.outcome(ctx, auditlog.Essential, records...)
	return out, nil
}

// checkGivenID tells an ID that was forgotten from one that is not there.
func checkGivenID(id string) error {
	if id == "" {
		return &registry.ValidationError{Field: "id", Problem: "missing"}
	}
	return nil
}

// GetEntry returns one entry. [SPIRE-PROTOCOL §14]
func (a *API) GetEntry(_ context.Context, req *entryv1.GetEntryRequest) (*types.Entry, error) {
	if err := checkGivenID(req.Id); err != nil {
		return nil, a.toStatus(err)
	}
	e, err := a.c.Registry.AnyEntry(registry.EntryID(req.Id))
	if err != nil || e.Template != nil { // SPIRE has no form for a template
		return nil, status.Errorf(codes.NotFound, "entry %q not found", clip(req.Id))
	}
	return spireproto.Entry(e, req.OutputMask), nil
}

// ListEntries returns a page of matching entries in order of ID. [SPIRE-PROTOCOL §14]
func (a *API) ListEntries(_ context.Context, req *entryv1.ListEntriesRequest) (*entryv1.ListEntriesResponse, error) {
	f, err := a.filter(req.Filter)
	if err != nil {
		return nil, a.toStatus(err)
	}
	size, err := pageSize(req.PageSize)
	if err != nil {
		return nil, a.toStatus(err)
	}
	after, err := readToken(req.PageToken)
	if err == nil && after != "" && registry.EntryID(after).Check() != nil {
		err = &registry.ValidationError{Field: "page_token", Problem: "is not one that this CA handed out for entries"}
	}
	if err != nil {
		return nil, a.toStatus(err)
	}
	page, more := a.c.Registry.ListEntries(f, registry.EntryID(after), size)
	if err := checkUnpaged(req.PageSize, more); err != nil {
		return nil, err
	}
	out := &entryv1.ListEntriesResponse{}
	sum := 0
	for i, e := range page {
		m := spireproto.Entry(e, req.OutputMask)
		if sum += proto.Size(m); req.PageSize > 0 && i > 0 && sum > maxPageBytes {
			out.NextPageToken = writeToken(string(page[i-1].ID))
			return out, nil
		}
		if err := checkUnpaged(req.PageSize, sum > maxUnpagedBytes); err != nil {
			return nil, err
		}
		out.Entries = append(out.Entries, m)
	}
	if more {
		out.NextPageToken = writeToken(string(page[len(page)-1].ID))
	}
	return out, nil
}

// CountEntries counts matching entries. [SPIRE-PROTOCOL §14]
func (a *API) CountEntries(_ context.Context, req *entryv1.CountEntriesRequest) (*entryv1.CountEntriesResponse, error) {
	var in *entryv1.ListEntriesRequest_Filter
	if f := req.Filter; f != nil {
		in = &entryv1.ListEntriesRequest_Filter{BySpiffeId: f.BySpiffeId, ByParentId: f.ByParentId, BySelectors: f.BySelectors,
			ByFederatesWith: f.ByFederatesWith, ByHint: f.ByHint, ByDownstream: f.ByDownstream}
	}
	f, err := a.filter(in)
	if err != nil {
		return nil, a.toStatus(err)
	}
	return &entryv1.CountEntriesResponse{Count: int32(min(a.c.Registry.CountEntries(f), math.MaxInt32))}, nil
}

// maxFilterItems bounds the lists of a filter, which are compared with those of every entry.
const maxFilterItems = 1000

func tooManyItems(field string, n int) error {
	return &registry.ValidationError{Field: field, Problem: fmt.Sprintf("has %d items, at most %d are allowed", n, maxFilterItems)}
}

func (a *API) filter(in *entryv1.ListEntriesRequest_Filter) (f registry.EntryFilter, err error) {
	if in == nil {
		return f, nil
	}
	if in.BySpiffeId != nil {
		if f.SPIFFEID, err = a.ownID("filter.by_spiffe_id", in.BySpiffeId); err != nil {
			return f, err
		}
	}
	if in.ByParentId != nil {
		if f.ParentID, err = a.ownID("filter.by_parent_id", in.ByParentId); err != nil {
			return f, err
		}
	}
	if m := in.BySelectors; m != nil {
		if len(m.Selectors) == 0 {
			return f, &registry.ValidationError{Field: "filter.by_selectors", Problem: "needs at least one selector"}
		}
		if len(m.Selectors) > maxFilterItems {
			return f, tooManyItems("filter.by_selectors", len(m.Selectors))
		}
		if f.Selectors, err = selectors("filter.by_selectors", m.Selectors); err != nil {
			return f, err
		}
		if f.SelectorMatch, err = matchKind("filter.by_selectors", int32(m.Match)); err != nil {
			return f, err
		}
	}
	if m := in.ByFederatesWith; m != nil {
		if len(m.TrustDomains) == 0 {
			return f, &registry.ValidationError{Field: "filter.by_federates_with", Problem: "needs at least one trust domain"}
		}
		if len(m.TrustDomains) > maxFilterItems {
			return f, tooManyItems("filter.by_federates_with", len(m.TrustDomains))
		}
		for _, name := range m.TrustDomains {
			td, err := federated(name)
			if err != nil {
				return f, &registry.ValidationError{Field: "filter.by_federates_with", Value: name, Problem: err.Error()}
			}
			f.FederatesWith = append(f.FederatesWith, td)
		}
		if f.FederatesMatch, err = matchKind("filter.by_federates_with", int32(m.Match)); err != nil {
			return f, err
		}
	}
	if in.ByHint != nil {
		f.Hint = &in.ByHint.Value
	}
	// False asks for nothing at SPIRE, and its command line always says it.
	if in.ByDownstream.GetValue() {
		f.Downstream = &in.ByDownstream.Value
	}
	return f, nil
}

// federated reads the name of a trust domain. SPIRE's command line writes it as its SPIFFE ID.
func federated(name string) (spiffeid.TrustDomain, error) {
	return spiffe.ParseTrustDomain(strings.TrimPrefix(name, "spiffe://"))
}

// matchKind maps SPIRE's numbers, which both of its match types share.
func matchKind(field string, n int32) (registry.MatchKind, error) {
	switch types.SelectorMatch_MatchBehavior(n) {
	case types.SelectorMatch_MATCH_EXACT:
		return registry.MatchExact, nil
	case types.SelectorMatch_MATCH_SUBSET:
		return registry.MatchSubset, nil
	case types.SelectorMatch_MATCH_SUPERSET:
		return registry.MatchSuperset, nil
	case types.SelectorMatch_MATCH_ANY:
		return registry.MatchAny, nil
	}
	return 0, &registry.ValidationError{Field: field, Problem: "unknown match behaviour"}
}

// A page token is the last ID of the page before, so that it stays good however the set changes meanwhile. Whoever makes
// one up begins where they say, and sees what they may see anyway.
const tokenPrefix = "1:"

func writeToken(last string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(tokenPrefix + last))
}

func readToken(token string) (string, error) {
	if token == "" {
		return "", nil
	}
	const maxTokenBytes = 4096
	bad := &registry.ValidationError{Field: "page_token", Problem: "is not one that this CA handed out"}
	if len(token) > maxTokenBytes {
		return "", bad
	}
	b, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil {
		return "", bad
	}
	last, ok := strings.CutPrefix(string(b), tokenPrefix)
	// IDs and names are of printable ASCII, and each has one token: the decoder passes over line ends and spare bits.
	if !ok || last == "" || strings.ContainsFunc(last, func(r rune) bool { return r <= ' ' || r > '~' }) || writeToken(last) != token {
		return "", bad
	}
	return last, nil
}

// givenID is an ID as the caller gave it, right or wrong, for the record of a refusal.
func givenID(id *types.SPIFFEID) string {
	if id.GetTrustDomain() == "" {
		return id.GetPath()
	}
	return "spiffe://" + id.GetTrustDomain() + id.GetPath()
}

func clip(s string) string {
	if len(s) > 256 {
		return strings.ToValidUTF8(s[:256], "") + "..."
	}
	return s
}
