// Package keys keeps the private keys of a trust domain's authorities: it makes them, seals them for the store, opens them
// again, and signs with them. The authority package calls it. Private key bytes never leave this package in clear: what
// goes out is a Key, which is a crypto.Signer, or a Stored, whose private part is encrypted under the seal key.
package keys

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// SealKeyBytes is the size of a seal key, in bytes.
const SealKeyBytes = 32

// credentialsDirectory is the variable in which systemd names the directory of a unit's credentials.
const credentialsDirectory = "CREDENTIALS_DIRECTORY"

// A SealKey encrypts the private keys of authorities before they are stored. It prints as its key id with every verb, so
// that the secret cannot reach a log by accident. Its methods may be called concurrently.
type SealKey struct {
	aead   cipher.AEAD
	id     [sealKeyIDBytes]byte
	origin string
}

// CreateSealKey makes a new random seal key, writes it to the file path with mode 0600 and returns it. The file appears
// whole or not at all, and an existing file is never replaced: that is an error for which errors.Is(err, fs.ErrExist)
// holds.
func CreateSealKey(path string) (*SealKey, error) {
	secret := make([]byte, SealKeyBytes)
	defer clear(secret)
	rand.Read(secret)
	if err := writeNew(path, secret); err != nil {
		return nil, fmt.Errorf("creating seal key %s: %w", path, err)
	}
	return newSealKey(secret, path)
}

// LoadSealKey reads a seal key from a file of exactly SealKeyBytes bytes. It refuses a file that the group or others may
// read or write, because who reads it and the store holds the keys of the trust domain.
func LoadSealKey(path string) (*SealKey, error) {
	return readSealKey(path, 0o077)
}

// LoadOrCreateSealKey reads the seal key in the file path, and makes it if the file does not exist. Of several processes
// that do so at once, one makes the key and the others read it.
func LoadOrCreateSealKey(path string) (*SealKey, error) {
	key, err := LoadSealKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	key, err = CreateSealKey(path)
	if errors.Is(err, fs.ErrExist) {
		return LoadSealKey(path)
	}
	return key, err
}

// LoadSystemdCredential reads the seal key from the systemd credential name, a file in the directory that systemd names in
// $CREDENTIALS_DIRECTORY (LoadCredential= or LoadCredentialEncrypted= in the unit). Group bits are not judged there:
// systemd grants the service's user access through an ACL, which shows in them.
func LoadSystemdCredential(name string) (*SealKey, error) {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return nil, fmt.Errorf("systemd_credential %q is not a credential name; give the bare name from LoadCredential= in the unit", name)
	}
	dir := os.Getenv(credentialsDirectory)
	if !filepath.IsAbs(dir) {
		return nil, fmt.Errorf("systemd_credential %q: %s is not set; start the CA as a systemd unit with LoadCredentialEncrypted=%s:FILE, or use key_file", name, credentialsDirectory, name)
	}
	return readSealKey(filepath.Join(dir, name), 0o007)
}

// ID returns the key id in lower-case hexadecimal. It is derived from the secret, tells nothing about it, and is the same
// wherever the key is loaded.
func (k *SealKey) ID() string { return hex.EncodeToString(k.id[:]) }

// Format writes the key id, whatever the verb.
func (k *SealKey) Format(f fmt.State, _ rune) {
	if k == nil {
		io.WriteString(f, "[no seal key]")
		return
	}
	io.WriteString(f, "[seal key "+k.ID()+"]")
}

// newSealKey derives the encryption key and the key id from the secret. They are derived apart, so that the id in clear
// says nothing about the key.
func newSealKey(secret []byte, origin string) (*SealKey, error) {
	if len(secret) != SealKeyBytes {
		return nil, fmt.Errorf("seal key %s holds %d bytes; it must hold exactly %d random bytes", origin, len(secret), SealKeyBytes)
	}
	encryption, err := hkdf.Expand(sha256.New, secret, sealUse+" encryption", 32)
	if err != nil {
		return nil, err
	}
	defer clear(encryption)
	id, err := hkdf.Expand(sha256.New, secret, sealUse+" key id", sealKeyIDBytes)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(encryption)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	return &SealKey{aead: aead, id: [sealKeyIDBytes]byte(id), origin: origin}, nil
}

// readSealKey reads a seal key from a regular file that has none of the permission bits in forbidden. The permissions are
// those of the opened file, so that it cannot be exchanged between the look and the read.
func readSealKey(path string, forbidden fs.FileMode) (*SealKey, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("opening seal key: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("opening seal key: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("seal key %s is not a regular file", path)
	}
	if mode := info.Mode().Perm(); mode&forbidden != 0 {
		return nil, fmt.Errorf("seal key %s has mode %04o, so that users other than its owner can reach it; run chmod 600 on it", path, mode)
	}
	if info.Size() != SealKeyBytes {
		return nil, fmt.Errorf("seal key %s holds %d bytes; it must hold exactly %d random bytes", path, info.Size(), SealKeyBytes)
	}
	secret := make([]byte, SealKeyBytes)
	defer clear(secret)
	if _, err := io.ReadFull(f, secret); err != nil {
		return nil, fmt.Errorf("reading seal key %s: %w", path, err)
	}
	return newSealKey(secret, path)
}

// writeNew writes a secret to a new file and makes it durable. The file is linked into place when its content is on disk:
// a link, unlike a rename, fails when the name exists.
func writeNew(path string, content []byte) error {
	dir := filepath.Dir(path)
	temp, err := os.CreateTemp(dir, ".seal-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name())
	defer temp.Close()
	if _, err := temp.Write(content); err != nil {
		return err
	}
	if err := temp.Sync(); err != nil {
		return err
	}
	if err := os.Link(temp.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
