//go:build cgo

package keystores_test

import (
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/pkcs11"

	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/bolt"
	"github.com/signet-id/signet/ca/upstream"
	"github.com/signet-id/signet/test/keystores"
	"github.com/signet-id/signet/test/signettest"
)

// What makes the test binary a child that makes authorities in a token and is killed with SIGKILL at one step.
const (
	childDir  = "SIGNET_TEST_KEYS_DIR"  // of the store
	childURI  = "SIGNET_TEST_KEYS_URI"  // of the token
	childKill = "SIGNET_TEST_KEYS_KILL" // the number of the step; 0: none
	childCA   = "SIGNET_TEST_KEYS_CA"   // directory of the upstream CA; empty: none
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		at, err := strconv.ParseInt(os.Getenv(childKill), 10, 64)
		if err == nil {
			err = makeAuthorities(dir, os.Getenv(childURI), at)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	stop, err := startClouds()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	stop()
	os.Exit(code)
}

// A countdown kills this process when it reaches its step.
type countdown struct {
	at    int64
	steps atomic.Int64
}

func (c *countdown) step() {
	if c.steps.Add(1) == c.at {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {} // the signal is on its way
	}
}

// A killedStore dies before and after commits.
type killedStore struct {
	store.Store
	*countdown
}

func (s killedStore) Commit(ctx context.Context, checks []store.Check, writes []store.Write) (store.Revision, error) {
	s.step()
	defer s.step()
	return s.Store.Commit(ctx, checks, writes)
}

// A killedDriver dies before and after what it asks of the token.
type killedDriver struct {
	*pkcs11.PKCS11
	*countdown
}

func (d killedDriver) CreateKey(r *apiv1.CreateKeyRequest) (*apiv1.CreateKeyResponse, error) {
	d.step()
	defer d.step()
	return d.PKCS11.CreateKey(r)
}

func (d killedDriver) GetPublicKey(r *apiv1.GetPublicKeyRequest) (crypto.PublicKey, error) {
	d.step()
	return d.PKCS11.GetPublicKey(r)
}

// A killedUpstream dies before and after it has an intermediate signed.
type killedUpstream struct {
	authority.Upstream
	*countdown
}

func (u killedUpstream) Mint(ctx context.Context, csr []byte, ttl time.Duration) (chain, roots []*x509.Certificate, err error) {
	u.step()
	defer u.step()
	return u.Upstream.Mint(ctx, csr, ttl)
}

// above is the upstream CA on disk in the directory that childCA names, or nil.
func above(died *countdown) authority.Upstream {
	dir := os.Getenv(childCA)
	if dir == "" {
		return nil
	}
	return killedUpstream{&upstream.Disk{CertificateFile: filepath.Join(dir, "issuing.pem"), BundleFile: filepath.Join(dir, "root.pem"), KeyName: "the test's key",
		Key: func(context.Context) (crypto.Signer, error) {
			return keys.LoadKeyFile(filepath.Join(dir, "issuing.key"))
		}}, died}
}

// makeAuthorities opens the trust domain's authorities, making the first ones if there are none, and prepares one more of
// each kind, unless one is prepared. It prints how many steps there were.
func makeAuthorities(dir, uri string, kill int64) error {
	ctx, quiet, died := context.Background(), slog.New(slog.DiscardHandler), &countdown{at: kill}
	apiv1.Register(apiv1.PKCS11, func(ctx context.Context, o apiv1.Options) (apiv1.KeyManager, error) {
		d, err := pkcs11.New(ctx, o)
		return killedDriver{d, died}, err
	})
	b, err := bolt.Open(bolt.Config{Dir: filepath.Join(dir, "store"), Reserve: 4096, Log: quiet})
	if err != nil {
		return err
	}
	defer b.Close()
	seal, err := keys.LoadOrCreateSealKey(filepath.Join(dir, "seal.key"))
	if err != nil {
		return err
	}
	place, err := keys.ParsePlace(uri)
	if err != nil {
		return err
	}
	choice, td := keys.Choice{Place: place, Algorithm: keys.ECP256}, spiffeid.RequireTrustDomainFromString("example.org")
	ring := keys.NewRing(keys.RingConfig{TrustDomain: td, X509: choice, JWT: choice, Log: quiet})
	defer ring.Close()
	set, err := authority.Open(ctx, authority.Config{TrustDomain: td, Store: killedStore{b, died}, Seal: seal, Upstream: above(died), Keys: ring, Exclusive: true, Log: quiet})
	if err != nil {
		return err
	}
	from, err := b.Barrier(ctx)
	if err != nil {
		return err
	}
	watcher, err := b.Watch(ctx, from)
	if err != nil {
		return err
	}
	followed := make(chan struct{})
	go func() {
		defer close(followed)
		for {
			batch, err := watcher.Next(ctx)
			if err != nil {
				return // closed
			}
			_ = set.Observe(batch) // what it refuses, Prepare reports
		}
	}()
	defer func() { watcher.Close(); <-followed }()
	for _, use := range []keys.Use{keys.UseX509, keys.UseJWT} {
		if use == keys.UseX509 && set.HasUpstream() {
			if len(set.Authorities(use)) == 1 { // or one that died has done it
				if _, err := set.RenewIntermediate(ctx); err != nil {
					return err
				}
			}
			continue
		}
		if _, err := set.Prepare(ctx, use); err != nil {
			return err
		}
	}
	for _, use := range []keys.Use{keys.UseX509, keys.UseJWT} {
		if n := len(set.Authorities(use)); n != 2 {
			return fmt.Errorf("%d %s authorities, want 2", n, use)
		}
	}
	if err := set.Health(); err != nil {
		return err
	}
	for _, a := range set.Authorities(keys.UseX509) {
		if set.HasUpstream() && (len(a.Above) != 2 || a.State != authority.StateActive && a.State != authority.StateOld) {
			return fmt.Errorf("x509 authority %s is %s, below %d certificates", a.ID, a.State, len(a.Above))
		}
	}
	if n := len(set.Bundle().X509); set.HasUpstream() && n != 1 {
		return fmt.Errorf("%d X.509 authorities in the bundle, want the root", n)
	}
	// Signing shows that the active key of the record is the one in the token.
	if _, err := set.SignJWT(ctx, authority.JWTRequest{ID: spiffeid.RequireFromPath(td, "/web"), Audience: []string{"a"}}); err != nil {
		return err
	}
	fmt.Printf("steps %d\n", died.steps.Load())
	return nil
}

func runChild(t *testing.T, dir, uri string, kill int) (string, error) {
	t.Helper()
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), childDir+"="+dir, childURI+"="+uri, childKill+"="+strconv.Itoa(kill))
	out, err := child.CombinedOutput()
	return string(out), err
}

// TestCrashLoopLeaksNoKey kills a CA that makes authorities in a SoftHSM token at every step, twice in a row at the same
// one, and lets a third one finish. The token must hold one key pair for each authority then, and the store nothing else.
func TestCrashLoopLeaksNoKey(t *testing.T) { crashLoop(t) }

// TestCrashLoopBelowAnUpstream does the same with intermediates: between the signature of the upstream and the commit, as
// everywhere, a crash leaves no key, no half authority, and an intermediate that nobody uses.
func TestCrashLoopBelowAnUpstream(t *testing.T) {
	dir := t.TempDir()
	if _, err := signettest.NewOrganisation(dir, "Example"); err != nil {
		t.Fatal(err)
	}
	t.Setenv(childCA, dir)
	crashLoop(t)
}

func crashLoop(t *testing.T) {
	t.Helper()
	for step, done := 1, false; !done; step++ {
		if step > 200 {
			t.Fatal("a child never finishes")
		}
		token, dir := keystores.SoftHSM(t), t.TempDir()
		for round := range 2 {
			out, err := runChild(t, dir, token.URI, step)
			if err == nil {
				done = done || round == 0 // a whole run has fewer steps than that
			} else if !killed(err) {
				t.Fatalf("killed at step %d: %v\n%s", step, err, out)
			}
		}
		out, err := runChild(t, dir, token.URI, 0)
		if err != nil {
			t.Fatalf("after kills at step %d: %v\n%s", step, err, out)
		}
		if n := token.Objects(t); n != 8 {
			t.Errorf("after kills at step %d the token holds %d objects, want the 8 of 4 key pairs", step, n)
		}
		if left := leftovers(t, dir); len(left) != 0 {
			t.Errorf("after kills at step %d the store still holds %q", step, left)
		}
		if done {
			t.Logf("%d steps were cut", step-1)
			if step < 20 {
				t.Errorf("only %d steps: the kills do not reach what they should", step-1)
			}
		}
	}
}

func killed(err error) bool {
	exit, ok := err.(*exec.ExitError)
	return ok && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
}

// leftovers returns the keys of records about making keys.
func leftovers(t *testing.T, dir string) []string {
	t.Helper()
	b, err := bolt.Open(bolt.Config{Dir: filepath.Join(dir, "store"), Reserve: 4096, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	var left []string
	if _, err := b.List(t.Context(), "", 0, func(item store.Item) error {
		if !strings.HasPrefix(item.Key, "authority/") {
			left = append(left, item.Key)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return left
}
