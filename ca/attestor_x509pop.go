package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"

	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/nodeattest"
	"github.com/signet-id/signet/ca/nodeattest/x509pop"
)

// X509POP configures the node attestor x509pop.
type X509POP struct {
	// Mode is external_pki (default): certificates of a PKI of the organisation; or spiffe: X509-SVIDs of this trust domain, whose
	// path begins with SVIDPrefix.
	Mode string `yaml:"mode"`
	// CABundlePath is a file of PEM certificates: the CAs whose certificates nodes may show. It is read again when it changes.
	// Needed for external_pki, or ca_bundle_paths.
	CABundlePath string `yaml:"ca_bundle_path"`
	// CABundlePaths are several such files.
	CABundlePaths []string `yaml:"ca_bundle_paths"`
	// SVIDPrefix is how the paths of SVIDs begin that may be shown, with mode spiffe. Default /spire-exchange/; / takes all but
	// those of agents and the CA.
	SVIDPrefix string `yaml:"svid_prefix"`
	// AgentPathTemplate makes the path of the agent's SPIFFE ID below /spire/agent. Default /{{ .PluginName }}/{{ .Fingerprint }},
	// and /{{ .PluginName }}/{{ .SVIDPathTrimmed }} with mode spiffe.
	AgentPathTemplate string `yaml:"agent_path_template"`
	// MaxIntermediates is how many certificates may be between a node's and a CA's. Default 4.
	MaxIntermediates int `yaml:"max_intermediates"`
	// MaxRSAKeySize is the size in bits of the largest RSA key that is looked at. Default 8192. The smallest is always 2048.
	MaxRSAKeySize int `yaml:"max_rsa_key_size"`
	// VerifyClientIP demands that one of the certificate's IP SANs is the address that the node calls from.
	VerifyClientIP bool `yaml:"verify_client_ip"`
}

func (c *X509POP) check(bad func(field, format string, args ...any)) {
	switch c.Mode {
	case "", "external_pki":
		c.Mode = "external_pki"
		if len(c.bundles()) == 0 {
			bad("ca_bundle_path", "missing; name a PEM file with the CAs whose certificates nodes may show, or set mode: spiffe")
		}
		if c.SVIDPrefix != "" {
			bad("svid_prefix", "%q has no meaning with mode external_pki; remove it, or set mode: spiffe", c.SVIDPrefix)
		}
	case "spiffe":
		if len(c.bundles()) != 0 {
			bad("ca_bundle_path", "%q has no meaning with mode spiffe, where this CA's own authorities count; remove it", c.bundles()[0])
		}
		if c.SVIDPrefix == "" {
			c.SVIDPrefix = "/spire-exchange/"
		}
		if !strings.HasPrefix(c.SVIDPrefix, "/") {
			bad("svid_prefix", "%q does not begin with a slash; write it such as /spire-exchange/", c.SVIDPrefix)
		} else if !strings.HasSuffix(c.SVIDPrefix, "/") {
			c.SVIDPrefix += "/"
		}
	default:
		bad("mode", "%q is not external_pki or spiffe", c.Mode)
	}
	if c.CABundlePath != "" && len(c.CABundlePaths) > 0 {
		bad("ca_bundle_paths", "excludes ca_bundle_path; keep one of them")
	}
	checkPaths("ca_bundle_paths", c.bundles(), bad)
	checkTemplate(c.AgentPathTemplate, x509pop.Variables, bad)
	if c.MaxIntermediates < 0 || c.MaxIntermediates > 32 {
		bad("max_intermediates", "%d is not between 1 and 32 (0: %d)", c.MaxIntermediates, x509pop.DefaultMaxIntermediates)
	}
	if c.MaxRSAKeySize != 0 && (c.MaxRSAKeySize < x509pop.MinRSABits || c.MaxRSAKeySize > 16384) {
		bad("max_rsa_key_size", "%d is not between %d and 16384 bits", c.MaxRSAKeySize, x509pop.MinRSABits)
	}
}

func (c *X509POP) bundles() []string {
	if c.CABundlePath != "" {
		return []string{c.CABundlePath}
	}
	return c.CABundlePaths
}

func (c *X509POP) open(_ context.Context, e attestorEnv) (nodeattest.Attestor, error) {
	config := x509pop.Config{TrustDomain: e.td, MaxIntermediates: c.MaxIntermediates, MaxRSABits: c.MaxRSAKeySize, VerifyClientIP: c.VerifyClientIP, Now: e.now}
	if c.AgentPathTemplate != "" {
		var err error
		if config.Path, err = nodeattest.ParsePath(c.AgentPathTemplate, x509pop.Variables...); err != nil {
			return nil, fmt.Errorf("agent_path_template: %w", err)
		}
	}
	if c.Mode == "spiffe" {
		config.SPIFFE, config.SVIDPrefix = true, c.SVIDPrefix
		config.Roots = func() (*x509.CertPool, error) { return untainted(e.authorities.Bundle()) }
		config.Issuer = func(c *x509.Certificate) bool { return issues(e.authorities, c) }
		return x509pop.New(config)
	}
	files, err := nodeattest.NewRootFiles(c.bundles(), e.log)
	if err != nil {
		return nil, fmt.Errorf("ca_bundle_path: %w", err)
	}
	config.Roots = files.Pool
	return x509pop.New(config)
}

// untainted are the authorities whose SVIDs still prove something to this CA.
func untainted(b authority.Bundle) (*x509.CertPool, error) {
	pool, n := x509.NewCertPool(), 0
	for _, a := range b.X509 {
		if a.State != authority.StateTainted && !a.Appended {
			pool.AddCert(a.Certificate)
			n++
		}
	}
	if n == 0 {
		return nil, errors.New("the trust domain has no X.509 authority that is not tainted")
	}
	return pool, nil
}

// issues tells whether c has the key of an authority of this CA whose SVIDs still prove something. Other CAs of the trust
// domain, above or below this one, can issue any ID; that must not make them issue nodes here.
func issues(set *authority.Set, c *x509.Certificate) bool {
	for _, a := range set.Authorities(authority.KindX509) {
		if a.State != authority.StateTainted && a.State != authority.StateRevoked && bytes.Equal(a.Certificate.RawSubjectPublicKeyInfo, c.RawSubjectPublicKeyInfo) {
			return true
		}
	}
	return false
}
