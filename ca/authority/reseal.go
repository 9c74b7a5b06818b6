package authority

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store"
)

// Reseal seals all that is sealed under the previous seal key under seal instead, and returns how many records that were. It
// is called before Open, by one process. What seal opens already is left as it is, so that a crash half way is made good by
// the next call.
func Reseal(ctx context.Context, st store.Store, td spiffeid.TrustDomain, previous, seal *keys.SealKey) (int, error) {
	var checks []store.Check
	var writes []store.Write
	done := 0
	commit := func() error {
		if len(writes) == 0 {
			return nil
		}
		if _, err := st.Commit(store.WithReserve(ctx), checks, writes); err != nil {
			return err
		}
		done += len(writes)
		checks, writes = nil, nil
		return nil
	}
	for _, prefix := range []string{keyPrefix, keyIntentPrefix, keyOrphanPrefix} {
		var items []store.Item
		if _, err := st.List(ctx, prefix, 0, func(item store.Item) error {
			items = append(items, item)
			return nil
		}); err != nil {
			return done, err
		}
		for _, item := range items {
			value, err := reseal(item, td, previous, seal)
			if err != nil {
				return done, fmt.Errorf("record %q: %w", item.Key, err)
			}
			if value == nil {
				continue
			}
			checks = append(checks, store.Check{Key: item.Key, Modified: item.Modified})
			writes = append(writes, store.Write{Key: item.Key, Value: value})
			if len(writes) == store.MaxWrites/2 {
				if err := commit(); err != nil {
					return done, err
				}
			}
		}
	}
	return done, commit()
}

// reseal returns the new value of one record, or nil if it stays.
func reseal(item store.Item, td spiffeid.TrustDomain, previous, seal *keys.SealKey) ([]byte, error) {
	change := func(sealed []byte, again func() ([]byte, error), into *[]byte, record any) ([]byte, error) {
		if len(sealed) == 0 || keys.SealedUnder(sealed, seal) {
			return nil, nil
		}
		fresh, err := again()
		if err != nil {
			return nil, err
		}
		*into = fresh
		return json.Marshal(record)
	}
	binding := func(use keys.Use, id string, generation uint64) keys.Binding {
		return keys.Binding{TrustDomain: td, Use: use, AuthorityID: id, Generation: generation}
	}
	switch id, kind := splitKey(item.Key); {
	case kind == keyX509Prefix:
		var r x509Record
		if err := decode(item, &r); err != nil {
			return nil, err
		}
		return change(r.Key.Sealed, func() ([]byte, error) {
			return keys.Reseal(r.Key, previous, seal, binding(keys.UseX509, id, r.Generation))
		}, &r.Key.Sealed, &r)
	case kind == keyJWTPrefix, kind == keyWITPrefix:
		use := keys.UseJWT
		if kind == keyWITPrefix {
			use = keys.UseWIT
		}
		var r jwtRecord
		if err := decode(item, &r); err != nil {
			return nil, err
		}
		return change(r.Key.Sealed, func() ([]byte, error) {
			return keys.Reseal(r.Key, previous, seal, binding(use, id, r.Generation))
		}, &r.Key.Sealed, &r)
	case kind != "": // of a kind that holds no key
		return nil, nil
	case strings.HasPrefix(item.Key, keyPrefix):
		return nil, fmt.Errorf("it is of an unknown kind; use the signet release that wrote it")
	}
	rest := strings.TrimPrefix(strings.TrimPrefix(item.Key, keyIntentPrefix), keyOrphanPrefix)
	use, _, _ := strings.Cut(rest, "/")
	var r intentRecord
	if err := decode(item, &r); err != nil {
		return nil, err
	}
	return change(r.Sealed, func() ([]byte, error) {
		intent, err := keys.OpenIntent(r.Sealed, previous, td, keys.Use(use))
		if err != nil {
			return nil, err
		}
		return intent.Seal(seal, td, keys.Use(use))
	}, &r.Sealed, &r)
}
