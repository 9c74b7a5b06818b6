package keys

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/uri"
)

// keyAttributes are those that name a key.
var keyAttributes = map[string][]string{
	"pkcs11":   {"id", "object"},
	"tpmkms":   {"name"},
	"awskms":   {"key-id"},
	"azurekms": {"name", "version"},
}

// A KeyURI names a key that an operator made in a key store.
type KeyURI struct {
	text  string
	place Place
	key   string
}

// ParseKeyURI reads the URI of a key, such as pkcs11:token=signet;object=ca?pin-source=/etc/signet/pin,
// awskms:key-id=…;region=…, or cloudkms:projects/…/cryptoKeyVersions/1. Like that of a key store, it holds no secret.
func ParseKeyURI(text string) (KeyURI, error) {
	name, _, _ := strings.Cut(text, ":")
	if len(text) > maxURIBytes {
		return KeyURI{}, fmt.Errorf("key URI has %d bytes, more than %d", len(text), maxURIBytes)
	}
	if _, ok := schemes[name]; !ok {
		return KeyURI{}, fmt.Errorf("key URI has the unknown scheme %.40q; pkcs11:, tpmkms:, awskms:, cloudkms: and azurekms: are known", name)
	}
	parsed, err := uri.ParseWithScheme(name, text)
	if err != nil || parsed.Fragment != "" || parsed.Host != "" {
		return KeyURI{}, fmt.Errorf("%s key URI is malformed", name)
	}
	k := KeyURI{text: text}
	store := text
	if name == "cloudkms" {
		ring, key, ok := strings.Cut(text, "/cryptoKeys/")
		key, query, _ := strings.Cut(key, "?")
		if parts := strings.Split(key, "/"); !ok || len(parts) != 3 || parts[1] != "cryptoKeyVersions" || slices.Contains(parts, "") {
			return KeyURI{}, errors.New("cloudkms key URI names no key version; it ends in /cryptoKeys/KEY/cryptoKeyVersions/1")
		}
		k.key = ring + "/cryptoKeys/" + key
		if store = ring; query != "" {
			store += "?" + query
		}
	} else {
		own, others, query := url.Values{}, url.Values{}, parsed.Query()
		for attribute, values := range uri.Values(parsed) {
			if slices.Contains(keyAttributes[name], attribute) {
				own[attribute] = values
				query.Del(attribute)
			}
		}
		for attribute, values := range parsed.Values {
			if !slices.Contains(keyAttributes[name], attribute) {
				others[attribute] = values
			}
		}
		if len(own) == 0 {
			return KeyURI{}, fmt.Errorf("%s key URI names no key: it needs %s", name, strings.Join(keyAttributes[name], " or "))
		}
		if name == "azurekms" {
			own["vault"] = parsed.Values["vault"]
		}
		k.key = uri.New(name, own).String()
		u := uri.New(name, others)
		u.RawQuery = query.Encode()
		if store = u.String(); len(others) == 0 {
			store = name + ":"
			if u.RawQuery != "" {
				store += "?" + u.RawQuery
			}
		}
	}
	k.place, err = ParsePlace(store)
	return k, err
}

// Linked returns an error if this program has no driver for the key store.
func (k KeyURI) Linked() error { return k.place.Linked() }

// String returns the URI. It holds no secret.
func (k KeyURI) String() string { return k.text }

// ID names the key in the store.
func (k KeyURI) ID() string {
	sum := sha256.Sum256([]byte(k.key))
	return fmt.Sprintf("%s-%x", k.place.scheme, sum[:8])
}

// Existing returns a key that an operator made, such as that of a CA above. It is asked for its public key, and for one
// signature as proof; like those of authorities, each of its signatures has a deadline and is verified.
func (r *Ring) Existing(ctx context.Context, k KeyURI) (*Key, error) {
	s, err := r.store(k.place)
	if err != nil {
		return nil, err
	}
	signer, err := ask(ctx, s, "reading key "+k.key, true, func(c *connection) (*storeSigner, error) {
		public, err := c.manager.GetPublicKey(&apiv1.GetPublicKeyRequest{Name: k.key})
		if err != nil {
			return nil, err
		}
		return &storeSigner{store: s, key: k.key, public: public}, nil
	})
	if err != nil {
		return nil, err
	}
	if err := signer.prove(ctx); err != nil {
		return nil, err
	}
	return &Key{signer: signer, external: true}, nil
}
