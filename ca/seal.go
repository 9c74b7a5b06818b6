package ca

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/durable"
)

// wrappedSealPrefix is where seal keys that a key store wraps are in the store, under the wrapping key's name.
const wrappedSealPrefix = "keys/seal/"

// check refuses a seal that names no source, or several.
func (s Seal) check(bad func(field, format string, args ...any)) {
	switch n := s.source().named(); {
	case n == 0:
		bad("seal", "name key_file (with create: true for the first start), systemd_credential or kms")
	case n > 1:
		bad("seal", "key_file, systemd_credential and kms exclude each other")
	case s.Create && s.KeyFile == "":
		bad("seal.create", "needs key_file")
	}
	s.source().check("seal.kms", bad)
	if s.Previous.named() > 1 {
		bad("seal.previous", "key_file, systemd_credential and kms exclude each other")
	}
	if s.Previous.named() == 1 && s.Previous == s.source() {
		bad("seal.previous", "is the same as seal; it names the seal key that the store was sealed under before")
	}
	s.Previous.check("seal.previous.kms", bad)
}

func (s Seal) source() SealSource {
	return SealSource{KeyFile: s.KeyFile, SystemdCredential: s.SystemdCredential, KMS: s.KMS}
}

func (s SealSource) named() int {
	n := 0
	for _, source := range []string{s.KeyFile, s.SystemdCredential, s.KMS} {
		if source != "" {
			n++
		}
	}
	return n
}

func (s SealSource) check(field string, bad func(field, format string, args ...any)) {
	if s.KMS == "" {
		return
	}
	key, err := keys.ParseKeyURI(s.KMS)
	if err == nil {
		err = key.CanWrap()
	}
	if err == nil {
		err = key.Linked()
	}
	if err != nil {
		bad(field, "%v", err)
	}
}

// openSeal returns the seal key. If the configuration names a previous one, everything that is sealed under that is sealed
// anew.
func (ca *CA) openSeal(ctx context.Context) (*keys.SealKey, error) {
	sealed, err := authority.Sealed(ctx, ca.store)
	if err != nil {
		return nil, err
	}
	if ca.c.Seal.Previous.named() == 0 {
		return ca.sealKey(ctx, "seal", ca.c.Seal.source(), sealed, ca.c.Seal.Create)
	}
	seal, err := ca.sealKey(ctx, "seal", ca.c.Seal.source(), false, ca.c.Seal.Create)
	if err != nil || !sealed {
		return seal, err
	}
	previous, err := ca.sealKey(ctx, "seal.previous", ca.c.Seal.Previous, true, false)
	if err != nil {
		return nil, err
	}
	n, err := authority.Reseal(ctx, ca.store, ca.td, previous, seal)
	if err != nil {
		return nil, fmt.Errorf("sealing anew what seal.previous sealed: %w", err)
	}
	if n > 0 {
		ca.log.Info("sealed the keys anew; remove seal.previous from the configuration, and the previous seal key when no backup needs it", "records", n, "seal_key", seal.ID(), "previous", previous.ID())
	}
	return seal, nil
}

// sealKey reads a seal key. It makes one only for a store in which nothing is sealed yet: a new key opens no old store, and
// would lie where the lost one has to be put back.
func (ca *CA) sealKey(ctx context.Context, field string, s SealSource, sealed, create bool) (*keys.SealKey, error) {
	switch {
	case s.SystemdCredential != "":
		k, err := keys.LoadSystemdCredential(s.SystemdCredential)
		if err != nil {
			return nil, fmt.Errorf("%s.systemd_credential: %w", field, err)
		}
		return k, nil
	case s.KMS != "":
		k, err := ca.wrappedSealKey(ctx, s.KMS, sealed)
		if err != nil {
			return nil, fmt.Errorf("%s.kms: %w", field, err)
		}
		return k, nil
	case create && !sealed:
		if err := durable.MkdirAll(filepath.Dir(s.KeyFile), 0o700); err != nil {
			return nil, fmt.Errorf("%s.key_file: %w", field, err)
		}
		k, err := keys.LoadOrCreateSealKey(s.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("%s.key_file: %w", field, err)
		}
		return k, nil
	}
	k, err := keys.LoadSealKey(s.KeyFile)
	if errors.Is(err, os.ErrNotExist) && sealed {
		return nil, fmt.Errorf("%s.key_file: %w; the keys in the store are sealed with it: put it back", field, err)
	}
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s.key_file: %w (set seal.create: true for the first start)", field, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%s.key_file: %w", field, err)
	}
	return k, nil
}

// wrappedSealKey unwraps the seal key in a key store, or makes one and keeps it wrapped in the store. Of two replicas that
// make one at once, one wins.
func (ca *CA) wrappedSealKey(ctx context.Context, text string, sealed bool) (*keys.SealKey, error) {
	wrapping, err := keys.ParseKeyURI(text)
	if err != nil {
		return nil, err
	}
	path := wrappedSealPrefix + wrapping.ID()
	for range 2 {
		item, err := ca.store.Get(ctx, path)
		switch {
		case err == nil:
			return ca.keys.UnwrapSealKey(ctx, wrapping, item.Value)
		case !errors.Is(err, store.ErrNotFound):
			return nil, err
		case sealed:
			return nil, fmt.Errorf("the keys in the store are sealed under another seal key than one that %s wraps; name that one, here or in seal.previous", wrapping)
		}
		seal, record, err := ca.keys.WrapSealKey(ctx, wrapping)
		if err != nil {
			return nil, err
		}
		_, err = ca.store.Commit(ctx, []store.Check{{Key: path}}, []store.Write{{Key: path, Value: record}})
		var conflict *store.ConflictError
		if err == nil {
			ca.log.Info("made a seal key", "seal_key", seal.ID(), "wrapped_by", wrapping.String())
			return seal, nil
		}
		if !errors.As(err, &conflict) {
			return nil, fmt.Errorf("writing the wrapped seal key to the store: %w", err)
		}
	}
	return nil, errors.New("the store forgets the wrapped seal key as soon as it is written to it")
}
