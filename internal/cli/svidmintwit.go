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
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/signet-id/signet/internal/durable"
)

func (a *app) mintWITCommand() *cobra.Command {
	var id, dir string
	var ttl time.Duration
	var force bool
	cmd := &cobra.Command{
		Use:   "wit",
		Short: "Mint a WIT-SVID; its key is made here and stays here",
		Long: `Mint a WIT-SVID, a token that is of use only together with proofs of its key. The key (EC P-256, for ES256) is made here and
never leaves this machine. Two files are written: wit.jwt and wit-key.pem (PKCS #8, mode 0600). The CA must have WIT-SVIDs
enabled (wit.enabled in its configuration): the standard calls them incubating.`,
		Example: `  signet svid mint wit --id /people/alice --ttl 1h --write alice`,
	}
	flags := cmd.Flags()
	flags.StringVar(&id, "id", "", "the SPIFFE ID; /web is short for spiffe://TRUST-DOMAIN/web")
	flags.StringVar(&dir, "write", ".", "directory for wit.jwt and wit-key.pem")
	flags.DurationVar(&ttl, "ttl", 0, "validity, such as 1h (0: the CA's default)")
	flags.BoolVar(&force, "force", false, "overwrite files that exist")
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
			spki, err := x509.MarshalPKIXPublicKey(key.Public())
			if err != nil {
				return fmt.Errorf("encoding the public key: %w", err)
			}
			answer, err := svidv1.NewSVIDClient(c).MintWITSVID(ctx, &svidv1.MintWITSVIDRequest{
				Id: &types.SPIFFEID{TrustDomain: spiffeID.TrustDomain().Name(), Path: spiffeID.Path()}, PublicKey: spki, SigningAlgorithm: "ES256", Ttl: seconds})
			if err != nil {
				return caError(fmt.Sprintf("minting a WIT-SVID for %s", spiffeID), c, err)
			}
			names, err := writeWIT(dir, force, answer.GetSvid().GetToken(), key)
			if err != nil {
				return err
			}
			expires := unixTime(answer.GetSvid().GetExpiresAt())
			fmt.Fprintf(a.stdout, "%s\nvalid until %s (%s)\n", spiffeID, stamp(expires), left(expires, a.now()))
			for _, n := range names {
				fmt.Fprintf(a.stdout, "wrote %s\n", escape(n))
			}
			return nil
		})
	}
	return a.reachesCA(cmd)
}

// writeWIT writes a WIT-SVID and then its key into dir, which is made if it is not there.
func writeWIT(dir string, force bool, token string, key *ecdsa.PrivateKey) ([]string, error) {
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
	}{
		{"wit.jwt", []byte(token + "\n")},
		{"wit-key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})},
	} {
		path := filepath.Join(dir, f.name)
		if err := write(path, f.data, 0o600); err != nil {
			if errors.Is(err, fs.ErrExist) {
				return nil, withHint(fmt.Errorf("writing %q: it exists", path), "--force overwrites it, --write DIR writes elsewhere")
			}
			return nil, fmt.Errorf("writing %q: %w", path, err)
		}
		names = append(names, path)
	}
	return names, nil
}
