// Package tpm proves what this node is by its TPM 2.0: the TPM opens a credential that the CA has made for its endorsement
// key (EK) and for an attestation key (AK) that the TPM made, and that is all the CA learns. Nothing leaves the TPM but
// public keys. It keeps the AK, which only that TPM can load, in a folder of the agent's data directory.
package tpm

import (
	"context"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"go.step.sm/crypto/tpm"
	"go.step.sm/crypto/tpm/storage"

	"github.com/signet-id/signet/agent/nodeattest"
	"github.com/signet-id/signet/internal/durable"
	"github.com/signet-id/signet/internal/tpmdevice"
	wire "github.com/signet-id/signet/internal/tpmwire"
)

// DefaultDevice is the kernel's resource manager for the first TPM.
const DefaultDevice = "/dev/tpmrm0"

// akName is the name of the AK in the folder.
const akName = "signet"

// An Attestor proves that this node holds its TPM.
type Attestor struct {
	// Device is the TPM's device, or a Unix socket of a software TPM. Empty means DefaultDevice.
	Device string
	// Dir is a folder for the AK, which the Attestor makes and nobody else uses.
	Dir string
}

// Type is the attestor's name at the CA.
func (Attestor) Type() string { return wire.Attestor }

// Begin reads the EK, and makes an AK if there is none that the TPM can load. The first time this takes a hardware TPM some
// seconds, and it makes the EK and the storage root key persistent at their usual handles if they are not.
func (a Attestor) Begin(ctx context.Context) (nodeattest.Evidence, error) {
	device := a.Device
	if device == "" {
		device = DefaultDevice
	}
	if err := durable.MkdirPrivate(a.Dir); err != nil {
		return nil, fmt.Errorf("tpm: %w", err)
	}
	e := &evidence{channel: tpmdevice.New(ctx, device)}
	err := e.open(ctx, a.Dir)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("tpm.device %s: %w", device, err), e.Close())
	}
	return e, nil
}

type evidence struct {
	channel *tpmdevice.Channel
	ak      *tpm.AK
	payload []byte
}

func (e *evidence) open(ctx context.Context, dir string) error {
	if err := e.channel.Connect(); err != nil { // the library would not say that it is not there
		return err
	}
	device, err := tpm.New(tpm.WithCommandChannel(e.channel), tpm.WithStore(storage.NewDirstore(dir, storage.WithCacheSize(0))), tpm.WithDisableDownload())
	if err != nil {
		return err
	}
	eks, err := device.GetEKs(ctx)
	if err != nil {
		return fmt.Errorf("reading the endorsement key: %w", err)
	}
	var ek *tpm.EK
	for _, k := range eks {
		if _, ok := k.Public().(*rsa.PublicKey); ok { // the credential is opened with the RSA EK
			ek = k
			break
		}
	}
	if ek == nil {
		return errors.New("the TPM has no RSA endorsement key")
	}
	pem, err := wire.EncodeEK(ek.Public(), ek.Certificate())
	if err != nil {
		return fmt.Errorf("the endorsement key: %w", err)
	}
	params, err := e.attestationKey(ctx, device, dir)
	if err != nil {
		return err
	}
	e.payload, err = json.Marshal(wire.Payload{EK: pem, AK: params})
	return err
}

// attestationKey loads the AK. One that the TPM does not know any more, as after it was cleared or replaced, is made anew.
func (e *evidence) attestationKey(ctx context.Context, device *tpm.TPM, dir string) (*wire.AK, error) {
	ak, err := device.GetAK(ctx, akName)
	if err == nil {
		if params, err := parameters(ctx, ak); err == nil {
			e.ak = ak
			return params, nil
		}
	}
	if err := clean(dir); err != nil {
		return nil, err
	}
	if ak, err = device.CreateAK(ctx, akName); err != nil {
		return nil, fmt.Errorf("making an attestation key: %w", err)
	}
	params, err := parameters(ctx, ak)
	if err != nil {
		return nil, err
	}
	e.ak = ak
	return params, nil
}

func parameters(ctx context.Context, ak *tpm.AK) (*wire.AK, error) {
	p, err := ak.AttestationParameters(ctx)
	if err != nil {
		return nil, fmt.Errorf("loading the attestation key: %w", err)
	}
	return &wire.AK{Public: p.Public, CreateData: p.CreateData, CreateAttestation: p.CreateAttestation, CreateSignature: p.CreateSignature}, nil
}

// clean empties the folder. What is in it can be made again.
func clean(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, f := range entries {
		if err := os.RemoveAll(filepath.Join(dir, f.Name())); err != nil {
			return err
		}
	}
	return nil
}

// Type is the attestor's name at the CA.
func (*evidence) Type() string { return wire.Attestor }

// Payload shows the EK and the AK.
func (e *evidence) Payload(context.Context) ([]byte, error) { return e.payload, nil }

// Respond has the TPM open the credential. It does so only if the credential was made for its EK and this AK.
func (e *evidence) Respond(ctx context.Context, challenge []byte) ([]byte, error) {
	if len(challenge) > nodeattest.MaxChallengeBytes {
		return nil, fmt.Errorf("the challenge has %d bytes, more than the %d allowed", len(challenge), nodeattest.MaxChallengeBytes)
	}
	c, err := wire.ParseChallenge(challenge)
	if err != nil {
		return nil, err
	}
	secret, err := e.ak.ActivateCredential(ctx, tpm.EncryptedCredential{Credential: c.Credential, Secret: c.Secret})
	if err != nil {
		return nil, fmt.Errorf("the TPM does not open the CA's challenge: %w", err)
	}
	return json.Marshal(wire.Response{Secret: secret})
}

// Close lets go of the TPM.
func (e *evidence) Close() error { return e.channel.Release() }
