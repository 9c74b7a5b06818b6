// Package upstream has the drivers for the CA above this one: a key and certificate on disk, a Vault or OpenBao server, a
// SPIRE or signet server. Each has a certificate request signed and says which roots there are; the CA on top calls them,
// and package authority judges whatever they bring. A driver knows nothing of authorities and keeps none of their keys.
//
// What a driver reads from others is bounded in bytes and certificates before it is parsed. Errors say what was asked of
// whom and never hold a token or key.
package upstream

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"time"
)

// Limits of what is read from an upstream.
const (
	// maxPEMBytes bounds a PEM file, and PEM in an answer.
	maxPEMBytes = 256 << 10

	// maxCertificates is the most certificates in one PEM file or answer.
	maxCertificates = 32

	// maxCertificateBytes bounds one certificate in DER.
	maxCertificateBytes = 16 << 10
)

// A JWTKey is a JWT authority of the trust domain.
type JWTKey struct {
	KeyID     string
	PublicKey []byte // SPKI in DER
	ExpiresAt time.Time
	Tainted   bool
}

// ParseCertificates reads a PEM text that holds certificates and nothing else: one at least. what names it in errors, which
// never repeat what it holds, since it may be a key by mistake.
func ParseCertificates(text []byte, what string) ([]*x509.Certificate, error) {
	if len(text) > maxPEMBytes {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", what, len(text), maxPEMBytes)
	}
	var out []*x509.Certificate
	for rest := text; ; {
		block, after := pem.Decode(rest)
		if block == nil {
			if len(out) == 0 {
				return nil, fmt.Errorf("%s holds no PEM certificate (-----BEGIN CERTIFICATE-----)", what)
			}
			if bytes.Contains(rest, []byte("-----BEGIN")) {
				return nil, fmt.Errorf("%s: what follows certificate %d is malformed PEM", what, len(out))
			}
			return out, nil
		}
		rest = after
		switch {
		case block.Type != "CERTIFICATE":
			return nil, fmt.Errorf("%s holds a PEM block of another kind than CERTIFICATE; a private key belongs into a file of its own", what)
		case len(out) == maxCertificates:
			return nil, fmt.Errorf("%s holds more than %d certificates", what, maxCertificates)
		}
		cert, err := parseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: certificate %d: %w", what, len(out)+1, err)
		}
		out = append(out, cert)
	}
}

func parseCertificate(der []byte) (*x509.Certificate, error) {
	if len(der) > maxCertificateBytes {
		return nil, fmt.Errorf("it has %d bytes, more than %d", len(der), maxCertificateBytes)
	}
	return x509.ParseCertificate(der)
}

// parseDER reads certificates of an answer in DER.
func parseDER(list [][]byte, what string) ([]*x509.Certificate, error) {
	if len(list) > maxCertificates {
		return nil, fmt.Errorf("%s has %d certificates, more than %d", what, len(list), maxCertificates)
	}
	var out []*x509.Certificate
	for i, der := range list {
		cert, err := parseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%s: certificate %d: %w", what, i+1, err)
		}
		out = append(out, cert)
	}
	return out, nil
}

// readFile reads a file of at most most bytes.
func readFile(path string, most int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, int64(most)+1))
	if err != nil {
		return nil, err
	}
	if len(data) > most {
		return nil, fmt.Errorf("%s has more than %d bytes", path, most)
	}
	return data, nil
}

// readSecret reads a file that others must not be able to read.
func readSecret(path string, most int) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o007 != 0 {
		return nil, fmt.Errorf("%s has mode %04o, so that everybody can use it; chmod it to 0600", path, info.Mode().Perm())
	}
	return readFile(path, most)
}

// errTemporary is in the chain of errors after which the same call may succeed.
var errTemporary = errors.New("temporary")

const (
	attempts   = 3
	firstPause = 500 * time.Millisecond
	lastPause  = 5 * time.Second
)

// retry calls f until it succeeds, fails for good, or has failed often enough; the pauses grow, are spread, and have a cap.
// The CA on top comes back later in any case.
func retry[T any](ctx context.Context, f func() (T, error)) (T, error) {
	pause := firstPause
	for i := 1; ; i++ {
		v, err := f()
		if err == nil || i == attempts || !errors.Is(err, errTemporary) {
			return v, err
		}
		t := time.NewTimer(pause/2 + rand.N(pause))
		select {
		case <-ctx.Done():
			t.Stop()
			return v, fmt.Errorf("%w (gave up: %w)", err, ctx.Err())
		case <-t.C:
		}
		pause = min(2*pause, lastPause)
	}
}
