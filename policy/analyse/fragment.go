package analyse

import (
	"encoding/json"
	"fmt"
	"strings"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// maxListed is how many items of one list a fragment shows.
const maxListed = 50

// scalar writes a string as a YAML scalar that every reader takes for this string.
func scalar(s string) string {
	plain := len(s) > 1 && (s[0] == '/' || 'a' <= s[0]|0x20 && s[0]|0x20 <= 'z')
	for i := 0; plain && i < len(s); i++ {
		c := s[i]
		plain = 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("/._-*~", c) >= 0
	}
	switch strings.ToLower(s) {
	case "yes", "no", "on", "off", "true", "false", "null":
		plain = false
	}
	if plain {
		return s
	}
	b, err := json.Marshal(s) // JSON's strings are YAML's; control characters and bad bytes are escaped
	if err != nil {
		return `""`
	}
	text := string(b)
	for _, r := range []rune{0x7f, 0x85, 0xa0, 0xfeff} {
		text = strings.ReplaceAll(text, string(r), fmt.Sprintf(`\u%04x`, r))
	}
	return text
}

// flow writes a list as [a, b]. What is over max is left out, and said.
func flow(items []string, max int) string {
	var b strings.Builder
	b.WriteByte('[')
	for i, s := range items {
		if i == max {
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(scalar(s))
	}
	b.WriteByte(']')
	if n := len(items) - max; n > 0 {
		fmt.Fprintf(&b, " # and %d more as they are", n)
	}
	return b.String()
}

// ruleText writes a rule as an item of allow or deny, without indentation.
func ruleText(r *policyv1.Rule, td string) string {
	if r == nil {
		return ""
	}
	from := make([]string, len(r.GetFrom()))
	for i, s := range r.GetFrom() {
		from[i] = relative(s, td)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "- from: %s\n", flow(from, maxListed))
	if len(r.GetHttp()) > 0 {
		b.WriteString("  http:\n")
	}
	for i, m := range r.GetHttp() {
		if i == maxListed {
			fmt.Fprintf(&b, "    # and %d more as they are\n", len(r.GetHttp())-i)
			break
		}
		lead := "    - "
		if len(m.GetMethods()) > 0 {
			fmt.Fprintf(&b, "%smethods: %s\n", lead, flow(m.GetMethods(), maxListed))
			lead = "      "
		}
		if len(m.GetPaths()) > 0 {
			fmt.Fprintf(&b, "%spaths: %s\n", lead, flow(m.GetPaths(), maxListed))
		}
	}
	if len(r.GetGrpc()) > 0 {
		fmt.Fprintf(&b, "  grpc: %s\n", flow(r.GetGrpc(), maxListed))
	}
	if jwt := r.GetJwt(); jwt != nil {
		subject := ""
		if jwt.GetSubject() == policyv1.SubjectBinding_SUBJECT_BINDING_ANY {
			subject = ", subject: any"
		}
		fmt.Fprintf(&b, "  jwt: {audience: %s%s}\n", flow(jwt.GetAudience(), maxListed), subject)
	}
	if r.GetWhen() != "" {
		fmt.Fprintf(&b, "  when: %s\n", scalar(r.GetWhen()))
	}
	if r.GetShadow() {
		b.WriteString("  shadow: true\n")
	}
	return b.String()
}
