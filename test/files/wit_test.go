package files

import (
	"crypto/ecdsa"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/test/signettest"
)

// TestWIT keeps a WIT-SVID and its key in files through renewals and the end of the identity: each pair that is there fits,
// and the token verifies by the bundle of the Workload API.
func TestWIT(t *testing.T) {
	s := signettest.Start(t, signettest.Config{
		CA:    func(c *ca.Config) { c.WIT.Enabled, c.WIT.TTL = true, 8*time.Second },
		Agent: func(c *agent.Config) { c.WIT.Enabled, c.RegistrationWait = true, time.Millisecond },
	})
	identity(s, "web")
	bundles, err := workloadapi.FetchWITBundles(bounded(t), workloadapi.WithAddr(s.WorkloadAPI()))
	if err != nil {
		t.Fatal(err)
	}
	dir, told := under(t, "wit"), under(t, "told")
	h := fetch(t, s, "wit", "--id", "spiffe://example.org/web", "--write", dir, "--watch", "--remove-when-gone", "--exec", "touch "+told)
	seen := map[string]bool{}
	eventually(t, "three WIT-SVIDs", func() bool {
		set, err := filepath.EvalSymlinks(filepath.Join(dir, "..data")) // one set, whatever comes meanwhile
		if err != nil {
			return false
		}
		token, err := os.ReadFile(filepath.Join(set, "wit.jwt"))
		text, err2 := os.ReadFile(filepath.Join(set, "wit-key.jwk"))
		if err = errors.Join(err, err2); errors.Is(err, fs.ErrNotExist) {
			return false // replaced meanwhile
		} else if err != nil {
			t.Fatal(err)
		}
		svid, err := witsvid.ParseAndValidate(strings.TrimSpace(string(token)), bundles)
		if err != nil {
			t.Fatal(err)
		}
		var jwk jose.JSONWebKey
		if err := jwk.UnmarshalJSON(text); err != nil {
			t.Fatal(err)
		}
		if key, ok := jwk.Key.(*ecdsa.PrivateKey); !ok || !key.PublicKey.Equal(svid.PublicKey) || jwk.Algorithm != "ES256" {
			t.Fatalf("the key (%T, %s) does not fit the token", jwk.Key, jwk.Algorithm)
		}
		seen[svid.Marshal()] = true
		return len(seen) >= 3
	})
	for _, name := range []string{"wit.jwt", "wit-key.jwk"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s has mode %v, want 0600 (%v)", name, info.Mode(), err)
		}
	}
	if _, err := os.Stat(told); err != nil {
		t.Errorf("the program was not told: %v", err)
	}
	s.Delete("Identity", "web")
	h.says("the identity is gone, and the files with it")
	if _, err := os.Lstat(filepath.Join(dir, "wit-key.jwk")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the key is still there: %v", err)
	}
	h.stop()
	if said := h.out.String(); strings.Contains(said, "eyJ") || strings.Contains(said, `"d"`) {
		t.Error("the helper prints a secret")
	}
}

// TestWITIsOff says what to switch on.
func TestWITIsOff(t *testing.T) {
	s := start(t)
	identity(s, "web")
	for _, args := range [][]string{{"wit"}, {"wit", "--write", under(t, "wit"), "--watch"}} {
		h := fetch(t, s, args...)
		if code := h.ends(); code != 1 || strings.Count(h.out.String(), "wit.enabled") != 1 {
			t.Errorf("%q ends with status %d, want 1 and what to switch on, once", args, code)
		}
	}
}
