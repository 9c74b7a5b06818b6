package demo

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	firstCalls = 5 * time.Second // from nothing to the first call allowed and the first refused
	document   = "/v1/documents/7"
	archived   = "/v1/archive/7"
)

// issue starts everything and looks at who is who.
func (s *show) issue(ctx context.Context) error {
	s.step("Identities", "The CA signs for trust domain "+trustDomain+". The agent proves itself with a join token. Each service asks the agent's\n"+
		"socket who it is; the agent looks at the process, here at the path of its program, and hands it an X509-SVID.")
	s.command("signet ca run --config ca.yaml")
	if err := s.startCA(ctx); err != nil {
		return err
	}
	s.command("signet token create > join.token")
	s.command("signet apply -f identities.yaml -f policy.yaml")
	if err := s.admit(ctx); err != nil {
		return err
	}
	s.command("signet agent run --config agent.yaml")
	if err := s.startAgent(ctx); err != nil {
		return err
	}
	states := make(map[string]state)
	start := func(name string) error {
		st, err := s.startService(ctx, name)
		states[name] = st
		return err
	}
	for _, name := range []string{Documents, Trusty, Utility} {
		if err := start(name); err != nil {
			return err
		}
	}
	for _, name := range []string{Documents, Trusty, Utility} {
		st, want := states[name], "spiffe://"+trustDomain+"/"+name
		claim := fmt.Sprintf("%s is %s, serial %s, valid until %s", name, st.ID, short(st.Serial), st.NotAfter.Local().Format("15:04:05"))
		if err := s.check(st.ID == want && time.Until(st.NotAfter) > 0, claim, "the valid X509-SVID of "+want, fmt.Sprintf("%q until %v", st.ID, st.NotAfter)); err != nil {
			return err
		}
	}
	err := s.askAsStranger(ctx)
	return s.check(status.Code(err) == codes.PermissionDenied, "a process that no Identity matches gets none", "PermissionDenied", fmt.Sprint(err))
}

// admit makes the token for the agent and the documents, at the same time.
func (s *show) admit(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		token, err := s.signet(ctx, "token", "create")
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(s.dir, "join.token"), []byte(token), 0o600)
	})
	g.Go(func() error {
		_, err := s.signet(ctx, "apply", "-f", "identities.yaml", "-f", "policy.yaml")
		return err
	})
	return g.Wait()
}

// callAndRefuse makes the first calls.
func (s *show) callAndRefuse(ctx context.Context) error {
	s.step("A call that is allowed, and one that is refused", "documents-service may be read by trusty-service and by nobody else: policy.yaml says so. Calls are mTLS between the two\n"+
		"processes; documents-service itself asks the policy, which the agent keeps up to date.")
	if err := s.checkCall(ctx, Trusty, http.MethodGet, document, "", http.StatusOK, ""); err != nil {
		return err
	}
	if err := s.checkCall(ctx, Utility, http.MethodGet, document, "", http.StatusForbidden, ""); err != nil {
		return err
	}
	took := time.Since(s.began)
	if err := s.check(took < firstCalls, fmt.Sprintf("from nothing to here in %v", took.Round(time.Millisecond)), "less than "+firstCalls.String(), took.String()); err != nil {
		return err
	}
	if err := s.checkCall(ctx, Utility, http.MethodGet, health, "", http.StatusOK, " (it was that request that was refused, not the caller)"); err != nil {
		return err
	}
	if err := s.checkCall(ctx, Trusty, http.MethodPost, document, "", http.StatusForbidden, " (it may read, not write)"); err != nil {
		return err
	}
	err := s.callWithoutSVID(ctx)
	return s.check(err != nil && strings.Contains(err.Error(), "remote error: tls:"), "a caller without an SVID does not get through the TLS handshake",
		"an alert of the server", fmt.Sprint(err))
}

// checkCall makes a service call documents-service and checks how it is answered. A refusal must name its decision.
func (s *show) checkCall(ctx context.Context, from, method, path, audience string, want int, because string) error {
	o, err := s.call(ctx, from, method, path, audience)
	if err != nil {
		return err
	}
	text := fmt.Sprintf("%s %s %s", from, method, path)
	if audience != "" {
		text += fmt.Sprintf(" with a JWT-SVID for %q", audience)
	}
	switch {
	case want == http.StatusOK:
		text += ": allowed"
	default:
		text += ": refused"
		if o.DecisionID != "" {
			text += ", decision " + o.DecisionID
		}
	}
	ok := o.Error == "" && o.Status == want && (want == http.StatusOK) == (o.DecisionID == "")
	expected := fmt.Sprintf("status %d", want)
	if want != http.StatusOK {
		expected += " with a decision id"
	}
	return s.check(ok, text+because, expected, o.String())
}

// callWithoutSVID calls as anybody on the network would.
func (s *show) callWithoutSVID(ctx context.Context) error {
	transport := &http.Transport{DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}} // whoever answers: it is we who must be refused
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+s.documents+document, nil)
	if err != nil {
		return err
	}
	response, err := (&http.Client{Transport: transport, Timeout: callWait}).Do(request)
	if err != nil {
		return err
	}
	return response.Body.Close()
}

// why asks for the reason of a refusal.
func (s *show) why(ctx context.Context) error {
	s.step("Why was it refused?", "The caller learns only the decision id. The operator finds it in the log of documents-service, and asks the CA\n"+
		"about the same call.")
	o, err := s.call(ctx, Utility, http.MethodGet, document, "")
	if err != nil {
		return err
	}
	line := s.logged(o.DecisionID)
	if err := s.check(o.DecisionID != "" && strings.Contains(line, "reason=no_allow"), "decision "+o.DecisionID+" is in the log of documents-service: reason=no_allow",
		"a line of the log with decision_id="+o.DecisionID+" and reason=no_allow", fmt.Sprintf("%q", line)); err != nil {
		return err
	}
	said, err := s.explainCall(ctx, Utility, document)
	if err != nil {
		return err
	}
	if err := s.check(strings.HasPrefix(said, "denied: no rule allows it\n") && strings.Contains(said, "policy.yaml:5: documents: allow: the caller"),
		"policy explain comes to the same answer and says of each rule, with file and line, what does not fit", "denied, and policy.yaml:5", said); err != nil {
		return err
	}
	revision := regexp.MustCompile(`(?m)^  revision +([0-9]+)$`).FindStringSubmatch(said)
	if err := s.check(len(revision) == 2 && strings.Contains(line, "revision="+revision[1]+" "), "both speak of the same revision of the policies",
		fmt.Sprintf("the revision in %q", line), said); err != nil {
		return err
	}
	return s.whyDenied(ctx, o.DecisionID)
}

// logged returns the line of documents-service's log about a decision. It is written before the answer is sent.
func (s *show) logged(decision string) string {
	for line := range strings.Lines(s.crew.tail(Documents)) {
		if decision != "" && strings.Contains(line, "decision_id="+decision) {
			return line
		}
	}
	return ""
}

// explainCall runs policy explain in front of the person.
func (s *show) explainCall(ctx context.Context, from, path string) (string, error) {
	s.command(fmt.Sprintf("signet policy explain --from /%s --to /%s --http %q", from, Documents, "GET "+path))
	said, err := s.signet(ctx, "policy", "explain", "--from", "/"+from, "--to", "/"+Documents, "--http", "GET "+path)
	if err == nil {
		s.output(nearest(said))
	}
	return said, err
}

// tokens shows JWT-SVIDs.
func (s *show) tokens(ctx context.Context) error {
	s.step("JWT-SVIDs", "The archive also wants a JWT-SVID of its caller, made out to \"documents\". One that is stolen elsewhere, made out to\n"+
		"somebody else, is worth nothing here.")
	for _, c := range []struct {
		audience string
		want     int
		because  string
	}{{audience, http.StatusOK, ""}, {"somebody-else", http.StatusForbidden, ""}, {"", http.StatusForbidden, " (it brought none)"}} {
		if err := s.checkCall(ctx, Trusty, http.MethodGet, archived, c.audience, c.want, c.because); err != nil {
			return err
		}
	}
	said, err := s.explainCall(ctx, Trusty, archived)
	if err != nil {
		return err
	}
	return s.check(strings.HasPrefix(said, "denied: policy.yaml:7: documents would allow it with a fitting JWT-SVID\n"),
		"policy explain names the rule that asks for the token", "denied: policy.yaml:7: documents would allow it with a fitting JWT-SVID", said)
}
