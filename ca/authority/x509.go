package authority

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/spiffe"
)

// Limits of an X509-SVID.
const (
	// MaxDNSNames is the most DNS names an X509-SVID may have.
	MaxDNSNames = 100

	maxDNSNameBytes = 253
	maxLabelBytes   = 63
)

const (
	// parallelFrom is the batch size from which SignX509Batch spreads the work.
	parallelFrom = 32

	// sampleEvery is how many SVIDs share one self-check, for keys in this process.
	sampleEvery = 64
)

// A Profile is a fixed shape of certificate.
type Profile int

// ProfileLeaf is an X509-SVID of a workload, agent or server. It is the only profile.
const ProfileLeaf Profile = 0

// X509Request says what an X509-SVID shall be.
type X509Request struct {
	// ID is the SPIFFE ID, in the trust domain of the Set, with a path.
	ID spiffeid.ID

	// PublicKey is the subject's, from ParsePublicKey or CheckCSR.
	PublicKey crypto.PublicKey

	// TTL is the validity asked for. Zero means Config.DefaultX509TTL. More than Config.MaxX509TTL, or than the authority has
	// left, is cut; CheckTTL is for refusing it where it is configured.
	TTL time.Duration

	// DNSNames become DNS SANs, in this order; a repeated one is dropped. They grant no identity.
	DNSNames []string

	// SerialPrefix is how the serial number begins, up to MaxSerialPrefix bytes; nil: all of it is random.
	SerialPrefix []byte

	// NotBefore, if it is later than the usual backdate, is the earliest begin of the validity: what begins earlier is revoked.
	NotBefore time.Time

	// Profile must be ProfileLeaf.
	Profile Profile

	// Reserved allows IDs under /spire, which name the CA and its agents. Set it only for those: whoever has an SVID for
	// /spire/server can pose as the CA.
	Reserved bool
}

// A PreparedX509 is an X509-SVID that may be signed. Only CheckX509 makes one; the zero value is refused.
type PreparedX509 struct {
	set      *Set
	id       spiffeid.ID
	public   crypto.PublicKey
	ttl      time.Duration
	dnsNames []string
	prefix   []byte
	from     time.Time

	spki []byte
	ski  [20]byte
	san  []byte
}

// ID returns the SPIFFE ID that was checked.
func (p PreparedX509) ID() spiffeid.ID { return p.id }

// X509SVID is a signed X509-SVID.
type X509SVID struct {
	// Chain is the leaf and the intermediates up to the authority in the bundle, which is left out, each in DER.
	Chain [][]byte

	// SerialNumber is the leaf's, in decimal.
	SerialNumber string

	// NotBefore and NotAfter are the leaf's validity.
	NotBefore, NotAfter time.Time

	// AuthorityID is the id of the X.509 authority that signed.
	AuthorityID string

	// Root is the authority in the bundle that Chain leads to. It is never in Chain.
	Root *x509.Certificate
}

// CheckX509 checks everything about a request that can be refused. Errors that wrap ErrRefused are the request's fault.
func (s *Set) CheckX509(r X509Request) (PreparedX509, error) {
	if _, err := s.activeX509(s.config.Now()); err != nil {
		return PreparedX509{}, err
	}
	if r.Profile != ProfileLeaf {
		return PreparedX509{}, fmt.Errorf("x509-svid %w: unknown profile %d", ErrRefused, r.Profile)
	}
	if err := s.checkID(r.ID, r.Reserved); err != nil {
		return PreparedX509{}, fmt.Errorf("x509-svid %w: %w", ErrRefused, err)
	}
	if r.TTL < 0 {
		return PreparedX509{}, fmt.Errorf("x509-svid %w: ttl %v is negative", ErrRefused, r.TTL)
	}
	dnsNames, err := checkDNSNames(r.DNSNames)
	if err != nil {
		return PreparedX509{}, fmt.Errorf("x509-svid %w: %w", ErrRefused, err)
	}
	if err := checkKeyStrength(r.PublicKey); err != nil {
		return PreparedX509{}, err
	}
	if err := checkSerialPrefix(r.SerialPrefix); err != nil {
		return PreparedX509{}, err
	}
	p := PreparedX509{prefix: r.SerialPrefix, from: r.NotBefore, set: s, id: r.ID, public: r.PublicKey, ttl: s.x509TTL(r.TTL), dnsNames: dnsNames}
	if p.spki, p.ski, err = encodePublicKey(r.PublicKey); err != nil {
		return PreparedX509{}, err
	}
	p.san = encodeSAN(r.ID.String(), dnsNames)
	return p, nil
}

// CheckTTL refuses an X509-SVID TTL, asked for in the configuration or in a registration entry, that issuance would cut.
// Zero, which asks for the default, passes.
func (s *Set) CheckTTL(ttl time.Duration) error {
	now := s.config.Now()
	a, err := s.activeX509(now)
	if err != nil {
		return err
	}
	_, notAfter := a.validity()
	return checkTTL("x509 svid", ttl, s.config.MaxX509TTL, notAfter.Sub(now))
}

// SignX509 signs what CheckX509 has checked.
func (s *Set) SignX509(ctx context.Context, p PreparedX509) (*X509SVID, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	now := s.config.Now()
	a, err := s.activeX509(now)
	if err != nil {
		return nil, err
	}
	return s.signX509(a, &p, now)
}

// SignX509Batch signs many at once, all by the same authority and at the same moment. Results and errors are in the order of
// batch; for each item exactly one of the two is nil. Large batches are spread over the processors. When ctx ends, the items
// that are not yet signed get its error.
func (s *Set) SignX509Batch(ctx context.Context, batch []PreparedX509) ([]*X509SVID, []error) {
	svids, errs := make([]*X509SVID, len(batch)), make([]error, len(batch))
	now := s.config.Now()
	a, err := s.activeX509(now)
	signOne := func(i int) {
		if errs[i] = err; err != nil {
			return
		}
		if errs[i] = ctx.Err(); errs[i] != nil {
			return
		}
		svids[i], errs[i] = s.signX509(a, &batch[i], now)
	}
	workers, from := runtime.GOMAXPROCS(0), parallelFrom
	if err == nil && a.key.Concurrency() > 0 { // signatures of a key store are waited for, not computed
		workers, from = a.key.Concurrency(), 2
	}
	if len(batch) < from || workers == 1 {
		for i := range batch {
			signOne(i)
		}
		return svids, errs
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(workers, len(batch)) {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(batch)); i = next.Add(1) - 1 {
				signOne(int(i))
			}
		})
	}
	wg.Wait()
	return svids, errs
}

func (s *Set) signX509(a *x509Authority, p *PreparedX509, now time.Time) (*X509SVID, error) {
	if p.set != s {
		return nil, fmt.Errorf("x509-svid %w: it was not checked by these authorities", ErrRefused)
	}
	if err := a.permits(p.dnsNames); err != nil {
		return nil, fmt.Errorf("x509-svid %w: %w", ErrRefused, err)
	}
	serial := newSerial()
	if p.prefix != nil {
		serial = serialAfter(p.prefix)
	}
	notBefore, notAfter := validity(now, p.ttl, a)
	if p.from.After(notBefore) {
		notBefore = p.from.UTC().Truncate(time.Second)
	}
	if !notBefore.Before(notAfter) {
		return nil, fmt.Errorf("x509-svid %w: it would begin at %s and end at %s", ErrRefused, notBefore.Format(time.RFC3339), notAfter.Format(time.RFC3339))
	}
	leaf, err := a.sign(p, serial, notBefore, notAfter)
	if err != nil {
		return nil, fmt.Errorf("signing an x509-svid for %q: %w", p.id.String(), err)
	}
	if a.key.External() || s.signatures.Add(1)%sampleEvery == 1 {
		if err := selfCheck(a, p, leaf, notBefore, notAfter); err != nil {
			return nil, fmt.Errorf("self-check of an x509-svid for %q, signed by authority %s: %w", p.id.String(), a.id, err)
		}
	}
	chain := [][]byte{leaf}
	for _, c := range a.intermediates() {
		chain = append(chain, c.Raw)
	}
	return &X509SVID{
		Chain:        chain,
		Root:         a.root(),
		SerialNumber: serialNumber(serial).String(),
		NotBefore:    notBefore,
		NotAfter:     notAfter,
		AuthorityID:  a.id,
	}, nil
}

// sign returns the certificate in DER.
func (a *x509Authority) sign(p *PreparedX509, serial [serialBytes]byte, notBefore, notAfter time.Time) ([]byte, error) {
	if a.template == nil {
		return a.signStandard(p, serial, notBefore, notAfter)
	}
	tbs := a.template.appendTBS(make([]byte, 0, 512+len(p.san)+len(p.spki)), p, serial, notBefore, notAfter)
	digest := sha256.Sum256(tbs)
	signature, err := a.key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	return appendCertificate(make([]byte, 0, len(tbs)+len(signature)+32), tbs, signature), nil
}

// signStandard signs through crypto/x509, for authorities that our own encoder does not know.
func (a *x509Authority) signStandard(p *PreparedX509, serial [serialBytes]byte, notBefore, notAfter time.Time) ([]byte, error) {
	template := &x509.Certificate{
		SerialNumber:          serialNumber(serial),
		NotBefore:             notBefore,
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		SubjectKeyId:          p.ski[:],
		DNSNames:              p.dnsNames,
		URIs:                  []*url.URL{p.id.URL()},
	}
	return x509.CreateCertificate(rand.Reader, template, a.certificate, p.public, a.key)
}

// selfCheck reads back a certificate and compares it with what was checked. It is there for faults of our encoder and of
// hardware: what it finds must never reach a workload.
func selfCheck(a *x509Authority, p *PreparedX509, leaf []byte, notBefore, notAfter time.Time) error {
	cert, err := x509.ParseCertificate(leaf)
	if err != nil {
		return err
	}
	id, err := spiffe.CheckX509SVIDLeaf(cert)
	if err != nil {
		return err
	}
	switch {
	case id != p.id:
		return fmt.Errorf("it has the ID %q", id.String())
	case !bytes.Equal(cert.RawSubjectPublicKeyInfo, p.spki):
		return errors.New("it has another public key")
	case !slices.Equal(cert.DNSNames, p.dnsNames) && len(cert.DNSNames)+len(p.dnsNames) > 0:
		return errors.New("it has other DNS names")
	case !cert.NotBefore.Equal(notBefore) || !cert.NotAfter.Equal(notAfter):
		return fmt.Errorf("it is valid from %v to %v", cert.NotBefore, cert.NotAfter)
	}
	return cert.CheckSignatureFrom(a.certificate)
}

// validity returns the validity of an X509-SVID that is issued at now for ttl, in whole seconds and inside that of the authority and of every CA above it.
//
// An SVID never outlives its authority: a verifier would reject the chain as a whole, long after the issuance that caused
// it. [RFC 5280 §6.1.3, X509-24]
func validity(now time.Time, ttl time.Duration, a *x509Authority) (notBefore, notAfter time.Time) {
	now = now.UTC().Truncate(time.Second)
	notBefore, notAfter = now.Add(-Backdate), now.Add(ttl)
	first, last := a.validity()
	if notBefore.Before(first) {
		notBefore = first
	}
	if notAfter.After(last) {
		notAfter = last
	}
	return notBefore, notAfter
}

// x509TTL returns the TTL for one that was asked for.
func (s *Set) x509TTL(asked time.Duration) time.Duration {
	if asked == 0 {
		asked = s.config.DefaultX509TTL
	}
	return max(time.Second, min(asked, s.config.MaxX509TTL))
}

func checkTTL(what string, ttl, most, left time.Duration) error {
	switch {
	case ttl < 0:
		return fmt.Errorf("%s ttl %v is negative", what, ttl)
	case ttl > most:
		return fmt.Errorf("%s ttl %v is longer than the maximum, %v; ask for less, or raise the maximum in the CA's configuration", what, ttl, most)
	case ttl > left:
		return fmt.Errorf("%s ttl %v is longer than the active authority is still valid, %v; ask for less, or rotate the authority first", what, ttl, left.Truncate(time.Second))
	}
	return nil
}

// checkID refuses IDs that no SVID of a workload may have. Their syntax is already known to be good: a spiffeid.ID is parsed.
func (s *Set) checkID(id spiffeid.ID, reserved bool) error {
	text := id.String()
	switch {
	case id.IsZero():
		return errors.New("it has no SPIFFE ID")
	case !id.MemberOf(s.config.TrustDomain):
		return fmt.Errorf("SPIFFE ID %q is not in trust domain %q", text, s.config.TrustDomain.Name())
	case id.Path() == "":
		return fmt.Errorf("SPIFFE ID %q has no path; it names the trust domain itself", text)
	case len(text) > spiffe.MaxIDBytes:
		return fmt.Errorf("SPIFFE ID has %d bytes, more than %d", len(text), spiffe.MaxIDBytes)
	case !reserved && (id.Path() == "/spire" || strings.HasPrefix(id.Path(), "/spire/")):
		return fmt.Errorf("SPIFFE ID %q is reserved; IDs under /spire name the CA and its agents", text)
	}
	return nil
}

// checkDNSNames returns the names without repetitions.
func checkDNSNames(names []string) ([]string, error) {
	if len(names) > MaxDNSNames {
		return nil, fmt.Errorf("it has %d DNS names, more than %d", len(names), MaxDNSNames)
	}
	var unique []string
	for _, name := range names {
		if err := CheckDNSName(name); err != nil {
			return nil, err
		}
		if !slices.Contains(unique, name) {
			unique = append(unique, name)
		}
	}
	return unique, nil
}

// CheckDNSName refuses a name that cannot be a DNS SAN: labels of letters, digits, hyphens and underscores, up to 63 bytes
// each and 253 in all, where the first label may be "*".
func CheckDNSName(name string) error {
	if name == "" || len(name) > maxDNSNameBytes {
		return fmt.Errorf("DNS name %.300q has %d bytes; it must have 1 to %d", name, len(name), maxDNSNameBytes)
	}
	labels := strings.Split(name, ".")
	for i, label := range labels {
		if i == 0 && label == "*" && len(labels) > 1 {
			continue
		}
		if label == "" || len(label) > maxLabelBytes || label[0] == '-' || label[len(label)-1] == '-' {
			return fmt.Errorf("DNS name %q has the label %q; labels have 1 to %d characters and neither begin nor end with a hyphen", name, label, maxLabelBytes)
		}
		for _, c := range []byte(label) {
			if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_') {
				return fmt.Errorf("DNS name %q holds %q; letters, digits, hyphens and underscores are allowed", name, c)
			}
		}
	}
	return nil
}
