package ca

import (
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/ca/kube/pods"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/bolt"
)

// Everything else of signet, for identities that are worked out from pods.

// watchedPods is a CA that knows the pods of cluster prod, with a template.
func watchedPods(t *testing.T, c Config, all ...*pods.Pod) (*harness, *pods.Expander) {
	t.Helper()
	h := start(t, c)
	x := h.expander()
	x.Update("prod", all, nil)
	x.Synced("prod", true)
	h.applied("kind: Identity\nname: cluster-default\nspiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}\non: [k8s_psat:cluster:prod]\n")
	return h, x
}

// applied applies documents and waits until pods have what they say.
func (h *harness) applied(docs string) *adminv1.ApplyResponse {
	h.t.Helper()
	r := h.apply(docs)
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	defer cancel()
	if err := h.ca.reg.WaitFor(ctx, 0); err != nil {
		h.t.Fatal(err)
	}
	return r
}

// untilPods waits until pods have what a test expects.
func (h *harness) untilPods(what string, ok func() bool) {
	h.t.Helper()
	deadline := time.NewTimer(time.Minute)
	tick := time.NewTicker(2 * time.Millisecond)
	defer deadline.Stop()
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			h.t.Fatalf("never: %s", what)
		}
	}
}

func (h *harness) podEntries(req *adminv1.ListPodEntriesRequest) (entries []*adminv1.PodEntry, unknown []string) {
	h.t.Helper()
	stream, err := adminv1.NewEntriesClient(h.admin).ListPodEntries(h.t.Context(), req)
	if err != nil {
		h.t.Fatal(err)
	}
	for {
		part, err := stream.Recv()
		if err == io.EOF {
			return entries, unknown
		}
		if err != nil {
			h.t.Fatal(err)
		}
		entries, unknown = append(entries, part.Entries...), append(unknown, part.UnknownClusters...)
	}
}

func (h *harness) tryApply(docs string) (*adminv1.ApplyResponse, error) {
	return adminv1.NewAdminClient(h.admin).Apply(h.t.Context(), &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(docs), File: "test.yaml"}}})
}

// TestLockoutOfPods: services and callers that only pods are count for the guard, also when it is not known which pods there are.
func TestLockoutOfPods(t *testing.T) {
	h, x := watchedPods(t, config(t.TempDir()), aPod("1", "node-a", "bank"), aPod("2", "node-a", "shop"), aPod("3", "node-b", "shop"))
	h.untilPods("three entries", func() bool { return h.ca.reg.CountPodEntries("") == 3 })
	h.apply("kind: CallPolicy\nname: bank\nservice: /ns/bank/sa/*\nallow: [{from: [/ns/*/sa/sa-shop]}]\n")
	const gone = "kind: CallPolicy\nname: bank\nservice: /ns/bank/sa/*\nallow: [{from: [/nobody]}]\n"
	const who = "spiffe://example.org/ns/bank/sa/sa-bank can be called by nobody any more: it locks out 1 caller that may call it now: spiffe://example.org/ns/shop/sa/sa-shop"
	if _, err := h.tryApply(gone); code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), who) {
		t.Errorf("a caller that is a pod: %v", err)
	}
	_, err := adminv1.NewAdminClient(h.admin).DeleteResource(t.Context(), &adminv1.DeleteResourceRequest{Kind: "CallPolicy", Name: "bank"})
	if code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), who) {
		t.Errorf("deleted: %v", err)
	}
	_, err = adminv1.NewRolloutsClient(h.admin).StartRollout(t.Context(), &adminv1.StartRolloutRequest{Name: "r", Steps: []int32{50}, Documents: []*adminv1.Document{{Content: []byte(gone), File: "test.yaml"}}})
	if code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), who) {
		t.Errorf("rolled out: %v", err)
	}
	// Nobody runs any more who could call, and that is known.
	x.Update("prod", nil, []string{"2", "3"})
	plan, err := adminv1.NewAdminClient(h.admin).Plan(t.Context(), &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(gone), File: "test.yaml"}}})
	if err != nil || strings.Contains(strings.Join(plan.Warnings, "\n"), "can be called by nobody") {
		t.Errorf("nobody is locked out: %v, %v", plan, err)
	}
	// Now it is not known.
	x.Synced("prod", false)
	if _, err := h.tryApply(gone); code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "it locks out 1 caller that may call it now: spiffe://example.org/ns/*/sa/sa-shop") {
		t.Errorf("while the pods are not known: %v", err)
	}
	plan, err = adminv1.NewAdminClient(h.admin).Plan(t.Context(), &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(gone), File: "test.yaml"}}})
	if err != nil || !strings.Contains(strings.Join(plan.Warnings, "\n"), `which pods the cluster "prod" has is not known now`) {
		t.Errorf("the plan does not say so: %v, %v", plan, err)
	}
}

// TestListOfPods: filters, the order, what is not registered anywhere else, and who may ask.
func TestListOfPods(t *testing.T) {
	h, x := watchedPods(t, config(t.TempDir()), aPod("1", "node-a", "bank"), aPod("2", "node-a", "shop"), aPod("3", "node-b", "shop"))
	h.applied("kind: Identity\nname: web\nspiffeID: /web/{{ .k8s.pod }}\nmatch: [k8s:ns:shop, k8s:container-name:web]\nhint: external\nx509TTL: 10m\njwtTTL: 2m\nfederatesWith: [partner.example]\ndnsNames: ['{{ .k8s.sa }}.internal']\n" +
		"---\nkind: Identity\nname: plain\nspiffeID: /plain\nmatch: [unix:uid:1]\n")
	h.untilPods("five entries", func() bool { return h.ca.reg.CountPodEntries("") == 5 })
	all, unknown := h.podEntries(&adminv1.ListPodEntriesRequest{})
	if len(all) != 5 || len(unknown) != 0 || !slices.IsSortedFunc(all, func(a, b *adminv1.PodEntry) int { return strings.Compare(a.Id, b.Id) }) {
		t.Errorf("all: %v, %v", all, unknown)
	}
	external := "external"
	for i, tt := range []struct {
		req  *adminv1.ListPodEntriesRequest
		want int
	}{
		{&adminv1.ListPodEntriesRequest{Namespace: "shop"}, 4},
		{&adminv1.ListPodEntriesRequest{Namespace: "shop", Node: "name-node-a"}, 2},
		{&adminv1.ListPodEntriesRequest{Identity: "web"}, 2},
		{&adminv1.ListPodEntriesRequest{Identity: "plain"}, 0},
		{&adminv1.ListPodEntriesRequest{Hint: &external}, 2},
		{&adminv1.ListPodEntriesRequest{Hint: new(string)}, 3},
		{&adminv1.ListPodEntriesRequest{SpiffeId: "spiffe://example.org/ns/shop/sa/sa-shop"}, 2},
		{&adminv1.ListPodEntriesRequest{Selectors: []string{"k8s:pod-uid:3"}}, 2},
		{&adminv1.ListPodEntriesRequest{Selectors: []string{"k8s:pod-uid:3", "k8s:container-name:web"}}, 1},
		{&adminv1.ListPodEntriesRequest{FederatesWith: []string{"partner.example"}}, 2},
		{&adminv1.ListPodEntriesRequest{Cluster: "stage"}, 0},
		{&adminv1.ListPodEntriesRequest{Pod: "pod-bank"}, 1},
		{&adminv1.ListPodEntriesRequest{ParentId: all[0].ParentId, SpiffeId: all[0].SpiffeId, Pod: all[0].Pod}, 1},
	} {
		if got, _ := h.podEntries(tt.req); len(got) != tt.want {
			t.Errorf("filter %d: %d entries, want %d: %v", i, len(got), tt.want, got)
		}
	}
	for _, bad := range []*adminv1.ListPodEntriesRequest{{SpiffeId: "x"}, {ParentId: "spiffe://"}, {Selectors: []string{"x"}}, {FederatesWith: []string{"A B"}}, {Selectors: make([]string, 1001)}} {
		stream, err := adminv1.NewEntriesClient(h.admin).ListPodEntries(t.Context(), bad)
		if err == nil {
			_, err = stream.Recv()
		}
		if code(err) != codes.InvalidArgument {
			t.Errorf("%v: %v", bad, err)
		}
	}
	got, _ := h.podEntries(&adminv1.ListPodEntriesRequest{Identity: "web", Node: "name-node-b"})
	if e := got[0]; e.Hint != "external" || e.X509Ttl != 600 || e.JwtTtl != 120 || !slices.Equal(e.DnsNames, []string{"sa-shop.internal"}) || !slices.Equal(e.FederatesWith, []string{"partner.example"}) ||
		e.Rule != "Identity web" || e.PodUid != "3" || e.Cluster != "prod" || !slices.Equal(e.Selectors, []string{"k8s:container-name:web", "k8s:pod-uid:3"}) {
		t.Errorf("one: %v", e)
	}
	ids := func() (out []string, first *adminv1.ListIDsResponse) {
		t.Helper()
		stream, err := adminv1.NewEntriesClient(h.admin).ListIDs(t.Context(), &adminv1.ListIDsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for {
			part, err := stream.Recv()
			if err == io.EOF {
				slices.Sort(out)
				return out, first
			}
			if err != nil {
				t.Fatal(err)
			}
			if first == nil {
				first = part
			}
			out = append(out, part.Ids...)
		}
	}
	have, first := ids()
	want := []string{"spiffe://example.org/ns/bank/sa/sa-bank", "spiffe://example.org/ns/shop/sa/sa-shop", "spiffe://example.org/plain", "spiffe://example.org/web/pod-shop"}
	if !slices.Equal(have, want) || !slices.Equal(first.Templates, []string{"spiffe://example.org/ns/*/sa/*", "spiffe://example.org/web/*"}) || len(first.UnknownClusters) != 0 {
		t.Errorf("IDs %q, %v", have, first)
	}
	x.Synced("prod", false)
	if _, first := ids(); !slices.Equal(first.UnknownClusters, []string{"prod"}) {
		t.Errorf("unknown clusters: %v", first)
	}
	// An agent, which is no operator, learns nothing.
	a := h.onNode("prod", "node-a")
	stream, err := adminv1.NewEntriesClient(a.conn).ListIDs(t.Context(), &adminv1.ListIDsRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	if code(err) != codes.PermissionDenied {
		t.Errorf("an agent asks: %v", err)
	}
	// Through SPIRE's API one entry is found by its id, and is not changed.
	entries := entryv1.NewEntryClient(h.admin)
	u, err := entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{{Id: all[0].Id, Hint: "x"}}, InputMask: &types.EntryMask{Hint: true}})
	if err != nil || codes.Code(u.Results[0].Status.Code) != codes.InvalidArgument || !strings.Contains(u.Results[0].Status.Message, "it goes with the pod, or with that rule") {
		t.Errorf("updated: %v, %v", u, err)
	}
	c, err := entries.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{Id: all[0].Id, SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/x"},
		ParentId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/y"}, Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}}}}})
	if err != nil || codes.Code(c.Results[0].Status.Code) != codes.InvalidArgument {
		t.Errorf("created in its place: %v, %v", c, err)
	}
}

// TestARevokedIDStaysRevokedForNewPods: a Revocation of an ID that pods have holds for those that come later, one of a serial
// number for one SVID, and when it is lifted all is as it was.
func TestARevokedIDStaysRevokedForNewPods(t *testing.T) {
	h, x := watchedPods(t, config(t.TempDir()), aPod("1", "node-a", "shop"))
	a := h.onNode("prod", "node-a")
	h.untilPods("an entry", func() bool { return h.ca.reg.CountPodEntries("") == 1 })
	k := key(t)
	spki, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	issue := func() *nodev1.IssueX509SVIDsResponse_Result {
		t.Helper()
		entries, _ := h.ca.reg.Scope(a.id)
		if len(entries) != 1 {
			t.Fatalf("%d entries", len(entries))
		}
		r, err := nodev1.NewNodeClient(a.conn).IssueX509SVIDs(t.Context(), &nodev1.IssueX509SVIDsRequest{Items: []*nodev1.IssueX509SVIDsRequest_Item{{EntryId: string(entries[0].ID), PublicKey: spki}}})
		if err != nil {
			t.Fatal(err)
		}
		return r.Results[0]
	}
	leaf, err := x509.ParseCertificate(issue().CertChain[0])
	if err != nil {
		t.Fatal(err)
	}
	preview, err := adminv1.NewRevocationsClient(h.admin).PreviewRevocation(t.Context(), &adminv1.PreviewRevocationRequest{Document: &adminv1.Document{File: "r.yaml", Content: []byte("kind: Revocation\nname: r\nid: /ns/shop/**\nreason: test\n")}})
	if err != nil || preview.Ids != 1 || !slices.Equal(preview.FirstIds, []string{"spiffe://example.org/ns/shop/sa/sa-shop"}) {
		t.Errorf("preview %v, %v", preview, err)
	}
	h.apply("kind: Revocation\nname: r\nid: /ns/shop/**\nreason: test\n")
	if r := issue(); codes.Code(r.Code) != codes.PermissionDenied {
		t.Errorf("the pod: %v", r)
	}
	x.Update("prod", []*pods.Pod{aPod("2", "node-a", "shop")}, []string{"1"})
	if r := issue(); codes.Code(r.Code) != codes.PermissionDenied {
		t.Errorf("a new pod with the same ID: %v", r)
	}
	if _, err := adminv1.NewAdminClient(h.admin).DeleteResource(t.Context(), &adminv1.DeleteResourceRequest{Kind: "Revocation", Name: "r", Yes: true}); err != nil {
		t.Fatal(err)
	}
	if r := issue(); r.Code != 0 {
		t.Errorf("after it was lifted: %v", r)
	}
	h.apply(fmt.Sprintf("kind: Revocation\nname: s\nserial: %q\nreason: test\n", leaf.SerialNumber.String()))
	if _, revoked := h.ca.reg.RevokedX509(leaf, ids(t, "/ns/shop/sa/sa-shop")); !revoked {
		t.Error("the SVID of that serial number is not revoked")
	}
	r := issue()
	if r.Code != 0 {
		t.Fatalf("another SVID of the ID: %v", r)
	}
	fresh, err := x509.ParseCertificate(r.CertChain[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, revoked := h.ca.reg.RevokedX509(fresh, ids(t, "/ns/shop/sa/sa-shop")); revoked {
		t.Error("another SVID of the ID is revoked with it")
	}
}

// one is the next message of a stream.
func one(t *testing.T, s nodev1.Node_FollowClient) *nodev1.FollowResponse {
	t.Helper()
	m, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestBundlesAndPoliciesGoWithPods: a node has a foreign bundle and a shadow policy from when a pod on it needs them until no
// pod does, and hints of pods go with conditions that ask for them.
func TestBundlesAndPoliciesGoWithPods(t *testing.T) {
	h, x := watchedPods(t, config(t.TempDir()), aPod("1", "node-a", "shop"))
	h.applied("kind: Identity\nname: partners\nspiffeID: /partners/{{ .k8s.ns }}\nmatch: [k8s:ns:bank]\nfederatesWith: [partner.example]\nhint: gold\n")
	bundle, err := bundlev1.NewBundleClient(h.admin).BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{newPartner(t, "partner.example").full()}})
	if err != nil || bundle.Results[0].Status.Code != 0 {
		t.Fatal(bundle, err)
	}
	h.apply("kind: CallPolicy\nname: bank\nservice: /partners/bank\nmode: shadow\nallow: [{from: [/ns/shop/sa/sa-shop]}]\n---\n" +
		"kind: CallPolicy\nname: shop\nservice: /ns/shop/sa/sa-shop\nallow: [{from: [/partners/*], http: [{methods: [GET]}], when: 'peer.hint == \"gold\"'}]\n")
	partner := func(b *nodev1.Bundle) bool { return b.TrustDomain == "partner.example" }
	a := h.onNode("prod", "node-a")
	s := hello(t, a, "", 0)
	m := one(t, s)
	if len(m.Entries) != 1 || slices.ContainsFunc(m.Bundles, partner) || len(m.Policies) != 1 || m.Policies[0].Name != "shop" || len(m.Policies[0].PeerHints) != 0 {
		t.Fatalf("at first %v", m)
	}
	x.Update("prod", []*pods.Pod{aPod("2", "node-a", "bank"), aPod("3", "node-a", "bank")}, nil)
	seen := map[string]int{}
	for m = one(t, s); ; m = one(t, s) {
		for _, p := range m.Policies {
			seen[p.Name] = 1 + len(p.PeerHints)
		}
		if slices.ContainsFunc(m.Bundles, partner) {
			seen["partner.example"]++
		}
		if seen["bank"] == 1 && seen["shop"] == 2 && seen["partner.example"] == 1 {
			break
		}
	}
	x.Update("prod", nil, []string{"2"}) // the other one still needs them
	for m = one(t, s); len(m.RemovedEntryIds) == 0; m = one(t, s) {
	}
	if len(m.RemovedPolicies)+len(m.RemovedBundles) > 0 {
		t.Errorf("taken away from a pod that is there: %v", m)
	}
	x.Update("prod", nil, []string{"3"})
	gone := map[string]bool{}
	for m = one(t, s); ; m = one(t, s) {
		for _, n := range slices.Concat(m.RemovedPolicies, m.RemovedBundles) {
			gone[n] = true
		}
		for _, p := range m.Policies {
			gone[p.Name+" without hints"] = len(p.PeerHints) == 0
		}
		if gone["bank"] && gone["partner.example"] && gone["shop without hints"] {
			return
		}
	}
}

// TestATaintedAuthorityAndPods: a SPIRE agent, which asks with masks and by revisions, has the entry of its pod, and leaves a
// tainted authority for it within one sync; WIT-SVIDs and JWT-SVIDs are issued for it as for any.
func TestATaintedAuthorityAndPods(t *testing.T) {
	c := quiet(t.TempDir())
	c.WIT.Enabled = true
	h, x := watchedPods(t, c, aPod("1", "node-a", "shop"), aPod("2", "node-b", "bank"))
	a := h.join()
	h.psat(a.ID, "prod", "node-a")
	h.untilPods("two entries", func() bool { return h.ca.reg.CountPodEntries("") == 2 })
	mustSync(t, a)
	if len(a.Entries) != 1 {
		t.Fatalf("entries %v", a.Entries)
	}
	var id string
	for id = range a.Entries {
	}
	entries := a.EntryAPI()
	masked, err := entries.GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{OutputMask: &types.EntryMask{SpiffeId: true}})
	if err != nil || len(masked.Entries) != 1 || masked.Entries[0].SpiffeId.GetPath() != "/ns/shop/sa/sa-shop" || masked.Entries[0].ParentId != nil || len(masked.Entries[0].Selectors) != 0 {
		t.Errorf("with a mask: %v, %v", masked, err)
	}
	issuer := func() string {
		t.Helper()
		results, err := a.X509SVIDs(t.Context(), id)
		if err != nil || results[0].Status.Code != 0 {
			t.Fatal(results, err)
		}
		leaf, err := x509.ParseCertificate(results[0].Svid.CertChain[0])
		if err != nil || leaf.URIs[0].Path != "/ns/shop/sa/sa-shop" {
			t.Fatal(leaf, err)
		}
		return string(leaf.AuthorityKeyId)
	}
	before := issuer()
	local := localauthorityv1.NewLocalAuthorityClient(h.admin)
	state, err := local.GetX509AuthorityState(t.Context(), &localauthorityv1.GetX509AuthorityStateRequest{})
	if err != nil {
		t.Fatal(err)
	}
	prepared, err := local.PrepareX509Authority(t.Context(), &localauthorityv1.PrepareX509AuthorityRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.FetchBundle(t.Context()); err != nil { // by which the agent acknowledges it
		t.Fatal(err)
	}
	if _, err := local.ActivateX509Authority(t.Context(), &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: prepared.PreparedAuthority.AuthorityId}); err != nil {
		t.Fatal(err)
	}
	if _, err := local.TaintX509Authority(t.Context(), &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: state.Active.AuthorityId}); err != nil {
		t.Fatal(err)
	}
	if s := mustSync(t, a); len(s.Dropped) != 0 || len(a.Entries) != 1 || a.Entries[id] == nil {
		t.Errorf("the sync after the taint: %+v", s)
	}
	if now := issuer(); now == before {
		t.Error("the pod's SVID is of the tainted authority still")
	}
	if _, err := a.SVIDAPI().NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: id, Audience: []string{"db"}}); err != nil {
		t.Errorf("JWT-SVID: %v", err)
	}
	pub, err := x509.MarshalPKIXPublicKey(key(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	wit, err := a.SVIDAPI().BatchNewWITSVID(t.Context(), &svidv1.BatchNewWITSVIDRequest{Params: []*svidv1.NewWITSVIDParams{{EntryId: id, PublicKey: pub, SigningAlgorithm: "ES256"}}})
	if err != nil || wit.Results[0].Status.GetCode() != 0 || wit.Results[0].Svid.GetId().GetPath() != "/ns/shop/sa/sa-shop" {
		t.Errorf("WIT-SVID: %v, %v", wit, err)
	}
	x.Update("prod", nil, []string{"1"})
	if s := mustSync(t, a); len(a.Entries) != 0 || len(s.Dropped) != 1 {
		t.Errorf("the sync after the pod is gone: %+v, %v", s, a.Entries)
	}
	if r, err := a.X509SVIDs(t.Context(), id); err != nil || codes.Code(r[0].Status.Code) != codes.NotFound {
		t.Errorf("an SVID for a pod that is gone: %v, %v", r, err)
	}
}

// TestABackupHoldsNoPods: a copy of the store has the template and no pod's entry, and a CA on it gives pods the very same entries.
func TestABackupHoldsNoPods(t *testing.T) {
	c := config(t.TempDir())
	h, x := watchedPods(t, c, aPod("1", "node-a", "shop"), aPod("2", "node-b", "bank"))
	h.untilPods("two entries", func() bool { return h.ca.reg.CountPodEntries("") == 2 })
	before, _ := h.podEntries(&adminv1.ListPodEntriesRequest{})
	exported, err := entryv1.NewEntryClient(h.admin).ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
	if err != nil || len(exported.Entries) != 0 {
		t.Errorf("what 'signet entry export' writes: %v, %v", exported, err)
	}
	h.close()
	x.Synced("prod", false)
	restored := config(t.TempDir())
	if out, err := exec.Command("cp", "-a", c.DataDir+"/.", restored.DataDir).CombinedOutput(); err != nil {
		t.Fatal(err, string(out))
	}
	s, err := bolt.Open(bolt.Config{Dir: restored.DataDir})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.List(t.Context(), "", 0, func(it store.Item) error {
		for _, pods := range []string{"pod-shop", "sa-shop", "signet.pod."} {
			if strings.Contains(it.Key+string(it.Value), pods) {
				t.Errorf("the store has %q: %s", pods, it.Key)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	h = start(t, restored)
	res, err := adminv1.NewAdminClient(h.admin).GetResources(t.Context(), &adminv1.GetResourcesRequest{Kind: "Identity"})
	if err != nil || len(res.Resources) != 1 || !res.Resources[0].Templated || !strings.Contains(string(res.Resources[0].Document.Content), "{{ .k8s.ns }}") {
		t.Errorf("resources of the copy: %v, %v", res, err)
	}
	x = h.expander()
	x.Update("prod", []*pods.Pod{aPod("2", "node-b", "bank"), aPod("1", "node-a", "shop")}, nil)
	x.Synced("prod", true)
	h.untilPods("two entries", func() bool { return h.ca.reg.CountPodEntries("") == 2 })
	after, _ := h.podEntries(&adminv1.ListPodEntriesRequest{})
	if !slices.EqualFunc(before, after, func(a, b *adminv1.PodEntry) bool { return proto.Equal(a, b) }) {
		t.Errorf("before %v\nafter %v", before, after)
	}
}

// TestRolloutsAndPods: a node that is among the first has a new version from when a pod of the service is on it, with the former
// one, and loses both with the pod; an abort gives the former back.
func TestRolloutsAndPods(t *testing.T) {
	h, x := watchedPods(t, config(t.TempDir()), aPod("1", "node-a", "shop"))
	h.apply("kind: CallPolicy\nname: shop\nservice: /ns/shop/sa/*\nallow: [{from: [/a]}]\n")
	a := h.onNode("prod", "node-a")
	s := hello(t, a, "", 0)
	if m := one(t, s); len(m.Policies) != 1 || m.Policies[0].Rollout != nil {
		t.Fatalf("before: %v", m)
	}
	rollouts := adminv1.NewRolloutsClient(h.admin)
	const next = "kind: CallPolicy\nname: shop\nservice: /ns/shop/sa/*\nallow: [{from: [/a, /b]}]\n"
	name := ""
	for i := 0; name == ""; i++ {
		if i == 50 {
			t.Fatal("of fifty roll-outs to half of the agents none begins with this one")
		}
		o := &registry.Rollout{Name: fmt.Sprint("r", i), Steps: []int{50}, State: registry.RolloutRunning}
		if !o.Includes(a.id) {
			continue
		}
		name = o.Name
	}
	if _, err := rollouts.StartRollout(t.Context(), &adminv1.StartRolloutRequest{Name: name, Steps: []int32{50}, Bake: 3600, Documents: []*adminv1.Document{{Content: []byte(next), File: "t.yaml"}}}); err != nil {
		t.Fatal(err)
	}
	isNew := func(m *nodev1.FollowResponse) bool {
		return len(m.Policies) == 1 && m.Policies[0].Rollout.GetName() == name && len(m.Policies[0].Rules[0].From) == 2 && len(m.Policies[0].Rollout.Former.GetRules()[0].From) == 1
	}
	m := one(t, s)
	for ; !isNew(m); m = one(t, s) {
	}
	list, err := rollouts.ListRollouts(t.Context(), &adminv1.ListRolloutsRequest{})
	if err != nil || list.Rollouts[0].Agents != 1 || list.Rollouts[0].FirstAgents != 1 {
		t.Errorf("agents of the roll-out: %v, %v", list, err)
	}
	x.Update("prod", nil, []string{"1"})
	for m = one(t, s); !slices.Equal(m.RemovedPolicies, []string{"shop"}); m = one(t, s) {
	}
	x.Update("prod", []*pods.Pod{aPod("2", "node-a", "shop")}, nil)
	for m = one(t, s); !isNew(m); m = one(t, s) {
	}
	if _, err := rollouts.AbortRollout(t.Context(), &adminv1.AbortRolloutRequest{Name: name}); err != nil {
		t.Fatal(err)
	}
	for m = one(t, s); len(m.Policies) != 1 || m.Policies[0].Rollout != nil || len(m.Policies[0].Rules[0].From) != 1; m = one(t, s) {
	}
}
