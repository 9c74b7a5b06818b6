package cli

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// escape returns s for a terminal or a log: every byte that is not valid UTF-8 and every rune that does not print
// (control characters, direction marks, line ends) stands as a Go escape. An ID, a selector or an error text of the
// peer thus never moves the cursor, hides text or forges a line. Backslashes stay, so the result is for people; JSON
// and YAML output is exact.
func escape(s string) string {
	clean := true
	for i := 0; i < len(s); i++ {
		if c := s[i]; c < 0x20 || c > 0x7e {
			clean = false
			break
		}
	}
	if clean {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case unicode.IsPrint(r):
			b.WriteRune(r)
		case r < 0x80:
			b.WriteString(strings.Trim(fmt.Sprintf("%q", r), "'"))
		default:
			b.WriteString(runeEscape(r))
		}
		i += n
	}
	return b.String()
}

// escapeEncoded makes JSON or YAML that is already encoded safe for a terminal: the runes that do not print, which can
// stand only inside double-quoted strings, become \u or \U escapes of that format.
func escapeEncoded(s string, yaml bool) string {
	var b strings.Builder
	for _, r := range s {
		switch {
		case r == '\n' || unicode.IsPrint(r):
			b.WriteRune(r)
		case r > 0xffff && !yaml:
			r -= 0x10000
			fmt.Fprintf(&b, `\u%04x\u%04x`, 0xd800+(r>>10), 0xdc00+(r&0x3ff))
		default:
			b.WriteString(runeEscape(r))
		}
	}
	return b.String()
}

func runeEscape(r rune) string {
	if r > 0xffff {
		return fmt.Sprintf(`\U%08x`, r)
	}
	return fmt.Sprintf(`\u%04x`, r)
}

// The colours in use, as SGR parameters.
const (
	red    = "31"
	green  = "32"
	yellow = "33"
	cyan   = "36"
	bold   = "1"
)

// paint colours s, which must be escaped already, if on.
func paint(on bool, color, s string) string {
	if !on || color == "" {
		return s
	}
	return "\x1b[" + color + "m" + s + "\x1b[0m"
}

// shellWord quotes s for a shell if it needs that.
func shellWord(s string) string {
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("/._-:+,@%", r)
	}) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
