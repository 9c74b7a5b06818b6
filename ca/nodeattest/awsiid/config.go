package awsiid

import (
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/signet-id/signet/ca/nodeattest"
	"github.com/signet-id/signet/internal/durable"
)

// Config says whose instances may attest.
type Config struct {
	// Accounts are the AWS accounts, 12 digits each, whose instances are let in. One at least is needed.
	Accounts []string
	// Certificates are files in PEM form, by region, with the certificates of AWS that verify the region's RSA-2048
	// signatures. Instances of other regions are refused.
	Certificates map[string]string
	// MaxInstanceAge is how long after its launch an instance may attest for the first time. Default: for ever.
	MaxInstanceAge time.Duration
	// AllowReattestation lets an instance attest again with the same document, also while its agent is at work. Then
	// every process that can read the instance's metadata can take the agent's place.
	AllowReattestation bool
	// Path makes the path of the agent's SPIFFE ID of Variables. Nil: /aws_iid/<account>/<region>/<instance>.
	Path *nodeattest.PathTemplate

	// Now tells the time. Nil: time.Now.
	Now func() time.Time
}

// Variables are those that a path template may name. SPIRE's Tags need the API of AWS.
var Variables = []string{"PluginName", "AccountID", "Region", "InstanceID"}

const (
	accountDigits   = 12
	maxRegionBytes  = 64
	maxCertificates = 16 // of one region: a new one may be there before the old one has gone
	maxFileBytes    = 256 << 10
	minKeyBits      = 2048
)

// Check tells each mistake by its field, without opening anything.
func (c Config) Check(bad func(field, format string, args ...any)) {
	if len(c.Accounts) == 0 {
		bad("accounts", "missing; list the AWS accounts whose instances may attest")
	}
	for _, a := range c.Accounts {
		if len(a) != accountDigits || !all(a, isDigit) {
			bad("accounts", "%q is not an AWS account, which has %d digits; write it in quotes", a, accountDigits)
		}
	}
	if len(c.Certificates) == 0 {
		bad("certificates", "missing; name a file with AWS's RSA-2048 certificate for each region, as AWS publishes them for instance identity documents")
	}
	for _, region := range slices.Sorted(maps.Keys(c.Certificates)) {
		if !isName(region, maxRegionBytes) {
			bad("certificates", "%q is not the name of a region, such as eu-central-1", region)
		}
		if file := c.Certificates[region]; !filepath.IsAbs(file) {
			bad("certificates."+region, "%q must be absolute", file)
		}
	}
	if c.MaxInstanceAge < 0 {
		bad("max_instance_age", "%v is negative; leave it out for no limit", c.MaxInstanceAge)
	}
	if c.MaxInstanceAge > 0 && c.AllowReattestation {
		bad("max_instance_age", "excludes allow_reattestation: agents that renew by attesting again would be refused at that age")
	}
}

// readCertificates reads the certificates of one region.
func readCertificates(file string) ([]*x509.Certificate, error) {
	data, err := durable.ReadFile(file, maxFileBytes)
	if err != nil {
		return nil, err
	}
	certificates, err := parseCertificates(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return certificates, nil
}

func parseCertificates(data []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("holds a PEM block of type %q; only certificates are allowed", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(out)+1, err)
		}
		if key, ok := c.PublicKey.(*rsa.PublicKey); !ok || key.N.BitLen() < minKeyBits {
			return nil, fmt.Errorf("certificate %d has no RSA key of %d bits or more; AWS publishes RSA-2048 certificates beside older ones", len(out)+1, minKeyBits)
		}
		if out = append(out, c); len(out) > maxCertificates {
			return nil, fmt.Errorf("holds more than %d certificates", maxCertificates)
		}
	}
	if len(out) == 0 {
		return nil, errors.New("holds no certificate in PEM form")
	}
	return out, nil
}

func isDigit(r rune) bool { return r >= '0' && r <= '9' }

// isName says whether s can be the name that AWS gives a region or an instance.
func isName(s string, most int) bool {
	return s != "" && len(s) <= most && all(s, func(r rune) bool { return r >= 'a' && r <= 'z' || isDigit(r) || r == '-' })
}

func all(s string, is func(rune) bool) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return !is(r) })
}
