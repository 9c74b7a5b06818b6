package cli

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/signet-id/signet/internal/durable"
)

func (a *app) mintX509Command() *cobra.Command {
	var id, dir string
	var dns []string
	var ttl time.Duration
	var force bool
	cmd := &cobra.Command{
		Use:   "x509",
		Short: "Mint an X509-SVID; the key is made here and stays here",
		Long: `Mint an X509-SVID for an ID that no agent serves, such as a person's or an appliance's. The key is made here and never leaves
this machine. Three files are written: svid.pem (the chain), key.pem (PKCS #8, mode 0600) and bundle.pem (the authorities
to verify peers with).`,
		Example: `  signet svid mint x509 --id /people/alice --ttl 8h --write alice`,
	}
	fs := cmd.Flags()
	fs.StringVar(&id, "id", "", "the SPIFFE ID; /web is short for spiffe://TRUST-DOMAIN/web")
	fs.StringVar(&dir, "write", ".", "directory for svid.pem, key.pem and bundle.pem")
	fs.StringArrayVar(&dns, "dns", nil, "DNS name in the SVID (repeatable)")
	fs.DurationVar(&ttl, "ttl", 0, "validity, such as 1h (0: the CA's default)")
	fs.BoolVar(&force, "force", false, "overwrite files that exist")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		seconds, err := checkMint(cmd, id, ttl)
		if err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			spiffeID, err := c.id(ctx, "--id", id)
			if err != nil {
				return err
			}
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				return fmt.Errorf("making a key: %w", err)
			}
			csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{spiffeID.URL()}, DNSNames: dns}, key)
			if err != nil {
				return fmt.Errorf("making a signing request for %s: %w", spiffeID, err)
			}
			answer, err := svidv1.NewSVIDClient(c).MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr, Ttl: seconds})
			if err != nil {
				return caError(fmt.Sprintf("minting an X509-SVID for %s", spiffeID), c, err)
			}
			chain, err := chainOf(answer.GetSvid(), spiffeID, key)
			if err != nil {
				return err
			}
			roots, err := bundlev1.NewBundleClient(c).GetBundle(ctx, &bundlev1.GetBundleRequest{OutputMask: &types.BundleMask{X509Authorities: true}})
			if err != nil {
				return caError("asking for the bundle", c, err)
			}
			doc, err := documentOf(roots)
			if err != nil {
				return err
			}
			names, err := writeX509(dir, "", force, chain, key, doc.X509Authorities())
			if err != nil {
				return err
			}
			fmt.Fprintf(a.stdout, "%s\nvalid until %s (%s)\n", spiffeID, stamp(chain[0].NotAfter), left(chain[0].NotAfter, a.now()))
			for _, n := range names {
				fmt.Fprintf(a.stdout, "wrote %s\n", escape(n))
			}
			return nil
		})
	}
	return a.reachesCA(cmd)
}

// checkMint checks what both mint commands share.
func checkMint(cmd *cobra.Command, id string, ttl time.Duration) (int32, error) {
	if id == "" {
		return 0, &usageError{err: fmt.Errorf("--id is missing"), hint: example(cmd)}
	}
	if id[0] != '/' {
		if _, err := fullID("--id", id); err != nil {
			return 0, err
		}
	}
	return wireTTL("--ttl", ttl)
}

// chainOf checks that what the CA signed is what was asked for.
func chainOf(svid *types.X509SVID, id spiffeid.ID, key *ecdsa.PrivateKey) ([]*x509.Certificate, error) {
	var chain []*x509.Certificate
	for i, der := range svid.GetCertChain() {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("reading certificate %d of the minted X509-SVID: %w", i+1, err)
		}
		chain = append(chain, cert)
	}
	if len(chain) == 0 {
		return nil, errors.New("the CA answered with an empty certificate chain")
	}
	if pub, ok := chain[0].PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(&key.PublicKey) {
		return nil, errors.New("the CA signed another key than the one sent")
	}
	if len(chain[0].URIs) != 1 || chain[0].URIs[0].String() != id.String() {
		return nil, fmt.Errorf("the CA signed %v, want %s", chain[0].URIs, id)
	}
	return chain, nil
}

// writeX509 writes an X509-SVID as files into dir, which is made if it is not there. The key goes last: who sees it can
// rely on the others. Names begin with prefix.
func writeX509(dir, prefix string, force bool, chain []*x509.Certificate, key any, roots []*x509.Certificate) ([]string, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding the key: %w", err)
	}
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	write := durable.WriteNew
	if force {
		write = durable.WriteFile
	}
	var names []string
	for _, f := range []struct {
		name string
		data []byte
		perm fs.FileMode
	}{
		{"svid.pem", pemOf(chain), 0o600},
		{"bundle.pem", pemOf(roots), 0o600},
		{"key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600},
	} {
		path := filepath.Join(dir, prefix+f.name)
		if err := write(path, f.data, f.perm); err != nil {
			if errors.Is(err, fs.ErrExist) {
				return nil, withHint(fmt.Errorf("writing %q: it exists", path), "--force overwrites it, --write DIR writes elsewhere")
			}
			return nil, fmt.Errorf("writing %q: %w", path, err)
		}
		names = append(names, path)
	}
	return names, nil
}

func (a *app) mintJWTCommand() *cobra.Command {
	var id, file string
	var audience []string
	var ttl time.Duration
	cmd := &cobra.Command{
		Use:   "jwt",
		Short: "Mint a JWT-SVID",
		Long: `Mint a JWT-SVID. It is written to a file of mode 0600, or with --write - to stdout. Who has the token is the ID, until it
expires: give it one audience and a short life.`,
		Example: `  signet svid mint jwt --id /people/alice --audience reports --write alice.jwt`,
	}
	fs := cmd.Flags()
	fs.StringVar(&id, "id", "", "the SPIFFE ID; /web is short for spiffe://TRUST-DOMAIN/web")
	fs.StringArrayVar(&audience, "audience", nil, "who shall accept the token (repeatable, but one is best)")
	fs.DurationVar(&ttl, "ttl", 0, "validity, such as 5m (0: the CA's default)")
	fs.StringVar(&file, "write", "", "file for the token; - is stdout")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		seconds, err := checkMint(cmd, id, ttl)
		switch {
		case err != nil:
			return err
		case len(audience) == 0:
			return &usageError{err: fmt.Errorf("--audience is missing: who shall accept the token"), hint: example(cmd)}
		case file == "":
			return &usageError{err: fmt.Errorf("--write is missing: the file for the token, or - for stdout"), hint: example(cmd)}
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			spiffeID, err := c.id(ctx, "--id", id)
			if err != nil {
				return err
			}
			answer, err := svidv1.NewSVIDClient(c).MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{
				Id: &types.SPIFFEID{TrustDomain: spiffeID.TrustDomain().Name(), Path: spiffeID.Path()}, Audience: audience, Ttl: seconds})
			if err != nil {
				return caError(fmt.Sprintf("minting a JWT-SVID for %s", spiffeID), c, err)
			}
			return a.writeToken(file, spiffeID.String(), answer.GetSvid().GetToken(), unixTime(answer.GetSvid().GetExpiresAt()))
		})
	}
	return a.reachesCA(cmd)
}

// writeToken puts a JWT-SVID where it was asked for; "-" is stdout.
func (a *app) writeToken(file, id, token string, expires time.Time) error {
	if file == "-" {
		a.note("%s, valid until %s (%s)", id, stamp(expires), left(expires, a.now()))
		_, err := fmt.Fprintln(a.stdout, escape(token))
		return err
	}
	if err := durable.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
		return fmt.Errorf("writing %q: %w", file, err)
	}
	_, err := fmt.Fprintf(a.stdout, "%s\nvalid until %s (%s)\nwrote %s\n", escape(id), stamp(expires), left(expires, a.now()), escape(file))
	return err
}
