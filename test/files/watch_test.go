package files

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
)

// TestOutage: while the agent is away the files stay, and it is said what ends; when it is back they go on.
func TestOutage(t *testing.T) {
	s := start(t)
	identity(s, "web", "x509TTL: 6s")
	dir := under(t, "svid")
	h := fetch(t, s, "x509", "--write", dir, "--watch")
	h.says("spiffe://example.org/web")
	if err := s.StopAgent(); err != nil {
		t.Fatal(err)
	}
	before := leaf(t, filepath.Join(dir, "svid.pem"))
	h.says("ends at " + before.NotAfter.UTC().Format("2006-01-02T15:04:05Z") + " and was not renewed yet")
	h.says("has ended at")
	if after := leaf(t, filepath.Join(dir, "svid.pem")); !after.Equal(before) {
		t.Error("the files have changed without an agent")
	}
	if err := s.RestartAgent(context.Background()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the files follow again", func() bool { return !leaf(t, filepath.Join(dir, "svid.pem")).Equal(before) })
	h.stop()
}

// TestIdentityGone: the files stay, and that is said; or they go and the program is told, if the operator wants that. When
// the identity is back, so are the files.
func TestIdentityGone(t *testing.T) {
	s := start(t)
	identity(s, "web")
	keep, drop := under(t, "keep"), under(t, "drop")
	event := under(t, "event")
	script := filepath.Join(filepath.Dir(event), "told")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho \"$SIGNET_EVENT $SIGNET_DIR\" >> "+event+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	told := func() string {
		b, _ := os.ReadFile(event) // not there yet
		return string(b)
	}
	keeping := fetch(t, s, "x509", "--write", keep, "--watch")
	dropping := fetch(t, s, "x509", "--write", drop, "--watch", "--remove-when-gone", "--exec", script)
	keeping.says("spiffe://example.org/web")
	eventually(t, "the program is told", func() bool { return told() == "renewed "+drop+"\n" })

	s.Delete("Identity", "web")
	keeping.says("the identity is gone, and the files stay")
	eventually(t, "the program is told of the removal", func() bool { return told() == "renewed "+drop+"\nremoved "+drop+"\n" })
	if _, err := os.Lstat(filepath.Join(drop, "key.pem")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the key is still there: %v", err)
	}
	if c := leaf(t, filepath.Join(keep, "svid.pem")); len(c.URIs) != 1 {
		t.Error("the files that should stay did not")
	}
	identity(s, "web")
	eventually(t, "the files are back", func() bool {
		_, err := os.Stat(filepath.Join(drop, "key.pem"))
		return err == nil && strings.Count(told(), "renewed") == 2
	})
	keeping.stop()
	dropping.stop()
}

// TestTokensByAudience keeps a token for each audience, alone and beside X509-SVIDs, through renewals.
func TestTokensByAudience(t *testing.T) {
	s := start(t)
	identity(s, "web", "jwtTTL: 8s")
	alone, both := under(t, "tokens"), under(t, "both")
	a := fetch(t, s, "jwt", "--audience", "reports", "--audience", "https://billing.internal", "--write", alone, "--watch")
	b := fetch(t, s, "x509", "--audience", "reports", "--write", both, "--watch", "--mode", "0640")
	read := func(path, audience string) string {
		text, err := os.ReadFile(path)
		if err != nil {
			return ""
		}
		svid, err := jwtsvid.ParseInsecure(strings.TrimSpace(string(text)), []string{audience})
		if err != nil || len(svid.Audience) != 1 {
			t.Fatalf("%s: %v", path, err)
		}
		return svid.Marshal()
	}
	paths := map[string]string{filepath.Join(alone, "reports.jwt"): "reports", filepath.Join(alone, "https___billing.internal.jwt"): "https://billing.internal",
		filepath.Join(both, "reports.jwt"): "reports"}
	for path, audience := range paths {
		seen := map[string]bool{}
		eventually(t, path+" has three tokens", func() bool {
			if token := read(path, audience); token != "" {
				seen[token] = true
			}
			return len(seen) >= 3
		})
	}
	for path, want := range map[string]fs.FileMode{filepath.Join(alone, "reports.jwt"): 0o600, filepath.Join(both, "reports.jwt"): 0o640, filepath.Join(both, "key.pem"): 0o640,
		filepath.Join(both, "svid.pem"): 0o644} {
		if info, err := os.Stat(path); err != nil || info.Mode() != want {
			t.Errorf("%s has mode %v, want %v (%v)", path, info.Mode(), want, err)
		}
	}
	a.stop()
	b.stop()
	for _, h := range []*helper{a, b} {
		if strings.Contains(h.out.String(), "eyJ") || strings.Contains(h.out.String(), "PRIVATE KEY") {
			t.Error("a helper prints a secret")
		}
	}
}

// TestFailingProgramIsToldAgain: a program that fails is run again until it works.
func TestFailingProgramIsToldAgain(t *testing.T) {
	s := start(t)
	identity(s, "web")
	dir := under(t, "svid")
	base := filepath.Dir(dir)
	script := filepath.Join(base, "flaky")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho again >> "+base+"/runs\n[ $(wc -l < "+base+"/runs) -ge 3 ] || { echo 'not yet \033[31m' >&2; exit 7; }\ntouch "+base+"/ok\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	h := fetch(t, s, "x509", "--write", dir, "--watch", "--exec", script)
	eventually(t, "the program works in the end", func() bool {
		_, err := os.Stat(filepath.Join(base, "ok"))
		return err == nil
	})
	if out := h.out.String(); strings.Count(out, "exit status 7: not yet") != 2 || strings.Contains(out, "\033[31m") {
		t.Errorf("the failures are told as %q", out)
	}
	h.stop()
}

func TestExitStatus(t *testing.T) {
	s := start(t)
	dir := under(t, "svid")
	other := under(t, "other")
	status := func(want int, words string, args ...string) {
		t.Helper()
		h := fetch(t, s, args...)
		if code := h.ends(); code != want || !strings.Contains(h.out.String(), words) {
			t.Errorf("%q ends with status %d and %q; want %d and %q", args, code, h.out.String(), want, words)
		}
	}
	status(1, "no identity issued", "x509", "--write", dir)
	identity(s, "web")
	status(0, "", "x509", "--write", dir, "--exec", "true")
	status(1, "running false: exit status 1", "x509", "--write", dir, "--exec", "false")
	status(1, "pid file", "x509", "--write", dir, "--signal", "HUP", "--pid-file", "/nowhere/pid")
	status(1, "", "x509", "--write", "/proc/nowhere", "--watch") // the first files cannot be written
	status(2, "without anything for others", "x509", "--write", dir, "--mode", "0644")
	status(2, "--owner", "x509", "--write", dir, "--owner", "no-such-user-here")
	status(2, "is no name for a file", "x509", "--write", dir, "--key-file", "../key.pem")
	status(2, `two files would have the name "svid.pem"`, "x509", "--write", dir, "--combined", "svid.pem")
	status(2, "without --write DIR", "x509", "--exec", "true")
	status(2, "needs one of --pid-file and --pid", "x509", "--write", dir, "--signal", "HUP")
	status(2, "is not HUP", "x509", "--write", dir, "--signal", "KILL", "--pid", "2")
	status(2, "which is missing", "x509", "--write", dir, "--pid", "2")
	status(2, "would both be the file a_b.jwt", "jwt", "--audience", "a/b", "--audience", "a:b", "--watch", "--write", dir)
	status(2, "give --watch too", "jwt", "--audience", "a", "--write", filepath.Join(dir, "x"), "--exec", "true")

	h := fetch(t, s, "x509", "--write", other, "--watch")
	h.says("spiffe://example.org/web")
	status(1, "another process keeps the files", "x509", "--write", other)
	h.stop()
}
