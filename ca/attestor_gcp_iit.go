package ca

import (
	"context"

	"github.com/signet-id/signet/ca/nodeattest"
	"github.com/signet-id/signet/ca/nodeattest/gcpiit"
)

// GCPIIT configures the node attestor gcp_iit.
type GCPIIT struct {
	// Projects are the IDs of the projects of Google Cloud whose instances are let in. One at least is needed.
	Projects []string `yaml:"projects"`
	// Audience is that of the identity tokens. Default spire-gcp-node-attestor, which SPIRE's agents ask for.
	Audience string `yaml:"audience"`
	// KeysURL is where the keys that verify the tokens are fetched: an https URL that answers with a JWK Set, or with PEM certificates
	// by key ID. Default https://www.googleapis.com/oauth2/v3/certs.
	KeysURL string `yaml:"keys_url"`
	// KeysURLCAFile is a PEM file with the CAs that verify the server of keys_url. Default: those of the system.
	KeysURLCAFile string `yaml:"keys_url_ca_file"`
	// KeysFile is a file with such keys, for a CA that cannot reach keys_url. It is read for each attestation.
	KeysFile string `yaml:"keys_file"`
	// AgentPathTemplate makes the path of the agent's SPIFFE ID below /spire/agent. Default
	// /{{ .PluginName }}/{{ .ProjectID }}/{{ .InstanceID }}.
	AgentPathTemplate string `yaml:"agent_path_template"`
	// AllowReattestation lets an instance attest again with a token, also while its agent is at work. Then every process that can
	// ask the instance's metadata server can take the agent's place.
	AllowReattestation bool `yaml:"allow_reattestation"`
}

func (c *GCPIIT) config() gcpiit.Config {
	return gcpiit.Config{Projects: c.Projects, Audience: c.Audience, KeysURL: c.KeysURL, KeysURLCAFile: c.KeysURLCAFile, KeysFile: c.KeysFile, AllowReattestation: c.AllowReattestation}
}

func (c *GCPIIT) check(bad func(field, format string, args ...any)) {
	c.config().Check(bad)
	checkTemplate(c.AgentPathTemplate, gcpiit.Variables, bad)
}

func (c *GCPIIT) open(_ context.Context, e attestorEnv) (nodeattest.Attestor, error) {
	config := c.config()
	config.Now = e.now
	var err error
	if config.Path, err = openTemplate(c.AgentPathTemplate, gcpiit.Variables); err != nil {
		return nil, err
	}
	return gcpiit.New(config)
}
