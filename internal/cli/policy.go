package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/analyse"
	"github.com/signet-id/signet/spiffe"
)

func (a *app) policyCommand() *cobra.Command {
	return a.noun("policy", "Call policies: check, test and explain them",
		`A call policy says who may call a service. 'signet apply' puts policies into force and 'signet get policies' lists them; these
commands check them before, and explain what they decide.`,
		a.policyCheckCommand(), a.policyTestCommand(), a.policyExplainCommand(), a.policyReportCommand(),
		a.policyWhoCanCommand(), a.policyDiffCommand(), a.policyReplayCommand(), a.policyObservedCommand(), a.policySuggestCommand(), a.policyGraphCommand())
}

// livePolicies asks the CA for the policies that are in force.
func livePolicies(ctx context.Context, c *caConn) (*policy.Policies, spiffeid.TrustDomain, error) {
	set, err := policySet(ctx, c)
	if err != nil {
		return nil, spiffeid.TrustDomain{}, caError("asking the CA for its policies", c, err)
	}
	compiled, err := policy.Compile(set)
	if err != nil {
		return nil, spiffeid.TrustDomain{}, fmt.Errorf("reading the policies of the CA: %w", err)
	}
	td, err := spiffe.ParseTrustDomain(set.GetTrustDomain())
	return compiled, td, err
}

// policySet asks the CA for all policies in compiled form. An older CA sends them in one message.
func policySet(ctx context.Context, c *caConn) (*policyv1.PolicySet, error) {
	stream, err := adminv1.NewRolloutsClient(c).StreamPolicySet(ctx, &adminv1.StreamPolicySetRequest{})
	if err != nil {
		return nil, err
	}
	var set *policyv1.PolicySet
	for {
		answer, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF) && set != nil:
			return set, nil
		case status.Code(err) == codes.Unimplemented:
			answer, err := adminv1.NewAdminClient(c).GetPolicySet(ctx, &adminv1.GetPolicySetRequest{})
			return answer.GetPolicies(), err
		case err != nil:
			return nil, err
		case set == nil:
			set = answer.GetPart()
		default:
			set.Policies = append(set.Policies, answer.GetPart().GetPolicies()...)
			set.UserIssuers = append(set.UserIssuers, answer.GetPart().GetUserIssuers()...)
		}
	}
}

// compileDocuments compiles the policies among docs. A document of no known kind is a mistake: it may be a policy that
// somebody relies on.
func compileDocuments(docs []strictyaml.Document, td spiffeid.TrustDomain) (*policy.Policies, error) {
	set, err := policy.Check(docs, td)
	if err := errors.Join(checkKinds(docs), err); err != nil {
		return nil, err
	}
	return policy.Compile(set)
}

// checkKinds says which documents are of no known kind.
func checkKinds(docs []strictyaml.Document) error {
	var mistakes []error
	for _, doc := range docs {
		kind, line, column, ok := doc.Field("kind")
		if !ok {
			line, column = doc.Line, 1
		}
		switch kind {
		case registry.KindIdentity, policy.KindCallPolicy, policy.KindPolicyDefaults, policy.KindPolicyTest:
		default:
			mistakes = append(mistakes, fmt.Errorf("%s:%d:%d: kind is %q; it must be %s, %s, %s or %s", doc.File, line, column, kind,
				registry.KindIdentity, policy.KindCallPolicy, policy.KindPolicyDefaults, policy.KindPolicyTest))
		}
	}
	return errors.Join(mistakes...)
}

func (a *app) policyCheckCommand() *cobra.Command {
	var trustDomain string
	var strict bool
	cmd := &cobra.Command{
		Use:   "check [-f FILE...]",
		Short: "Check policy documents without a CA, or the policies in force",
		Long: `Check policy documents as 'signet apply' would, without a CA: every mistake is reported with file, line and column. Without -f the
policies in force are fetched from the CA and it is checked that this program understands all of them.

Warnings say what is hardly meant: rules that another one covers or denies, patterns that are wide, and, where Identities are among the documents or the
CA is asked, callers and services that nobody is.`,
		Example: `  signet policy check -f policies/ --trust-domain example.org
  signet policy check`,
	}
	output := outputFlag(cmd)
	files := filesFlag(cmd, "file or directory of documents, - for stdin (repeatable)")
	cmd.Flags().StringVar(&trustDomain, "trust-domain", "", "with -f: the trust domain of the services, such as example.org")
	cmd.Flags().BoolVar(&strict, "strict", false, "exit with status 1 if there are warnings")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		s, err := a.side(cmd, *files, trustDomain)
		if err != nil {
			return err
		}
		lint := analyse.Lint{Set: s.set, Documents: s.docs}
		if s.identities {
			lint.Known, lint.Ungoverned = s.known, true
		}
		found, omitted := lint.Findings()
		if err := a.showChecked(*output, s.set, s.td); err != nil {
			return err
		}
		return a.findings(found, omitted, strict)
	}
	return a.reachesCA(cmd)
}

// A checked policy is one that is well.
type checked struct {
	Name     string   `json:"name"`
	Mode     string   `json:"mode"`
	Services []string `json:"services"`
	Rules    int      `json:"rules"`
	File     string   `json:"file,omitempty"`
	Line     uint32   `json:"line,omitempty"`
	Unknown  int      `json:"rules_not_understood"`
}

func (a *app) showChecked(f format, set *policyv1.PolicySet, td spiffeid.TrustDomain) error {
	known := map[string]bool{}
	for _, name := range policy.Features() {
		known[name] = true
	}
	unknown := 0
	var items []checked
	for _, p := range set.GetPolicies() {
		c := checked{Name: p.GetName(), Mode: modeName(p.GetMode()), Services: p.GetServices(), Rules: len(p.GetRules()), File: p.GetFile(), Line: p.GetLine()}
		for _, r := range p.GetRules() {
			for _, feature := range r.GetRequires() {
				if !known[feature] {
					c.Unknown++
					break
				}
			}
		}
		unknown += c.Unknown
		items = append(items, c)
	}
	if err := list(a, f, fmt.Sprintf("no call policy for services of %s", td), []column[checked]{
		{name: "POLICY", value: func(c checked) string { return c.Name }},
		{name: "MODE", value: func(c checked) string { return c.Mode }},
		{name: "RULES", value: func(c checked) string { return fmt.Sprint(c.Rules) }},
		{name: "SERVICES", value: func(c checked) string { return strings.Join(c.Services, " ") }},
		{name: "FROM", value: func(c checked) string {
			if c.File == "" {
				return ""
			}
			return fmt.Sprintf("%s:%d", c.File, c.Line)
		}},
	}, items); err != nil {
		return err
	}
	if unknown > 0 {
		return withHint(fmt.Errorf("%s of these policies need features that this program does not know", count(unknown, "rule")), "it is older than the CA: upgrade it")
	}
	return nil
}

func modeName(m policyv1.Mode) string {
	switch m {
	case policyv1.Mode_MODE_ENFORCE:
		return "enforce"
	case policyv1.Mode_MODE_SHADOW:
		return "shadow"
	}
	return fmt.Sprintf("mode %d", m)
}

func (a *app) policyTestCommand() *cobra.Command {
	var live bool
	cmd := &cobra.Command{
		Use:   "test FILE...",
		Short: "Run tables of expected decisions",
		Long: `Run tables of expected decisions (documents of kind PolicyTest) against the policies that they name, or those in the same file.
No CA is needed, so it fits into any CI. With --live the tables run against the policies in force at the CA.

The exit status is 1 if any decision is not as expected; each is explained.`,
		Example: `  signet policy test policies_test.yaml
  signet policy test --live tests/*.yaml`,
		Args: someArgs("FILE"),
	}
	output := outputFlag(cmd)
	cmd.Flags().BoolVar(&live, "live", false, "test the policies in force at the CA")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		tables, err := a.readTables(cmd, args, live)
		if err != nil {
			return err
		}
		if live {
			if err := a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
				p, td, err := livePolicies(ctx, c)
				for i := range tables {
					if tables[i].policies = p; err == nil && tables[i].tests.TrustDomain != td {
						return fmt.Errorf("%s is about the trust domain %s, the CA is of %s", tables[i].file, tables[i].tests.TrustDomain, td)
					}
				}
				return err
			}); err != nil {
				return err
			}
		}
		var results []policy.TestResult
		for _, t := range tables {
			results = append(results, policy.RunTests(t.policies, t.tests)...)
		}
		return a.showResults(*output, results)
	}
	return a.reachesCA(cmd)
}

// A table is a PolicyTest with what it tests.
type table struct {
	file     string
	tests    *policy.Tests
	policies *policy.Policies
}

// readTables reads the PolicyTest documents in files and, unless live, compiles what they test.
func (a *app) readTables(cmd *cobra.Command, files []string, live bool) ([]table, error) {
	names, err := documentFiles(files)
	if err != nil {
		return nil, err
	}
	var tables []table
	for _, name := range names {
		docs, err := a.documentsFrom(cmd, []string{name})
		if err != nil {
			return nil, err
		}
		if err := checkKinds(docs); err != nil {
			return nil, err
		}
		for _, doc := range docs {
			if kind, _, _, _ := doc.Field("kind"); kind != policy.KindPolicyTest {
				continue
			}
			tests, err := policy.ParseTests(doc)
			if err != nil {
				return nil, err
			}
			t := table{file: inputName(name), tests: tests}
			if !live {
				tested := docs
				if len(tests.Policies) > 0 {
					var paths []string
					for _, p := range tests.Policies {
						if !filepath.IsAbs(p) && name != "-" {
							p = filepath.Join(filepath.Dir(name), p)
						}
						paths = append(paths, p)
					}
					if tested, err = a.documentsFrom(cmd, paths); err != nil {
						return nil, fmt.Errorf("%s:%d: policies: %w", inputName(name), doc.Line, err)
					}
				}
				if t.policies, err = compileDocuments(tested, tests.TrustDomain); err != nil {
					return nil, err
				}
			}
			tables = append(tables, t)
		}
	}
	if len(tables) == 0 {
		return nil, withHint(fmt.Errorf("there is no document of kind %s in %q", policy.KindPolicyTest, files), "'signet policy check' checks policies without tests")
	}
	return tables, nil
}

// A result is one line of a table that was run.
type result struct {
	Case    string `json:"case"`
	File    string `json:"file,omitempty"`
	Line    int    `json:"line,omitempty"`
	Passed  bool   `json:"passed"`
	Message string `json:"message,omitempty"`
}

func (a *app) showResults(f format, results []policy.TestResult) error {
	failed := 0
	items := make([]result, len(results))
	for i, r := range results {
		items[i] = result{Case: r.Case.Name, File: r.Case.File, Line: r.Case.Line, Passed: r.Passed, Message: r.Message}
		if !r.Passed {
			failed++
		}
	}
	if f == formatJSON || f == formatYAML {
		if err := list(a, f, "", nil, items); err != nil {
			return err
		}
	} else {
		for i, r := range results {
			if r.Passed {
				if f == formatWide {
					fmt.Fprintf(a.stdout, "%s  %s\n", paint(a.color, green, "ok  "), escape(items[i].Case))
				}
				continue
			}
			fmt.Fprintf(a.stdout, "%s  %s\n", paint(a.color, red, "FAIL"), escape(r.Message))
			for line := range strings.Lines(r.Explanation.String()) {
				fmt.Fprintf(a.stdout, "      %s\n", escape(strings.TrimRight(line, "\n")))
			}
		}
		fmt.Fprintf(a.stdout, "%d of %s as expected\n", len(results)-failed, count(len(results), "decision"))
	}
	if failed > 0 {
		return fmt.Errorf("%s not as expected", count(failed, "decision"))
	}
	return nil
}
