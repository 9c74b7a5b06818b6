package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/policy"
)

const resourcePage = 1000

// resourceKinds are the words for kinds of resources on the command line.
var resourceKinds = []struct{ kind, plural, singular string }{
	{"Identity", "identities", "identity"},
	{"CallPolicy", "policies", "policy"},
	{"PolicyDefaults", "defaults", "policydefaults"},
	{"Revocation", "revocations", "revocation"},
	{"UserIssuer", "userissuers", "userissuer"},
	{"Federation", "federations", "federation"},
}

func kindArg(cmd *cobra.Command, word string) (string, error) {
	var words []string
	for _, k := range resourceKinds {
		if word == k.plural || word == k.singular || strings.EqualFold(word, k.kind) ||
			strings.EqualFold(word, strings.TrimSuffix(k.kind, "y")+"ies") { // callpolicies
			return k.kind, nil
		}
		words = append(words, k.plural)
	}
	err := &usageError{err: fmt.Errorf("%s knows no kind %q, but %s", cmd.CommandPath(), word, strings.Join(words, ", "))}
	switch word {
	case "entry", "entries":
		err.hint = "registration entries have their own commands: 'signet entry --help'"
	case "agent", "agents":
		err.hint = "agents have their own commands: 'signet agent --help'"
	case "bundle", "bundles":
		err.hint = "bundles have their own commands: 'signet bundle --help'"
	}
	return "", err
}

func completeKinds(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var words []string
	for _, k := range resourceKinds {
		words = append(words, k.plural)
	}
	return words, cobra.ShellCompDirectiveNoFileComp
}

// A resource is what an operator applied, as it is printed.
type resource struct {
	Kind      string `json:"kind"`
	Name      string `json:"name,omitempty"`
	Revision  int64  `json:"revision"`
	CreatedAt string `json:"created_at,omitempty"`
	EntryID   string `json:"entry_id,omitempty"`
	File      string `json:"file,omitempty"`
	Line      uint32 `json:"line,omitempty"`
	Document  string `json:"document"`
	// Of a templated Identity, which may stand for none.
	Templated   bool   `json:"templated,omitempty"`
	Pods        *int64 `json:"pods,omitempty"`
	RefusedPods *int64 `json:"refused_pods,omitempty"`
}

func resourceOf(r *adminv1.Resource) resource {
	out := resource{Kind: r.GetKind(), Name: r.GetName(), Revision: r.GetRevision(), EntryID: r.GetEntryId(), Templated: r.GetTemplated(),
		File: r.GetDocument().GetFile(), Line: r.GetDocument().GetLine(), Document: string(r.GetDocument().GetContent())}
	if r.GetCreatedAt() != nil {
		out.CreatedAt = stamp(r.GetCreatedAt().AsTime())
	}
	if out.Templated {
		out.Pods, out.RefusedPods = &r.Pods, &r.RefusedPods
	}
	return out
}

func (r resource) place() string {
	if r.File == "" {
		return ""
	}
	return fmt.Sprintf("%s:%d", r.File, r.Line)
}

func (a *app) getCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "get identities|policies|defaults|revocations|userissuers|federations [NAME]",
		Short: "List resources that were applied, or show one",
		Long:  `List resources that were applied, or show one. With -o yaml the documents are printed as they were applied, ready for 'signet apply -f -'.`,
		Example: `  signet get policies
  signet get identities -o yaml > identities.yaml
  signet get policy documents -o yaml`,
		ValidArgsFunction: completeKinds,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return exactArgs("KIND")(cmd, args)
			}
			return atMost(cmd, args, 2)
		},
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		kind, err := kindArg(cmd, args[0])
		if err != nil {
			return err
		}
		req := &adminv1.GetResourcesRequest{Kind: kind, PageSize: resourcePage}
		if len(args) > 1 {
			req.Name = args[1]
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			return a.printResources(ctx, c, *output, req)
		})
	}
	return a.reachesCA(cmd)
}

func (a *app) printResources(ctx context.Context, c *caConn, f format, req *adminv1.GetResourcesRequest) error {
	l := &lister[resource]{app: a, format: f, none: fmt.Sprintf("no %s has been applied", req.Kind), columns: []column[resource]{
		{name: "NAME", value: func(r resource) string { return r.Name }},
		{name: "REVISION", value: func(r resource) string { return fmt.Sprint(r.Revision) }},
		{name: "CREATED", value: func(r resource) string { return r.CreatedAt }},
		{name: "FROM", value: resource.place},
		{name: "ENTRY ID", wide: true, value: func(r resource) string { return r.EntryID }},
	}}
	if req.Kind == registry.KindIdentity {
		templated := func(name string, count func(resource) *int64) column[resource] {
			return column[resource]{name: name, value: func(r resource) string {
				if n := count(r); n != nil {
					return fmt.Sprint(*n)
				}
				return ""
			}}
		}
		l.columns = slices.Insert(l.columns, 1, templated("PODS", func(r resource) *int64 { return r.Pods }), templated("REFUSED", func(r resource) *int64 { return r.RefusedPods }))
	}
	if req.Kind == policy.KindRevocation {
		l.columns = slices.Insert(l.columns, 1, column[resource]{name: "REVOKED", value: func(r resource) string {
			field, value := revocationTarget(&adminv1.Document{Content: []byte(r.Document)})
			return field + " " + value
		}}, column[resource]{name: "EXPIRES", value: func(r resource) string { return revocationField(r.Document, "expires") }},
			column[resource]{name: "REASON", wide: true, value: func(r resource) string { return revocationField(r.Document, "reason") }})
	}
	found := 0
	for {
		page, err := adminv1.NewAdminClient(c).GetResources(ctx, req)
		if err != nil {
			return resourceHint(req.Kind, caError(fmt.Sprintf("reading resources of kind %s", req.Kind), c, err))
		}
		items := make([]resource, len(page.GetResources()))
		for i, r := range page.GetResources() {
			items[i] = resourceOf(r)
			if f == formatYAML {
				if err := a.writeDocument(items[i].Document, found+i > 0); err != nil {
					return err
				}
			}
		}
		found += len(items)
		if f != formatYAML {
			if err := l.add(items); err != nil {
				return err
			}
		}
		if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
			break
		}
	}
	if found == 0 && req.Name != "" {
		return resourceHint(req.Kind, &remoteError{doing: fmt.Sprintf("reading %s %q", req.Kind, req.Name), code: codes.NotFound, message: "there is none of that name"})
	}
	if f == formatYAML {
		return nil
	}
	return l.close()
}

// writeDocument prints a document as it was applied; further ones are set off by a separator line.
func (a *app) writeDocument(text string, further bool) error {
	text = strings.TrimRight(escapeEncoded(text, true), "\n") + "\n"
	if further {
		text = "---\n" + text
	}
	_, err := io.WriteString(a.stdout, text)
	return err
}

func (a *app) deleteCommand() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:               "delete identity|policy|defaults|revocation|userissuer|federation NAME...",
		Short:             "Delete resources that were applied",
		Example:           "  signet delete policy documents",
		ValidArgsFunction: completeKinds,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				if kind, err := kindArg(cmd, args[0]); err == nil && kind == "PolicyDefaults" {
					return atMost(cmd, args, 2)
				}
			}
			if len(args) < 2 {
				return exactArgs("KIND", "NAME")(cmd, args)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "delete also what locks all callers of a service out")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		kind, err := kindArg(cmd, args[0])
		if err != nil {
			return err
		}
		names := args[1:]
		if len(names) == 0 {
			names = []string{policy.DefaultsName}
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			for _, name := range names {
				answer, err := adminv1.NewAdminClient(c).DeleteResource(ctx, &adminv1.DeleteResourceRequest{Kind: kind, Name: name, Yes: yes})
				if err != nil {
					return resourceHint(kind, applyError(fmt.Sprintf("deleting %s %q", kind, name), c, err))
				}
				fmt.Fprintf(a.stdout, "deleted %s %s at revision %d\n", kind, escape(name), answer.GetRevision())
			}
			return nil
		})
	}
	return a.reachesCA(cmd)
}

func resourceHint(kind string, err error) error {
	if !isCode(err, codes.NotFound) {
		return err
	}
	for _, k := range resourceKinds {
		if k.kind == kind {
			return withHint(err, "'signet get %s' shows those there are", k.plural)
		}
	}
	return err
}
