package svidcache

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// maxTokenBytes bounds a JWT-SVID.
const maxTokenBytes = 64 << 10

// checkJWT says whether a JWT-SVID that the CA issued says what was asked for: the entry's ID, these audiences and no others,
// and that it is not over. A caller never gets another's token. Whether the signature is good is for verifiers to find out.
func checkJWT(e *entry, audience []string, a JWTAnswer, now time.Time) error {
	if len(a.Token) > maxTokenBytes {
		return fmt.Errorf("the CA issued a JWT-SVID of %d bytes, more than the %d allowed", len(a.Token), maxTokenBytes)
	}
	parts := strings.Split(a.Token, ".")
	if len(parts) != 3 {
		return errors.New("the CA issued something else than a JWT-SVID")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	var claims struct {
		Sub string          `json:"sub"`
		Aud json.RawMessage `json:"aud"`
	}
	if err == nil {
		err = json.Unmarshal(payload, &claims)
	}
	if err != nil {
		return errors.New("the CA issued a JWT-SVID whose claims cannot be read")
	}
	var aud []string
	if err := json.Unmarshal(claims.Aud, &aud); err != nil {
		var one string
		if err := json.Unmarshal(claims.Aud, &one); err != nil {
			return errors.New("the CA issued a JWT-SVID whose audience cannot be read")
		}
		aud = []string{one}
	}
	switch {
	case claims.Sub != e.spiffeID.String():
		return fmt.Errorf("the CA issued a JWT-SVID for %q, and the entry is for %q", claims.Sub, e.spiffeID)
	case !slices.Equal(sorted(aud), sorted(audience)):
		return fmt.Errorf("the CA issued a JWT-SVID for %d audiences that are not the %d asked for", len(aud), len(audience))
	case !now.Before(a.ExpiresAt):
		return fmt.Errorf("the CA issued a JWT-SVID that ended at %s, and it is %s; do the clocks of CA and agent agree?", a.ExpiresAt, now)
	}
	return nil
}

func sorted(s []string) []string { return slices.Compact(slices.Sorted(slices.Values(s))) }

// jtiOf reads the jti of a JWT-SVID; it is empty if there is none.
func jtiOf(jwt string) string {
	parts := strings.Split(jwt, ".")
	if len(parts) != 3 || len(parts[1]) > maxTokenBytes {
		return ""
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return ""
	}
	var claims struct {
		JTI string `json:"jti"`
	}
	if err := json.Unmarshal(payload, &claims); err != nil {
		return ""
	}
	return claims.JTI
}
