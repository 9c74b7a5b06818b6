package keys

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
)

const maxKeyFileBytes = 64 << 10

// LoadKeyFile returns the private key that an operator put into a file: unencrypted PEM, in a regular file that only its
// owner can reach. It is not one of the trust domain's, but that of a CA above, which is kept no less. Errors say nothing of
// what was read.
func LoadKeyFile(path string) (*Key, error) {
	text, err := readPrivate(path, maxKeyFileBytes)
	if err != nil {
		return nil, err
	}
	defer clear(text)
	signer, err := parseKey(text)
	if err != nil {
		return nil, fmt.Errorf("%s %w", path, err)
	}
	return &Key{signer: signer}, nil
}

// parseKey reads a private key in PEM.
func parseKey(text []byte) (crypto.Signer, error) {
	block, rest := pem.Decode(text)
	if block == nil {
		return nil, errors.New("holds no PEM private key")
	}
	defer clear(block.Bytes)
	for block.Type == "EC PARAMETERS" { // openssl ecparam -genkey puts them in front
		if block, rest = pem.Decode(rest); block == nil {
			return nil, errors.New("holds no PEM private key")
		}
		defer clear(block.Bytes)
	}
	var key any
	var err error
	switch {
	case block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["DEK-Info"] != "":
		return nil, errors.New("holds an encrypted key; decrypt it, or use a key store (kms)")
	case block.Type == "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case block.Type == "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case block.Type == "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	default:
		return nil, errors.New("holds no PEM private key (PRIVATE KEY, EC PRIVATE KEY or RSA PRIVATE KEY)")
	}
	if err != nil {
		// The parser's text is left out: it speaks about the bytes of a private key.
		return nil, errors.New("holds a malformed private key")
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("holds a %T, which cannot sign", key)
	}
	return signer, nil
}

// readPrivate reads at most most bytes of a regular file that only its owner can reach. The permissions are those of the
// opened file, so that it cannot be exchanged between the look and the read.
func readPrivate(path string, most int) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe that nobody writes to must not hold anybody up
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	// systemd grants a unit's user its credentials through an ACL, which shows in the bits of the group.
	forbidden := os.FileMode(0o077)
	if dir := os.Getenv(credentialsDirectory); dir != "" && filepath.Dir(path) == filepath.Clean(dir) {
		forbidden = 0o007
	}
	switch mode := info.Mode().Perm(); {
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file", path)
	case mode&forbidden != 0:
		return nil, fmt.Errorf("%s has mode %04o, so that users other than its owner can reach it; run chmod 600 on it", path, mode)
	}
	content, err := io.ReadAll(io.LimitReader(f, int64(most)+1))
	if err != nil {
		clear(content)
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	if len(content) > most {
		clear(content)
		return nil, fmt.Errorf("%s holds more than %d bytes", path, most)
	}
	return content, nil
}
