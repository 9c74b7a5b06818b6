package cli

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/analyse"
	"github.com/signet-id/signet/spiffe"
)

// A call is what the flags of explain describe.
type call struct {
	from, to, http, grpc, contentType, subject, trustDomain string
	claims, user, userClaims, hint                          string
	audience, headers                                       []string
	methodOverride                                          bool
}

func (a *app) policyExplainCommand() *cobra.Command {
	var k call
	cmd := &cobra.Command{
		Use:   "explain --from ID --to ID [--http REQUEST | --grpc METHOD]",
		Short: "Say whether a call is allowed, and which rule decides, with file and line",
		Long: `Say whether a call is allowed, which rule decides, and where it is written; and of the other rules, what does not fit. Of a denied
call it also says which rule would have allowed it with the smallest change, and what that change is. Without --http
and --grpc the call is a TLS connection of which only the caller is known.

The policies in force are asked from the CA; with -f those in files are taken, and no CA is needed. The exit status is 0 whether the
call is allowed or not: 'signet policy test' is for CI.`,
		Example: `  signet policy explain --from /web --to /documents --http "GET /v1/documents/7"
  signet policy explain --from spiffe://example.org/web --to spiffe://example.org/documents --grpc documents.v1.Documents/Get -f policies/`,
	}
	output := outputFlag(cmd)
	files := filesFlag(cmd, "file or directory of documents instead of the policies in force, - for stdin (repeatable)")
	fs := cmd.Flags()
	fs.StringVar(&k.from, "from", "", "the caller")
	fs.StringVar(&k.to, "to", "", "the service that is called")
	fs.StringVar(&k.http, "http", "", "an HTTP request: method and target, such as \"GET /v1/documents\"")
	fs.StringVar(&k.grpc, "grpc", "", "a gRPC call: pkg.Service/Method")
	fs.StringVar(&k.contentType, "content-type", "", "with --http: its Content-Type")
	fs.BoolVar(&k.methodOverride, "method-override", false, "with --http: it has a header such as X-HTTP-Method-Override")
	fs.StringArrayVar(&k.audience, "audience", nil, "the caller also presents a valid JWT-SVID for this audience (repeatable)")
	fs.StringVar(&k.subject, "subject", "", "with --audience: whose JWT-SVID it is (default: the caller's)")
	fs.StringVar(&k.claims, "claims", "", "with --audience: the claims of the JWT-SVID, a JSON object")
	fs.StringArrayVar(&k.headers, "header", nil, "with --http or --grpc: a header, such as \"x-tenant: blue\" (repeatable)")
	fs.StringVar(&k.user, "user-issuer", "", "with --http or --grpc: the caller also presents a valid user token of this issuer")
	fs.StringVar(&k.userClaims, "user-claims", "", "with --user-issuer: the claims of the user, a JSON object")
	fs.StringVar(&k.hint, "hint", "", "the hint of the caller's registration entry (default: what the policies know)")
	fs.StringVar(&k.trustDomain, "trust-domain", "", "with -f: the trust domain of the services (default: that of --to)")
	exclusive(cmd, "http", "grpc")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := k.check(cmd, len(*files) > 0); err != nil {
			return err
		}
		if len(*files) == 0 {
			return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
				p, td, err := livePolicies(ctx, c)
				if err != nil {
					return err
				}
				return a.explain(*output, p, td, k)
			})
		}
		td, err := k.domain()
		if err != nil {
			return err
		}
		docs, err := a.documentsFrom(cmd, *files)
		if err != nil {
			return err
		}
		p, err := compileDocuments(docs, td)
		if err != nil {
			return err
		}
		return a.explain(*output, p, td, k)
	}
	return a.reachesCA(cmd)
}

func (k call) check(cmd *cobra.Command, offline bool) error {
	var problem string
	switch {
	case k.from == "":
		problem = "--from is missing: the caller"
	case k.to == "":
		problem = "--to is missing: the service that is called"
	case (k.contentType != "" || k.methodOverride) && k.http == "":
		problem = "--content-type and --method-override go with --http only"
	case (k.subject != "" || k.claims != "") && len(k.audience) == 0:
		problem = "--subject and --claims go with --audience only"
	case (len(k.headers) > 0 || k.user != "") && k.http == "" && k.grpc == "":
		problem = "--header and --user-issuer go with --http or --grpc only"
	case k.userClaims != "" && k.user == "":
		problem = "--user-claims goes with --user-issuer only"
	case k.trustDomain != "" && !offline:
		problem = "--trust-domain goes with -f only: the CA knows its own"
	default:
		return nil
	}
	return &usageError{err: fmt.Errorf("%s", problem), hint: example(cmd)}
}

// domain is the trust domain for policies from files.
func (k call) domain() (spiffeid.TrustDomain, error) {
	switch {
	case k.trustDomain != "":
		td, err := spiffe.ParseTrustDomain(k.trustDomain)
		if err != nil {
			return td, usagef("--trust-domain: %w", err)
		}
		return td, nil
	case strings.HasPrefix(k.to, "/"):
		return spiffeid.TrustDomain{}, usagef("--to %q is relative: with -f also give --trust-domain, or write the ID out", k.to)
	}
	id, err := fullID("--to", k.to)
	return id.TrustDomain(), err
}

// request turns the flags into what an enforcement point would see.
func (k call) request(td spiffeid.TrustDomain) (*policy.Request, error) {
	resolve := func(flag, s string) (spiffeid.ID, error) {
		if strings.HasPrefix(s, "/") {
			s = td.IDString() + s
		}
		return fullID(flag, s)
	}
	r := &policy.Request{HasMethodOverride: k.methodOverride}
	var err error
	if r.Peer, err = resolve("--from", k.from); err != nil {
		return nil, err
	}
	if r.Service, err = resolve("--to", k.to); err != nil {
		return nil, err
	}
	switch {
	case k.http != "":
		var found bool
		r.Protocol = policy.ProtocolHTTP
		if r.Method, r.Path, found = strings.Cut(k.http, " "); !found || r.Method == "" || r.Path == "" {
			return nil, usagef("--http %q is not a method and a target, such as \"GET /v1/documents\"", k.http)
		}
		if k.contentType != "" {
			r.ContentTypes = []string{k.contentType}
		}
	case k.grpc != "":
		service, method, found := strings.Cut(strings.TrimPrefix(k.grpc, "/"), "/")
		if !found || service == "" || method == "" || method == "*" {
			return nil, usagef("--grpc %q is not one method, such as documents.v1.Documents/Get", k.grpc)
		}
		r.Protocol, r.Method, r.Path, r.ContentTypes = policy.ProtocolHTTP, "POST", "/"+service+"/"+method, []string{"application/grpc"}
	}
	if len(k.audience) > 0 {
		r.Token = &policy.Token{ID: r.Peer, Audience: k.audience}
		if k.subject != "" {
			if r.Token.ID, err = resolve("--subject", k.subject); err != nil {
				return nil, err
			}
		}
	}
	return r, k.conditions(r)
}

// conditions adds what only conditions ask for.
func (k call) conditions(r *policy.Request) error {
	headers := make(http.Header)
	for _, line := range k.headers {
		name, value, found := strings.Cut(line, ":")
		if !found || name == "" {
			return usagef("--header %q is not a name and a value, such as \"x-tenant: blue\"", line)
		}
		headers.Add(name, strings.TrimSpace(value))
	}
	r.Headers = headers
	var err error
	if r.Token != nil {
		if k.claims != "" {
			if r.Token.Claims, err = policy.ParseClaims(k.claims); err != nil {
				return usagef("--claims: %w", err)
			}
		}
		r.Token.Claims = policy.StandardClaims(r.Token)
	}
	if k.user != "" {
		r.User = &policy.User{Issuer: k.user}
		if k.userClaims != "" {
			if r.User.Claims, err = policy.ParseClaims(k.userClaims); err != nil {
				return usagef("--user-claims: %w", err)
			}
		}
	}
	return nil
}

func (a *app) explain(f format, p *policy.Policies, td spiffeid.TrustDomain, k call) error {
	r, err := k.request(td)
	if err != nil {
		return err
	}
	if k.hint != "" {
		p = p.WithPeerHint(r.Peer, k.hint)
	}
	e := explained{Explanation: p.Explain(r)}
	if !e.Decision.Allowed {
		remedy := analyse.Nearest(p, r)
		e.Nearest = &remedy
	}
	if f == formatJSON || f == formatYAML {
		return a.show(f, e, nil)
	}
	var b strings.Builder
	first := true
	for line := range strings.Lines(e.String()) {
		line = escape(strings.TrimRight(line, "\n"))
		if word, rest, found := strings.Cut(line, ":"); first && found {
			color := red
			if e.Decision.Allowed {
				color = green
			}
			line = paint(a.color, color, word) + ":" + rest
		}
		first = false
		b.WriteString(line + "\n")
	}
	if e.Nearest != nil {
		b.WriteString(a.remedy(*e.Nearest))
	}
	_, err = io.WriteString(a.stdout, b.String())
	return err
}

// explained is an explanation with what would let the call through, if it is denied.
type explained struct {
	policy.Explanation
	Nearest *analyse.Remedy `json:"nearest,omitempty"`
}

// remedy prints what would let a denied call through.
func (a *app) remedy(m analyse.Remedy) string {
	var b strings.Builder
	for line := range strings.Lines(m.String()) {
		line = escape(strings.TrimRight(line, "\n"))
		color := ""
		switch {
		case strings.HasPrefix(line, "    + "):
			color = green
		case strings.HasPrefix(line, "    - "):
			color = red
		}
		b.WriteString(paint(a.color, color, line) + "\n")
	}
	return b.String()
}
