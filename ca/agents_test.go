package ca

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/spiffe"
)

// knownAgents puts agents of all sorts into the registry and returns their paths.
func (h *harness) knownAgents() []string {
	h.t.Helper()
	var paths []string
	for i := range 24 {
		path := fmt.Sprintf("/spire/agent/x509pop/%02d", i)
		n := &registry.Node{ID: spiffeid.RequireFromPath(td, path), Attestation: []string{"x509pop", "join_token"}[i%2], CanReattest: i%2 == 0, Banned: i%6 == 5, Serial: fmt.Sprint(100 + i), Active: true,
			ExpiresAt: time.Date(2030, 1, 1+i, 0, 0, 0, 0, time.UTC), Version: "1.15.3", CreatedAt: time.Now(),
			Selectors: []spiffe.Selector{{Type: "x509pop", Value: fmt.Sprint("a:", i%3)}, {Type: "x509pop", Value: "common"}}}
		if n.Banned {
			n.Serial = ""
		}
		if err := h.ca.reg.PutNode(h.t.Context(), n, nil); err != nil {
			h.t.Fatal(err)
		}
		paths = append(paths, path)
	}
	return paths
}

func TestAgentsFilters(t *testing.T) {
	h := start(t, config(t.TempDir()))
	h.knownAgents()
	sel := func(m types.SelectorMatch_MatchBehavior, values ...string) *types.SelectorMatch {
		out := &types.SelectorMatch{Match: m}
		for _, v := range values {
			out.Selectors = append(out.Selectors, &types.Selector{Type: "x509pop", Value: v})
		}
		return out
	}
	for name, conn := range map[string]*grpc.ClientConn{"admin socket": h.admin, "port": h.adminConn("/ops")} {
		api := agentv1.NewAgentClient(conn)
		for what, tt := range map[string]struct {
			f    *agentv1.ListAgentsRequest_Filter
			want int32
		}{
			"none":                              {nil, 24},
			"empty":                             {&agentv1.ListAgentsRequest_Filter{}, 24},
			"attestation":                       {&agentv1.ListAgentsRequest_Filter{ByAttestationType: "x509pop"}, 12},
			"unknown type":                      {&agentv1.ListAgentsRequest_Filter{ByAttestationType: "no"}, 0},
			"banned":                            {&agentv1.ListAgentsRequest_Filter{ByBanned: wrapperspb.Bool(true)}, 4},
			"not banned":                        {&agentv1.ListAgentsRequest_Filter{ByBanned: wrapperspb.Bool(false)}, 20},
			"can reattest":                      {&agentv1.ListAgentsRequest_Filter{ByCanReattest: wrapperspb.Bool(true)}, 12},
			"cannot":                            {&agentv1.ListAgentsRequest_Filter{ByCanReattest: wrapperspb.Bool(false)}, 12},
			"exact":                             {&agentv1.ListAgentsRequest_Filter{BySelectorMatch: sel(types.SelectorMatch_MATCH_EXACT, "common", "a:1")}, 8},
			"exact, fewer":                      {&agentv1.ListAgentsRequest_Filter{BySelectorMatch: sel(types.SelectorMatch_MATCH_EXACT, "common")}, 0},
			"subset":                            {&agentv1.ListAgentsRequest_Filter{BySelectorMatch: sel(types.SelectorMatch_MATCH_SUBSET, "common", "a:1", "a:2", "b")}, 16},
			"superset":                          {&agentv1.ListAgentsRequest_Filter{BySelectorMatch: sel(types.SelectorMatch_MATCH_SUPERSET, "common")}, 24},
			"any":                               {&agentv1.ListAgentsRequest_Filter{BySelectorMatch: sel(types.SelectorMatch_MATCH_ANY, "a:0", "b")}, 8},
			"expires before":                    {&agentv1.ListAgentsRequest_Filter{ByExpiresBefore: "2030-01-05T00:00:00Z"}, 4},
			"as SPIRE's command line writes it": {&agentv1.ListAgentsRequest_Filter{ByExpiresBefore: "2030-01-05 00:00:00 +0000 +00"}, 4},
			"all at once": {&agentv1.ListAgentsRequest_Filter{ByAttestationType: "join_token", ByBanned: wrapperspb.Bool(true), ByCanReattest: wrapperspb.Bool(false),
				ByExpiresBefore: "2030-01-08T00:00:00Z", BySelectorMatch: sel(types.SelectorMatch_MATCH_ANY, "a:2")}, 1},
		} {
			list, err := api.ListAgents(t.Context(), &agentv1.ListAgentsRequest{Filter: tt.f})
			if err != nil || int32(len(list.Agents)) != tt.want {
				t.Errorf("%s, %s: %d agents, %v; want %d", name, what, len(list.GetAgents()), err, tt.want)
			}
			var cf *agentv1.CountAgentsRequest_Filter
			if tt.f != nil {
				cf = &agentv1.CountAgentsRequest_Filter{ByAttestationType: tt.f.ByAttestationType, BySelectorMatch: tt.f.BySelectorMatch, ByBanned: tt.f.ByBanned, ByCanReattest: tt.f.ByCanReattest, ByExpiresBefore: tt.f.ByExpiresBefore}
			}
			if n, err := api.CountAgents(t.Context(), &agentv1.CountAgentsRequest{Filter: cf}); err != nil || n.Count != tt.want {
				t.Errorf("%s, count of %s: %v %v, want %d", name, what, n, err, tt.want)
			}
		}
		for what, f := range map[string]*agentv1.ListAgentsRequest_Filter{
			"no selectors":   {BySelectorMatch: &types.SelectorMatch{}},
			"a nil selector": {BySelectorMatch: &types.SelectorMatch{Selectors: []*types.Selector{nil}}},
			"unknown match":  {BySelectorMatch: &types.SelectorMatch{Match: 77, Selectors: sels("a:b")}},
			"no time":        {ByExpiresBefore: "tomorrow"},
		} {
			if _, err := api.ListAgents(t.Context(), &agentv1.ListAgentsRequest{Filter: f}); code(err) != codes.InvalidArgument {
				t.Errorf("%s, %s: %v", name, what, err)
			}
		}
	}
}

func TestAgentsPagesAndMasks(t *testing.T) {
	h := start(t, config(t.TempDir()))
	paths := h.knownAgents()
	api := agentv1.NewAgentClient(h.admin)
	filter := &agentv1.ListAgentsRequest_Filter{ByCanReattest: wrapperspb.Bool(true)}
	var got, tokens []string
	for token := ""; ; {
		r, err := api.ListAgents(t.Context(), &agentv1.ListAgentsRequest{Filter: filter, PageSize: 5, PageToken: token, OutputMask: &types.AgentMask{CanReattest: true}})
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range r.Agents {
			got = append(got, a.Id.Path)
			if !a.CanReattest || a.AttestationType != "" || a.X509SvidSerialNumber != "" || a.X509SvidExpiresAt != 0 || a.Selectors != nil || a.AgentVersion != "" {
				t.Errorf("the mask shows %v", a)
			}
		}
		if len(got) == 5 { // what goes between pages takes nobody else along
			if _, err := api.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: pid(got[4])}); err != nil {
				t.Fatal(err)
			}
		}
		if token = r.NextPageToken; token == "" {
			break
		}
		tokens = append(tokens, token)
	}
	if len(got) != 12 || !slices.IsSorted(got) {
		t.Errorf("pages hold %v", got)
	}
	for name, req := range map[string]*agentv1.ListAgentsRequest{
		"made up":           {PageToken: "AAAA", Filter: filter},
		"of another filter": {PageToken: tokens[0]},
		"cut":               {PageToken: tokens[0][:10], Filter: filter},
		"changed":           {PageToken: "B" + tokens[0][1:], Filter: filter},
		"padded":            {PageToken: tokens[0] + "==", Filter: filter},
		"huge":              {PageToken: strings.Repeat("A", 1<<20), Filter: filter},
		"a negative size":   {PageSize: -1},
	} {
		if _, err := api.ListAgents(t.Context(), req); code(err) != codes.InvalidArgument {
			t.Errorf("token %s: %v", name, err)
		}
	}
	if r, err := api.ListAgents(t.Context(), &agentv1.ListAgentsRequest{PageSize: 1 << 30}); err != nil || len(r.Agents) != 23 {
		t.Errorf("a page of 2^30: %d agents, %v", len(r.GetAgents()), err)
	}
	for i, m := range []*types.AgentMask{{AttestationType: true}, {X509SvidSerialNumber: true}, {X509SvidExpiresAt: true}, {Selectors: true}, {Banned: true}, {CanReattest: true}, {AgentVersion: true}, {}} {
		a, err := api.GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: pid(paths[0]), OutputMask: m})
		if err != nil {
			t.Fatal(err)
		}
		shown := []bool{a.AttestationType != "", a.X509SvidSerialNumber != "", a.X509SvidExpiresAt != 0, len(a.Selectors) > 0, a.Banned, a.CanReattest, a.AgentVersion != ""}
		for j, s := range shown {
			if s != (i == j && j != 4) || a.Id.Path != paths[0] { // this one is not banned
				t.Errorf("mask %d shows field %d: %t", i, j, s)
			}
		}
	}
	for name, id := range map[string]*types.SPIFFEID{"nothing": nil, "a workload": pid("/web"), "of another trust domain": {TrustDomain: "other.org", Path: paths[0]}, "malformed": pid("/spire/agent//x")} {
		for rpc, err := range map[string]error{
			"get":    func() error { _, err := api.GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: id}); return err }(),
			"ban":    func() error { _, err := api.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: id}); return err }(),
			"delete": func() error { _, err := api.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: id}); return err }(),
		} {
			if code(err) != codes.InvalidArgument {
				t.Errorf("%s %s: %v", rpc, name, err)
			}
		}
	}
	for rpc, err := range map[string]error{
		"get": func() error {
			_, err := api.GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: pid("/spire/agent/x/y")})
			return err
		}(),
		"ban": func() error {
			_, err := api.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: pid("/spire/agent/x/y")})
			return err
		}(),
		"delete": func() error {
			_, err := api.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: pid("/spire/agent/x/y")})
			return err
		}(),
	} {
		if code(err) != codes.NotFound {
			t.Errorf("%s of an unknown agent: %v", rpc, err)
		}
	}
}

// An agent reacts to the reason in the details: each must be exactly SPIRE's. [SPIRE-PROTOCOL §4, §12]
func TestAgentsAreToldWhyTheyAreRefused(t *testing.T) {
	var offset atomic.Int64
	c := config(t.TempDir())
	c.Now = func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	h := start(t, c)
	operator := agentv1.NewAgentClient(h.admin)
	post := func(a *testAgent) error {
		_, err := agentv1.NewAgentClient(a.conn).PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: "1.15.3"})
		return err
	}
	want := func(what string, err error, reason types.PermissionDeniedDetails_Reason) {
		t.Helper()
		if code(err) != codes.PermissionDenied || deniedReason(err) != reason {
			t.Errorf("%s: %v with %v; want PermissionDenied with %v", what, err, deniedReason(err), reason)
		}
	}
	wire := func(a *testAgent) *types.SPIFFEID { return pid(a.id.Path()) }
	attested := func() *testAgent {
		t.Helper()
		a := h.agent()
		if err := post(a); err != nil {
			t.Fatal(err)
		}
		return a
	}

	evicted := attested()
	if _, err := operator.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: wire(evicted)}); err != nil {
		t.Fatal(err)
	}
	want("evicted", post(evicted), types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)

	banned := attested()
	if _, err := operator.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: wire(banned)}); err != nil {
		t.Fatal(err)
	}
	want("banned", post(banned), types.PermissionDeniedDetails_AGENT_BANNED)
	if a, err := operator.GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: wire(banned)}); err != nil || !a.Banned || a.X509SvidSerialNumber != "" {
		t.Errorf("a banned agent: %v %v", a, err)
	}
	if _, err := operator.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: wire(banned)}); err != nil {
		t.Fatal(err)
	}
	want("banned and deleted", post(banned), types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)

	stale := attested()
	k := key(t)
	r, err := agentv1.NewAgentClient(stale.conn).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr(t, k)}})
	if err != nil {
		t.Fatal(err)
	}
	if err := post(stale); err != nil {
		t.Errorf("the old SVID is good until the new one is used: %v", err)
	}
	if err := post(&testAgent{id: stale.id, key: k, conn: h.dial(r.Svid.CertChain, k)}); err != nil {
		t.Fatal(err)
	}
	want("stale", post(stale), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)

	again := attested()
	node, err := h.ca.reg.NodeNow(t.Context(), again.id)
	if err != nil {
		t.Fatal(err)
	}
	node.CanReattest = true
	if err := h.ca.reg.PutNode(t.Context(), node, nil); err != nil {
		t.Fatal(err)
	}
	_, err = agentv1.NewAgentClient(again.conn).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr(t, again.key)}})
	want("renewing instead of attesting", err, types.PermissionDeniedDetails_AGENT_MUST_REATTEST)

	expired := attested()
	offset.Store(int64(2 * time.Hour)) // on the connection that it has; a new one fails in the handshake
	want("expired", post(expired), types.PermissionDeniedDetails_AGENT_EXPIRED)
	offset.Store(0)

	for name, conn := range map[string]*grpc.ClientConn{"anyone": h.dial(nil, nil), "the admin socket": h.admin, "an admin by SVID": h.adminConn("/ops")} {
		if _, err := agentv1.NewAgentClient(conn).PostStatus(t.Context(), &agentv1.PostStatusRequest{}); code(err) != codes.PermissionDenied || deniedReason(err) != types.PermissionDeniedDetails_UNKNOWN {
			t.Errorf("PostStatus by %s, who is no agent: %v", name, err)
		}
	}
}

func TestPostStatusNotesTheVersion(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a := h.agent()
	version := func() string {
		t.Helper()
		got, err := agentv1.NewAgentClient(h.admin).GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: pid(a.id.Path())})
		if err != nil {
			t.Fatal(err)
		}
		return got.AgentVersion
	}
	for _, step := range []struct{ say, want string }{{"1.15.3", "1.15.3"}, {"", "1.15.3"}, {"1.16.0", "1.16.0"}} {
		before := h.ca.reg.Revision()
		if _, err := agentv1.NewAgentClient(a.conn).PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: step.say, CurrentBundleSerial: 1}); err != nil {
			t.Fatal(err)
		}
		if got := version(); got != step.want {
			t.Errorf("after PostStatus of %q: version %q, want %q", step.say, got, step.want)
		}
		if step.say == "" && h.ca.reg.Revision() != before {
			t.Error("a status that says nothing new was a write")
		}
	}
	if _, err := agentv1.NewAgentClient(a.conn).PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: strings.Repeat("v", 1<<20)}); err != nil || len(version()) > 100 {
		t.Errorf("a version of 1 MiB: %v, %d bytes are kept", err, len(version()))
	}
}

// SPIRE's `token generate` and an agent with -joinToken: the token is passed on as it is, the agent's ID holds its public part.
func TestJoinTokenAsSPIREUsesIt(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api := agentv1.NewAgentClient(h.admin)
	token, err := api.CreateJoinToken(t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 600, AgentId: pid("/node/alias")})
	if err != nil || token.ExpiresAt < time.Now().Unix()+500 {
		t.Fatal(token, err)
	}
	k := key(t)
	svid, err := attest(t.Context(), h.dial(nil, nil), token.Value, csr(t, k))
	if err != nil {
		t.Fatal(err)
	}
	id, _, _ := strings.Cut(token.Value, ".")
	if svid.Id.Path != "/spire/agent/join_token/"+id {
		t.Errorf("the agent is %s", svid.Id.Path)
	}
	// The operator goes on with what the command printed: the whole token in a parent ID.
	e := entry("/workload", "unix:uid:1")
	e.ParentId = pid("/spire/agent/join_token/" + token.Value)
	below := entry("/below-alias", "unix:uid:2")
	below.ParentId = pid("/node/alias")
	entries := entryv1.NewEntryClient(h.admin)
	if r, err := entries.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e, below}}); err != nil || r.Results[0].Status.Code != 0 || r.Results[1].Status.Code != 0 {
		t.Fatal(r, err)
	}
	got, err := entryv1.NewEntryClient(h.dial(svid.CertChain, k)).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, x := range got.Entries {
		paths = append(paths, x.SpiffeId.Path)
	}
	for _, want := range []string{"/workload", "/below-alias"} {
		if !slices.Contains(paths, want) {
			t.Errorf("the agent gets %v, without %s", paths, want)
		}
	}
	for name, req := range map[string]*agentv1.CreateJoinTokenRequest{"no ttl": {}, "a negative ttl": {Ttl: -1}, "a ttl of 25 hours": {Ttl: 25 * 3600}, "a token of one's own": {Ttl: 60, Token: "abc"},
		"an alias elsewhere": {Ttl: 60, AgentId: &types.SPIFFEID{TrustDomain: "other.org", Path: "/x"}}, "a reserved alias": {Ttl: 60, AgentId: pid("/spire/server")}} {
		if _, err := api.CreateJoinToken(t.Context(), req); code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, rec := range h.audit("token.create") {
		if strings.Contains(fmt.Sprint(rec), strings.Split(token.Value, ".")[1]) {
			t.Errorf("the audit log holds the secret: %v", rec)
		}
	}
}
