// Package x509pop judges nodes that hold the private key of an X.509 certificate which the organisation gave them outside of
// signet, as SPIRE's attestor of that name does. [SPIRE-PROTOCOL §3.2]
package x509pop

import (
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha1" // fingerprints are names here, by SPIRE's protocol; no trust rests on them
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/nodeattest"
	wire "github.com/signet-id/signet/internal/x509pop"
	"github.com/signet-id/signet/spiffe"
)

// Limits where the configuration says nothing, and what cannot be configured away.
const (
	DefaultMaxIntermediates = 4
	DefaultMaxRSABits       = 8192
	MinRSABits              = 2048
	// minCurveBits leaves out P-224, which is weaker than anything that signs SVIDs.
	minCurveBits = 256
)

// Config says which certificates are good. Roots is needed.
type Config struct {
	TrustDomain spiffeid.TrustDomain

	// Roots returns what the chains must end in. It is asked for each attestation.
	Roots func() (*x509.CertPool, error)

	// Issuer says whether the certificate directly above the node's may issue such certificates. Nil: whoever Roots leads to.
	Issuer func(*x509.Certificate) bool

	// SPIFFE says that the certificates are X509-SVIDs of the trust domain, and that the rest of their path after SVIDPrefix
	// names the node.
	SPIFFE     bool
	SVIDPrefix string

	// Path names the agents. Nil: x509pop/<fingerprint>, or x509pop/<rest of the path> with SPIFFE.
	Path *nodeattest.PathTemplate

	// MaxIntermediates and MaxRSABits bound the work that a stranger can cause. Zero: the defaults.
	MaxIntermediates, MaxRSABits int

	// VerifyClientIP demands that an IP SAN of the leaf is the address that the node calls from.
	VerifyClientIP bool

	Now func() time.Time
}

// Variables are what agent_path_template may name.
var Variables = []string{"PluginName", "TrustDomain", "Fingerprint", "SerialNumberHex", "Subject.CommonName", "SVIDPathTrimmed", "URISanSelectors."}

// An Attestor judges the evidence.
type Attestor struct{ c Config }

// New returns the attestor.
func New(c Config) (*Attestor, error) {
	if c.Roots == nil {
		return nil, errors.New("x509pop needs roots")
	}
	if c.MaxIntermediates == 0 {
		c.MaxIntermediates = DefaultMaxIntermediates
	}
	if c.MaxRSABits == 0 {
		c.MaxRSABits = DefaultMaxRSABits
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Path == nil {
		text := "/{{ .PluginName }}/{{ .Fingerprint }}"
		if c.SPIFFE {
			text = "/{{ .PluginName }}/{{ .SVIDPathTrimmed }}"
		}
		var err error
		if c.Path, err = nodeattest.ParsePath(text, Variables...); err != nil {
			return nil, err
		}
	}
	return &Attestor{c}, nil
}

// Type is SPIRE's name of this node attestor.
func (*Attestor) Type() string { return wire.Attestor }

// Attest verifies the chain, then has the node prove that it holds the leaf's key.
func (a *Attestor) Attest(_ context.Context, attempt nodeattest.Attempt) (*nodeattest.Evidence, error) {
	leaf, others, err := a.parse(attempt.Payload)
	if err != nil {
		return nil, err
	}
	chains, err := a.verify(leaf, others)
	if err != nil {
		return nil, err
	}
	if err := a.checkLeaf(leaf, attempt); err != nil {
		return nil, err
	}
	evidence, err := a.evidence(leaf, chains)
	if err != nil {
		return nil, err
	}
	if err := prove(leaf, attempt); err != nil {
		return nil, err
	}
	return evidence, nil
}

// parse reads the chain. Everything that is expensive about a certificate is bounded before it is done.
func (a *Attestor) parse(payload []byte) (leaf *x509.Certificate, others []*x509.Certificate, err error) {
	var p wire.Payload
	if err := json.Unmarshal(payload, &p); err != nil {
		return nil, nil, nodeattest.Refuse(nodeattest.Malformed, "the payload is not x509pop's JSON").Because(err)
	}
	if len(p.Certificates) == 0 {
		return nil, nil, nodeattest.Refuse(nodeattest.Malformed, "the payload has no certificate")
	}
	if n := len(p.Certificates) - 1; n > a.c.MaxIntermediates {
		return nil, nil, nodeattest.Refuse(nodeattest.Malformed, "the chain has %d intermediate certificates, at most %d are allowed", n, a.c.MaxIntermediates)
	}
	for i, der := range p.Certificates {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, nil, nodeattest.Refuse(nodeattest.Malformed, "certificate %d of the chain is not X.509", i).Because(err)
		}
		if err := a.checkKey(c); err != nil {
			return nil, nil, nodeattest.Refuse(nodeattest.Malformed, "certificate %d of the chain: %v", i, err)
		}
		if i == 0 {
			leaf = c
		} else {
			others = append(others, c)
		}
	}
	switch leaf.PublicKey.(type) {
	case *rsa.PublicKey, *ecdsa.PublicKey:
		return leaf, others, nil
	}
	return nil, nil, nodeattest.Refuse(nodeattest.Malformed, "the certificate's key is %v; x509pop works with RSA and ECDSA", leaf.PublicKeyAlgorithm)
}

func (a *Attestor) checkKey(c *x509.Certificate) error {
	switch k := c.PublicKey.(type) {
	case *rsa.PublicKey:
		if bits := k.N.BitLen(); bits > a.c.MaxRSABits || bits < MinRSABits {
			return fmt.Errorf("its RSA key has %d bits, not %d to %d", bits, MinRSABits, a.c.MaxRSABits)
		}
	case *ecdsa.PublicKey:
		if k.Curve.Params().BitSize < minCurveBits {
			return fmt.Errorf("its curve %s is too weak", k.Curve.Params().Name)
		}
	}
	return nil
}

func (a *Attestor) verify(leaf *x509.Certificate, others []*x509.Certificate) ([][]*x509.Certificate, error) {
	roots, err := a.c.Roots()
	if err != nil {
		return nil, nodeattest.Refuse(nodeattest.Internal, "the CA cannot read its own roots for x509pop").Because(err)
	}
	intermediates := x509.NewCertPool()
	for _, c := range others {
		intermediates.AddCert(c)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: a.c.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return nil, nodeattest.Refuse(nodeattest.Denied, "the certificate does not verify: %s", reason(err)).Because(err)
	}
	if a.c.Issuer != nil {
		chains = slices.DeleteFunc(chains, func(chain []*x509.Certificate) bool { return len(chain) < 2 || !a.c.Issuer(chain[1]) })
		if len(chains) == 0 {
			return nil, nodeattest.Refuse(nodeattest.Denied, "the X509-SVID was not issued by this CA itself")
		}
	}
	return chains, nil
}

// reason says why a chain does not verify, without naming what the CA trusts.
func reason(err error) string {
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
		return "it, or one above it, is not valid now"
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return "it was not issued by a CA that this CA takes nodes from"
	}
	return "its chain is not sound"
}

func (a *Attestor) checkLeaf(leaf *x509.Certificate, attempt nodeattest.Attempt) error {
	if leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return nodeattest.Refuse(nodeattest.Denied, "the certificate lacks the key usage digitalSignature")
	}
	if !a.c.VerifyClientIP {
		return nil
	}
	if !attempt.Address.IsValid() {
		return nodeattest.Refuse(nodeattest.Internal, "the CA cannot tell the address that the node calls from")
	}
	for _, ip := range leaf.IPAddresses {
		if ip.Equal(attempt.Address.AsSlice()) {
			return nil
		}
	}
	return nodeattest.Refuse(nodeattest.Denied, "the certificate is not for the address %v", attempt.Address)
}

// evidence says who the node is if it holds the key.
func (a *Attestor) evidence(leaf *x509.Certificate, chains [][]*x509.Certificate) (*nodeattest.Evidence, error) {
	variables := map[string]nodeattest.Variable{
		"PluginName": {Value: wire.Attestor}, "TrustDomain": {Value: a.c.TrustDomain.Name()}, "Fingerprint": {Value: fingerprint(leaf)},
		"SerialNumberHex": {Value: serialHex(leaf.SerialNumber)}, "Subject.CommonName": {Value: leaf.Subject.CommonName},
	}
	if a.c.SPIFFE {
		rest, err := a.svidPath(leaf)
		if err != nil {
			return nil, err
		}
		variables["SVIDPathTrimmed"] = nodeattest.Variable{Value: rest, Segments: true}
	}
	sans := sanSelectors(leaf, a.c.TrustDomain)
	for key, value := range sans {
		variables["URISanSelectors."+key] = nodeattest.Variable{Value: value, Segments: true}
	}
	path, err := a.c.Path.Path(variables)
	if err != nil {
		return nil, nodeattest.Refuse(nodeattest.Denied, "the certificate does not give the node a name").Because(err)
	}
	return &nodeattest.Evidence{Path: path, Selectors: selectors(leaf, chains, sans), CanReattest: true,
		Facts: map[string]any{"certificate": fingerprint(leaf), "certificate_not_after": leaf.NotAfter.Unix()}}, nil
}

// svidPath is the part of the SVID's path that names the node.
func (a *Attestor) svidPath(leaf *x509.Certificate) (string, error) {
	id, err := spiffe.CheckX509SVIDLeaf(leaf)
	if err != nil {
		return "", nodeattest.Refuse(nodeattest.Denied, "the certificate is not an X509-SVID: %v", err)
	}
	rest, ok := strings.CutPrefix(id.Path(), a.c.SVIDPrefix)
	switch {
	case id.TrustDomain() != a.c.TrustDomain:
		return "", nodeattest.Refuse(nodeattest.Denied, "the X509-SVID is of trust domain %q, not %q", id.TrustDomain().Name(), a.c.TrustDomain.Name())
	case id.Path() == "/spire" || strings.HasPrefix(id.Path(), "/spire/"):
		return "", nodeattest.Refuse(nodeattest.Denied, "the X509-SVID is that of an agent or a CA")
	case !ok || rest == "":
		return "", nodeattest.Refuse(nodeattest.Denied, "the path of the X509-SVID of %s does not begin with %s and go on", id, a.c.SVIDPrefix)
	}
	return rest, nil
}

func selectors(leaf *x509.Certificate, chains [][]*x509.Certificate, sans map[string]string) []string {
	var out []string
	if cn := leaf.Subject.CommonName; cn != "" {
		out = append(out, "subject:cn:"+cn)
	}
	for _, chain := range chains {
		for _, c := range chain[1:] {
			if s := "ca:fingerprint:" + fingerprint(c); !slices.Contains(out, s) {
				out = append(out, s)
			}
		}
	}
	out = append(out, "serialnumber:"+serialHex(leaf.SerialNumber))
	for key, value := range sans {
		out = append(out, "san:"+key+":"+value)
	}
	return out
}

// sanSelectors reads the URI SANs x509pop://<trust domain>/<key>/<value>, by which an organisation's CA says things of a
// node. Of two with one key the last counts, as at SPIRE.
func sanSelectors(leaf *x509.Certificate, td spiffeid.TrustDomain) map[string]string {
	out := map[string]string{}
	for _, u := range leaf.URIs {
		if u.Scheme != wire.Attestor || u.Host != td.Name() || u.User != nil {
			continue
		}
		if key, value, ok := strings.Cut(strings.Trim(u.Path, "/"), "/"); ok && key != "" && value != "" {
			out[key] = value
		}
	}
	return out
}

// prove has the node sign a nonce that was drawn for this attestation, so that a chain that was seen elsewhere is of no use.
func prove(leaf *x509.Certificate, attempt nodeattest.Attempt) error {
	challenge, err := wire.NewChallenge(leaf.PublicKey)
	if err != nil {
		return err
	}
	question, err := json.Marshal(challenge)
	if err != nil {
		return err
	}
	answer, err := attempt.Challenge(question)
	if err != nil {
		return err
	}
	response, err := wire.ParseResponse(answer)
	if err != nil {
		return nodeattest.Refuse(nodeattest.Malformed, "the answer to the challenge is not x509pop's JSON").Because(err)
	}
	if err := wire.Verify(leaf.PublicKey, challenge, response); err != nil {
		return nodeattest.Refuse(nodeattest.Denied, "the node does not prove that it holds the certificate's key: %v", err)
	}
	return nil
}

// fingerprint is the name that SPIRE gives a certificate.
func fingerprint(c *x509.Certificate) string {
	sum := sha1.Sum(c.Raw)
	return hex.EncodeToString(sum[:])
}

// serialHex writes a serial number with an even number of lower-case digits.
func serialHex(n *big.Int) string {
	s := n.Text(16)
	if len(s)%2 == 1 {
		s = "0" + s
	}
	return s
}
