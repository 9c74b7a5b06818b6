package ca

import (
	"context"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/signet-id/signet/ca/nodeattest"
	"github.com/signet-id/signet/ca/nodeattest/tpm"
)

// TPM configures the node attestor tpm. A TPM is good if one of the three says so.
type TPM struct {
	// Hashes are the TPMs that are known: the SHA-256 of each one's endorsement key (PKIX DER), 64 lower-case hex digits. The
	// refusal that an unknown node's agent logs names it.
	Hashes []string `yaml:"hashes"`
	// HashPath is a folder with a file for each known TPM, named by that hash; what is in the file does not matter. It is
	// looked at for each attestation.
	HashPath string `yaml:"hash_path"`
	// CABundlePaths are files of PEM certificates: the CAs of TPM manufacturers, with their intermediates. A TPM whose
	// endorsement key one of them has certified is good, whosever it is. Files are read again when they change.
	CABundlePaths []string `yaml:"ca_bundle_paths"`
}

func (c *TPM) check(bad func(field, format string, args ...any)) {
	if len(c.Hashes) == 0 && c.HashPath == "" && len(c.CABundlePaths) == 0 {
		bad("hashes", "missing; name known TPMs in hashes or hash_path, or CAs of manufacturers in ca_bundle_paths")
	}
	for i, h := range c.Hashes {
		if !isPubHash(h) {
			bad(fmt.Sprintf("hashes[%d]", i), "%q is not a SHA-256 of 64 lower-case hex digits", h)
		}
	}
	if c.HashPath != "" && !filepath.IsAbs(c.HashPath) {
		bad("hash_path", "%q must be absolute", c.HashPath)
	}
	checkPaths("ca_bundle_paths", c.CABundlePaths, bad)
}

func isPubHash(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == 32 && hex.EncodeToString(b) == s
}

func (c *TPM) open(_ context.Context, e attestorEnv) (nodeattest.Attestor, error) {
	config := tpm.Config{Now: e.now}
	if c.HashPath != "" {
		if info, err := os.Stat(c.HashPath); err != nil {
			return nil, fmt.Errorf("hash_path: %w", err)
		} else if !info.IsDir() {
			return nil, fmt.Errorf("hash_path: %s is not a folder", c.HashPath)
		}
	}
	if len(c.Hashes) > 0 || c.HashPath != "" {
		config.Known = c.known
	}
	if len(c.CABundlePaths) > 0 {
		files, err := nodeattest.NewRootFiles(c.CABundlePaths, e.log)
		if err != nil {
			return nil, fmt.Errorf("ca_bundle_paths: %w", err)
		}
		config.Roots = files.Pool
	}
	return tpm.New(config)
}

// known looks for a hash that the attestor has computed, so that it is a name and no path.
func (c *TPM) known(hash string) bool {
	if slices.Contains(c.Hashes, hash) {
		return true
	}
	if c.HashPath == "" || !isPubHash(hash) {
		return false
	}
	info, err := os.Stat(filepath.Join(c.HashPath, hash))
	return err == nil && info.Mode().IsRegular()
}
