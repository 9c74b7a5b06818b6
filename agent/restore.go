package agent

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/agent/sealed"
	"github.com/signet-id/signet/agent/svidcache"
)

// SealedCache configures what the agent keeps on disk for a start without its CA.
type SealedCache struct {
	// Key is where the key of the cache is kept: file (default), in data_dir, which only the agent's user can read; keyring, the
	// kernel's memory, which survives a restart of the agent and not a reboot; tpm, sealed by the TPM, with a counter there
	// that tells when an older cache was put back.
	Key string `yaml:"key"`
	// TPMDevice is the TPM's device, or the Unix socket of a software TPM, with key: tpm. Default /dev/tpmrm0.
	TPMDevice string `yaml:"tpm_device"`
	// TPMNVIndex is the index of the counter in the TPM, with key: tpm; agents of one host need one each. Default 25710951 (0x1885167).
	TPMNVIndex uint32 `yaml:"tpm_nv_index"`
	// Disable keeps nothing: an agent that is started while the CA is away serves nothing until it is back.
	Disable bool `yaml:"disable"`
}

// check fills in defaults and tells each mistake by its field.
func (c *SealedCache) check(bad func(field, format string, args ...any)) {
	if c.Key == "" {
		c.Key = "file"
	}
	if c.key() == nil {
		bad("sealed_cache.key", "%q is not file, keyring or tpm", c.Key)
	}
	if c.Key != "tpm" {
		if c.TPMDevice != "" {
			bad("sealed_cache.tpm_device", "is for sealed_cache.key: tpm")
		}
		if c.TPMNVIndex != 0 {
			bad("sealed_cache.tpm_nv_index", "is for sealed_cache.key: tpm")
		}
		return
	}
	if c.TPMDevice == "" {
		c.TPMDevice = sealed.DefaultTPMDevice
	}
	if c.TPMNVIndex == 0 {
		c.TPMNVIndex = sealed.DefaultNVIndex
	}
	if !filepath.IsAbs(c.TPMDevice) {
		bad("sealed_cache.tpm_device", "%q must be absolute, such as %s", c.TPMDevice, sealed.DefaultTPMDevice)
	}
	if c.TPMNVIndex < sealed.FirstNVIndex || c.TPMNVIndex > sealed.LastNVIndex {
		bad("sealed_cache.tpm_nv_index", "%d is not one of the owner's, %d to %d", c.TPMNVIndex, sealed.FirstNVIndex, sealed.LastNVIndex)
	}
}

// key is what Key names, or nil.
func (c *SealedCache) key() sealed.Key {
	switch c.Key {
	case "file":
		return sealed.File{}
	case "keyring":
		return sealed.Keyring{}
	case "tpm":
		return sealed.TPM{Device: c.TPMDevice, NVIndex: c.TPMNVIndex}
	}
	return nil
}

// openCache opens the sealed cache and returns what an earlier run of this agent left there, or nil.
func (a *Agent) openCache() *sealed.Contents {
	c := a.config
	if c.SealedCache.Disable {
		return nil
	}
	var contents *sealed.Contents
	a.sealed, contents = sealed.Open(context.Background(), sealed.Config{
		Dir: c.DataDir, TrustDomain: c.trustDomain(), Agent: a.node.id(), Key: c.SealedCache.key(), MaxOffline: c.MaxOffline, Log: a.log, Now: c.Now,
	})
	a.node.own = a.sealed.Own
	return contents
}

// restore has the SVID cache serve what was found.
func (a *Agent) restore(found *sealed.Contents) error {
	kept := svidcache.Kept{State: found.State, Contact: found.Contact, Seen: found.Seen, MaxOffline: a.config.MaxOffline}
	for _, s := range found.SVIDs {
		kept.SVIDs = append(kept.SVIDs, svidcache.KeptSVID(s))
	}
	if err := a.cache.Restore(kept); err != nil {
		return fmt.Errorf("what the sealed cache holds cannot be used: %w", err)
	}
	return nil
}

// heldAs is who the agent was when it received what was found, if the CA can go on from there.
func (a *Agent) heldAs(found *sealed.Contents) spiffeid.ID {
	if found == nil || !found.Continues {
		return spiffeid.ID{}
	}
	return a.node.id()
}
