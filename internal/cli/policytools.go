package cli

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/analyse"
)

const trustDomainUse = "with files: the trust domain of the services, such as example.org"

func (a *app) policyWhoCanCommand() *cobra.Command {
	var k call
	var tls bool
	cmd := &cobra.Command{
		Use:   "who-can SERVICE [--http REQUEST | --grpc METHOD | --tls]",
		Short: "List who may make a call to a service, or with --from whom a caller may call",
		Long: `List the known callers that may make a call to a service, and the rule that lets them: the IDs that Identities and registration entries
issue, those that rules write out, and patterns for callers of other trust domains. With --from and no SERVICE, list the services that this
caller may call. Without a request, whoever might make some call is listed. "conditional" means that it depends on the request, a token or a
condition. The policies in force are asked from the CA; with -f those in files are taken, and the Identities beside them.`,
		Example: `  signet policy who-can /documents --http "GET /v1/documents/7"
  signet policy who-can /documents
  signet policy who-can --from /web`,
		Args: atMostArgs(1),
	}
	output := outputFlag(cmd)
	files := filesFlag(cmd, "file or directory of documents instead of the policies in force, - for stdin (repeatable)")
	cmd.Flags().StringVar(&k.from, "from", "", "list whom this caller may call")
	cmd.Flags().StringVar(&k.http, "http", "", "an HTTP request: method and target, such as \"GET /v1/documents\"")
	cmd.Flags().StringVar(&k.grpc, "grpc", "", "a gRPC call: pkg.Service/Method")
	cmd.Flags().BoolVar(&tls, "tls", false, "a connection of which only the caller is known")
	cmd.Flags().StringVar(&k.trustDomain, "trust-domain", "", trustDomainUse)
	exclusive(cmd, "http", "grpc", "tls")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if (len(args) == 0) == (k.from == "") {
			return &usageError{err: fmt.Errorf("give either the SERVICE that is called or --from, the caller"), hint: example(cmd)}
		}
		s, err := a.side(cmd, *files, k.trustDomain)
		if err != nil {
			return err
		}
		reverse := k.from != ""
		if reverse {
			k.to = "/x" // every service in turn
		} else {
			k.to, k.from = args[0], "/x"
		}
		r, err := k.request(s.td)
		if err != nil {
			return err
		}
		ask := analyse.WhoCan
		if reverse {
			ask = analyse.WhomCan
		}
		grants, err := ask(s.set, s.known, *r, k.http == "" && k.grpc == "" && !tls)
		if err != nil {
			return err
		}
		return list(a, *output, "nobody", []column[analyse.Grant]{
			{name: "FROM", value: func(g analyse.Grant) string { return g.Peer }},
			{name: "TO", value: func(g analyse.Grant) string { return g.Service }},
			{name: "VERDICT", value: func(g analyse.Grant) string { return string(g.Verdict) }},
			{name: "RULE", value: func(g analyse.Grant) string { return ruleName(g.Rule, g.Reason) }},
		}, grants)
	}
	return a.reachesCA(cmd)
}

func ruleName(r policy.Rule, reason string) string {
	switch {
	case r.Policy == "":
		return reason
	case r.File == "":
		return fmt.Sprintf("%s:%d", r.Policy, r.Line)
	}
	return fmt.Sprintf("%s (%s:%d)", r.Policy, r.File, r.Line)
}

func (a *app) policyDiffCommand() *cobra.Command {
	var trustDomain string
	var exitCode bool
	cmd := &cobra.Command{
		Use:   "diff A B",
		Short: "Show the difference between policies in decisions, not in text",
		Long: `Show which calls two sets of policies decide otherwise: over all known callers and services, those that rules name, and all requests
that some rule tells apart. A and B are files, directories, or "live" for the policies in force; each is taken as the whole set, so what
"live" has and the files lack, PolicyDefaults included, is gone on their side. "conditional" means that it depends on a
token or a condition. Requests stand for all those that no rule tells apart from them; "*" is any text. Headers that override a method
are not looked at. Where there is too much for one answer, it is said that it is a sample.`,
		Example: `  signet policy diff live policies/
  signet policy diff old/ new/ --trust-domain example.org --exit-code`,
		Args: exactArgs("A", "B"),
	}
	output := outputFlag(cmd)
	cmd.Flags().StringVar(&trustDomain, "trust-domain", "", trustDomainUse)
	cmd.Flags().BoolVar(&exitCode, "exit-code", false, "exit with status 1 if a decision differs")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if args[0] == live && args[1] == live {
			return usagef("A and B are both %q", live)
		}
		first := 0
		if args[1] == live {
			first = 1
		}
		var sides [2]*side
		var err error
		if sides[first], err = a.side(cmd, args[first:first+1], trustDomain); err != nil {
			return err
		}
		if trustDomain == "" && args[first] == live {
			trustDomain = sides[first].td.Name()
		}
		if sides[1-first], err = a.side(cmd, args[1-first:2-first], trustDomain); err != nil {
			return err
		}
		if sides[0].td != sides[1].td {
			return fmt.Errorf("%s is of the trust domain %s, %s of %s", args[0], sides[0].td, args[1], sides[1].td)
		}
		found, complete, err := analyse.Diff(sides[0].set, sides[1].set, sides[0].known.With(sides[1].known.All()))
		if err != nil {
			return err
		}
		if *output == formatJSON || *output == formatYAML {
			err = list(a, *output, "", nil, found)
		} else {
			for _, d := range found {
				color := green
				if d.After == analyse.VerdictDeny {
					color = red
				}
				if _, err = fmt.Fprintln(a.stdout, paint(a.color, color, escape(d.String()))); err != nil {
					break
				}
			}
		}
		if err == nil && len(found) == 0 && complete {
			a.note("every call is decided alike")
		}
		if !complete {
			a.warn([]string{"there are more calls than were compared: this is a sample"})
		}
		if err == nil && exitCode && (len(found) > 0 || !complete) {
			return fmt.Errorf("%s decided otherwise", count(len(found), "kind of call"))
		}
		return err
	}
	return a.reachesCA(cmd)
}

func (a *app) policyReplayCommand() *cobra.Command {
	var trustDomain string
	var all, exitCode bool
	cmd := &cobra.Command{
		Use:   "replay FILE|live [-f PROPOSAL...]",
		Short: "Decide recorded decisions again, by a proposal",
		Long: `Decide recorded decisions (of 'signet policy observed', or those that the CA keeps: live) by the policies in -f, or by those in force, and
show which answers change. What a record does not say enough for, such as a condition on a header or a claim, is said to be
undecided, never guessed; what an answer takes for granted is said with it.`,
		Example: `  signet policy replay live -f policies/ --trust-domain example.org
  signet policy replay week.jsonl -f policies/ --trust-domain example.org --exit-code`,
		Args: exactArgs("FILE"),
	}
	output := outputFlag(cmd)
	files := filesFlag(cmd, "file or directory of the proposal, - for stdin (repeatable)")
	cmd.Flags().StringVar(&trustDomain, "trust-domain", "", trustDomainUse)
	cmd.Flags().BoolVar(&all, "all", false, "also show what stays as it is")
	cmd.Flags().BoolVar(&exitCode, "exit-code", false, "exit with status 1 if an answer changes")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		s, err := a.side(cmd, *files, trustDomain)
		if err != nil {
			return err
		}
		records, err := a.observed(cmd, args[0], "")
		if err != nil {
			return err
		}
		p, err := analyse.NewReplay(s.set)
		if err != nil {
			return err
		}
		var shown []analyse.Replayed
		changed, undecided := 0, 0
		for _, o := range records {
			r := p.Decide(o)
			if r.Changed() {
				changed++
			}
			if r.After == "" {
				undecided++
			}
			if all || r.Changed() || r.After == "" {
				shown = append(shown, r)
			}
		}
		if err := list(a, *output, "no answer changes", []column[analyse.Replayed]{
			{name: "FROM", value: func(r analyse.Replayed) string { return r.Peer }},
			{name: "TO", value: func(r analyse.Replayed) string { return r.Service }},
			{name: "CALL", value: func(r analyse.Replayed) string { return r.Call }},
			{name: "COUNT", value: func(r analyse.Replayed) string { return fmt.Sprint(r.Count) }},
			{name: "BEFORE", value: func(r analyse.Replayed) string { return r.Before }},
			{name: "AFTER", value: func(r analyse.Replayed) string {
				if r.After == "" {
					return "undecided: " + r.Why
				}
				return string(r.After)
			}},
			{name: "RULE", value: func(r analyse.Replayed) string { return ruleName(r.Rule, "") }},
			{name: "ASSUMES", wide: true, value: func(r analyse.Replayed) string { return r.Assumes }},
		}, shown); err != nil {
			return err
		}
		a.note("%s: %d would change, %d cannot be decided from the record", count(len(records), "recorded decision"), changed, undecided)
		if exitCode && changed > 0 {
			return fmt.Errorf("%s would change", count(changed, "answer"))
		}
		return nil
	}
	return a.reachesCA(cmd)
}

func (a *app) policyObservedCommand() *cobra.Command {
	var service string
	cmd := &cobra.Command{
		Use:     "observed [--service ID]",
		Short:   "Write the decisions that the CA keeps, a JSON object each line",
		Example: "  signet policy observed > week.jsonl",
	}
	cmd.Flags().StringVar(&service, "service", "", "only calls to this service, a full SPIFFE ID")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if service != "" {
			if _, err := fullID("--service", service); err != nil {
				return err
			}
		}
		records, err := a.observed(cmd, live, service)
		if err != nil {
			return err
		}
		for _, o := range records {
			text, err := protojson.Marshal(o)
			if err != nil {
				return fmt.Errorf("encoding as JSON: %w", err)
			}
			if _, err := io.WriteString(a.stdout, escapeEncoded(string(text), false)+"\n"); err != nil {
				return err
			}
		}
		return nil
	}
	return a.reachesCA(cmd)
}

func (a *app) policySuggestCommand() *cobra.Command {
	var service, trustDomain, from string
	cmd := &cobra.Command{
		Use:   "suggest [--service ID]",
		Short: "Write the least policies that allow what was seen",
		Long: `Write, as documents with comments for review, the least policies that allow the calls that were seen and allowed: by service, callers one by
one, methods listed. Numbers and identifiers in paths become "*", and very many paths below one become "**"; both are marked REVIEW. Calls
with paths that no policy can name exactly are left out and counted. What was seen may have been an attack: read before you apply.`,
		Example: `  signet policy suggest --service /documents > documents.yaml
  signet policy suggest --from week.jsonl --trust-domain example.org`,
	}
	cmd.Flags().StringVar(&service, "service", "", "only for this service")
	cmd.Flags().StringVar(&from, "from", live, "recorded decisions: a file of 'signet policy observed', - for stdin, or live")
	cmd.Flags().StringVar(&trustDomain, "trust-domain", "", trustDomainUse)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		td, err := a.domainOf(cmd, from, trustDomain)
		if err != nil {
			return err
		}
		id, err := serviceID("--service", service, td)
		if err != nil {
			return err
		}
		records, err := a.observed(cmd, from, id)
		if err != nil {
			return err
		}
		s := analyse.NewSuggestion(td)
		for _, o := range records {
			s.Add(o)
		}
		if s.Dropped > 0 {
			a.note("%d calls were left out: no policy can name them exactly", s.Dropped)
		}
		if len(records) == 0 {
			a.note("no call was seen")
		}
		return s.Write(a.stdout, id)
	}
	return a.reachesCA(cmd)
}

// domainOf is the trust domain of recorded decisions.
func (a *app) domainOf(cmd *cobra.Command, from, trustDomain string) (spiffeid.TrustDomain, error) {
	if trustDomain != "" {
		td, err := spiffeid.TrustDomainFromString(trustDomain)
		if err != nil {
			return td, usagef("--trust-domain: %w", err)
		}
		return td, nil
	}
	if from != live && from != "" {
		return spiffeid.TrustDomain{}, &usageError{err: fmt.Errorf("--trust-domain is missing: whose services the records speak of"), hint: example(cmd)}
	}
	s, err := a.side(cmd, nil, "")
	if err != nil {
		return spiffeid.TrustDomain{}, err
	}
	return s.td, nil
}

func (a *app) policyGraphCommand() *cobra.Command {
	var service, trustDomain, from, form string
	cmd := &cobra.Command{
		Use:   "graph [-o dot|mermaid|svg] [--service ID]",
		Short: "Draw who may call whom, who does, and the difference",
		Long: `Draw who may call whom by the policies, who was seen to, and the difference: solid lines for calls that may be and are, dashed ones for
calls that may be and were never seen, red ones for calls that were seen and would be denied. A large graph is grouped by the first segments of its IDs.`,
		Example: `  signet policy graph -o svg > calls.svg
  signet policy graph -f policies/ --trust-domain example.org --seen none -o mermaid`,
	}
	files := filesFlag(cmd, "file or directory of documents instead of the policies in force, - for stdin (repeatable)")
	cmd.Flags().StringVarP(&form, "output", "o", "dot", "how to draw: dot, mermaid or svg")
	cmd.Flags().StringVar(&service, "service", "", "only calls to and from this ID")
	cmd.Flags().StringVar(&from, "seen", live, "recorded decisions: a file of 'signet policy observed', live, or none")
	cmd.Flags().StringVar(&trustDomain, "trust-domain", "", trustDomainUse)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		draw := map[string]func(*analyse.Graph) string{"dot": (*analyse.Graph).DOT, "mermaid": (*analyse.Graph).Mermaid, "svg": (*analyse.Graph).SVG}[form]
		if draw == nil {
			return usagef("-o %q is not one of dot, mermaid, svg", form)
		}
		s, err := a.side(cmd, *files, trustDomain)
		if err != nil {
			return err
		}
		id, err := serviceID("--service", service, s.td)
		if err != nil {
			return err
		}
		g, err := func() (*analyse.Graph, error) {
			if from == "none" {
				return analyse.NewGraph(s.set, s.known, nil, id)
			}
			records, err := a.observed(cmd, from, "")
			if err != nil {
				return nil, err
			}
			return analyse.NewGraph(s.set, s.known, records, id)
		}()
		if err != nil {
			return err
		}
		if g.Grouped > 0 {
			a.note("the graph is grouped by the first %s of each ID; --service draws a part of it", count(g.Grouped, "segment"))
		}
		if !g.Complete {
			a.warn([]string{"the graph is too large: a part of it is not drawn"})
		}
		return a.writeText([]byte(strings.TrimRight(draw(g), "\n")))
	}
	return a.reachesCA(cmd)
}

// findings prints what the static checks say, and returns an error if there are mistakes or, if strict, warnings.
func (a *app) findings(found []analyse.Finding, omitted int, strict bool) error {
	bad := 0
	for _, f := range found {
		if f.Severity == analyse.SeverityError || strict && f.Severity == analyse.SeverityWarning {
			bad++
		}
		a.warn([]string{f.String()})
	}
	if omitted > 0 {
		a.note("and %d more findings", omitted)
	}
	if bad > 0 {
		return fmt.Errorf("%s to look at", count(bad, "finding"))
	}
	return nil
}
