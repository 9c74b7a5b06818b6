package demo

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// onStage makes a show whose processes are this test program as signet; see TestMain.
func onStage(t *testing.T) (*show, *strings.Builder) {
	t.Helper()
	t.Setenv("SIGNET_DEMO_TEST_AS_SIGNET", "1")
	tmp, err := os.MkdirTemp("", "demotest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(tmp) })
	t.Setenv("TMPDIR", tmp)
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	st, err := newStage(program, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.close(false); err != nil {
			t.Error(err)
		}
		if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	})
	var out strings.Builder
	return &show{report: report{w: &out}, stage: st, began: time.Now()}, &out
}

func TestWrongPolicyFailsItsCheck(t *testing.T) {
	s, out := onStage(t)
	// The policy lets utility-service read from the start, which the demo says it may not.
	if err := s.write(map[string]string{"policy.yaml": s.documentFiles()["policy-open.yaml"]}); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	if err := s.issue(ctx); err != nil {
		t.Fatal(s.explain(ctx, err), out)
	}
	err := s.explain(ctx, s.callAndRefuse(ctx))
	var failed *CheckError
	if !errors.As(err, &failed) || !strings.HasPrefix(failed.Check, "utility-service GET /v1/documents/7") ||
		failed.Want != "status 403 with a decision id" || failed.Got != `200 document "7"` {
		t.Fatalf("callAndRefuse = %v, want a CheckError about utility-service", err)
	}
	for _, want := range []string{"   FAIL utility-service GET /v1/documents/7", "expected: status 403 with a decision id", `seen:     200 document "7"`,
		"the end of the log of ca:", "the end of the log of agent:"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the report lacks %q:\n%s", want, out)
		}
	}
}

func TestMissingIdentityFails(t *testing.T) {
	s, _ := onStage(t)
	// All three entries are for a program that nobody runs.
	text := strings.ReplaceAll(s.identities(0), "/bin/", "/nowhere/")
	if err := s.write(map[string]string{"identities.yaml": text}); err != nil {
		t.Fatal(err)
	}
	if err := s.admit(t.Context()); err == nil || !strings.Contains(err.Error(), "cannot be reached") {
		t.Errorf("without a CA: %v, want what the command line says", err)
	}
	if err := s.startCA(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.admit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.startAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.crew.run(t.Context(), s.binary(Trusty), "svid", "fetch", "x509"); err == nil || !strings.Contains(err.Error(), "no identity issued") {
		t.Errorf("svid fetch as trusty-service: %v, want that no identity is issued", err)
	}
}

func TestStageRefusesLongDirectory(t *testing.T) {
	long := filepath.Join(t.TempDir(), strings.Repeat("d", 100))
	if err := os.Mkdir(long, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", long)
	_, err := newStage("/proc/self/exe", nil)
	if err == nil || !strings.Contains(err.Error(), "set TMPDIR to a shorter one") {
		t.Errorf("newStage = %v, want a hint at TMPDIR", err)
	}
	if left, err := os.ReadDir(long); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestReport(t *testing.T) {
	var out strings.Builder
	r := report{w: &out, unicode: true}
	if err := r.check(true, "one\x1b[2J", "", ""); err != nil || r.checks != 1 {
		t.Errorf("check = %v, %d checks; want nil and 1", err, r.checks)
	}
	err := r.check(false, "two", "2", "3")
	if err == nil || err.Error() != "two: expected 2, saw 3" || r.checks != 1 {
		t.Errorf("check = %v, %d checks; want an error and 1", err, r.checks)
	}
	r.color = true
	r.failed(&CheckError{"two", "2", "3\r"})
	if want := "   ✓ one\uFFFD[2J\n   \x1b[31m✗\x1b[0m two\n        expected: 2\n        seen:     3\uFFFD\n"; out.String() != want {
		t.Errorf("report = %q, want %q", out.String(), want)
	}
	r = report{w: io.Discard}
	if r.mark(true) != "ok  " || r.mark(false) != "FAIL" {
		t.Errorf("without UTF-8 the marks are %q and %q", r.mark(true), r.mark(false))
	}
}
