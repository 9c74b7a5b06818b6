package keys

import (
	"strings"
	"testing"
)

func TestParsePlace(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		wantErr  string // empty: it is good
	}{
		{name: "default", in: ""},
		{name: "software", in: "softkms:"},
		{name: "token", in: "pkcs11:module-path=/usr/lib/m.so;token=signet?pin-source=/etc/signet/pin"},
		{name: "token without a PIN", in: "pkcs11:module-path=/usr/lib/m.so;slot-id=5"},
		{name: "tpm", in: "tpmkms:device=/dev/tpmrm0;storage-directory=/var/lib/signet/tpm"},
		{name: "aws", in: "awskms:region=eu-central-1;profile=signet"},
		{name: "aws without a region", in: "awskms:"},
		{name: "key ring", in: "cloudkms:projects/p/locations/global/keyRings/r"},
		{name: "key ring and credentials", in: "cloudkms:projects/p/locations/global/keyRings/r?credentials-file=/etc/signet/gcp.json"},
		{name: "vault", in: "azurekms:vault=signet?hsm=true"},

		{name: "PIN in the URI", in: "pkcs11:token=signet?pin-value=4711-secret", wantErr: "pin-source"},
		{name: "PIN among the attributes", in: "pkcs11:token=signet;pin-value=4711-secret", wantErr: "pin-source"},
		{name: "PIN asked for", in: "pkcs11:token=signet?pin-prompt=4711-secret", wantErr: "pin-prompt"},
		{name: "client secret", in: "azurekms:vault=v;client-secret=4711-secret", wantErr: "client-secret"},
		{name: "PIN in a URI that does not parse", in: "pkcs11:token=%zz?pin-value=4711-secret", wantErr: "malformed"},
		{name: "PIN in a URI with a host", in: "pkcs11://4711-secret@h/?token=a", wantErr: "malformed"},
		{name: "relative PIN file", in: "pkcs11:token=a?pin-source=pin", wantErr: "absolute"},
		{name: "relative storage", in: "tpmkms:storage-directory=tpm", wantErr: "absolute"},
		{name: "names a key", in: "pkcs11:token=a;object=mine", wantErr: "keys are named by the CA"},
		{name: "names an AWS key", in: "awskms:key-id=1234", wantErr: "keys are named by the CA"},
		{name: "no token", in: "pkcs11:module-path=/usr/lib/m.so", wantErr: "token or serial or slot-id"},
		{name: "no storage", in: "tpmkms:device=/dev/tpmrm0", wantErr: "storage-directory"},
		{name: "no vault", in: "azurekms:hsm=true", wantErr: "vault"},
		{name: "twice", in: "pkcs11:token=a;token=b", wantErr: "needs one value"},
		{name: "empty value", in: "pkcs11:token=", wantErr: "needs one value"},
		{name: "sessions", in: "pkcs11:token=a;max-sessions=1", wantErr: "max-sessions"},
		{name: "no key ring", in: "cloudkms:projects/p/locations/global", wantErr: "key ring"},
		{name: "key in the ring", in: "cloudkms:projects/p/locations/l/keyRings/r/cryptoKeys/k", wantErr: "key ring"},
		{name: "software with attributes", in: "softkms:path=/x", wantErr: "no attributes"},
		{name: "yubikey", in: "yubikey:slot-id=9c", wantErr: "overwrites"},
		{name: "unknown", in: "sshagentkms:x", wantErr: "unknown scheme"},
		{name: "no scheme", in: "token", wantErr: "no scheme"},
		{name: "long", in: "pkcs11:token=" + strings.Repeat("a", maxURIBytes), wantErr: "more than"},
	} {
		p, err := ParsePlace(tt.in)
		switch {
		case tt.wantErr == "" && err != nil:
			t.Errorf("%s: ParsePlace(%q) = %v", tt.name, tt.in, err)
		case tt.wantErr == "" && p.String() != tt.in && !p.Software():
			t.Errorf("%s: ParsePlace(%q) prints as %q", tt.name, tt.in, p)
		case tt.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tt.wantErr)):
			t.Errorf("%s: ParsePlace(%q) = %v, want an error with %q", tt.name, tt.in, err, tt.wantErr)
		case err != nil && strings.Contains(err.Error(), "secret=") || err != nil && strings.Contains(err.Error(), "4711"):
			t.Errorf("%s: error %q gives a secret away", tt.name, err)
		}
	}
}

// FuzzParsePlace: what parses prints as it was read and parses again, and holds nothing that may be a secret.
func FuzzParsePlace(f *testing.F) {
	f.Add("pkcs11:module-path=/usr/lib/m.so;token=signet?pin-source=/etc/signet/pin")
	f.Add("cloudkms:projects/p/locations/global/keyRings/r?credentials-file=/etc/signet/gcp.json")
	f.Add("azurekms:vault=signet?hsm=true")
	f.Add("pkcs11:token=a?pin-value=b")
	f.Add("awskms:")
	f.Fuzz(func(t *testing.T, in string) {
		p, err := ParsePlace(in)
		if err != nil {
			return
		}
		again, err := ParsePlace(p.String())
		if err != nil || again.text != p.text {
			t.Fatalf("ParsePlace(%q) prints as %q, which reads as %q, %v", in, p, again, err)
		}
		if p.Software() {
			return
		}
		for _, s := range secrets {
			if p.parsed.Has(s) || p.parsed.Get(s) != "" {
				t.Errorf("ParsePlace(%q) took %s", in, s)
			}
		}
		if p.name("key") == "" || p.found("key") == "" {
			t.Errorf("ParsePlace(%q) names no key", in)
		}
	})
}

func TestIntentNamesFitEveryKeyStore(t *testing.T) {
	r := NewRing(RingConfig{TrustDomain: testBinding.TrustDomain})
	defer r.Close()
	seen := map[string]bool{}
	for range 100 {
		name := r.Intend(UseX509, 1<<63).Name
		if len(name) > 63 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || seen[name] {
			t.Fatalf("key name %q is long, odd or not new", name)
		}
		seen[name] = true
	}
}

func TestIntentIsSealed(t *testing.T) {
	seal := testSeal(t, 1)
	i := Intent{Name: "signet-a", Choice: Choice{Place: mustParse(t, "pkcs11:module-path=/usr/lib/m.so;token=a"), Algorithm: ECP384}}
	sealed, err := i.Seal(seal, testBinding.TrustDomain, UseX509)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(sealed), "m.so") {
		t.Error("the intent is in clear")
	}
	back, err := OpenIntent(sealed, seal, testBinding.TrustDomain, UseX509)
	if err != nil || back.Name != i.Name || !back.Same(i.Choice) {
		t.Errorf("OpenIntent = %+v, %v", back, err)
	}
	if _, err := OpenIntent(sealed, seal, testBinding.TrustDomain, UseJWT); err == nil {
		t.Error("the intent opens for another use")
	}
	// A reference must not open as a private key, nor an intent as a reference.
	if _, err := Open(t.Context(), Stored{Kind: KindSoft, Sealed: sealed}, seal, intentBinding(testBinding.TrustDomain, UseX509)); err == nil {
		t.Error("an intent opens as a private key")
	}
}

func TestParseKeyURI(t *testing.T) {
	for _, tt := range []struct{ in, store, key string }{
		{"pkcs11:module-path=/usr/lib/m.so;token=signet;object=seal;id=01?pin-source=/etc/pin", "pkcs11:module-path=%2Fusr%2Flib%2Fm.so;token=signet?pin-source=%2Fetc%2Fpin", "pkcs11:id=01;object=seal"},
		{"pkcs11:token=signet?object=seal", "pkcs11:token=signet", "pkcs11:object=seal"},
		{"awskms:key-id=1234;region=eu-central-1", "awskms:region=eu-central-1", "awskms:key-id=1234"},
		{"awskms:key-id=1234", "awskms:", "awskms:key-id=1234"},
		{"tpmkms:name=ca;storage-directory=/t", "tpmkms:storage-directory=%2Ft", "tpmkms:name=ca"},
		{"azurekms:name=ca;vault=v?version=7", "azurekms:vault=v", "azurekms:name=ca;vault=v;version=7"},
		{"cloudkms:projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/3?credentials-file=/c", "cloudkms:projects/p/locations/l/keyRings/r?credentials-file=/c",
			"cloudkms:projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/3"},
	} {
		k, err := ParseKeyURI(tt.in)
		if err != nil || k.place.text != tt.store || k.key != tt.key || k.String() != tt.in {
			t.Errorf("ParseKeyURI(%q) = key store %q, key %q, %v; want %q, %q", tt.in, k.place.text, k.key, err, tt.store, tt.key)
		}
	}
	for _, in := range []string{"", "seal", "softkms:a", "pkcs11:token=a", "awskms:region=a", "cloudkms:projects/p/locations/l/keyRings/r",
		"cloudkms:projects/p/locations/l/keyRings/r/cryptoKeys/k", "pkcs11:object=a;token=b?pin-value=4711", "pkcs11:object=a;pin-value=4711;token=%zz", "yubikey:slot-id=9c"} {
		if _, err := ParseKeyURI(in); err == nil || strings.Contains(err.Error(), "4711") {
			t.Errorf("ParseKeyURI(%q) = %v, want an error without secrets", in, err)
		}
	}
}

// FuzzParseKeyURI: what parses names a key and a key store that parses, and neither holds what may be a secret.
func FuzzParseKeyURI(f *testing.F) {
	f.Add("pkcs11:module-path=/usr/lib/m.so;token=signet;object=seal;id=01?pin-source=/etc/pin")
	f.Add("cloudkms:projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/3?credentials-file=/c")
	f.Add("azurekms:name=ca;vault=v?version=7")
	f.Add("awskms:key-id=1234?pin-value=a")
	f.Fuzz(func(t *testing.T, in string) {
		k, err := ParseKeyURI(in)
		if err != nil {
			return
		}
		if k.key == "" || k.place.Software() {
			t.Fatalf("ParseKeyURI(%q) = key %q in %s", in, k.key, k.place)
		}
		if _, err := ParsePlace(k.place.text); err != nil {
			t.Errorf("ParseKeyURI(%q) has the key store %q: %v", in, k.place.text, err)
		}
		for _, s := range secrets {
			if strings.Contains(k.key+k.place.text, s+"=") {
				t.Errorf("ParseKeyURI(%q) took %s", in, s)
			}
		}
	})
}
