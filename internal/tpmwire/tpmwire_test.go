package tpmwire

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"
)

func ek(t testing.TB) (*ecdsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "EK"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return k, c
}

func TestParseEK(t *testing.T) {
	k, c := ek(t)
	other, otherCert := ek(t)
	der, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	block := func(typ string, b []byte) string { return string(pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: b})) }
	cert, key := block("CERTIFICATE", c.Raw), block("PUBLIC KEY", der)
	for _, tt := range []struct{ name, in, want string }{
		{"both", cert + key, ""},
		{"the other way round", key + cert, ""},
		{"the certificate alone", cert, ""},
		{"the key alone", key, ""},
		{"somebody else's certificate", block("CERTIFICATE", otherCert.Raw) + key, "for another key"},
		{"two keys", key + key, "unexpected PEM block"},
		{"two certificates", cert + block("CERTIFICATE", otherCert.Raw), "unexpected PEM block"},
		{"a private key", block("PRIVATE KEY", der), "unexpected PEM block"},
		{"nothing", "", "neither"},
		{"garbage", block("CERTIFICATE", []byte("x")), "certificate"},
		{"a garbage key", block("PUBLIC KEY", []byte("x")), "EK"},
	} {
		got, _, err := ParseEK([]byte(tt.in))
		if (err != nil) != (tt.want != "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
		if err == nil && !k.PublicKey.Equal(got) {
			t.Errorf("%s: another key", tt.name)
		}
	}
	encoded, err := EncodeEK(other.Public(), otherCert)
	if err != nil {
		t.Fatal(err)
	}
	if got, gotCert, err := ParseEK(encoded); err != nil || !other.PublicKey.Equal(got) || !otherCert.Equal(gotCert) {
		t.Errorf("what EncodeEK writes: %v", err)
	}
}

func TestParsePayloadIsBounded(t *testing.T) {
	part := []byte("x")
	for name, p := range map[string]*Payload{
		"no EK": {AK: &AK{part, part, part, part}}, "no AK": {EK: part}, "an empty part": {EK: part, AK: &AK{part, part, nil, part}},
		"a large EK": {EK: make([]byte, maxEKBytes+1), AK: &AK{part, part, part, part}}, "a large part": {EK: part, AK: &AK{part, make([]byte, maxPartBytes+1), part, part}},
	} {
		data, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParsePayload(data); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

func FuzzParsePayload(f *testing.F) {
	k, c := ek(f)
	encoded, err := EncodeEK(k.Public(), c)
	if err != nil {
		f.Fatal(err)
	}
	good, err := json.Marshal(Payload{EK: encoded, AK: &AK{[]byte{1}, []byte{2}, []byte{3}, []byte{4}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"EK":"","AK":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := ParsePayload(data)
		if err != nil {
			return
		}
		public, certificate, err := ParseEK(p.EK)
		if err != nil {
			return
		}
		again, err := EncodeEK(public, certificate)
		if err != nil {
			return // a kind of key that has no PKIX form, such as one of an unknown algorithm
		}
		back, backCert, err := ParseEK(again)
		if err != nil || (certificate == nil) != (backCert == nil) {
			t.Fatalf("%q is not stable: %v", p.EK, err)
		}
		h1, err1 := PubHash(public)
		h2, err2 := PubHash(back)
		if err1 != nil || err2 != nil || h1 != h2 {
			t.Errorf("the hash of %q is not stable: %q, %q", p.EK, h1, h2)
		}
	})
}

func FuzzParseResponse(f *testing.F) {
	f.Add([]byte(`{"Secret":"AAAA"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		secret, err := ParseResponse(data)
		if err != nil {
			return
		}
		again, err := json.Marshal(Response{secret})
		if err != nil {
			t.Fatal(err)
		}
		if back, err := ParseResponse(again); err != nil || !bytes.Equal(back, secret) {
			t.Errorf("%q is not stable: %v", data, err)
		}
	})
}
