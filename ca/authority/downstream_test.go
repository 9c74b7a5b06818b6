package authority

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/spiffe"
)

func parseAll(t testing.TB, chain [][]byte) []*x509.Certificate {
	t.Helper()
	var out []*x509.Certificate
	for _, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, cert)
	}
	return out
}

// below signs with a downstream CA's key: an SVID, or another CA.
func below(t testing.TB, chain []*x509.Certificate, key crypto.Signer, change func(*x509.Certificate)) (*x509.Certificate, crypto.Signer) {
	t.Helper()
	public := newKey(t)
	template := caTemplate("", testNow, 10*time.Minute)
	template.IsCA, template.KeyUsage = false, x509.KeyUsageDigitalSignature
	template.URIs = append(template.URIs, spiffeid.RequireFromString("spiffe://example.org/below").URL())
	if change != nil {
		change(template)
	}
	return (&signer{cert: chain[0], key: key}).sign(t, template, public.Public()), public
}

func TestX509_20_21_DownstreamCA(t *testing.T) {
	set := living(t)
	key := newKey(t)
	made, err := set.SignDownstream(t.Context(), DownstreamRequest{PublicKey: key.Public(), TTL: time.Hour, Depth: 1})
	if err != nil {
		t.Fatal(err)
	}
	chain := parseAll(t, made.Chain)
	cert := chain[0]
	if len(chain) != 1 || cert.URIs[0].String() != "spiffe://example.org" || !cert.IsCA || cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign ||
		len(cert.ExtKeyUsage) != 0 || cert.MaxPathLen != 0 || !cert.MaxPathLenZero || len(cert.DNSNames) != 0 {
		t.Errorf("the certificate has the profile %+v", cert)
	}
	if got := cert.NotAfter.Sub(testNow); got > time.Hour || got < time.Hour-2*time.Second {
		t.Errorf("it is valid for %v, want the hour that was asked for", got)
	}
	leaf, _ := below(t, chain, key, nil)
	if id, _, err := spiffe.VerifyX509SVID([]*x509.Certificate{leaf, cert}, set.Bundle().SPIFFE(), spiffe.X509Options{Now: testNow}); err != nil || id.Path() != "/below" {
		t.Errorf("an SVID of the downstream CA: %q, %v", id, err)
	}
	// The path length holds: a CA below it signs nothing that anybody takes.
	ca, caKey := below(t, chain, key, func(c *x509.Certificate) {
		c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign
		c.URIs[0].Path = ""
	})
	leaf, _ = below(t, []*x509.Certificate{ca}, caKey, nil)
	if _, _, err := spiffe.VerifyX509SVID([]*x509.Certificate{leaf, ca, cert}, set.Bundle().SPIFFE(), spiffe.X509Options{Now: testNow}); err == nil {
		t.Error("an SVID two CAs below is good, in spite of the path length")
	}
	if made, err := set.SignDownstream(t.Context(), DownstreamRequest{PublicKey: newKey(t).Public(), Depth: 3}); err != nil || made.PathLen != 2 || parseAll(t, made.Chain)[0].MaxPathLen != 2 {
		t.Errorf("depth 3: %+v, %v; want path length 2", made, err)
	}
}

func TestDownstreamTTL(t *testing.T) {
	set := living(t, func(c *Config) { c.X509Lifetime = 30 * time.Hour })
	for _, tt := range []struct{ ask, most, want time.Duration }{
		{0, 0, DefaultDownstreamTTL},
		{time.Hour, 0, time.Hour},
		{28 * time.Hour, 2 * time.Hour, 2 * time.Hour},
		{1000 * time.Hour, 1000 * time.Hour, 30 * time.Hour}, // X509-24: inside the authority's own
	} {
		made, err := set.SignDownstream(t.Context(), DownstreamRequest{PublicKey: newKey(t).Public(), TTL: tt.ask, MaxTTL: tt.most})
		if err != nil {
			t.Fatal(err)
		}
		if got := made.NotAfter.Sub(testNow.Truncate(time.Second)); got != tt.want {
			t.Errorf("asked %v, at most %v: got %v, want %v", tt.ask, tt.most, got, tt.want)
		}
	}
}

func TestDownstreamRefusals(t *testing.T) {
	set := living(t)
	for _, tt := range []struct {
		name string
		r    DownstreamRequest
		want string
	}{
		{"negative ttl", DownstreamRequest{PublicKey: newKey(t).Public(), TTL: -time.Second}, "negative"},
		{"weak key", DownstreamRequest{PublicKey: rsaKey(t, 1024, 65537)}, "1024 bits"},
		{"no key", DownstreamRequest{}, "kind is"},
		{"our own key", DownstreamRequest{PublicKey: set.Bundle().X509[0].Certificate.PublicKey}, "of this CA"},
		{"our own jwt key", DownstreamRequest{PublicKey: set.Bundle().JWT[0].PublicKey}, "of this CA"},
	} {
		if _, err := set.SignDownstream(t.Context(), tt.r); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want ErrRefused with %q", tt.name, err, tt.want)
		}
	}
	// Below an upstream that leaves no room for more CAs.
	f, org, _ := openBelow(t, nil)
	issuing := caTemplate("one level", testNow, 100*time.Hour)
	issuing.MaxPathLen = 1
	org.issuing = newSigner(t, org.root, issuing)
	_, err := f.set.RenewIntermediate(t.Context())
	f.must(err)
	if _, err := f.set.SignDownstream(t.Context(), DownstreamRequest{PublicKey: newKey(t).Public(), Depth: 1}); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "no room") {
		t.Errorf("a CA below a full path = %v", err)
	}
}

// The chain of a downstream CA below a CA that is below an upstream leads to the upstream's root.
func TestDownstreamBelowUpstream(t *testing.T) {
	f, org, _ := openBelow(t, nil)
	key := newKey(t)
	made, err := f.set.SignDownstream(t.Context(), DownstreamRequest{PublicKey: key.Public()})
	f.must(err)
	chain := parseAll(t, made.Chain)
	if len(chain) != 3 || !chain[2].Equal(org.issuing.cert) {
		t.Fatalf("the chain has %d certificates", len(chain))
	}
	leaf, _ := below(t, chain, key, nil)
	if _, _, err := spiffe.VerifyX509SVID(append([]*x509.Certificate{leaf}, chain...), f.set.Bundle().SPIFFE(), spiffe.X509Options{Now: testNow}); err != nil {
		t.Error(err)
	}
	if f.set.OwnIssuer(chain[0]) || !f.set.OwnIssuer(chain[1]) || f.set.OwnIssuer(org.root.cert) {
		t.Error("what is ours and what is not is confused")
	}
}

func TestDownstreamJWTKeys(t *testing.T) {
	at := newClock(testNow)
	set := living(t, func(c *Config) { c.Now = at.now })
	one, two := spiffeid.RequireFromString("spiffe://example.org/one"), spiffeid.RequireFromString("spiffe://example.org/two")
	key := func(kid string) ForeignJWTKey {
		spki, err := x509.MarshalPKIXPublicKey(newKey(t).Public())
		if err != nil {
			t.Fatal(err)
		}
		return ForeignJWTKey{KeyID: kid, PublicKey: spki, ExpiresAt: testNow.Add(time.Hour)}
	}
	mine := set.Bundle().JWT[0]
	ownSPKI, err := x509.MarshalPKIXPublicKey(mine.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	k1 := key("kid-1")
	if changed, err := set.PublishJWTKey(t.Context(), one, k1); !changed || err != nil {
		t.Fatalf("publishing: %t, %v", changed, err)
	}
	if changed, err := set.PublishJWTKey(t.Context(), one, k1); changed || err != nil {
		t.Errorf("publishing the same again: %t, %v", changed, err)
	}
	find := func(kid string) *JWTAuthority {
		jwt := set.Bundle().JWT
		if i := slices.IndexFunc(jwt, func(a JWTAuthority) bool { return a.KeyID == kid }); i >= 0 {
			return &jwt[i]
		}
		return nil
	}
	if a := find("kid-1"); a == nil || a.Origin != one.String() || !a.ExpiresAt.Equal(k1.ExpiresAt) {
		t.Errorf("the bundle has %+v", a)
	}
	other := key("kid-1")
	again := k1
	again.KeyID = "kid-2"
	late, soon := key("late"), key("soon")
	late.ExpiresAt, soon.ExpiresAt = testNow.Add(400*24*time.Hour), testNow.Add(-time.Second)
	stolen := ForeignJWTKey{KeyID: "stolen", PublicKey: ownSPKI, ExpiresAt: k1.ExpiresAt}
	for _, tt := range []struct {
		name string
		by   spiffeid.ID
		key  ForeignJWTKey
		want string
	}{
		{"our key id", one, key(mine.KeyID), "authority of this CA"},
		{"our key under another id", one, stolen, "authority of this CA"},
		{"another key under its id", one, other, "published already"},
		{"another CA's key", two, k1, "published already"},
		{"one key under two ids", two, again, "under another id"},
		{"expired", one, soon, "in the future"},
		{"for ever", one, late, "within"},
	} {
		if changed, err := set.PublishJWTKey(t.Context(), tt.by, tt.key); changed || !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %t, %v; want ErrRefused with %q", tt.name, changed, err, tt.want)
		}
	}
	if public := find(mine.KeyID).PublicKey.(*ecdsa.PublicKey); !public.Equal(mine.PublicKey) {
		t.Error("our own key was displaced")
	}
	for i := 1; i < MaxDownstreamJWTKeys; i++ {
		if _, err := set.PublishJWTKey(t.Context(), one, key(fmt.Sprint("more-", i))); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := set.PublishJWTKey(t.Context(), one, key("one too many")); !errors.Is(err, ErrTooManyKeys) {
		t.Errorf("key %d of one CA = %v, want ErrTooManyKeys", MaxDownstreamJWTKeys+1, err)
	}
	if _, err := set.PublishJWTKey(t.Context(), two, key("of two")); err != nil {
		t.Errorf("a full neighbour keeps others out: %v", err)
	}
	if by, err := set.RemoveJWTKey(t.Context(), "kid-1"); err != nil || by != one.String() || find("kid-1") != nil {
		t.Errorf("removing: by %q, %v", by, err)
	}
	if _, err := set.RemoveJWTKey(t.Context(), mine.KeyID); !errors.Is(err, ErrUnknownAuthority) {
		t.Errorf("removing our own authority that way = %v", err)
	}
	at.set(testNow.Add(time.Hour + signedSlack + time.Second))
	n, err := set.DropEnded(t.Context())
	if err != nil || n != MaxDownstreamJWTKeys || len(set.Bundle().JWT) != 1 {
		t.Errorf("dropped %d (%v), %d left; want %d and ours", n, err, len(set.Bundle().JWT), MaxDownstreamJWTKeys)
	}
	// A Set that is opened anew has them too.
	if _, err := set.PublishJWTKey(t.Context(), two, ForeignJWTKey{KeyID: "later", PublicKey: key("").PublicKey, ExpiresAt: at.now().Add(time.Hour)}); err != nil {
		t.Fatal(err)
	}
	again2, err := Open(t.Context(), set.config)
	if err != nil || len(again2.Bundle().JWT) != 2 {
		t.Errorf("opened anew: %v", err)
	}
	if !bytes.Contains([]byte(again2.Bundle().JWT[1].Origin), []byte("/two")) {
		t.Errorf("the key is of %q", again2.Bundle().JWT[1].Origin)
	}
}

// A downstream CA that was stolen takes no key out of the bundle that is somebody else's: neither one that an operator
// appended, nor one that the upstream CA publishes after the id was taken.
func TestDownstreamJWTKeyDisplacesNoOther(t *testing.T) {
	f, _, _ := openBelow(t, nil)
	thief := spiffeid.RequireFromString("spiffe://example.org/thief")
	key := func(kid string) ForeignJWTKey {
		return ForeignJWTKey{KeyID: kid, PublicKey: marshalKey(t, newPublicKey(t)), ExpiresAt: testNow.Add(time.Hour)}
	}
	find := func(kid string) (found JWTAuthority) {
		for _, a := range f.set.Bundle().JWT {
			if a.KeyID == kid {
				found = a
			}
		}
		return found
	}
	moving := key("moving")
	if _, _, err := f.set.Append(t.Context(), nil, []JWTKey{{KeyID: moving.KeyID, PublicKey: moving.PublicKey, ExpiresAt: moving.ExpiresAt}}, "test"); err != nil {
		t.Fatal(err)
	}
	renamed := moving
	renamed.KeyID = "renamed"
	for _, k := range []ForeignJWTKey{key("moving"), renamed} {
		if changed, err := f.set.PublishJWTKey(t.Context(), thief, k); changed || !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "appended authority") {
			t.Errorf("the key id or the key of an appended authority: %t, %v", changed, err)
		}
	}
	if changed, err := f.set.PublishJWTKey(t.Context(), thief, moving); !changed || err != nil {
		t.Errorf("the CA whose key was appended publishes it itself: %t, %v", changed, err)
	}
	if _, err := f.set.PublishJWTKey(t.Context(), thief, key("next of the upstream")); err != nil {
		t.Fatal(err)
	}
	next := key("next of the upstream")
	root := f.set.Bundle().X509[0].Certificate
	if _, err := f.set.FollowUpstream(t.Context(), []*x509.Certificate{root}, []ForeignJWTKey{next, key("other")}); err != nil {
		t.Fatal(err)
	}
	if a := find(next.KeyID); a.Origin != OriginUpstream || !bytes.Equal(marshalKey(t, a.PublicKey), next.PublicKey) {
		t.Errorf("under the key id of the upstream is the key of %q", a.Origin)
	}
}
