package cli

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/analyse"
	"github.com/signet-id/signet/spiffe"
)

// live is the word for the policies in force at the CA.
const live = "live"

// Bounds of what is read of recorded decisions.
const (
	maxRecords    = 1_000_000
	maxRecordsIn  = 256 << 20
	maxRecordLine = 64 << 10
)

// A side is policies to look at, with who there is as far as it is known.
type side struct {
	set   *policyv1.PolicySet
	td    spiffeid.TrustDomain
	known *analyse.Known
	docs  map[string]*strictyaml.Document
	// identities tells that IDs are known.
	identities bool
	// unknown are the clusters of which the CA does not know the pods.
	unknown []string
}

// side reads policies and Identities from files, or from the CA if there are none.
func (a *app) side(cmd *cobra.Command, files []string, trustDomain string) (*side, error) {
	if len(files) == 0 || len(files) == 1 && files[0] == live {
		var s *side
		return s, a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) (err error) {
			if s, err = liveSide(ctx, c); err == nil {
				a.warnUnknown(s.unknown)
			}
			return err
		})
	}
	if trustDomain == "" {
		return nil, &usageError{err: fmt.Errorf("--trust-domain is missing: whose services the documents speak of"), hint: example(cmd)}
	}
	td, err := spiffe.ParseTrustDomain(trustDomain)
	if err != nil {
		return nil, usagef("--trust-domain: %w", err)
	}
	docs, err := a.documentsFrom(cmd, files)
	if err != nil {
		return nil, err
	}
	compiled, err := compileDocuments(docs, td)
	if err != nil {
		return nil, err
	}
	s := &side{set: compiled.Set(), td: td, docs: map[string]*strictyaml.Document{}}
	var ids []spiffeid.ID
	var templates []string
	var foreign []spiffeid.TrustDomain
	for i, doc := range docs {
		switch kind, _, _, _ := doc.Field("kind"); kind {
		case policy.KindCallPolicy:
			name, _, _, _ := doc.Field("name")
			s.docs[name] = &docs[i]
		case registry.KindIdentity:
			e, err := registry.ParseIdentity(doc, td)
			if err != nil {
				return nil, err
			}
			if e.Template == nil {
				ids = append(ids, e.SPIFFEID)
			} else {
				templates = append(templates, e.Pattern(td))
			}
			foreign = append(foreign, e.FederatesWith...)
		}
	}
	s.known, s.identities = analyse.NewKnown(td, slices.Values(ids), foreign).WithTemplates(templates, true), len(ids)+len(templates) > 0
	return s, nil
}

func liveSide(ctx context.Context, c *caConn) (*side, error) {
	p, td, err := livePolicies(ctx, c)
	if err != nil {
		return nil, err
	}
	s := &side{set: p.Set(), td: td, identities: true}
	all, err := everybody(ctx, c)
	if err != nil {
		return nil, err
	}
	s.unknown = all.unknown
	var foreign []spiffeid.TrustDomain
	for token := ""; ; {
		page, err := bundlev1.NewBundleClient(c).ListFederatedBundles(ctx, &bundlev1.ListFederatedBundlesRequest{PageSize: bundlePage, PageToken: token, OutputMask: &types.BundleMask{}})
		if err != nil {
			return nil, caError("listing bundles", c, err)
		}
		for _, b := range page.GetBundles() {
			if f, err := spiffeid.TrustDomainFromString(b.GetTrustDomain()); err == nil {
				foreign = append(foreign, f)
			}
		}
		if token = page.GetNextPageToken(); token == "" {
			break
		}
	}
	s.known = analyse.NewKnown(td, slices.Values(all.ids), foreign).WithTemplates(all.templates, len(all.unknown) > 0)
	return s, nil
}

// everyone is who there is, by the CA.
type everyone struct {
	ids       []spiffeid.ID
	templates []string // patterns of what pods may have
	unknown   []string // clusters whose pods are not known now
}

// everybody asks the CA who there is. An older one, and a SPIRE server, know registered entries alone.
func everybody(ctx context.Context, c *caConn) (*everyone, error) {
	const doing = "asking the CA which SPIFFE IDs there are"
	out := &everyone{}
	stream, err := adminv1.NewEntriesClient(c).ListIDs(ctx, &adminv1.ListIDsRequest{})
	if err != nil {
		return nil, caError(doing, c, err)
	}
	for {
		part, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return out, nil
		case status.Code(err) == codes.Unimplemented:
			return out, registeredIDs(ctx, c, out)
		case err != nil:
			return nil, caError(doing, c, err)
		}
		for _, s := range part.GetIds() {
			if id, err := spiffeid.FromString(s); err == nil {
				out.ids = append(out.ids, id)
			}
		}
		out.templates = append(out.templates, part.GetTemplates()...)
		out.unknown = append(out.unknown, part.GetUnknownClusters()...)
	}
}

// registeredIDs adds the IDs of all registered entries.
func registeredIDs(ctx context.Context, c *caConn, out *everyone) error {
	for token := ""; ; {
		page, err := entryv1.NewEntryClient(c).ListEntries(ctx, &entryv1.ListEntriesRequest{PageSize: entryPage, PageToken: token, OutputMask: &types.EntryMask{SpiffeId: true}})
		if err != nil {
			return caError("listing registration entries", c, err)
		}
		for _, e := range page.GetEntries() {
			if id, err := spiffeid.FromString("spiffe://" + e.GetSpiffeId().GetTrustDomain() + e.GetSpiffeId().GetPath()); err == nil {
				out.ids = append(out.ids, id)
			}
		}
		if token = page.GetNextPageToken(); token == "" {
			return nil
		}
	}
}

// observed reads recorded decisions, a JSON object each line, from a file, or asks the CA for those it keeps.
func (a *app) observed(cmd *cobra.Command, file string, service string) ([]*policyv1.Observation, error) {
	var out []*policyv1.Observation
	if file == "" || file == live {
		return out, a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			return eachObservation(ctx, c, &adminv1.ListObservationsRequest{Service: service, Limit: maxRecords}, func(o *policyv1.Observation) { out = append(out, o) })
		})
	}
	data, err := a.readInput(file, maxRecordsIn)
	if err != nil {
		return nil, err
	}
	lines := bufio.NewScanner(bytes.NewReader(data))
	lines.Buffer(nil, maxRecordLine)
	for n := 1; lines.Scan(); n++ {
		if len(bytes.TrimSpace(lines.Bytes())) == 0 {
			continue
		}
		if len(out) == maxRecords {
			return nil, fmt.Errorf("%s has more than %d records: cut it into parts", inputName(file), maxRecords)
		}
		o := new(policyv1.Observation)
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(lines.Bytes(), o); err != nil {
			return nil, withHint(fmt.Errorf("%s:%d: not a recorded decision: %w", inputName(file), n, err), "'signet policy observed' writes such a file")
		}
		if service == "" || o.GetService() == service {
			out = append(out, o)
		}
	}
	if err := lines.Err(); err != nil {
		if errors.Is(err, bufio.ErrTooLong) {
			return nil, fmt.Errorf("%s: a line has more than %d bytes", inputName(file), maxRecordLine)
		}
		return nil, err
	}
	return out, nil
}

// serviceID makes the ID of a flag full; empty stays empty.
func serviceID(flag, s string, td spiffeid.TrustDomain) (string, error) {
	if s == "" {
		return "", nil
	}
	if strings.HasPrefix(s, "/") {
		s = td.IDString() + s
	}
	id, err := fullID(flag, s)
	return id.String(), err
}
