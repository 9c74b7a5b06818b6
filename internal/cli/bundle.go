package cli

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/signet-id/signet/spiffe"
)

const bundlePage = 100

func (a *app) bundleCommand() *cobra.Command {
	return a.noun("bundle", "Trust bundles: the authorities of this trust domain and of those it federates with", "",
		a.bundleShowCommand(), a.bundleListCommand(), a.bundleAppendCommand(), a.bundleAppendedCommand(), a.bundleRemoveCommand(),
		a.bundleSetCommand(), a.bundleDeleteCommand())
}

// A bundle is a trust bundle as it is printed.
type bundle struct {
	TrustDomain string      `json:"trust_domain"`
	Sequence    uint64      `json:"sequence_number"`
	RefreshHint string      `json:"refresh_hint,omitempty"`
	Authorities []authority `json:"authorities"`
}

type authority struct {
	Type      string `json:"type"`
	ID        string `json:"id"`
	Key       string `json:"key"`
	Subject   string `json:"subject,omitempty"`
	SHA256    string `json:"sha256,omitempty"`
	ExpiresAt string `json:"expires_at,omitempty"`
	Tainted   bool   `json:"tainted,omitempty"`

	expires time.Time
}

// bundleOf reads a bundle from the wire.
func bundleOf(b *types.Bundle) (bundle, error) {
	out := bundle{TrustDomain: b.GetTrustDomain(), Sequence: b.GetSequenceNumber()}
	if b.GetRefreshHint() > 0 {
		out.RefreshHint = exactTTL(b.GetRefreshHint())
	}
	for _, c := range b.GetX509Authorities() {
		certs, err := x509.ParseCertificates(c.GetAsn1())
		if err != nil {
			return out, fmt.Errorf("reading an X.509 authority of %q: %w", b.GetTrustDomain(), err)
		}
		for _, cert := range certs {
			sum := sha256.Sum256(cert.Raw)
			out.Authorities = append(out.Authorities, authority{Type: "x509", ID: hex.EncodeToString(cert.SubjectKeyId), Key: keyName(cert.PublicKey),
				Subject: cert.Subject.String(), SHA256: hex.EncodeToString(sum[:]), ExpiresAt: stamp(cert.NotAfter), Tainted: c.GetTainted(), expires: cert.NotAfter})
		}
	}
	for _, k := range tokenKeys(b) {
		pub, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
		if err != nil {
			return out, fmt.Errorf("reading the %s authority %q of %q: %w", strings.ToUpper(k.use), k.GetKeyId(), b.GetTrustDomain(), err)
		}
		expires := unixTime(k.GetExpiresAt())
		out.Authorities = append(out.Authorities, authority{Type: k.use, ID: k.GetKeyId(), Key: keyName(pub), ExpiresAt: stamp(expires), Tainted: k.GetTainted(), expires: expires})
	}
	return out, nil
}

// A tokenKey is a JWT or WIT authority on the wire.
type tokenKey struct {
	use string // jwt or wit
	wireKey
}

// A wireKey is what types.JWTKey and types.WITKey have in common.
type wireKey interface {
	GetPublicKey() []byte
	GetKeyId() string
	GetExpiresAt() int64
	GetTainted() bool
}

// tokenKeys returns the JWT authorities of a bundle and then its WIT authorities.
func tokenKeys(b *types.Bundle) []tokenKey {
	var out []tokenKey
	for _, k := range b.GetJwtAuthorities() {
		out = append(out, tokenKey{"jwt", k})
	}
	for _, k := range b.GetWitAuthorities() {
		out = append(out, tokenKey{"wit", k})
	}
	return out
}

// documentOf makes the SPIFFE bundle from the wire's.
func documentOf(b *types.Bundle) (*spiffebundle.Bundle, error) {
	td, err := spiffe.ParseTrustDomain(b.GetTrustDomain())
	if err != nil {
		return nil, fmt.Errorf("the CA names a trust domain %q: %w", b.GetTrustDomain(), err)
	}
	out := spiffebundle.New(td)
	out.SetSequenceNumber(b.GetSequenceNumber())
	out.SetRefreshHint(time.Duration(b.GetRefreshHint()) * time.Second)
	for _, c := range b.GetX509Authorities() {
		certs, err := x509.ParseCertificates(c.GetAsn1())
		if err != nil {
			return nil, fmt.Errorf("reading an X.509 authority of %q: %w", td, err)
		}
		for _, cert := range certs {
			out.AddX509Authority(cert)
		}
	}
	for _, k := range tokenKeys(b) {
		pub, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
		if err == nil && k.use == "wit" {
			err = out.AddWITAuthority(k.GetKeyId(), pub)
		} else if err == nil {
			err = out.AddJWTAuthority(k.GetKeyId(), pub)
		}
		if err != nil {
			return nil, fmt.Errorf("reading the %s authority %q of %q: %w", strings.ToUpper(k.use), k.GetKeyId(), td, err)
		}
	}
	return out, nil
}

// encodeBundle writes a bundle as a document: spiffe, pem or jwks.
func encodeBundle(b *spiffebundle.Bundle, as string) ([]byte, error) {
	switch as {
	case "spiffe":
		return spiffe.MarshalBundle(b)
	case "jwks":
		return spiffe.MarshalJWKS(b.JWTAuthorities())
	}
	return pemOf(b.X509Authorities()), nil
}

func pemOf(certs []*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

// bundleFormats are the documents that a bundle is written as and, but for the last two, set from.
var bundleFormats = []string{"spiffe", "pem", "jwks", "spire"}

func checkBundleFormat(as string, formats []string) error {
	if as == "" || slices.Contains(formats, as) {
		return nil
	}
	return usagef("--format %q is not one of %s", as, strings.Join(formats, ", "))
}

func (a *app) bundleShowCommand() *cobra.Command {
	var as string
	var own bool
	cmd := &cobra.Command{
		Use:   "show [TRUST-DOMAIN]",
		Short: "Show the bundle of this trust domain, or of one it federates with",
		Long: `Show the authorities of this trust domain, or of one it federates with. With --format the bundle itself is printed: "spiffe"
is the SPIFFE bundle document, "pem" the X.509 authorities, "jwks" the JWT authorities as a JWK Set, "spire" what SPIRE's command line
writes and 'signet bundle append' reads.`,
		Example: `  signet bundle show
  signet bundle show --format pem > bundle.pem
  signet bundle show partner.example --format spiffe`,
		Args: atMostArgs(1),
	}
	output := outputFlag(cmd)
	cmd.Flags().StringVar(&as, "format", "", "print the bundle itself as spiffe, pem, jwks or spire")
	cmd.Flags().BoolVar(&own, "own", false, "with --format spire: leave out authorities that were appended")
	exclusive(cmd, "format", "output")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkBundleFormat(as, bundleFormats); err != nil {
			return err
		}
		if own && (as != "spire" || len(args) > 0) {
			return usagef("--own goes with --format spire, for the bundle of this trust domain")
		}
		if _, err := trustDomains("TRUST-DOMAIN", args); err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			answer, err := getBundle(ctx, c, args)
			if err != nil {
				return err
			}
			if as == "spire" {
				text, err := spireBundle(ctx, c, answer, own)
				if err != nil {
					return err
				}
				return a.writeText(text)
			}
			if as != "" {
				doc, err := documentOf(answer)
				if err != nil {
					return err
				}
				text, err := encodeBundle(doc, as)
				if err != nil {
					return fmt.Errorf("encoding the bundle of %s: %w", doc.TrustDomain(), err)
				}
				return a.writeText(text)
			}
			b, err := bundleOf(answer)
			if err != nil {
				return err
			}
			return a.showBundle(*output, b)
		})
	}
	return a.reachesCA(cmd)
}

// getBundle asks for the CA's own bundle, or that of the federated trust domain in args.
func getBundle(ctx context.Context, c *caConn, args []string) (*types.Bundle, error) {
	client := bundlev1.NewBundleClient(c)
	own, err := client.GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return nil, caError("asking for the bundle", c, err)
	}
	if len(args) == 0 || args[0] == own.GetTrustDomain() {
		return own, nil
	}
	other, err := client.GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: args[0]})
	if err = caError(fmt.Sprintf("asking for the bundle of %s", args[0]), c, err); isCode(err, codes.NotFound) {
		return nil, withHint(err, "'signet bundle list' shows the trust domains there are; 'signet bundle set' adds one")
	}
	return other, err
}

func (a *app) showBundle(f format, b bundle) error {
	if f == formatJSON || f == formatYAML {
		return a.show(f, b, nil)
	}
	if err := a.show(f, b, []field{
		{name: "Trust domain", value: b.TrustDomain}, {name: "Sequence", value: fmt.Sprint(b.Sequence)}, {name: "Refresh hint", value: b.RefreshHint},
	}); err != nil {
		return err
	}
	now := a.now()
	fmt.Fprintln(a.stdout)
	return list(a, f, "the bundle is empty: nobody can trust this trust domain", []column[authority]{
		{name: "TYPE", value: func(x authority) string { return x.Type }},
		{name: "AUTHORITY", value: func(x authority) string { return x.ID }},
		{name: "KEY", value: func(x authority) string { return x.Key }},
		{name: "VALID UNTIL", value: func(x authority) string { return x.ExpiresAt }},
		{name: "", value: func(x authority) string { return left(x.expires, now) }},
		{name: "STATE", value: taintState, color: func(x authority) string {
			if x.Tainted {
				return red
			}
			return ""
		}},
		{name: "SUBJECT", wide: true, value: func(x authority) string { return x.Subject }},
		{name: "SHA-256", wide: true, value: func(x authority) string { return x.SHA256 }},
	}, b.Authorities)
}

func taintState(x authority) string {
	if x.Tainted {
		return "tainted"
	}
	return "good"
}

func (a *app) bundleListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List the trust domains that this one federates with",
		Example: "  signet bundle list -o wide",
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			count := func(b bundle, typ string) string {
				n := 0
				for _, x := range b.Authorities {
					if x.Type == typ {
						n++
					}
				}
				return fmt.Sprint(n)
			}
			l := &lister[bundle]{app: a, format: *output, none: "no bundle of another trust domain is set", columns: []column[bundle]{
				{name: "TRUST DOMAIN", value: func(b bundle) string { return b.TrustDomain }},
				{name: "X509", value: func(b bundle) string { return count(b, "x509") }},
				{name: "JWT", value: func(b bundle) string { return count(b, "jwt") }},
				{name: "SEQUENCE", value: func(b bundle) string { return fmt.Sprint(b.Sequence) }},
				{name: "REFRESH HINT", wide: true, value: func(b bundle) string { return b.RefreshHint }},
			}}
			for token := ""; ; {
				page, err := bundlev1.NewBundleClient(c).ListFederatedBundles(ctx, &bundlev1.ListFederatedBundlesRequest{PageSize: bundlePage, PageToken: token})
				if err != nil {
					return caError("listing bundles", c, err)
				}
				items := make([]bundle, len(page.GetBundles()))
				for i, b := range page.GetBundles() {
					if items[i], err = bundleOf(b); err != nil {
						return err
					}
				}
				if err := l.add(items); err != nil {
					return err
				}
				if token = page.GetNextPageToken(); token == "" {
					return l.close()
				}
			}
		})
	}
	return a.reachesCA(cmd)
}

func (a *app) bundleSetCommand() *cobra.Command {
	var as string
	cmd := &cobra.Command{
		Use:   "set TRUST-DOMAIN FILE|-",
		Short: "Set the bundle of another trust domain",
		Long: `Set the bundle of another trust domain from a SPIFFE bundle document or from X.509 authorities in PEM. What was there before is
replaced. The file must come over a channel that you trust: who can change it decides who is trusted.`,
		Example: `  signet bundle set partner.example partner.json
  ssh partner-ca signet bundle show --format spiffe | signet bundle set partner.example -`,
		Args: exactArgs("TRUST-DOMAIN", "FILE"),
	}
	cmd.Flags().StringVar(&as, "format", "", "what FILE is: spiffe or pem (default: by its content)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if as == "jwks" {
			return usagef("--format jwks cannot be set: a JWK Set does not say for which kind of SVID its keys are")
		}
		if err := checkBundleFormat(as, bundleFormats[:2]); err != nil {
			return err
		}
		names, err := trustDomains("TRUST-DOMAIN", args[:1])
		if err != nil {
			return err
		}
		td := spiffeid.RequireTrustDomainFromString(names[0])
		data, err := a.readInput(args[1], maxBundleFile)
		if err != nil {
			return err
		}
		doc, err := a.readBundle(td, args[1], data, as)
		if err != nil {
			return err
		}
		wire, err := wireBundle(doc)
		if err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			doing := fmt.Sprintf("setting the bundle of %s", td)
			answer, err := bundlev1.NewBundleClient(c).BatchSetFederatedBundle(ctx, &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{wire}})
			if err != nil {
				return caError(doing, c, err)
			}
			for _, r := range answer.GetResults() {
				if code := codes.Code(r.GetStatus().GetCode()); code != codes.OK {
					return statusError(doing, c, code, r.GetStatus().GetMessage())
				}
			}
			_, err = fmt.Fprintf(a.stdout, "set %s: %d X.509 and %d JWT authorities\n", td, len(wire.X509Authorities), len(wire.JwtAuthorities))
			return err
		})
	}
	return a.reachesCA(cmd)
}

func wireBundle(b *spiffebundle.Bundle) (*types.Bundle, error) {
	out := &types.Bundle{TrustDomain: b.TrustDomain().Name()}
	if n, ok := b.SequenceNumber(); ok {
		out.SequenceNumber = n
	}
	if d, ok := b.RefreshHint(); ok {
		out.RefreshHint = int64(d / time.Second)
	}
	for _, c := range b.X509Authorities() {
		out.X509Authorities = append(out.X509Authorities, &types.X509Certificate{Asn1: c.Raw})
	}
	for _, kid := range sortedKeys(b.JWTAuthorities()) {
		der, err := x509.MarshalPKIXPublicKey(b.JWTAuthorities()[kid])
		if err != nil {
			return nil, fmt.Errorf("encoding the JWT authority %q: %w", kid, err)
		}
		out.JwtAuthorities = append(out.JwtAuthorities, &types.JWTKey{PublicKey: der, KeyId: kid})
	}
	return out, nil
}

func (a *app) bundleDeleteCommand() *cobra.Command {
	var mode string
	cmd := &cobra.Command{
		Use:     "delete TRUST-DOMAIN...",
		Short:   "Delete bundles of other trust domains",
		Example: "  signet bundle delete partner.example --mode dissociate",
		Args:    someArgs("TRUST-DOMAIN"),
	}
	cmd.Flags().StringVar(&mode, "mode", "restrict", "what becomes of entries that federate with it: restrict (refuse if there are any), delete (delete them), dissociate (strike it from them)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		m, ok := map[string]bundlev1.BatchDeleteFederatedBundleRequest_Mode{
			"restrict": bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT, "delete": bundlev1.BatchDeleteFederatedBundleRequest_DELETE,
			"dissociate": bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE}[mode]
		if !ok {
			return usagef("--mode %q is not one of restrict, delete, dissociate", mode)
		}
		names, err := trustDomains("TRUST-DOMAIN", args)
		if err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			answer, err := bundlev1.NewBundleClient(c).BatchDeleteFederatedBundle(ctx, &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: names, Mode: m})
			if err != nil {
				return caError("deleting bundles", c, err)
			}
			for _, r := range answer.GetResults() {
				if code := codes.Code(r.GetStatus().GetCode()); code != codes.OK {
					return statusError(fmt.Sprintf("deleting the bundle of %s", r.GetTrustDomain()), c, code, r.GetStatus().GetMessage())
				}
				fmt.Fprintf(a.stdout, "deleted %s\n", escape(r.GetTrustDomain()))
			}
			return nil
		})
	}
	return a.reachesCA(cmd)
}
