package agent

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/signet-id/signet/workloadapi"
)

// TestRefusalsAreBounded: however many processes are refused, for however many reasons, what is remembered has an end; the
// latest stays.
func TestRefusalsAreBounded(t *testing.T) {
	r := newRefusals()
	now := time.Now()
	for i := range 3 * maxCallers {
		r.note(workloadapi.CallEnd{PID: int32(i + 1), UID: 7, Method: "/a", Reason: workloadapi.ReasonNoIdentity, Text: strings.Repeat("x", 10*maxTold)}, now)
	}
	if r.recent.Len() != maxCallers || len(r.callers) != maxCallers {
		t.Errorf("%d and %d callers are remembered, want %d", r.recent.Len(), len(r.callers), maxCallers)
	}
	if r.of(1, time.Time{}) != nil {
		t.Error("the oldest is remembered still")
	}
	last := int32(3 * maxCallers)
	if got := r.of(last, time.Time{}); len(got) != 1 || len(got[0].Text) != maxTold {
		t.Errorf("the latest: %+v", got)
	}
	for i := range 3 * maxKinds {
		r.note(workloadapi.CallEnd{PID: last, UID: 7, Method: fmt.Sprint("/", i), Reason: workloadapi.ReasonHeaderMissing, Text: "é" + strings.Repeat("é", maxTold)}, now.Add(time.Second))
	}
	got := r.of(last, time.Time{})
	if len(got) != maxKinds || got[0].Method != fmt.Sprint("/", 3*maxKinds-1) {
		t.Errorf("%d kinds, the latest %+v", len(got), got[0])
	}
	for range 4 {
		r.note(workloadapi.CallEnd{PID: last, UID: 7, Method: "/x", Reason: workloadapi.ReasonHeaderMissing}, now.Add(2*time.Second))
	}
	if got := r.of(last, time.Time{}); got[0].Count != 4 || got[0].Method != "/x" {
		t.Errorf("four times the same: %+v", got[0])
	}
	// A process that began later is another one with the same number.
	if got := r.of(last, now.Add(time.Hour)); len(got) != 0 {
		t.Errorf("refusals of a process of before: %+v", got)
	}
	// What is no refusal, or the end of the agent, is none.
	r.note(workloadapi.CallEnd{PID: 5, Reason: ""}, now)
	r.note(workloadapi.CallEnd{PID: 5, Reason: workloadapi.ReasonStopping}, now)
	if got := r.of(5, time.Time{}); len(got) != 0 {
		t.Errorf("no refusals: %+v", got)
	}
}
