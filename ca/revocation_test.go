package ca

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// revoked is what an agent that follows knows to be revoked.
type revoked struct {
	t     *testing.T
	s     nodev1.Node_FollowClient
	epoch string
	rev   int64
	items map[string]*policyv1.Revocation
	parts int
	crls  map[string]*nodev1.CRL
	shots int // snapshots
}

func followRevoked(t *testing.T, a *testAgent) *revoked {
	return &revoked{t: t, s: hello(t, a, "", 0), items: map[string]*policyv1.Revocation{}, crls: map[string]*nodev1.CRL{}}
}

// resume continues on another stream.
func (r *revoked) resume(a *testAgent) {
	r.s = hello(r.t, a, r.epoch, r.rev)
}

func (r *revoked) next() error {
	r.t.Helper()
	fresh := false
	for {
		m, err := r.s.Recv()
		if err != nil {
			return err
		}
		if m.Snapshot && !fresh {
			fresh = true
			r.shots++
			clear(r.items)
			clear(r.crls)
		}
		r.parts++
		for _, it := range m.Revocations {
			r.items[it.Name] = it
		}
		for _, name := range m.RemovedRevocations {
			delete(r.items, name)
		}
		for _, c := range m.Crls {
			r.crls[c.AuthorityId] = c
		}
		for _, id := range m.RemovedCrls {
			delete(r.crls, id)
		}
		if m.Complete {
			r.epoch, r.rev = m.Epoch, m.To
			return nil
		}
	}
}

// until reads until what is revoked is as wanted. The test's context bounds it.
func (r *revoked) until(what string, is func() bool) {
	r.t.Helper()
	for !is() {
		if err := r.next(); err != nil {
			r.t.Fatalf("waiting until %s: %v; there are %v", what, err, slices.Sorted(maps.Keys(r.items)))
		}
	}
}

func revocation(name, body string) string {
	return fmt.Sprintf("---\nkind: Revocation\nname: %s\n%s\n", name, body)
}

func (h *harness) unrevoke(name string) {
	h.t.Helper()
	if _, err := adminv1.NewAdminClient(h.admin).DeleteResource(h.t.Context(), &adminv1.DeleteResourceRequest{Kind: "Revocation", Name: name}); err != nil {
		h.t.Fatal(err)
	}
}

func TestRevocationsReachEveryAgent(t *testing.T) {
	h := start(t, config(t.TempDir()))
	h.apply(revocation("early", "jti: one"))
	a, b := h.agent("left"), h.agent()
	fa, fb := followRevoked(t, a), followRevoked(t, b)
	for _, f := range []*revoked{fa, fb} {
		f.until("the snapshot has come", func() bool { return f.items["early"] != nil })
	}
	h.apply(revocation("web", "id: /web\nreason: the key leaked\nexpires: \"2090-01-01T00:00:00Z\"") + revocation("one", "serial: 01:02"))
	for _, f := range []*revoked{fa, fb} {
		f.until("both are there", func() bool { return len(f.items) == 3 })
		web := f.items["web"]
		if web.GetSpiffeId() != "spiffe://example.org/web" || web.Reason != "the key leaked" || web.ExpiresAt != 3786912000 || web.Revision == 0 {
			t.Errorf("web is %v", web)
		}
		if string(f.items["one"].GetSerial()) != "\x01\x02" || len(f.items["early"].GetJtiHash()) != 32 {
			t.Errorf("they are %v", f.items)
		}
		if f.shots != 1 {
			t.Errorf("%d snapshots; differences are enough", f.shots)
		}
	}
	// A change replaces what was revoked, and un-revoking takes it away.
	h.apply(revocation("web", "id: /shop"))
	h.unrevoke("early")
	for _, f := range []*revoked{fa, fb} {
		f.until("the change is there", func() bool {
			return f.items["early"] == nil && f.items["web"].GetSpiffeId() == "spiffe://example.org/shop"
		})
	}
	// Who was away hears of what came and went meanwhile, without a snapshot; what came and went back is in neither.
	fa.s.CloseSend()
	for fa.next() == nil {
	}
	h.apply(revocation("while-away", "id: /gone"))
	h.apply(revocation("short", "id: /short"))
	h.unrevoke("short")
	h.unrevoke("one")
	fa.resume(a)
	fa.until("what it missed is there", func() bool { return fa.items["while-away"] != nil })
	if fa.items["one"] != nil || fa.items["short"] != nil || fa.shots != 1 {
		t.Errorf("after %d snapshots there are %v", fa.shots, fa.items)
	}
	if names := h.resources("Revocation"); !slices.Equal(names, []string{"web", "while-away"}) {
		t.Errorf("there are the documents %v", names)
	}
	created := h.audit("resource.create")
	if !slices.ContainsFunc(created, func(r map[string]any) bool {
		d := r["details"].(map[string]any)
		return r["subject"] == "Revocation/web" && d["target"] == "id spiffe://example.org/web" && d["reason"] == "the key leaked"
	}) {
		t.Errorf("the audit log has %v", created)
	}
}

func (h *harness) resources(kind string) (names []string) {
	h.t.Helper()
	r, err := adminv1.NewAdminClient(h.admin).GetResources(h.t.Context(), &adminv1.GetResourcesRequest{Kind: kind, PageSize: 1000})
	if err != nil {
		h.t.Fatal(err)
	}
	for _, one := range r.Resources {
		names = append(names, one.Name)
	}
	return names
}

// applyErr applies and returns the error.
func (h *harness) applyErr(docs string, yes bool) error {
	_, err := adminv1.NewAdminClient(h.admin).Apply(h.t.Context(), &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(docs), File: "test.yaml"}}, Yes: yes})
	return err
}

func TestRevocationEndsByItself(t *testing.T) {
	var clock movedClock
	c := config(t.TempDir())
	c.Now = clock.now
	h := start(t, c)
	h.apply(revocation("short", fmt.Sprintf("id: /web\nexpires: %q", time.Now().Add(time.Hour).UTC().Format(time.RFC3339))) + revocation("long", "id: /shop"))
	if err := h.applyErr(revocation("past", "id: /web\nexpires: \"2020-01-01T00:00:00Z\""), false); code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "is past") {
		t.Errorf("one that has ended: %v", err)
	}
	a := h.agent()
	f := followRevoked(t, a)
	f.until("both are there", func() bool { return len(f.items) == 2 })
	h.ca.expireRevocations(t.Context())
	if names := h.resources("Revocation"); len(names) != 2 {
		t.Fatalf("before its end there are %v", names)
	}
	clock.move(time.Hour + 2*time.Second) // the agent's own SVID still holds: it is of a minute ago, by an hour and its backdate
	h.ca.expireRevocations(t.Context())
	if names := h.resources("Revocation"); len(names) != 2 {
		t.Fatalf("within the grace there are %v", names)
	}
	clock.move(time.Hour + 10*time.Second)
	h.ca.expireRevocations(t.Context())
	if names := h.resources("Revocation"); !slices.Equal(names, []string{"long"}) {
		t.Errorf("after its end there are %v", names)
	}
	if r := h.audit("revocation.expired"); len(r) != 1 || r[0]["subject"] != "Revocation/short" {
		t.Errorf("the audit log has %v", r)
	}
}

// TestRevocationsThatHitMuchNeedAYes: what locks out an admin, or most of the fleet, is not done by mistake.
func TestRevocationsThatHitMuchNeedAYes(t *testing.T) {
	c := config(t.TempDir())
	c.AdminIDs = []string{"spiffe://example.org/operator"}
	h := start(t, c)
	var docs strings.Builder
	for i := range 12 {
		fmt.Fprintf(&docs, "---\nkind: Identity\nname: w%d\nspiffeID: /ns/w%d\nmatch: [\"unix:uid:%d\"]\n", i, i, i)
	}
	docs.WriteString("---\nkind: Identity\nname: boss\nspiffeID: /boss\nmatch: [\"unix:uid:99\"]\nadmin: true\n")
	h.apply(docs.String())
	for name, tt := range map[string]struct{ body, want string }{
		"everybody":          {"id: /**", "locks out the admin"},
		"an admin by config": {"id: /operator", "locks out the admin spiffe://example.org/operator"},
		"an admin by entry":  {"id: /boss", "locks out the admin spiffe://example.org/boss"},
		"one namespace":      {"id: /ns/**", "it revokes 12 registered IDs"},
		"one ID":             {"id: /ns/w1", ""},
		"a fresh start":      {"id: /ns/**\nissuedBefore: \"2026-01-01T00:00:00Z\"", ""},
		"a wildcard first":   {"id: /*/nobody", "begins with a wildcard"},
	} {
		doc := revocation(strings.ToLower(strings.ReplaceAll(name, " ", "-")), tt.body)
		plan, err := adminv1.NewAdminClient(h.admin).Plan(t.Context(), &adminv1.ApplyRequest{Documents: []*adminv1.Document{{Content: []byte(doc), File: "t"}}})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got := strings.Join(plan.Warnings, " "); tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
			t.Errorf("%s: the plan warns %q; want %q", name, got, tt.want)
		}
		err = h.applyErr(doc, false)
		if tt.want == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "--yes") {
			t.Errorf("%s: %v; want a refusal that says %q", name, err, tt.want)
		}
		if err := h.applyErr(doc, true); err != nil {
			t.Errorf("%s, with a yes: %v", name, err)
		}
	}
}

// TestTwoOperatorsRevokeAtOnce: neither act is lost, and of two changes of one document planned alike one wins.
func TestTwoOperatorsRevokeAtOnce(t *testing.T) {
	h := start(t, config(t.TempDir()))
	a := h.agent()
	f := followRevoked(t, a)
	f.until("the first snapshot", func() bool { return f.shots == 1 })
	const each = 20
	errs := make(chan error, 2*each)
	for who := range 2 {
		go func() {
			for i := range each {
				errs <- h.applyErr(revocation(fmt.Sprintf("op%d-%d", who, i), fmt.Sprintf("id: /op%d/%d", who, i)), false)
			}
		}()
	}
	for range 2 * each {
		if err := <-errs; err != nil {
			t.Errorf("apply: %v", err)
		}
	}
	f.until("all are there", func() bool { return len(f.items) == 2*each })
	at := h.apply(revocation("both", "id: /both")).Revision
	change := func(id string) error {
		_, err := adminv1.NewAdminClient(h.admin).Apply(t.Context(), &adminv1.ApplyRequest{PlannedAt: at, Documents: []*adminv1.Document{{Content: []byte(revocation("both", "id: "+id)), File: "t"}}})
		return err
	}
	first, second := change("/first"), change("/second")
	if first != nil || code(second) != codes.Aborted {
		t.Errorf("two changes of one plan: %v, %v", first, second)
	}
}

// TestManyRevocationsArriveInParts: a snapshot is sent in messages that gRPC takes, and what is left out of a long
// history is made good by another snapshot.
func TestManyRevocationsArriveInParts(t *testing.T) {
	h := start(t, config(t.TempDir()))
	reason := strings.Repeat("x", 1000)
	for chunk := range 30 {
		var docs strings.Builder
		for i := range 100 {
			docs.WriteString(revocation(fmt.Sprintf("r%d-%d", chunk, i), fmt.Sprintf("id: /r/%d/%d\nreason: %s", chunk, i, reason)))
		}
		h.apply(docs.String())
	}
	a := h.agent()
	f := followRevoked(t, a)
	f.until("all are there", func() bool { return len(f.items) == 3000 })
	if f.parts < 3 {
		t.Errorf("%d parts", f.parts)
	}
}
