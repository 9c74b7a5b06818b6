// Package awsiid judges instances of AWS EC2 by their instance identity document, which AWS signs. It is SPIRE's
// attestor aws_iid, as far as the document goes: it never calls AWS. A document says which instance it was made for and
// nothing of who shows it, so that the first to show it is the node.
package awsiid

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/signet-id/signet/ca/nodeattest"
)

// Type is the attestor's name.
const Type = "aws_iid"

// clockSkew is how far AWS's clock may be ahead of ours.
const clockSkew = 5 * time.Minute

// An Attestor judges documents.
type Attestor struct {
	accounts       map[string]bool
	certificates   map[string][]*x509.Certificate // by region
	maxAge         time.Duration
	allowReattests bool
	path           *nodeattest.PathTemplate // or nil
	now            func() time.Time
}

// New returns the attestor of a configuration that Check accepts, after it has read the certificates.
func New(c Config) (*Attestor, error) {
	a := &Attestor{accounts: map[string]bool{}, certificates: map[string][]*x509.Certificate{}, maxAge: c.MaxInstanceAge, allowReattests: c.AllowReattestation,
		path: c.Path, now: c.Now}
	if a.now == nil {
		a.now = time.Now
	}
	for _, account := range c.Accounts {
		a.accounts[account] = true
	}
	var errs []error
	for _, region := range slices.Sorted(maps.Keys(c.Certificates)) {
		certificates, err := readCertificates(c.Certificates[region])
		if err != nil {
			errs = append(errs, fmt.Errorf("certificates.%s: %w", region, err))
		}
		a.certificates[region] = certificates
	}
	return a, errors.Join(errs...)
}

// Type is SPIRE's name of this attestor.
func (a *Attestor) Type() string { return Type }

// Attest judges a payload {"document": ..., "signature": ..., "rsa2048": ...}.
func (a *Attestor) Attest(_ context.Context, attempt nodeattest.Attempt) (*nodeattest.Evidence, error) {
	p, err := parsePayload(attempt.Payload)
	if err != nil {
		return nil, err
	}
	// The document is not believed yet; it says which certificate must have signed it.
	d, err := parseDocument([]byte(p.Document))
	if err != nil {
		return nil, err
	}
	denied := func(format string, args ...any) error { return nodeattest.Refuse(nodeattest.Denied, format, args...) }
	certificates := a.certificates[d.Region]
	switch {
	case !a.accounts[d.AccountID]:
		return nil, denied("instances of account %q are not let in", d.AccountID)
	case len(certificates) == 0:
		return nil, denied("the CA has no certificate for region %q", d.Region)
	}
	now := a.now()
	if err := verify([]byte(p.Document), p.RSA2048, certificates, now); err != nil {
		return nil, nodeattest.Refuse(nodeattest.Malformed, "failed verification of the instance identity document").Because(err)
	}
	switch age := now.Sub(d.PendingTime); {
	case age < -clockSkew:
		return nil, denied("the instance identity document is of an instance that is launched in the future, at %s", d.PendingTime.UTC().Format(time.RFC3339))
	case a.maxAge > 0 && age > a.maxAge:
		return nil, denied("the instance was launched more than %v ago, at %s", a.maxAge, d.PendingTime.UTC().Format(time.RFC3339))
	}
	path := []string{Type, d.AccountID, d.Region, d.InstanceID}
	if a.path != nil {
		if path, err = a.path.Path(map[string]nodeattest.Variable{
			"PluginName": {Value: Type}, "AccountID": {Value: d.AccountID}, "Region": {Value: d.Region}, "InstanceID": {Value: d.InstanceID},
		}); err != nil {
			return nil, denied("the agent's SPIFFE ID cannot be made: %v", err)
		}
	}
	return &nodeattest.Evidence{
		Path:        path,
		Selectors:   d.selectors(),
		CanReattest: a.allowReattests,
		Facts:       map[string]any{"account": d.AccountID, "region": d.Region, "instance": d.InstanceID, "launched": d.PendingTime.Unix()},
	}, nil
}
