package ca

import (
	"strings"
	"testing"

	"github.com/signet-id/signet/ca/keys"
)

const keysConfigBase = "trust_domain: example.org\ndata_dir: /var/lib/signet/ca\n"

func TestX509_28_WeakAuthorityKeyIsRefusedInConfiguration(t *testing.T) {
	for _, algorithm := range []string{"RSA-1024", "RSA-2047", "EC-P224", "ED25519", "rsa-2048"} {
		for _, field := range []string{"x509_algorithm", "jwt_algorithm"} {
			_, err := ReadConfig([]byte(keysConfigBase+"seal: {key_file: /k}\nkeys: {"+field+": "+algorithm+"}\n"), "ca.yaml")
			if err == nil || !strings.Contains(err.Error(), "keys."+field) || !strings.Contains(err.Error(), algorithm) {
				t.Errorf("%s: %s gives %v, want a refusal that names both", field, algorithm, err)
			}
		}
	}
}

func TestKeysInConfiguration(t *testing.T) {
	for _, tt := range []struct {
		name, yaml string
		wantErr    string // empty: it is good
	}{
		{name: "default", yaml: "seal: {key_file: /k}"},
		{name: "algorithms", yaml: "seal: {key_file: /k}\nkeys: {x509_algorithm: EC-P384, jwt_algorithm: RSA-2048}"},
		{name: "no driver here", yaml: "seal: {key_file: /k}\nkeys: {uri: \"tpmkms:storage-directory=/t\"}", wantErr: "keys.uri: this program has no driver for tpmkms"},
		{name: "one use only", yaml: "seal: {key_file: /k}\nkeys: {jwt: \"azurekms:vault=v\"}", wantErr: "keys.jwt: this program has no driver"},
		{name: "PIN", yaml: "seal: {key_file: /k}\nkeys: {uri: \"pkcs11:token=a?pin-value=4711\"}", wantErr: "pin-source"},
		{name: "timeout", yaml: "seal: {key_file: /k}\nkeys: {timeout: 1ms}", wantErr: "keys.timeout: 1ms"},
		{name: "concurrency", yaml: "seal: {key_file: /k}\nkeys: {concurrency: -1}", wantErr: "keys.concurrency: -1"},
		{name: "no seal", yaml: "seal: {}", wantErr: "name key_file"},
		{name: "two seals", yaml: "seal: {key_file: /k, kms: \"awskms:key-id=a\"}", wantErr: "exclude each other"},
		{name: "seal without a key", yaml: "seal: {kms: \"pkcs11:token=a\"}", wantErr: "names no key"},
		{name: "seal with a PIN", yaml: "seal: {kms: \"pkcs11:token=a;object=b?pin-value=4711\"}", wantErr: "pin-source"},
		{name: "seal by a TPM", yaml: "seal: {kms: \"tpmkms:name=a;storage-directory=/t\"}", wantErr: "systemd_credential"},
		{name: "previous is the same", yaml: "seal: {key_file: /k, previous: {key_file: /k}}", wantErr: "seal.previous"},
		{name: "upstream's key without its name", yaml: "seal: {key_file: /k}\nupstream: {disk: {certificate_file: /c, kms: \"pkcs11:token=a\"}}", wantErr: "upstream.disk.kms: pkcs11 key URI names no key"},
		{name: "upstream's key with a PIN", yaml: "seal: {key_file: /k}\nupstream: {disk: {certificate_file: /c, kms: \"pkcs11:token=a;object=b?pin-value=4711\"}}", wantErr: "pin-source"},
		{name: "upstream's key without a driver", yaml: "seal: {key_file: /k}\nupstream: {disk: {certificate_file: /c, kms: \"tpmkms:name=a;storage-directory=/t\"}}", wantErr: "upstream.disk.kms: this program has no driver for tpmkms"},
		{name: "upstream's key twice", yaml: "seal: {key_file: /k}\nupstream: {disk: {certificate_file: /c, key_file: /f, kms: \"awskms:key-id=a\"}}", wantErr: "upstream.disk.kms: excludes key_file"},
		{name: "upstream without a key", yaml: "seal: {key_file: /k}\nupstream: {disk: {certificate_file: /c}}", wantErr: "upstream.disk.key_file: missing"},
		{name: "two previous", yaml: "seal: {key_file: /k, previous: {key_file: /l, systemd_credential: m}}", wantErr: "seal.previous"},
	} {
		_, err := ReadConfig([]byte(keysConfigBase+tt.yaml+"\n"), "ca.yaml")
		if (err != nil) != (tt.wantErr != "") || err != nil && !strings.Contains(err.Error(), tt.wantErr) {
			t.Errorf("%s: ReadConfig = %v, want an error with %q", tt.name, err, tt.wantErr)
		}
		if err != nil && strings.Contains(err.Error(), "4711") {
			t.Errorf("%s: error %q gives the PIN away", tt.name, err)
		}
	}
}

func TestKeysOfEachUse(t *testing.T) {
	k := Keys{X509Algorithm: "EC-P384"}
	x, j := k.choices(func(field, format string, args ...any) { t.Errorf(field+": "+format, args...) })
	if x.Algorithm != keys.ECP384 || j.Algorithm != keys.ECP256 || !x.Place.Software() || !j.Place.Software() {
		t.Errorf("choices are %+v and %+v", x, j)
	}
}
