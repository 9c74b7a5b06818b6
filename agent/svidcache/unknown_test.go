package svidcache

import (
	"slices"
	"testing"
	"time"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// TestAStartingCATakesNoPodsIdentity: what a CA does not know yet is kept, with its policies, until it does.
func TestAStartingCATakesNoPodsIdentity(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, nil)
		pod, plain, other := anEntry("signet.pod.prod.1", "/ns/shop/sa/web", "k8s:pod-uid:1"), anEntry("plain", "/plain", "unix:uid:1"), anEntry("signet.pod.test.1", "/ns/test/sa/web", "k8s:pod-uid:2")
		w.start(pod, plain, other)
		w.change(&nodev1.FollowResponse{Policies: []*policyv1.Policy{
			{Name: "pods", Revision: 1, Services: []string{"spiffe://example.org/ns/shop/sa/web"}},
			{Name: "both", Revision: 1, Services: []string{"spiffe://example.org/ns/**", "spiffe://example.org/plain"}},
			{Name: "changed", Revision: 1, Services: []string{"spiffe://example.org/ns/shop/sa/web"}},
			{Name: "plain", Revision: 1, Services: []string{"spiffe://example.org/plain"}},
		}})
		updates, stop := w.watch(caller(7, "k8s:pod-uid:1"))
		defer stop()
		if got := ids(w.next(updates, time.Minute)); got != "/ns/shop/sa/web" {
			t.Fatalf("the pod is %q", got)
		}

		snapshot := func(unknown []string, entries []*nodev1.Entry, policies ...*policyv1.Policy) {
			w.revision++
			deny := policyv1.DefaultsMode_DEFAULTS_MODE_DENY
			w.apply(&nodev1.FollowResponse{Epoch: "e1", To: w.revision, Snapshot: true, Complete: true, Entries: entries, Policies: policies, PolicyDefaults: &deny,
				UnknownEntryPrefixes: unknown, Bundles: []*nodev1.Bundle{w.ca.bundle(w.revision, []string{"k1"}, w.ca.active)}})
		}
		services := func() map[string][]string {
			out := map[string][]string{}
			for _, p := range w.cache.state.Load().policies.sorted {
				out[p.GetName()] = p.GetServices()
			}
			return out
		}
		snapshot([]string{"signet.pod.prod."}, []*nodev1.Entry{plain}, &policyv1.Policy{Name: "both", Revision: 1, Services: []string{"spiffe://example.org/plain"}},
			&policyv1.Policy{Name: "changed", Revision: 2, Services: []string{"spiffe://example.org/plain"}})
		if got := ids(w.next(updates, time.Minute)); got != "/ns/shop/sa/web" { // its policies are other ones
			t.Errorf("with a CA that has just started the pod is %q", got)
		}
		s := w.cache.state.Load()
		if _, ok := s.entries.get("signet.pod.prod.1"); !ok {
			t.Error("the entry of a pod is lost to a CA that does not know of it yet")
		}
		if _, ok := s.entries.get("signet.pod.test.1"); ok {
			t.Error("an entry that the CA knows is gone is kept")
		}
		got := services()
		if len(got) != 3 || !slices.Equal(got["pods"], []string{"spiffe://example.org/ns/shop/sa/web"}) || !slices.Equal(got["changed"], []string{"spiffe://example.org/plain"}) ||
			!slices.Equal(got["both"], []string{"spiffe://example.org/plain", "spiffe://example.org/ns/**"}) {
			t.Errorf("policies %q", got)
		}

		snapshot(nil, []*nodev1.Entry{plain})
		if got := ids(w.next(updates, time.Minute)); got != "" {
			t.Errorf("once the CA knows that the pod is gone it is %q", got)
		}
		if got := services(); len(got) != 0 {
			t.Errorf("policies %q", got)
		}
	})
}

// TestWhatIsKeptIsTheSame: an entry and a bundle that are kept read back as they were.
func TestWhatIsKeptIsTheSame(t *testing.T) {
	w := &nodev1.Entry{Id: "signet.pod.prod.1", Revision: 3, CreatedAt: 4, SpiffeId: "spiffe://example.org/a", Selectors: []string{"k8s:pod-uid:1", "unix:uid:1"}, FederatesWith: []string{"partner.example"},
		Hint: "h", JwtIncludeJti: true, DisableX509Prefetch: true, ExpiresAt: 1795320000}
	e, err := readEntry(td, w)
	if err != nil {
		t.Fatal(err)
	}
	again, err := readEntry(td, e.message())
	if err != nil || !e.same(again) || e.noPrefetch != again.noPrefetch || e.id != again.id {
		t.Errorf("%+v became %+v, %v", e, again, err)
	}
}
