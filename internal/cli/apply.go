package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/internal/strictyaml"
)

// applyChunk is how many changes are one commit at the CA.
const applyChunk = 100

// A plan is what apply would do or has done.
type plan struct {
	Changes  []change `json:"changes"`
	Revision int64    `json:"revision"`
	Warnings []string `json:"warnings,omitempty"`
}

type change struct {
	Action      string   `json:"action"`
	Kind        string   `json:"kind"`
	Name        string   `json:"name,omitempty"`
	Differences []string `json:"differences,omitempty"`
}

func planOf(r *adminv1.ApplyResponse) plan {
	p := plan{Changes: []change{}, Revision: r.GetRevision(), Warnings: r.GetWarnings()}
	for _, c := range r.GetChanges() {
		p.Changes = append(p.Changes, change{actionName(c.GetAction()), c.GetKind(), c.GetName(), c.GetDifferences()})
	}
	return p
}

func actionName(a adminv1.Action) string {
	switch a {
	case adminv1.Action_ACTION_UNCHANGED:
		return "unchanged"
	case adminv1.Action_ACTION_CREATE:
		return "create"
	case adminv1.Action_ACTION_CHANGE:
		return "change"
	case adminv1.Action_ACTION_DELETE:
		return "delete"
	}
	return fmt.Sprintf("action %d", a)
}

// pending are the changes that change something.
func (p plan) pending() []change {
	var out []change
	for _, c := range p.Changes {
		if c.Action != "unchanged" {
			out = append(out, c)
		}
	}
	return out
}

func (a *app) applyCommand() *cobra.Command {
	var prune, yes bool
	cmd := &cobra.Command{
		Use:   "apply -f FILE...",
		Short: "Make documents hold: identities, call policies, policy defaults",
		Long: `Make the documents hold. All of them are checked before the first write; then the plan is shown and applied, and the revision
of the store is reported. Up to 100 changes are one commit. Larger sets go in commits of 100; if one fails, the same
command again goes on where it stopped.

What was planned is what is applied: if somebody else changes one of the resources in between, nothing is written.`,
		Example: `  signet apply -f policies/
  signet apply -f identities.yaml -f policies.yaml --prune
  kubectl kustomize . | signet apply -f -`,
	}
	output := outputFlag(cmd)
	files := filesFlag(cmd, "file or directory of documents, - for stdin (repeatable)")
	cmd.Flags().BoolVar(&prune, "prune", false, "delete resources of the kinds in the documents that no document names")
	cmd.Flags().BoolVar(&yes, "yes", false, "apply also what removes the last allow of a service with live callers")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		docs, err := a.documentsFrom(cmd, *files)
		if err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			client := adminv1.NewAdminClient(c)
			answer, err := client.Plan(ctx, &adminv1.ApplyRequest{Documents: wireDocuments(docs), Prune: prune, Yes: yes})
			if err != nil {
				return applyError("planning", c, yes, err)
			}
			planned := planOf(answer)
			a.warn(planned.Warnings)
			pending := planned.pending()
			people := *output == formatTable || *output == formatWide
			if people {
				a.printPlan(planned)
			}
			if len(pending) == 0 {
				if people {
					_, err := fmt.Fprintf(a.stdout, "nothing to change at revision %d\n", planned.Revision)
					return err
				}
				return a.show(*output, planned, nil)
			}
			if planned.Revision, err = a.commit(ctx, c, docs, planned, prune, yes); err != nil {
				return err
			}
			if !people {
				return a.show(*output, planned, nil)
			}
			_, err = fmt.Fprintf(a.stdout, "applied %s at revision %d\n", count(len(pending), "change"), planned.Revision)
			return err
		})
	}
	return a.reachesCA(cmd)
}

// commit applies what was planned and returns the revision of the last commit.
func (a *app) commit(ctx context.Context, c *caConn, docs []strictyaml.Document, planned plan, prune, yes bool) (int64, error) {
	client := adminv1.NewAdminClient(c)
	pending := planned.pending()
	if len(pending) <= applyChunk {
		answer, err := client.Apply(ctx, &adminv1.ApplyRequest{Documents: wireDocuments(docs), Prune: prune, Yes: yes, PlannedAt: planned.Revision})
		if err != nil {
			return 0, applyError("applying", c, yes, err)
		}
		return answer.GetRevision(), nil
	}
	written := map[string]strictyaml.Document{}
	for _, d := range docs {
		written[documentKey(d)] = d
	}
	var writes []strictyaml.Document
	var deletes []change
	for _, ch := range pending {
		if ch.Action == "delete" {
			deletes = append(deletes, ch)
			continue
		}
		d, ok := written[ch.Kind+"/"+ch.Name]
		if !ok {
			return 0, fmt.Errorf("the CA plans to %s %s %q, which no document names", ch.Action, ch.Kind, ch.Name)
		}
		writes = append(writes, d)
	}
	done, revision := 0, planned.Revision
	resume := func(err error) error {
		return fmt.Errorf("%w (%d of %d changes are applied; the same command again goes on from there)", err, done, len(pending))
	}
	for len(writes) > 0 {
		chunk := writes[:min(len(writes), applyChunk)]
		writes = writes[len(chunk):]
		answer, err := client.Apply(ctx, &adminv1.ApplyRequest{Documents: wireDocuments(chunk), Yes: yes, PlannedAt: planned.Revision})
		if err != nil {
			return revision, resume(applyError("applying", c, yes, err))
		}
		done, revision = done+len(chunk), answer.GetRevision()
		a.note("%d of %d changes applied, revision %d", done, len(pending), revision)
	}
	for _, d := range deletes {
		answer, err := client.DeleteResource(ctx, &adminv1.DeleteResourceRequest{Kind: d.Kind, Name: d.Name, Yes: yes})
		if err != nil {
			return revision, resume(applyError(fmt.Sprintf("deleting %s %q", d.Kind, d.Name), c, yes, err))
		}
		done, revision = done+1, answer.GetRevision()
	}
	return revision, nil
}

// documentKey is kind/name, as the CA names resources.
func documentKey(d strictyaml.Document) string {
	kind, _, _, _ := d.Field("kind")
	name, _, _, _ := d.Field("name")
	return kind + "/" + name
}

func (a *app) diffCommand() *cobra.Command {
	var prune, exitCode bool
	cmd := &cobra.Command{
		Use:   "diff -f FILE...",
		Short: "Show what apply would change",
		Long:  `Check the documents and show what 'signet apply' would change. Nothing is written.`,
		Example: `  signet diff -f policies/
  signet diff -f policies/ --prune --exit-code`,
	}
	output := outputFlag(cmd)
	files := filesFlag(cmd, "file or directory of documents, - for stdin (repeatable)")
	cmd.Flags().BoolVar(&prune, "prune", false, "also show what --prune would delete")
	cmd.Flags().BoolVar(&exitCode, "exit-code", false, "exit with status 1 if there is anything to change")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		docs, err := a.documentsFrom(cmd, *files)
		if err != nil {
			return err
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			answer, err := adminv1.NewAdminClient(c).Plan(ctx, &adminv1.ApplyRequest{Documents: wireDocuments(docs), Prune: prune, Yes: true})
			if err != nil {
				return applyError("planning", c, true, err)
			}
			planned := planOf(answer)
			a.warn(planned.Warnings)
			if *output == formatJSON || *output == formatYAML {
				err = a.show(*output, planned, nil)
			} else {
				a.printPlan(planned)
			}
			if n := len(planned.pending()); err == nil && exitCode && n > 0 {
				return fmt.Errorf("%s to apply", count(n, "change"))
			}
			return err
		})
	}
	return a.reachesCA(cmd)
}

func (a *app) printPlan(p plan) {
	signs := map[string][2]string{"create": {"+", green}, "change": {"~", yellow}, "delete": {"-", red}}
	unchanged := 0
	for _, c := range p.Changes {
		if c.Action == "unchanged" {
			unchanged++
			continue
		}
		sign := signs[c.Action]
		fmt.Fprintf(a.stdout, "%s %s %s\n", paint(a.color, sign[1], sign[0]+" "+escape(c.Action)), escape(c.Kind), escape(c.Name))
		for _, d := range c.Differences {
			fmt.Fprintf(a.stdout, "    %s\n", escape(d))
		}
	}
	if unchanged > 0 {
		fmt.Fprintf(a.stdout, "%d unchanged\n", unchanged)
	}
}

func (a *app) warn(warnings []string) {
	for _, w := range warnings {
		fmt.Fprintf(a.stderr, "signet: %s %s\n", paint(isTerminal(a.stderr), yellow, "warning:"), escape(w))
	}
}

// applyError explains why documents were refused. Mistakes in documents come as one line each, with their place.
func applyError(doing string, c *caConn, yes bool, err error) error {
	err = caError(doing, c, err)
	switch {
	case isCode(err, codes.Aborted):
		return withHint(err, "somebody changed one of these resources since the plan was made: run the command again")
	case isCode(err, codes.FailedPrecondition) && !yes:
		return withHint(err, "if that is what you want, say --yes")
	case isCode(err, codes.InvalidArgument) && strings.Contains(err.Error(), "\n"):
		return withHint(err, "nothing was written")
	}
	return err
}
