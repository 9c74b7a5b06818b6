package ca

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// TestADenialThatAnAgentReportsRollsBack: from the report of an agent to the former policy at the agent, with a CA that is
// restarted in the middle, and an agent that comes back.
func TestADenialThatAnAgentReportsRollsBack(t *testing.T) {
	dir := t.TempDir()
	h := start(t, config(dir))
	h.apply("kind: Identity\nname: web\nspiffeID: /web\nmatch: [\"unix:uid:1\"]\n")
	h.apply("kind: CallPolicy\nname: p\nservice: /web\nallow: [{from: [/old]}]\n")
	rollouts := adminv1.NewRolloutsClient(h.admin)
	next := &adminv1.StartRolloutRequest{Name: "v2", Steps: []int32{100}, Bake: 3600,
		Documents: []*adminv1.Document{{Content: []byte("kind: CallPolicy\nname: p\nservice: /web\nallow: [{from: [/new]}]\n"), File: "test.yaml"}}}
	if _, err := rollouts.StartRollout(t.Context(), next); code(err) != codes.FailedPrecondition {
		t.Errorf("a roll-out that locks callers out: %v", err)
	}
	next.Yes = true
	if _, err := rollouts.StartRollout(t.Context(), next); err != nil {
		t.Fatal(err)
	}
	if _, err := adminv1.NewAdminClient(h.admin).DeleteResource(t.Context(), &adminv1.DeleteResourceRequest{Kind: "CallPolicy", Name: "p", Yes: true}); code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "v2") {
		t.Errorf("deleting what is rolled out: %v", err)
	}
	h.close()
	h = start(t, config(dir))
	rollouts = adminv1.NewRolloutsClient(h.admin)
	a := h.agent()
	has := func(want string) {
		t.Helper()
		s := hello(t, a, "", 0)
		m, err := s.Recv() // all of it: it is little
		if err != nil || !m.Complete || len(m.Policies) != 1 {
			t.Fatalf("%v, %v", m, err)
		}
		if p := m.Policies[0]; p.Rules[0].From[0] != "spiffe://example.org"+want || (want == "/new") != (len(p.GetRollout().GetFormer().GetRules()) > 0) {
			t.Fatalf("the agent has %v, want %s", p, want)
		}
	}
	has("/new")
	pushed := hello(t, a, "", 0)
	now := time.Now().UnixNano()
	if _, err := nodev1.NewNodeClient(a.conn).ReportObservations(t.Context(), &nodev1.ReportObservationsRequest{Observations: []*policyv1.Observation{{
		First: now, Last: now, Count: 1, Service: "spiffe://example.org/web", Peer: "spiffe://example.org/old", Protocol: policyv1.CallProtocol_CALL_PROTOCOL_TLS,
		Reason: "no_allow", Point: "tls", FormerlyAllowed: true, Rollout: "v2"}}}); err != nil {
		t.Fatal(err)
	}
	if st := h.ca.observations.Stats(); st.Accepted != 1 {
		t.Fatalf("%+v", st)
	}
	for { // going back is pushed to the agent
		m, err := pushed.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(m.Policies) == 1 && m.Policies[0].Rules[0].From[0] == "spiffe://example.org/old" {
			break
		}
	}
	o, err := rollouts.ListRollouts(t.Context(), &adminv1.ListRolloutsRequest{Name: "v2"})
	if err != nil {
		t.Fatal(err)
	}
	if r := o.Rollouts[0]; r.State != "rolled_back" || r.Denials != 1 || !strings.Contains(r.Reason, "1 calls were denied") {
		t.Errorf("%v", r)
	}
	has("/old")
	if len(h.audit("rollout.rollback")) != 1 {
		t.Error("the audit log does not say that it went back")
	}
}
