package spiffe

import (
	"crypto"
	"fmt"
	"math"
	"slices"
)

// Bounds of the key set of an issuer of user tokens.
const (
	MaxUserKeysBytes = 256 << 10
	MaxUserKeys      = 100
)

var userKeysLimits = jsonLimits{bytes: math.MaxInt, depth: 16, values: 20_000}

// ParseUserKeys reads the JWK Set of an issuer that is not of SPIFFE, such as an OpenID provider, and returns its signing
// keys by key id: RSA keys of at least 2048 bits, and EC keys on P-256, P-384 and P-521.
//
// What is there for another use, such as encryption, or cannot be used, is left out and returned as errors, for the log.
// The last error is about the set as a whole, which is then not to be used: it is malformed, holds a private or a symmetric
// key, names one key id twice, or has no usable key. [RFC 7517 §5]
func ParseUserKeys(doc []byte) (map[string]crypto.PublicKey, []error, error) {
	if len(doc) > MaxUserKeysBytes {
		return nil, nil, fmt.Errorf("the JWK Set has %d bytes, at most %d are allowed", len(doc), MaxUserKeysBytes)
	}
	set, err := readJSONObject(doc, userKeysLimits, "JWT-25", "JWT-24")
	if err != nil {
		return nil, nil, fmt.Errorf("the JWK Set: %w", cause(err))
	}
	entries, ok := set["keys"].([]any)
	if !ok {
		return nil, nil, fmt.Errorf("the JWK Set has no keys, or they are no array")
	}
	if len(entries) > MaxUserKeys {
		return nil, nil, fmt.Errorf("the JWK Set has %d keys, at most %d are allowed", len(entries), MaxUserKeys)
	}
	keys := make(map[string]crypto.PublicKey, len(entries))
	var skipped []error
	for i, element := range entries {
		entry, ok := element.(map[string]any)
		if !ok {
			return nil, nil, fmt.Errorf("key %d of the JWK Set is %s, it must be an object", i, jsonKind(element))
		}
		if err := checkPublic(entry); err != nil {
			return nil, nil, fmt.Errorf("key %d of the JWK Set: %w", i, err)
		}
		kid, key, err := parseUserKey(entry)
		if err != nil {
			skipped = append(skipped, fmt.Errorf("key %d of the JWK Set is left out: %w", i, err))
			continue
		}
		if keys[kid] != nil {
			return nil, nil, fmt.Errorf("the JWK Set has two keys with the kid %q", excerpt(kid))
		}
		keys[kid] = key
	}
	if len(keys) == 0 {
		if len(skipped) > 0 {
			return nil, skipped, fmt.Errorf("the JWK Set has no key that can verify a token: %w", skipped[0])
		}
		return nil, nil, fmt.Errorf("the JWK Set has no key that can verify a token")
	}
	return keys, skipped, nil
}

// checkPublic refuses what holds a secret: whoever reads the set could sign.
func checkPublic(entry map[string]any) error {
	if kty, _ := entry["kty"].(string); kty == "oct" {
		return fmt.Errorf("kty is oct: whoever verifies with a symmetric key can sign with it, too")
	}
	for _, name := range [...]string{"d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"} {
		if _, private := entry[name]; private {
			return fmt.Errorf("it holds the private member %q, so that its key is no longer secret; have the issuer replace the key", name)
		}
	}
	return nil
}

func parseUserKey(entry map[string]any) (kid string, key crypto.PublicKey, err error) {
	kid, ok := entry["kid"].(string)
	if !ok || kid == "" || len(kid) > maxExcerpt {
		return "", nil, fmt.Errorf("kid is missing, no string, empty or longer than %d bytes; tokens name their key by it", maxExcerpt)
	}
	if use, present := entry["use"]; present && use != "sig" {
		return "", nil, fmt.Errorf("use is %s, not sig", quoteValue(use))
	}
	if ops, present := entry["key_ops"]; present {
		if list, ok := ops.([]any); !ok || !slices.Contains(list, any("verify")) {
			return "", nil, fmt.Errorf("key_ops do not hold verify")
		}
	}
	if key, err = parsePublicKey(entry); err != nil {
		return "", nil, cause(err)
	}
	if err := checkSigningKey(key); err != nil {
		return "", nil, cause(err)
	}
	if alg, present := entry["alg"]; present {
		name, ok := alg.(string)
		if !ok || !slices.Contains(jwtAlgorithms[:], name) || keyFits(name, key) != nil {
			return "", nil, fmt.Errorf("alg is %s, which does not go with the key, or is none of %v", quoteValue(alg), jwtAlgorithms)
		}
	}
	return kid, key, nil
}

// cause takes the row off an error: rows are about SVIDs, and these keys sign none.
func cause(err error) error {
	for {
		r, ok := err.(*RowError)
		if !ok {
			return err
		}
		err = r.Err
	}
}
