package keys

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"go.step.sm/crypto/kms"
	"go.step.sm/crypto/kms/apiv1"
)

// KindSoft is the Stored.Kind of keys that are sealed in the store and sign in this process.
const KindSoft = "softkms"

// ErrBadSignature is returned by Key.Sign when a signer outside this process answered with a signature that its own public
// key does not verify.
var ErrBadSignature = errors.New("the key store returned a signature that does not verify")

var errNoSealKey = errors.New("no seal key; set seal.key_file, seal.systemd_credential or seal.kms")

// A Stored is an authority's private key as it is kept in the store: never in clear.
type Stored struct {
	// Kind says where the key lives: KindSoft, or the URI scheme of a key store.
	Kind string `json:"kind"`

	// Sealed is encrypted under the seal key: of KindSoft the private key, of others the URIs of key store and key. Those
	// are no secret, but name the library that the CA loads and the file that it reads as PIN, which nobody who can
	// merely write to the store may choose.
	Sealed []byte `json:"sealed,omitempty"`
}

// A Key is the private key of an authority. It is a crypto.Signer and prints as "[authority key]" with every verb. It may
// be used concurrently.
type Key struct {
	signer   crypto.Signer
	external bool
}

// Generate makes a new EC P-256 key in this process.
func Generate(ctx context.Context) (*Key, error) { return generate(ctx, ECP256) }

func generate(ctx context.Context, algorithm Algorithm) (*Key, error) {
	manager, err := softKMS(ctx)
	if err != nil {
		return nil, err
	}
	defer manager.Close()
	request := &apiv1.CreateKeyRequest{}
	algorithm.request(request)
	made, err := manager.CreateKey(request)
	if err != nil {
		return nil, fmt.Errorf("making an authority key: %w", err)
	}
	return signerOf(manager, &made.CreateSignerRequest)
}

// External returns a Key over a signer that is not in this process, such as the one of a KMS or HSM driver. Each of its
// signatures is verified before it is used.
func External(signer crypto.Signer) *Key { return &Key{signer: signer, external: true} }

// Seal returns the key in the form in which it is stored. It opens only with the same seal key and the same binding. The
// key of an External cannot be sealed.
func (k *Key) Seal(seal *SealKey, b Binding) (Stored, error) {
	if seal == nil {
		return Stored{}, errNoSealKey
	}
	if signer, ok := k.signer.(*storeSigner); ok {
		text, err := json.Marshal(reference{KMS: signer.store.place.text, Key: signer.key})
		if err != nil {
			return Stored{}, err
		}
		sealed, err := seal.seal(sealReference, text, b)
		return Stored{Kind: signer.store.place.scheme, Sealed: sealed}, err
	}
	if k.external {
		return Stored{}, errors.New("a key outside this process has no bytes to seal")
	}
	der, err := x509.MarshalPKCS8PrivateKey(k.signer)
	if err != nil {
		return Stored{}, fmt.Errorf("encoding the key of authority %q: %w", b.AuthorityID, err)
	}
	defer clear(der)
	sealed, err := seal.seal(sealUse, der, b)
	return Stored{Kind: KindSoft, Sealed: sealed}, err
}

// Open returns the key of KindSoft that Seal stored; Ring.Open opens all kinds. errors.Is tells ErrWrongSealKey from
// ErrSealBroken.
func Open(ctx context.Context, stored Stored, seal *SealKey, b Binding) (*Key, error) {
	if stored.Kind != KindSoft {
		return nil, fmt.Errorf("key of authority %q is kept in %q; this program knows %q only", b.AuthorityID, stored.Kind, KindSoft)
	}
	if seal == nil {
		return nil, fmt.Errorf("key of authority %q: %w", b.AuthorityID, errNoSealKey)
	}
	der, err := seal.open(sealUse, stored.Sealed, b)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		// The parser's text is left out: it speaks about the bytes of a private key.
		return nil, fmt.Errorf("key of authority %q is not PKCS #8 inside its seal", b.AuthorityID)
	}
	signer, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("key of authority %q is a %T, which cannot sign", b.AuthorityID, parsed)
	}
	manager, err := softKMS(ctx)
	if err != nil {
		return nil, err
	}
	defer manager.Close()
	return signerOf(manager, &apiv1.CreateSignerRequest{Signer: signer})
}

// Public returns the public key.
func (k *Key) Public() crypto.PublicKey { return k.signer.Public() }

// Sign signs digest as crypto.Signer says. The signature of an External key is verified first, and ErrBadSignature is
// returned if it does not verify: hardware that fails must not put unusable SVIDs into the world.
func (k *Key) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	signature, err := k.signer.Sign(rand, digest, opts)
	if _, verified := k.signer.(*storeSigner); err != nil || !k.external || verified {
		return signature, err
	}
	if !verify(k.signer.Public(), digest, signature, opts) {
		return nil, ErrBadSignature
	}
	return signature, nil
}

// External reports whether the key signs outside this process.
func (k *Key) External() bool { return k.external }

// Concurrency returns how many signatures one caller should ask for at once. Zero means as many as there are processors: the
// key signs in this process. For a key store it is half of what may be under way there, so that one caller leaves room.
func (k *Key) Concurrency() int {
	if signer, ok := k.signer.(*storeSigner); ok {
		return max(1, signer.store.limits.Concurrency/2)
	}
	return 0
}

// Health returns nil if the key can sign as far as is known, or else an error that names the key and its key store and says
// what is wrong. Asking is cheap. A key store that is down is tried again in the background when it is asked after, so that
// it recovers without a request.
func (k *Key) Health() error {
	if signer, ok := k.signer.(*storeSigner); ok {
		return signer.health()
	}
	return nil
}

// Prove makes one signature, for nothing but to see whether the key signs.
func (k *Key) Prove(ctx context.Context) error {
	if signer, ok := k.signer.(*storeSigner); ok {
		return signer.prove(ctx)
	}
	return nil
}

// Format hides the key, whatever the verb.
func (k *Key) Format(f fmt.State, _ rune) { io.WriteString(f, "[authority key]") }

func softKMS(ctx context.Context) (kms.KeyManager, error) {
	manager, err := kms.New(ctx, kms.Options{Type: apiv1.SoftKMS})
	if err != nil {
		return nil, fmt.Errorf("opening software keys: %w", err)
	}
	return manager, nil
}

func signerOf(manager kms.KeyManager, req *apiv1.CreateSignerRequest) (*Key, error) {
	signer, err := manager.CreateSigner(req)
	if err != nil {
		return nil, fmt.Errorf("opening an authority key: %w", err)
	}
	return &Key{signer: signer}, nil
}

func verify(public crypto.PublicKey, digest, signature []byte, opts crypto.SignerOpts) bool {
	switch public := public.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(public, digest, signature)
	case ed25519.PublicKey:
		return ed25519.Verify(public, digest, signature)
	case *rsa.PublicKey:
		if pss, ok := opts.(*rsa.PSSOptions); ok {
			return rsa.VerifyPSS(public, opts.HashFunc(), digest, signature, pss) == nil
		}
		return rsa.VerifyPKCS1v15(public, opts.HashFunc(), digest, signature) == nil
	default:
		return false
	}
}
