package interop

import (
	"context"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/signet-id/signet/test/cloudtest"
)

// TestAgentByAWSIID lets an unmodified SPIRE agent in by a document that a stand-in for AWS's key has signed, over a stand-in
// for the instance metadata service. It renews with its SVID, since a document counts once.
func TestAgentByAWSIID(t *testing.T) {
	const account, region, instance = "123456789012", "eu-central-1", "i-078517ca8a70a1dde"
	aws := cloudtest.NewAWS(t)
	metadata := httptest.NewServer(aws.Metadata(t, cloudtest.Document(account, region, instance, time.Now().Add(-time.Minute))))
	t.Cleanup(metadata.Close)
	cloudAgent(t, fmt.Sprintf("aws_iid: {accounts: ['%s'], certificates: {%s: %s}, max_instance_age: 1h}", account, region, cloudtest.File(t, aws)),
		fmt.Sprintf(`NodeAttestor "aws_iid" { plugin_data { ec2_metadata_endpoint = %q } }`, metadata.URL),
		"/spire/agent/aws_iid/"+account+"/"+region+"/"+instance)
}

// TestAgentByGCPIIT is the same with a token of a stand-in for Google's key.
func TestAgentByGCPIIT(t *testing.T) {
	const project, instance = "shop-prod", "1234567890123456789"
	google := cloudtest.NewGoogle(t)
	metadata := httptest.NewServer(google.Metadata(t, project, instance))
	t.Cleanup(metadata.Close)
	cloudAgent(t, fmt.Sprintf("gcp_iit: {projects: [%s], keys_file: %s}", project, google.File(t)),
		fmt.Sprintf(`NodeAttestor "gcp_iit" { plugin_data { identity_token_host = %q } }`, strings.TrimPrefix(metadata.URL, "http://")),
		"/spire/agent/gcp_iit/"+project+"/"+instance)
}

// cloudAgent starts a CA with an attestor and a SPIRE agent that attests by it, and leads it over a renewal.
func cloudAgent(t *testing.T, attestor, plugin, path string) {
	t.Helper()
	foreign(t, envServer) // its command line
	ctx := bounded(t, 2*time.Minute)
	ca := startCA(t, ctx, short+"node_attestors: {"+attestor+"}\n")
	a := newSPIREAgent(t, agentConfig{server: ca, attestor: plugin, bundle: ca.bundleFile(ctx)})
	a.start()
	serial := func() (string, error) {
		n, err := agentv1.NewAgentClient(ca.conn).GetAgent(ctx, &agentv1.GetAgentRequest{Id: &types.SPIFFEID{TrustDomain: trustDomain, Path: path}})
		return n.GetX509SvidSerialNumber(), err
	}
	first := awaitSerial(t, ctx, serial, "")
	ca.entry(ctx, "/web", path)
	a.serves(ctx, "/web")
	awaitSerial(t, ctx, serial, first)
	a.serves(ctx, "/web")
}

func awaitSerial(t *testing.T, ctx context.Context, serial func() (string, error), not string) (got string) {
	t.Helper()
	if err := eventually(ctx, func() (err error) {
		if got, err = serial(); err == nil && got == not {
			err = fmt.Errorf("serial %q", got)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return got
}
