package observe

import (
	"fmt"
	"maps"
	"net/http"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/test/signettest"
)

// TestFromTheServiceToTheOperator follows decisions of a server of the library through agent and CA: denials one by one with
// the id that the caller was told, the others counted.
func TestFromTheServiceToTheOperator(t *testing.T) {
	t.Parallel()
	w := newWorld(t, signettest.Config{})
	url := w.serve()
	c := w.client(reader)
	for range 5 {
		if code, _ := w.call(c, "GET", url+"/v1/a?secret=1"); code != http.StatusOK {
			t.Fatalf("GET answers %d", code)
		}
	}
	code, post := w.call(c, "POST", url+"/v1/a?secret=1")
	if code != http.StatusForbidden || post == "" {
		t.Fatalf("POST answers %d with decision %q", code, post)
	}
	code, put := w.call(c, "PUT", url+"/v1/b")
	if code != http.StatusForbidden || put == "" {
		t.Fatalf("PUT answers %d with decision %q", code, put)
	}
	w.refusedAtTheHandshake(strings.TrimPrefix(url, "https://"), service)

	var got *adminv1.GetDecisionResponse
	w.until("the decision is known to the CA", func() (err error) {
		got, err = w.observations().GetDecision(w.ctx, &adminv1.GetDecisionRequest{DecisionId: post})
		return err
	})
	o := got.GetObservation()
	if o.GetService() != service || o.GetPeer() != reader || o.GetAllowed() || o.GetReason() != "no_allow" || o.GetMethod() != "POST" || o.GetPath() != "/v1/a" ||
		o.GetProtocol() != policyv1.CallProtocol_CALL_PROTOCOL_HTTP || o.GetPoint() != "http" || o.GetCount() != 1 || o.GetRevision() == 0 || o.GetFirst() != o.GetLast() ||
		!strings.HasPrefix(o.GetAgentId(), "spiffe://example.org/spire/agent/") {
		t.Errorf("the denial of POST is told as %v", o)
	}
	if p := got.GetPolicies().GetPolicies(); len(p) != 1 || p[0].GetName() != "documents" {
		t.Errorf("the policies of the service are told as %v", p)
	}

	name := func(o *policyv1.Observation) string {
		return fmt.Sprint(o.GetPeer(), " ", o.GetProtocol(), " ", o.GetMethod(), " ", o.GetPath(), " ", o.GetReason(), " ", o.GetShadowReason())
	}
	// Counts come with the end of the program, or every few seconds.
	if err := w.policies.Close(); err != nil {
		t.Fatal(err)
	}
	want := map[string]uint64{
		reader + " CALL_PROTOCOL_HTTP GET /v1/a allowed allowed":    5,
		reader + " CALL_PROTOCOL_HTTP POST /v1/a no_allow no_allow": 1,
		reader + " CALL_PROTOCOL_HTTP PUT /v1/b no_allow allowed":   1,
		service + " CALL_PROTOCOL_TLS   no_allow no_allow":          1,
	}
	w.until("all decisions are counted", func() error {
		have, err := w.total(&adminv1.ListObservationsRequest{Service: service}, name)
		if err == nil && !maps.Equal(have, want) {
			err = fmt.Errorf("have %v, want %v", have, want)
		}
		return err
	})
	for verdict, want := range map[adminv1.Verdict]int{adminv1.Verdict_VERDICT_DENIED: 3, adminv1.Verdict_VERDICT_ALLOWED: 1, adminv1.Verdict_VERDICT_SHADOW: 1} {
		if have, err := w.list(&adminv1.ListObservationsRequest{Verdict: verdict}); err != nil || len(have) != want {
			t.Errorf("%v lists %v, %v; want %d", verdict, have, err, want)
		}
	}
	if have, err := w.list(&adminv1.ListObservationsRequest{Peer: service}); err != nil || len(have) != 1 {
		t.Errorf("the refused connection is listed as %v, %v", have, err)
	}
	_, err := w.observations().GetDecision(w.ctx, &adminv1.GetDecisionRequest{DecisionId: "NEVERMADE"})
	if status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), "168h") {
		t.Errorf("a decision that was never made: %v; want NotFound and for how long they are kept", err)
	}
}
