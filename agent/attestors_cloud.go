package agent

import (
	"github.com/signet-id/signet/agent/nodeattest"
	"github.com/signet-id/signet/agent/nodeattest/awsiid"
	"github.com/signet-id/signet/agent/nodeattest/gcpiit"
	"github.com/signet-id/signet/agent/nodeattest/k8spsat"
)

// K8sPSAT configures the node attestor k8s_psat.
type K8sPSAT struct {
	// Cluster is the name by which the CA knows this Kubernetes cluster.
	Cluster string `yaml:"cluster"`
	// TokenPath is the file of the projected service account token, which is read again at each attestation. Default
	// /var/run/secrets/tokens/spire-agent.
	TokenPath string `yaml:"token_path"`
}

func (c *K8sPSAT) check(bad func(field, format string, args ...any)) { k8spsat.Config(*c).Check(bad) }

func (c *K8sPSAT) open() (nodeattest.Attestor, error) { return k8spsat.New(k8spsat.Config(*c)), nil }

// AWSIID configures the node attestor aws_iid.
type AWSIID struct {
	// MetadataEndpoint is the address of the instance metadata service, of which version 2 is used. Default http://169.254.169.254.
	MetadataEndpoint string `yaml:"metadata_endpoint"`
}

func (c *AWSIID) check(bad func(field, format string, args ...any)) { awsiid.Config(*c).Check(bad) }

func (c *AWSIID) open() (nodeattest.Attestor, error) { return awsiid.New(awsiid.Config(*c)), nil }

// GCPIIT configures the node attestor gcp_iit.
type GCPIIT struct {
	// MetadataEndpoint is the metadata server's address. Default http://metadata.google.internal.
	MetadataEndpoint string `yaml:"metadata_endpoint"`
	// ServiceAccount is the instance's service account that the token is for. Default: the instance's default one.
	ServiceAccount string `yaml:"service_account"`
	// Audience is the one that the CA expects. Default spire-gcp-node-attestor.
	Audience string `yaml:"audience"`
}

func (c *GCPIIT) check(bad func(field, format string, args ...any)) { gcpiit.Config(*c).Check(bad) }

func (c *GCPIIT) open() (nodeattest.Attestor, error) { return gcpiit.New(gcpiit.Config(*c)), nil }
