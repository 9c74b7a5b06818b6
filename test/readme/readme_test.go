// Package readme runs what README.md tells a reader to type, in its order, with the programs of this tree.
//
// A comment before a block says what is to be done with it:
//
//	<!-- run -->                          run it; it must succeed
//	<!-- run: fails -->                   run it; it must fail
//	<!-- run: background, until FILE -->  run the one command beside the others; go on when the socket FILE is there
//	<!-- run: background, until-tcp A --> the same, until A accepts connections
//	<!-- make -->                         commands of the Makefile; they are only looked for there
//	<!-- file: PATH -->                   the contents of PATH
package readme

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "put the files that README.md shows into it anew")

const root = "../.."

// A block is a fenced block of README.md.
type block struct {
	directive string // inside of the comment before it
	language  string
	text      string
	line      int // of its first fence
}

func TestREADME(t *testing.T) {
	blocks := read(t)
	bin := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-o", bin+"/", "./cmd/...", "./examples/...")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the programs: %v\n%s", err, out)
	}
	dir, err := os.MkdirTemp("", "readme") // short, for the paths of sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })

	// The ports of README are anybody's; those of the test are free.
	ports := strings.NewReplacer("127.0.0.1:8081", freeAddress(t), "127.0.0.1:9443", freeAddress(t))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", ports.Replace(script(t, blocks)))
	cmd.Dir = dir
	cmd.Env = []string{"PATH=" + bin + ":" + os.Getenv("PATH"), "HOME=" + dir, "TMPDIR=" + dir}
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // its trap ends what runs in the background
	cmd.WaitDelay = 10 * time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Errorf("README.md: %v; the output up to there:\n%s", err, out.Bytes())
		logs, _ := filepath.Glob(filepath.Join(dir, "background-*.log"))
		for _, name := range logs {
			text, _ := os.ReadFile(name)
			t.Logf("%s:\n%s", filepath.Base(name), text)
		}
	}
	for _, want := range []string{
		"document 7 for spiffe://example.org/trusty\n",
		"document 7 for spiffe://example.org/utility\n",
		"refused: 403 Forbidden",
		"tls: bad certificate",
		"policy.yaml:",
		"spiffe://example.org/me",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the output of README's commands lacks %q:\n%s", want, out.Bytes())
		}
	}
}

// script turns the blocks into one bash script. Its working directory is the reader's.
func script(t *testing.T, blocks []block) string {
	var b strings.Builder
	b.WriteString("trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT\ntrap 'exit 1' INT TERM\n")
	background := 0
	for _, block := range blocks {
		if block.language != "sh" {
			continue
		}
		directive, rest, _ := strings.Cut(block.directive, ": ")
		fmt.Fprintf(&b, "\necho '--- README.md:%d'\n", block.line)
		switch {
		case directive == "make":
			checkMake(t, block)
		case directive == "run" && rest == "":
			b.WriteString(block.text)
		case directive == "run" && rest == "fails":
			fmt.Fprintf(&b, "if (%s); then echo 'this should have failed'; exit 1; fi\n", strings.TrimSpace(block.text))
		case directive == "run" && strings.HasPrefix(rest, "background, until"):
			until, what, _ := strings.Cut(strings.TrimPrefix(rest, "background, "), " ")
			ready := "[ -S " + what + " ]"
			if until == "until-tcp" {
				host, port, err := net.SplitHostPort(what)
				if err != nil {
					t.Fatalf("README.md:%d: %v", block.line, err)
				}
				// By the address with a colon, so that the replacement of ports finds it.
				ready = fmt.Sprintf(`a=%s:%s; (exec 3<>"/dev/tcp/${a%%:*}/${a##*:}") 2>/dev/null`, host, port)
			}
			background++
			fmt.Fprintf(&b, "%s > background-%d.log 2>&1 &\n", strings.TrimSpace(block.text), background)
			fmt.Fprintf(&b, "until %s; do kill -0 $! || { echo 'ended early'; exit 1; }; sleep 0.05; done\n", ready)
		default:
			t.Errorf("README.md:%d: a block of sh needs a directive that this test knows, not %q", block.line, block.directive)
		}
	}
	if background < 4 {
		t.Fatalf("README.md starts %d daemons; is it read correctly?", background)
	}
	return b.String()
}

// checkMake looks for the targets that a block names.
func checkMake(t *testing.T, b block) {
	for line := range strings.Lines(b.text) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != "make" {
			continue
		}
		cmd := exec.CommandContext(t.Context(), "make", append([]string{"-n"}, f[1:]...)...)
		cmd.Dir = root
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("README.md:%d: %s: %v\n%s", b.line, strings.TrimSpace(line), err, out)
		}
	}
}

// TestFilesShown compares the files that README.md shows with those that are built.
func TestFilesShown(t *testing.T) {
	path := filepath.Join(root, "README.md")
	readme, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	shown := 0
	for _, b := range read(t) {
		name, ok := strings.CutPrefix(b.directive, "file: ")
		if !ok {
			if b.language == "go" {
				t.Errorf("README.md:%d: Go code that is no file is code that is not built", b.line)
			}
			continue
		}
		shown++
		want, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		if b.text == string(want) {
			continue
		}
		if !*update {
			t.Errorf("README.md:%d: this is not %s any more; go test ./test/readme -run TestFilesShown -update", b.line, name)
			continue
		}
		old := "<!-- " + b.directive + " -->\n```" + b.language + "\n" + b.text + "```"
		readme = bytes.Replace(readme, []byte(old), []byte("<!-- "+b.directive+" -->\n```"+b.language+"\n"+string(want)+"```"), 1)
		if err := os.WriteFile(path, readme, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if shown == 0 {
		t.Error("README.md shows no file")
	}
}

// TestLinks looks for the files that README.md and the documents link to.
func TestLinks(t *testing.T) {
	names, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob(filepath.Join(root, "docs", "reference", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	link := regexp.MustCompile(`\]\(([^)#]+)(#[^)]*)?\)`)
	for _, name := range append(append(names, more...), filepath.Join(root, "README.md"), filepath.Join(root, "CONTRIBUTING.md")) {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(text), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(name), m[1])); err != nil {
				t.Errorf("%s links to %q: %v", name, m[1], err)
			}
		}
	}
}

func read(t *testing.T) []block {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	var blocks []block
	var open *block
	directive, n := "", 0
	for line := range strings.Lines(string(text)) {
		n++
		fence, isFence := strings.CutPrefix(strings.TrimSpace(line), "```")
		switch {
		case open != nil && isFence:
			blocks = append(blocks, *open)
			open = nil
		case open != nil:
			open.text += line
		case isFence:
			open = &block{directive: directive, language: fence, line: n}
			directive = ""
		case strings.HasPrefix(line, "<!-- "):
			directive = strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(line), "<!-- "), " -->")
		case strings.TrimSpace(line) != "":
			directive = ""
		}
	}
	if open != nil {
		t.Fatalf("README.md:%d: the block has no end", open.line)
	}
	return blocks
}

func freeAddress(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
