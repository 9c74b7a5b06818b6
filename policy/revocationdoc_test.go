package policy

import (
	"encoding/hex"
	"fmt"
	"math/big"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/internal/strictyaml"
)

func revocationDocument(t testing.TB, text string) (*RevocationDocument, error) {
	t.Helper()
	docs, err := strictyaml.Split([]byte(text), "r.yaml", 1)
	if err != nil || len(docs) != 1 {
		return nil, fmt.Errorf("%d documents: %w", len(docs), err)
	}
	return ParseRevocation(docs[0], spiffeid.RequireTrustDomainFromString("example.org"))
}

func TestParseRevocation(t *testing.T) {
	head := "kind: Revocation\nname: r\n"
	long := strings.Repeat("x", 2000)
	for _, tt := range []struct {
		name, body string
		want       string // Target, or part of the error after !
	}{
		{"relative ID", "id: /web", "id spiffe://example.org/web"},
		{"pattern", "id: /ns/*/sa/**", "id spiffe://example.org/ns/*/sa/**"},
		{"foreign ID", "id: spiffe://partner.example/web", "id spiffe://partner.example/web"},
		{"issued before", "id: /web\nissuedBefore: \"2026-01-31T00:00:00+01:00\"", "id spiffe://example.org/web, issued before 2026-01-30T23:00:00Z"},
		{"serial", "serial: 01:02", "serial 258"},
		{"agent", "agent: /spire/agent/join_token/x", "agent spiffe://example.org/spire/agent/join_token/x"},
		{"jti", "jti: abc", `jti "abc"`},
		{"authority", "authority: 0A:0B:0C:0D:0E:0F:10:11", "authority 0a0b0c0d0e0f1011"},
		{"no target", "reason: x", "!the target is missing"},
		{"two targets", "id: /web\njti: x", "!r.yaml:4:6: this is a second target"},
		{"the CA", "id: /spire/server", "!covers the CA itself"},
		{"the CA by pattern", "id: /spire/**", "!covers the CA itself"},
		{"the CA by star", "id: /spire/*", "!covers the CA itself"},
		{"everybody is possible", "id: /**", "id spiffe://example.org/**"},
		{"the agents are possible", "id: /spire/agent/**", "id spiffe://example.org/spire/agent/**"},
		{"wildcard trust domain", "id: spiffe://*/web", "!wildcard in its trust domain"},
		{"unquoted serial", "serial: 1234", "!write it in quotes"},
		{"a workload as agent", "agent: /web", "!is not an agent's ID"},
		{"an agent of others", "agent: spiffe://partner.example/spire/agent/x/y", "!is not an agent's ID"},
		{"an agent by pattern", "agent: /spire/agent/**", "!agent:"},
		{"an empty jti", `jti: ""`, "!jti has 0 bytes"},
		{"a long jti", "jti: " + long, "!jti has 2000 bytes"},
		{"a long reason", "id: /web\nreason: " + long, "!reason has 2000 bytes"},
		{"authority is text", "authority: active", "!must be an X.509 authority's id"},
		{"issued before with a serial", "serial: \"0x1\"\nissuedBefore: \"2026-01-31T00:00:00Z\"", "!issuedBefore goes with id only"},
		{"expires is a length", "id: /web\nexpires: 1h", "!must be a moment"},
		{"expires before the epoch", "id: /web\nexpires: \"1960-01-01T00:00:00Z\"", "!must be a moment"},
		{"unknown field", "id: /web\nids: /x", "!unknown field"},
		{"list", "id: [/web, /x]", "!must be a string"},
		{"null", "id: null", "!id is empty"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, err := revocationDocument(t, head+tt.body+"\n")
			if part, wrong := strings.CutPrefix(tt.want, "!"); wrong {
				if err == nil || !strings.Contains(err.Error(), part) {
					t.Errorf("%v; want an error with %q", err, part)
				}
				return
			}
			if err != nil || d.Target() != tt.want {
				t.Errorf("%v, %v; want %s", d, err, tt.want)
			}
		})
	}
	for _, text := range []string{"kind: Revocation\nid: /web\n", "kind: Revocation\nname: UPPER\nid: /web\n", "name: r\nid: /web\n", "kind: CallPolicy\nname: r\nid: /web\n"} {
		if _, err := revocationDocument(t, text); err == nil {
			t.Errorf("%q was taken", text)
		}
	}
}

func TestParseSerial(t *testing.T) {
	longest := "7f" + strings.Repeat("ff", 19)
	for _, tt := range []struct{ in, want string }{
		{"258", "0102"}, {"0x0102", "0102"}, {"01:02", "0102"}, {"serial=0102", "0102"}, {"SERIAL=0102", "0102"}, {"00:00:FF", "ff"}, {" 0xAb ", "ab"},
		{"1a", "1a"}, {"0b1", "b1"}, {"7f" + strings.Repeat(":ff", 19), longest}, {"0x" + longest, longest},
		{"", ""}, {"0", ""}, {"-1", ""}, {"+1", ""}, {"0x", ""}, {"1:2", ""}, {":", ""}, {"0x-1", ""}, {"1_0", ""}, {"12 34", ""}, {"0x1g", ""}, {"serial=", ""},
		{"80" + strings.Repeat(":00", 19), ""}, {"01" + strings.Repeat(":00", 20), ""}, {strings.Repeat("9", 200), ""},
	} {
		got, err := ParseSerial(tt.in)
		if (err != nil) != (tt.want == "") || hex.EncodeToString(got) != tt.want {
			t.Errorf("ParseSerial(%q) = %x, %v; want %s", tt.in, got, err, tt.want)
		}
	}
}

// FuzzParseSerial: what is read prints back as the same number in every spelling.
func FuzzParseSerial(f *testing.F) {
	for _, s := range []string{"1", "0x01", "01:02:aa", "serial=0F", "", "::", "9999999999999999999999999999999999999999999999999"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		b, err := ParseSerial(s)
		if err != nil {
			return
		}
		if len(b) == 0 || len(b) > maxSerial || b[0] == 0 {
			t.Fatalf("%q is %x", s, b)
		}
		for _, again := range []string{new(big.Int).SetBytes(b).String(), "0x" + hex.EncodeToString(b), "serial=" + strings.ToUpper(hex.EncodeToString(b))} {
			if c, err := ParseSerial(again); err != nil || string(c) != string(b) {
				t.Errorf("%q is %x, and %q is %x, %v", s, b, again, c, err)
			}
		}
	})
}

// FuzzParseRevocation: what is accepted compiles, and never covers the CA by a pattern that names its place.
func FuzzParseRevocation(f *testing.F) {
	for _, s := range []string{"id: /web", "id: /**", "serial: \"0x12\"", "agent: /spire/agent/a/b", "jti: x", "authority: 0102030405060708", "id: /spire/*\nexpires: \"2030-01-01T00:00:00Z\""} {
		f.Add("kind: Revocation\nname: r\n" + s + "\n")
	}
	server := spiffeid.RequireFromString("spiffe://example.org/spire/server")
	f.Fuzz(func(t *testing.T, text string) {
		d, err := revocationDocument(t, text)
		if err != nil {
			return
		}
		targets := 0
		for _, set := range []bool{d.ID != "", d.Serial != nil, !d.Agent.IsZero(), d.JTI != "", d.Authority != ""} {
			if set {
				targets++
			}
		}
		if targets != 1 {
			t.Fatalf("%q has %d targets", text, targets)
		}
		if d.ID != "" {
			if err := CheckIDPattern(d.ID); err != nil {
				t.Fatalf("%q: %v", text, err)
			}
			p, _ := parseIDPattern(d.ID)
			if RevocationCovers(d.ID, server) && !sweeping(p) {
				t.Fatalf("%q covers the CA", text)
			}
		}
	})
}
