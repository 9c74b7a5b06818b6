package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
)

func (a *app) explainCommand() *cobra.Command {
	return a.noun("explain", "Say why something is as it is", "", a.explainTTLCommand())
}

type ttlExplanation struct {
	TTL       string `json:"ttl"`
	DecidedBy string `json:"decided_by"`
	EntryTTL  string `json:"entry_ttl,omitempty"`
	Default   string `json:"default_ttl"`
	Maximum   string `json:"maximum"`
	Authority string `json:"authority_id"`
	NotAfter  string `json:"authority_not_after"`

	text string
}

func ttlOf(m *adminv1.TTLExplanation) ttlExplanation {
	seconds := func(s int64) string {
		if s == 0 {
			return ""
		}
		return (time.Duration(s) * time.Second).String()
	}
	return ttlExplanation{TTL: seconds(m.GetTtl()), DecidedBy: m.GetDecidedBy(), EntryTTL: seconds(m.GetEntryTtl()), Default: seconds(m.GetDefaultTtl()),
		Maximum: seconds(m.GetMaximum()), Authority: m.GetAuthorityId(), NotAfter: stampOf(m.GetAuthorityNotAfter()), text: m.GetText()}
}

func (a *app) explainTTLCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ttl ENTRY",
		Short: "Say what decides how long an entry's SVIDs are valid",
		Long: `Say how long an X509-SVID and a JWT-SVID of a registration entry would be valid if they were issued now, and what decides it: the
entry, the CA's default, the CA's maximum, or the end of the authority that signs. The entry of an Identity is identity.NAME.`,
		Example: `  signet explain ttl identity.web`,
		Args:    exactArgs("ENTRY"),
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			answer, err := adminv1.NewAdminClient(c).ExplainTTL(ctx, &adminv1.ExplainTTLRequest{EntryId: args[0]})
			if err != nil {
				return caError(fmt.Sprintf("explaining the TTL of entry %s", args[0]), c, err)
			}
			shown := struct {
				Entry    string         `json:"entry_id"`
				SPIFFEID string         `json:"spiffe_id"`
				X509     ttlExplanation `json:"x509"`
				JWT      ttlExplanation `json:"jwt"`
			}{answer.GetEntryId(), answer.GetSpiffeId(), ttlOf(answer.GetX509()), ttlOf(answer.GetJwt())}
			return a.show(*output, shown, []field{
				{name: "Entry", value: shown.Entry},
				{name: "SPIFFE ID", value: shown.SPIFFEID},
				{name: "X509-SVID", value: shown.X509.text},
				{name: "JWT-SVID", value: shown.JWT.text},
			})
		})
	}
	return a.reachesCA(cmd)
}
