package authority

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/store"
)

// A key in a key store is made in two steps, so that a crash, or a crash loop, never leaves a key there of which nobody
// knows. First the intent, with the name that the key will have, is committed. Then the key is made. Then one commit
// writes the record of the authority and removes the intent. Whoever finds an intent looks for its key first: if it is there
// it is used, and if not it is made under that name.
//
// There is one intent for each use, so of two operators or replicas that begin at once, one wins. Like the rotation that needs
// the key, an intent may use the room that is kept on a full disk.

// Where intents are in the store, and those whose key could not be dealt with. They are not under "authority/", because they
// are no authorities.
const (
	keyIntentPrefix = "keys/intent/"
	keyOrphanPrefix = "keys/orphan/"
)

const (
	// intentLease is how long the owner of an intent is taken to be at work on it. It is longer than all calls of a key
	// store together may take.
	intentLease = 2 * time.Minute

	// settleTimeout bounds what is done about intents at start.
	settleTimeout = 15 * time.Second

	// maxOrphans is how many abandoned keys are remembered.
	maxOrphans = 50
)

// ErrKeyBeingMade is returned when another replica is making a key for the same use at this moment.
var ErrKeyBeingMade = errors.New("another CA of this trust domain is making a key at this moment; try again in a few minutes")

type intentRecord struct {
	Version int `json:"v"`
	// Name is the key's, for people; what counts is sealed.
	Name string `json:"name"`
	// Owner is the process at work on it, since when.
	Owner  string    `json:"owner"`
	Since  time.Time `json:"since"`
	Sealed []byte    `json:"sealed"`
}

// newOwner returns a name for this process.
func newOwner() string {
	b := make([]byte, 8)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// makeKey makes a key for an authority of the given use and generation, where the configuration says.
func (s *Set) makeKey(ctx context.Context, use keys.Use, generation uint64) (madeKey, error) {
	select {
	case s.making <- struct{}{}: // one at a time in this process
		defer func() { <-s.making }()
	case <-ctx.Done():
		return madeKey{}, ctx.Err()
	}
	ring := s.config.Keys
	intent, revision, err := s.claimIntent(ctx, use)
	if err != nil {
		return madeKey{}, err
	}
	if revision != 0 && !intent.Same(ring.Choice(use)) {
		if err := s.abandonIntent(ctx, use, intent, revision); err != nil {
			return madeKey{}, err
		}
		revision = 0
	}
	if ring.Choice(use).Place.Software() {
		key, err := ring.Generate(ctx, use)
		return madeKey{key: key, use: use, generation: generation}, err
	}
	var key *keys.Key
	if revision != 0 {
		key, err = ring.Find(ctx, intent)
	} else {
		intent = ring.Intend(use, generation)
		if revision, err = s.writeIntent(ctx, use, intent, 0); err != nil {
			return madeKey{}, err
		}
		err = keys.ErrNoKey
	}
	switch {
	case err == nil:
		s.config.Log.Info("found the key that was made before a crash or failure", "use", string(use), "key", intent.Name, "key_store", intent.Choice.Place.String())
	case errors.Is(err, keys.ErrNoKey):
		if key, err = ring.Create(ctx, intent); err != nil {
			return madeKey{}, err
		}
		s.config.Log.Info("made a key", "use", string(use), "key", intent.Name, "key_store", intent.Choice.Place.String())
	default:
		return madeKey{}, err
	}
	path := keyIntentPrefix + string(use)
	return madeKey{
		key: key, use: use, generation: generation,
		checks: []store.Check{{Key: path, Modified: revision}},
		writes: []store.Write{{Key: path, Delete: true}},
	}, nil
}

// claimIntent returns the open intent of a use and the revision at which this process became its owner; 0 if there is none.
func (s *Set) claimIntent(ctx context.Context, use keys.Use) (keys.Intent, store.Revision, error) {
	item, err := s.config.Store.Get(ctx, keyIntentPrefix+string(use))
	if errors.Is(err, store.ErrNotFound) {
		return keys.Intent{}, 0, nil
	}
	if err != nil {
		return keys.Intent{}, 0, fmt.Errorf("reading the intent to make a key: %w", err)
	}
	var r intentRecord
	if err := decode(item, &r); err != nil {
		return keys.Intent{}, 0, err
	}
	intent, err := keys.OpenIntent(r.Sealed, s.config.Seal, s.config.TrustDomain, use)
	if err != nil {
		return keys.Intent{}, 0, fmt.Errorf("record %q: %w", item.Key, err)
	}
	if r.Owner == s.owner {
		return intent, item.Modified, nil
	}
	if age := s.config.Now().Sub(r.Since); !s.config.Exclusive && age >= 0 && age < intentLease {
		return keys.Intent{}, 0, fmt.Errorf("%s authority: %w", use, ErrKeyBeingMade)
	}
	revision, err := s.writeIntent(ctx, use, intent, item.Modified)
	return intent, revision, err
}

// writeIntent commits an intent of this process in the place of the one at revision.
func (s *Set) writeIntent(ctx context.Context, use keys.Use, intent keys.Intent, was store.Revision) (store.Revision, error) {
	value, err := s.encodeIntent(use, intent)
	if err != nil {
		return 0, err
	}
	path := keyIntentPrefix + string(use)
	revision, err := s.config.Store.Commit(store.WithReserve(ctx), []store.Check{{Key: path, Modified: was}}, []store.Write{{Key: path, Value: value}})
	var conflict *store.ConflictError
	if errors.As(err, &conflict) {
		return 0, fmt.Errorf("%s authority: %w", use, ErrKeyBeingMade)
	}
	if err != nil {
		return 0, fmt.Errorf("writing the intent to make a key: %w", err)
	}
	return revision, nil
}

func (s *Set) encodeIntent(use keys.Use, intent keys.Intent) ([]byte, error) {
	sealed, err := intent.Seal(s.config.Seal, s.config.TrustDomain, use)
	if err != nil {
		return nil, err
	}
	return json.Marshal(intentRecord{Version: recordVersion, Name: intent.Name, Owner: s.owner, Since: s.config.Now().UTC(), Sealed: sealed})
}

// abandonIntent removes an intent for a key store or algorithm that is configured no more, and its key, if there is one. If
// that is not possible now, the key is remembered and a warning names it.
func (s *Set) abandonIntent(ctx context.Context, use keys.Use, intent keys.Intent, revision store.Revision) error {
	path := keyIntentPrefix + string(use)
	writes := []store.Write{{Key: path, Delete: true}}
	if err := s.config.Keys.Remove(ctx, intent); err != nil {
		s.config.Log.Warn("a key of no authority may be left in a key store; it is looked for again at each start", "key", intent.Name, "key_store", intent.Choice.Place.String(), "err", err)
		value, err := s.encodeIntent(use, intent)
		if err != nil {
			return err
		}
		writes = append(writes, store.Write{Key: keyOrphanPrefix + string(use) + "/" + intent.Name, Value: value})
	}
	if _, err := s.config.Store.Commit(store.WithReserve(ctx), []store.Check{{Key: path, Modified: revision}}, writes); err != nil {
		return fmt.Errorf("removing the intent to make key %q: %w", intent.Name, err)
	}
	return nil
}

// settleIntents looks at what an earlier process left: an intent whose key was never made is removed, one whose key exists
// waits for the next authority of its use, and keys that could not be deleted are tried again. Nothing of it is needed to
// issue, so a key store that does not answer is only warned of, and holds the start up for settleTimeout at most.
func (s *Set) settleIntents(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	for _, use := range s.Kinds() {
		if err := s.settleIntent(ctx, use); err != nil {
			s.config.Log.Warn("the key of an interrupted preparation was not found out about; it is when the next one is prepared", "use", string(use), "err", err)
		}
		if err := s.settleOrphans(ctx, use); err != nil {
			s.config.Log.Warn("looking for keys of no authority", "use", string(use), "err", err)
		}
	}
}

func (s *Set) settleIntent(ctx context.Context, use keys.Use) error {
	intent, revision, err := s.claimIntent(ctx, use)
	if err != nil || revision == 0 {
		return err
	}
	if !intent.Same(s.config.Keys.Choice(use)) {
		return s.abandonIntent(ctx, use, intent, revision)
	}
	_, err = s.config.Keys.Find(ctx, intent)
	if err == nil {
		s.config.Log.Info("a key waits for the next authority: its preparation was interrupted", "use", string(use), "key", intent.Name, "key_store", intent.Choice.Place.String())
		return nil
	}
	if !errors.Is(err, keys.ErrNoKey) {
		return err
	}
	path := keyIntentPrefix + string(use)
	_, err = s.config.Store.Commit(store.WithReserve(ctx), []store.Check{{Key: path, Modified: revision}}, []store.Write{{Key: path, Delete: true}})
	return err
}

func (s *Set) settleOrphans(ctx context.Context, use keys.Use) error {
	var items []store.Item
	if _, err := s.config.Store.List(ctx, keyOrphanPrefix+string(use)+"/", 0, func(item store.Item) error {
		if len(items) < maxOrphans {
			items = append(items, item)
		}
		return nil
	}); err != nil {
		return err
	}
	var errs []error
	for _, item := range items {
		var r intentRecord
		if err := decode(item, &r); err != nil {
			return err
		}
		intent, err := keys.OpenIntent(r.Sealed, s.config.Seal, s.config.TrustDomain, use)
		if err == nil {
			err = s.config.Keys.Remove(ctx, intent)
		}
		if err == nil {
			_, err = s.config.Store.Commit(store.WithReserve(ctx), []store.Check{{Key: item.Key, Modified: item.Modified}}, []store.Write{{Key: item.Key, Delete: true}})
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("key %q: %w", r.Name, err))
		}
	}
	return errors.Join(errs...)
}
