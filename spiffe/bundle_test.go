package spiffe

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func rowsOf(errs []error) []string {
	rows := []string{}
	for _, err := range errs {
		rows = append(rows, RowOf(err))
	}
	return rows
}

// V112 to V124, and what else an entry can be.
func TestBundleVectors(t *testing.T) {
	root, second := newRoot(t, "example.org", nil), newRoot(t, "example.org", nil)
	leaf := root.leaf(t, webID, nil)
	jwtKey, otherKey := newKey(t, elliptic.P256()), newKey(t, elliptic.P256())
	b64Of := func(c *x509.Certificate) string { return base64.StdEncoding.EncodeToString(c.Raw) }

	rootEntry := entry(t, "x509-svid", "", root.cert.PublicKey, root.cert)
	jwtEntry := entry(t, "jwt-svid", "k1", jwtKey.Public())
	p224 := object{"use": "jwt-svid", "kid": "p224", "kty": "EC", "crv": "P-224", "x": b64(make([]byte, 28)), "y": b64(make([]byte, 28))}
	oct := object{"use": "jwt-svid", "kid": "o", "kty": "oct", "k": b64([]byte("secret"))}
	private := object{"use": "jwt-svid", "kid": "p", "kty": "EC", "crv": "P-256", "x": jwtEntry["x"], "y": jwtEntry["y"], "d": b64(must(jwtKey.Bytes()))}
	edPublic, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	y := must(base64.RawURLEncoding.DecodeString(jwtEntry["y"].(string)))
	y[0] ^= 1

	for _, v := range []struct {
		name           string
		entries        []any
		x509, jwt, wit int
		skipped        []string
	}{
		{"V112", nil, 0, 0, 0, nil},
		{"V114", []any{rootEntry, rootEntry.with("use", "sig")}, 1, 0, 0, []string{"TDB-14"}},
		{"V115", []any{rootEntry.with("use", nil), rootEntry}, 1, 0, 0, []string{"TDB-14"}},
		{"V116", []any{jwtEntry.with("kty", "XYZ").with("kid", "x"), jwtEntry}, 0, 1, 0, []string{"TDB-13"}},
		{"V117", []any{jwtEntry.with("use", "JWT-SVID")}, 0, 0, 0, []string{"TDB-14"}},
		{"V118", []any{rootEntry.with("x5c", nil), rootEntry}, 1, 0, 0, []string{"X509-65"}},
		{"V119", []any{rootEntry.with("x5c", []string{b64Of(root.cert), b64Of(second.cert)})}, 1, 0, 0, nil},
		{"V120", []any{jwtEntry.with("kid", nil), jwtEntry}, 0, 1, 0, []string{"JWT-27"}},
		{"V121", []any{oct}, 0, 0, 0, []string{"JWT-33"}},
		{"X509-61 kid on an authority is not our business", []any{rootEntry.with("kid", "x")}, 1, 0, 0, nil},
		{"X509-62 line breaks", []any{rootEntry.with("x5c", []string{b64Of(root.cert)[:64] + "\n" + b64Of(root.cert)[64:]})}, 0, 0, 0, []string{"X509-62"}},
		{"X509-62 base64url", []any{rootEntry.with("x5c", []string{base64.RawURLEncoding.EncodeToString(append(root.cert.Raw, 0xff))})}, 0, 0, 0, []string{"X509-62"}},
		{"X509-62 number", []any{rootEntry.with("x5c", []int{1})}, 0, 0, 0, []string{"X509-62"}},
		{"X509-62 junk after the certificate", []any{rootEntry.with("x5c", []string{base64.StdEncoding.EncodeToString(append(slices.Clone(root.cert.Raw), 0))})}, 0, 0, 0, []string{"X509-62"}},
		{"X509-64 key of another", []any{entry(t, "x509-svid", "", second.cert.PublicKey).with("x5c", []string{b64Of(root.cert)})}, 0, 0, 0, []string{"X509-64"}},
		{"X509-64 no key members", []any{rootEntry.with("x", nil)}, 0, 0, 0, []string{"TDB-20"}},
		{"X509-65 empty", []any{rootEntry.with("x5c", []string{})}, 0, 0, 0, []string{"X509-65"}},
		{"X509-65 a string", []any{rootEntry.with("x5c", b64Of(root.cert))}, 0, 0, 0, []string{"X509-65"}},
		{"X509-66 second is junk", []any{rootEntry.with("x5c", []any{b64Of(root.cert), 1})}, 1, 0, 0, nil},
		{"X509-67 two roots", []any{rootEntry, entry(t, "x509-svid", "", second.cert.PublicKey, second.cert)}, 2, 0, 0, nil},
		{"X509-68 leaf", []any{entry(t, "x509-svid", "", leaf.cert.PublicKey, leaf.cert)}, 0, 0, 0, []string{"X509-68"}},
		{"JWT-08 P-224", []any{p224}, 0, 0, 0, []string{"TDB-20"}},
		{"JWT-08 RSA of 1 bit", []any{object{"use": "jwt-svid", "kid": "r", "kty": "RSA", "n": "Aw", "e": "AQAB"}}, 0, 0, 0, []string{"JWT-08"}},
		{"JWT-08 RSA too large", []any{object{"use": "jwt-svid", "kid": "r", "kty": "RSA", "n": b64(bytes.Repeat([]byte{0xff}, 1025)), "e": "AQAB"}}, 0, 0, 0, []string{"TDB-20"}},
		{"JWT-08 Ed25519", []any{entry(t, "jwt-svid", "ed", edPublic)}, 0, 0, 0, []string{"JWT-08"}},
		{"JWT-28 private key", []any{private}, 0, 0, 0, []string{"JWT-28"}},
		{"JWT-34 Kid", []any{jwtEntry.with("kid", nil).with("Kid", "k1")}, 0, 0, 0, []string{"JWT-27"}},
		{"DEC-04 authority with a trailing slash", []any{slashEntry(t)}, 1, 0, 0, nil},
		{"DEC-09 kid twice", []any{jwtEntry, entry(t, "jwt-svid", "k1", otherKey.Public())}, 0, 1, 0, []string{"DEC-09"}},
		{"TDB-12 nothing usable", []any{object{"use": "a"}, object{"use": "b"}}, 0, 0, 0, []string{"TDB-14", "TDB-14"}},
		{"TDB-14 use is a number", []any{jwtEntry.with("use", 1)}, 0, 0, 0, []string{"TDB-14"}},
		{"TDB-20 not on the curve", []any{jwtEntry.with("y", b64(y)), rootEntry}, 1, 0, 0, []string{"TDB-20"}},
		{"TDB-20 entry is a string", []any{"x", nil, rootEntry}, 1, 0, 0, []string{"TDB-20", "TDB-20"}},
		{"TDB-20 unknown members", []any{jwtEntry.with("alg", "RS256").with("x5t", 1).with("x5u", []int{1})}, 0, 1, 0, nil},
		{"WIT-03 one kid for two uses", []any{jwtEntry, entry(t, "wit-svid", "k1", otherKey.Public())}, 0, 1, 0, []string{"WIT-03"}},
		{"WIT-50", []any{jwtEntry.with("use", "wit-svid")}, 0, 0, 1, nil},
	} {
		t.Run(v.name, func(t *testing.T) {
			bundle, skipped, err := ParseBundle(exampleOrg, document(t, v.entries...))
			if err != nil {
				t.Fatalf("ParseBundle: %v", err)
			}
			if got := []int{len(bundle.X509Authorities()), len(bundle.JWTAuthorities()), len(bundle.WITAuthorities())}; !slices.Equal(got, []int{v.x509, v.jwt, v.wit}) {
				t.Errorf("ParseBundle gives %d X.509, JWT and WIT authorities, want %d, %d, %d", got, v.x509, v.jwt, v.wit)
			}
			if !slices.Equal(rowsOf(skipped), append([]string{}, v.skipped...)) {
				t.Errorf("skipped: %v, want %v", skipped, v.skipped)
			}
			for _, key := range bundle.JWTAuthorities() {
				if !jwtKey.PublicKey.Equal(key) {
					t.Error("the JWT authority is not the first one")
				}
			}
			for _, authority := range bundle.X509Authorities()[:min(1, v.x509)] {
				if !authority.Equal(root.cert) && !strings.HasPrefix(v.name, "DEC-04") {
					t.Error("the first X.509 authority is not the first one")
				}
			}
		})
	}
}

// slashEntry is the authority of the example in the bundle standard.
func slashEntry(t testing.TB) object {
	t.Helper()
	root := newRoot(t, "example.org/", nil)
	return entry(t, "x509-svid", "", root.cert.PublicKey, root.cert)
}

func TestBundleDocumentVectors(t *testing.T) {
	deep := strings.Repeat("[", 40) + strings.Repeat("]", 40)
	for _, v := range []struct{ name, doc, row string }{
		{"V113 no keys", `{}`, "TDB-10"},
		{"V113 null", `{"keys":null}`, "TDB-10"},
		{"V122 sequence", `{"keys":[],"spiffe_sequence":"1"}`, "TDB-05"},
		{"V122 hint", `{"keys":[],"spiffe_refresh_hint":300.5}`, "TDB-08"},
		{"V124", `{"keys":[],"x":{"a":[1,2.5,null,true]}}`, ""},
		{"TDB-02 array", `[]`, "TDB-02"},
		{"TDB-02 string", `"keys"`, "TDB-02"},
		{"TDB-05 fraction", `{"keys":[],"spiffe_sequence":1.0}`, "TDB-05"},
		{"TDB-05 negative", `{"keys":[],"spiffe_sequence":-1}`, "TDB-05"},
		{"TDB-05 null", `{"keys":[],"spiffe_sequence":null}`, "TDB-05"},
		{"TDB-05 65 bits", `{"keys":[],"spiffe_sequence":18446744073709551616}`, "TDB-05"},
		{"TDB-08 string", `{"keys":[],"spiffe_refresh_hint":"300"}`, "TDB-08"},
		{"TDB-08 exponent", `{"keys":[],"spiffe_refresh_hint":3e2}`, "TDB-08"},
		{"TDB-10 object", `{"keys":{}}`, "TDB-10"},
		{"TDB-22 Keys", `{"Keys":[]}`, "TDB-10"},
		{"TDB-22 data after the document", `{"keys":[]} {}`, "TDB-22"},
		{"TDB-22 nothing", ``, "TDB-22"},
		{"TDB-22 comma too much", `{"keys":[],}`, "TDB-22"},
		{"TDB-22 half a surrogate pair", `{"keys":[],"\ud800":1}`, "TDB-22"},
		{"TDB-21 deep", `{"keys":[],"x":` + deep + `}`, "TDB-22"},
		{"TDB-21 large", `{"keys":[],"x":"` + strings.Repeat("a", MaxBundleBytes) + `"}`, "TDB-21"},
		{"TDB-21 many keys", `{"keys":[` + strings.Repeat("{},", MaxBundleKeys) + `{}]}`, "TDB-21"},
		{"TDB-21 many values", `{"keys":[],"x":[` + strings.Repeat("1,", 100_000) + `1]}`, "TDB-22"},
		{"DEC-10 keys twice", `{"keys":[],"keys":[]}`, "DEC-10"},
		{"DEC-10 in an entry", `{"keys":[{"use":"x","use":"y"}]}`, "DEC-10"},
		{"DEC-19", "\ufeff" + `{"keys":[]}`, "DEC-19"},
		{"white space", " \n{ \"keys\" : [ ] }\r\n\t", ""},
	} {
		t.Run(v.name, func(t *testing.T) {
			bundle, skipped, err := ParseBundle(exampleOrg, []byte(v.doc))
			wantRow(t, "ParseBundle("+excerpt(v.doc)+")", err, v.row)
			if (bundle == nil) != (err != nil) || len(skipped) > 0 {
				t.Errorf("ParseBundle = %v, %v", bundle, skipped)
			}
		})
	}
	_, _, err := ParseBundle(spiffeid.TrustDomain{}, []byte(`{"keys":[]}`))
	wantRow(t, "no trust domain", err, "TDB-18")
}

func TestTDB_06_SequenceIsExact(t *testing.T) {
	for _, sequence := range []uint64{0, 1, 9007199254740993, 9223372036854775808, 18446744073709551615} { // V123 is the third
		bundle, _, err := ParseBundle(exampleOrg, fmt.Appendf(nil, `{"keys":[],"spiffe_sequence":%d}`, sequence))
		if err != nil {
			t.Fatalf("sequence %d: %v", sequence, err)
		}
		doc := must(MarshalBundle(bundle))
		if got, ok := bundle.SequenceNumber(); !ok || got != sequence || !strings.Contains(string(doc), fmt.Sprintf(`"spiffe_sequence":%d}`, sequence)) {
			t.Errorf("sequence %d is read as %d and written as %s", sequence, got, doc)
		}
	}
}

func TestTDB_09_RefreshIntervalIsSane(t *testing.T) {
	for hint, want := range map[string]time.Duration{
		"": 5 * time.Minute, "300": 5 * time.Minute, "0": time.Minute, "-5": time.Minute, "90": 90 * time.Second,
		"1000000000000": 24 * time.Hour, "99999999999999999999999": 24 * time.Hour, "-99999999999999999999999": time.Minute,
	} {
		doc := `{"keys":[]}`
		if hint != "" {
			doc = `{"keys":[],"spiffe_refresh_hint":` + hint + `}`
		}
		bundle, _, err := ParseBundle(exampleOrg, []byte(doc))
		if err != nil {
			t.Fatalf("hint %q: %v", hint, err)
		}
		if got := RefreshInterval(bundle); got != want {
			t.Errorf("hint %q: refresh after %v, want %v", hint, got, want)
		}
	}
}

// sampleBundle has everything that a bundle can have.
func sampleBundle(t testing.TB) *spiffebundle.Bundle {
	t.Helper()
	bundle := spiffebundle.New(exampleOrg)
	for range 3 {
		bundle.AddX509Authority(newRoot(t, "example.org", nil).cert)
	}
	for i := range 5 {
		if err := bundle.AddJWTAuthority(fmt.Sprint("k", i), newKey(t, elliptic.P384()).Public()); err != nil {
			t.Fatal(err)
		}
	}
	if err := bundle.AddJWTAuthority("rsa", testRSAKey().Public()); err != nil {
		t.Fatal(err)
	}
	bundle.SetSequenceNumber(7)
	bundle.SetRefreshHint(5 * time.Minute)
	return bundle
}

func TestMarshalBundleIsReadByUsAndByGoSPIFFE(t *testing.T) {
	bundle := sampleBundle(t)
	doc := must(MarshalBundle(bundle))
	theirs, err := spiffebundle.Parse(exampleOrg, doc)
	if err != nil || len(theirs.X509Authorities()) != 3 || len(theirs.JWTAuthorities()) != 6 {
		t.Fatalf("go-spiffe reads %v, %v", theirs, err)
	}
	ours, skipped, err := ParseBundle(exampleOrg, doc)
	if err != nil || len(skipped) > 0 || !ours.Equal(theirs) {
		t.Errorf("ParseBundle reads %v, %v, %v; want what go-spiffe reads", ours, skipped, err)
	}
	if again := must(MarshalBundle(ours)); !bytes.Equal(again, doc) {
		t.Errorf("equal bundles are written as\n%s\n%s", doc, again)
	}
}

// X509-60 to 62, JWT-27, JWT-28, TDB-16 and TDB-17 on what we publish.
func TestTDB_17_NothingButWhatTheStandardNames(t *testing.T) {
	bundle := sampleBundle(t)
	if err := bundle.AddWITAuthority("w", newKey(t, elliptic.P256()).Public()); err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Keys []map[string]any `json:"keys"`
	}
	if err := json.Unmarshal(must(MarshalBundle(bundle)), &doc); err != nil {
		t.Fatal(err)
	}
	allowed := map[string][]string{
		"x509-svid EC": {"crv", "kty", "use", "x", "x5c", "y"},
		"jwt-svid EC":  {"crv", "kid", "kty", "use", "x", "y"},
		"jwt-svid RSA": {"e", "kid", "kty", "n", "use"},
		"wit-svid EC":  {"crv", "kid", "kty", "use", "x", "y"},
	}
	for _, key := range doc.Keys {
		kind := fmt.Sprint(key["use"], " ", key["kty"])
		if names := sortedNames(key); !slices.Equal(names, allowed[kind]) {
			t.Errorf("%s has the members %v, want %v", kind, names, allowed[kind])
		}
		if x5c, ok := key["x5c"].([]any); ok && len(x5c) != 1 {
			t.Errorf("%s has %d certificates, want 1", kind, len(x5c))
		}
	}
	if len(doc.Keys) != 10 {
		t.Errorf("%d keys, want 10", len(doc.Keys))
	}
}

func TestTDB_10_EmptyBundleIsNeverNull(t *testing.T) {
	if doc := string(must(MarshalBundle(spiffebundle.New(exampleOrg)))); doc != `{"keys":[]}` {
		t.Errorf("MarshalBundle of nothing = %s", doc)
	}
	for _, keys := range []map[string]crypto.PublicKey{nil, {}} {
		if doc := string(must(MarshalJWKS(keys))); doc != `{"keys":[]}` { // WAPI-49
			t.Errorf("MarshalJWKS of nothing = %s", doc)
		}
	}
}

func TestMarshalRefusesWhatMustNotLeave(t *testing.T) {
	key := newKey(t, elliptic.P256())
	for name, tt := range map[string]struct {
		key crypto.PublicKey
		kid string
		row string
	}{
		"private EC key":  {key, "k", "JWT-08"},
		"private RSA key": {testRSAKey(), "k", "JWT-08"},
		"symmetric key":   {[]byte("secret"), "k", "JWT-08"},
		"Ed25519 key":     {ed25519.PublicKey(make([]byte, 32)), "k", "JWT-08"},
		"P-224 key":       {newKey(t, elliptic.P224()).Public(), "k", "JWT-08"},
		"nil":             {nil, "k", "JWT-08"},
		"nil EC key":      {(*ecdsa.PublicKey)(nil), "k", "JWT-08"},
		"no kid":          {key.Public(), "", "JWT-27"},
	} {
		doc, err := MarshalJWKS(map[string]crypto.PublicKey{tt.kid: tt.key})
		wantRow(t, name, err, tt.row)
		if doc != nil {
			t.Errorf("%s: %s was written", name, doc)
		}
		bundle := spiffebundle.FromJWTAuthorities(exampleOrg, map[string]crypto.PublicKey{tt.kid: tt.key})
		_, err = MarshalBundle(bundle)
		wantRow(t, name+" in a bundle", err, tt.row)
	}
	leaf := newRoot(t, "example.org", nil).leaf(t, webID, nil)
	_, err := MarshalBundle(spiffebundle.FromX509Authorities(exampleOrg, []*x509.Certificate{leaf.cert}))
	wantRow(t, "leaf as an authority", err, "X509-68")
	_, err = MarshalBundle(nil)
	wantRow(t, "no bundle", err, "TDB-02")
}

func TestWIT_03_KidIsUniqueInTheWholeBundle(t *testing.T) {
	bundle := spiffebundle.FromJWTAuthorities(exampleOrg, map[string]crypto.PublicKey{"k": newKey(t, elliptic.P256()).Public()})
	if err := bundle.AddWITAuthority("k", newKey(t, elliptic.P256()).Public()); err != nil {
		t.Fatal(err)
	}
	_, err := MarshalBundle(bundle)
	wantRow(t, "one kid for a JWT and a WIT key", err, "WIT-03")
}

// DEC-11: kid, kty and key members, sorted, and readable by go-spiffe.
func TestDEC_11_MarshalJWKS(t *testing.T) {
	keys := map[string]crypto.PublicKey{"b": newKey(t, elliptic.P256()).Public(), "a": newKey(t, elliptic.P521()).Public(), "c": testRSAKey().Public()}
	doc := must(MarshalJWKS(keys))
	for range 10 {
		if again := must(MarshalJWKS(keys)); !bytes.Equal(doc, again) {
			t.Fatalf("equal sets are written as\n%s\n%s", doc, again)
		}
	}
	var set struct {
		Keys []map[string]any `json:"keys"`
	}
	if err := json.Unmarshal(doc, &set); err != nil {
		t.Fatal(err)
	}
	var kids string
	for _, key := range set.Keys {
		kids += fmt.Sprint(key["kid"])
		if key["use"] != nil || key["kty"] == nil {
			t.Errorf("key %v, want it without use and with kty", key)
		}
	}
	if kids != "abc" {
		t.Errorf("keys are in the order %q, want abc", kids)
	}
	if theirs, err := jwtbundle.Parse(exampleOrg, doc); err != nil || len(theirs.JWTAuthorities()) != 3 {
		t.Errorf("go-spiffe reads %v, %v", theirs, err)
	}
}

// What parses is written back, and read back as the same by us and by go-spiffe.
func FuzzParseBundle(f *testing.F) {
	f.Add(must(MarshalBundle(sampleBundle(f))))
	f.Add([]byte(`{"keys":[],"spiffe_sequence":18446744073709551615,"spiffe_refresh_hint":-1}`))
	f.Add([]byte(`{"keys":[{"use":"jwt-svid","kid":"","kty":"oct","k":""}]}`))
	f.Add([]byte(`{"keys":[{"use":"jwt-svid","kid":"\ud83d\ude00","kty":"EC"}],"a":[[{}]]}`))
	f.Fuzz(func(t *testing.T, doc []byte) {
		bundle, skipped, err := ParseBundle(exampleOrg, doc)
		for _, err := range append(skipped, err) {
			if err != nil && RowOf(err) == "" {
				t.Errorf("error %v has no row", err)
			}
		}
		if err != nil {
			return
		}
		written, err := MarshalBundle(bundle)
		if err != nil {
			t.Fatalf("%q parses, but is not written: %v", doc, err)
		}
		again, skipped, err := ParseBundle(exampleOrg, written)
		if err != nil || len(skipped) > 0 || !again.Equal(bundle) {
			t.Errorf("%q is written as %s, which reads as another bundle: %v, %v", doc, written, skipped, err)
		}
		if _, err := spiffebundle.Parse(exampleOrg, written); err != nil {
			t.Errorf("go-spiffe refuses %s: %v", written, err)
		}
	})
}

func TestV125_FED_08_OlderSequenceIsNotAdopted(t *testing.T) {
	bundle := func(sequence string, keys ...string) *spiffebundle.Bundle {
		b := spiffebundle.New(exampleOrg)
		for _, kid := range keys {
			if err := b.AddJWTAuthority(kid, testRSAKey().Public()); err != nil {
				t.Fatal(err)
			}
		}
		if n, err := strconv.ParseUint(sequence, 10, 64); err == nil {
			b.SetSequenceNumber(n)
		}
		return b
	}
	foreign := spiffebundle.New(spiffeid.RequireTrustDomainFromString("other.org"))
	for _, tt := range []struct {
		name             string
		fetched, current *spiffebundle.Bundle
		adopt            bool
		row              string
	}{
		{"V125", bundle("7"), bundle("9", "k"), false, "FED-08"},
		{"first", bundle("7"), nil, true, ""},
		{"newer", bundle("9"), bundle("7"), true, ""},
		{"newer by 64 bits", bundle("9007199254740993"), bundle("9007199254740992"), true, ""},
		{"same", bundle("7", "a", "b"), bundle("7", "b", "a"), true, ""},
		{"same sequence, other content", bundle("7", "a"), bundle("7", "b"), true, "TDB-05"},
		{"FED-09 sequence gone", bundle(""), bundle("7"), true, ""},
		{"FED-09 no sequences", bundle("", "a"), bundle("", "b"), true, ""},
		{"other trust domain", foreign, bundle("7"), false, "TDB-18"},
		{"nothing", nil, bundle("7"), false, "TDB-02"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			adopt, err := Supersedes(tt.fetched, tt.current)
			wantRow(t, "Supersedes", err, tt.row)
			if adopt != tt.adopt {
				t.Errorf("Supersedes = %t, want %t", adopt, tt.adopt)
			}
		})
	}
}
