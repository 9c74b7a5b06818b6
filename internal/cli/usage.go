package cli

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// A usageError says that the command line itself is wrong, whatever the world looks like. It makes the exit status 2.
type usageError struct {
	err  error
	hint string
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }
func (e *usageError) Hint() string  { return e.hint }

func usagef(format string, args ...any) error {
	return &usageError{err: fmt.Errorf(format, args...)}
}

// exactArgs takes exactly the named arguments, such as exactArgs("ENTRY-ID").
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return &usageError{err: fmt.Errorf("%s needs %s", cmd.CommandPath(), strings.Join(names[len(args):], " and ")), hint: example(cmd)}
		}
		return atMost(cmd, args, len(names))
	}
}

// atMostArgs takes none up to n arguments.
func atMostArgs(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error { return atMost(cmd, args, n) }
}

// someArgs takes one or more of the named argument.
func someArgs(name string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return &usageError{err: fmt.Errorf("%s needs at least one %s", cmd.CommandPath(), name), hint: example(cmd)}
		}
		return nil
	}
}

func atMost(cmd *cobra.Command, args []string, n int) error {
	if len(args) > n {
		return &usageError{err: fmt.Errorf("%s takes no argument %q", cmd.CommandPath(), args[n]), hint: example(cmd)}
	}
	return nil
}

// example is the hint of a usage error: the first line of the command's examples that is a command.
func example(cmd *cobra.Command) string {
	for line := range strings.Lines(cmd.Example) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "signet") {
			return "for example: " + line
		}
	}
	return fmt.Sprintf("run '%s --help'", cmd.CommandPath())
}

func unknownCommand(cmd *cobra.Command, name string) error {
	hint := fmt.Sprintf("run '%s --help'", cmd.CommandPath())
	cmd.SuggestionsMinimumDistance = 2
	if near := cmd.SuggestionsFor(name); len(near) > 0 {
		hint = fmt.Sprintf("did you mean '%s %s'?", cmd.CommandPath(), near[0])
	} else if cmd.HasParent() {
		hint = fmt.Sprintf("%s knows: %s", cmd.CommandPath(), verbs(cmd))
	}
	return &usageError{err: fmt.Errorf("%s has no command %q", cmd.CommandPath(), name), hint: hint}
}

func verbs(cmd *cobra.Command) string {
	var names []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			names = append(names, c.Name())
		}
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

// exclusive makes it wrong usage to set more than one of the named flags.
func exclusive(cmd *cobra.Command, flags ...string) {
	before := cmd.PreRunE
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		var set []string
		for _, f := range flags {
			if cmd.Flags().Changed(f) {
				set = append(set, "--"+f)
			}
		}
		if len(set) > 1 {
			return &usageError{err: fmt.Errorf("%s exclude each other", strings.Join(set, " and ")), hint: fmt.Sprintf("run '%s --help'", cmd.CommandPath())}
		}
		if before != nil {
			return before(cmd, args)
		}
		return nil
	}
}

// finish gives every command of the tree what cobra's defaults lack: argument checks that are usage errors, and help
// without "[command]" noise.
func finish(cmd *cobra.Command) {
	if cmd.Args == nil && cmd.Name() != "help" {
		cmd.Args = atMostArgs(0)
	}
	cmd.DisableFlagsInUseLine = cmd.HasSubCommands()
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		name := valueNames[f.Name]
		if _, done := f.Value.(namedValue); done || name == "" || f.NoOptDefVal != "" {
			return
		}
		f.Value = namedValue{f.Value, name}
		if f.DefValue == "[]" || f.DefValue == "0s" {
			f.DefValue = ""
		}
	})
	for _, c := range cmd.Commands() {
		finish(c)
	}
}

// usageTemplate is cobra's without the line for running a noun by itself.
const usageTemplate = `Usage:{{if .HasAvailableSubCommands}}
  {{.CommandPath}} COMMAND{{else}}
  {{.UseLine}}{{end}}{{if .HasExample}}

Examples:
{{.Example}}{{end}}{{if .HasAvailableSubCommands}}{{$cmds := .Commands}}{{if eq (len .Groups) 0}}

Commands:{{range $cmds}}{{if .IsAvailableCommand}}
  {{rpad .Name .NamePadding}} {{.Short}}{{end}}{{end}}{{else}}{{range $group := .Groups}}

{{.Title}}{{range $cmds}}{{if (and (eq .GroupID $group.ID) .IsAvailableCommand)}}
  {{rpad .Name .NamePadding}} {{.Short}}{{end}}{{end}}{{end}}

More:{{range $cmds}}{{if (and (eq .GroupID "") (or .IsAvailableCommand (eq .Name "help")))}}
  {{rpad .Name .NamePadding}} {{.Short}}{{end}}{{end}}{{end}}{{end}}{{if .HasAvailableLocalFlags}}

Flags:
{{.LocalFlags.FlagUsages | trimTrailingWhitespaces}}{{end}}{{if .HasAvailableSubCommands}}

'{{.CommandPath}} COMMAND --help' says more about a command.{{end}}
`

// valueNames are what help calls the values of flags; pflag would say "stringArray".
var valueNames = map[string]string{
	"attestation-type": "TYPE", "audience": "NAME", "bundle": "FILE", "config": "FILE", "connect": "HOST:PORT", "content-type": "TYPE", "dir": "DIR", "dns": "NAME", "endpoint": "ADDRESS",
	"event": "NAME", "expires-in": "DURATION", "federates-with": "TRUST-DOMAIN", "file": "PATH", "format": "FORMAT", "from": "ID", "grpc": "METHOD",
	"header": "NAME:VALUE", "hint": "TEXT", "http": "REQUEST", "id": "ID", "jwt": "FILE", "jwt-ttl": "DURATION", "limit": "N", "lines": "N", "listen": "ADDRESS",
	"log-format": "FORMAT", "log-level": "LEVEL", "match": "HOW", "mode": "MODE", "node-group": "NAME", "parent-id": "ID", "peer": "ID", "service": "ID", "agent-socket": "PATH", "last": "N", "selector": "TYPE:VALUE",
	"server": "HOST:PORT", "server-name": "NAME", "since": "WHEN", "socket": "PATH", "spiffe-id": "ID", "subject": "ID", "timeout": "DURATION", "to": "ID",
	"trust-domain": "TRUST-DOMAIN", "ttl": "DURATION", "until": "WHEN", "write": "PATH", "x509-ttl": "DURATION",
}

// A namedValue is a flag's value whose type help calls by a name of ours. Parsing is the inner value's.
type namedValue struct {
	pflag.Value
	name string
}

func (v namedValue) Type() string { return v.name }
