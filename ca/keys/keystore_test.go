package keys

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.step.sm/crypto/kms/apiv1"
)

// A standIn is a key store that misbehaves when told to. It is registered as the driver of awskms:, which this test program
// does not link. Its keys outlive its connections.
type standIn struct {
	mu      sync.Mutex
	keys    map[string]*ecdsa.PrivateKey
	opened  int
	signing int // calls of Sign under way
	most    int // of them at once, ever
	signs   int // calls of Sign, ever
	makes   int // calls of CreateKey that made a key
	fault   func(connection int) error
	lie     bool
	hang    chan struct{} // calls wait until it is closed
}

type standInConn struct {
	*standIn
	number int
}

var standIns struct {
	sync.Mutex
	current *standIn
}

func init() {
	apiv1.Register(apiv1.AmazonKMS, func(context.Context, apiv1.Options) (apiv1.KeyManager, error) {
		standIns.Lock()
		s := standIns.current
		standIns.Unlock()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.opened++
		return standInConn{s, s.opened}, nil
	})
}

func newStandIn() *standIn {
	s := &standIn{keys: map[string]*ecdsa.PrivateKey{}}
	standIns.Lock()
	standIns.current = s
	standIns.Unlock()
	return s
}

func (s *standIn) set(f func()) {
	s.mu.Lock()
	f()
	s.mu.Unlock()
}

// wait does what the faults say.
func (c standInConn) wait() error {
	c.mu.Lock()
	hang, fault := c.hang, c.fault
	c.mu.Unlock()
	if hang != nil {
		<-hang
	}
	if fault != nil {
		return fault(c.number)
	}
	return nil
}

func (c standInConn) key(name string) *ecdsa.PrivateKey {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.keys[name]
}

func (c standInConn) GetPublicKey(r *apiv1.GetPublicKeyRequest) (crypto.PublicKey, error) {
	if err := c.wait(); err != nil {
		return nil, err
	}
	if k := c.key(r.Name); k != nil {
		return k.Public(), nil
	}
	return nil, apiv1.NotFoundError{}
}

func (c standInConn) CreateKey(r *apiv1.CreateKeyRequest) (*apiv1.CreateKeyResponse, error) {
	if err := c.wait(); err != nil {
		return nil, err
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	c.set(func() { c.keys[r.Name] = k; c.makes++ })
	return &apiv1.CreateKeyResponse{Name: r.Name, PublicKey: k.Public(), CreateSignerRequest: apiv1.CreateSignerRequest{SigningKey: r.Name}}, nil
}

func (c standInConn) CreateSigner(r *apiv1.CreateSignerRequest) (crypto.Signer, error) {
	k := c.key(r.SigningKey)
	if k == nil {
		return nil, apiv1.NotFoundError{}
	}
	return standInSigner{c, k}, nil
}

func (c standInConn) Close() error { return nil }

type standInSigner struct {
	conn standInConn
	key  *ecdsa.PrivateKey
}

func (s standInSigner) Public() crypto.PublicKey { return s.key.Public() }

func (s standInSigner) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	c := s.conn
	c.set(func() { c.signs++; c.signing++; c.most = max(c.most, c.signing) })
	defer c.set(func() { c.signing-- })
	if err := c.wait(); err != nil {
		return nil, err
	}
	c.mu.Lock()
	lie := c.lie
	c.mu.Unlock()
	if lie {
		digest = make([]byte, len(digest))
	}
	return s.key.Sign(rand.Reader, digest, opts)
}

const standInURI = "awskms:region=nowhere-1"

// standInKey returns a key in a new stand-in.
func standInKey(t *testing.T, limits Limits) (*standIn, *Ring, *Key) {
	t.Helper()
	s := newStandIn()
	place := mustParse(t, standInURI)
	ring := NewRing(RingConfig{TrustDomain: testBinding.TrustDomain, X509: Choice{Place: place, Algorithm: ECP256}, Limits: limits, Log: slog.New(slog.DiscardHandler)})
	key, err := ring.Create(t.Context(), ring.Intend(UseX509, 1))
	if err != nil {
		t.Fatal(err)
	}
	return s, ring, key
}

func mustParse(t testing.TB, text string) Place {
	t.Helper()
	p, err := ParsePlace(text)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func sign(k *Key) error {
	digest := sha256.Sum256([]byte("an svid"))
	signature, err := k.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err == nil && !verify(k.Public(), digest[:], signature, crypto.SHA256) {
		return errors.New("a bad signature came out")
	}
	return err
}

// checkNamed wants an error that says which key in which key store is away.
func checkNamed(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, ErrUnavailable) {
		t.Fatalf("error %v, want ErrUnavailable", err)
	}
	for _, want := range []string{standInURI, "awskms:name=signet-example-org-x509-1-"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not name %q", err, want)
		}
	}
}

// recovered waits for the key to be healthy again, asking as the CA does, and returns how long that took.
func recovered(t *testing.T, key *Key) time.Duration {
	t.Helper()
	begin := time.Now()
	for key.Health() != nil {
		if time.Since(begin) > time.Minute {
			t.Fatalf("not healthy a minute after the key store came back: %v", key.Health())
		}
		time.Sleep(time.Second)
	}
	if err := sign(key); err != nil {
		t.Errorf("healthy, but Sign = %v", err)
	}
	return time.Since(begin)
}

func TestKeyStoreHangsForAnHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, ring, key := standInKey(t, Limits{Timeout: 5 * time.Second, Concurrency: 4})
		hang := make(chan struct{})
		s.set(func() { s.hang, s.most = hang, 0 })
		begin := time.Now()
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() { checkNamed(t, sign(key)) })
		}
		wg.Wait()
		if took := time.Since(begin); took > 5*time.Second {
			t.Errorf("100 callers waited %v, want the 5s of the deadline at most", took)
		}
		for range 3600 {
			checkNamed(t, sign(key))
			checkNamed(t, key.Health())
			time.Sleep(time.Second)
		}
		s.set(func() {
			if s.most > 4 {
				t.Errorf("%d calls hang in the driver, want 4 at most", s.most)
			}
			s.hang = nil
		})
		close(hang)
		if took := recovered(t, key); took > 2*lastRetry {
			t.Errorf("recovery took %v", took)
		}
		ring.Close()
	})
}

func TestKeyStoreFailsForAnHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, ring, key := standInKey(t, Limits{})
		s.set(func() { s.fault = func(int) error { return errors.New("503 come back later") }; s.signs = 0 })
		for range 3600 {
			err := sign(key)
			checkNamed(t, err)
			if !strings.Contains(err.Error(), "503 come back later") {
				t.Fatalf("error %q does not hold the cause", err)
			}
			time.Sleep(time.Second)
		}
		s.set(func() {
			// Each try is two calls, the second on a new connection.
			if most := 2*int(time.Hour/(lastRetry/2)) + 40; s.signs > most {
				t.Errorf("%d calls in an hour of failure, want %d at most", s.signs, most)
			}
			s.fault = nil
		})
		recovered(t, key)
		ring.Close()
	})
}

func TestLostConnectionIsMadeAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, ring, key := standInKey(t, Limits{})
		var dead int
		s.set(func() {
			dead = s.opened
			s.fault = func(connection int) error {
				if connection <= dead {
					return errors.New("CKR_SESSION_HANDLE_INVALID")
				}
				return nil
			}
		})
		if err := sign(key); err != nil {
			t.Errorf("Sign after the connection was lost = %v, want a signature over a new one", err)
		}
		if err := key.Health(); err != nil {
			t.Errorf("Health = %v", err)
		}
		ring.Close()
	})
}

func TestKeyStoreLies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, ring, key := standInKey(t, Limits{})
		s.set(func() { s.lie = true })
		if err := sign(key); !errors.Is(err, ErrBadSignature) {
			t.Errorf("Sign = %v, want ErrBadSignature", err)
		}
		if err := key.Health(); !errors.Is(err, ErrBadSignature) {
			t.Errorf("Health = %v, want that it names the bad signature", err)
		}
		if _, err := ring.Create(t.Context(), ring.Intend(UseX509, 2)); !errors.Is(err, ErrBadSignature) {
			t.Errorf("Create = %v, want that a key which signs wrongly is not used", err)
		}
		s.set(func() { s.lie = false })
		recovered(t, key)
		ring.Close()
	})
}

func TestKeyMadeAfterTheDeadlineIsFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, ring, _ := standInKey(t, Limits{Timeout: 5 * time.Second})
		hang := make(chan struct{})
		s.set(func() { s.hang, s.makes = hang, 0 })
		intent := ring.Intend(UseX509, 2)
		if _, err := ring.Create(t.Context(), intent); !errors.Is(err, ErrUnavailable) {
			t.Fatalf("Create = %v, want ErrUnavailable", err)
		}
		// The driver still makes the key. Whoever looks for it now must not be told that there is none.
		s.set(func() { s.hang = nil })
		if _, err := ring.Find(t.Context(), intent); !errors.Is(err, ErrUnavailable) {
			t.Fatalf("Find while the key is made = %v, want ErrUnavailable", err)
		}
		close(hang)
		synctest.Wait()
		if _, err := ring.Find(t.Context(), intent); err != nil {
			t.Errorf("Find = %v, want the key", err)
		}
		if s.makes != 1 {
			t.Errorf("%d keys were made, want 1", s.makes)
		}
		ring.Close()
	})
}

func TestCallerThatGoesAwayIsNoFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, ring, key := standInKey(t, Limits{})
		hang := make(chan struct{})
		s.set(func() { s.hang = hang })
		for range 2 * tripAfter {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if err := key.Prove(ctx); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrUnavailable) {
				t.Errorf("Prove = %v, want the caller's own deadline", err)
			}
			cancel()
		}
		if err := key.Health(); err != nil {
			t.Errorf("Health = %v, want none", err)
		}
		close(hang)
		ring.Close()
	})
}

func TestCloseDoesNotWaitForever(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, ring, key := standInKey(t, Limits{Timeout: 5 * time.Second})
		hang := make(chan struct{})
		s.set(func() { s.hang = hang })
		go func() { _ = sign(key) }()
		synctest.Wait()
		begin := time.Now()
		ring.Close()
		if took := time.Since(begin); took > 5*time.Second {
			t.Errorf("Close took %v", took)
		}
		if err := sign(key); !errors.Is(err, errStoreClosed) {
			t.Errorf("Sign after Close = %v", err)
		}
		close(hang)
	})
}

func TestPINIsNotInErrors(t *testing.T) {
	cause := apiv1.AlreadyExistsError{Message: "login with pin=s3cret-pin failed"}
	err := secret{value: "s3cret-pin"}.scrub(cause)
	if strings.Contains(err.Error(), "s3cret") || !strings.Contains(err.Error(), "[PIN]") {
		t.Errorf("scrubbed error is %q", err)
	}
	if !errors.Is(err, apiv1.AlreadyExistsError{}) || errors.Unwrap(err) != nil {
		t.Error("the scrubbed error lost its kind, or gives its cause away")
	}
}

// A key store that makes another key than it was asked for, a weaker one perhaps, is not believed.
func TestX509_28_KeyOfAnotherKindIsNotUsed(t *testing.T) {
	s := newStandIn() // it makes P-256 keys, whatever it is asked for
	for _, algorithm := range []Algorithm{ECP384, RSA2048, RSA4096} {
		choice := Choice{Place: mustParse(t, standInURI), Algorithm: algorithm}
		ring := NewRing(RingConfig{TrustDomain: testBinding.TrustDomain, X509: choice, Log: slog.New(slog.DiscardHandler)})
		if _, err := ring.Create(t.Context(), ring.Intend(UseX509, 1)); err == nil || !strings.Contains(err.Error(), "the key is EC-P256, not "+string(algorithm)) {
			t.Errorf("Create of %s = %v, want that the key is of another kind", algorithm, err)
		}
		ring.Close()
	}
	if s.makes != 3 {
		t.Errorf("%d keys were made, want 3", s.makes)
	}
}
