package ca

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/wrapperspb"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/registry"
)

func pid(path string) *types.SPIFFEID { return &types.SPIFFEID{TrustDomain: "example.org", Path: path} }

func sels(ss ...string) (out []*types.Selector) {
	for _, s := range ss {
		k, v, _ := strings.Cut(s, ":")
		out = append(out, &types.Selector{Type: k, Value: v})
	}
	return out
}

func entry(path string, selectors ...string) *types.Entry {
	return &types.Entry{SpiffeId: pid(path), ParentId: pid("/node"), Selectors: sels(selectors...)}
}

func TestEntriesPerItemStatus(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api := entryv1.NewEntryClient(h.admin)
	long := "/" + strings.Repeat("a", 2048-len("spiffe://example.org/"))
	foreign := entry("/x", "unix:uid:1")
	foreign.SpiffeId.TrustDomain = "other.org"
	badHint := entry("/hint", "unix:uid:1")
	badHint.Hint = strings.Repeat("h", 1025)
	okHint := entry("/hint", "unix:uid:1")
	okHint.Hint = strings.Repeat("h", 1024)
	self := entry("/fed", "unix:uid:1")
	self.FederatesWith = []string{"spiffe://example.org"} // as SPIRE's command line writes a trust domain
	ttl := entry("/ttl", "unix:uid:1")
	ttl.X509SvidTtl = 400 * 24 * 3600
	colon := entry("/colon", "unix:uid:1")
	colon.Selectors[0].Type = "a:b"
	dns := entry("/dns", "unix:uid:1")
	dns.DnsNames = []string{"-bad-.example"}
	reserved := entry("/r", "unix:uid:1")
	reserved.Id = "identity.x"
	tests := []struct {
		name  string
		entry *types.Entry
		want  codes.Code
		text  string
	}{
		{"good", entry("/web", "unix:uid:1"), codes.OK, ""},
		{"under /spire", entry("/spire/agent/x", "unix:uid:1"), codes.InvalidArgument, "reserved"},
		{"/spire itself", entry("/spire", "unix:uid:1"), codes.InvalidArgument, "reserved"},
		{"foreign", foreign, codes.InvalidArgument, "example.org"},
		{"2048 bytes [ID-18]", entry(long, "unix:uid:1"), codes.OK, ""},
		{"2049 bytes [ID-19]", entry(long+"a", "unix:uid:1"), codes.InvalidArgument, "2048"},
		{"uppercase trust domain [ID-07]", &types.Entry{SpiffeId: &types.SPIFFEID{TrustDomain: "Example.org", Path: "/w"}, ParentId: pid("/node"), Selectors: sels("unix:uid:1")}, codes.InvalidArgument, "spiffe_id"},
		{"trailing slash [ID-16]", entry("/web/", "unix:uid:1"), codes.InvalidArgument, "spiffe_id"},
		{"no path [X509-07]", entry("", "unix:uid:1"), codes.InvalidArgument, "path"},
		{"no selectors", entry("/none"), codes.InvalidArgument, "selectors"},
		{"the same again", entry("/web", "unix:uid:1"), codes.AlreadyExists, "exists"},
		{"the same in another order", entry("/web", "unix:uid:1", "unix:uid:1"), codes.AlreadyExists, "exists"},
		{"hint of 1025 bytes [WAPI-18]", badHint, codes.InvalidArgument, "1024"},
		{"hint of 1024 bytes [WAPI-18]", okHint, codes.OK, ""},
		{"federates with itself [ID-24]", self, codes.InvalidArgument, "itself"},
		{"TTL too long", ttl, codes.InvalidArgument, "ttl"},
		{"colon in type", colon, codes.InvalidArgument, "colon"},
		{"DNS name", dns, codes.InvalidArgument, "dns_names"},
		{"Identity's ID", reserved, codes.InvalidArgument, "reserved"},
		{"nothing", nil, codes.InvalidArgument, "spiffe_id"},
	}
	req := &entryv1.BatchCreateEntryRequest{}
	for _, tt := range tests {
		req.Entries = append(req.Entries, tt.entry)
	}
	r, err := api.BatchCreateEntry(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	for i, tt := range tests {
		st := r.Results[i].Status
		if codes.Code(st.Code) != tt.want || !strings.Contains(st.Message, tt.text) {
			t.Errorf("%s: %v %q; want %v with %q", tt.name, codes.Code(st.Code), st.Message, tt.want, tt.text)
		}
		if (tt.want == codes.OK || tt.want == codes.AlreadyExists) != (r.Results[i].Entry != nil) {
			t.Errorf("%s: entry %v", tt.name, r.Results[i].Entry)
		}
	}
	if got := countEntries(t, api, nil); got != 3 {
		t.Errorf("%d entries, want 3", got)
	}
	// Every refusal is in the audit log with its reason.
	if n := len(h.audit("entry.create")); n != len(tests) {
		t.Errorf("%d audit records of entry.create, want %d", n, len(tests))
	}
	if id := "spiffe://" + foreign.SpiffeId.TrustDomain + foreign.SpiffeId.Path; !slices.ContainsFunc(h.audit("entry.create"), func(r map[string]any) bool { return r["subject"] == id }) {
		t.Errorf("no audit record of entry.create names %s whole", id)
	}
}

func (h *harness) audit(events ...string) (out []map[string]any) {
	h.t.Helper()
	s, err := adminv1.NewAdminClient(h.admin).SearchAudit(h.t.Context(), &adminv1.SearchAuditRequest{Events: events, Limit: 100000})
	if err != nil {
		h.t.Fatal(err)
	}
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			h.t.Fatal(err)
		}
		var m map[string]any
		if err := json.Unmarshal(r.Json, &m); err != nil {
			h.t.Fatal(err)
		}
		out = append(out, m)
	}
}

func countEntries(t *testing.T, api entryv1.EntryClient, f *entryv1.CountEntriesRequest_Filter) int32 {
	t.Helper()
	r, err := api.CountEntries(t.Context(), &entryv1.CountEntriesRequest{Filter: f})
	if err != nil {
		t.Fatal(err)
	}
	return r.Count
}

func TestEntriesPagingFiltersUpdateDelete(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api := entryv1.NewEntryClient(h.admin)
	req := &entryv1.BatchCreateEntryRequest{}
	for i := range 250 {
		e := entry(fmt.Sprint("/e/", i), "unix:uid:1", fmt.Sprint("unix:gid:", i%5))
		e.ParentId = pid(fmt.Sprint("/node/", i%2))
		e.Id = fmt.Sprintf("id-%03d", 249-i)
		e.Downstream = i == 8
		req.Entries = append(req.Entries, e)
	}
	if _, err := api.BatchCreateEntry(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	var ids []string
	token := ""
	for {
		r, err := api.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 60, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range r.Entries {
			ids = append(ids, e.Id)
		}
		if len(ids) == 60 { // what is created or deleted between pages neither repeats nor loses others
			api.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"id-000", "id-249"}})
		}
		if token = r.NextPageToken; token == "" {
			break
		}
	}
	if len(ids) != 249 || !slices.IsSorted(ids) || len(slices.Compact(slices.Clone(ids))) != 249 {
		t.Errorf("pages hold %d entries, sorted %t", len(ids), slices.IsSorted(ids))
	}
	for name, tt := range map[string]struct {
		f    *entryv1.CountEntriesRequest_Filter
		want int32
	}{
		"parent":         {&entryv1.CountEntriesRequest_Filter{ByParentId: pid("/node/0")}, 124},
		"id":             {&entryv1.CountEntriesRequest_Filter{BySpiffeId: pid("/e/7")}, 1},
		"selectors any":  {&entryv1.CountEntriesRequest_Filter{BySelectors: &types.SelectorMatch{Selectors: sels("unix:gid:1"), Match: types.SelectorMatch_MATCH_ANY}}, 50},
		"exact":          {&entryv1.CountEntriesRequest_Filter{BySelectors: &types.SelectorMatch{Selectors: sels("unix:gid:1"), Match: types.SelectorMatch_MATCH_EXACT}}, 0},
		"superset":       {&entryv1.CountEntriesRequest_Filter{BySelectors: &types.SelectorMatch{Selectors: sels("unix:uid:1"), Match: types.SelectorMatch_MATCH_SUPERSET}}, 248},
		"subset":         {&entryv1.CountEntriesRequest_Filter{BySelectors: &types.SelectorMatch{Selectors: sels("unix:uid:1", "unix:gid:2", "unix:x:y"), Match: types.SelectorMatch_MATCH_SUBSET}}, 50},
		"no hint":        {&entryv1.CountEntriesRequest_Filter{ByHint: wrapperspb.String("x")}, 0},
		"not downstream": {&entryv1.CountEntriesRequest_Filter{ByDownstream: wrapperspb.Bool(false)}, 248}, // no filter, as at SPIRE
		"downstream":     {&entryv1.CountEntriesRequest_Filter{ByDownstream: wrapperspb.Bool(true)}, 1},
	} {
		if got := countEntries(t, api, tt.f); got != tt.want {
			t.Errorf("filter %s: %d, want %d", name, got, tt.want)
		}
	}
	for name, r := range map[string]*entryv1.ListEntriesRequest{
		"page token":      {PageToken: "%%%"},
		"forged token":    {PageToken: "AAAA"},
		"negative size":   {PageSize: -1},
		"empty selectors": {Filter: &entryv1.ListEntriesRequest_Filter{BySelectors: &types.SelectorMatch{}}},
		"empty domains":   {Filter: &entryv1.ListEntriesRequest_Filter{ByFederatesWith: &types.FederatesWithMatch{}}},
		"unknown match":   {Filter: &entryv1.ListEntriesRequest_Filter{BySelectors: &types.SelectorMatch{Selectors: sels("unix:uid:1"), Match: 99}}},
	} {
		if _, err := api.ListEntries(t.Context(), r); code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	before, err := api.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: "id-100"})
	if err != nil {
		t.Fatal(err)
	}
	up := func(e *types.Entry, m *types.EntryMask) *entryv1.BatchUpdateEntryResponse_Result {
		r, err := api.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}, InputMask: m})
		if err != nil {
			t.Fatal(err)
		}
		return r.Results[0]
	}
	if r := up(&types.Entry{Id: "id-100", Hint: "new"}, &types.EntryMask{Hint: true}); r.Status.Code != 0 || r.Entry.Hint != "new" || r.Entry.SpiffeId.Path != before.SpiffeId.Path || r.Entry.RevisionNumber <= before.RevisionNumber {
		t.Errorf("update: %v", r)
	}
	if r := up(&types.Entry{Id: "id-100", Hint: "new"}, &types.EntryMask{Hint: true}); r.Status.Code != 0 {
		t.Errorf("the same update again: %v", r)
	}
	if r := up(&types.Entry{Id: "id-100"}, &types.EntryMask{Selectors: true}); codes.Code(r.Status.Code) != codes.InvalidArgument {
		t.Errorf("update to no selectors: %v", r)
	}
	if r := up(&types.Entry{Id: "nobody"}, nil); codes.Code(r.Status.Code) == codes.OK {
		t.Errorf("update of an unknown entry: %v", r)
	}
	if _, err := api.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: "nobody"}); code(err) != codes.NotFound {
		t.Errorf("get: %v", err)
	}
	r, err := api.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"id-100", "id-100"}})
	if err != nil || r.Results[0].Status.Code != 0 || codes.Code(r.Results[1].Status.Code) != codes.NotFound {
		t.Errorf("delete: %v %v", r, err)
	}
}

func TestParentIDWithWholeTokenIsNormalised(t *testing.T) {
	h := start(t, config(t.TempDir()))
	token := h.token()
	e := entry("/w", "unix:uid:1")
	e.ParentId = pid("/spire/agent/join_token/" + token)
	r, err := entryv1.NewEntryClient(h.admin).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
	if err != nil || r.Results[0].Status.Code != 0 {
		t.Fatal(r, err)
	}
	if got, want := r.Results[0].Entry.ParentId.Path, "/spire/agent/join_token/"+strings.Split(token, ".")[0]; got != want {
		t.Errorf("parent %s, want %s", got, want)
	}
	h.close()
	// The secret is nowhere on the disk.
	secret := strings.Split(token, ".")[1]
	filepath.Walk(h.dir, func(path string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() {
			if b, _ := os.ReadFile(path); strings.Contains(string(b), secret) {
				t.Errorf("%s holds the token's secret", path)
			}
		}
		return nil
	})
}

func TestApplyPlansChecksAndCommitsAsOne(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api := adminv1.NewAdminClient(h.admin)
	good := "kind: Identity\nname: web\nspiffeID: /web\nmatch: [\"unix:uid:1\"]\n"
	for name, doc := range map[string]struct{ doc, text string }{
		"unknown field":     {good + "colour: red\n", "t.yaml:5:1"},
		"unknown kind":      {"kind: Thing\nname: x\n", "t.yaml:1"},
		"no kind":           {"name: x\n", "kind"},
		"template":          {"kind: Identity\nname: x\nspiffeID: \"/{{ .k8s.ns }}\"\nmatch: [\"unix:uid:1\"]\n", "t.yaml:3"},
		"under /spire":      {"kind: Identity\nname: x\nspiffeID: /spire/x\nmatch: [\"unix:uid:1\"]\n", "reserved"},
		"no match":          {"kind: Identity\nname: x\nspiffeID: /x\n", "match"},
		"bad selector":      {"kind: Identity\nname: x\nspiffeID: /x\nmatch: [uid]\n", "type:value"},
		"scalar for list":   {"kind: Identity\nname: x\nspiffeID: /x\nmatch: unix:uid:1\n", "t.yaml:4"},
		"when":              {"kind: CallPolicy\nname: p\nservice: /x\nallow: [{from: [/y], when: \"1 + 1\"}]\n", "t.yaml:4"},
		"twice":             {good + "---\n" + good, "already"},
		"same registration": {good + "---\nkind: Identity\nname: web2\nspiffeID: /web\nmatch: [\"unix:uid:1\"]\n", "same registration"},
		"one bad of two":    {good + "---\nkind: Identity\nname: x\n", "spiffeID"},
	} {
		_, err := api.Apply(t.Context(), &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(doc.doc), File: "t.yaml"}}})
		if code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), doc.text) {
			t.Errorf("%s: %v; want InvalidArgument with %q", name, err, doc.text)
		}
	}
	if e, _, p := h.ca.reg.Counts(); e != 0 || p != 0 {
		t.Fatalf("%d entries and %d policies after refusals", e, p)
	}
	actions := func(r *adminv1.ApplyResponse) (out []string) {
		for _, c := range r.Changes {
			out = append(out, strings.TrimPrefix(c.Action.String(), "ACTION_")+" "+c.Kind+"/"+c.Name)
		}
		return out
	}
	two := good + "---\nkind: CallPolicy\nname: p\nservice: /web\nallow: [{from: [/caller]}]\n"
	if got := actions(h.apply(two)); !slices.Equal(got, []string{"CREATE Identity/web", "CREATE CallPolicy/p"}) {
		t.Errorf("first apply: %v", got)
	}
	// The audit log tells what was granted, not only that a document was applied.
	for i, want := range []string{"parent_id:spiffe://example.org/spire/signet/nodes/any", "rules:[allow from spiffe://example.org/caller]"} {
		if got := fmt.Sprint(h.audit("resource.create")[i]["details"]); !strings.Contains(got, want) {
			t.Errorf("audit record of the first apply: %s; want %q", got, want)
		}
	}
	if got := fmt.Sprint(h.audit("resource.create")[0]["details"]); !strings.Contains(got, "spiffe_id:spiffe://example.org/web") || !strings.Contains(got, "selectors:[unix:uid:1]") {
		t.Errorf("audit record of the Identity: %s; want its SPIFFE ID and selectors", got)
	}
	rev := h.ca.reg.Revision()
	if got := actions(h.apply(two)); !slices.Equal(got, []string{"UNCHANGED Identity/web", "UNCHANGED CallPolicy/p"}) || h.ca.reg.Revision() != rev {
		t.Errorf("second apply: %v", got)
	}
	changed := strings.Replace(two, "unix:uid:1", "unix:uid:2", 1)
	plan, err := api.Plan(t.Context(), &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(changed), File: "test.yaml"}}})
	if err != nil || !slices.Equal(actions(plan), []string{"CHANGE Identity/web", "UNCHANGED CallPolicy/p"}) || len(plan.Changes[0].Differences) != 1 || !strings.Contains(plan.Changes[0].Differences[0], "unix:uid:1] -> [unix:uid:2") {
		t.Errorf("plan: %v %v", plan, err)
	}
	if h.ca.reg.Revision() != rev {
		t.Error("a plan changed the store")
	}
	h.apply(strings.Replace(two, "unix:uid:1", "unix:uid:3", 1))
	if _, err := api.Apply(t.Context(), &adminv1.ApplyRequest{PlannedAt: plan.Revision, Documents: []*adminv1.Document{{Content: []byte(changed), File: "test.yaml"}}}); code(err) != codes.Aborted {
		t.Errorf("apply of a plan that is out of date: %v", err)
	}
	// The last allow of a service with callers goes only with yes.
	del := &adminv1.DeleteResourceRequest{Kind: "CallPolicy", Name: "p"}
	if _, err := api.DeleteResource(t.Context(), del); code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "--yes") {
		t.Errorf("deleting the last allow: %v", err)
	}
	del.Yes = true
	if _, err := api.DeleteResource(t.Context(), del); err != nil {
		t.Error(err)
	}
	if _, err := api.DeleteResource(t.Context(), del); code(err) != codes.NotFound {
		t.Errorf("deleting again: %v", err)
	}
	if got := actions(mustPrune(t, api, "kind: Identity\nname: other\nspiffeID: /other\nmatch: [\"unix:uid:9\"]\n")); !slices.Equal(got, []string{"CREATE Identity/other", "DELETE Identity/web"}) {
		t.Errorf("prune: %v", got)
	}
	if got := actions(mustPrune(t, api, "kind: Identity\nname: renamed\nspiffeID: /other\nmatch: [\"unix:uid:9\"]\n")); !slices.Equal(got, []string{"CREATE Identity/renamed", "DELETE Identity/other"}) {
		t.Errorf("prune of a renamed one: %v", got)
	}
	if _, err := entryv1.NewEntryClient(h.admin).BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"identity.renamed"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.ca.reg.Entry("identity.renamed"); err != nil {
		t.Error("an Identity's entry was deleted behind its back")
	}
}

func mustPrune(t *testing.T, api adminv1.AdminClient, doc string) *adminv1.ApplyResponse {
	t.Helper()
	r, err := api.Apply(t.Context(), &adminv1.ApplyRequest{Prune: true, Documents: []*adminv1.Document{{Content: []byte(doc), File: "t.yaml"}}})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestHundredDocumentsAreOneCommit(t *testing.T) {
	h := start(t, config(t.TempDir()))
	var b strings.Builder
	for i := range 100 {
		fmt.Fprintf(&b, "---\nkind: Identity\nname: i%d\nspiffeID: /i/%d\nmatch: [\"unix:uid:%d\"]\n", i, i, i)
	}
	before := h.ca.reg.Revision()
	h.apply(b.String())
	if e, _, _ := h.ca.reg.Counts(); e != 100 {
		t.Errorf("%d entries", e)
	}
	revs := map[any]bool{}
	for i := range 100 {
		e, err := h.ca.reg.Entry(registry.EntryID(fmt.Sprint("identity.i", i)))
		if err != nil {
			t.Fatal(err)
		}
		revs[e.Revision] = true
	}
	if len(revs) != 1 || h.ca.reg.Revision() <= before {
		t.Errorf("%d revisions for one apply", len(revs))
	}
	fmt.Fprintf(&b, "---\nkind: Identity\nname: more\nspiffeID: /more\nmatch: [\"unix:uid:1\"]\n")
	if _, err := adminv1.NewAdminClient(h.admin).Apply(t.Context(), &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(b.String()), File: "t.yaml"}}}); code(err) != codes.InvalidArgument {
		t.Errorf("101 documents: %v", err)
	}
}

func TestAgentLifeAndAdminOverTCP(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api, admin := agentv1.NewAgentClient(h.admin), adminv1.NewAdminClient(h.admin)
	a := h.agent("backend")
	if st, err := admin.ListAgentStatus(t.Context(), &adminv1.ListAgentStatusRequest{}); err != nil || len(st.Agents) != 1 || st.Agents[0].Selectors[0] != "node:group:backend" || st.Agents[0].Connected {
		t.Errorf("status: %v %v", st, err)
	}
	_ = follow(t, hello(t, a, "", 0))
	if n, err := h.ca.reg.Node(a.id); err != nil || n.Version != "9.8.7" {
		t.Errorf("the agent's version: %v %v", n, err)
	}
	if st, err := admin.ListAgentStatus(t.Context(), &adminv1.ListAgentStatusRequest{AgentId: a.id.String()}); err != nil || !st.Agents[0].Connected {
		t.Errorf("status while following: %v %v", st, err)
	}
	id := pid(a.id.Path())
	if _, err := api.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: id}); err != nil {
		t.Fatal(err)
	}
	renew := func() error {
		_, err := agentv1.NewAgentClient(a.conn).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr(t, a.key)}})
		return err
	}
	if err := renew(); code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "banned") {
		t.Errorf("renewal of a banned agent: %v", err)
	}
	if r, err := api.ListAgents(t.Context(), &agentv1.ListAgentsRequest{Filter: &agentv1.ListAgentsRequest_Filter{ByBanned: wrapperspb.Bool(true)}}); err != nil || len(r.Agents) != 1 {
		t.Errorf("banned agents: %v %v", r, err)
	}
	if _, err := admin.UnbanAgent(t.Context(), &adminv1.UnbanAgentRequest{AgentId: a.id.String()}); err != nil {
		t.Error(err)
	}
	if err := renew(); code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "not attested") {
		t.Errorf("renewal after the ban was lifted: %v", err)
	}
	if _, err := api.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: id}); err != nil {
		t.Error(err)
	}
	if _, err := api.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: id}); code(err) != codes.NotFound {
		t.Errorf("evicting an unknown agent: %v", err)
	}
	if _, err := api.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: pid("/web")}); code(err) != codes.InvalidArgument {
		t.Errorf("evicting what is no agent: %v", err)
	}
	// An entry with admin makes its holder an admin over TCP, until it is gone.
	h.apply("kind: Identity\nname: ops\nspiffeID: /ops\nmatch: [\"unix:uid:1\"]\nadmin: true\n")
	k := key(t)
	u, _ := url.Parse("spiffe://example.org/ops")
	der, _ := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{u}}, k)
	m, err := svidv1.NewSVIDClient(h.admin).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: der, Ttl: 60})
	if err != nil {
		t.Fatal(err)
	}
	tcp := entryv1.NewEntryClient(h.dial(m.Svid.CertChain, k))
	if _, err := tcp.CountEntries(t.Context(), &entryv1.CountEntriesRequest{}); err != nil {
		t.Errorf("admin over TCP: %v", err)
	}
	if _, err := adminv1.NewAdminClient(h.admin).DeleteResource(t.Context(), &adminv1.DeleteResourceRequest{Kind: "Identity", Name: "ops"}); err != nil {
		t.Fatal(err)
	}
	if _, err := tcp.CountEntries(t.Context(), &entryv1.CountEntriesRequest{}); code(err) != codes.PermissionDenied {
		t.Errorf("after the entry is gone, on the same connection: %v", err)
	}
	if j, err := svidv1.NewSVIDClient(h.admin).MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{Id: pid("/x"), Audience: []string{"a"}}); err != nil || strings.Count(j.Svid.Token, ".") != 2 {
		t.Errorf("MintJWTSVID: %v", err)
	}
	for name, bad := range map[string]*svidv1.MintJWTSVIDRequest{"no audience": {Id: pid("/x")}, "reserved": {Id: pid("/spire/server"), Audience: []string{"a"}}, "foreign": {Id: &types.SPIFFEID{TrustDomain: "o", Path: "/x"}, Audience: []string{"a"}}} {
		if _, err := svidv1.NewSVIDClient(h.admin).MintJWTSVID(t.Context(), bad); code(err) != codes.InvalidArgument {
			t.Errorf("MintJWTSVID %s: %v", name, err)
		}
	}
}

func foreignRoot(t *testing.T, domain string) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	k := key(t)
	u, _ := url.Parse("spiffe://" + domain)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: domain}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{u}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, k
}

func TestFederatedBundlesByHand(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api := bundlev1.NewBundleClient(h.admin)
	root, _ := foreignRoot(t, "partner.example")
	set := func(b ...*types.Bundle) []*bundlev1.BatchSetFederatedBundleResponse_Result {
		r, err := api.BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: b})
		if err != nil {
			t.Fatal(err)
		}
		return r.Results
	}
	res := set(&types.Bundle{TrustDomain: "partner.example", X509Authorities: []*types.X509Certificate{{Asn1: root.Raw}}},
		&types.Bundle{TrustDomain: "example.org"}, &types.Bundle{TrustDomain: "Bad"}, &types.Bundle{TrustDomain: "x", X509Authorities: []*types.X509Certificate{{Asn1: []byte("no")}}},
		&types.Bundle{TrustDomain: "y", JwtAuthorities: []*types.JWTKey{{PublicKey: root.RawSubjectPublicKeyInfo}}})
	for i, want := range []codes.Code{codes.OK, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument} {
		if codes.Code(res[i].Status.Code) != want {
			t.Errorf("bundle %d: %v, want %v", i, res[i].Status, want)
		}
	}
	got, err := api.GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "partner.example"})
	if err != nil || len(got.X509Authorities) != 1 || string(got.X509Authorities[0].Asn1) != string(root.Raw) {
		t.Errorf("get: %v %v", got, err)
	}
	a := h.agent()
	s := hello(t, a, "", 0)
	if m := follow(t, s); len(m.Bundles) != 1 {
		t.Errorf("an agent without federating entries was sent %d bundles", len(m.Bundles))
	}
	h.apply("kind: Identity\nname: w\nspiffeID: /w\nmatch: [\"unix:uid:1\"]\nfederatesWith: [partner.example]\n")
	if m := follow(t, s); len(m.Bundles) != 1 || m.Bundles[0].TrustDomain != "partner.example" {
		t.Errorf("bundles: %v", m.Bundles)
	}
	del := func() *types.Status {
		r, err := api.BatchDeleteFederatedBundle(t.Context(), &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{"partner.example"}})
		if err != nil {
			t.Fatal(err)
		}
		return r.Results[0].Status
	}
	if st := del(); codes.Code(st.Code) != codes.FailedPrecondition {
		t.Errorf("deleting a bundle in use: %v", st)
	}
	if _, err := adminv1.NewAdminClient(h.admin).DeleteResource(t.Context(), &adminv1.DeleteResourceRequest{Kind: "Identity", Name: "w"}); err != nil {
		t.Fatal(err)
	}
	if st := del(); st.Code != 0 {
		t.Errorf("delete: %v", st)
	}
	if l, err := api.ListFederatedBundles(t.Context(), &bundlev1.ListFederatedBundlesRequest{}); err != nil || len(l.Bundles) != 0 {
		t.Errorf("list: %v %v", l, err)
	}
}

// TestPortRefusesForeignCertificates: a certificate is judged in the handshake, and its absence is no way around.
func TestPortRefusesForeignCertificates(t *testing.T) {
	h := start(t, config(t.TempDir()))
	root, rootKey := foreignRoot(t, "example.org") // the same name, another key
	k := key(t)
	u, _ := url.Parse("spiffe://example.org/spire/agent/join_token/x")
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(2), URIs: []*url.URL{u}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature}, root, k.Public(), rootKey)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bundlev1.NewBundleClient(h.dial([][]byte{der}, k)).GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err == nil {
		t.Error("a forged certificate passed the handshake")
	}
	conn, err := tls.Dial("tcp", h.ca.Addr().String(), &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12})
	if err == nil {
		conn.Close()
		t.Error("TLS 1.2 was accepted")
	}
}

// TestStrangersCannotFloodTheAuditLog: refusals beyond a rate are counted instead of logged one by one.
func TestStrangersCannotFloodTheAuditLog(t *testing.T) {
	h := start(t, config(t.TempDir()))
	anon := entryv1.NewEntryClient(h.dial(nil, nil))
	const n = 2000
	began := time.Now()
	for range n {
		if _, err := anon.CountEntries(t.Context(), &entryv1.CountEntriesRequest{}); code(err) != codes.PermissionDenied {
			t.Fatal(err)
		}
	}
	h.ca.refusals.Flush(t.Context())
	one := len(h.audit("call.refused"))
	more := 0.0
	for _, r := range h.audit("call.refused.more") {
		more += r["details"].(map[string]any)["count"].(float64)
	}
	most := 500 + 50*time.Since(began).Seconds() // access.refusalBurst and refusalRate: a slow machine logs more of them
	if one == 0 || float64(one) > most || float64(one)+more != n {
		t.Errorf("%d records, at most %.0f are allowed, and %v counted, of %d refusals", one, most, more, n)
	}
}
