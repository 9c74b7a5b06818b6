package cli

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/encoding/protojson"
)

func (a *app) bundleAppendCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "append FILE|-",
		Short: "Add another server's authorities to the bundle of this trust domain",
		Long: `Add the authorities in FILE to the bundle of this trust domain: those of another server of the same trust domain, whose SVIDs shall
be good here, too. Agents hand the bundle on to every workload. What is in the bundle already is passed over, so the command may run again and
again, and does nothing then. Authorities that have ended or are tainted are left out.

FILE is what 'signet bundle show --format spire' or 'spire-server bundle show -output json' writes. X.509 authorities in PEM and a
SPIFFE bundle document are read, too; but the latter does not say when JWT authorities end, and a SPIRE server drops those whose end it does
not know. --socket may name the admin socket of a SPIRE server.

FILE must come over a channel that you trust: whoever can change it can be anybody in your trust domain.`,
		Example: `  spire-server bundle show -output json | ssh ca signet bundle append -
  signet bundle show --format spire --own | ssh spire signet bundle append - --socket /tmp/spire-server/private/api.sock`,
		Args: exactArgs("FILE"),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		data, err := a.readInput(args[0], maxBundleFile)
		if err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			given, err := a.readAuthorities(ctx, c, args[0], data)
			if err != nil {
				return err
			}
			return a.appendAuthorities(ctx, c, given)
		})
	}
	return a.reachesCA(cmd)
}

// readAuthorities reads a bundle of the CA's own trust domain.
func (a *app) readAuthorities(ctx context.Context, c *caConn, name string, data []byte) (*types.Bundle, error) {
	td, err := c.ownTrustDomain(ctx)
	if err != nil {
		return nil, err
	}
	given := new(types.Bundle)
	err = protojson.Unmarshal(data, given)
	if err != nil && bytes.Contains(data, []byte(`"x509_authorities"`)) { // it is that form, with something that is not known
		return nil, fmt.Errorf("reading the bundle in %q: %w", inputName(name), err)
	}
	if err == nil {
		if given.TrustDomain != td.Name() {
			return nil, withHint(fmt.Errorf("the bundle in %q is of trust domain %q, not of %q", inputName(name), given.TrustDomain, td.Name()),
				"'signet bundle set' sets the bundle of another trust domain")
		}
		return given, nil
	}
	doc, err := a.readBundle(td, name, data, "")
	if err != nil {
		return nil, err
	}
	given, err = wireBundle(doc)
	if err == nil && len(given.JwtAuthorities) > 0 {
		a.note("%q does not say when its JWT authorities end; a SPIRE server drops them (--format spire tells it)", inputName(name))
	}
	return given, err
}

// appendAuthorities adds what is missing, each authority by itself: one that is refused does not keep the others out.
func (a *app) appendAuthorities(ctx context.Context, c *caConn, given *types.Bundle) error {
	client := bundlev1.NewBundleClient(c)
	have, err := client.GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return caError("asking for the bundle", c, err)
	}
	var requests []*bundlev1.AppendBundleRequest
	var ids []string
	leftOut := func(id, why string) { a.note("left out: authority %s, which %s", id, why) }
	for _, x := range given.GetX509Authorities() {
		certs, err := x509.ParseCertificates(x.GetAsn1())
		if err != nil {
			return fmt.Errorf("reading an X.509 authority of the file: %w", err)
		}
		for _, cert := range certs {
			id := fmt.Sprintf("%x", cert.SubjectKeyId)
			switch {
			case slices.ContainsFunc(have.GetX509Authorities(), func(h *types.X509Certificate) bool { return slices.Equal(h.GetAsn1(), cert.Raw) }):
			case x.GetTainted():
				leftOut(id, "is tainted")
			case !a.now().Before(cert.NotAfter):
				leftOut(id, "ended "+stamp(cert.NotAfter))
			default:
				requests = append(requests, &bundlev1.AppendBundleRequest{X509Authorities: []*types.X509Certificate{{Asn1: cert.Raw}}})
				ids = append(ids, "X.509 authority "+id)
			}
		}
	}
	for _, k := range given.GetJwtAuthorities() {
		switch {
		case slices.ContainsFunc(have.GetJwtAuthorities(), func(h *types.JWTKey) bool {
			return h.GetKeyId() == k.GetKeyId() && slices.Equal(h.GetPublicKey(), k.GetPublicKey())
		}):
		case k.GetTainted():
			leftOut(k.GetKeyId(), "is tainted")
		case k.GetExpiresAt() > 0 && k.GetExpiresAt() <= a.now().Unix():
			leftOut(k.GetKeyId(), "ended "+stamp(unixTime(k.GetExpiresAt())))
		default:
			requests = append(requests, &bundlev1.AppendBundleRequest{JwtAuthorities: []*types.JWTKey{k}})
			ids = append(ids, "JWT authority "+k.GetKeyId())
		}
	}
	var refused []error
	for i, req := range requests {
		req.OutputMask = &types.BundleMask{}
		if _, err := client.AppendBundle(ctx, req); err != nil {
			refused = append(refused, caError("appending the "+ids[i], c, err))
			continue
		}
		fmt.Fprintf(a.stdout, "appended %s\n", escape(ids[i]))
	}
	if len(requests) == 0 {
		fmt.Fprintln(a.stdout, "nothing to append")
	}
	return errors.Join(refused...)
}

// spireBundle writes a bundle as SPIRE's command line does: with the ends of JWT authorities, which a SPIFFE bundle lacks.
// With own, those are left out whose keys are not the CA's own.
func spireBundle(ctx context.Context, c *caConn, b *types.Bundle, own bool) ([]byte, error) {
	if own {
		foreign, err := appendedAuthorities(ctx, c)
		if err != nil {
			return nil, err
		}
		for _, x := range foreign {
			b.X509Authorities = slices.DeleteFunc(b.X509Authorities, func(h *types.X509Certificate) bool { return slices.Equal(h.GetAsn1(), x.wire.GetCertificate()) })
			b.JwtAuthorities = slices.DeleteFunc(b.JwtAuthorities, func(h *types.JWTKey) bool {
				return x.Type == "jwt" && h.GetKeyId() == x.ID
			})
		}
	}
	text, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(b)
	if err != nil {
		return nil, fmt.Errorf("writing the bundle of %q: %w", b.GetTrustDomain(), err)
	}
	return steadyJSON(text)
}
