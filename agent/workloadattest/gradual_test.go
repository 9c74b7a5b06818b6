package workloadattest_test

import (
	"context"
	"os/exec"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/signet-id/signet/agent/workloadattest"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi/peer"
)

// A slowMethod knows the pod at once, and the container when it is told so.
type slowMethod struct{ listed atomic.Bool }

func (*slowMethod) Name() string { return "slow" }

func (m *slowMethod) Selectors(ctx context.Context, p *peer.Process, state peer.Snapshot) ([]spiffe.Selector, error) {
	all, _, err := m.Gradually(ctx, p, state, nil)
	return all, err
}

func (m *slowMethod) Gradually(_ context.Context, _ *peer.Process, _ peer.Snapshot, enough workloadattest.Enough) ([]spiffe.Selector, bool, error) {
	pod := []spiffe.Selector{{Type: "slow", Value: "pod:a"}}
	if !m.listed.Load() && enough != nil && enough(pod, func(s spiffe.Selector) bool { return s.Value == "container:b" }) {
		return pod, true, nil
	}
	return append(pod, spiffe.Selector{Type: "slow", Value: "container:b"}), false, nil
}

// What is found early counts once, and is asked for again until all is known; without somebody to say what is enough nothing is early.
func TestGradualMethods(t *testing.T) {
	p := start(t, newTable(t), func(*exec.Cmd) {}, "/proc/self/exe")
	m := &slowMethod{}
	enough := atomic.Bool{}
	enough.Store(true)
	a := attestor(t, workloadattest.Config{Methods: []workloadattest.Method{m}, Enough: func(have []spiffe.Selector, later func(spiffe.Selector) bool) bool {
		return enough.Load() && len(have) == 1 && later(spiffe.Selector{Type: "slow", Value: "container:b"})
	}})
	for range 2 {
		c, err := a.Attest(t.Context(), p)
		if err != nil || !c.Provisional || c.Known || len(c.Selectors) != 1 {
			t.Fatalf("early: %+v, %v", c, err)
		}
	}
	_, reports, err := a.Explain(t.Context(), p)
	if err != nil || len(reports[0].Selectors) != 2 {
		t.Errorf("an explanation has %+v, %v: want all there is", reports, err)
	}
	m.listed.Store(true)
	for i := range 2 {
		c, err := a.Attest(t.Context(), p)
		if err != nil || c.Provisional || c.Known != (i == 1) || len(c.Selectors) != 2 {
			t.Fatalf("then, call %d: %+v, %v", i, c, err)
		}
	}

	enough.Store(false)
	m.listed.Store(false)
	for name, a := range map[string]*workloadattest.Attestor{
		"not enough": attestor(t, workloadattest.Config{Methods: []workloadattest.Method{m}, Enough: func([]spiffe.Selector, func(spiffe.Selector) bool) bool { return false }}),
		"nobody":     attestor(t, workloadattest.Config{Methods: []workloadattest.Method{m}}),
	} {
		if got := attest(t, a, p); !slices.Equal(got, []string{"slow:pod:a", "slow:container:b"}) {
			t.Errorf("%s: %q", name, got)
		}
	}
}
