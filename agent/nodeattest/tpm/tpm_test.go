package tpm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/signet-id/signet/agent/nodeattest"
	"github.com/signet-id/signet/internal/tpmdevice"
	wire "github.com/signet-id/signet/internal/tpmwire"
	"github.com/signet-id/signet/test/keystores"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func begin(t *testing.T, a Attestor) (nodeattest.Evidence, *wire.Payload) {
	t.Helper()
	e, err := a.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.(*evidence).Close() })
	data, err := e.Payload(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p, err := wire.ParsePayload(data)
	if err != nil {
		t.Fatal(err)
	}
	return e, p
}

func TestEvidenceOfARealTPM(t *testing.T) {
	sw := keystores.CertifiedSWTPM(t)
	a := Attestor{Device: sw.Socket, Dir: filepath.Join(t.TempDir(), "tpm")}
	e, first := begin(t, a)
	ek, certificate, err := wire.ParseEK(first.EK)
	if err != nil || ek == nil || certificate == nil {
		t.Fatalf("EK %v, certificate %v, %v", ek, certificate, err)
	}
	for name, challenge := range map[string][]byte{
		"garbage": []byte("garbage"), "empty": []byte(`{"EC":null}`), "huge": bytes.Repeat([]byte("x"), nodeattest.MaxChallengeBytes+1),
		"of another TPM": []byte(`{"EC":{"Credential":"AAAA","Secret":"AAAA"}}`),
	} {
		if answer, err := e.Respond(t.Context(), challenge); err == nil {
			t.Errorf("a challenge that is %s was answered with %q", name, answer)
		}
	}
	if err := e.(*evidence).Close(); err != nil {
		t.Fatal(err)
	}
	// The same TPM shows the same keys, also after its restart.
	sw.Stop(t)
	sw.Start(t)
	if _, again := begin(t, a); !bytes.Equal(again.EK, first.EK) || !bytes.Equal(again.AK.Public, first.AK.Public) {
		t.Error("the TPM shows other keys the second time")
	}
	// What is kept for it is of no use with another one, which gets an AK of its own.
	other := keystores.SWTPM(t)
	if _, p := begin(t, Attestor{Device: other.Socket, Dir: a.Dir}); bytes.Equal(p.AK.Public, first.AK.Public) || bytes.Equal(p.EK, first.EK) {
		t.Error("another TPM shows the keys of the first")
	}
	// A broken file is made anew.
	files, err := filepath.Glob(filepath.Join(a.Dir, "*"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		if err := os.WriteFile(f, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	begin(t, Attestor{Device: other.Socket, Dir: a.Dir})
}

func TestNoTPM(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, device := range []string{filepath.Join(dir, "none"), file, dir} {
		_, err := Attestor{Device: device, Dir: filepath.Join(dir, "tpm")}.Begin(t.Context())
		if err == nil || !bytes.Contains([]byte(err.Error()), []byte("tpm.device "+device)) {
			t.Errorf("device %s: %v", device, err)
		}
	}
	if _, err := (Attestor{Device: "/dev/null", Dir: filepath.Join(dir, "tpm")}).Begin(t.Context()); err == nil {
		t.Error("/dev/null was taken for a TPM")
	}
}

// TestTPMThatHangs: a TPM that says nothing, or nonsense, holds the agent no longer than the attestation may take.
func TestTPMThatHangs(t *testing.T) {
	for name, answer := range map[string][]byte{
		"silence":             nil,
		"nonsense":            []byte("nonsense that is longer than a header"),
		"half a header":       {0x80, 0x01, 0, 0},
		"an endless response": {0x80, 0x01, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0},
		"an empty response":   {0x80, 0x01, 0, 0, 0, 0, 0, 0, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "tpm")
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			l, err := net.Listen("unix", filepath.Join(dir, "s"))
			if err != nil {
				t.Fatal(err)
			}
			asked := make(chan struct{})
			done := make(chan struct{})
			go func() {
				defer close(done)
				for first := true; ; first = false {
					c, err := l.Accept()
					if err != nil {
						return
					}
					defer c.Close()
					if first {
						go func() {
							defer close(asked)
							c.Read(make([]byte, 1000))
							c.Write(answer)
						}()
					}
				}
			}()
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				<-asked
				cancel()
			}()
			if _, err := (Attestor{Device: l.Addr().String(), Dir: filepath.Join(dir, "tpm")}).Begin(ctx); err == nil {
				t.Error("it was taken for a TPM")
			}
			cancel()
			l.Close()
			<-done
		})
	}
}

func TestRespondNeedsTheEvidence(t *testing.T) {
	e := &evidence{channel: tpmdevice.New(t.Context(), "/nowhere")}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := e.channel.Write([]byte("x")); !errors.Is(err, tpmdevice.ErrGivenUp) {
		t.Errorf("a command after the end: %v", err)
	}
}

func FuzzChallenge(f *testing.F) {
	good, err := json.Marshal(wire.Challenge{EC: &wire.Credential{Credential: []byte{1}, Secret: []byte{2}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"EC":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := wire.ParseChallenge(data)
		if err != nil {
			return
		}
		again, err := json.Marshal(wire.Challenge{EC: c})
		if err != nil {
			t.Fatal(err)
		}
		if back, err := wire.ParseChallenge(again); err != nil || !bytes.Equal(back.Credential, c.Credential) || !bytes.Equal(back.Secret, c.Secret) {
			t.Errorf("%q is not stable: %v", data, err)
		}
	})
}
