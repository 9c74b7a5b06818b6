package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/ca/kube/pods"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/spiffe"
)

// onNode is an agent of which k8s_psat has shown on which node it runs.
func (h *harness) onNode(cluster, uid string) *testAgent {
	h.t.Helper()
	a := h.agent()
	h.psat(a.id, cluster, uid)
	return a
}

// psat changes what an agent's attestation has shown.
func (h *harness) psat(id spiffeid.ID, cluster, uid string) {
	h.t.Helper()
	n, err := h.ca.reg.Node(id)
	if err != nil {
		h.t.Fatal(err)
	}
	changed := *n
	changed.Attestation, changed.Selectors = "k8s_psat", nil
	for _, s := range []string{"k8s_psat:cluster:" + cluster, "k8s_psat:agent_node_uid:" + uid} {
		parsed, err := spiffe.ParseSelector(s)
		if err != nil {
			h.t.Fatal(err)
		}
		changed.Selectors = append(changed.Selectors, parsed)
	}
	if err := h.ca.reg.PutNode(h.t.Context(), &changed, nil); err != nil {
		h.t.Fatal(err)
	}
}

func (h *harness) expander() *pods.Expander {
	h.t.Helper()
	x := pods.New(pods.Config{Registry: h.ca.reg})
	x.Synced("prod", false)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- x.Run(ctx) }()
	h.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			h.t.Error(err)
		}
	})
	return x
}

func aPod(uid, node, ns string) *pods.Pod {
	return &pods.Pod{Cluster: "prod", UID: uid, NodeUID: node, NodeName: "name-" + node, Namespace: ns, ServiceAccount: "sa-" + ns, Name: "pod-" + ns, Created: time.Unix(1000, 0)}
}

// TestPodsOfANode is the life of a pod's identity as agents see it: not known yet, there, another node's, gone.
func TestPodsOfANode(t *testing.T) {
	h := start(t, config(t.TempDir()))
	x := h.expander()
	left, right := h.onNode("prod", "node-left"), h.onNode("prod", "node-right")
	h.apply(`kind: Identity
name: cluster-default
spiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}
on: [k8s_psat:cluster:prod]
dnsNames: ["{{ .k8s.sa }}.internal"]
x509TTL: 10m
---
kind: CallPolicy
name: left
service: /ns/left/sa/sa-left
allow: [{from: [/ns/left/sa/caller-left]}]
---
kind: CallPolicy
name: right
service: /ns/right/sa/sa-right
allow: [{from: [/ns/right/sa/caller-right]}]
`)
	prefix := registry.PodEntryPrefix("prod")
	streams := map[string]nodev1.Node_FollowClient{"left": hello(t, left, "", 0), "right": hello(t, right, "", 0)}
	sent := map[string]*bytes.Buffer{"left": {}, "right": {}}
	read := func(side string) *nodev1.FollowResponse {
		t.Helper()
		m, err := streams[side].Recv()
		if err != nil {
			t.Fatal(err)
		}
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		sent[side].Write(b)
		return m
	}
	for side := range streams {
		if m := read(side); !m.Complete || !m.Snapshot || !slices.Equal(m.UnknownEntryPrefixes, []string{prefix}) {
			t.Errorf("%s begins with %v", side, m)
		}
	}
	k := key(t)
	spki, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	issue := func(a *testAgent, id string) *nodev1.IssueX509SVIDsResponse_Result {
		t.Helper()
		r, err := nodev1.NewNodeClient(a.conn).IssueX509SVIDs(t.Context(), &nodev1.IssueX509SVIDsRequest{Items: []*nodev1.IssueX509SVIDsRequest_Item{{EntryId: id, PublicKey: spki}}})
		if err != nil {
			t.Fatal(err)
		}
		return r.Results[0]
	}
	jwt := func(a *testAgent, id string) codes.Code {
		t.Helper()
		r, err := nodev1.NewNodeClient(a.conn).IssueJWTSVIDs(t.Context(), &nodev1.IssueJWTSVIDsRequest{Items: []*nodev1.IssueJWTSVIDsRequest_Item{{EntryId: id, Audience: []string{"x"}}}})
		if err != nil {
			t.Fatal(err)
		}
		_, err = svidv1.NewSVIDClient(a.conn).NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: id, Audience: []string{"x"}})
		if got := codes.Code(r.Results[0].Code); got != code(err) {
			t.Errorf("JWT-SVIDs of %s: %v and %v", id, got, err)
		}
		return code(err)
	}
	if r := issue(left, prefix+"x"); codes.Code(r.Code) != codes.Unavailable || jwt(left, prefix+"x") != codes.Unavailable {
		t.Errorf("an entry that may be a pod's before the pods are known: %v", r)
	}
	if r := issue(left, "x"); codes.Code(r.Code) != codes.NotFound {
		t.Errorf("an entry that is no pod's: %v", r)
	}
	entries := entryv1.NewEntryClient(left.conn)
	if _, err := entries.GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{}); code(err) != codes.Unavailable {
		t.Errorf("a SPIRE agent would drop what it holds: %v", err)
	}

	x.Update("prod", []*pods.Pod{aPod("1", "node-left", "left"), aPod("2", "node-right", "right")}, nil)
	x.Synced("prod", true)
	of := map[string]*nodev1.Entry{}
	for side := range streams {
		m := read(side)
		for !m.Snapshot { // the pods may come before the word that they are all
			m = read(side)
		}
		if len(m.Entries) != 1 || m.Entries[0].SpiffeId != fmt.Sprintf("spiffe://example.org/ns/%[1]s/sa/sa-%[1]s", side) || len(m.Policies) != 1 || m.Policies[0].Name != side || len(m.UnknownEntryPrefixes) > 0 {
			t.Fatalf("%s has %v", side, m)
		}
		of[side] = m.Entries[0]
	}
	r := issue(left, of["left"].Id)
	if r.Code != 0 {
		t.Fatalf("the pod's SVID: %v", r)
	}
	leaf, err := x509.ParseCertificate(r.CertChain[0])
	if err != nil || leaf.URIs[0].String() != of["left"].SpiffeId || !slices.Equal(leaf.DNSNames, []string{"sa-left.internal"}) || leaf.NotAfter.Sub(leaf.NotBefore) > 11*time.Minute || r.EntryRevision != of["left"].Revision {
		t.Errorf("leaf %v %v %v, %v", leaf.URIs, leaf.DNSNames, leaf.NotAfter.Sub(leaf.NotBefore), err)
	}
	if got := jwt(left, of["left"].Id); got != codes.OK {
		t.Errorf("JWT-SVID: %v", got)
	}
	if r := issue(right, of["left"].Id); codes.Code(r.Code) != codes.NotFound || jwt(right, of["left"].Id) != codes.NotFound {
		t.Errorf("a pod of another node: %v", r)
	}
	all, err := entries.GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	if err != nil || len(all.Entries) != 1 || all.Entries[0].Id != of["left"].Id {
		t.Errorf("as SPIRE's agents ask: %v, %v", all, err)
	}

	admin := entryv1.NewEntryClient(h.admin)
	if list, err := admin.ListEntries(t.Context(), &entryv1.ListEntriesRequest{}); err != nil || len(list.Entries) != 0 {
		t.Errorf("SPIRE's tools see %v, %v", list, err)
	}
	if e, err := admin.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: of["left"].Id}); err != nil || e.SpiffeId.Path != "/ns/left/sa/sa-left" {
		t.Errorf("by its id: %v, %v", e, err)
	}
	if d, err := admin.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{of["left"].Id}}); err != nil || codes.Code(d.Results[0].Status.Code) != codes.InvalidArgument {
		t.Errorf("deleted: %v, %v", d, err)
	}
	res, err := adminv1.NewAdminClient(h.admin).GetResources(t.Context(), &adminv1.GetResourcesRequest{Kind: "Identity"})
	if err != nil || len(res.Resources) != 1 || !res.Resources[0].Templated || res.Resources[0].Pods != 2 {
		t.Errorf("resources %v, %v", res, err)
	}
	for _, id := range []string{of["left"].Id, "identity.cluster-default"} {
		if ttl, err := adminv1.NewAdminClient(h.admin).ExplainTTL(t.Context(), &adminv1.ExplainTTLRequest{EntryId: id}); err != nil || ttl.X509.Ttl != 600 {
			t.Errorf("TTL of %s: %v, %v", id, ttl, err)
		}
	}

	h.apply("kind: Revocation\nname: r\nid: /ns/left/sa/sa-left\nreason: test\n")
	if r := issue(left, of["left"].Id); codes.Code(r.Code) != codes.PermissionDenied {
		t.Errorf("an ID that is revoked: %v", r)
	}
	x.Update("prod", nil, []string{"1"})
	for m := read("left"); ; m = read("left") {
		if slices.Contains(m.RemovedEntryIds, of["left"].Id) {
			if m.Snapshot || m.From != m.To || !slices.Equal(m.RemovedPolicies, []string{"left"}) {
				t.Errorf("a pod is gone: %v", m)
			}
			break
		}
	}
	if r := issue(left, of["left"].Id); codes.Code(r.Code) != codes.NotFound {
		t.Errorf("a pod that is gone: %v", r)
	}
	for side, other := range map[string]string{"left": "right", "right": "left"} {
		if !bytes.Contains(sent[side].Bytes(), []byte("/ns/"+side)) {
			t.Fatalf("%s was not sent its own: the test looks at nothing", side)
		}
		for _, what := range []string{"/ns/" + other, "sa-" + other, "caller-" + other, of[other].Id, map[string]string{"left": "uid:2", "right": "uid:1"}[side]} {
			if bytes.Contains(sent[side].Bytes(), []byte(what)) {
				t.Errorf("%s was sent %q", side, what)
			}
		}
	}
}

// TestACAThatStartsKnowsNoPods: over a restart of the CA an agent begins with what is unknown and ends with the very same entry.
func TestACAThatStartsKnowsNoPods(t *testing.T) {
	c := config(t.TempDir())
	h := start(t, c)
	x := h.expander()
	a := h.onNode("prod", "node-a")
	h.apply("kind: Identity\nname: d\nspiffeID: /ns/{{ .k8s.ns }}\n")
	x.Update("prod", []*pods.Pod{aPod("1", "node-a", "shop")}, nil)
	x.Synced("prod", true)
	s := hello(t, a, "", 0)
	first := follow(t, s)
	if len(first.Entries) != 1 {
		t.Fatalf("first %v", first)
	}
	h.close()

	c.Listen = "127.0.0.1:0"
	h = start(t, c)
	x = h.expander()
	again := &testAgent{a.id, a.key, a.chain, h.dial(a.chain, a.key)}
	s = hello(t, again, first.Epoch, first.To)
	m, err := s.Recv()
	if err != nil || !m.Snapshot || len(m.Entries) != 0 || len(m.UnknownEntryPrefixes) != 1 {
		t.Fatalf("a CA that has just started: %v, %v", m, err)
	}
	x.Update("prod", []*pods.Pod{aPod("1", "node-a", "shop")}, nil)
	x.Synced("prod", true)
	for m = follow(t, s); !m.Snapshot; m = follow(t, s) {
	}
	if len(m.Entries) != 1 || !proto.Equal(m.Entries[0], first.Entries[0]) {
		t.Errorf("after the start %v, before %v", m.Entries, first.Entries)
	}
}

// TestPositionOverTheWire: an agent is told how far its cluster was followed, and one that says it was told more keeps what it holds, until the
// CA has come as far.
func TestPositionOverTheWire(t *testing.T) {
	h := start(t, config(t.TempDir()))
	x := h.expander()
	a := h.onNode("prod", "node-a")
	h.apply("kind: Identity\nname: d\nspiffeID: /ns/{{ .k8s.ns }}\n")
	h.ca.reg.Telling("prod", registry.Position{"pods": 7})
	x.Update("prod", []*pods.Pod{aPod("1", "node-a", "shop")}, nil)
	h.ca.reg.Followed("prod", registry.Position{"pods": 9})
	x.Synced("prod", true)
	say := func(p *nodev1.Position) nodev1.Node_FollowClient {
		t.Helper()
		s, err := nodev1.NewNodeClient(a.conn).Follow(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(&nodev1.FollowRequest{Message: &nodev1.FollowRequest_Hello_{Hello: &nodev1.FollowRequest_Hello{Format: 1, Position: p}}}); err != nil {
			t.Fatal(err)
		}
		return s
	}
	at := func(n uint64) *nodev1.Position {
		return &nodev1.Position{Cluster: "prod", Versions: map[string]uint64{"pods": n}}
	}
	for _, known := range []*nodev1.Position{nil, at(9)} { // as far as it was followed, though nothing changed there
		if m := follow(t, say(known)); len(m.Entries) != 1 || !proto.Equal(m.Position, at(7)) || len(m.UnknownEntryPrefixes) > 0 {
			t.Errorf("after %v it is sent %v", known, m)
		}
	}
	s := say(at(10))
	if m, err := s.Recv(); err != nil || !m.Snapshot || len(m.Entries) != 0 || m.Position != nil || len(m.UnknownEntryPrefixes) != 1 {
		t.Errorf("who was told more is sent %v, %v", m, err)
	}
	h.ca.reg.Followed("prod", registry.Position{"pods": 12})
	if m := follow(t, s); !m.Snapshot || len(m.Entries) != 1 || !proto.Equal(m.Position, at(7)) {
		t.Errorf("then it is sent %v", m)
	}
	large := &nodev1.Position{Cluster: "prod", Versions: map[string]uint64{}}
	for i := range 17 {
		large.Versions[fmt.Sprint(i)] = 1
	}
	for _, bad := range []*nodev1.Position{large, {Cluster: "prod", Versions: map[string]uint64{strings.Repeat("x", 65): 1}}} {
		if _, err := say(bad).Recv(); code(err) != codes.InvalidArgument {
			t.Errorf("a position that is too large: %v", err)
		}
	}
}
