package agent

import (
	"fmt"
	"path/filepath"

	"github.com/signet-id/signet/agent/nodeattest"
)

// NodeAttestation says by what this node proves what it is. At most one of them is set; without any it is a join token.
type NodeAttestation struct {
	// X509POP shows a certificate of an existing PKI and proves possession of its key.
	X509POP *X509POP `yaml:"x509pop"`
	// K8sPSAT shows the projected service account token of the agent's pod.
	K8sPSAT *K8sPSAT `yaml:"k8s_psat"`
	// AWSIID shows the identity document of this instance of AWS EC2.
	AWSIID *AWSIID `yaml:"aws_iid"`
	// GCPIIT shows an identity token of this instance of Google Compute Engine.
	GCPIIT *GCPIIT `yaml:"gcp_iit"`
	// TPM shows that this node holds its TPM 2.0.
	TPM *TPM `yaml:"tpm"`
}

// attestorConfig is the configuration of one attestor.
type attestorConfig interface {
	// check fills in defaults and tells each mistake by its field, without opening anything.
	check(bad func(field, format string, args ...any))
	// open makes the attestor.
	open() (nodeattest.Attestor, error)
}

// A namedAttestor is one that the file has, with the key it has it under.
type namedAttestor struct {
	name string
	attestorConfig
}

// configured are the attestors that the file has.
func (n *NodeAttestation) configured() []namedAttestor {
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

// check checks the attestor and that nothing excludes it.
func (n *NodeAttestation) check(c *Config, bad func(field, format string, args ...any)) {
	if n.TPM != nil {
		n.TPM.dir = filepath.Join(c.DataDir, "tpm")
	}
	configured := n.configured()
	for i, a := range configured {
		if i > 0 {
			bad("node_attestation."+a.name, "excludes %s; an agent attests in one way", configured[0].name)
		}
		a.check(func(field, format string, args ...any) { bad("node_attestation."+a.name+"."+field, format, args...) })
	}
	if len(configured) == 0 {
		return
	}
	if c.JoinToken != "" || c.JoinTokenFile != "" {
		bad("node_attestation."+configured[0].name, "excludes join_token and join_token_file; an agent attests in one way")
	}
	if c.TrustBundlePath == "" {
		bad("trust_bundle_path", "missing; with node_attestation.%s nothing else verifies the CA on the first connection; "+
			"name a file with the output of signet bundle show, or of spire-server bundle show", configured[0].name)
	}
}

// open returns the attestor, or nil if it is a join token.
func (n *NodeAttestation) open() (nodeattest.Attestor, error) {
	configured := n.configured()
	if len(configured) == 0 {
		return nil, nil
	}
	attestor, err := configured[0].open()
	if err != nil {
		return nil, fmt.Errorf("node_attestation.%s.%w", configured[0].name, err)
	}
	return attestor, nil
}

// X509POP configures the node attestor x509pop. The files are read at each attestation, so that they may be renewed.
type X509POP struct {
	// CertificatePath is a PEM file with the node's certificate, and intermediates after it.
	CertificatePath string `yaml:"certificate_path"`
	// PrivateKeyPath is the certificate's key in PEM, RSA or EC; only root and the agent's user may read it.
	PrivateKeyPath string `yaml:"private_key_path"`
	// IntermediatesPath is a PEM file with further intermediates.
	IntermediatesPath string `yaml:"intermediates_path"`
	// SPIFFEEndpointSocket is the address of a Workload API, such as unix:///run/other/agent.sock, whose X509-SVID is shown instead
	// of files, to a CA with mode spiffe.
	SPIFFEEndpointSocket string `yaml:"spiffe_endpoint_socket"`
}

func (x *X509POP) check(bad func(field, format string, args ...any)) {
	if x.SPIFFEEndpointSocket != "" {
		if x.CertificatePath != "" || x.PrivateKeyPath != "" || x.IntermediatesPath != "" {
			bad("spiffe_endpoint_socket", "excludes certificate_path, private_key_path and intermediates_path; keep one way")
		}
		return
	}
	for _, f := range []struct {
		field, path string
		needed      bool
	}{
		{"certificate_path", x.CertificatePath, true}, {"private_key_path", x.PrivateKeyPath, true}, {"intermediates_path", x.IntermediatesPath, false},
	} {
		switch {
		case f.path == "" && f.needed:
			bad(f.field, "missing; name a PEM file, or set spiffe_endpoint_socket")
		case f.path != "" && !filepath.IsAbs(f.path):
			bad(f.field, "%q must be absolute", f.path)
		}
	}
}

func (x *X509POP) open() (nodeattest.Attestor, error) {
	return nodeattest.X509POP{CertificatePath: x.CertificatePath, PrivateKeyPath: x.PrivateKeyPath, IntermediatesPath: x.IntermediatesPath,
		EndpointSocket: x.SPIFFEEndpointSocket}, nil
}
