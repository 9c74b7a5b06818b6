package ca

import (
	"context"
	"time"

	"github.com/signet-id/signet/ca/nodeattest"
	"github.com/signet-id/signet/ca/nodeattest/awsiid"
)

// AWSIID configures the node attestor aws_iid.
type AWSIID struct {
	// Accounts are the AWS accounts, 12 digits each, whose instances are let in. One at least is needed.
	Accounts []string `yaml:"accounts"`
	// Certificates are PEM files, by region, with the certificates of AWS for the region's RSA-2048 signatures. Instances of other
	// regions are refused.
	Certificates map[string]string `yaml:"certificates"`
	// AgentPathTemplate makes the path of the agent's SPIFFE ID below /spire/agent. Default
	// /{{ .PluginName }}/{{ .AccountID }}/{{ .Region }}/{{ .InstanceID }}.
	AgentPathTemplate string `yaml:"agent_path_template"`
	// MaxInstanceAge is how long after its launch an instance may attest. Default: for ever.
	MaxInstanceAge time.Duration `yaml:"max_instance_age"`
	// AllowReattestation lets an instance attest again with the same document, also while its agent is at work. Then every process
	// that can read the instance's metadata can take the agent's place.
	AllowReattestation bool `yaml:"allow_reattestation"`
}

func (c *AWSIID) config() awsiid.Config {
	return awsiid.Config{Accounts: c.Accounts, Certificates: c.Certificates, MaxInstanceAge: c.MaxInstanceAge, AllowReattestation: c.AllowReattestation}
}

func (c *AWSIID) check(bad func(field, format string, args ...any)) {
	c.config().Check(bad)
	checkTemplate(c.AgentPathTemplate, awsiid.Variables, bad)
}

func (c *AWSIID) open(_ context.Context, e attestorEnv) (nodeattest.Attestor, error) {
	config := c.config()
	config.Now = e.now
	var err error
	if config.Path, err = openTemplate(c.AgentPathTemplate, awsiid.Variables); err != nil {
		return nil, err
	}
	return awsiid.New(config)
}
