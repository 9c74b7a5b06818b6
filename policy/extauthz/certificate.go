package extauthz

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/spiffe"
)

const (
	// maxCertificate is the longest text that is read as a certificate: URL encoding makes PEM a little longer.
	maxCertificate = 16 << 10

	// maxCertificates bounds those that are kept parsed. A certificate comes with each call of its connection.
	maxCertificates = 4096
)

var errNoCertificate = errors.New("the check comes without the peer's certificate: set include_peer_certificate: true in the ext_authz filter, or ext_authz.allow_missing_certificate in the agent's configuration")

// certificates keeps what certificates say, by their very text: what is found under a text is true of that text, whoever
// sent it before. The zero value is ready.
type certificates struct {
	mu    sync.RWMutex
	known map[string]*leaf
}

type leaf struct {
	cert *x509.Certificate
	id   spiffeid.ID
	err  error
}

// check returns the certificate of a peer that the Envoy knows as id, from the PEM text in URL encoding that Envoy sends.
// The Envoy has verified it, perhaps long ago: what can have changed since is looked at here.
func (c *certificates) check(text string, id spiffeid.ID, now time.Time) (*x509.Certificate, error) {
	if len(text) > maxCertificate {
		return nil, fmt.Errorf("source.certificate has %d bytes; at most %d are read", len(text), maxCertificate)
	}
	l := c.of(text)
	switch {
	case l.err != nil:
		return nil, fmt.Errorf("source.certificate: %w", l.err)
	case l.id != id:
		return nil, fmt.Errorf("source.certificate is that of %s, and source.principal %s", l.id, id)
	case now.After(l.cert.NotAfter):
		return nil, fmt.Errorf("the X509-SVID expired at %s, while the connection was open", l.cert.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(l.cert.NotBefore):
		return nil, fmt.Errorf("the X509-SVID is not valid before %s", l.cert.NotBefore.UTC().Format(time.RFC3339))
	}
	return l.cert, nil
}

func (c *certificates) of(text string) *leaf {
	c.mu.RLock()
	l := c.known[text]
	c.mu.RUnlock()
	if l != nil {
		return l
	}
	l = parse(text)
	if l.err != nil {
		return l // not worth the room
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known == nil {
		c.known = make(map[string]*leaf)
	}
	for old := range c.known { // any: a map begins somewhere else each time
		if len(c.known) < maxCertificates {
			break
		}
		delete(c.known, old)
	}
	c.known[text] = l
	return l
}

// parse reads one certificate.
func parse(text string) *leaf {
	plain, err := url.PathUnescape(text)
	if err != nil {
		return &leaf{err: errors.New("it is not in URL encoding")}
	}
	block, rest := pem.Decode([]byte(plain))
	if block == nil || block.Type != "CERTIFICATE" || len(rest) > 0 {
		return &leaf{err: errors.New("it is not one certificate as PEM")}
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return &leaf{err: err}
	}
	id, err := spiffe.CheckX509SVIDLeaf(cert)
	return &leaf{cert: cert, id: id, err: err}
}
