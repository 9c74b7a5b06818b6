// Package scale tries with thousands what the other tests try with three. `make scale` runs all of it, which takes some minutes.
package scale

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/cli"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/source"
	"github.com/signet-id/signet/test/signettest"
)

// rules are call policies: for each service as many rules as perService, in documents of perDocument.
type rules struct{ services, perService, perDocument int }

// onThisNode is how many of the services run on the node of the test.
const onThisNode = 100

func (r rules) here() int { return min(onThisNode, r.services) }

// TestPolicies is small enough for every day; `make scale` tries the same with a million rules.
func TestPolicies(t *testing.T) {
	t.Run("one rule a document", func(t *testing.T) { rules{services: 150, perService: 10, perDocument: 1}.try(t) })
	t.Run("1,000 rules a document", func(t *testing.T) { rules{services: 8, perService: 3000, perDocument: 1000}.try(t) })
}

// try applies the rules with the command that an operator uses, and follows them to the decision in a workload.
func (r rules) try(t *testing.T) {
	s := signettest.Start(t, signettest.Config{NodeGroups: []string{"here"}, Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithTimeout(t.Context(), 25*time.Minute)
	defer cancel()
	var identities bytes.Buffer
	for i := range r.services {
		user, group := 100_000+i, "elsewhere"
		if i == 0 {
			user = os.Getuid()
		}
		if i < r.here() {
			group = "here"
		}
		fmt.Fprintf(&identities, "---\nkind: Identity\nname: s%d\nspiffeID: /services/s%d\nmatch: [\"unix:uid:%d\"]\non: [\"node:group:%s\"]\n", i, i, user, group)
	}
	apply(t, s, identities.Bytes())
	before := live()
	start := time.Now()
	r.applyAll(t, s)
	took := time.Since(start)
	total := r.services * r.perService
	t.Logf("%d rules for %d services, %d in a document, applied in %v (%.0f a second); %.0f bytes a rule in the memory of CA and agent",
		total, r.services, r.perDocument, took.Round(time.Millisecond), float64(total)/took.Seconds(), float64(live()-before)/float64(total))

	one := []*adminv1.Document{{Content: []byte("kind: CallPolicy\nname: one-more\nservice: /services/s1\nallow: [{from: [/services/s2]}]\n"), File: "one.yaml"}}
	start = time.Now()
	if _, err := adminv1.NewAdminClient(s.AdminConn()).Plan(ctx, &adminv1.ApplyRequest{Documents: one}); err != nil {
		t.Fatal(err)
	}
	t.Logf("plan of one more policy: %v", time.Since(start).Round(time.Microsecond))
	start = time.Now()
	apply(t, s, []byte("kind: CallPolicy\nname: any\nservice: /services/*\nallow: [{from: [/monitoring]}]\n"))
	t.Logf("plan and apply of one policy for every service: %v", time.Since(start).Round(time.Microsecond))

	start = time.Now()
	set := r.streamed(ctx, t, s)
	t.Logf("StreamPolicySet: %v", time.Since(start).Round(time.Millisecond))
	if got := countRules(set); got != total+1 {
		t.Errorf("StreamPolicySet gave %d rules of %d", got, total+1)
	}

	start = time.Now()
	if err := s.RestartAgent(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("restart of an agent with %d of the services, until it holds their policies: %v", r.here(), time.Since(start).Round(time.Millisecond))

	before = live()
	start = time.Now()
	src, err := source.New(ctx, source.Options{Addr: s.WorkloadAPI(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	t.Logf("a workload with %d rules: decides after %v; its heap and its agent's grew by %.1f MB", r.perService, time.Since(start).Round(time.Millisecond), float64(live()-before)/1e6)
	r.decides(ctx, t, s, src, true)

	// A change reaches it, however much there is.
	start = time.Now()
	apply(t, s, []byte("kind: CallPolicy\nname: deny\nservice: /services/s0\ndeny: [{from: [/callers/**]}]\n"))
	r.decides(ctx, t, s, src, false)
	t.Logf("a deny was in force after %v", time.Since(start).Round(time.Millisecond))
	runtime.KeepAlive(src)
}

// decides waits until the first and the last rule of the workload allow, or do not.
func (r rules) decides(ctx context.Context, t *testing.T, s *signettest.Signet, src *source.Source, want bool) {
	t.Helper()
	for _, n := range []int{0, r.perService - 1} {
		q := &policy.Request{Service: s.ID("/services/s0"), Peer: s.ID(caller(0, n)), Protocol: policy.ProtocolTLS}
		for src.Policies().Decide(q).Allowed != want {
			select {
			case <-src.Updated():
			case <-ctx.Done():
				t.Fatalf("rule %d: allowed is not %v", n, want)
			}
		}
	}
	nobody := &policy.Request{Service: s.ID("/services/s0"), Peer: spiffeid.RequireFromString("spiffe://example.org/callers/nobody"), Protocol: policy.ProtocolTLS}
	if src.Policies().Decide(nobody).Allowed {
		t.Error("a caller that no rule names is allowed")
	}
}

func caller(service, rule int) string { return fmt.Sprintf("/callers/of-s%d/c%d", service, rule) }

// oneCall is about how many bytes of documents one call of signet apply gets; it takes 16 MiB.
const oneCall = 12 << 20

// applyAll applies the rules, in as many calls as they need.
func (r rules) applyAll(t *testing.T, s *signettest.Signet) {
	t.Helper()
	var b bytes.Buffer
	for i := range r.services {
		for n := range r.perService {
			if n%r.perDocument == 0 {
				if b.Len() > oneCall {
					apply(t, s, b.Bytes())
					b.Reset()
				}
				fmt.Fprintf(&b, "---\nkind: CallPolicy\nname: s%d-%d\nservice: /services/s%d\nallow:\n", i, n/r.perDocument, i)
			}
			fmt.Fprintf(&b, "  - from: [%s]\n", caller(i, n))
		}
	}
	apply(t, s, b.Bytes())
}

// apply runs signet apply on a file.
func apply(t *testing.T, s *signettest.Signet, documents []byte) {
	t.Helper()
	if out, status := tryApply(t, s, documents); status != 0 {
		t.Fatalf("signet apply: status %d, %s", status, out[max(0, len(out)-2000):])
	}
}

func tryApply(t *testing.T, s *signettest.Signet, documents []byte) (stderr string, status int) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "documents.yaml")
	if err := os.WriteFile(file, documents, 0o600); err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	status = cli.Main(t.Context(), []string{"apply", "-f", file, "--yes", "--socket", s.CASocket()}, bytes.NewReader(nil), io.Discard, &errs)
	return errs.String(), status
}

func (r rules) streamed(ctx context.Context, t *testing.T, s *signettest.Signet) *policyv1.PolicySet {
	t.Helper()
	stream, err := adminv1.NewRolloutsClient(s.AdminConn()).StreamPolicySet(ctx, &adminv1.StreamPolicySetRequest{})
	if err != nil {
		t.Fatal(err)
	}
	set := &policyv1.PolicySet{}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return set
		}
		if err != nil {
			t.Fatal(err)
		}
		set.Policies = append(set.Policies, m.GetPart().GetPolicies()...)
	}
}

func countRules(set *policyv1.PolicySet) int {
	n := 0
	for _, p := range set.GetPolicies() {
		n += len(p.GetRules())
	}
	return n
}

// live is what is on the heap after a collection.
func live() int64 {
	runtime.GC()
	runtime.GC() // what the first one only marked, such as pools
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
