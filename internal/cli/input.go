package cli

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/internal/durable"
	"github.com/signet-id/signet/spiffe"
)

// Bounds of what commands read, in bytes.
const (
	maxSVIDFile   = 1 << 20
	maxBundleFile = 4 << 20
	maxDocuments  = 16 << 20
)

// readInput reads a file, or stdin for "-", of at most max bytes.
func (a *app) readInput(name string, max int64) ([]byte, error) {
	if name != "-" {
		return durable.ReadFile(name, max)
	}
	data, err := io.ReadAll(io.LimitReader(a.stdin, max+1))
	if err != nil {
		return nil, fmt.Errorf("reading stdin: %w", err)
	}
	if int64(len(data)) > max {
		return nil, fmt.Errorf("stdin has more than the %d bytes that this command reads", max)
	}
	return data, nil
}

// inputName is how messages call an input.
func inputName(name string) string {
	if name == "-" {
		return "stdin"
	}
	return name
}

// parseCertificates reads the certificates of PEM, skipping other blocks, or of DER that are simply one after another.
// It tells whether a private key was among the blocks.
func parseCertificates(data []byte) (certs []*x509.Certificate, hasKey bool, err error) {
	if !bytes.Contains(data, []byte("-----BEGIN ")) {
		if certs, err = x509.ParseCertificates(data); err == nil && len(certs) == 0 {
			err = errors.New("there is nothing in it")
		}
		return certs, false, err
	}
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		switch {
		case block.Type == "CERTIFICATE":
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, hasKey, fmt.Errorf("certificate %d: %w", len(certs)+1, err)
			}
			certs = append(certs, cert)
		case bytes.HasSuffix([]byte(block.Type), []byte("PRIVATE KEY")):
			hasKey = true
		}
	}
	if len(certs) == 0 {
		return nil, hasKey, fmt.Errorf("no CERTIFICATE block in the PEM text")
	}
	return certs, hasKey, nil
}

// readBundle reads a bundle that is a SPIFFE bundle document or PEM; as overrides what it looks like.
func (a *app) readBundle(td spiffeid.TrustDomain, name string, data []byte, as string) (*spiffebundle.Bundle, error) {
	if as == "" {
		as = "spiffe"
		if bytes.Contains(data, []byte("-----BEGIN ")) {
			as = "pem"
		}
	}
	if as == "pem" {
		certs, _, err := parseCertificates(data)
		if err != nil {
			return nil, fmt.Errorf("reading the bundle in %q: %w", inputName(name), err)
		}
		return spiffebundle.FromX509Authorities(td, certs), nil
	}
	bundle, skipped, err := spiffe.ParseBundle(td, data)
	if err != nil {
		return nil, fmt.Errorf("reading the bundle in %q: %w", inputName(name), err)
	}
	for _, err := range skipped {
		a.note("leaving out an element of %q: %v", inputName(name), err)
	}
	return bundle, nil
}

// keyName names a public key for people: "EC P-256", "RSA 2048", "Ed25519".
func keyName(pub crypto.PublicKey) string {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		return "EC " + k.Curve.Params().Name
	case *rsa.PublicKey:
		return fmt.Sprintf("RSA %d", k.N.BitLen())
	case ed25519.PublicKey:
		return "Ed25519"
	}
	return fmt.Sprintf("%T", pub)
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K {
	return slices.Sorted(maps.Keys(m))
}

// writeText writes a document to stdout, ending it with a newline.
func (a *app) writeText(text []byte) error {
	if !bytes.HasSuffix(text, []byte("\n")) {
		text = append(text, '\n')
	}
	_, err := a.stdout.Write(text)
	return err
}
