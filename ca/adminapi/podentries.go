package adminapi

import (
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/spiffe"
)

// EntriesServer is signet.admin.v1.Entries.
type EntriesServer struct {
	adminv1.UnimplementedEntriesServer
	*API
}

// maxListPart bounds one part of a list, well below what gRPC's clients take.
const maxListPart = 1 << 20

// ListIDs says which SPIFFE IDs there are.
func (a EntriesServer) ListIDs(_ *adminv1.ListIDsRequest, stream grpc.ServerStreamingServer[adminv1.ListIDsResponse]) error {
	ids, templates, unknown := a.c.Registry.Everybody()
	part := &adminv1.ListIDsResponse{Templates: templates, UnknownClusters: unknown}
	size := 0
	for _, id := range ids {
		text := id.String()
		if size += len(text) + 4; size > maxListPart { // 4: its tag and length
			if err := stream.Send(part); err != nil {
				return err
			}
			part, size = &adminv1.ListIDsResponse{}, len(text)+4
		}
		part.Ids = append(part.Ids, text)
	}
	return stream.Send(part)
}

// ListPodEntries says which entries there are for pods.
func (a EntriesServer) ListPodEntries(req *adminv1.ListPodEntriesRequest, stream grpc.ServerStreamingServer[adminv1.ListPodEntriesResponse]) error {
	keep, err := a.podFilter(req)
	if err != nil {
		return a.toStatus(err)
	}
	part := &adminv1.ListPodEntriesResponse{UnknownClusters: a.c.Registry.UnknownClusters()}
	entries := a.c.Registry.PodEntries(keep)
	slices.SortFunc(entries, func(a, b *registry.Entry) int { return strings.Compare(string(a.ID), string(b.ID)) })
	size := 0
	for _, e := range entries {
		m := podEntry(e)
		n := proto.Size(m) + 8
		if size += n; size > maxListPart {
			if err := stream.Send(part); err != nil {
				return err
			}
			part, size = &adminv1.ListPodEntriesResponse{}, n
		}
		part.Entries = append(part.Entries, m)
	}
	return stream.Send(part)
}

// podFilter returns what a request asks for.
func (a EntriesServer) podFilter(req *adminv1.ListPodEntriesRequest) (func(*registry.Entry) bool, error) {
	var id, parent spiffeid.ID
	var err error
	for _, f := range []struct {
		field, value string
		into         *spiffeid.ID
	}{{"spiffe_id", req.SpiffeId, &id}, {"parent_id", req.ParentId, &parent}} {
		if f.value == "" {
			continue
		}
		if *f.into, err = spiffe.ParseID(f.value); err != nil {
			return nil, &registry.ValidationError{Field: f.field, Value: f.value, Problem: err.Error()}
		}
	}
	if n := max(len(req.Selectors), len(req.FederatesWith)); n > maxFilterItems {
		return nil, tooManyItems("selectors, federates_with", n)
	}
	var selectors []spiffe.Selector
	for _, s := range req.Selectors {
		sel, err := spiffe.ParseSelector(s)
		if err != nil {
			return nil, &registry.ValidationError{Field: "selectors", Value: s, Problem: err.Error()}
		}
		selectors = append(selectors, sel)
	}
	var federates []spiffeid.TrustDomain
	for _, name := range req.FederatesWith {
		td, err := federated(name)
		if err != nil {
			return nil, &registry.ValidationError{Field: "federates_with", Value: name, Problem: err.Error()}
		}
		federates = append(federates, td)
	}
	is := func(want, have string) bool { return want == "" || want == have }
	return func(e *registry.Entry) bool {
		return (id.IsZero() || e.SPIFFEID == id) && (parent.IsZero() || e.ParentID == parent) &&
			is(req.Cluster, e.Pod.Cluster) && is(req.Namespace, e.Pod.Namespace) && is(req.Pod, e.Pod.Name) && is(req.Node, e.Pod.NodeName) &&
			(req.Identity == "" || e.Rule == registry.RuleName(req.Identity)) && (req.Hint == nil || e.Hint == *req.Hint) &&
			(len(selectors) == 0 || registry.MatchSelectors(registry.MatchSuperset, e.Selectors, selectors)) &&
			!slices.ContainsFunc(federates, func(td spiffeid.TrustDomain) bool { return !slices.Contains(e.FederatesWith, td) })
	}, nil
}

func podEntry(e *registry.Entry) *adminv1.PodEntry {
	out := &adminv1.PodEntry{Id: string(e.ID), SpiffeId: e.SPIFFEID.String(), ParentId: e.ParentID.String(), Cluster: e.Pod.Cluster, Namespace: e.Pod.Namespace,
		Pod: e.Pod.Name, PodUid: e.Pod.UID, Node: e.Pod.NodeName, Rule: e.Rule, X509Ttl: int64(e.X509TTL.Seconds()), JwtTtl: int64(e.JWTTTL.Seconds()),
		DnsNames: e.DNSNames, Hint: e.Hint, Revision: int64(e.Revision)}
	for _, s := range e.Selectors {
		out.Selectors = append(out.Selectors, s.String())
	}
	for _, td := range e.FederatesWith {
		out.FederatesWith = append(out.FederatesWith, td.Name())
	}
	if !e.ExpiresAt.IsZero() {
		out.ExpiresAt = e.ExpiresAt.Unix()
	}
	return out
}
