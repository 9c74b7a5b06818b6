package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
)

const federationPage = 200

func (a *app) federationCommand() *cobra.Command {
	return a.noun("federation", "Federation: trust domains whose bundles the CA fetches", `Federation relationships: other trust domains whose bundles the CA fetches from their bundle endpoints and keeps up to date. A
relationship alone gives nobody anything: entries say with --federates-with which workloads get the bundle. A bundle that is brought
by hand needs no relationship: see 'signet bundle set'.`,
		a.federationCreateCommand(), a.federationListCommand(), a.federationShowCommand(), a.federationUpdateCommand(), a.federationRefreshCommand(), a.federationDeleteCommand())
}

// A federation is a relationship as it is printed.
type federation struct {
	TrustDomain string  `json:"trust_domain"`
	URL         string  `json:"bundle_endpoint_url"`
	Profile     string  `json:"bundle_endpoint_profile"`
	EndpointID  string  `json:"endpoint_spiffe_id,omitempty"`
	FetchedAt   string  `json:"fetched_at,omitempty"`
	SucceededAt string  `json:"succeeded_at,omitempty"`
	NextAt      string  `json:"next_at,omitempty"`
	Error       string  `json:"error,omitempty"`
	Bundle      *bundle `json:"bundle,omitempty"`

	fetched, succeeded, next time.Time
}

func federationOf(f *types.FederationRelationship, st *adminv1.FederationStatus) (federation, error) {
	out := federation{TrustDomain: f.GetTrustDomain(), URL: f.GetBundleEndpointUrl(), Profile: "https_web"}
	if p := f.GetHttpsSpiffe(); p != nil {
		out.Profile, out.EndpointID = "https_spiffe", p.GetEndpointSpiffeId()
	}
	if st != nil {
		out.Error = st.GetError()
		for _, x := range []struct {
			from interface{ AsTime() time.Time }
			set  bool
			at   *time.Time
			text *string
		}{{st.FetchedAt, st.FetchedAt != nil, &out.fetched, &out.FetchedAt}, {st.SucceededAt, st.SucceededAt != nil, &out.succeeded, &out.SucceededAt}, {st.NextAt, st.NextAt != nil, &out.next, &out.NextAt}} {
			if x.set {
				*x.at = x.from.AsTime()
				*x.text = stamp(*x.at)
			}
		}
	}
	if f.GetTrustDomainBundle() != nil {
		b, err := bundleOf(f.GetTrustDomainBundle())
		if err != nil {
			return out, err
		}
		out.Bundle = &b
	}
	return out, nil
}

func (f federation) state() string {
	switch {
	case f.Error != "":
		return "failing"
	case f.Bundle == nil:
		return "no bundle yet"
	}
	return "good"
}

func (f federation) stateColor() string {
	switch f.state() {
	case "failing":
		return red
	case "good":
		return green
	}
	return yellow
}

// federationStatuses asks how the bundles were last fetched. A SPIRE server does not know; then nothing is shown.
func federationStatuses(ctx context.Context, c *caConn) (map[string]*adminv1.FederationStatus, error) {
	answer, err := adminv1.NewAdminClient(c).ListFederationStatus(ctx, &adminv1.ListFederationStatusRequest{})
	if err != nil {
		if err = caError("asking how the bundles were fetched", c, err); isCode(err, codes.Unimplemented) {
			return nil, nil
		}
		return nil, err
	}
	out := map[string]*adminv1.FederationStatus{}
	for _, st := range answer.GetStatuses() {
		out[st.GetTrustDomain()] = st
	}
	return out, nil
}

// federationFlags are the flags of create and update.
type federationFlags struct {
	url, profile, endpointID, bundle, format string
}

func (f *federationFlags) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.url, "url", "", "URL of the bundle endpoint, https://...; redirects are not followed")
	cmd.Flags().StringVar(&f.profile, "profile", "", "how the endpoint proves who it is: https_web (a certificate of the Web PKI for the host in the URL) or https_spiffe (an X509-SVID)")
	cmd.Flags().StringVar(&f.endpointID, "endpoint-id", "", "SPIFFE ID of the endpoint, for https_spiffe")
	cmd.Flags().StringVar(&f.bundle, "bundle", "", "file with the trust domain's bundle to begin with, - for stdin; https_spiffe needs one, unless the endpoint's is known")
	cmd.Flags().StringVar(&f.format, "format", "", "what the file of --bundle is: spiffe or pem (default: by its content)")
}

// wire makes the relationship, and the mask of those fields that were given.
func (f *federationFlags) wire(a *app, name string) (*types.FederationRelationship, *types.FederationRelationshipMask, error) {
	out := &types.FederationRelationship{TrustDomain: name, BundleEndpointUrl: f.url}
	mask := &types.FederationRelationshipMask{BundleEndpointUrl: f.url != "", BundleEndpointProfile: f.profile != "", TrustDomainBundle: f.bundle != ""}
	switch {
	case f.profile == "https_spiffe" && f.endpointID == "":
		return nil, nil, usagef("--profile https_spiffe needs --endpoint-id")
	case f.profile == "https_spiffe":
		out.BundleEndpointProfile = &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: f.endpointID}}
	case f.endpointID != "":
		return nil, nil, usagef("--endpoint-id is for --profile https_spiffe")
	case f.profile == "https_web":
		out.BundleEndpointProfile = &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}}
	case f.profile != "":
		return nil, nil, usagef("--profile %q is not one of https_web, https_spiffe", f.profile)
	}
	if f.bundle == "" {
		return out, mask, nil
	}
	switch f.format {
	case "", "spiffe", "pem":
	default:
		return nil, nil, usagef("--format %q is not one of spiffe, pem", f.format)
	}
	data, err := a.readInput(f.bundle, maxBundleFile)
	if err != nil {
		return nil, nil, err
	}
	doc, err := a.readBundle(spiffeid.RequireTrustDomainFromString(name), f.bundle, data, f.format)
	if err != nil {
		return nil, nil, err
	}
	out.TrustDomainBundle, err = wireBundle(doc)
	return out, mask, err
}

func (a *app) federationCreateCommand() *cobra.Command {
	var f federationFlags
	cmd := &cobra.Command{
		Use:   "create TRUST-DOMAIN --url URL --profile PROFILE",
		Short: "Federate with a trust domain: fetch its bundle from now on",
		Long: `Federate with a trust domain. Its bundle is fetched at once, and then as often as the bundle itself asks for. The trust domain's name,
URL and profile must come from its operators over a channel that you trust, and for https_spiffe the first bundle too.`,
		Example: `  signet federation create partner.example --url https://partner.example/bundle.json --profile https_web
  signet federation create partner.example --url https://10.1.2.3:8443/ --profile https_spiffe \
    --endpoint-id spiffe://partner.example/bundle-endpoint --bundle partner.json`,
		Args: exactArgs("TRUST-DOMAIN"),
	}
	f.flags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		names, err := trustDomains("TRUST-DOMAIN", args)
		if err != nil {
			return err
		}
		switch {
		case f.url == "":
			return usagef("--url is missing")
		case f.profile == "":
			return usagef("--profile is missing: https_web or https_spiffe; the partner's operators know which")
		}
		rel, _, err := f.wire(a, names[0])
		if err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			doing := fmt.Sprintf("federating with %s", names[0])
			answer, err := trustdomainv1.NewTrustDomainClient(c).BatchCreateFederationRelationship(ctx, &trustdomainv1.BatchCreateFederationRelationshipRequest{FederationRelationships: []*types.FederationRelationship{rel}})
			if err != nil {
				return caError(doing, c, err)
			}
			for _, r := range answer.GetResults() {
				if code := codes.Code(r.GetStatus().GetCode()); code != codes.OK {
					err := statusError(doing, c, code, r.GetStatus().GetMessage())
					if code == codes.AlreadyExists {
						return withHint(err, "'signet federation update %s' changes it", names[0])
					}
					return err
				}
			}
			_, err = fmt.Fprintf(a.stdout, "federating with %s; 'signet federation show %s' says whether its bundle could be fetched\n", names[0], names[0])
			return err
		})
	}
	return a.reachesCA(cmd)
}

func (a *app) federationUpdateCommand() *cobra.Command {
	var f federationFlags
	cmd := &cobra.Command{
		Use:   "update TRUST-DOMAIN",
		Short: "Change a federation relationship; what is not given stays",
		Example: `  signet federation update partner.example --url https://new.partner.example/bundle.json
  signet federation update partner.example --bundle partner.json`,
		Args: exactArgs("TRUST-DOMAIN"),
	}
	f.flags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		names, err := trustDomains("TRUST-DOMAIN", args)
		if err != nil {
			return err
		}
		rel, mask, err := f.wire(a, names[0])
		if err != nil {
			return err
		}
		if !mask.BundleEndpointUrl && !mask.BundleEndpointProfile && !mask.TrustDomainBundle {
			return usagef("nothing to change: give --url, --profile or --bundle")
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			doing := fmt.Sprintf("changing the relationship with %s", names[0])
			answer, err := trustdomainv1.NewTrustDomainClient(c).BatchUpdateFederationRelationship(ctx, &trustdomainv1.BatchUpdateFederationRelationshipRequest{
				FederationRelationships: []*types.FederationRelationship{rel}, InputMask: mask})
			if err != nil {
				return caError(doing, c, err)
			}
			for _, r := range answer.GetResults() {
				if code := codes.Code(r.GetStatus().GetCode()); code != codes.OK {
					return noFederation(statusError(doing, c, code, r.GetStatus().GetMessage()))
				}
			}
			_, err = fmt.Fprintf(a.stdout, "updated %s\n", names[0])
			return err
		})
	}
	return a.reachesCA(cmd)
}

// noFederation says what to do about a relationship that is not there.
func noFederation(err error) error {
	if isCode(err, codes.NotFound) {
		return withHint(err, "'signet federation list' shows those there are")
	}
	return err
}

func (a *app) federationListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List the federation relationships",
		Example: "  signet federation list -o wide",
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			statuses, err := federationStatuses(ctx, c)
			if err != nil {
				return err
			}
			now := a.now()
			l := &lister[federation]{app: a, format: *output, none: "there is no federation relationship", columns: []column[federation]{
				{name: "TRUST DOMAIN", value: func(f federation) string { return f.TrustDomain }},
				{name: "STATE", value: federation.state, color: federation.stateColor},
				{name: "PROFILE", value: func(f federation) string { return f.Profile }},
				{name: "URL", value: func(f federation) string { return f.URL }},
				{name: "NEXT FETCH", value: func(f federation) string { return left(f.next, now) }},
				{name: "ENDPOINT ID", wide: true, value: func(f federation) string { return f.EndpointID }},
				{name: "LAST GOOD FETCH", wide: true, value: func(f federation) string { return f.SucceededAt }},
				{name: "ERROR", wide: true, value: func(f federation) string { return f.Error }},
			}}
			for token := ""; ; {
				page, err := trustdomainv1.NewTrustDomainClient(c).ListFederationRelationships(ctx, &trustdomainv1.ListFederationRelationshipsRequest{PageSize: federationPage, PageToken: token})
				if err != nil {
					return caError("listing federation relationships", c, err)
				}
				items := make([]federation, len(page.GetFederationRelationships()))
				for i, f := range page.GetFederationRelationships() {
					if items[i], err = federationOf(f, statuses[f.GetTrustDomain()]); err != nil {
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

func (a *app) federationShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "show TRUST-DOMAIN",
		Short:   "Show a federation relationship, how its bundle was last fetched, and the bundle",
		Example: "  signet federation show partner.example",
		Args:    exactArgs("TRUST-DOMAIN"),
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		names, err := trustDomains("TRUST-DOMAIN", args)
		if err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			answer, err := trustdomainv1.NewTrustDomainClient(c).GetFederationRelationship(ctx, &trustdomainv1.GetFederationRelationshipRequest{TrustDomain: names[0]})
			if err != nil {
				return noFederation(caError(fmt.Sprintf("showing the relationship with %s", names[0]), c, err))
			}
			statuses, err := federationStatuses(ctx, c)
			if err != nil {
				return err
			}
			f, err := federationOf(answer, statuses[names[0]])
			if err != nil {
				return err
			}
			if err := a.show(*output, f, []field{
				{name: "Trust domain", value: f.TrustDomain}, {name: "State", value: f.state(), color: f.stateColor()}, {name: "URL", value: f.URL}, {name: "Profile", value: f.Profile},
				{name: "Endpoint ID", value: f.EndpointID}, {name: "Last fetch", value: f.FetchedAt}, {name: "Last good fetch", value: f.SucceededAt}, {name: "Next fetch", value: f.NextAt},
				{name: "Error", value: f.Error},
			}); err != nil {
				return err
			}
			if f.Bundle == nil || *output == formatJSON || *output == formatYAML {
				return nil
			}
			fmt.Fprintln(a.stdout)
			return a.showBundle(*output, *f.Bundle)
		})
	}
	return a.reachesCA(cmd)
}

func (a *app) federationRefreshCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "refresh TRUST-DOMAIN...",
		Short:   "Fetch bundles now",
		Example: "  signet federation refresh partner.example",
		Args:    someArgs("TRUST-DOMAIN"),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		names, err := trustDomains("TRUST-DOMAIN", args)
		if err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			for _, name := range names {
				if _, err := trustdomainv1.NewTrustDomainClient(c).RefreshBundle(ctx, &trustdomainv1.RefreshBundleRequest{TrustDomain: name}); err != nil {
					return noFederation(caError(fmt.Sprintf("refreshing the bundle of %s", name), c, err))
				}
				if _, err := fmt.Fprintf(a.stdout, "refreshed %s\n", name); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return a.reachesCA(cmd)
}

func (a *app) federationDeleteCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "delete TRUST-DOMAIN...",
		Short: "End federation relationships, and the trust in those trust domains",
		Long: `End federation relationships. The bundles are forgotten with them: workloads that federate with these trust domains stop trusting them
at once. To keep a bundle, 'signet bundle show' it before and 'signet bundle set' it after.`,
		Example: "  signet federation delete partner.example",
		Args:    someArgs("TRUST-DOMAIN"),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		names, err := trustDomains("TRUST-DOMAIN", args)
		if err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			answer, err := trustdomainv1.NewTrustDomainClient(c).BatchDeleteFederationRelationship(ctx, &trustdomainv1.BatchDeleteFederationRelationshipRequest{TrustDomains: names})
			if err != nil {
				return caError("ending federation relationships", c, err)
			}
			for _, r := range answer.GetResults() {
				if code := codes.Code(r.GetStatus().GetCode()); code != codes.OK {
					return noFederation(statusError(fmt.Sprintf("ending the relationship with %s", r.GetTrustDomain()), c, code, r.GetStatus().GetMessage()))
				}
				fmt.Fprintf(a.stdout, "deleted %s\n", escape(r.GetTrustDomain()))
			}
			return nil
		})
	}
	return a.reachesCA(cmd)
}
