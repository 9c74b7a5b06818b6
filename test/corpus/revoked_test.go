package corpus

import (
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/signet-id/signet/policy"
)

// TestRevokedIsRefusedEverywhere: what a policy allows is refused at every enforcement point once the caller's ID, its
// certificate or its token is revoked, and allowed again when the revocation is gone.
func TestRevokedIsRefusedEverywhere(t *testing.T) {
	documents, all := tables(t)
	// One call that is allowed for each way of asking.
	pick := func(fits func(*policy.TestCase) bool) policy.TestCase {
		for _, c := range all {
			if c.Allow && fits(&c) {
				return c
			}
		}
		t.Fatal("no such case")
		return policy.TestCase{}
	}
	cases := map[string]policy.TestCase{
		"request": pick(func(c *policy.TestCase) bool {
			return isHTTP(c) && c.Request.Method == "GET" && c.Request.Token == nil && len(c.Headers) == 0
		}),
		"RPC":        pick(isGRPC),
		"connection": pick(isTLS),
		"token": pick(func(c *policy.TestCase) bool {
			return isHTTP(c) && c.Request.Token != nil && c.Request.Token.ID == c.Request.Peer
		}),
	}
	var services []spiffeid.ID
	for _, c := range cases {
		services = append(services, c.Request.Service)
	}
	token := cases["token"].Request.Token
	f := start(t, documents, append(services, token.ID), nil)
	// A token from the agent has a jti, of which the CA knows only the hash.
	svid, err := f.tokens.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: token.Audience[0], ExtraAudiences: token.Audience[1:], Subject: token.ID})
	if err != nil {
		t.Fatal(err)
	}
	f.jwts[tokenKey(token)] = svid.Marshal()
	service := &backend{}
	points := f.points(t, services, service)
	for kind, c := range cases {
		leaf, err := x509.ParseCertificate(f.cert(t, c.Request.Peer).Certificate[0])
		if err != nil {
			t.Fatal(err)
		}
		targets := map[string]string{"id": "id: " + c.Request.Peer.String(), "serial": "serial: \"0x" + hex.EncodeToString(leaf.SerialNumber.Bytes()) + "\""}
		if c.Request.Token != nil {
			targets["jti"] = fmt.Sprintf("jti: %q", svid.Claims["jti"])
		}
		for by, target := range targets {
			t.Run(kind+" by "+by, func(t *testing.T) {
				asks := 0
				everywhere := func(want bool) {
					t.Helper()
					for _, p := range points {
						// RBAC is a file: it knows no revocations. The pure package is asked about requests, not certificates.
						if !p.takes(&c) || p.name == rbacPoint || p.name == purePoint && by != "id" {
							continue
						}
						asks++
						var got answer
						for end := time.Now().Add(within); time.Now().Before(end); {
							if got = p.call(t, &c); got.allowed == want {
								break
							}
						}
						if got.allowed != want {
							t.Errorf("%s: allowed %t, want %t (%s)", p.name, got.allowed, want, got.what)
						}
					}
				}
				everywhere(true)
				f.Apply(fmt.Sprintf("kind: Revocation\nname: test\n%s\nreason: a test\n", target))
				everywhere(false)
				f.Delete("Revocation", "test")
				everywhere(true)
				if asks < 9 {
					t.Errorf("%d answers were looked at", asks)
				}
			})
		}
	}
}
