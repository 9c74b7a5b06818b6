package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/signet-id/signet/ca/adminapi"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/federation"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/userkeys"
)

// Federation says how the bundles of foreign trust domains are fetched. With whom is in the store: see signet federation.
type Federation struct {
	// WebRoots is the absolute path of a PEM file with the roots that verify endpoints of the profile https_web, in the place of the system's.
	WebRoots string `yaml:"web_roots"`
}

const maxRootsBytes = 4 << 20

// roots reads the file. Nil means those of the system.
func (f Federation) roots() (*x509.CertPool, error) {
	if f.WebRoots == "" {
		return nil, nil
	}
	in, err := os.Open(f.WebRoots)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	text, err := io.ReadAll(io.LimitReader(in, maxRootsBytes))
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s holds no certificate in PEM", f.WebRoots)
	}
	return pool, nil
}

func newPoller(ca *CA) (*federation.Poller, error) {
	roots, err := ca.c.Federation.roots()
	if err != nil {
		return nil, fmt.Errorf("federation.web_roots: %w", err)
	}
	f := &federation.Fetcher{Bundles: bundles{ca.set, ca.reg}, WebRoots: roots, Now: ca.c.Now}
	return federation.New(federation.Config{Registry: ca.reg, Fetch: f.Fetch, Actor: registry.ServerID(ca.td).String(), Now: ca.c.Now, Log: ca.log,
		Audit: func(ctx context.Context, rec auditlog.Record) error {
			return ca.audit.Append(ctx, auditlog.Essential, rec)
		}}), nil
}

// newUserKeys returns what fetches the keys of issuers of user tokens, verified by the roots that verify bundle endpoints.
func newUserKeys(ca *CA) (*userkeys.Poller, error) {
	roots, err := ca.c.Federation.roots()
	if err != nil {
		return nil, fmt.Errorf("federation.web_roots: %w", err)
	}
	f := &federation.Fetcher{WebRoots: roots, Now: ca.c.Now}
	return userkeys.New(userkeys.Config{Registry: ca.reg, Fetch: f.FetchWeb, Actor: registry.ServerID(ca.td).String(), Now: ca.c.Now, Log: ca.log,
		Audit: func(ctx context.Context, rec auditlog.Record) error {
			return ca.audit.Append(ctx, auditlog.Essential, rec)
		}}), nil
}

func (ca *CA) federationStatus() (out []adminapi.FederationStatus) {
	for _, st := range ca.poller.Statuses() {
		out = append(out, adminapi.FederationStatus(st))
	}
	return out
}

// federationHealth counts the relationships and those that fail, and says how old the bundle is that was fetched longest
// ago: since the start if it never was. [FED-28]
func (ca *CA) federationHealth() (all, failing int, oldest time.Duration) {
	if ca.poller == nil {
		return 0, 0, 0
	}
	now := ca.c.Now()
	for _, st := range ca.poller.Statuses() {
		all++
		if st.Err != nil {
			failing++
		}
		at := st.SucceededAt
		if at.IsZero() {
			at = ca.started
		}
		oldest = max(oldest, now.Sub(at))
	}
	return all, failing, oldest
}

// checkForeignBundle refuses a bundle of another trust domain that holds a key of our own: what we sign would be good as
// theirs, too. [TDB-01]
func (ca *CA) checkForeignBundle(b *spiffebundle.Bundle) error {
	own := ca.set.Bundle()
	same := func(x, y crypto.PublicKey) bool {
		k, ok := x.(interface{ Equal(crypto.PublicKey) bool })
		return ok && k.Equal(y)
	}
	for _, x := range b.X509Authorities() {
		for _, o := range own.X509 {
			if same(o.Certificate.PublicKey, x.PublicKey) {
				return errors.New("it holds a key of this trust domain's own X.509 authorities; a key serves one trust domain only [TDB-01]")
			}
		}
	}
	for _, j := range b.JWTAuthorities() {
		for _, o := range own.JWT {
			if same(o.PublicKey, j) {
				return errors.New("it holds a key of this trust domain's own JWT authorities; a key serves one trust domain only [TDB-01]")
			}
		}
	}
	return nil
}
