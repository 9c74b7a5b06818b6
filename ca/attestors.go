package ca

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/nodeattest"
)

// NodeAttestors are the ways in which nodes may prove what they are, besides join tokens. What is not here is refused.
type NodeAttestors struct {
	// X509POP takes nodes that hold the key of a certificate of an existing PKI.
	X509POP *X509POP `yaml:"x509pop"`
	// K8sPSAT takes pods of Kubernetes by their projected service account token.
	K8sPSAT *K8sPSAT `yaml:"k8s_psat"`
	// AWSIID takes instances of AWS EC2 by their instance identity document.
	AWSIID *AWSIID `yaml:"aws_iid"`
	// GCPIIT takes instances of Google Compute Engine by their identity token.
	GCPIIT *GCPIIT `yaml:"gcp_iit"`
	// TPM takes nodes that hold a TPM 2.0 which is known, or certified by its manufacturer.
	TPM *TPM `yaml:"tpm"`
}

// attestorConfig is the configuration of one attestor, each in a file of its own.
type attestorConfig interface {
	// check fills in defaults and tells each mistake by its field, without opening anything.
	check(bad func(field, format string, args ...any))
	// open makes the attestor. Its error names the field.
	open(ctx context.Context, e attestorEnv) (nodeattest.Attestor, error)
}

// An attestorEnv is what attestors may use of the CA.
type attestorEnv struct {
	td          spiffeid.TrustDomain
	authorities *authority.Set
	now         func() time.Time
	log         *slog.Logger
}

// A namedAttestor is one that the file has, with the key it has it under.
type namedAttestor struct {
	name string
	attestorConfig
}

// configured are the attestors that the file has.
func (n *NodeAttestors) configured() []namedAttestor {
	var out []namedAttestor
	if n.X509POP != nil {
		out = append(out, namedAttestor{"x509pop", n.X509POP})
	}
	if n.K8sPSAT != nil {
		out = append(out, namedAttestor{"k8s_psat", n.K8sPSAT})
	}
	if n.AWSIID != nil {
		out = append(out, namedAttestor{"aws_iid", n.AWSIID})
	}
	if n.GCPIIT != nil {
		out = append(out, namedAttestor{"gcp_iit", n.GCPIIT})
	}
	if n.TPM != nil {
		out = append(out, namedAttestor{"tpm", n.TPM})
	}
	return out
}

func (n *NodeAttestors) check(bad func(field, format string, args ...any)) {
	for _, c := range n.configured() {
		c.check(func(field, format string, args ...any) { bad("node_attestors."+c.name+"."+field, format, args...) })
	}
}

func (n *NodeAttestors) open(ctx context.Context, e attestorEnv) ([]nodeattest.Attestor, error) {
	var out []nodeattest.Attestor
	for _, c := range n.configured() {
		a, err := c.open(ctx, e)
		if err != nil {
			return nil, fmt.Errorf("node_attestors.%s.%w", c.name, err)
		}
		out = append(out, a)
	}
	return out, nil
}

// checkPaths refuses paths of which nobody can say what they are relative to.
func checkPaths(field string, paths []string, bad func(field, format string, args ...any)) {
	for i, p := range paths {
		if !filepath.IsAbs(p) {
			bad(fmt.Sprintf("%s[%d]", field, i), "%q must be absolute", p)
		}
	}
}

// checkTemplate checks an agent_path_template; empty means the default.
func checkTemplate(text string, variables []string, bad func(field, format string, args ...any)) {
	if text == "" {
		return
	}
	if _, err := nodeattest.ParsePath(text, variables...); err != nil {
		bad("agent_path_template", "%v", err)
	}
}

// openTemplate reads an agent_path_template; empty gives none, which means the default.
func openTemplate(text string, variables []string) (*nodeattest.PathTemplate, error) {
	if text == "" {
		return nil, nil
	}
	t, err := nodeattest.ParsePath(text, variables...)
	if err != nil {
		return nil, fmt.Errorf("agent_path_template: %w", err)
	}
	return t, nil
}
