package x509pop

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"testing"
)

func keys(t testing.TB) map[string]crypto.Signer {
	t.Helper()
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]crypto.Signer{"RSA": r}
	for _, c := range []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		out[c.Params().Name] = k
	}
	return out
}

func TestRespondAndVerify(t *testing.T) {
	all := keys(t)
	for name, k := range all {
		c, err := NewChallenge(k.Public())
		if err != nil {
			t.Fatal(err)
		}
		wire, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := ParseChallenge(wire)
		if err != nil {
			t.Fatal(err)
		}
		r, err := Respond(k, parsed)
		if err != nil {
			t.Fatal(err)
		}
		if err := Verify(k.Public(), c, r); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		other, err := NewChallenge(k.Public())
		if err != nil {
			t.Fatal(err)
		}
		if Verify(k.Public(), other, r) == nil {
			t.Errorf("%s: an answer to another challenge is good", name)
		}
		for stranger, s := range all {
			if stranger != name && Verify(s.Public(), c, r) == nil {
				t.Errorf("the answer of %s is good for %s", name, stranger)
			}
		}
		short := *c
		if short.RSA != nil {
			short.RSA = &Nonce{short.RSA.Nonce[:31]}
		} else {
			short.ECDSA = &Nonce{short.ECDSA.Nonce[:31]}
		}
		if _, err := Respond(k, &short); err == nil {
			t.Errorf("%s: a challenge of 31 bytes was answered", name)
		}
	}
	if _, err := Respond(all["RSA"], &Challenge{ECDSA: &Nonce{make([]byte, NonceBytes)}}); err == nil {
		t.Error("an RSA key answered a challenge for ECDSA")
	}
	if _, err := Respond(all["P-256"], &Challenge{RSA: &Nonce{make([]byte, NonceBytes)}}); err == nil {
		t.Error("an EC key answered a challenge for RSA")
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewChallenge(ed.Public()); err == nil {
		t.Error("there is a challenge for Ed25519")
	}
}

// TestWire is what SPIRE's programs send, byte for byte. [SPIRE-PROTOCOL §3.2]
func TestWire(t *testing.T) {
	nonce := bytes.Repeat([]byte{1}, NonceBytes)
	for want, v := range map[string]any{
		`{"certificates":["AQI=","Aw=="]}`: Payload{[][]byte{{1, 2}, {3}}},
		`{"rsa_signature":null,"ecdsa_signature":{"nonce":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="}}`: Challenge{ECDSA: &Nonce{nonce}},
		`{"rsa_signature":null,"ecdsa_signature":{"nonce":"AQ==","r":"Ag==","s":"Aw=="}}`:                   Response{ECDSA: &ECDSAResponse{[]byte{1}, []byte{2}, []byte{3}}},
		`{"rsa_signature":{"nonce":"AQ==","signature":"Ag=="},"ecdsa_signature":null}`:                      Response{RSA: &RSAResponse{[]byte{1}, []byte{2}}},
	} {
		got, err := json.Marshal(v)
		if err != nil || string(got) != want {
			t.Errorf("%s, %v; want %s", got, err, want)
		}
	}
}

func FuzzParseChallenge(f *testing.F) {
	all := keys(f)
	f.Add([]byte(`{"rsa_signature":null,"ecdsa_signature":{"nonce":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="}}`))
	f.Add([]byte(`{"rsa_signature":{"nonce":""},"ecdsa_signature":{"nonce":""}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := ParseChallenge(data)
		if err != nil {
			return
		}
		if r, err := Respond(all["P-256"], c); err == nil && Verify(all["P-256"].Public(), c, r) != nil {
			t.Errorf("the answer to %q does not verify", data)
		}
	})
}

func FuzzParseResponse(f *testing.F) {
	all := keys(f)
	challenges := map[string]*Challenge{}
	for name, k := range all {
		c, err := NewChallenge(k.Public())
		if err != nil {
			f.Fatal(err)
		}
		r, err := Respond(k, c)
		if err != nil {
			f.Fatal(err)
		}
		data, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data[:len(data)-1])
		f.Add(bytes.Replace(data, []byte(`"nonce":"`), []byte(`"nonce":"A`), 1))
		if challenges[name], err = NewChallenge(k.Public()); err != nil { // another one: no answer is good for it
			f.Fatal(err)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := ParseResponse(data)
		if err != nil {
			return
		}
		for name, c := range challenges {
			if Verify(all[name].Public(), c, r) == nil {
				t.Errorf("%q is an answer to a challenge that nobody was asked", data)
			}
		}
	})
}
