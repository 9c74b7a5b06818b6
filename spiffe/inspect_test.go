package spiffe

import (
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"
)

func levels(fs []Finding) (rows []string) {
	rows = []string{}
	for _, f := range fs {
		rows = append(rows, f.Row+" "+f.Level)
	}
	return rows
}

func TestInspectX509SVID(t *testing.T) {
	root := newRoot(t, "example.org", nil)
	intermediate := root.intermediate(t, "example.org", nil)
	type change = func(*x509.Certificate)
	leaf := func(c change) []*x509.Certificate { return []*x509.Certificate{root.leaf(t, webID, c).cert} }
	below := func(c change) []*x509.Certificate {
		i := root.intermediate(t, "example.org", c)
		return []*x509.Certificate{i.leaf(t, webID, nil).cert, i.cert}
	}
	extension := func(e pkix.Extension) change {
		return func(c *x509.Certificate) { c.ExtraExtensions = append(c.ExtraExtensions, e) }
	}

	for _, tt := range []struct {
		name  string
		chain []*x509.Certificate
		want  []string
	}{
		{"as it should be", leaf(nil), nil},
		{"with intermediate and root", []*x509.Certificate{intermediate.leaf(t, webID, nil).cert, intermediate.cert, root.cert}, nil},
		{"nothing", nil, []string{"X509-40 error"}},
		{"nil", []*x509.Certificate{nil}, []string{"X509-40 error"}},
		{"too many", slices.Repeat(leaf(nil), 17), []string{"X509-40 error"}},
		{"X509-04", leaf(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{sanExtension(t, false, false, webID)}
		}), []string{"X509-04 warning"}},
		{"X509-04 with a subject", leaf(func(c *x509.Certificate) {
			c.Subject.CommonName = "w"
			c.ExtraExtensions = []pkix.Extension{sanExtension(t, false, false, webID)}
		}), nil},
		{"X509-06", leaf(func(c *x509.Certificate) {
			c.KeyUsage = 0
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oidKeyUsage, Value: []byte{3, 2, 7, 0x80}})
		}), []string{"X509-06 warning"}},
		{"X509-11", leaf(func(c *x509.Certificate) { c.ExtKeyUsage = nil }), []string{"X509-11 warning"}},
		{"X509-12", leaf(func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }), []string{"X509-12 warning"}},
		{"X509-13 critical EKU", leaf(func(c *x509.Certificate) { c.ExtKeyUsage = nil; extension(criticalEKU(t))(c) }), nil},
		{"X509-14 and 53", []*x509.Certificate{leaf(nil)[0], leaf(nil)[0]}, []string{"X509-53 error"}},
		{"X509-16", below(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature }), []string{"X509-16 warning"}},
		{"X509-17", below(func(c *x509.Certificate) { c.ExtraExtensions = nil }), []string{"X509-17 warning"}},
		{"X509-18", below(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{sanExtension(t, false, false, "spiffe://example.org/ca")}
		}), []string{"X509-18 warning"}},
		{"X509-19", below(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{sanExtension(t, false, false, "spiffe://other.org")}
		}), []string{"X509-19 warning"}},
		{"X509-24", below(func(c *x509.Certificate) { c.NotAfter = testNow.Add(time.Minute) }), []string{"X509-24 warning"}},
		{"X509-25", leaf(func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 158) }), nil},
		{"X509-40 expired", leaf(func(c *x509.Certificate) { c.NotAfter = testNow.Add(-time.Second) }), []string{"X509-40 error"}},
		{"X509-40 not yet valid", leaf(func(c *x509.Certificate) { c.NotBefore = testNow.Add(time.Second) }), []string{"X509-40 error"}},
		{"X509-40 issuer of something else", []*x509.Certificate{leaf(nil)[0], intermediate.cert}, []string{"X509-40 error"}},
		{"several at once", leaf(func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage, c.ExtKeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign, nil
			c.ExtraExtensions = []pkix.Extension{sanExtension(t, true, false, webID, webID)}
		}), []string{"X509-42 error", "X509-44 error", "X509-45 error", "X509-45 error", "X509-52 error", "X509-11 warning"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := InspectX509SVID(tt.chain, testNow)
			if rows := levels(got); !slices.Equal(rows, append([]string{}, tt.want...)) {
				t.Errorf("InspectX509SVID = %v, want %v", got, tt.want)
			}
		})
	}
}

// Errors of the inspection and refusals of the validator are the same thing, for everything that needs no bundle.
func TestInspectX509SVIDAgreesWithCheck(t *testing.T) {
	root := newRoot(t, "example.org", nil)
	for _, uri := range []string{webID, webID + "/", webID + "#", "spiffe://example.org", "https://example.org/w", ""} {
		for _, usage := range []x509.KeyUsage{0, x509.KeyUsageDigitalSignature, x509.KeyUsageCRLSign} {
			leaf := root.leaf(t, uri, func(c *x509.Certificate) { c.KeyUsage = usage; c.DNSNames = []string{"x"} }).cert
			_, err := CheckX509SVIDLeaf(leaf)
			found := slices.ContainsFunc(InspectX509SVID([]*x509.Certificate{leaf}, testNow), func(f Finding) bool {
				return f.Level == LevelError && f.Row == RowOf(err)
			})
			if found != (err != nil) {
				t.Errorf("leaf %q with usage %b: check says %v, inspection %t", uri, usage, err, found)
			}
		}
	}
}

func TestInspectX509Authority(t *testing.T) {
	if got := InspectX509Authority(newRoot(t, "example.org", nil).cert, exampleOrg); len(got) > 0 {
		t.Errorf("good authority: %v", got)
	}
	for row, change := range map[string]func(*x509.Certificate){
		"X509-14": func(c *x509.Certificate) { c.IsCA = false },
		"X509-06": func(c *x509.Certificate) { c.KeyUsage = 0 },
		"X509-16": func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyEncipherment },
		"X509-18": func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{sanExtension(t, false, false, "spiffe://example.org/x")}
		},
		"X509-19": func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{sanExtension(t, false, false, "spiffe://example.com")}
		},
	} {
		got := InspectX509Authority(newRoot(t, "example.org", change).cert, exampleOrg)
		if !slices.ContainsFunc(got, func(f Finding) bool { return f.Row == row }) {
			t.Errorf("%s broken: findings are %v", row, got)
		}
	}
	if got := InspectX509Authority(nil, exampleOrg); len(got) != 1 {
		t.Errorf("nil: %v", got)
	}
}

func TestInspectJWTSVID(t *testing.T) {
	key := newKey(t, elliptic.P256())
	sign := func(header, claims object) string { return token(t, header.text(t), claims.text(t), key) }
	h, c := goodHeader(), goodClaims()
	now := testNow.Unix()
	for _, tt := range []struct {
		name, token string
		want        []string
	}{
		{"as it should be", sign(h, c), nil},
		{"signature of nobody", strings.Join(strings.Split(sign(h, c), ".")[:2], ".") + ".AAAA", nil},
		{"no signature", strings.Join(strings.Split(sign(h, c), ".")[:2], ".") + ".", []string{"JWT-25 error"}},
		{"no kid", sign(h.with("kid", nil), c), []string{"JWT-10 warning"}},
		{"bad algorithm and more", sign(object{"alg": "none", "typ": "x", "foo": 1, "jwk": 1, "kid": 1}, c), []string{"JWT-06 error", "JWT-11 error", "JWT-04 error", "JWT-04 error", "JWT-10 warning"}},
		{"no claims", sign(h, object{}), []string{"JWT-12 error", "JWT-13 error", "JWT-17 error"}},
		{"expired", sign(h, c.with("exp", now-31)), []string{"JWT-18 error"}},
		{"expired in 1970", sign(h, c.with("exp", 0)), []string{"JWT-18 error"}},
		{"exp is a string", sign(h, c.with("exp", "1")), []string{"JWT-17 error"}},
		{"not yet valid", sign(h, c.with("nbf", now+31)), []string{"JWT-20 error"}},
		{"two audiences", sign(h, c.with("aud", []string{"a", "b"})), []string{"JWT-16 warning"}},
		{"issued in the future", sign(h, c.with("iat", now+5)), []string{"JWT-21 warning"}},
		{"path-less", sign(h, c.with("sub", "spiffe://example.org")), []string{"DEC-06 error"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			header, claims, got, err := InspectJWTSVID(tt.token, testNow)
			if err != nil || header["alg"] == nil || claims == nil {
				t.Fatalf("InspectJWTSVID = %v, %v, %v", header, claims, err)
			}
			if rows := levels(got); !slices.Equal(rows, append([]string{}, tt.want...)) {
				t.Errorf("InspectJWTSVID finds %v, want %v", got, tt.want)
			}
		})
	}
}

func TestInspectJWTSVIDReturnsWhatItCouldRead(t *testing.T) {
	key := newKey(t, elliptic.P256())
	header, claims, _, err := InspectJWTSVID(token(t, `{"alg":"ES256","kid":"a"}`, `{"a":1,"a":2}`, key), testNow)
	if header["kid"] != "a" || claims != nil {
		t.Errorf("broken payload: header %v, claims %v", header, claims)
	}
	wantRow(t, "broken payload", err, "JWT-24")
	_, _, _, err = InspectJWTSVID(token(t, `[]`, `{}`, key), testNow)
	wantRow(t, "broken header", err, "JWT-25")
	_, _, _, err = InspectJWTSVID("a.b", testNow)
	wantRow(t, "two parts", err, "JWT-01")
	_, claims, _, err = InspectJWTSVID(token(t, goodHeader().text(t), `{"exp":9007199254740993}`, key), testNow)
	if err != nil || claims["exp"] != json.Number("9007199254740993") {
		t.Errorf("large number: %v, %v", claims["exp"], err)
	}
}

// What crypto/x509 would not issue, or not with our test authority, is put into a copy of a good leaf.
func TestInspectX509SVIDSerialAndKey(t *testing.T) {
	good := newRoot(t, "example.org", nil).leaf(t, webID, nil).cert
	for name, tt := range map[string]struct {
		change func(*x509.Certificate)
		want   []string
	}{
		"X509-25 zero":      {func(c *x509.Certificate) { c.SerialNumber = new(big.Int) }, []string{"X509-25 warning"}},
		"X509-25 negative":  {func(c *x509.Certificate) { c.SerialNumber = big.NewInt(-1) }, []string{"X509-25 warning"}},
		"X509-25 21 octets": {func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 159) }, []string{"X509-25 warning"}},
		"X509-28 P-224":     {func(c *x509.Certificate) { c.PublicKey = newKey(t, elliptic.P224()).Public() }, []string{"X509-28 warning"}},
		"X509-28 RSA 1024": {func(c *x509.Certificate) {
			c.PublicKey = &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 1023), E: 65537}
		}, []string{"X509-28 warning"}},
		"X509-28 RSA 2048":     {func(c *x509.Certificate) { c.PublicKey = testRSAKey().Public() }, []string{}},
		"X509-40 unknown crit": {func(c *x509.Certificate) { c.UnhandledCriticalExtensions = []asn1.ObjectIdentifier{{1, 2, 3}} }, []string{"X509-40 error"}},
	} {
		leaf := *good
		tt.change(&leaf)
		if got := InspectX509SVID([]*x509.Certificate{&leaf}, testNow); !slices.Equal(levels(got), tt.want) {
			t.Errorf("%s: InspectX509SVID = %v, want %v", name, got, tt.want)
		}
	}
}
