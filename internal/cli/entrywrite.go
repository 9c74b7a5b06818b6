package cli

import (
	"context"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/spf13/cobra"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/signet-id/signet/spiffe"
)

// entryFlags are the flags of create and update.
type entryFlags struct {
	id, spiffeID, parentID, hint       string
	selectors, dnsNames, federatesWith []string
	x509TTL, jwtTTL, expiresIn         time.Duration
	node, admin, downstream            bool
}

func (f *entryFlags) flags(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&f.spiffeID, "spiffe-id", "", "the ID that a matching process gets; /web is short for spiffe://TRUST-DOMAIN/web")
	fs.StringVar(&f.parentID, "parent-id", "", "the agent, or group of nodes, on which the process must run")
	fs.BoolVar(&f.node, "node", false, "a group of nodes: the parent is the CA itself, and the selectors are those of nodes")
	fs.StringArrayVar(&f.selectors, "selector", nil, "TYPE:VALUE that the process must have (repeatable; all must hold)")
	fs.DurationVar(&f.x509TTL, "x509-ttl", 0, "validity of its X509-SVIDs, such as 1h (0: the CA's default)")
	fs.DurationVar(&f.jwtTTL, "jwt-ttl", 0, "validity of its JWT-SVIDs, such as 5m (0: the CA's default)")
	fs.StringArrayVar(&f.dnsNames, "dns", nil, "DNS name in its X509-SVIDs (repeatable)")
	fs.StringArrayVar(&f.federatesWith, "federates-with", nil, "trust domain whose bundle it gets too (repeatable)")
	fs.StringVar(&f.hint, "hint", "", "what the ID is for, to tell several IDs of one process apart")
	fs.BoolVar(&f.admin, "admin", false, "the ID may use the CA's admin API")
	fs.BoolVar(&f.downstream, "downstream", false, "the ID may ask for a CA certificate for a CA below this one")
	fs.DurationVar(&f.expiresIn, "expires-in", 0, "remove the entry after this time, such as 72h (0: never)")
	exclusive(cmd, "parent-id", "node")
}

// entry builds the entry from the flags.
func (f *entryFlags) entry(ctx context.Context, c *caConn, now time.Time) (*types.Entry, error) {
	e := &types.Entry{Id: f.id, DnsNames: f.dnsNames, Hint: f.hint, Admin: f.admin, Downstream: f.downstream}
	var err error
	if e.Selectors, err = wireSelectors(f.selectors); err != nil {
		return nil, err
	}
	if e.X509SvidTtl, err = wireTTL("--x509-ttl", f.x509TTL); err != nil {
		return nil, err
	}
	if e.JwtSvidTtl, err = wireTTL("--jwt-ttl", f.jwtTTL); err != nil {
		return nil, err
	}
	if e.FederatesWith, err = trustDomains("--federates-with", f.federatesWith); err != nil {
		return nil, err
	}
	if f.expiresIn < 0 {
		return nil, usagef("--expires-in %s lies in the past", f.expiresIn)
	}
	if f.expiresIn > 0 {
		e.ExpiresAt = now.Add(f.expiresIn).Unix()
	}
	if f.spiffeID != "" {
		if e.SpiffeId, err = c.wireID(ctx, "--spiffe-id", f.spiffeID); err != nil {
			return nil, err
		}
	}
	if f.node {
		f.parentID = "/spire/server"
	}
	if f.parentID != "" {
		if e.ParentId, err = c.wireID(ctx, "--parent-id", f.parentID); err != nil {
			return nil, err
		}
	}
	return e, nil
}

func (a *app) entryCreateCommand() *cobra.Command {
	var f entryFlags
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Create a registration entry",
		Example: `  signet entry create --spiffe-id /web --parent-id /spire/agent/join_token/0c5e --selector unix:user:web
  signet entry create --node --spiffe-id /nodes/backend --selector node:group:backend
  signet entry create --spiffe-id /web --parent-id /nodes/backend --selector k8s:ns:prod --selector k8s:sa:web --dns web.internal`,
	}
	output := outputFlag(cmd)
	f.flags(cmd)
	cmd.Flags().StringVar(&f.id, "id", "", "ID of the entry itself (default: the CA chooses one)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		switch {
		case f.spiffeID == "":
			return &usageError{err: fmt.Errorf("--spiffe-id is missing"), hint: example(cmd)}
		case f.parentID == "" && !f.node:
			return &usageError{err: fmt.Errorf("--parent-id is missing: the agent or group of nodes on which the process runs"), hint: "'signet agent list' shows the agents"}
		case len(f.selectors) == 0:
			return &usageError{err: fmt.Errorf("--selector is missing: an entry without selectors would match every process"), hint: example(cmd)}
		}
		if err := f.checkOffline(); err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			e, err := f.entry(ctx, c, a.now())
			if err != nil {
				return err
			}
			doing := fmt.Sprintf("creating the registration entry for %s", idString(e.SpiffeId))
			answer, err := entryv1.NewEntryClient(c).BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
			if err != nil {
				return caError(doing, c, err)
			}
			if len(answer.GetResults()) != 1 {
				return fmt.Errorf("%s: the CA answered with %d results, want 1", doing, len(answer.GetResults()))
			}
			r := answer.GetResults()[0]
			if code := codes.Code(r.GetStatus().GetCode()); code != codes.OK {
				err := statusError(doing, c, code, r.GetStatus().GetMessage())
				if code == codes.AlreadyExists && r.GetEntry().GetId() != "" {
					return withHint(err, "it is entry %s: 'signet entry show %s'", r.GetEntry().GetId(), r.GetEntry().GetId())
				}
				return err
			}
			return a.showEntry(*output, r.GetEntry())
		})
	}
	return a.reachesCA(cmd)
}

// checkOffline finds what is wrong whatever the CA says, so that mistakes do not need one.
func (f *entryFlags) checkOffline() error {
	if _, err := wireSelectors(f.selectors); err != nil {
		return err
	}
	if _, err := trustDomains("--federates-with", f.federatesWith); err != nil {
		return err
	}
	for flag, s := range map[string]string{"--spiffe-id": f.spiffeID, "--parent-id": f.parentID} {
		if s == "" || strings.HasPrefix(s, "/") {
			continue
		}
		if _, err := fullID(flag, s); err != nil {
			return err
		}
	}
	return nil
}

func (a *app) entryUpdateCommand() *cobra.Command {
	var f entryFlags
	cmd := &cobra.Command{
		Use:   "update ENTRY-ID",
		Short: "Change fields of a registration entry",
		Long: `Change those fields of a registration entry that flags name; the others stay. A repeatable flag replaces the whole list,
and its empty value (--dns "") empties it.`,
		Example: `  signet entry update 6b1d2c0e-9f4a-4b7e-8d9b-0a3a4f0f7c11 --x509-ttl 30m
  signet entry update 6b1d2c0e-9f4a-4b7e-8d9b-0a3a4f0f7c11 --dns ""`,
		Args: exactArgs("ENTRY-ID"),
	}
	output := outputFlag(cmd)
	f.flags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		f.id = args[0]
		f.dnsNames, f.federatesWith = emptied(f.dnsNames), emptied(f.federatesWith)
		ch := cmd.Flags().Changed
		mask := &types.EntryMask{
			SpiffeId: ch("spiffe-id"), ParentId: ch("parent-id") || f.node, Selectors: ch("selector"), X509SvidTtl: ch("x509-ttl"), JwtSvidTtl: ch("jwt-ttl"),
			DnsNames: ch("dns"), FederatesWith: ch("federates-with"), Hint: ch("hint"), Admin: ch("admin"), Downstream: ch("downstream"), ExpiresAt: ch("expires-in"),
		}
		if cmd.Flags().NFlag() == 0 || (!mask.SpiffeId && !mask.ParentId && !mask.Selectors && !mask.X509SvidTtl && !mask.JwtSvidTtl && !mask.DnsNames &&
			!mask.FederatesWith && !mask.Hint && !mask.Admin && !mask.Downstream && !mask.ExpiresAt) {
			return &usageError{err: fmt.Errorf("nothing to change: no flag names a field"), hint: example(cmd)}
		}
		if err := f.checkOffline(); err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			e, err := f.entry(ctx, c, a.now())
			if err != nil {
				return err
			}
			doing := fmt.Sprintf("changing registration entry %q", f.id)
			answer, err := entryv1.NewEntryClient(c).BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}, InputMask: mask})
			if err != nil {
				return caError(doing, c, err)
			}
			if len(answer.GetResults()) != 1 {
				return fmt.Errorf("%s: the CA answered with %d results, want 1", doing, len(answer.GetResults()))
			}
			r := answer.GetResults()[0]
			if code := codes.Code(r.GetStatus().GetCode()); code != codes.OK {
				return entryHint(statusError(doing, c, code, r.GetStatus().GetMessage()))
			}
			return a.showEntry(*output, r.GetEntry())
		})
	}
	return a.reachesCA(cmd)
}

// emptied lets --dns "" stand for the empty list.
func emptied(values []string) []string {
	if len(values) == 1 && values[0] == "" {
		return nil
	}
	return values
}

func (a *app) entryDeleteCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "delete ENTRY-ID...",
		Short:   "Delete registration entries",
		Example: "  signet entry delete 6b1d2c0e-9f4a-4b7e-8d9b-0a3a4f0f7c11",
		Args:    someArgs("ENTRY-ID"),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			failed := 0
			var last error
			for len(args) > 0 {
				batch := args[:min(len(args), entryPage)]
				args = args[len(batch):]
				answer, err := entryv1.NewEntryClient(c).BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: batch})
				if err != nil {
					return caError("deleting registration entries", c, err)
				}
				for _, r := range answer.GetResults() {
					if code := codes.Code(r.GetStatus().GetCode()); code != codes.OK {
						if failed++; last != nil {
							printError(a.stderr, isTerminal(a.stderr), last)
						}
						last = entryHint(statusError(fmt.Sprintf("deleting registration entry %q", r.GetId()), c, code, r.GetStatus().GetMessage()))
						continue
					}
					fmt.Fprintf(a.stdout, "deleted %s\n", escape(r.GetId()))
				}
			}
			return last
		})
	}
	return a.reachesCA(cmd)
}

func entryHint(err error) error {
	if isCode(err, codes.NotFound) {
		return withHint(err, "'signet entry list' shows the entries there are")
	}
	return err
}

func wireSelectors(in []string) ([]*types.Selector, error) {
	var out []*types.Selector
	for _, s := range in {
		sel, err := spiffe.ParseSelector(s)
		if err != nil {
			return nil, usagef("--selector: %w", err)
		}
		out = append(out, &types.Selector{Type: sel.Type, Value: sel.Value})
	}
	return out, nil
}

func selectorStrings(in []*types.Selector) []string {
	out := make([]string, len(in))
	for i, s := range in {
		out[i] = s.GetType() + ":" + s.GetValue()
	}
	return out
}

func trustDomains(flag string, in []string) ([]string, error) {
	var out []string
	for _, s := range in {
		td, err := spiffe.ParseTrustDomain(s)
		if err != nil {
			return nil, usagef("%s: %w", flag, err)
		}
		out = append(out, td.Name())
	}
	return out, nil
}

// wireTTL converts to whole seconds.
func wireTTL(flag string, d time.Duration) (int32, error) {
	switch {
	case d < 0:
		return 0, usagef("%s %s is negative", flag, d)
	case d > 0 && d < time.Second, d%time.Second != 0:
		return 0, usagef("%s %s is not a whole number of seconds", flag, d)
	case d/time.Second > math.MaxInt32:
		return 0, usagef("%s %s is more than 68 years", flag, d)
	}
	return int32(d / time.Second), nil
}

// exactTTL writes a TTL exactly: 1h, 1h30m, 90m1s never lose a second.
func exactTTL(s int64) string {
	text := (time.Duration(s) * time.Second).String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}
