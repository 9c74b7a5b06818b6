package workloadapi_test

import (
	"path/filepath"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"

	"github.com/signet-id/signet/workloadapi"
)

// TestAFloodOfOneProcessLeavesTheRest: who begins too many calls is told so before it is looked at, and nobody else is.
func TestAFloodOfOneProcessLeavesTheRest(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	const perSecond = 20
	e := serveAt(t, filepath.Join(openDir(t), "agent.sock"), newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")}),
		func(c *workloadapi.Config) { c.MaxCallsPerSecond = perSecond })
	api := e.client(t)
	refused := 0
	const calls = 50 * perSecond // more than the burst and what is added while they last
	for range calls {
		_, err := api.FetchJWTSVID(spiffeCtx(t), &workload.JWTSVIDRequest{Audience: []string{"x"}})
		if err == nil {
			continue
		}
		wantCode(t, err, codes.ResourceExhausted, "too many calls a second")
		if got := workloadapi.ReasonOf(err); got != workloadapi.ReasonRateLimited {
			t.Fatalf("the reason is %q", got)
		}
		refused++
	}
	if refused == 0 {
		t.Fatalf("%d calls were all answered", calls)
	}
	other := startChild(t, copyOfSelf(t, "workload"), nil, "fetch", e.path)
	other.want(t, "svid spiffe://example.org/web")
}

func TestCallRateOfManyCallersIsBounded(t *testing.T) {
	r := workloadapi.NewCallRate[int](1)
	for caller := range 100_000 {
		if err := r.Take(caller); err != nil {
			t.Fatalf("the first call of %d: %v", caller, err)
		}
	}
	if n := r.Known(); n > 16384 {
		t.Errorf("%d callers are remembered", n)
	}
}
