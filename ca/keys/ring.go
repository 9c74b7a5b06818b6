package keys

import (
	"context"
	"crypto"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.step.sm/crypto/kms/apiv1"
)

// A Choice is where the next key of one use is made, and of which algorithm. The zero value is an EC P-256 key in this
// process.
type Choice struct {
	Place     Place
	Algorithm Algorithm
}

// RingConfig says where a Ring makes keys and how long it waits for them.
type RingConfig struct {
	// TrustDomain is whose keys they are. Their names say so.
	TrustDomain spiffeid.TrustDomain

	// X509 and JWT are where new keys are made. Keys that exist stay where they are.
	X509, JWT Choice

	// Limits bound what is asked of each key store.
	Limits Limits

	// Log gets a line when a key store goes down or comes back. Nil means slog.Default.
	Log *slog.Logger
}

// A Ring has the key stores in which a trust domain's authority keys are, one connection each. Its methods may be called
// concurrently.
type Ring struct {
	config RingConfig

	mu     sync.Mutex
	stores map[string]*keyStore // by the URI of their Place
	closed bool
}

// NewRing returns a Ring. It connects to nothing yet.
func NewRing(c RingConfig) *Ring {
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return &Ring{config: c, stores: map[string]*keyStore{}}
}

// Close closes the key stores, after the calls under way have ended or their time is over. Keys cannot sign any more.
func (r *Ring) Close() {
	r.mu.Lock()
	r.closed = true
	stores := r.stores
	r.stores = nil
	r.mu.Unlock()
	var wg sync.WaitGroup
	for _, s := range stores {
		wg.Go(s.close)
	}
	wg.Wait()
}

func (r *Ring) store(place Place) (*keyStore, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, errStoreClosed
	}
	s := r.stores[place.text]
	if s == nil {
		if err := place.Linked(); err != nil {
			return nil, fmt.Errorf("key store %s: %w", place, err)
		}
		s = newKeyStore(place, r.config.Limits, r.config.Log)
		r.stores[place.text] = s
	}
	return s, nil
}

// Choice returns where the next key of a use is made. Keys of WIT authorities are made where those of JWT authorities are.
func (r *Ring) Choice(use Use) Choice {
	if use == UseJWT || use == UseWIT {
		return r.config.JWT
	}
	return r.config.X509
}

// Generate makes a new key in this process, of the algorithm chosen for the use.
func (r *Ring) Generate(ctx context.Context, use Use) (*Key, error) {
	return generate(ctx, r.Choice(use).Algorithm)
}

// Open returns the key that Key.Seal stored, with the given public key. It waits for nobody: a key outside this process is
// looked for when it first signs, and compared with public then. errors.Is tells ErrWrongSealKey from ErrSealBroken.
func (r *Ring) Open(ctx context.Context, stored Stored, seal *SealKey, b Binding, public crypto.PublicKey) (*Key, error) {
	if stored.Kind == KindSoft {
		return Open(ctx, stored, seal, b)
	}
	if _, known := schemes[stored.Kind]; !known {
		return nil, fmt.Errorf("key of authority %q is kept in %q, which this program does not know; use the signet release that wrote it", b.AuthorityID, stored.Kind)
	}
	if seal == nil {
		return nil, fmt.Errorf("key of authority %q: %w", b.AuthorityID, errNoSealKey)
	}
	text, err := seal.open(sealReference, stored.Sealed, b)
	if err != nil {
		return nil, err
	}
	var ref reference
	if err := json.Unmarshal(text, &ref); err != nil {
		return nil, fmt.Errorf("key of authority %q: its reference: %w", b.AuthorityID, err)
	}
	place, err := ParsePlace(ref.KMS)
	if err != nil {
		return nil, fmt.Errorf("key of authority %q: %w", b.AuthorityID, err)
	}
	if place.scheme != stored.Kind || ref.Key == "" {
		return nil, fmt.Errorf("key of authority %q is kept in %q, but its reference is to %q in %s", b.AuthorityID, stored.Kind, ref.Key, place)
	}
	s, err := r.store(place)
	if err != nil {
		return nil, fmt.Errorf("key of authority %q: %w", b.AuthorityID, err)
	}
	return &Key{signer: &storeSigner{store: s, key: ref.Key, public: public}, external: true}, nil
}

// An Intent is a key that is to be made in a key store, or was: between the two nobody knows. It is kept in the store of the
// CA, sealed, until the authority whose key it is takes its place.
type Intent struct {
	// Name is the key's name in the key store. No other key has or will have it.
	Name string
	// Choice is where the key is made, and what it is.
	Choice Choice
}

// storedIntent is an Intent as it is sealed.
type storedIntent struct {
	Name      string    `json:"name"`
	KMS       string    `json:"kms"`
	Algorithm Algorithm `json:"algorithm"`
}

// Intend returns the intent to make a key for an authority, under a new name: signet-TRUST-DOMAIN-USE-GENERATION-RANDOM, in
// characters that every key store takes.
func (r *Ring) Intend(use Use, generation uint64) Intent {
	const maxTrustDomain = 20 // the name has at most 63 bytes
	td := strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' {
			return c
		}
		return '-'
	}, r.config.TrustDomain.Name())
	random := make([]byte, 8)
	rand.Read(random)
	name := fmt.Sprintf("signet-%s-%s-%d-%s", td[:min(len(td), maxTrustDomain)], use, generation%1e9, hex.EncodeToString(random))
	return Intent{Name: name, Choice: r.Choice(use)}
}

// Seal returns the intent as it is stored. Where the key is made is sealed for the same reason as in Stored.
func (i Intent) Seal(seal *SealKey, td spiffeid.TrustDomain, use Use) ([]byte, error) {
	if seal == nil {
		return nil, errNoSealKey
	}
	text, err := json.Marshal(storedIntent{Name: i.Name, KMS: i.Choice.Place.text, Algorithm: i.Choice.Algorithm})
	if err != nil {
		return nil, err
	}
	return seal.seal(sealIntent, text, intentBinding(td, use))
}

// OpenIntent reads what Intent.Seal returned.
func OpenIntent(sealed []byte, seal *SealKey, td spiffeid.TrustDomain, use Use) (Intent, error) {
	if seal == nil {
		return Intent{}, errNoSealKey
	}
	text, err := seal.open(sealIntent, sealed, intentBinding(td, use))
	if err != nil {
		return Intent{}, err
	}
	var stored storedIntent
	if err := json.Unmarshal(text, &stored); err != nil {
		return Intent{}, fmt.Errorf("the intent to make a key: %w", err)
	}
	place, err := ParsePlace(stored.KMS)
	if err != nil {
		return Intent{}, fmt.Errorf("the intent to make key %q: %w", stored.Name, err)
	}
	if place.Software() || stored.Name == "" {
		return Intent{}, errors.New("the intent to make a key names no key store")
	}
	return Intent{Name: stored.Name, Choice: Choice{Place: place, Algorithm: stored.Algorithm}}, nil
}

func intentBinding(td spiffeid.TrustDomain, use Use) Binding {
	return Binding{TrustDomain: td, Use: use, AuthorityID: "intent", Generation: 1}
}

// Same reports whether the intent is for what is chosen now.
func (i Intent) Same(c Choice) bool {
	return i.Choice.Place.text == c.Place.text && i.Choice.Algorithm == c.Algorithm
}

// Find returns the key of an intent, or ErrNoKey if the key store says that it has none.
func (r *Ring) Find(ctx context.Context, i Intent) (*Key, error) {
	s, err := r.store(i.Choice.Place)
	if err != nil {
		return nil, err
	}
	signer, err := s.find(ctx, i.Name)
	if err != nil {
		return nil, err
	}
	return r.proved(ctx, i, signer)
}

// Create makes the key of an intent. The intent must be in the store before, or a crash would leave a key that nobody knows.
func (r *Ring) Create(ctx context.Context, i Intent) (*Key, error) {
	s, err := r.store(i.Choice.Place)
	if err != nil {
		return nil, err
	}
	signer, err := s.create(ctx, i.Name, i.Choice.Algorithm)
	if errors.Is(err, apiv1.AlreadyExistsError{}) {
		return r.Find(ctx, i)
	}
	if err != nil {
		return nil, err
	}
	return r.proved(ctx, i, signer)
}

// proved returns a key that is what was asked for and that signs, before anybody is told of it.
func (r *Ring) proved(ctx context.Context, i Intent, signer *storeSigner) (*Key, error) {
	if err := i.Choice.Algorithm.check(signer.public); err != nil {
		return nil, fmt.Errorf("key %s in key store %s: %w", signer.key, i.Choice.Place, err)
	}
	if err := signer.prove(ctx); err != nil {
		return nil, err
	}
	return &Key{signer: signer, external: true}, nil
}

// Remove deletes the key of an intent that will not be used, if it exists.
func (r *Ring) Remove(ctx context.Context, i Intent) error {
	s, err := r.store(i.Choice.Place)
	if err != nil {
		return err
	}
	signer, err := s.find(ctx, i.Name)
	if errors.Is(err, ErrNoKey) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := s.remove(ctx, signer.key); err != nil {
		return fmt.Errorf("key %s in key store %s: %w", signer.key, i.Choice.Place, err)
	}
	return nil
}
