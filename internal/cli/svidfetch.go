package cli

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-id/signet/internal/svidfiles"
)

// A fetched is an X509-SVID of the caller as it is printed.
type fetched struct {
	SPIFFEID  string   `json:"spiffe_id"`
	Hint      string   `json:"hint,omitempty"`
	NotBefore string   `json:"not_before"`
	NotAfter  string   `json:"not_after"`
	Key       string   `json:"key"`
	DNSNames  []string `json:"dns_names,omitempty"`
	Files     []string `json:"files,omitempty"`

	notAfter time.Time
}

func (a *app) fetchX509Command() *cobra.Command {
	var f fileFlags
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "x509",
		Short: "Fetch the X509-SVIDs of this process",
		Long: `Fetch the X509-SVIDs that the agent gives to this process, and the bundles that go with them. With --write they become
files: svid.pem, key.pem (mode 0600) and bundle.pem for the first, 1.svid.pem and so on for further ones, and
federated.TRUST-DOMAIN.pem for each trust domain that is federated with. With --watch the files follow every renewal, and the
program that reads them is told by --exec or --signal. Files change as one set.`,
		Example: `  signet svid fetch x509
  signet svid fetch x509 --write /run/web --watch
  signet svid fetch x509 --write /run/nginx-svid --watch --group www-data --mode 0640 --exec 'nginx -s reload'
  signet svid fetch x509 --write /run/haproxy-svid --watch --combined haproxy.pem --signal USR2 --pid-file /run/haproxy.pid`,
	}
	output := outputFlag(cmd)
	fs := cmd.Flags()
	f.add(fs)
	fs.StringVar(&f.dir, "write", "", "directory to write the SVIDs to")
	fs.StringVar(&f.layout.SVID, "svid-file", "", "name of the file with the certificates (default svid.pem)")
	fs.StringVar(&f.layout.Key, "key-file", "", "name of the file with the key (default key.pem)")
	fs.StringVar(&f.layout.Bundle, "bundle-file", "", "name of the file with the bundle (default bundle.pem)")
	fs.StringVar(&f.layout.Combined, "combined", "", "also write certificates and key into one file of this name")
	fs.StringArrayVar(&f.audiences, "audience", nil, "with --write: also a JWT-SVID for this audience, in AUDIENCE.jwt (repeatable)")
	fs.DurationVar(&timeout, "timeout", defaultTimeout, "how long to wait for the agent (without --watch)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		config, done, err := f.config(a)
		if err != nil {
			return err
		}
		defer done()
		config.X509 = true
		config.OnState = func(s svidfiles.State) error {
			return a.printX509(*output, config.Layout, f.dir, s.X509)
		}
		if f.watch {
			return a.keep(cmd.Context(), config, "X509-SVIDs")
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
		defer cancel()
		return workloadError("fetching X509-SVIDs", svidfiles.NewKeeper(config).Once(ctx))
	}
	return cmd
}

func (a *app) printX509(f format, layout svidfiles.Layout, dir string, x *workloadapi.X509Context) error {
	items := make([]fetched, len(x.SVIDs))
	for i, s := range x.SVIDs {
		leaf := s.Certificates[0]
		items[i] = fetched{SPIFFEID: s.ID.String(), Hint: s.Hint, NotBefore: stamp(leaf.NotBefore), NotAfter: stamp(leaf.NotAfter), Key: keyName(leaf.PublicKey),
			DNSNames: leaf.DNSNames, notAfter: leaf.NotAfter}
		if dir == "" {
			continue
		}
		for _, name := range layout.Names(x, i) {
			items[i].Files = append(items[i].Files, filepath.Join(dir, name))
		}
	}
	now := a.now()
	return list(a, f, "", []column[fetched]{
		{name: "SPIFFE ID", value: func(s fetched) string { return s.SPIFFEID }},
		{name: "VALID UNTIL", value: func(s fetched) string { return s.NotAfter }},
		{name: "", value: func(s fetched) string { return left(s.notAfter, now) }},
		{name: "HINT", value: func(s fetched) string { return s.Hint }},
		{name: "KEY", wide: true, value: func(s fetched) string { return s.Key }},
		{name: "DNS NAMES", wide: true, value: func(s fetched) string { return strings.Join(s.DNSNames, " ") }},
		{name: "FILES", wide: dir == "", value: func(s fetched) string { return strings.Join(s.Files, " ") }},
	}, items)
}

func (a *app) fetchJWTCommand() *cobra.Command {
	var f fileFlags
	var id string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "jwt",
		Short: "Fetch a JWT-SVID of this process",
		Long: `Fetch a JWT-SVID that the agent gives to this process for the audience. The token is not shown; --write FILE writes it with
mode 0600, and --write - prints it. With --watch, --write names a directory: it gets one token for each --audience, which is
replaced at half of its life, and the program that reads it is told by --exec or --signal.`,
		Example: `  signet svid fetch jwt --audience reports --write token
  curl -H "Authorization: Bearer $(signet svid fetch jwt --audience reports --write -)" https://reports.internal/
  signet svid fetch jwt --audience reports --audience billing --write /run/web-tokens --watch`,
	}
	fs := cmd.Flags()
	f.add(fs)
	fs.StringArrayVar(&f.audiences, "audience", nil, "who shall accept the token (repeatable, but one is best)")
	fs.StringVar(&id, "id", "", "which of the caller's IDs (default: its first)")
	fs.StringVar(&f.dir, "write", "", "file for the token, - is stdout; with --watch the directory for tokens")
	fs.DurationVar(&timeout, "timeout", defaultTimeout, "how long to wait for the agent (without --watch)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if len(f.audiences) == 0 {
			return &usageError{err: fmt.Errorf("--audience is missing: who shall accept the token"), hint: example(cmd)}
		}
		params := jwtsvid.Params{Audience: f.audiences[0], ExtraAudiences: f.audiences[1:]}
		if id != "" {
			subject, err := fullID("--id", id)
			if err != nil {
				return err
			}
			params.Subject = subject
		}
		if f.watch {
			config, done, err := f.config(a)
			if err != nil {
				return err
			}
			defer done()
			config.ID = params.Subject
			config.OnState = func(s svidfiles.State) error {
				for _, audience := range slices.Sorted(maps.Keys(s.Tokens)) {
					t := s.Tokens[audience]
					fmt.Fprintf(a.stdout, "%s\naudience %s\nvalid until %s (%s)\nwrote %s\n", t.ID, escape(audience), stamp(t.Expiry), left(t.Expiry, a.now()),
						escape(filepath.Join(f.dir, config.Layout.Tokens[audience])))
				}
				return nil
			}
			return a.keep(cmd.Context(), config, "JWT-SVIDs")
		}
		if err := f.onlyWatching(); err != nil {
			return err
		}
		options, err := endpointOptions(f.endpoint)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
		defer cancel()
		svid, err := workloadapi.FetchJWTSVID(ctx, params, options...)
		if err != nil {
			return workloadError("fetching a JWT-SVID", err)
		}
		if f.dir != "" {
			return a.writeToken(f.dir, svid.ID.String(), svid.Marshal(), svid.Expiry)
		}
		fmt.Fprintf(a.stdout, "%s\naudience %s\nvalid until %s (%s)\n", svid.ID, escape(strings.Join(svid.Audience, " ")), stamp(svid.Expiry), left(svid.Expiry, a.now()))
		a.note("the token is not shown; --write FILE writes it, --write - prints it")
		return nil
	}
	return cmd
}
