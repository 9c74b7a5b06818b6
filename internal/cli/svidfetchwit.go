package cli

import (
	"context"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"

	"github.com/signet-id/signet/internal/svidfiles"
)

// A fetchedWIT is a WIT-SVID of the caller as it is printed.
type fetchedWIT struct {
	SPIFFEID string   `json:"spiffe_id"`
	Hint     string   `json:"hint,omitempty"`
	NotAfter string   `json:"not_after"`
	KeyID    string   `json:"key_id"`
	Files    []string `json:"files,omitempty"`

	notAfter time.Time
}

func (a *app) fetchWITCommand() *cobra.Command {
	var f fileFlags
	var id string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "wit",
		Short: "Fetch the WIT-SVIDs of this process, and their keys",
		Long: `Fetch the WIT-SVIDs that the agent gives to this process. A WIT-SVID is a token that is of use only together with proofs of
its key. Neither is shown. With --write they become files: wit.jwt and wit-key.jwk (a private JWK), both with mode 0600, for the
first, 1.wit.jwt and so on for further ones. With --watch the files follow every renewal, and the program that reads them is told
by --exec or --signal. Files change as one set.

The standard calls WIT-SVIDs incubating: they are there only when wit.enabled is true in the configurations of the CA and of the
agent.`,
		Example: `  signet svid fetch wit
  signet svid fetch wit --id spiffe://example.org/web --write /run/web-wit --watch --signal HUP --pid-file /run/web.pid`,
	}
	output := outputFlag(cmd)
	fs := cmd.Flags()
	f.add(fs)
	fs.StringVar(&f.dir, "write", "", "directory to write the tokens and keys to")
	fs.StringVar(&id, "id", "", "only those of this one of the caller's IDs")
	fs.DurationVar(&timeout, "timeout", defaultTimeout, "how long to wait for the agent (without --watch)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		config, done, err := f.config(a)
		if err != nil {
			return err
		}
		defer done()
		config.WIT = true
		if id != "" {
			if config.ID, err = fullID("--id", id); err != nil {
				return err
			}
		}
		config.OnState = func(s svidfiles.State) error { return a.printWIT(*output, f.dir, s.WIT) }
		if f.watch {
			return a.keep(cmd.Context(), config, "WIT-SVIDs")
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
		defer cancel()
		return workloadError("fetching WIT-SVIDs", svidfiles.NewKeeper(config).Once(ctx))
	}
	return cmd
}

func (a *app) printWIT(f format, dir string, svids []*witsvid.SVID) error {
	items := make([]fetchedWIT, len(svids))
	for i, s := range svids {
		items[i] = fetchedWIT{SPIFFEID: s.ID.String(), Hint: s.Hint, NotAfter: stamp(s.Expiry), KeyID: s.KeyID, notAfter: s.Expiry}
		if dir != "" {
			token, key := svidfiles.WITNames(i)
			items[i].Files = []string{filepath.Join(dir, token), filepath.Join(dir, key)}
		}
	}
	now := a.now()
	return list(a, f, "", []column[fetchedWIT]{
		{name: "SPIFFE ID", value: func(s fetchedWIT) string { return s.SPIFFEID }},
		{name: "VALID UNTIL", value: func(s fetchedWIT) string { return s.NotAfter }},
		{name: "", value: func(s fetchedWIT) string { return left(s.notAfter, now) }},
		{name: "HINT", value: func(s fetchedWIT) string { return s.Hint }},
		{name: "KEY ID", wide: true, value: func(s fetchedWIT) string { return s.KeyID }},
		{name: "FILES", wide: dir == "", value: func(s fetchedWIT) string { return strings.Join(s.Files, " ") }},
	}, items)
}
