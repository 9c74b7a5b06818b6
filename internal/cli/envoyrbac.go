package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	rbacfilterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	rbacnetworkv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/envoyrbac"
	"github.com/signet-id/signet/spiffe"
)

func (a *app) envoyRBACCommand() *cobra.Command {
	var trustDomain, protocol string
	cmd := &cobra.Command{
		Use:   "rbac SERVICE...",
		Short: "Print Envoy RBAC filters that decide as the call policies of services do",
		Long: `Print Envoy RBAC filters that decide as the call policies of services do, for Envoys that ask nobody: a filter that denies, and
one behind it that allows. They go before the router or the tcp_proxy of a listener whose TLS context verifies its callers,
as 'signet envoy config' prints it, with normalize_path: false.

The filters never allow what the policies deny. What they cannot say is left out of what they allow, and told on stderr and in
the comments: rules with jwt or when. Revocations and later changes are not in them; an Envoy that asks the agent has both.`,
		Example: `  signet envoy rbac /web
  signet envoy rbac -f policies/ --trust-domain example.org --protocol tcp /db -o json`,
	}
	cmd.Args = cobra.MinimumNArgs(1)
	output := cmd.Flags().StringP("output", "o", "yaml", "yaml or json")
	files := filesFlag(cmd, "file or directory of documents instead of the policies in force, - for stdin (repeatable)")
	cmd.Flags().StringVar(&trustDomain, "trust-domain", "", "with -f: the trust domain of the services, such as example.org")
	cmd.Flags().StringVar(&protocol, "protocol", "http", "http, gRPC included, or tcp")
	cmd.RunE = func(cmd *cobra.Command, services []string) error {
		of := map[string]policy.Protocol{"http": policy.ProtocolHTTP, "tcp": policy.ProtocolTLS}
		p, found := of[protocol]
		if !found {
			return usagef("--protocol is %q; it is http or tcp", protocol)
		}
		if *output != "yaml" && *output != "json" {
			return usagef("--output is %q; it is yaml or json", *output)
		}
		if len(*files) == 0 {
			return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
				policies, td, err := livePolicies(ctx, c)
				if err != nil {
					return err
				}
				return a.printRBAC(policies, td, services, p, *output)
			})
		}
		td, err := spiffe.ParseTrustDomain(trustDomain)
		if err != nil {
			return usagef("--trust-domain: %w", err)
		}
		docs, err := a.documentsFrom(cmd, *files)
		if err != nil {
			return err
		}
		policies, err := compileDocuments(docs, td)
		if err != nil {
			return err
		}
		return a.printRBAC(policies, td, services, p, *output)
	}
	return a.reachesCA(cmd)
}

// rbacFilters are the filters for one service. The metadata says of which policies they are.
type rbacFilters struct {
	Service  string   `json:"service"`
	Epoch    string   `json:"epoch,omitempty"`
	Revision int64    `json:"revision"`
	Exact    bool     `json:"exact"`
	Notes    []string `json:"notes,omitempty"`
	Filters  []any    `json:"filters"`
}

func (a *app) printRBAC(policies *policy.Policies, td spiffeid.TrustDomain, services []string, protocol policy.Protocol, output string) error {
	var all []rbacFilters
	for _, s := range services {
		if strings.HasPrefix(s, "/") {
			s = td.IDString() + s
		}
		id, err := fullID("SERVICE", s)
		if err != nil {
			return err
		}
		rules, err := envoyrbac.For(policies.Set(), id, protocol)
		if err != nil {
			return err
		}
		one := rbacFilters{Service: id.String(), Exact: len(rules.Notes) == 0, Notes: rules.Notes}
		one.Epoch, one.Revision = policies.Revision()
		if one.Filters, err = rbacOf(rules, protocol); err != nil {
			return err
		}
		for _, n := range rules.Notes {
			fmt.Fprintf(a.stderr, "signet: note: %s: %s\n", id, escape(n))
		}
		all = append(all, one)
	}
	if output == "json" {
		text, err := json.MarshalIndent(all, "", "  ")
		if err != nil {
			return err
		}
		_, err = a.stdout.Write(append(text, '\n'))
		return err
	}
	for i, one := range all {
		if i > 0 {
			fmt.Fprintln(a.stdout, "---")
		}
		fmt.Fprintf(a.stdout, "# Filters for %s, by signet envoy rbac: call policies of revision %d, epoch %q.\n", one.Service, one.Revision, one.Epoch)
		if one.Exact {
			fmt.Fprintln(a.stdout, "# They decide as these policies do; revocations are not in them.")
		}
		for _, n := range one.Notes {
			fmt.Fprintf(a.stdout, "# Note: %s.\n", escape(n))
		}
		encoder := yaml.NewEncoder(a.stdout)
		encoder.SetIndent(2)
		if err := encoder.Encode(one.Filters); err != nil {
			return err
		}
	}
	return nil
}

// rbacOf puts rules into filters, with the keys of each object in order.
func rbacOf(rules *envoyrbac.Rules, protocol policy.Protocol) ([]any, error) {
	filter := func(name, kind string, config proto.Message) (any, error) {
		raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(config)
		if err != nil {
			return nil, err
		}
		// Its spaces are different in each program, and its maps in no order.
		typed := map[string]any{}
		if err := json.Unmarshal(raw, &typed); err != nil {
			return nil, err
		}
		typed["@type"] = "type.googleapis.com/" + kind
		return map[string]any{"name": name, "typed_config": typed}, nil
	}
	var filters []any
	for _, part := range []struct {
		name string
		http *rbacfilterv3.RBAC
		tcp  *rbacnetworkv3.RBAC
	}{
		{"signet.rbac.deny", &rbacfilterv3.RBAC{Rules: rules.Deny}, &rbacnetworkv3.RBAC{Rules: rules.Deny, StatPrefix: "signet_deny."}},
		{"signet.rbac.allow", &rbacfilterv3.RBAC{Rules: rules.Allow}, &rbacnetworkv3.RBAC{Rules: rules.Allow, StatPrefix: "signet_allow."}},
	} {
		var config proto.Message = part.http
		if protocol == policy.ProtocolTLS {
			config = part.tcp
		}
		f, err := filter(part.name, string(config.ProtoReflect().Descriptor().FullName()), config)
		if err != nil {
			return nil, err
		}
		filters = append(filters, f)
	}
	return filters, nil
}
