package sealed

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/signet-id/signet/internal/durable"
	"github.com/signet-id/signet/internal/tpmdevice"
)

const (
	// DefaultTPMDevice is the kernel's resource manager for the first TPM.
	DefaultTPMDevice = "/dev/tpmrm0"
	// DefaultNVIndex is where the counter is; FirstNVIndex to LastNVIndex are those that belong to the TPM's owner.
	DefaultNVIndex = 0x01885167
	FirstNVIndex   = 0x01800000
	LastNVIndex    = 0x01bfffff

	tpmFile        = "cache.tpm"
	maxTPMBytes    = 16 << 10
	tpmFileVersion = 1
	nonceBytes     = 16
	counterBytes   = 8
)

// A TPM is a key that a TPM 2.0 has sealed: only that TPM opens it, so that a disk without its machine holds nothing. A counter
// in the TPM tells when an older cache was put back. The TPM's owner hierarchy must have no password.
type TPM struct {
	// Device is the TPM's device, or a Unix socket of a software TPM.
	Device string
	// NVIndex is where the counter is. It is made if it is not there.
	NVIndex uint32
}

func (TPM) kind() string { return "tpm" }

// A tpmKey is the file with the sealed key.
type tpmKey struct {
	Version int    `json:"v"`
	Public  []byte `json:"public"`  // TPM2B_PUBLIC
	Private []byte `json:"private"` // TPM2B_PRIVATE
}

// errNotThisTPM means that a sealed key is of another TPM, or of this one before it was cleared.
var errNotThisTPM = errors.New("the TPM does not know its key")

func (k TPM) open(ctx context.Context, dir string) (holder, bool, error) {
	h := &tpmHolder{TPM: k}
	made := false
	err := h.with(ctx, func(t transport.TPM) error {
		if err := h.ensureCounter(t); err != nil {
			return err
		}
		srk, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(t)
		if err != nil {
			return fmt.Errorf("its storage root key: %w", err)
		}
		defer tpm2.FlushContext{FlushHandle: srk.ObjectHandle}.Execute(t) // the kernel's resource manager would, too
		path := filepath.Join(dir, tpmFile)
		data, err := durable.ReadSecret(path, maxTPMBytes)
		switch {
		case err == nil:
			if h.s, err = unseal(t, srk, data); !errors.Is(err, errNotThisTPM) {
				return err
			}
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
		made, h.s = true, newSecret()
		if data, err = seal(t, srk, h.s); err != nil {
			return err
		}
		return durable.WriteFile(path, data, 0o600)
	})
	if err != nil {
		return nil, false, fmt.Errorf("TPM %s: %w", k.Device, err)
	}
	return h, made, nil
}

// encrypted is an authorization without a password whose parameters nobody on the bus to the TPM can read.
func encrypted(srk *tpm2.CreatePrimaryResponse, how tpm2.AuthOption) (tpm2.Session, error) {
	public, err := srk.OutPublic.Contents()
	if err != nil {
		return nil, err
	}
	return tpm2.HMAC(tpm2.TPMAlgSHA256, nonceBytes, how, tpm2.Salted(srk.ObjectHandle, *public)), nil
}

// seal has the TPM seal a secret and returns the file.
func seal(t transport.TPM, srk *tpm2.CreatePrimaryResponse, s *secret) ([]byte, error) {
	session, err := encrypted(srk, tpm2.AESEncryption(128, tpm2.EncryptIn))
	if err != nil {
		return nil, err
	}
	created, err := tpm2.Create{
		ParentHandle: tpm2.AuthHandle{Handle: srk.ObjectHandle, Name: srk.Name, Auth: session},
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: s.b[:]}),
		}},
		InPublic: tpm2.New2B(tpm2.TPMTPublic{
			Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, UserWithAuth: true, NoDA: true},
		}),
	}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("sealing the key: %w", err)
	}
	return json.Marshal(tpmKey{Version: tpmFileVersion, Public: tpm2.Marshal(created.OutPublic), Private: tpm2.Marshal(created.OutPrivate)})
}

// parseTPMKey reads the file.
func parseTPMKey(data []byte) (*tpm2.TPM2BPublic, *tpm2.TPM2BPrivate, error) {
	var f tpmKey
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, nil, fmt.Errorf("%w: %s is not the JSON that the agent writes", errNotThisTPM, tpmFile)
	}
	if f.Version != tpmFileVersion {
		return nil, nil, fmt.Errorf("%s has version %d, this agent reads %d", tpmFile, f.Version, tpmFileVersion)
	}
	public, err := tpm2.Unmarshal[tpm2.TPM2BPublic](f.Public)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", errNotThisTPM, err)
	}
	private, err := tpm2.Unmarshal[tpm2.TPM2BPrivate](f.Private)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", errNotThisTPM, err)
	}
	return public, private, nil
}

// unseal has the TPM open what seal returned.
func unseal(t transport.TPM, srk *tpm2.CreatePrimaryResponse, data []byte) (*secret, error) {
	public, private, err := parseTPMKey(data)
	if err != nil {
		return nil, err
	}
	loaded, err := tpm2.Load{
		ParentHandle: tpm2.AuthHandle{Handle: srk.ObjectHandle, Name: srk.Name, Auth: tpm2.PasswordAuth(nil)},
		InPrivate:    *private, InPublic: *public,
	}.Execute(t)
	switch {
	case errors.Is(err, tpm2.TPMRCIntegrity), errors.Is(err, tpm2.TPMRCSize), errors.Is(err, tpm2.TPMRCBinding), errors.Is(err, tpm2.TPMRCType),
		errors.Is(err, tpm2.TPMRCHash), errors.Is(err, tpm2.TPMRCAttributes), errors.Is(err, tpm2.TPMRCInsufficient):
		return nil, fmt.Errorf("%w: %w", errNotThisTPM, err)
	case err != nil:
		return nil, fmt.Errorf("loading the key: %w", err)
	}
	defer tpm2.FlushContext{FlushHandle: loaded.ObjectHandle}.Execute(t)
	session, err := encrypted(srk, tpm2.AESEncryption(128, tpm2.EncryptOut))
	if err != nil {
		return nil, err
	}
	opened, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: session}}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("unsealing the key: %w", err)
	}
	defer clear(opened.OutData.Buffer)
	if len(opened.OutData.Buffer) != secretBytes {
		return nil, fmt.Errorf("%w: it has %d bytes", errNotThisTPM, len(opened.OutData.Buffer))
	}
	return &secret{b: [secretBytes]byte(opened.OutData.Buffer)}, nil
}

// A tpmHolder is a key that a TPM has opened, with the counter.
type tpmHolder struct {
	TPM
	s    *secret
	name tpm2.TPM2BName // of the counter
}

func (h *tpmHolder) secret() *secret  { return h.s }
func (h *tpmHolder) counter() counter { return h }

// with connects for one use: the agent holds no TPM in between, and gives up with ctx.
func (h *tpmHolder) with(ctx context.Context, f func(transport.TPM) error) (err error) {
	c := tpmdevice.New(ctx, h.Device)
	defer func() { err = errors.Join(err, c.Release()) }()
	if err := c.Connect(); err != nil {
		return err
	}
	return f(c)
}

// ensureCounter finds the counter, or makes it.
func (h *tpmHolder) ensureCounter(t transport.TPM) error {
	index := tpm2.TPMHandle(h.NVIndex)
	public, err := tpm2.NVReadPublic{NVIndex: index}.Execute(t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		// A counter that is made begins above all that the TPM ever had, so that making it anew is no way back.
		_, err = tpm2.NVDefineSpace{
			AuthHandle: tpm2.TPMRHOwner,
			PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
				NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: counterBytes,
				Attributes: tpm2.TPMANV{NT: tpm2.TPMNTCounter, AuthRead: true, AuthWrite: true, OwnerRead: true, OwnerWrite: true, NoDA: true},
			}),
		}.Execute(t)
		if err != nil {
			return fmt.Errorf("making a counter at NV index %#x: %w", h.NVIndex, err)
		}
		public, err = tpm2.NVReadPublic{NVIndex: index}.Execute(t)
	}
	if err != nil {
		return fmt.Errorf("the counter at NV index %#x: %w", h.NVIndex, err)
	}
	info, err := public.NVPublic.Contents()
	if err != nil {
		return fmt.Errorf("the counter at NV index %#x: %w", h.NVIndex, err)
	}
	if a := info.Attributes; a.NT != tpm2.TPMNTCounter || !a.AuthRead || !a.AuthWrite || info.DataSize != counterBytes {
		return fmt.Errorf("NV index %#x belongs to another program; choose another one in sealed_cache.tpm_nv_index", h.NVIndex)
	}
	h.name = public.NVName
	if info.Attributes.Written {
		return nil
	}
	if err := h.count(t); err != nil { // before that it cannot be read
		return err
	}
	if public, err = (tpm2.NVReadPublic{NVIndex: index}).Execute(t); err != nil {
		return fmt.Errorf("the counter at NV index %#x: %w", h.NVIndex, err)
	}
	h.name = public.NVName // that it was written is part of its name
	return nil
}

func (h *tpmHolder) count(t transport.TPM) error {
	index := tpm2.TPMHandle(h.NVIndex)
	_, err := tpm2.NVIncrement{
		AuthHandle: tpm2.AuthHandle{Handle: index, Name: h.name, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    tpm2.NamedHandle{Handle: index, Name: h.name},
	}.Execute(t)
	if err != nil {
		return fmt.Errorf("counting at NV index %#x: %w", h.NVIndex, err)
	}
	return nil
}

func (h *tpmHolder) value(t transport.TPM) (uint64, error) {
	index := tpm2.TPMHandle(h.NVIndex)
	got, err := tpm2.NVRead{
		AuthHandle: tpm2.AuthHandle{Handle: index, Name: h.name, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    tpm2.NamedHandle{Handle: index, Name: h.name}, Size: counterBytes,
	}.Execute(t)
	if err == nil && len(got.Data.Buffer) != counterBytes {
		err = fmt.Errorf("it has %d bytes", len(got.Data.Buffer))
	}
	if err != nil {
		return 0, fmt.Errorf("reading the counter at NV index %#x: %w", h.NVIndex, err)
	}
	return binary.BigEndian.Uint64(got.Data.Buffer), nil
}

func (h *tpmHolder) read(ctx context.Context) (n uint64, err error) {
	err = h.with(ctx, func(t transport.TPM) error {
		n, err = h.value(t)
		return err
	})
	return n, err
}

func (h *tpmHolder) increment(ctx context.Context) (n uint64, err error) {
	err = h.with(ctx, func(t transport.TPM) error {
		if err := h.count(t); err != nil {
			return err
		}
		n, err = h.value(t)
		return err
	})
	return n, err
}
