package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const entryPage = 500

func (a *app) entryCommand() *cobra.Command {
	return a.noun("entry", "Registration entries: who gets which SPIFFE ID",
		`A registration entry says that a process with these selectors, on the node or group of nodes that is its parent, gets
this SPIFFE ID. 'signet apply' keeps entries as documents under version control; these commands change single ones.`,
		a.entryCreateCommand(), a.entryListCommand(), a.entryPodsCommand(), a.entryShowCommand(), a.entryUpdateCommand(), a.entryDeleteCommand(), a.entryCountCommand(),
		a.entryExportCommand(), a.entryImportCommand())
}

// An entry is a registration entry as it is printed.
type entry struct {
	ID            string   `json:"id"`
	SPIFFEID      string   `json:"spiffe_id"`
	ParentID      string   `json:"parent_id"`
	Selectors     []string `json:"selectors"`
	X509TTL       string   `json:"x509_ttl,omitempty"`
	JWTTTL        string   `json:"jwt_ttl,omitempty"`
	DNSNames      []string `json:"dns_names,omitempty"`
	FederatesWith []string `json:"federates_with,omitempty"`
	Hint          string   `json:"hint,omitempty"`
	Admin         bool     `json:"admin,omitempty"`
	Downstream    bool     `json:"downstream,omitempty"`
	ExpiresAt     string   `json:"expires_at,omitempty"`
	CreatedAt     string   `json:"created_at,omitempty"`
	Revision      int64    `json:"revision"`
}

func entryOf(e *types.Entry) entry {
	return entry{
		ID: e.GetId(), SPIFFEID: idString(e.GetSpiffeId()), ParentID: idString(e.GetParentId()), Selectors: selectorStrings(e.GetSelectors()),
		X509TTL: ttlString(e.GetX509SvidTtl()), JWTTTL: ttlString(e.GetJwtSvidTtl()), DNSNames: e.GetDnsNames(), FederatesWith: e.GetFederatesWith(),
		Hint: e.GetHint(), Admin: e.GetAdmin(), Downstream: e.GetDownstream(), Revision: e.GetRevisionNumber(),
		ExpiresAt: stamp(unixTime(e.GetExpiresAt())), CreatedAt: stamp(unixTime(e.GetCreatedAt())),
	}
}

func entryColumns() []column[entry] {
	return []column[entry]{
		{name: "ENTRY ID", value: func(e entry) string { return e.ID }},
		{name: "SPIFFE ID", value: func(e entry) string { return e.SPIFFEID }},
		{name: "PARENT ID", value: func(e entry) string { return e.ParentID }},
		{name: "SELECTORS", value: func(e entry) string { return strings.Join(e.Selectors, " ") }},
		{name: "X509 TTL", wide: true, value: func(e entry) string { return e.X509TTL }},
		{name: "JWT TTL", wide: true, value: func(e entry) string { return e.JWTTTL }},
		{name: "DNS NAMES", wide: true, value: func(e entry) string { return strings.Join(e.DNSNames, " ") }},
		{name: "FEDERATES WITH", wide: true, value: func(e entry) string { return strings.Join(e.FederatesWith, " ") }},
		{name: "HINT", wide: true, value: func(e entry) string { return e.Hint }},
		{name: "RIGHTS", wide: true, value: entryRights},
		{name: "REVISION", wide: true, value: func(e entry) string { return fmt.Sprint(e.Revision) }},
	}
}

func entryRights(e entry) string {
	var rights []string
	if e.Admin {
		rights = append(rights, "admin")
	}
	if e.Downstream {
		rights = append(rights, "downstream")
	}
	return strings.Join(rights, " ")
}

func (a *app) showEntry(f format, e *types.Entry) error {
	v := entryOf(e)
	fields := []field{
		{name: "Entry ID", value: v.ID},
		{name: "SPIFFE ID", value: v.SPIFFEID},
		{name: "Parent ID", value: v.ParentID},
	}
	fields = append(fields, manyFields("Selector", v.Selectors)...)
	fields = append(fields, field{name: "X509-SVID TTL", value: orDefault(v.X509TTL)}, field{name: "JWT-SVID TTL", value: orDefault(v.JWTTTL)})
	fields = append(fields, manyFields("DNS name", v.DNSNames)...)
	fields = append(fields, manyFields("Federates with", v.FederatesWith)...)
	fields = append(fields,
		field{name: "Hint", value: v.Hint}, field{name: "Rights", value: entryRights(v)}, field{name: "Expires", value: v.ExpiresAt},
		field{name: "Created", value: v.CreatedAt}, field{name: "Revision", value: fmt.Sprint(v.Revision)})
	return a.show(f, v, fields)
}

func orDefault(ttl string) string {
	if ttl == "" {
		return "default of the CA"
	}
	return ttl
}

func ttlString(seconds int32) string {
	if seconds == 0 {
		return ""
	}
	return exactTTL(int64(seconds))
}

// entryFilter are the flags of list and count.
type entryFilter struct {
	spiffeID, parentID, match, hint string
	selectors, federatesWith        []string
	downstream                      bool
}

func (f *entryFilter) flags(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&f.spiffeID, "spiffe-id", "", "only entries that give this ID")
	fs.StringVar(&f.parentID, "parent-id", "", "only entries under this parent")
	fs.StringArrayVar(&f.selectors, "selector", nil, "only entries with these selectors, TYPE:VALUE (repeatable; see --match)")
	fs.StringArrayVar(&f.federatesWith, "federates-with", nil, "only entries that federate with these trust domains (repeatable; see --match)")
	fs.StringVar(&f.match, "match", "superset", "how --selector and --federates-with match an entry's: exact, superset (it has all of them), subset (it has no other), any")
	fs.StringVar(&f.hint, "hint", "", "only entries with this hint")
	fs.BoolVar(&f.downstream, "downstream", false, "only entries with the right of a downstream CA")
}

func (f *entryFilter) request(ctx context.Context, cmd *cobra.Command, c *caConn) (*entryv1.ListEntriesRequest_Filter, error) {
	out := &entryv1.ListEntriesRequest_Filter{}
	match, ok := map[string]int32{"exact": 0, "subset": 1, "superset": 2, "any": 3}[f.match]
	if !ok {
		return nil, usagef("--match %q is not one of exact, superset, subset, any", f.match)
	}
	var err error
	if f.spiffeID != "" {
		if out.BySpiffeId, err = c.wireID(ctx, "--spiffe-id", f.spiffeID); err != nil {
			return nil, err
		}
	}
	if f.parentID != "" {
		if out.ByParentId, err = c.wireID(ctx, "--parent-id", f.parentID); err != nil {
			return nil, err
		}
	}
	if len(f.selectors) > 0 {
		selectors, err := wireSelectors(f.selectors)
		if err != nil {
			return nil, err
		}
		out.BySelectors = &types.SelectorMatch{Selectors: selectors, Match: types.SelectorMatch_MatchBehavior(match)}
	}
	if len(f.federatesWith) > 0 {
		names, err := trustDomains("--federates-with", f.federatesWith)
		if err != nil {
			return nil, err
		}
		out.ByFederatesWith = &types.FederatesWithMatch{TrustDomains: names, Match: types.FederatesWithMatch_MatchBehavior(match)}
	}
	if cmd.Flags().Changed("hint") {
		out.ByHint = wrapperspb.String(f.hint)
	}
	if cmd.Flags().Changed("downstream") {
		out.ByDownstream = wrapperspb.Bool(f.downstream)
	}
	return out, nil
}

func (a *app) entryListCommand() *cobra.Command {
	var filter entryFilter
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List registration entries",
		Long: `List registration entries, by Identities and others. What the CA gives pods by templated Identities is not registered: 'signet entry pods'
lists that.`,
		Example: `  signet entry list
  signet entry list --selector unix:user:web -o wide
  signet entry list --parent-id /spire/agent/join_token/0c5e -o json`,
	}
	output := outputFlag(cmd)
	filter.flags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			by, err := filter.request(ctx, cmd, c)
			if err != nil {
				return err
			}
			l := &lister[entry]{app: a, format: *output, columns: entryColumns(), none: "no registration entry matches"}
			client := entryv1.NewEntryClient(c)
			for token := ""; ; {
				page, err := client.ListEntries(ctx, &entryv1.ListEntriesRequest{Filter: by, PageSize: entryPage, PageToken: token})
				if err != nil {
					return caError("listing registration entries", c, err)
				}
				items := make([]entry, len(page.GetEntries()))
				for i, e := range page.GetEntries() {
					items[i] = entryOf(e)
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

func (a *app) entryCountCommand() *cobra.Command {
	var filter entryFilter
	cmd := &cobra.Command{
		Use:     "count",
		Short:   "Count registration entries",
		Example: "  signet entry count --selector unix:user:web",
	}
	filter.flags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			by, err := filter.request(ctx, cmd, c)
			if err != nil {
				return err
			}
			answer, err := entryv1.NewEntryClient(c).CountEntries(ctx, &entryv1.CountEntriesRequest{Filter: &entryv1.CountEntriesRequest_Filter{
				BySpiffeId: by.BySpiffeId, ByParentId: by.ByParentId, BySelectors: by.BySelectors, ByFederatesWith: by.ByFederatesWith,
				ByHint: by.ByHint, ByDownstream: by.ByDownstream,
			}})
			if err != nil {
				return caError("counting registration entries", c, err)
			}
			_, err = fmt.Fprintln(a.stdout, answer.GetCount())
			return err
		})
	}
	return a.reachesCA(cmd)
}

func (a *app) entryShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "show ENTRY-ID",
		Short:   "Show one registration entry",
		Example: "  signet entry show 6b1d2c0e-9f4a-4b7e-8d9b-0a3a4f0f7c11",
		Args:    exactArgs("ENTRY-ID"),
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			e, err := entryv1.NewEntryClient(c).GetEntry(ctx, &entryv1.GetEntryRequest{Id: args[0]})
			if err != nil {
				return entryHint(caError(fmt.Sprintf("showing registration entry %q", args[0]), c, err))
			}
			return a.showEntry(*output, e)
		})
	}
	return a.reachesCA(cmd)
}
