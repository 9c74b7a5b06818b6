package observe

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/signet-id/signet/internal/cli"
	"github.com/signet-id/signet/test/signettest"
)

// run runs signet and returns its exit status and what it printed.
func run(ctx context.Context, args ...string) (int, string, string) {
	var out, errs bytes.Buffer
	code := cli.Main(ctx, args, strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

// contains reports what of wanted is not in text.
func contains(t *testing.T, text string, wanted ...string) {
	t.Helper()
	for _, w := range wanted {
		if !strings.Contains(text, w) {
			t.Errorf("%q is not in:\n%s", w, text)
		}
	}
}

// TestWhyDenied asks as an operator: by id, by peer and service, at the CA and at the agent when the CA is away.
func TestWhyDenied(t *testing.T) {
	t.Parallel()
	w := newWorld(t, signettest.Config{})
	url := w.serve()
	c := w.client(reader)
	code, id := w.call(c, "POST", url+"/v1/a?secret=1")
	if code != http.StatusForbidden {
		t.Fatalf("POST answers %d", code)
	}
	socket := "--socket=" + w.CASocket()
	var out, errs string
	ask := func(args ...string) int {
		t.Helper()
		var code int
		code, out, errs = run(w.ctx, append([]string{"why-denied"}, args...)...)
		return code
	}
	w.until("the CA knows", func() error {
		if code, _, errs := run(w.ctx, "why-denied", socket, id); code != 0 {
			return errorText(errs)
		}
		return nil
	})
	if code := ask(socket, id); code != 0 || errs != "" {
		t.Fatalf("exit status %d: %s", code, errs)
	}
	contains(t, out, "denied: no rule allows it", id, reader, service, "HTTP POST /v1/a", "the Go library's HTTP middleware on the node of spiffe://example.org/spire/agent/",
		"now, at revision ", "denied: no rule allows it", "smallest change:", "test.yaml:16: documents allow: add \"POST\" to methods", "of which none are kept")
	if strings.Contains(out, "secret") {
		t.Errorf("the query is told:\n%s", out)
	}

	if code := ask(socket, "-o", "json", id); code != 0 {
		t.Fatalf("exit status %d: %s", code, errs)
	}
	var story struct {
		DecisionID string `json:"decision_id"`
		Reason     string
		Now        struct {
			Allowed bool
			Changed *bool `json:"policy_changed"`
		}
		Nearest struct {
			Changes []struct{ Steps []struct{ Edits []string } }
		}
	}
	if err := json.Unmarshal([]byte(out), &story); err != nil || story.DecisionID != id || story.Reason != "no_allow" || story.Now.Allowed || len(story.Nearest.Changes) == 0 {
		t.Errorf("JSON: %v\n%s", err, out)
	}

	// The handshake tells its caller nothing: it is found by who called whom.
	w.refusedAtTheHandshake(strings.TrimPrefix(url, "https://"), service)
	w.until("the CA knows of the handshake", func() error {
		if code, _, errs := run(w.ctx, "why-denied", socket, "--peer", "/documents", "--service", "/documents", "--last"); code != 0 {
			return errorText(errs)
		}
		return nil
	})
	if code := ask(socket, "--peer", "/documents", "--service", "/documents", "--last"); code != 0 {
		t.Fatalf("exit status %d: %s", code, errs)
	}
	contains(t, out, "denied: no rule allows it", "TLS connection")

	if code := ask(socket, "NEVERMADE"); code != 1 {
		t.Errorf("an unknown id: exit status %d", code)
	}
	contains(t, errs, "which keeps decisions for 168h0m0s", "hint:", "policy report")
	for _, wrong := range [][]string{{}, {id, "--peer", "/x"}, {"--peer", "/x", "--last=0"}, {"--service", "x"}} {
		if code := ask(append(wrong, socket)...); code != 2 {
			t.Errorf("%q: exit status %d, want 2: %s", wrong, code, errs)
		}
	}

	// What is allowed by now is told.
	w.Apply(strings.Replace(documents, "methods: [GET]", "methods: [GET, POST]", 1))
	if code := ask(socket, id); code != 0 {
		t.Fatalf("exit status %d: %s", code, errs)
	}
	contains(t, out, "denied: no rule allows it", "(the policy has changed since)", "allowed: test.yaml:16: documents allows it")
	if strings.Contains(out, "smallest change") {
		t.Errorf("a change is proposed for what is allowed by now:\n%s", out)
	}

	if code, out, errs := run(w.ctx, "policy", "report", socket, "--since", "1h", "--service", "/documents"); code != 0 || errs != "" {
		t.Errorf("report: %d %s", code, errs)
	} else {
		contains(t, out, "SERVICE", "denied", "no_allow", "PEERS")
	}
	if code, out, errs := run(w.ctx, "policy", "report", socket, "--calls", "-o", "json"); code != 0 || errs != "" {
		t.Errorf("report: %d %s", code, errs)
	} else {
		var lines []struct {
			Kind, Call string
			Count      int
			DecisionID string `json:"decision_id"`
		}
		if err := json.Unmarshal([]byte(out), &lines); err != nil || len(lines) != 2 {
			t.Errorf("report: %v\n%s", err, out)
		}
		for _, l := range lines {
			if l.Kind != "denied" || l.Count != 1 || l.Call == "HTTP POST /v1/a" && l.DecisionID != id {
				t.Errorf("report: %+v", l)
			}
		}
	}

	// Without the CA the agent of the node knows.
	if err := w.StopCA(); err != nil {
		t.Fatal(err)
	}
	agent := "--agent-socket=" + w.AgentAdminSocket()
	if code := ask(socket, agent, id); code != 0 {
		t.Fatalf("exit status %d: %s", code, errs)
	}
	contains(t, out, id, "HTTP POST /v1/a", "allowed: test.yaml:16: documents allows it")
	contains(t, errs, "the CA was not asked")
	if code := ask("--agent", agent, "--service", "/documents", "--last=10"); code != 0 || strings.Count(out, "decision:") != 2 {
		t.Errorf("exit status %d: %s\n%s", code, errs, out)
	}
	if code := ask("--agent", agent, "NEVERMADE"); code != 1 || !strings.Contains(errs, "none of before its start at "+time.Now().UTC().Format("2006-")) {
		t.Errorf("an unknown id: exit status %d: %s", code, errs)
	}
}

type errorText string

func (e errorText) Error() string { return string(e) }
