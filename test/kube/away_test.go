//go:build kube

package kube

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/test/signettest"
)

// The API server is away for longer than everything lives: with the defaults that is more than an hour, here seconds stand for minutes. An agent that renews by attesting
// again has its SVID until that ends, and so long its workloads' are renewed; theirs are served until they end, and never after. When the API server is back, all is renewed by itself.
func TestAPIServerAwayForLongerThanSVIDsLive(t *testing.T) {
	const life = 30 * time.Second
	ctx := bounded(t)
	k := first(t, ctx)
	node := k.namespace + "-node"
	k.simulatedNode(node)
	tokenFile := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(tokenFile, []byte(k.agentToken("agent", node)), 0o600); err != nil {
		t.Fatal(err)
	}
	line := newWire(t, k.credentials("ca"))
	s := signettest.Start(t, signettest.Config{
		CA: func(c *ca.Config) {
			c.TTL.Agent, c.TTL.X509 = life, life
			c.NodeAttestors.K8sPSAT = &ca.K8sPSAT{Clusters: map[string]ca.K8sCluster{"prod": {ServiceAccounts: []string{k.namespace + ":agent"}, Kubeconfig: line.kubeconfig}}}
		},
		Agent: func(c *agent.Config) {
			c.JoinTokenFile = ""
			c.NodeAttestation.K8sPSAT = &agent.K8sPSAT{Cluster: "prod", TokenPath: tokenFile}
		},
	})
	s.Apply(fmt.Sprintf("{kind: Identity, name: web, spiffeID: /web, match: ['unix:uid:%d'], 'on': ['k8s_psat:cluster:prod']}\n", os.Getuid()))
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(s.WorkloadAPI()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	fetch := func() (notAfter time.Time, err error) {
		c, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		x, err := client.FetchX509Context(c)
		if err != nil {
			return time.Time{}, err
		}
		return x.DefaultSVID().Certificates[0].NotAfter, nil
	}
	at, err := fetch()
	for ; err != nil && ctx.Err() == nil; at, err = fetch() {
		pause(t, ctx)
	}
	line.setCut(true)
	cut, last := time.Now(), at
	for { // renewed for as long as the agent has its own
		asked := time.Now()
		now, err := fetch()
		if err == nil && asked.After(now) {
			t.Fatalf("an SVID is served that has ended at %s", now)
		}
		if err == nil {
			last = now
		} else if status.Code(err) == codes.Unavailable || time.Now().After(last) {
			break
		} else if status.Code(err) != codes.DeadlineExceeded { // which a busy machine may be the reason of, as long as an SVID is good
			t.Fatalf("a workload is told %v", err)
		}
		pause(t, ctx)
	}
	served := time.Since(cut)
	if until := last.Sub(cut); served < until-5*time.Second {
		t.Errorf("nothing is served %v after the API server went away, though an SVID lives until %v", served, until)
	}
	if served < life/2 {
		t.Errorf("workloads have SVIDs for %v after the API server went away, want half of a life at least", served)
	}
	line.setCut(false)
	back := time.Now()
	for {
		if now, err := fetch(); err == nil && now.After(back) {
			break
		}
		pause(t, ctx)
	}
	t.Logf("SVIDs live %v: served for %v without the API server, and again %v after it was back", life, served.Round(time.Second), time.Since(back).Round(time.Second))
}
