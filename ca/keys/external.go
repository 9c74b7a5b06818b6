package keys

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	_ "crypto/sha256" // the hashes of prove
	_ "crypto/sha512"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"go.step.sm/crypto/kms/apiv1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A Lookup is what the driver of a key store leaves out that is needed to find a key after a crash. It is registered by
// RegisterLookup.
type Lookup struct {
	// Find returns the driver's name for the key that was made under the given name, or ErrNoKey. It is for key stores that
	// choose names themselves. attribute returns what the URI of the key store says. Nil: the name is known before.
	Find func(ctx context.Context, attribute func(string) string, name string) (string, error)

	// Absent reports whether an error of the driver says that there is no such key. Nil: apiv1.NotFoundError and the gRPC
	// code NotFound do.
	Absent func(error) bool
}

var lookups sync.Map // of scheme to Lookup

// RegisterLookup sets the Lookup for a URI scheme. Like the drivers themselves, which register themselves in the same way,
// it is called from an init function of what the program links.
func RegisterLookup(scheme string, l Lookup) { lookups.Store(scheme, l) }

func lookup(scheme string) Lookup {
	l, _ := lookups.Load(scheme)
	found, _ := l.(Lookup)
	if found.Absent == nil {
		found.Absent = func(err error) bool {
			return errors.Is(err, apiv1.NotFoundError{}) || status.Code(err) == codes.NotFound
		}
	}
	return found
}

// A reference is where a key is: what is stored of an authority's key that is outside this process. It holds no secret.
type reference struct {
	// KMS is the URI of the key store as it was configured when the key was made.
	KMS string `json:"kms"`
	// Key is the driver's name for the key.
	Key string `json:"key"`
}

// A storeSigner signs in a key store. It is a crypto.Signer.
type storeSigner struct {
	store  *keyStore
	key    string
	public crypto.PublicKey
}

// Public returns the public key: the one in the authority's record, if there is one yet. What the key store says later is
// compared with it.
func (s *storeSigner) Public() crypto.PublicKey { return s.public }

// Sign signs digest in the key store, within its deadline. rand is not used: a key store has its own.
func (s *storeSigner) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return s.sign(context.Background(), digest, opts)
}

func (s *storeSigner) sign(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	digest = bytes.Clone(digest) // a call that hangs outlives its caller
	return ask(ctx, s.store, "signing with key "+s.key, true, func(c *connection) ([]byte, error) {
		signer, err := s.store.signer(c, s.key)
		if err != nil {
			return nil, err
		}
		if public, ok := signer.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(s.public) {
			return nil, errors.New("the key store has another key under this name than the one in the authority's record")
		}
		signature, err := signer.Sign(rand.Reader, digest, opts)
		if err != nil {
			return nil, err
		}
		// Hardware that fails must not put unusable SVIDs into the world.
		if !verify(s.public, digest, signature, opts) {
			return nil, ErrBadSignature
		}
		return signature, nil
	})
}

// prove signs a fixed text that is nothing else's encoding, with the hash that fits the key: clouds take no other.
func (s *storeSigner) prove(ctx context.Context) error {
	hash := crypto.SHA256
	if public, ok := s.public.(*ecdsa.PublicKey); ok && public.Curve == elliptic.P384() {
		hash = crypto.SHA384
	}
	h := hash.New()
	io.WriteString(h, "signet: proof that this key signs")
	_, err := s.sign(ctx, h.Sum(nil), hash)
	return err
}

// health returns nil, or why the key cannot sign at the moment.
func (s *storeSigner) health() error {
	if err := s.store.health(s.prove); err != nil {
		return fmt.Errorf("key %s: %w", s.key, err)
	}
	return nil
}

// signer returns the driver's signer for a key, which it looks up once for each connection.
func (s *keyStore) signer(c *connection, key string) (crypto.Signer, error) {
	s.mu.Lock()
	signer := c.signers[key]
	s.mu.Unlock()
	if signer != nil {
		return signer, nil
	}
	signer, err := c.manager.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: key})
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	c.signers[key] = signer
	s.mu.Unlock()
	return signer, nil
}

// find returns the key that was made under a name, or ErrNoKey. It waits for the making of a key that nobody waits for any
// more, so that "no" means that there is none and none will come.
func (s *keyStore) find(ctx context.Context, name string) (*storeSigner, error) {
	l := lookup(s.place.scheme)
	return ask(ctx, s, fmt.Sprintf("looking for key %q", name), true, func(c *connection) (*storeSigner, error) {
		done, err := s.alone(ctx)
		if err != nil {
			return nil, err
		}
		defer done()
		limited, cancel := context.WithTimeout(ctx, s.limits.Timeout)
		defer cancel()
		key := s.place.found(name)
		if l.Find != nil {
			if key, err = l.Find(limited, s.place.parsed.Get, name); err != nil {
				return nil, err
			}
		}
		public, err := c.manager.GetPublicKey(&apiv1.GetPublicKeyRequest{Name: key})
		switch {
		case err != nil && l.Absent(err):
			return nil, ErrNoKey
		case err != nil:
			return nil, err
		}
		return &storeSigner{store: s, key: key, public: public}, nil
	})
}

// create makes a key under a name. If the outcome is not known, find tells later.
func (s *keyStore) create(ctx context.Context, name string, algorithm Algorithm) (*storeSigner, error) {
	return ask(ctx, s, fmt.Sprintf("making key %q", name), false, func(c *connection) (*storeSigner, error) {
		done, err := s.alone(ctx)
		if err != nil {
			return nil, err
		}
		defer done()
		request := &apiv1.CreateKeyRequest{Name: s.place.name(name)}
		algorithm.request(request)
		if s.place.parsed.GetBool("hsm") {
			request.ProtectionLevel = apiv1.HSM
		}
		made, err := c.manager.CreateKey(request)
		if err != nil {
			return nil, err
		}
		key := made.CreateSignerRequest.SigningKey
		if key == "" {
			key = made.Name
		}
		return &storeSigner{store: s, key: key, public: made.PublicKey}, nil
	})
}

// alone waits until the driver makes no key, and keeps others from it until the returned function is called.
func (s *keyStore) alone(ctx context.Context) (func(), error) {
	t := time.NewTimer(s.limits.Timeout)
	defer t.Stop()
	select {
	case s.making <- struct{}{}:
		return func() { <-s.making }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-t.C:
		return nil, errors.New("the making of a key has not ended")
	}
}

// remove deletes a key that no authority has, where the driver can.
func (s *keyStore) remove(ctx context.Context, key string) error {
	_, err := ask(ctx, s, "deleting key "+key, false, func(c *connection) (struct{}, error) {
		switch m := c.manager.(type) {
		case apiv1.KeyDeleter:
			return struct{}{}, m.DeleteKey(&apiv1.DeleteKeyRequest{Name: key})
		case interface{ DeleteKey(string) error }: // pkcs11
			return struct{}{}, m.DeleteKey(key)
		}
		return struct{}{}, apiv1.NotImplementedError{Message: "the driver of this key store cannot delete keys"}
	})
	return err
}
