package keys

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/uri"
)

// maxURIBytes bounds the URI of a key store or key.
const maxURIBytes = 2048

// A scheme says what the URI of a key store of one kind may hold. What is not named is refused, so that a PIN or password
// can never be in a URI, which is stored, logged and shown.
type scheme struct {
	attributes []string // that name the key store
	required   []string // of them, one at least
	example    string
	// device is set for a key store on this machine, whose driver keeps state: it is closed before it is opened again.
	device bool
	// resource is set if the URI begins with the name of a resource rather than with attributes.
	resource bool
}

// schemes are the kinds of key stores. The words of each driver's URI are those of go.step.sm/crypto/kms.
var schemes = map[string]scheme{
	"pkcs11": {
		attributes: []string{"module-path", "token", "serial", "slot-id", "max-sessions", "pin-source"},
		required:   []string{"token", "serial", "slot-id"},
		example:    "pkcs11:module-path=/usr/lib/softhsm/libsofthsm2.so;token=signet?pin-source=/etc/signet/pin",
		device:     true,
	},
	"tpmkms": {
		attributes: []string{"device", "storage-directory"},
		required:   []string{"storage-directory"},
		example:    "tpmkms:device=/dev/tpmrm0;storage-directory=/var/lib/signet/tpm",
		device:     true,
	},
	"awskms": {
		attributes: []string{"region", "profile", "credentials-file"},
		example:    "awskms:region=eu-central-1",
	},
	"cloudkms": {
		attributes: []string{"credentials-file"},
		example:    "cloudkms:projects/PROJECT/locations/LOCATION/keyRings/RING",
		resource:   true,
	},
	"azurekms": {
		attributes: []string{"vault", "environment", "hsm", "tenant-id", "aad-endpoint"},
		required:   []string{"vault"},
		example:    "azurekms:vault=VAULT?hsm=true",
	},
}

// secrets are attributes that drivers know and that hold a secret or ask a person for one.
var secrets = []string{"pin-value", "pin-prompt", "client-secret", "management-key", "password", "pin"}

// files are the attributes that name a file or directory, which must not depend on where the CA was started.
var files = []string{"pin-source", "storage-directory", "credentials-file"}

// A Place is where authority keys are made: in this process (the zero value), or in a key store outside of it.
type Place struct {
	text   string // the URI; empty for this process
	scheme string
	parsed *uri.URI
}

// ParsePlace reads the URI of a key store, as in the configuration. Empty and "softkms:" mean this process: keys are sealed
// in the store. The URI names no key: names are made for each authority. Errors never repeat the value of an attribute that
// may be secret.
func ParsePlace(text string) (Place, error) {
	if text == "" || text == KindSoft+":" {
		return Place{}, nil
	}
	if len(text) > maxURIBytes {
		return Place{}, fmt.Errorf("key store URI has %d bytes, more than %d", len(text), maxURIBytes)
	}
	name, _, ok := strings.Cut(text, ":")
	if !ok {
		return Place{}, errors.New("key store URI has no scheme; it is softkms:, pkcs11:, tpmkms:, awskms:, cloudkms: or azurekms: with its attributes")
	}
	switch name {
	case KindSoft:
		return Place{}, errors.New("softkms: takes no attributes; its keys are sealed in the store")
	case "yubikey":
		return Place{}, errors.New("yubikey: has a fixed set of slots and overwrites what is in one, so rotation would destroy the key in use; use the YubiKey's PKCS #11 module (pkcs11:module-path=…/libykcs11.so), a YubiHSM or another key store")
	}
	s, ok := schemes[name]
	if !ok {
		return Place{}, fmt.Errorf("key store URI has the unknown scheme %q; softkms:, pkcs11:, tpmkms:, awskms:, cloudkms: and azurekms: are known", name)
	}
	// The parser's own errors repeat the whole text.
	parsed, err := uri.ParseWithScheme(name, text)
	if err != nil || parsed.Fragment != "" || parsed.Host != "" {
		return Place{}, fmt.Errorf("%s key store URI is malformed; an example is %s", name, s.example)
	}
	p := Place{text: text, scheme: name, parsed: parsed}
	if err := p.check(s); err != nil {
		return Place{}, err
	}
	return p, nil
}

func (p Place) check(s scheme) error {
	resource := ""
	for key, values := range uri.Values(p.parsed) {
		switch {
		case slices.Contains(secrets, key):
			return fmt.Errorf("%s key store URI holds %s; secrets do not belong into a configuration: put the PIN into a file of mode 0600 and name it with pin-source", p.scheme, key)
		case s.resource && resource == "" && len(values) == 1 && values[0] == "" && strings.Contains(key, "/"):
			resource = key
		case !slices.Contains(s.attributes, key):
			return fmt.Errorf("%s key store URI has the unknown attribute %q; it takes %s (keys are named by the CA)", p.scheme, key, strings.Join(s.attributes, ", "))
		case len(values) != 1 || values[0] == "":
			return fmt.Errorf("%s key store URI: %s needs one value", p.scheme, key)
		case slices.Contains(files, key) && !filepath.IsAbs(values[0]):
			return fmt.Errorf("%s key store URI: %s=%q must be an absolute path", p.scheme, key, values[0])
		}
	}
	if len(s.required) > 0 && !slices.ContainsFunc(s.required, p.parsed.Has) {
		return fmt.Errorf("%s key store URI needs %s; an example is %s", p.scheme, strings.Join(s.required, " or "), s.example)
	}
	if v := p.parsed.Get("max-sessions"); v != "" {
		if n, err := strconv.Atoi(v); err != nil || n < 2 || n > 1<<16 {
			return fmt.Errorf("%s key store URI: max-sessions=%q is not a number of 2 to 65536", p.scheme, v)
		}
	}
	if s.resource {
		parts := strings.Split(resource, "/")
		if len(parts) != 6 || parts[0] != "projects" || parts[2] != "locations" || parts[4] != "keyRings" || slices.Contains(parts, "") {
			return fmt.Errorf("%s key store URI names no key ring; an example is %s", p.scheme, s.example)
		}
	}
	return nil
}

// Software reports whether keys made here are in this process and sealed in the store.
func (p Place) Software() bool { return p.text == "" }

// String returns the URI. It holds no secret.
func (p Place) String() string {
	if p.Software() {
		return KindSoft + ":"
	}
	return p.text
}

// Linked returns an error if this program has no driver for the key store.
func (p Place) Linked() error {
	if p.Software() {
		return nil
	}
	if p.scheme == "pkcs11" && !pkcs11Linked {
		return errors.New("this program was built without cgo and cannot load a PKCS #11 module; use signet-hsm, the same program linked dynamically (make hsm builds it)")
	}
	if _, ok := apiv1.LoadKeyManagerNewFunc(apiv1.Type(p.scheme)); !ok {
		return fmt.Errorf("this program has no driver for %s: keys", p.scheme)
	}
	return nil
}

// options returns what opens the key store, and the secret in it. The PIN is read here and not by the driver, which
// takes a file that it cannot read for no PIN.
func (p Place) options() (apiv1.Options, secret, error) {
	options := apiv1.Options{Type: apiv1.Type(p.scheme), URI: p.text}
	file := p.parsed.Get("pin-source")
	if file == "" {
		return options, secret{}, nil
	}
	pin, err := readPIN(file)
	if err != nil {
		return options, secret{}, err
	}
	// The driver asks the URI first; without pin-source it takes Options.Pin.
	opaque, query := url.Values{}, p.parsed.Query()
	for key, values := range p.parsed.Values {
		opaque[key] = values
	}
	opaque.Del("pin-source")
	query.Del("pin-source")
	u := uri.New(p.scheme, opaque)
	u.RawQuery = query.Encode()
	options.URI, options.Pin = u.String(), pin.value
	return options, pin, nil
}

// name returns the driver's name for a key to be made. Where the driver chooses a name of its own (an AWS key id, a
// version), the name in its answer is kept instead.
func (p Place) name(name string) string {
	switch p.scheme {
	case "pkcs11":
		// The id ties the two halves of a key pair; both attributes are wanted.
		id := sha256.Sum256([]byte(name))
		return "pkcs11:id=" + hex.EncodeToString(id[:16]) + ";object=" + name
	case "cloudkms":
		return p.resource() + "/cryptoKeys/" + name
	case "azurekms":
		u := "azurekms:name=" + name + ";vault=" + url.QueryEscape(p.parsed.Get("vault"))
		if p.parsed.GetBool("hsm") {
			u += "?hsm=true"
		}
		return u
	default:
		return p.scheme + ":name=" + name
	}
}

// found returns the driver's name for a key that was made under the given name.
func (p Place) found(name string) string {
	if p.scheme == "cloudkms" {
		return p.name(name) + "/cryptoKeyVersions/1"
	}
	return p.name(name)
}

// resource returns cloudkms:projects/P/locations/L/keyRings/R.
func (p Place) resource() string {
	text, _, _ := strings.Cut(p.text, "?")
	text, _, _ = strings.Cut(text, ";")
	return text
}
