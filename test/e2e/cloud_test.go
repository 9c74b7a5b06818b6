package e2e

import (
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/internal/dev"
	"github.com/signet-id/signet/test/cloudtest"
)

const (
	awsAccount, awsRegion, awsInstance = "123456789012", "eu-central-1", "i-078517ca8a70a1dde"
	gcpProject, gcpInstance            = "shop-prod", "1234567890123456789"
)

func TestNodeLifeByK8sPSAT(t *testing.T) {
	t.Parallel()
	api := cloudtest.NewKubernetes(t)
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte(cloudtest.NodeToken), 0o600); err != nil {
		t.Fatal(err)
	}
	nodeLife(t, "k8s_psat", func(c *ca.Config) {
		c.NodeAttestors.K8sPSAT = &ca.K8sPSAT{Clusters: map[string]ca.K8sCluster{"prod": {ServiceAccounts: []string{"signet:agent"}, Kubeconfig: api.Kubeconfig(t)}}}
	}, func(c *agent.Config) { c.NodeAttestation.K8sPSAT = &agent.K8sPSAT{Cluster: "prod", TokenPath: token} })
}

func TestNodeLifeByAWSIIDThatMayAttestAgain(t *testing.T) {
	t.Parallel()
	aws := cloudtest.NewAWS(t)
	metadata := httptest.NewServer(aws.Metadata(t, cloudtest.Document(awsAccount, awsRegion, awsInstance, time.Now().Add(-time.Hour))))
	t.Cleanup(metadata.Close)
	nodeLife(t, "aws_iid", func(c *ca.Config) {
		c.NodeAttestors.AWSIID = &ca.AWSIID{Accounts: []string{awsAccount}, Certificates: map[string]string{awsRegion: cloudtest.File(t, aws)}, AllowReattestation: true}
	}, func(c *agent.Config) { c.NodeAttestation.AWSIID = &agent.AWSIID{MetadataEndpoint: metadata.URL} })
}

func TestNodeLifeByAWSIID(t *testing.T) {
	t.Parallel()
	aws := cloudtest.NewAWS(t)
	metadata := httptest.NewServer(aws.Metadata(t, cloudtest.Document(awsAccount, awsRegion, awsInstance, time.Now().Add(-time.Hour))))
	t.Cleanup(metadata.Close)
	nodeLifeOnce(t, "/spire/agent/aws_iid/"+awsAccount+"/"+awsRegion+"/"+awsInstance, func(c *ca.Config) {
		c.NodeAttestors.AWSIID = &ca.AWSIID{Accounts: []string{awsAccount}, Certificates: map[string]string{awsRegion: cloudtest.File(t, aws)}}
	}, func(c *agent.Config) { c.NodeAttestation.AWSIID = &agent.AWSIID{MetadataEndpoint: metadata.URL} })
}

func TestNodeLifeByGCPIIT(t *testing.T) {
	t.Parallel()
	google := cloudtest.NewGoogle(t)
	metadata := httptest.NewServer(google.Metadata(t, gcpProject, gcpInstance))
	t.Cleanup(metadata.Close)
	nodeLifeOnce(t, "/spire/agent/gcp_iit/"+gcpProject+"/"+gcpInstance, func(c *ca.Config) {
		c.NodeAttestors.GCPIIT = &ca.GCPIIT{Projects: []string{gcpProject}, Audience: "spiffe://example.org", KeysFile: google.File(t)}
	}, func(c *agent.Config) {
		c.NodeAttestation.GCPIIT = &agent.GCPIIT{MetadataEndpoint: metadata.URL, Audience: "spiffe://example.org"}
	})
}

// nodeLifeOnce leads a node whose evidence counts once through its life: it joins, renews without evidence, and comes back
// with what it has on disk. When that is lost, whoever shows the evidence is refused until an operator evicts the node.
func nodeLifeOnce(t *testing.T, path string, configureCA func(*ca.Config), configureAgent func(*agent.Config)) {
	ctx := bounded(t, 100*time.Second)
	dir, err := os.MkdirTemp("", "signet")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := dev.Start(ctx, dev.Config{Dir: dir,
		CA: func(c *ca.Config) {
			c.TTL.Agent, c.Audit.Reserve = 10*time.Second, 1<<20
			configureCA(c)
		},
		Agent: func(c *agent.Config) {
			c.JoinTokenFile = ""
			configureAgent(c)
		}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	life := &life{t: t, ctx: ctx, s: s}
	life.apply(identity("web"))
	first := life.node()
	if first.Id.GetPath() != path || first.CanReattest || len(first.Selectors) == 0 {
		t.Fatalf("the CA holds %v, want %s", first, path)
	}
	life.serves("at the start")
	life.replaced("at half life", first)

	if err := s.StopAgent(); err != nil {
		t.Fatal(err)
	}
	if err := s.RestartAgent(ctx); err != nil {
		t.Fatalf("with what is on disk: %v", err)
	}
	life.serves("after a restart")

	if err := s.StopAgent(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "agent")); err != nil {
		t.Fatal(err)
	}
	now := life.node()
	restarted := make(chan error, 1)
	go func() { restarted <- s.RestartAgent(ctx) }()
	if err := eventually(ctx, func() error {
		if life.refusals("already been used") == 0 {
			return fmt.Errorf("nobody was refused yet")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if again := life.node(); again.X509SvidSerialNumber != now.X509SvidSerialNumber {
		t.Errorf("whoever showed the evidence again has got in: %v", again)
	}
	life.agents(func(c agentv1.AgentClient) error {
		_, err := c.DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: now.Id})
		return err
	})
	if err := <-restarted; err != nil {
		t.Fatalf("after the evict: %v", err)
	}
	life.replaced("after an operator has evicted the lost agent", &types.Agent{X509SvidSerialNumber: now.X509SvidSerialNumber})
	life.serves("after an operator has evicted the lost agent")
	if got := life.node(); !strings.HasPrefix(got.Id.GetPath(), path) {
		t.Errorf("it came back as %v", got.Id)
	}
}

// refusals counts the refused attestations of the audit log whose reason has that text.
func (l *life) refusals(text string) int {
	l.t.Helper()
	conn, err := l.s.Admin()
	if err != nil {
		l.t.Fatal(err)
	}
	defer conn.Close()
	n := 0
	for _, record := range audit(l.t, conn, "agent.attest") {
		if strings.Contains(fmt.Sprint(record), text) {
			n++
		}
	}
	return n
}
