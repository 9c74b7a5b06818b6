package cli

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// WriteReference writes docs/reference/cli.md: every command with its help, in the order of their names.
func WriteReference(w io.Writer) error {
	var b strings.Builder
	b.WriteString(`# The command line

Made from the commands themselves by ` + "`go run ./internal/cli/gendoc`" + `; do not edit.

Verbs come after nouns. Commands that list or show take ` + "`-o table|wide|json|yaml`" + `. The exit status is 0 when the command has done
what it says, 1 when something was refused or failed, 2 for a mistake on the command line. Errors and hints go to stderr, results to
stdout. Colour is used on terminals only, and not with ` + "`NO_COLOR`" + ` set.

`)
	root := NewRootCommand()
	var walk func(*cobra.Command, func(*cobra.Command))
	walk = func(cmd *cobra.Command, do func(*cobra.Command)) {
		if cmd.Hidden || cmd.Name() == "help" {
			return
		}
		do(cmd)
		for _, c := range cmd.Commands() {
			walk(c, do)
		}
	}
	walk(root, func(cmd *cobra.Command) {
		if !cmd.HasSubCommands() {
			fmt.Fprintf(&b, "- [%s](#%s): %s\n", cmd.CommandPath(), strings.ReplaceAll(cmd.CommandPath(), " ", "-"), cmd.Short)
		}
	})
	walk(root, func(cmd *cobra.Command) {
		if !cmd.HasSubCommands() {
			writeCommand(&b, cmd)
		}
	})
	_, err := io.WriteString(w, b.String())
	return err
}

func writeCommand(b *strings.Builder, cmd *cobra.Command) {
	fmt.Fprintf(b, "\n## %s\n\n", cmd.CommandPath())
	long := cmd.Long
	if long == "" {
		long = cmd.Short + "."
	}
	fmt.Fprintf(b, "%s\n\n```\n%s\n```\n", strings.TrimSpace(long), cmd.UseLine())
	if cmd.Example != "" {
		fmt.Fprintf(b, "\nExamples:\n\n```sh\n%s\n```\n", outdent(cmd.Example))
	}
	var rows []string
	cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		name, usage := pflag.UnquoteUsage(f)
		flag := "--" + f.Name
		if f.Shorthand != "" {
			flag = "-" + f.Shorthand + ", " + flag
		}
		if name != "" {
			flag += " " + name
		}
		if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" {
			usage += " (default " + f.DefValue + ")"
		}
		rows = append(rows, fmt.Sprintf("| `%s` | %s |\n", flag, strings.ReplaceAll(usage, "|", "\\|")))
	})
	if len(rows) > 0 {
		fmt.Fprintf(b, "\n| flag | meaning |\n|---|---|\n%s", strings.Join(rows, ""))
	}
}

func outdent(s string) string {
	lines := strings.Split(strings.Trim(s, "\n"), "\n")
	for i, l := range lines {
		lines[i] = strings.TrimPrefix(l, "  ")
	}
	return strings.Join(lines, "\n")
}
