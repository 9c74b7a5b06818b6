package cli

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
)

// An appended is an authority of another server, as it is printed.
type appended struct {
	Type       string `json:"type"`
	ID         string `json:"id"`
	ExpiresAt  string `json:"expires_at,omitempty"`
	Tainted    bool   `json:"tainted,omitempty"`
	Source     string `json:"source"`
	AppendedAt string `json:"appended_at"`

	expires time.Time
	wire    *adminv1.AppendedAuthority
}

// appendedAuthorities asks for the authorities that were appended to the CA's bundle.
func appendedAuthorities(ctx context.Context, c *caConn) ([]appended, error) {
	answer, err := adminv1.NewAdminClient(c).ListAppendedAuthorities(ctx, &adminv1.ListAppendedAuthoritiesRequest{})
	if err != nil {
		return nil, caError("asking which authorities were appended", c, err)
	}
	var out []appended
	for _, x := range answer.GetAuthorities() {
		a := appended{Type: "jwt", ID: x.GetAuthorityId(), Tainted: x.GetTainted(), Source: x.GetSource(), wire: x}
		if x.GetAppendedAt() != nil { // keys that downstream CAs publish have none
			a.AppendedAt = stamp(x.GetAppendedAt().AsTime())
		}
		if x.GetType() == adminv1.AuthorityType_AUTHORITY_TYPE_X509 {
			a.Type = "x509"
		}
		if x.GetExpiresAt() != nil {
			a.expires = x.GetExpiresAt().AsTime()
			a.ExpiresAt = stamp(a.expires)
		}
		out = append(out, a)
	}
	return out, nil
}

func (a *app) bundleAppendedCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "appended",
		Short:   "List the authorities of other servers that were appended to the bundle",
		Example: "  signet bundle appended",
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			all, err := appendedAuthorities(ctx, c)
			if err != nil {
				return err
			}
			now := a.now()
			return list(a, *output, "no authority of another server was appended", []column[appended]{
				{name: "TYPE", value: func(x appended) string { return x.Type }},
				{name: "AUTHORITY", value: func(x appended) string { return x.ID }},
				{name: "VALID UNTIL", value: func(x appended) string { return x.ExpiresAt }},
				{name: "", value: func(x appended) string {
					if x.expires.IsZero() {
						return ""
					}
					return left(x.expires, now)
				}},
				{name: "STATE", value: func(x appended) string { return taintState(authority{Tainted: x.Tainted}) }},
				{name: "APPENDED BY", value: func(x appended) string { return x.Source }},
				{name: "AT", wide: true, value: func(x appended) string { return x.AppendedAt }},
			}, all)
		})
	}
	return a.reachesCA(cmd)
}

func (a *app) bundleRemoveCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "remove AUTHORITY...|--all",
		Short: "Take authorities that were appended out of the bundle",
		Long: `Take authorities of other servers, which 'signet bundle append' added, out of the bundle of this trust domain. Within moments nobody who gets
the bundle from this CA takes anything that they signed. JWT keys that downstream CAs published are removed by name only. The CA's own authorities cannot be removed this way.`,
		Example: `  signet bundle remove --all
  signet bundle remove 7c1d0f0e5b7a4f5e9a4b`,
		Args: cobra.ArbitraryArgs,
	}
	cmd.Flags().BoolVar(&all, "all", false, "all that were appended")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if all == (len(args) > 0) {
			return &usageError{err: fmt.Errorf("name the authorities, or give --all"), hint: "'signet bundle appended' lists them"}
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			there, err := appendedAuthorities(ctx, c)
			if err != nil {
				return err
			}
			for _, id := range args {
				if !slices.ContainsFunc(there, func(x appended) bool { return x.ID == id }) {
					return withHint(fmt.Errorf("no authority %q was appended", id), "'signet bundle appended' lists those that were")
				}
			}
			gone := 0
			done := map[string]bool{} // several certificates can have one key, and go together
			for _, x := range there {
				// Keys of downstream CAs were not appended by an operator: --all would break who needs them.
				chosen := slices.Contains(args, x.ID) || all && x.wire.GetAppendedAt() != nil
				if key := x.Type + " " + x.ID; !chosen || done[key] {
					continue
				} else {
					done[key] = true
				}
				if _, err := adminv1.NewAdminClient(c).RevokeAppendedAuthority(ctx, &adminv1.RevokeAppendedAuthorityRequest{Type: x.wire.GetType(), AuthorityId: x.ID}); err != nil {
					return caError(fmt.Sprintf("removing the %s authority %s", x.Type, x.ID), c, err)
				}
				fmt.Fprintf(a.stdout, "removed %s authority %s\n", x.Type, escape(x.ID))
				gone++
			}
			if gone == 0 {
				a.note("no authority of another server was appended")
			}
			return nil
		})
	}
	return a.reachesCA(cmd)
}
