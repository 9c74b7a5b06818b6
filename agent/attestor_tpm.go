package agent

import (
	"path/filepath"

	"github.com/signet-id/signet/agent/nodeattest"
	"github.com/signet-id/signet/agent/nodeattest/tpm"
)

// TPM configures the node attestor tpm. The TPM's owner hierarchy must have no password.
type TPM struct {
	// Device is the TPM's device, or the Unix socket of a software TPM. Default /dev/tpmrm0.
	Device string `yaml:"device"`

	dir string // for the attestation key
}

func (c *TPM) check(bad func(field, format string, args ...any)) {
	if c.Device == "" {
		c.Device = tpm.DefaultDevice
	}
	if !filepath.IsAbs(c.Device) {
		bad("device", "%q must be absolute, such as %s", c.Device, tpm.DefaultDevice)
	}
}

func (c *TPM) open() (nodeattest.Attestor, error) {
	return tpm.Attestor{Device: c.Device, Dir: c.dir}, nil
}
