package demo

import (
	"fmt"
	"io"
	"strings"
	"unicode"
)

// A report is what the person in front of the screen reads. It is used by one goroutine.
type report struct {
	w io.Writer
	// unread is called when w takes nothing any more.
	unread  func(error)
	color   bool
	unicode bool
	steps   int
	checks  int // that have passed
}

// A CheckError is a check that did not come out as it should.
type CheckError struct {
	// Check is what was claimed, Want what had to be seen for it, Got what was seen.
	Check, Want, Got string
}

func (e *CheckError) Error() string {
	return fmt.Sprintf("%s: expected %s, saw %s", e.Check, e.Want, e.Got)
}

const (
	bold  = "1"
	dim   = "2"
	red   = "31"
	green = "32"
)

func (r *report) paint(code, s string) string {
	if !r.color {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

func (r *report) line(format string, args ...any) {
	if _, err := fmt.Fprintf(r.w, format+"\n", args...); err != nil {
		r.unread(err)
	}
}

// step begins a step: its heading, and in a few words what it is about.
func (r *report) step(title, text string) {
	r.steps++
	r.line("\n%s", r.paint(bold, fmt.Sprintf("%d. %s", r.steps, title)))
	for line := range strings.Lines(text) {
		r.line("   %s", strings.TrimRight(line, "\n"))
	}
}

// command shows a command that is run.
func (r *report) command(line string) { r.line("   %s", r.paint(dim, "$ "+line)) }

// output shows what a command printed.
func (r *report) output(text string) {
	for line := range strings.Lines(text) {
		r.line("     %s", printable(strings.TrimRight(line, "\n")))
	}
}

// check says that a claim holds, or returns the *CheckError that says why not.
func (r *report) check(ok bool, claim, want, got string) error {
	if !ok {
		return &CheckError{Check: claim, Want: want, Got: got}
	}
	r.checks++
	r.line("   %s %s", r.mark(true), printable(claim))
	return nil
}

func (r *report) mark(ok bool) string {
	switch {
	case ok && r.unicode:
		return r.paint(green, "✓")
	case ok:
		return r.paint(green, "ok  ")
	case r.unicode:
		return r.paint(red, "✗")
	}
	return r.paint(red, "FAIL")
}

// failed says what went wrong.
func (r *report) failed(e *CheckError) {
	r.line("   %s %s", r.mark(false), printable(e.Check))
	r.line("        expected: %s", printable(e.Want))
	r.line("        seen:     %s", printable(e.Got))
}

// logs shows the last lines of a log.
func (r *report) logs(name, text string) {
	const lines = 12
	all := strings.Split(strings.TrimRight(text, "\n"), "\n")
	r.line("\nthe end of the log of %s:", name)
	for _, line := range all[max(0, len(all)-lines):] {
		r.line("   %s", printable(line))
	}
}

// printable keeps what others wrote from moving the cursor.
func printable(s string) string {
	return strings.Map(func(c rune) rune {
		if unicode.IsPrint(c) {
			return c
		}
		return '\uFFFD'
	}, s)
}
