package cli

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/internal/durable"
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
	var endpoint, dir string
	var watch bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "x509",
		Short: "Fetch the X509-SVIDs of this process",
		Long: `Fetch the X509-SVIDs that the agent gives to this process, and the bundles that go with them. With --write they become
files: svid.pem, key.pem (mode 0600) and bundle.pem for the first, 1.svid.pem and so on for further ones, and
federated.TRUST-DOMAIN.pem for each trust domain that is federated with. With --watch the files follow every renewal.`,
		Example: `  signet svid fetch x509
  signet svid fetch x509 --write /run/web --watch`,
	}
	output := outputFlag(cmd)
	fs := cmd.Flags()
	fs.StringVar(&endpoint, "endpoint", "", endpointFlagHelp)
	fs.StringVar(&dir, "write", "", "directory to write the SVIDs to")
	fs.BoolVar(&watch, "watch", false, "go on with each renewal until stopped")
	fs.DurationVar(&timeout, "timeout", defaultTimeout, "how long to wait for the agent (without --watch)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		options, err := endpointOptions(endpoint)
		if err != nil {
			return err
		}
		ctx := cmd.Context()
		if watch {
			w := &svidWatcher{app: a, format: *output, dir: dir}
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			w.stop = cancel
			err := workloadapi.WatchX509Context(ctx, w, options...)
			if w.failed != nil {
				return w.failed
			}
			return untilCanceled(ctx, workloadError("watching X509-SVIDs", err))
		}
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		x, err := workloadapi.FetchX509Context(ctx, options...)
		if err != nil {
			return workloadError("fetching X509-SVIDs", err)
		}
		return a.printX509(*output, dir, x)
	}
	return cmd
}

// A svidWatcher writes and prints each update. A failure to write ends the watch: files that no longer follow are
// worse than none.
type svidWatcher struct {
	app    *app
	format format
	dir    string
	stop   context.CancelFunc
	failed error // why writing ended the watch; set before stop is called
}

// OnX509ContextUpdate implements workloadapi.X509ContextWatcher.
func (w *svidWatcher) OnX509ContextUpdate(x *workloadapi.X509Context) {
	if w.failed = w.app.printX509(w.format, w.dir, x); w.failed != nil {
		w.stop()
	}
}

// OnX509ContextWatchError implements workloadapi.X509ContextWatcher. The client goes on trying, except where the
// Workload API forbids it.
func (w *svidWatcher) OnX509ContextWatchError(err error) {
	if c := status.Code(err); c != codes.Canceled {
		printError(w.app.stderr, isTerminal(w.app.stderr), workloadError("watching X509-SVIDs", err))
	}
}

func (a *app) printX509(f format, dir string, x *workloadapi.X509Context) error {
	items := make([]fetched, len(x.SVIDs))
	for i, s := range x.SVIDs {
		leaf := s.Certificates[0]
		items[i] = fetched{SPIFFEID: s.ID.String(), Hint: s.Hint, NotBefore: stamp(leaf.NotBefore), NotAfter: stamp(leaf.NotAfter), Key: keyName(leaf.PublicKey),
			DNSNames: leaf.DNSNames, notAfter: leaf.NotAfter}
		if dir == "" {
			continue
		}
		bundle, err := x.Bundles.GetX509BundleForTrustDomain(s.ID.TrustDomain())
		if err != nil {
			return fmt.Errorf("writing the X509-SVID %s: %w", s.ID, err)
		}
		prefix := ""
		if i > 0 {
			prefix = fmt.Sprintf("%d.", i)
		}
		if items[i].Files, err = writeX509(dir, prefix, true, s.Certificates, s.PrivateKey, bundle.X509Authorities()); err != nil {
			return err
		}
	}
	if dir != "" {
		own := x.DefaultSVID().ID.TrustDomain()
		for _, b := range x.Bundles.Bundles() {
			if b.TrustDomain() == own {
				continue
			}
			path := filepath.Join(dir, "federated."+b.TrustDomain().Name()+".pem")
			if err := durable.WriteFile(path, pemOf(b.X509Authorities()), 0o600); err != nil {
				return fmt.Errorf("writing %q: %w", path, err)
			}
			items[0].Files = append(items[0].Files, path)
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
	var endpoint, id, file string
	var audience []string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "jwt",
		Short: "Fetch a JWT-SVID of this process",
		Long: `Fetch a JWT-SVID that the agent gives to this process for the audience. The token is not shown; --write FILE writes it with
mode 0600, and --write - prints it.`,
		Example: `  signet svid fetch jwt --audience reports --write token
  curl -H "Authorization: Bearer $(signet svid fetch jwt --audience reports --write -)" https://reports.internal/`,
	}
	fs := cmd.Flags()
	fs.StringVar(&endpoint, "endpoint", "", endpointFlagHelp)
	fs.StringArrayVar(&audience, "audience", nil, "who shall accept the token (repeatable, but one is best)")
	fs.StringVar(&id, "id", "", "which of the caller's IDs (default: its first)")
	fs.StringVar(&file, "write", "", "file for the token; - is stdout")
	fs.DurationVar(&timeout, "timeout", defaultTimeout, "how long to wait for the agent")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if len(audience) == 0 {
			return &usageError{err: fmt.Errorf("--audience is missing: who shall accept the token"), hint: example(cmd)}
		}
		params := jwtsvid.Params{Audience: audience[0], ExtraAudiences: audience[1:]}
		if id != "" {
			subject, err := fullID("--id", id)
			if err != nil {
				return err
			}
			params.Subject = subject
		}
		options, err := endpointOptions(endpoint)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
		defer cancel()
		svid, err := workloadapi.FetchJWTSVID(ctx, params, options...)
		if err != nil {
			return workloadError("fetching a JWT-SVID", err)
		}
		if file != "" {
			return a.writeToken(file, svid.ID.String(), svid.Marshal(), svid.Expiry)
		}
		fmt.Fprintf(a.stdout, "%s\naudience %s\nvalid until %s (%s)\n", svid.ID, escape(strings.Join(svid.Audience, " ")), stamp(svid.Expiry), left(svid.Expiry, a.now()))
		a.note("the token is not shown; --write FILE writes it, --write - prints it")
		return nil
	}
	return cmd
}
