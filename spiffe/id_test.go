package spiffe

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestSPIFFEIDVectors(t *testing.T) {
	for _, v := range []struct {
		name, in string
		row      string // empty: valid
	}{
		{"V001", "spiffe://example.org/service", ""},
		{"V002", "spiffe://example.org", ""},
		{"V003", "spiffe://example.org/", "ID-16"},
		{"V004", "spiffe://example.org/a/", "ID-16"},
		{"V005", "spiffe://example.org//a", "ID-14"},
		{"V006", "spiffe://example.org/a//b", "ID-14"},
		{"V007", "spiffe://example.org/./a", "ID-15"},
		{"V008", "spiffe://example.org/a/..", "ID-15"},
		{"V009", "spiffe://example.org/...", ""},
		{"V010", "spiffe://example.org/.hidden/a..b", ""},
		{"V011", "spiffe://example.org/%61", "ID-13"},
		{"V012", "spiffe://example.org/a%2Fb", "ID-13"},
		{"V013", "spiffe://ex%61mple.org/a", "ID-09"},
		{"V014", "spiffe://Example.org/a", "ID-07"},
		{"V015", "SPIFFE://example.org/a", "DEC-01"},
		{"V016", "spiffe://example.org/PayMents_1.0-b", ""},
		{"V017", "spiffe://example.org/a~b", "ID-17"},
		{"V018", "spiffe://example.org/a b", "ID-17"},
		{"V019", "spiffe://example.org/ü", "ID-17"},
		{"V020", "spiffe://exämple.org/a", "ID-08"},
		{"V021", "spiffe://example.org:443/a", "ID-06"},
		{"V022", "spiffe://example.org:/a", "ID-06"},
		{"V023", "spiffe://user@example.org/a", "ID-05"},
		{"V024", "spiffe://@example.org/a", "ID-05"},
		{"V025", "spiffe://example.org/a?x=1", "ID-03"},
		{"V026", "spiffe://example.org/a?", "ID-03"},
		{"V027", "spiffe://example.org/a#f", "ID-04"},
		{"V028", "spiffe://example.org/a#", "ID-04"},
		{"V029", "spiffe:///a", "ID-02"},
		{"V030", "spiffe://", "ID-02"},
		{"V031", "", "ID-01"},
		{"V032", "spiffe:/example.org/a", "ID-01"},
		{"V033", "https://example.org/a", "ID-01"},
		{"V034", "spiffe://10.0.0.1/a", ""},
		{"V035", "spiffe://[::1]/a", "ID-10"},
		{"V036", "spiffe://my_trust-domain.1/a", ""},
		{"V037", "spiffe://a..b/x", ""},
		{"V038", long("spiffe://", 9+255) + "/a", ""},
		{"V039", long("spiffe://", 9+256) + "/a", "ID-11"},
		{"V040", long("spiffe://example.org/", 2048), ""},
		{"V041", long("spiffe://example.org/", 2049), "DEC-02"},
		{"V042", "spiffe://example.org/a\n", "ID-17"},
		{"V043", " spiffe://example.org/a", "ID-01"},
		{"ID-01 no slashes", "spiffe:td", "ID-01"},
		{"ID-01 no scheme", "//td/x", "ID-01"},
		{"ID-01 bare", "td/x", "ID-01"},
		{"ID-03 without path", "spiffe://td?x", "ID-03"},
		{"ID-13 encoded dots", "spiffe://td/%2e%2e", "ID-13"},
		{"ID-15 dot first", "spiffe://td/..", "ID-15"},
		{"ID-15 legal dots", "spiffe://td/.a/a./..a", ""},
	} {
		t.Run(v.name, func(t *testing.T) {
			id, err := ParseID(v.in)
			wantRow(t, "ParseID("+excerpt(v.in)+")", err, v.row)
			if err == nil && id.String() != v.in {
				t.Errorf("ParseID(%q).String() = %q, want what was read", v.in, id)
			}
			if err != nil && !id.IsZero() {
				t.Errorf("ParseID(%q) returned %q beside an error", v.in, id)
			}
		})
	}
}

// Every byte value in host and path: only the listed ones pass.
func TestID_08_17_EveryByte(t *testing.T) {
	const lower, upper, digits = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
	for c := range 256 {
		b := string([]byte{byte(c)})
		_, err := ParseID("spiffe://a" + b + "b/x")
		if allowed := strings.Contains(lower+digits+".-_/", b); (err == nil) != allowed {
			t.Errorf("byte %q in the host: error %v, allowed %t", b, err, allowed)
		}
		_, err = ParseID("spiffe://td/a" + b + "b")
		if allowed := strings.Contains(lower+upper+digits+".-_/", b); (err == nil) != allowed {
			t.Errorf("byte %q in the path: error %v, allowed %t", b, err, allowed)
		}
	}
}

func TestID_10_NamesAreNotJudgedAsHosts(t *testing.T) {
	for _, name := range []string{"10.0.0.1", "my_td", "-", "a..b", ".", "1"} {
		if td, err := ParseTrustDomain(name); err != nil || td.Name() != name {
			t.Errorf("ParseTrustDomain(%q) = %q, %v; want it as it is", name, td, err)
		}
	}
}

func TestID_20_21_EqualityIsOfBytes(t *testing.T) {
	ids := []string{"spiffe://td/a", "spiffe://td/A", "spiffe://td/a.", "spiffe://td", "spiffe://td/a-"}
	for i, a := range ids {
		for j, b := range ids {
			x, errX := ParseID(a)
			y, errY := ParseID(b)
			if errX != nil || errY != nil || (x == y) != (i == j) {
				t.Errorf("%q == %q is %t (%v, %v), want %t", a, b, x == y, errX, errY, i == j)
			}
		}
	}
}

func TestParseTrustDomain(t *testing.T) {
	for _, tt := range []struct{ name, in, row string }{
		{"bare name", "example.org", ""},
		{"an ID", "spiffe://example.org", "ID-08"},
		{"an ID with a path", "spiffe://example.org/x", "ID-08"},
		{"a path", "example.org/x", "ID-08"},
		{"empty", "", "ID-02"},
		{"upper case", "Example.org", "ID-07"},
		{"255 bytes", long("", 255), ""},
		{"256 bytes", long("", 256), "ID-11"},
		{"port", "example.org:80", "ID-06"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			td, err := ParseTrustDomain(tt.in)
			wantRow(t, "ParseTrustDomain("+tt.in+")", err, tt.row)
			if err == nil && td.Name() != tt.in {
				t.Errorf("ParseTrustDomain(%q) = %q", tt.in, td)
			}
		})
	}
}

func TestX509_07_WorkloadIDNeedsAPath(t *testing.T) {
	if _, err := ParseWorkloadID("spiffe://example.org/w"); err != nil {
		t.Errorf("ID with a path: %v", err)
	}
	for in, row := range map[string]string{"spiffe://example.org": "X509-07", "spiffe://example.org/": "ID-16"} {
		_, err := ParseWorkloadID(in)
		wantRow(t, "ParseWorkloadID("+in+")", err, row)
	}
}

// CheckOwnTrustDomain allows exactly the names with which crypto/x509 can read a certificate back.
func TestDEC_03_OwnTrustDomainIsReadableByGo(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		"example.org", "a..b", ".a", "a.", ".", "..", "a", "-", "_", "my_td", "a-.b", "10.0.0.1", "999.1.1.1", "1",
		long("", 63), long("", 64), long("", 255), strings.Repeat("a.", 127) + "a",
	} {
		td, err := ParseTrustDomain(name)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{SerialNumber: nextSerial(), ExtraExtensions: []pkix.Extension{sanExtension(t, true, false, td.IDString()+"/w")}}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		_, readErr := x509.ParseCertificate(der)
		err = CheckOwnTrustDomain(td)
		if (err == nil) != (readErr == nil) {
			t.Errorf("CheckOwnTrustDomain(%q) = %v, but reading a certificate says %v", name, err, readErr)
		}
		if err != nil {
			wantRow(t, "CheckOwnTrustDomain("+name+")", err, "DEC-03")
		}
	}
	wantRow(t, "CheckOwnTrustDomain of nothing", CheckOwnTrustDomain(spiffeid.TrustDomain{}), "ID-02")
}

func TestParseSelector(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		want     Selector
		wantErr  bool
	}{
		{name: "plain", in: "unix:user", want: Selector{"unix", "user"}},
		{name: "value holds a colon", in: "unix:uid:1000", want: Selector{"unix", "uid:1000"}},
		{name: "value begins with a colon", in: "a::", want: Selector{"a", ":"}},
		{name: "value holds spaces and UTF-8", in: "docker:label:x y ü", want: Selector{"docker", "label:x y ü"}},
		{name: "no colon", in: "uid", wantErr: true},
		{name: "no type", in: ":uid:1000", wantErr: true},
		{name: "no value", in: "unix:", wantErr: true},
		{name: "empty", in: "", wantErr: true},
		{name: "space in type", in: "un ix:a", wantErr: true},
		{name: "control byte in type", in: "un\x1bix:a", wantErr: true},
		{name: "type not ASCII", in: "ü:a", wantErr: true},
		{name: "value not UTF-8", in: "unix:\xff", wantErr: true},
		{name: "longest type", in: long("", 64) + ":a", want: Selector{long("", 64), "a"}},
		{name: "type too long", in: long("", 65) + ":a", wantErr: true},
		{name: "longest value", in: "a:" + long("", 4096), want: Selector{"a", long("", 4096)}},
		{name: "value too long", in: "a:" + long("", 4097), wantErr: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseSelector(tt.in)
			if (err != nil) != tt.wantErr || got != tt.want {
				t.Errorf("ParseSelector(%q) = %v, %v; want %v, error %t", tt.in, got, err, tt.want, tt.wantErr)
			}
			if err == nil && got.String() != tt.in {
				t.Errorf("ParseSelector(%q).String() = %q", tt.in, got)
			}
		})
	}
}

// A selector that came in two fields must not be one that prints as another.
func TestSelectorCheckRefusesColonInType(t *testing.T) {
	if err := (Selector{Type: "unix:uid", Value: "1"}).Check(); err == nil {
		t.Error("a type with a colon passed: unix:uid + 1 prints like unix + uid:1")
	}
}

func FuzzParseID(f *testing.F) {
	for _, seed := range []string{"spiffe://example.org/a", "spiffe://td", "spiffe://td/a#", "SPIFFE://td/a", "spiffe://td/../x", "spiffe://a..b/%61"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseID(s)
		if err != nil {
			if RowOf(err) == "" {
				t.Errorf("ParseID(%q): error %v has no row", s, err)
			}
			return
		}
		theirs, err := spiffeid.FromString(s)
		if err != nil || theirs != id {
			t.Errorf("ParseID(%q) = %q, go-spiffe says %q, %v", s, id, theirs, err)
		}
		if id.String() != s || len(s) > MaxIDBytes {
			t.Errorf("ParseID(%q) prints as %q", s, id)
		}
		if again, err := ParseTrustDomain(id.TrustDomain().Name()); err != nil || again != id.TrustDomain() {
			t.Errorf("trust domain of %q: %q, %v", s, again, err)
		}
	})
}

func FuzzParseSelector(f *testing.F) {
	f.Add("unix:uid:1000")
	f.Add(":")
	f.Fuzz(func(t *testing.T, s string) {
		selector, err := ParseSelector(s)
		if err == nil && (selector.String() != s || selector.Check() != nil) {
			t.Errorf("ParseSelector(%q) prints as %q, check %v", s, selector, selector.Check())
		}
	})
}
