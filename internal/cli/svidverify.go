package cli

import (
	"crypto/x509"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/spiffe"
)

// A verdict is the answer of verify.
type verdict struct {
	Valid    bool   `json:"valid"`
	Kind     string `json:"kind"`
	SPIFFEID string `json:"spiffe_id"`
	NotAfter string `json:"not_after"`
}

func (a *app) verifyCommand() *cobra.Command {
	var bundleFile, trustDomain string
	var audience []string
	cmd := &cobra.Command{
		Use:   "verify FILE|- --bundle FILE",
		Short: "Verify an SVID against a bundle, as a peer would",
		Long: `Verify an X509-SVID or a JWT-SVID against a bundle (a SPIFFE bundle document, or PEM for X509-SVIDs), as strictly as the
standards ask. The exit status is 0 only if a peer that has this bundle accepts the SVID now.

A bundle does not say whose it is. --trust-domain does; without it the IDs in the authorities' own certificates count.`,
		Example: `  signet svid verify svid.pem --bundle bundle.pem
  signet svid verify token --bundle bundle.json --trust-domain example.org --audience reports`,
		Args: exactArgs("FILE"),
	}
	output := outputFlag(cmd)
	cmd.Flags().StringVar(&bundleFile, "bundle", "", "file of the bundle")
	cmd.Flags().StringVar(&trustDomain, "trust-domain", "", "whose bundle it is, such as example.org")
	cmd.Flags().StringArrayVar(&audience, "audience", nil, "for a JWT-SVID: who you are; it must be in the token (repeatable: any of them)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if bundleFile == "" {
			return &usageError{err: fmt.Errorf("--bundle is missing"), hint: example(cmd)}
		}
		data, err := a.readInput(args[0], maxSVIDFile)
		if err != nil {
			return err
		}
		bundle, err := a.loadBundle(bundleFile, trustDomain)
		if err != nil {
			return err
		}
		var v verdict
		if text := strings.TrimSpace(string(data)); isToken(text) && strings.Count(text, ".") >= 2 {
			if len(audience) == 0 {
				return usagef("--audience is missing: a JWT-SVID is valid for its audience only")
			}
			v, err = a.verifyToken(text, bundle, audience)
		} else {
			v, err = a.verifyChain(data, bundle)
		}
		if err != nil {
			return fmt.Errorf("the SVID in %q is not valid: %w", inputName(args[0]), err)
		}
		return a.show(*output, v, []field{
			{name: "Valid", value: "yes", color: green}, {name: "Kind", value: v.Kind}, {name: "SPIFFE ID", value: v.SPIFFEID}, {name: "Until", value: v.NotAfter},
		})
	}
	return cmd
}

func (a *app) verifyChain(data []byte, bundle *spiffebundle.Bundle) (verdict, error) {
	chain, _, err := parseCertificates(data)
	if err != nil {
		return verdict{}, err
	}
	id, _, err := spiffe.VerifyX509SVID(chain, bundle, spiffe.X509Options{Now: a.now()})
	if err != nil {
		return verdict{}, err
	}
	return verdict{Valid: true, Kind: "X509-SVID", SPIFFEID: id.String(), NotAfter: stamp(chain[0].NotAfter)}, nil
}

func (a *app) verifyToken(token string, bundle *spiffebundle.Bundle, audience []string) (verdict, error) {
	svid, err := spiffe.ValidateJWTSVID(token, bundle, audience, spiffe.JWTOptions{Now: a.now()})
	if err != nil {
		return verdict{}, err
	}
	return verdict{Valid: true, Kind: "JWT-SVID", SPIFFEID: svid.ID.String(), NotAfter: stamp(svid.Expiry)}, nil
}

// loadBundle reads the bundle of the named trust domain, or, without a name, of the one that its X.509 authorities
// name. It never takes the SVID's word for it: else any bundle would do for any SVID. [TDB-18]
func (a *app) loadBundle(file, trustDomain string) (*spiffebundle.Bundle, error) {
	data, err := a.readInput(file, maxBundleFile)
	if err != nil {
		return nil, err
	}
	if trustDomain != "" {
		td, err := spiffe.ParseTrustDomain(trustDomain)
		if err != nil {
			return nil, usagef("--trust-domain: %w", err)
		}
		return a.readBundle(td, file, data, "")
	}
	unnamed, err := a.readBundle(spiffeid.RequireTrustDomainFromString("unnamed.invalid"), file, data, "")
	if err != nil {
		return nil, err
	}
	td, err := ownName(unnamed.X509Authorities())
	if err != nil {
		return nil, &usageError{err: fmt.Errorf("the bundle in %q does not say whose it is: %w", file, err), hint: "name it: --trust-domain example.org"}
	}
	named := spiffebundle.FromX509Authorities(td, unnamed.X509Authorities())
	named.SetJWTAuthorities(unnamed.JWTAuthorities())
	return named, nil
}

// ownName is the trust domain that all authorities with an ID name.
func ownName(authorities []*x509.Certificate) (spiffeid.TrustDomain, error) {
	var td spiffeid.TrustDomain
	for _, cert := range authorities {
		if len(cert.URIs) == 0 {
			continue
		}
		id, err := spiffe.IDFromCertificate(cert)
		if err != nil {
			return td, err
		}
		if !td.IsZero() && td != id.TrustDomain() {
			return td, fmt.Errorf("its authorities name both %s and %s", td, id.TrustDomain())
		}
		td = id.TrustDomain()
	}
	if td.IsZero() {
		return td, errors.New("no X.509 authority in it has a SPIFFE ID")
	}
	return td, nil
}
