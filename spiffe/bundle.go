package spiffe

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// MaxBundleBytes is the longest bundle document that is read (TDB-21).
	MaxBundleBytes = 1 << 20
	// MaxBundleKeys is the largest number of entries in a bundle document that is read (TDB-21).
	MaxBundleKeys = 1000

	maxHintSeconds = int64(math.MaxInt64 / time.Second)
)

var bundleJSONLimits = jsonLimits{bytes: MaxBundleBytes, depth: 32, values: 100_000}

// ParseBundle parses a SPIFFE bundle document of the trust domain td. The document does not name its domain, so the
// caller must know where it came from (TDB-18).
//
// Entries that are unknown or broken are left out and returned as errors, for the log; they do not spoil the rest
// (DEC-08). The last error is about the document as a whole: then there is no bundle, and the caller keeps its old one.
// A document without any usable entry is valid, and means that nothing of this domain is trusted any more (TDB-11).
// All errors are [RowError]s. [Trust Domain and Bundle §4]
func ParseBundle(td spiffeid.TrustDomain, doc []byte) (*spiffebundle.Bundle, []error, error) {
	if td.IsZero() {
		return nil, nil, broken("TDB-18", "no trust domain given for the bundle")
	}
	if len(doc) > MaxBundleBytes {
		return nil, nil, broken("TDB-21", "bundle of %q has %d bytes, at most %d are allowed", td, len(doc), MaxBundleBytes)
	}
	value, err := readJSON(doc, bundleJSONLimits, "TDB-22", "DEC-10")
	if err != nil {
		return nil, nil, err
	}
	document, ok := value.(map[string]any)
	if !ok {
		return nil, nil, broken("TDB-02", "bundle of %q is %s, it must be a JSON object", td, jsonKind(value))
	}
	entries, ok := document["keys"].([]any)
	if !ok {
		return nil, nil, broken("TDB-10", "bundle of %q has no keys, or they are no array; an empty bundle has \"keys\": []", td)
	}
	if len(entries) > MaxBundleKeys {
		return nil, nil, broken("TDB-21", "bundle of %q has %d keys, at most %d are allowed", td, len(entries), MaxBundleKeys)
	}
	bundle := spiffebundle.New(td)
	if err := readSequence(bundle, document); err != nil {
		return nil, nil, err
	}
	if err := readRefreshHint(bundle, document); err != nil {
		return nil, nil, err
	}
	var skipped []error
	for i, entry := range entries {
		if err := addEntry(bundle, entry); err != nil {
			skipped = append(skipped, broken(RowOf(err), "entry %d of the bundle of %q is left out: %w", i, td, errors.Unwrap(err)))
		}
	}
	return bundle, skipped, nil
}

// readSequence reads spiffe_sequence with all its 64 bits (TDB-06).
func readSequence(bundle *spiffebundle.Bundle, document map[string]any) error {
	value, present := document["spiffe_sequence"]
	if !present {
		return nil
	}
	number, ok := value.(json.Number)
	if !ok {
		return broken("TDB-05", "spiffe_sequence is %s, it must be an integer", jsonKind(value))
	}
	sequence, err := strconv.ParseUint(number.String(), 10, 64)
	if err != nil {
		return broken("TDB-05", "spiffe_sequence is %q, it must be an integer from 0 to 2^64-1", excerpt(number.String()))
	}
	bundle.SetSequenceNumber(sequence)
	return nil
}

// readRefreshHint reads spiffe_refresh_hint as it is; [RefreshInterval] makes something sane of it. What no
// time.Duration can hold becomes the longest that one can.
func readRefreshHint(bundle *spiffebundle.Bundle, document map[string]any) error {
	value, present := document["spiffe_refresh_hint"]
	if !present {
		return nil
	}
	number, ok := value.(json.Number)
	if !ok {
		return broken("TDB-08", "spiffe_refresh_hint is %s, it must be an integer number of seconds", jsonKind(value))
	}
	seconds, err := strconv.ParseInt(number.String(), 10, 64) // out of range gives the nearest int64
	if err != nil && !errors.Is(err, strconv.ErrRange) {
		return broken("TDB-08", "spiffe_refresh_hint is %q, it must be an integer number of seconds", excerpt(number.String()))
	}
	seconds = max(-maxHintSeconds, min(seconds, maxHintSeconds))
	bundle.SetRefreshHint(time.Duration(seconds) * time.Second)
	return nil
}

// addEntry adds one element of keys to the bundle, or says why not.
func addEntry(bundle *spiffebundle.Bundle, element any) error {
	entry, ok := element.(map[string]any)
	if !ok {
		return broken("TDB-20", "it is %s, it must be an object", jsonKind(element))
	}
	use, ok := entry["use"].(string)
	if !ok {
		return broken("TDB-14", "use is missing or no string")
	}
	switch use {
	case useX509SVID:
		authority, err := parseAuthority(entry)
		if err != nil {
			return err
		}
		bundle.AddX509Authority(authority)
		return nil
	case useJWTSVID:
		return addSigningKey(entry, "JWT-27", bundle.HasJWTAuthority, bundle.HasWITAuthority, bundle.AddJWTAuthority)
	case useWITSVID:
		return addSigningKey(entry, "WIT-50", bundle.HasWITAuthority, bundle.HasJWTAuthority, bundle.AddWITAuthority)
	default:
		return broken("TDB-14", "use %q is not known", excerpt(use))
	}
}

// parseAuthority reads an entry with use x509-svid. Only the first certificate in x5c counts (X509-66).
func parseAuthority(entry map[string]any) (*x509.Certificate, error) {
	x5c, _ := entry["x5c"].([]any)
	if len(x5c) == 0 {
		return nil, broken("X509-65", "x5c is missing or empty, it must hold the certificate of the authority")
	}
	encoded, ok := x5c[0].(string)
	if !ok || strings.ContainsAny(encoded, "\r\n") {
		return nil, broken("X509-62", "x5c holds something else than base64 without line breaks")
	}
	der, err := base64.StdEncoding.Strict().DecodeString(encoded)
	if err != nil {
		return nil, broken("X509-62", "x5c is not base64: %w", err)
	}
	authority, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, broken("X509-62", "certificate in x5c is malformed: %w", err)
	}
	if !isAuthority(authority, true) {
		return nil, broken("X509-68", "certificate in x5c is no CA with keyCertSign")
	}
	key, err := parsePublicKey(entry)
	if err != nil {
		return nil, err
	}
	if inCert, ok := authority.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !inCert.Equal(key) {
		return nil, broken("X509-64", "key of the entry is not the key of the certificate in x5c")
	}
	return authority, nil
}

// addSigningKey reads an entry with use jwt-svid or wit-svid. Of two with the same kid the first counts, within one use
// (DEC-09) and across the two (WIT-03), so that what was parsed can always be written again.
func addSigningKey(entry map[string]any, kidRow string, has, otherUseHas func(string) bool, add func(string, crypto.PublicKey) error) error {
	kid, _ := entry["kid"].(string)
	if kid == "" {
		return broken(kidRow, "kid is missing, empty or no string")
	}
	key, err := parsePublicKey(entry)
	if err != nil {
		return err
	}
	if err := checkSigningKey(key); err != nil {
		return err
	}
	if has(kid) {
		return broken("DEC-09", "kid %q occurs twice, the first entry counts", excerpt(kid))
	}
	if otherUseHas(kid) {
		return broken("WIT-03", "kid %q occurs with use %s and use %s, the first entry counts", excerpt(kid), useJWTSVID, useWITSVID)
	}
	if err := add(kid, key); err != nil {
		return broken("TDB-20", "%w", err)
	}
	return nil
}

// MarshalBundle returns the SPIFFE bundle document of b. X.509 authorities come first, then JWT and WIT authorities by
// key id, so equal bundles give equal bytes. Elements hold use, kty and the public key, with x5c for X.509 and kid for
// the others, and nothing else (TDB-17); keys is never null (TDB-10).
//
// WIT authorities are written if b has any. Peers that do not know them may refuse the whole document, so b should have
// them only where the operator asked for it (WIT-52). The error is a [RowError].
func MarshalBundle(b *spiffebundle.Bundle) ([]byte, error) {
	if b == nil {
		return nil, broken("TDB-02", "no bundle given")
	}
	document := struct {
		Keys        []json.RawMessage `json:"keys"`
		Sequence    *uint64           `json:"spiffe_sequence,omitempty"`
		RefreshHint *int64            `json:"spiffe_refresh_hint,omitempty"`
	}{Keys: []json.RawMessage{}}

	authorities := b.X509Authorities()
	slices.SortFunc(authorities, func(a, b *x509.Certificate) int { return bytes.Compare(a.Raw, b.Raw) })
	for _, authority := range authorities {
		jwk, err := marshalAuthority(authority)
		if err != nil {
			return nil, err
		}
		document.Keys = append(document.Keys, jwk)
	}
	jwt, wit := b.JWTAuthorities(), b.WITAuthorities()
	for _, kid := range slices.Sorted(maps.Keys(jwt)) {
		if _, both := wit[kid]; both {
			return nil, broken("WIT-03", "key id %q is used for a JWT and for a WIT authority", excerpt(kid))
		}
		jwk, err := marshalSigningKey(useJWTSVID, kid, jwt[kid])
		if err != nil {
			return nil, err
		}
		document.Keys = append(document.Keys, jwk)
	}
	for _, kid := range slices.Sorted(maps.Keys(wit)) {
		jwk, err := marshalSigningKey(useWITSVID, kid, wit[kid])
		if err != nil {
			return nil, err
		}
		document.Keys = append(document.Keys, jwk)
	}
	if sequence, ok := b.SequenceNumber(); ok {
		document.Sequence = &sequence
	}
	if hint, ok := b.RefreshHint(); ok {
		seconds := int64(hint / time.Second)
		document.RefreshHint = &seconds
	}
	return json.Marshal(document)
}

// RefreshInterval returns how long to wait before fetching the bundle again: its refresh hint, but at least a minute and
// at most a day, and five minutes if it has none (TDB-09).
func RefreshInterval(b *spiffebundle.Bundle) time.Duration {
	hint, ok := b.RefreshHint()
	if !ok {
		return 5 * time.Minute
	}
	return max(time.Minute, min(hint, 24*time.Hour))
}

// Supersedes says whether a bundle that was just fetched takes the place of the current one of the same trust domain,
// which is nil the first time. One with a lower sequence does not; without sequences the latest wins (FED-08, FED-09).
//
// The error is a [RowError] and something to raise an alarm about: an old document came back (FED-08; adopt is false), or
// the content has changed but the sequence has not (TDB-05; adopt is true, since the source is authenticated and waiting
// could leave removed keys trusted).
func Supersedes(fetched, current *spiffebundle.Bundle) (adopt bool, err error) {
	if fetched == nil {
		return false, broken("TDB-02", "no bundle given")
	}
	if current == nil {
		return true, nil
	}
	td := current.TrustDomain()
	if fetched.TrustDomain() != td {
		return false, broken("TDB-18", "bundle of trust domain %q cannot take the place of one of %q", fetched.TrustDomain(), td)
	}
	have, known := current.SequenceNumber()
	sequence, given := fetched.SequenceNumber()
	switch {
	case !known || !given || sequence > have:
		return true, nil
	case sequence < have:
		return false, broken("FED-08", "bundle of trust domain %q has the sequence %d, older than the %d that is stored: an old document came back", td, sequence, have)
	}
	was, wasErr := MarshalBundle(current)
	is, isErr := MarshalBundle(fetched)
	if wasErr != nil || isErr != nil || !bytes.Equal(was, is) {
		return true, broken("TDB-05", "bundle of trust domain %q has changed, but its sequence is still %d", td, sequence)
	}
	return true, nil
}
