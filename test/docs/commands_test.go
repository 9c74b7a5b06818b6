package docs_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// A shown command is one of signet's in a fenced block or in backquotes of a page.
var (
	fence     = regexp.MustCompile("(?s)```[a-z]*\n(.*?)```")
	quoted    = regexp.MustCompile("`(signet [^`]+)`")
	shown     = regexp.MustCompile(`(?:^|[|;&(]|\$\()\s*(signet(?:-hsm)? [a-z].*)`)
	longFlag  = regexp.MustCompile(`(?:^|\s)(--[a-z][a-z0-9-]*)`)
	described = regexp.MustCompile("(?m)^\\| `(?:-[a-zA-Z], )?(--[a-z0-9-]+)")
)

// TestShownCommandsExist holds every command of signet that a page shows, with its flags, against the reference that is made
// from the commands themselves.
func TestShownCommandsExist(t *testing.T) {
	root, flags := filepath.Join("..", ".."), commandFlags(t)
	pages := []string{filepath.Join(root, "README.md")}
	if err := filepath.WalkDir(filepath.Join(root, "docs"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".md") && filepath.Base(path) != "cli.md" {
			pages = append(pages, path)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	checked := 0
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range shownCommands(string(text)) {
			words := strings.Fields(line)
			command := commandOf(flags, words)
			if command == "" {
				if !isNoun(flags, words) {
					t.Errorf("%s shows %q, which is no command", page, line)
				}
				continue
			}
			checked++
			for _, m := range longFlag.FindAllStringSubmatch(line, -1) {
				if !flags[command][m[1]] {
					t.Errorf("%s shows %q, but %s has no flag %s", page, line, command, m[1])
				}
			}
		}
	}
	if checked < 80 {
		t.Errorf("only %d commands were found, so something is not looked at", checked)
	}
}

// commandFlags are the flags of each command, from the reference.
func commandFlags(t *testing.T) map[string]map[string]bool {
	t.Helper()
	reference, err := os.ReadFile(filepath.Join("..", "..", "docs", "reference", "cli.md"))
	if err != nil {
		t.Fatal(err)
	}
	flags := map[string]map[string]bool{}
	for _, section := range strings.Split(string(reference), "\n## ")[1:] {
		name, text, _ := strings.Cut(section, "\n")
		flags[name] = map[string]bool{"--help": true}
		for _, m := range described.FindAllStringSubmatch(text, -1) {
			flags[name][m[1]] = true
		}
	}
	return flags
}

// commandOf is the command that the words begin with, or empty.
func commandOf(flags map[string]map[string]bool, words []string) string {
	for n := min(4, len(words)); n >= 2; n-- {
		if name := "signet " + strings.Join(words[1:n], " "); flags[name] != nil {
			return name
		}
	}
	return ""
}

// TestProposedCommandsExist does the same for the commands that errors, hints and explanations in the code propose.
func TestProposedCommandsExist(t *testing.T) {
	root, flags := filepath.Join("..", ".."), commandFlags(t)
	proposed := regexp.MustCompile(`\bsignet( [a-z][a-z0-9-]+)+[^'";|()\n]*`)
	checked := 0
	for _, dir := range []string{"agent", "ca", "cmd", "internal", "policy", "spiffe", "workloadapi"} {
		if err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
			if err != nil {
				return err
			}
			ast.Inspect(file, func(n ast.Node) bool {
				literal, ok := n.(*ast.BasicLit)
				if !ok || literal.Kind != token.STRING {
					return true
				}
				text, err := strconv.Unquote(literal.Value)
				if err != nil {
					t.Fatal(err)
				}
				for _, line := range proposed.FindAllString(text, -1) {
					command := commandOf(flags, strings.Fields(strings.NewReplacer(",", " ", ".", " ", ":", " ").Replace(line)))
					if command == "" {
						continue // words about signet
					}
					checked++
					for _, m := range longFlag.FindAllStringSubmatch(line, -1) {
						if !flags[command][m[1]] {
							t.Errorf("%s proposes %q, but %s has no flag %s", path, line, command, m[1])
						}
					}
				}
				return true
			})
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if checked < 60 {
		t.Errorf("only %d commands were found, so something is not looked at", checked)
	}
}

// isNoun tells whether the words name commands without saying which, such as "signet authority".
func isNoun(flags map[string]map[string]bool, words []string) bool {
	prefix := "signet " + strings.Trim(words[1], ".,;:…") + " "
	for name := range flags {
		if strings.HasPrefix(name+" ", prefix) {
			return len(words) == 2 || strings.Trim(words[2], ".…") == ""
		}
	}
	return false
}

// shownCommands returns the commands of a page, each up to what a shell takes for the next one.
func shownCommands(text string) []string {
	var out []string
	for _, block := range fence.FindAllStringSubmatch(text, -1) {
		body := strings.ReplaceAll(block[1], "\\\n", " ")
		for _, line := range strings.Split(body, "\n") {
			if m := shown.FindStringSubmatch(line); m != nil {
				out = append(out, m[1])
			}
		}
	}
	for _, m := range quoted.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
		out = append(out, strings.Join(strings.Fields(m[1]), " "))
	}
	for i, line := range out {
		line = strings.Replace(line, "signet-hsm ", "signet ", 1)
		line, _, _ = strings.Cut(line, " #")
		if at := strings.IndexAny(line, "|;&<>)"); at >= 0 {
			line = line[:at]
		}
		out[i] = line
	}
	return out
}
