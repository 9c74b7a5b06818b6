package cli

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"
	"unicode"
)

// selfSigned makes a certificate with its key from a template.
func selfSigned(t testing.TB, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber, template.NotBefore, template.NotAfter = big.NewInt(7), time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// hostile is a certificate whose names try to take over the terminal.
func hostile(t testing.TB) *x509.Certificate {
	cert, _ := selfSigned(t, &x509.Certificate{
		Subject:  pkix.Name{CommonName: "\x1b[2J\u202e\u009bevil"},
		URIs:     []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/w"}},
		DNSNames: []string{"a\x1b]0;title\x07.example"},
	})
	return cert
}

func checkPrintable(t *testing.T, what, text string) {
	t.Helper()
	if strings.ContainsFunc(text, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }) {
		t.Errorf("%s holds what does not print: %q", what, text)
	}
}

func TestInspectNeverMovesTheCursor(t *testing.T) {
	text := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: hostile(t).Raw}))
	for _, format := range []string{"table", "wide", "json", "yaml"} {
		_, stdout, stderr := run(t, text, "svid", "inspect", "-", "-o", format)
		checkPrintable(t, "stdout as "+format, stdout)
		checkPrintable(t, "stderr as "+format, stderr)
		if !strings.Contains(stdout, "evil") {
			t.Errorf("the issuer is not shown as %s:\n%s", format, stdout)
		}
	}
}

func FuzzInspect(f *testing.F) {
	cert := hostile(f)
	f.Add(cert.Raw)
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))
	f.Add([]byte("eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJzcGlmZmU6Ly9leGFtcGxlLm9yZy93IiwiYXVkIjpbIlx1MDAxYiJdLCJleHAiOjF9.AAAA"))
	f.Add([]byte("a.b.c"))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, format := range []format{formatWide, formatJSON} {
			var out, errs bytes.Buffer
			a := &app{stdout: &out, stderr: &errs, now: func() time.Time { return time.Unix(1_800_000_000, 0) }}
			in, err := a.inspectData("x", data)
			if err == nil {
				err = a.showInspection(format, in)
			}
			if err != nil {
				printError(&errs, false, err)
			}
			checkPrintable(t, "stdout", out.String())
			checkPrintable(t, "stderr", errs.String())
		}
	})
}

// TestInspectConnect shows the SVID of a server that refuses callers without a certificate: it has shown it by then.
func TestInspectConnect(t *testing.T) {
	cert, key := selfSigned(t, &x509.Certificate{URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/server"}}, KeyUsage: x509.KeyUsageDigitalSignature})
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{ClientAuth: tls.RequireAnyClientCert, MinVersion: version, MaxVersion: version,
			Certificates: []tls.Certificate{{Certificate: [][]byte{cert.Raw}, PrivateKey: key}}})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			conn, err := l.Accept()
			if err != nil {
				return
			}
			if err := conn.(*tls.Conn).HandshakeContext(t.Context()); err == nil {
				t.Error("the server took a caller without a certificate")
			}
			conn.Close()
		}()
		_, stdout, stderr := run(t, "", "svid", "inspect", "--connect", l.Addr().String())
		if !strings.Contains(stdout, "spiffe://example.org/server") {
			t.Errorf("TLS %x: stdout %q, stderr %q; want the SVID", version, stdout, stderr)
		}
		l.Close()
		<-done
	}
}

func TestBundleOwner(t *testing.T) {
	id := func(host string) *x509.Certificate {
		c, _ := selfSigned(t, &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: host}}})
		return c
	}
	without, _ := selfSigned(t, &x509.Certificate{IsCA: true, BasicConstraintsValid: true})
	for _, tt := range []struct {
		name  string
		certs []*x509.Certificate
		want  string
	}{
		{name: "one", certs: []*x509.Certificate{id("example.org")}, want: "example.org"},
		{name: "one names it, one does not", certs: []*x509.Certificate{without, id("example.org")}, want: "example.org"},
		{name: "two names", certs: []*x509.Certificate{id("example.org"), id("other.org")}},
		{name: "no name", certs: []*x509.Certificate{without}},
		{name: "empty"},
	} {
		td, err := ownName(tt.certs)
		if (err != nil) != (tt.want == "") || err == nil && td.Name() != tt.want {
			t.Errorf("%s: ownName = %q, %v; want %q", tt.name, td, err, tt.want)
		}
	}
}

func FuzzFlatten(f *testing.F) {
	f.Add([]byte(`{"v":1,"details":{"a":[1,2],"b":null},"time":"x"}`))
	f.Add([]byte(`{"a":{"b":{"c":{}}}}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var out bytes.Buffer
		a := &app{stdout: &out}
		for _, format := range []format{formatTable, formatWide, formatJSON, formatYAML} {
			out.Reset()
			if err := a.printRecord(format, data); err == nil {
				checkPrintable(t, string(format), out.String())
				if format == formatTable && strings.Count(out.String(), "\n") != 1 {
					t.Errorf("a record became %q, which is not one line", out.String())
				}
			}
		}
	})
}
