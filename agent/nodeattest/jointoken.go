package nodeattest

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
)

// MaxJoinTokenBytes is the longest join token that is read. A token is a part of a SPIFFE ID, so that longer ones
// could not be used anyway.
const MaxJoinTokenBytes = 1024

// pinHexBytes is the length of the authority pin inside a join token: SHA-256 in hex.
const pinHexBytes = 2 * sha256.Size

// A Secret is a join token as an operator wrote it, not yet looked at. It prints as "[join token]" with every verb,
// so that a configuration that is logged does not give it away.
type Secret string

// Format prints "[join token]", whatever the verb.
func (s Secret) Format(f fmt.State, _ rune) { printHidden(f) }

// LogValue keeps the token out of structured logs.
func (s Secret) LogValue() slog.Value { return slog.StringValue(hidden) }

// MarshalText keeps the token out of JSON and YAML.
func (s Secret) MarshalText() ([]byte, error) { return []byte(hidden), nil }

// A JoinToken lets one node attest once. It prints as "[join token]" with every verb, so that it cannot reach a log
// by accident.
type JoinToken struct {
	value string
	id    string
	pin   string
}

// hidden is what a join token prints as.
const hidden = "[join token]"

func printHidden(w io.Writer) {
	// A failing writer is fmt's business: it reports its own errors.
	_, _ = io.WriteString(w, hidden)
}

// ParseJoinToken reads a join token. signet's tokens are <id>.<secret>.<pin>, where pin is the SHA-256 of the SPKI of
// an X.509 authority in lower-case hex; anything else that can stand in a SPIFFE ID's path is taken as a token without
// a pin, such as a SPIRE server makes. The error never repeats the token.
func ParseJoinToken(s Secret) (JoinToken, error) {
	v := strings.TrimSpace(string(s))
	switch {
	case v == "":
		return JoinToken{}, errors.New("the join token is empty; make one with signet token create")
	case len(v) > MaxJoinTokenBytes:
		return JoinToken{}, fmt.Errorf("the join token has %d bytes, more than the %d allowed; make one with signet token create",
			len(v), MaxJoinTokenBytes)
	}
	for i := range len(v) {
		if !tokenByte(v[i]) {
			return JoinToken{}, fmt.Errorf("the join token has a byte at offset %d that is none of letters, digits, '.', '-' and '_'; "+
				"copy it again, without quotes and line breaks", i)
		}
	}
	t := JoinToken{value: v, id: v}
	if id, rest, ok := strings.Cut(v, "."); ok {
		secret, pin, pinned := strings.Cut(rest, ".")
		if pinned {
			if id == "" || secret == "" || !lowerHex(pin) || len(pin) != pinHexBytes {
				return JoinToken{}, fmt.Errorf("the join token is not of the form <id>.<secret>.<pin> with a pin of %d lower-case hex digits; "+
					"was it copied completely?", pinHexBytes)
			}
			t.id, t.pin = id, pin
		}
	}
	return t, nil
}

// Format prints "[join token]", whatever the verb.
func (t JoinToken) Format(f fmt.State, _ rune) { printHidden(f) }

// LogValue keeps the token out of structured logs.
func (t JoinToken) LogValue() slog.Value { return slog.StringValue(hidden) }

// IsZero says that there is no token.
func (t JoinToken) IsZero() bool { return t.value == "" }

// Reveal returns the token itself, for sending it to the CA and nowhere else.
func (t JoinToken) Reveal() string { return t.value }

// Fingerprint is a hash by which the agent remembers that it has used a token, without keeping the token.
func (t JoinToken) Fingerprint() string {
	sum := sha256.Sum256([]byte("signet join token fingerprint v1\x00" + t.value))
	return hex.EncodeToString(sum[:])
}

// Pinned says whether the token carries an authority pin, which lets the agent verify the CA on its first call
// without a bundle file.
func (t JoinToken) Pinned() bool { return t.pin != "" }

// PinMatches says whether cert holds the key that the token pins. It is false for a token without a pin.
func (t JoinToken) PinMatches(cert *x509.Certificate) bool {
	if t.pin == "" {
		return false
	}
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return subtle.ConstantTimeCompare([]byte(hex.EncodeToString(sum[:])), []byte(t.pin)) == 1
}

// Type is SPIRE's name of this node attestor.
func (t JoinToken) Type() string { return "join_token" }

// Payload is the attestation payload: the token's bytes.
func (t JoinToken) Payload(context.Context) ([]byte, error) {
	if t.value == "" {
		return nil, errors.New("there is no join token to attest with; set join_token or join_token_file")
	}
	return []byte(t.value), nil
}

// Respond answers a challenge. Join tokens know none, so that one is an error.
func (t JoinToken) Respond(context.Context, []byte) ([]byte, error) {
	return nil, errors.New("the CA sent a challenge, which join_token attestation does not have; is server_address that of a CA?")
}

func tokenByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '-' || c == '_'
}

func lowerHex(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
