package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/policy"
)

// applyChunk is how many documents and deletions are one commit at the CA.
const applyChunk = 100

// applyBytes is how many bytes of documents go into one commit, of which a store takes 1 MiB. A document is stored as it is
// written and compiled, which is mostly not much more than twice its size; if it is, its batch is cut.
const applyBytes = 384 << 10

// maxWarnings is how many warnings of a large set are printed, as the CA says at most for one batch.
const maxWarnings = 200

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
	var roll rolloutFlags
	cmd := &cobra.Command{
		Use:   "apply -f FILE...",
		Short: "Make documents hold: identities, call policies, policy defaults, federations, revocations, user issuers",
		Long: `Make the documents hold. All of them are checked before the first write; then the plan is shown and applied, and the revision
of the store is reported. Up to 100 changes of 384 KiB are one commit. Larger sets go in several; if one fails, the same
command again goes on where it stopped.

What was planned is what is applied: if somebody else changes one of the resources in between, nothing is written.

With --rollout, new versions of call policies reach a share of the agents first, then step by step all, and go back by
themselves if calls are denied that were allowed before: see 'signet rollout'.`,
		Example: `  signet apply -f policies/
  signet apply -f identities.yaml -f policies.yaml --prune
  signet apply -f policies/documents.yaml --rollout 10%,50%,100% --bake 30m
  kubectl -n signet-system exec -i signet-ca-0 -- signet apply -f - < policies.yaml`,
	}
	output := outputFlag(cmd)
	files := filesFlag(cmd, "file or directory of documents, - for stdin (repeatable)")
	cmd.Flags().BoolVar(&prune, "prune", false, "delete resources of the kinds in the documents that no document names, but no revocations")
	cmd.Flags().BoolVar(&yes, "yes", false, "apply also what locks all callers of a service out, and revocations that hit much or an admin")
	roll.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := roll.check(cmd, prune); err != nil {
			return err
		}
		docs, err := a.documentsFrom(cmd, *files)
		if err != nil {
			return err
		}
		people := *output == formatTable || *output == formatWide
		return a.withCAByCall(cmd.Context(), func(ctx context.Context, c *caConn) error {
			batches, err := planAll(ctx, c, docs, prune)
			if err != nil {
				return err
			}
			planned := merged(batches)
			a.warn(planned.Warnings)
			pending := planned.pending()
			if people {
				a.printPlan(planned)
			}
			if len(pending) > 0 && roll.shares != "" {
				if len(batches) > 1 {
					return fmt.Errorf("a roll-out takes at most %d documents and %d bytes; roll them out in parts", applyChunk, applyBytes)
				}
				started, err := a.startRollout(ctx, c, &roll, docs, planned, yes)
				if err != nil {
					return err
				}
				if !people {
					return a.show(*output, started, nil)
				}
				_, err = fmt.Fprintf(a.stdout, "rolling out %s as %s: %s, %s agents; 'signet rollout status %s' shows how it goes\n",
					count(len(pending), "change"), escape(started.Name), started.share(), started.agents(), escape(started.Name))
				return err
			}
			if len(pending) > 0 {
				if planned.Revision, err = a.commit(ctx, c, batches, len(pending), yes); err != nil {
					return err
				}
			}
			switch {
			case !people:
				return a.show(*output, planned, nil)
			case len(pending) == 0:
				_, err = fmt.Fprintf(a.stdout, "nothing to change at revision %d\n", planned.Revision)
			default:
				_, err = fmt.Fprintf(a.stdout, "applied %s at revision %d\n", count(len(pending), "change"), planned.Revision)
			}
			return err
		})
	}
	return a.reachesCA(cmd)
}

// A batch is what becomes one commit: documents, or the deletion of one resource that no document names.
type batch struct {
	docs  []strictyaml.Document
	prune bool
	plan  plan
}

// planAll plans all documents before anything is written. Those that fit into one commit are one batch, in which the CA
// itself finds what to prune; larger sets are batches of applyChunk documents, and what to prune is worked out here.
func planAll(ctx context.Context, c *caConn, docs []strictyaml.Document, prune bool) ([]batch, error) {
	if err := checkTwice(docs); err != nil {
		return nil, err
	}
	var gone []change
	if prune {
		var err error
		if gone, err = unnamed(ctx, c, docs); err != nil {
			return nil, err
		}
	}
	var batches []batch
	if len(docs)+len(gone) <= applyChunk && len(chunks(docs)) == 1 {
		batches = []batch{{docs: docs, prune: prune}}
	} else {
		for _, chunk := range chunks(docs) {
			batches = append(batches, batch{docs: chunk})
		}
	}
	var mistakes []string
	var refused error
	for i := 0; i < len(batches); i++ {
		b := batches[i]
		answer, err := adminv1.NewAdminClient(c).Plan(ctx, &adminv1.ApplyRequest{Documents: wireDocuments(b.docs), Prune: b.prune})
		err = applyError("checking the documents", c, err)
		if n := len(b.docs); isCode(err, codes.OutOfRange) && n > 1 { // too much for one commit
			parts := []batch{{docs: b.docs[:n/2]}, {docs: b.docs[n/2:]}}
			batches = slices.Replace(batches, i, i+1, parts...)
			i--
			continue
		}
		if isCode(err, codes.InvalidArgument) || isCode(err, codes.OutOfRange) {
			mistakes, refused = append(mistakes, strings.TrimPrefix(err.Error(), "checking the documents: ")), err
			continue
		}
		if err != nil {
			return nil, err
		}
		batches[i].plan = planOf(answer)
	}
	if len(mistakes) > 1 {
		return nil, &remoteError{doing: "checking the documents", code: codes.InvalidArgument, message: strings.Join(mistakes, "\n")}
	}
	if refused != nil {
		return nil, refused
	}
	if len(batches) > 1 || !batches[0].prune {
		for _, ch := range gone {
			batches = append(batches, batch{plan: plan{Changes: []change{ch}, Revision: batches[0].plan.Revision}})
		}
	}
	return batches, nil
}

// chunks cuts docs so that each part is one commit and one message.
func chunks(docs []strictyaml.Document) [][]strictyaml.Document {
	var out [][]strictyaml.Document
	size := 0
	for i, d := range docs {
		size += len(d.Content)
		if i == 0 || len(out[len(out)-1]) == applyChunk || size > applyBytes {
			out, size = append(out, nil), len(d.Content)
		}
		out[len(out)-1] = append(out[len(out)-1], d)
	}
	return out
}

// checkTwice refuses two documents of one kind and name, which the CA would not notice across batches.
func checkTwice(docs []strictyaml.Document) error {
	first := map[string]strictyaml.Document{}
	for _, d := range docs {
		kind, name := documentName(d)
		if f, twice := first[kind+"/"+name]; twice && kind != "" {
			return fmt.Errorf("%s:%d: %s %q is in %s:%d already", d.File, d.Line, kind, name, f.File, f.Line)
		}
		first[kind+"/"+name] = d
	}
	return nil
}

// documentName is the kind and the name by which the CA knows a document.
func documentName(d strictyaml.Document) (kind, name string) {
	kind, _, _, _ = d.Field("kind")
	name, _, _, ok := d.Field("name")
	if kind == policy.KindPolicyDefaults && !ok {
		name = policy.DefaultsName
	}
	return kind, name
}

// unnamed lists the resources of the kinds in docs that docs does not name.
func unnamed(ctx context.Context, c *caConn, docs []strictyaml.Document) ([]change, error) {
	named, kinds := map[string]bool{}, map[string]bool{}
	for _, d := range docs {
		kind, name := documentName(d)
		named[kind+"/"+name] = true
		for _, k := range resourceKinds {
			if k.kind == kind && kind != policy.KindRevocation { // un-revoking is always explicit
				kinds[kind] = true
			}
		}
	}
	var gone []change
	for _, kind := range sortedKeys(kinds) {
		req := &adminv1.GetResourcesRequest{Kind: kind, PageSize: resourcePage}
		for {
			page, err := adminv1.NewAdminClient(c).GetResources(ctx, req)
			if err != nil {
				return nil, caError(fmt.Sprintf("reading resources of kind %s", kind), c, err)
			}
			for _, r := range page.GetResources() {
				if !named[r.GetKind()+"/"+r.GetName()] {
					gone = append(gone, change{Action: "delete", Kind: r.GetKind(), Name: r.GetName()})
				}
			}
			if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
				break
			}
		}
	}
	return gone, nil
}

func merged(batches []batch) plan {
	out := plan{Changes: []change{}}
	for _, b := range batches {
		out.Changes = append(out.Changes, b.plan.Changes...)
		out.Warnings = append(out.Warnings, b.plan.Warnings...)
		out.Revision = max(out.Revision, b.plan.Revision)
	}
	if n := len(out.Warnings) - maxWarnings; n > 0 {
		out.Warnings = append(out.Warnings[:maxWarnings], fmt.Sprintf("%d more warnings; 'signet policy check' prints those of a few documents", n))
	}
	return out
}

// commit applies what was planned and returns the revision of the last commit.
func (a *app) commit(ctx context.Context, c *caConn, batches []batch, total int, yes bool) (int64, error) {
	client := adminv1.NewAdminClient(c)
	done, revision := 0, int64(0)
	for _, b := range batches {
		changes := b.plan.pending()
		if len(changes) == 0 {
			continue
		}
		var err error
		if b.docs == nil {
			var answer *adminv1.DeleteResourceResponse
			answer, err = client.DeleteResource(ctx, &adminv1.DeleteResourceRequest{Kind: changes[0].Kind, Name: changes[0].Name, Yes: yes})
			revision = max(revision, answer.GetRevision())
		} else {
			var answer *adminv1.ApplyResponse
			answer, err = client.Apply(ctx, &adminv1.ApplyRequest{Documents: wireDocuments(b.docs), Prune: b.prune, Yes: yes, PlannedAt: b.plan.Revision})
			revision = max(revision, answer.GetRevision())
		}
		if err != nil {
			err = applyError("applying", c, err)
			if done > 0 {
				return 0, fmt.Errorf("%w (%d of %d changes are applied; the same command again goes on from there)", err, done, total)
			}
			return 0, err
		}
		if done += len(changes); done < total && b.docs != nil {
			a.note("%d of %d changes applied, revision %d", done, total, revision)
		}
	}
	return revision, nil
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
		return a.withCAByCall(cmd.Context(), func(ctx context.Context, c *caConn) error {
			batches, err := planAll(ctx, c, docs, prune)
			if err != nil {
				return err
			}
			planned := merged(batches)
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
func applyError(doing string, c *caConn, err error) error {
	err = caError(doing, c, err)
	switch {
	case isCode(err, codes.Aborted):
		return withHint(err, "somebody changed one of these resources since the plan was made: run the command again")
	case isCode(err, codes.FailedPrecondition):
		return withHint(err, "nothing was written; 'signet policy explain' shows who may call it now")
	case isCode(err, codes.InvalidArgument):
		return withHint(err, "nothing was written")
	}
	return err
}
