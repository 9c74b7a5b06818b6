package ca

import (
	"context"
	"crypto"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"regexp"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/upstream"
	"github.com/signet-id/signet/spiffe"
)

// Upstream is the CA that signs this CA's X.509 authorities. One of disk, vault and spire is set, or none: then they sign
// themselves.
type Upstream struct {
	// TTL is the validity that is asked for an X.509 authority, which is replaced at half of it. The upstream may give less.
	// Twice ttl.max_x509 is the least with which no X509-SVID is cut. Default 72h.
	TTL time.Duration `yaml:"ttl"`
	// Disk is a CA whose certificate is in a file, and whose key is in another or in a key store.
	Disk *UpstreamDisk `yaml:"disk"`
	// Vault is the PKI secrets engine of a HashiCorp Vault or OpenBao server.
	Vault *UpstreamVault `yaml:"vault"`
	// SPIRE is a SPIRE or signet server of the same trust domain.
	SPIRE *UpstreamSPIRE `yaml:"spire"`
}

// UpstreamDisk is an upstream CA on disk. Its files are read anew each time.
type UpstreamDisk struct {
	// CertificateFile holds the CA's certificate in PEM, and those above it if it is not self-signed.
	CertificateFile string `yaml:"certificate_file"`
	// KeyFile holds its private key in PEM, unencrypted, with mode 0600.
	KeyFile string `yaml:"key_file"`
	// KMS is, instead of KeyFile, the URI of the key in a key store: as in keys.uri, with what names the key, such as
	// pkcs11:module-path=/usr/lib/softhsm/libsofthsm2.so;token=signet;object=root?pin-source=/etc/signet/pin or awskms:key-id=ID.
	KMS string `yaml:"kms"`
	// BundleFile holds the root or roots in PEM. Not needed if certificate_file ends with the root.
	BundleFile string `yaml:"bundle_file"`
}

// UpstreamVault is an upstream CA in Vault or OpenBao.
type UpstreamVault struct {
	// Address is the server's URL, such as https://vault.example.org:8200. http is taken for loopback addresses only.
	Address string `yaml:"address"`
	// Mount is the path of the PKI secrets engine. Default pki.
	Mount string `yaml:"mount"`
	// Issuer is the engine's issuer, by name or id. Default: the engine's default.
	Issuer string `yaml:"issuer"`
	// Namespace is the server's namespace, if it has such.
	Namespace string `yaml:"namespace"`
	// CAFile is a PEM file with the CAs that verify the server's certificate. Default: those of the system.
	CAFile string `yaml:"ca_file"`
	// RootFile is a PEM file with the roots of the signing CA. Needed if the engine does not know its chain up to the root.
	RootFile string `yaml:"root_file"`
	// TokenFile is a file with a token, read anew each time. The token is renewed at half of its life if it can be.
	TokenFile string `yaml:"token_file"`
	// AppRole logs in with a role and a secret.
	AppRole *VaultAppRole `yaml:"app_role"`
	// Kubernetes logs in with the token of a service account.
	Kubernetes *VaultKubernetes `yaml:"kubernetes"`
	// Cert logs in with a TLS client certificate.
	Cert *VaultCert `yaml:"cert"`
}

// VaultAppRole is a login by AppRole.
type VaultAppRole struct {
	RoleID       string `yaml:"role_id"`        // the role's ID
	SecretIDFile string `yaml:"secret_id_file"` // a file with the secret ID, read for each login
	Mount        string `yaml:"mount"`          // path of the auth method; default approle
}

// VaultKubernetes is a login by Kubernetes service account.
type VaultKubernetes struct {
	Role      string `yaml:"role"`       // the role at the server
	TokenFile string `yaml:"token_file"` // default /var/run/secrets/kubernetes.io/serviceaccount/token
	Mount     string `yaml:"mount"`      // path of the auth method; default kubernetes
}

// VaultCert is a login by TLS client certificate.
type VaultCert struct {
	CertificateFile string `yaml:"certificate_file"` // PEM, read for each connection
	KeyFile         string `yaml:"key_file"`         // PEM, with a mode such as 0600
	Role            string `yaml:"role"`             // the role at the server; default: any that fits
	Mount           string `yaml:"mount"`            // path of the auth method; default cert
}

// UpstreamSPIRE is an upstream SPIRE or signet server.
type UpstreamSPIRE struct {
	// ServerAddress is its host:port.
	ServerAddress string `yaml:"server_address"`
	// AgentSocket is the path of the Workload API socket of the agent on this machine that is attested to that server. The
	// entry that it serves this CA has downstream: true.
	AgentSocket string `yaml:"agent_socket"`
	// SPIFFEID chooses among several X509-SVIDs that the agent gives this process. Default: the first.
	SPIFFEID string `yaml:"spiffe_id"`
}

// vaultPath is what a mount, issuer or namespace may be: it becomes part of a URL.
var vaultPath = regexp.MustCompile(`^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*/?$`)

func (u *Upstream) check(td spiffeid.TrustDomain, bad func(field, format string, args ...any)) {
	ways := 0
	for _, set := range []bool{u.Disk != nil, u.Vault != nil, u.SPIRE != nil} {
		if set {
			ways++
		}
	}
	switch {
	case ways > 1:
		bad("upstream", "disk, vault and spire exclude each other")
	case ways == 0 && u.TTL != 0:
		bad("upstream.ttl", "has no meaning without disk, vault or spire")
	case u.TTL != 0 && u.TTL < minUpstreamTTL:
		bad("upstream.ttl", "%v is shorter than %v", u.TTL, minUpstreamTTL)
	}
	path := func(field, value string, needed bool) {
		switch {
		case value == "" && needed:
			bad(field, "missing; name a file")
		case value != "" && !filepath.IsAbs(value):
			bad(field, "%q must be absolute", value)
		}
	}
	if d := u.Disk; d != nil {
		path("upstream.disk.certificate_file", d.CertificateFile, true)
		path("upstream.disk.bundle_file", d.BundleFile, false)
		path("upstream.disk.key_file", d.KeyFile, d.KMS == "")
		if d.KMS != "" && d.KeyFile != "" {
			bad("upstream.disk.kms", "excludes key_file")
		}
		if d.KMS != "" {
			key, err := keys.ParseKeyURI(d.KMS)
			if err == nil {
				err = key.Linked()
			}
			if err != nil {
				bad("upstream.disk.kms", "%v", err)
			}
		}
	}
	if v := u.Vault; v != nil {
		if _, err := upstream.CheckVaultAddress(v.Address); err != nil {
			bad("upstream.vault.address", "%v", err)
		}
		for _, p := range []struct{ field, value string }{{"mount", v.Mount}, {"issuer", v.Issuer}, {"namespace", v.Namespace}, {"the login's mount", v.login().Mount}} {
			if p.value != "" && !vaultPath.MatchString(p.value) {
				bad("upstream.vault."+p.field, "%q is not a path of letters, digits, dots, hyphens and underscores", p.value)
			}
		}
		path("upstream.vault.ca_file", v.CAFile, false)
		path("upstream.vault.root_file", v.RootFile, false)
		l := v.login()
		if err := l.Check(); err != nil {
			bad("upstream.vault", "%v", err)
		}
		for _, f := range []string{l.TokenFile, l.SecretIDFile, l.KubernetesTokenFile, l.CertificateFile, l.KeyFile} {
			path("upstream.vault", f, false)
		}
	}
	if s := u.SPIRE; s != nil {
		if _, port, err := net.SplitHostPort(s.ServerAddress); err != nil || port == "" {
			bad("upstream.spire.server_address", "%q is not host:port", s.ServerAddress)
		}
		path("upstream.spire.agent_socket", s.AgentSocket, true)
		if s.SPIFFEID != "" {
			if id, err := spiffe.ParseWorkloadID(s.SPIFFEID); err != nil {
				bad("upstream.spire.spiffe_id", "%v", err)
			} else if id.TrustDomain() != td {
				bad("upstream.spire.spiffe_id", "%q is not of trust domain %q, which both CAs must be of", s.SPIFFEID, td.Name())
			}
		}
	}
}

func (v *UpstreamVault) login() upstream.Login {
	l := upstream.Login{TokenFile: v.TokenFile}
	if a := v.AppRole; a != nil {
		l.RoleID, l.SecretIDFile, l.Mount = a.RoleID, a.SecretIDFile, a.Mount
	}
	if k := v.Kubernetes; k != nil {
		l.KubernetesRole, l.KubernetesTokenFile, l.Mount = k.Role, k.TokenFile, k.Mount
		if l.KubernetesTokenFile == "" {
			l.KubernetesTokenFile = "/var/run/secrets/kubernetes.io/serviceaccount/token"
		}
	}
	if c := v.Cert; c != nil {
		l.CertificateFile, l.KeyFile, l.CertificateRole, l.Mount = c.CertificateFile, c.KeyFile, c.Role, c.Mount
	}
	return l
}

// open returns the driver, or nil. Check has seen the configuration.
func (u *Upstream) open(td spiffeid.TrustDomain, ring *keys.Ring, now func() time.Time, log *slog.Logger) (upstreamDriver, error) {
	switch {
	case u.Disk != nil:
		return u.Disk.open(ring, now)
	case u.Vault != nil:
		v, err := upstream.NewVault(upstream.VaultConfig{TrustDomain: td, Address: u.Vault.Address, Mount: u.Vault.Mount, Issuer: u.Vault.Issuer, Namespace: u.Vault.Namespace,
			CAFile: u.Vault.CAFile, RootFile: u.Vault.RootFile, Login: u.Vault.login(), Now: now})
		if err != nil {
			return nil, fmt.Errorf("upstream.vault.%w", err)
		}
		return v, nil
	case u.SPIRE != nil:
		id, _ := spiffeid.FromString(u.SPIRE.SPIFFEID) // Check has seen it; empty is zero
		return upstream.NewSPIRE(upstream.SPIREConfig{TrustDomain: td, ServerAddress: u.SPIRE.ServerAddress, AgentSocket: "unix://" + u.SPIRE.AgentSocket, ID: id, Now: now, Log: log}), nil
	}
	return nil, nil
}

func (u *UpstreamDisk) open(ring *keys.Ring, now func() time.Time) (*upstream.Disk, error) {
	d := &upstream.Disk{CertificateFile: u.CertificateFile, BundleFile: u.BundleFile, Now: now}
	if u.KMS == "" {
		d.KeyName = "key_file " + u.KeyFile
		d.Key = func(context.Context) (crypto.Signer, error) {
			key, err := keys.LoadKeyFile(u.KeyFile)
			if err != nil {
				return nil, fmt.Errorf("upstream.disk.key_file: %w", err)
			}
			return key, nil
		}
		return d, nil
	}
	uri, err := keys.ParseKeyURI(u.KMS)
	if err != nil {
		return nil, fmt.Errorf("upstream.disk.kms: %w", err)
	}
	d.KeyName = "kms " + uri.String()
	d.Key = func(ctx context.Context) (crypto.Signer, error) {
		key, err := ring.Existing(ctx, uri)
		if err != nil {
			return nil, fmt.Errorf("upstream.disk.kms: %w", err)
		}
		return key, nil
	}
	return d, nil
}

// Downstream bounds what CAs below this one get.
type Downstream struct {
	// MaxTTL is the longest validity of a downstream CA's certificate. It cannot be revoked on its own. Default 72h.
	MaxTTL time.Duration `yaml:"max_ttl"`
	// Depth is how many levels of CAs may be below this one: the path length in their certificates. Default 1.
	Depth int `yaml:"depth"`
}

const (
	minUpstreamTTL     = 2 * time.Minute
	minDownstreamTTL   = time.Minute
	maxDownstreamDepth = 4
)

func (d *Downstream) check(bad func(field, format string, args ...any)) {
	if d.MaxTTL == 0 {
		d.MaxTTL = authority.DefaultMaxDownstreamTTL
	}
	if d.MaxTTL < minDownstreamTTL {
		bad("downstream.max_ttl", "%v is shorter than %v", d.MaxTTL, minDownstreamTTL)
	}
	if d.Depth == 0 {
		d.Depth = 1
	}
	if d.Depth < 0 || d.Depth > maxDownstreamDepth {
		bad("downstream.depth", "%d is not 1 to %d", d.Depth, maxDownstreamDepth)
	}
}
