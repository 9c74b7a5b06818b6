package registry

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/store"
)

// KindUserIssuer is the kind of documents that say whose user tokens conditions may ask for.
const KindUserIssuer = "UserIssuer"

// MaxUserIssuers bounds how many there are: every agent that receives a policy receives all of them.
const MaxUserIssuers = 64

const (
	userIssuerPrefix = "userissuer/"
	userKeysPrefix   = "userkeys/" // what was fetched, by the name of the issuer
)

// A UserIssuer is one UserIssuer document with what it was read into. It is never changed in place.
type UserIssuer struct {
	// Compiled has its keys: those of the document, or those that were fetched last, of which there may be none yet.
	Compiled  *policyv1.UserIssuer
	JWKSURL   string // where its keys are fetched; empty: they are in the document
	Document  Document
	CreatedAt time.Time
	// Revision is that of the document, KeysRevision that of what was fetched, or 0.
	Revision, KeysRevision store.Revision
	// FetchedAt is when the keys were fetched that are in force.
	FetchedAt time.Time
}

type userIssuerRecord struct {
	V         int      `json:"v"`
	Document  document `json:"document"`
	Compiled  []byte   `json:"compiled"` // signet.policy.v1.UserIssuer
	JWKSURL   string   `json:"jwks_url,omitempty"`
	CreatedAt int64    `json:"created_at"`
}

// A userKeysRecord is good for one URL only: keys from an endpoint that the operator has dropped do not count.
type userKeysRecord struct {
	V         int    `json:"v"`
	JWKSURL   string `json:"jwks_url"`
	Keys      []byte `json:"keys"` // signet.policy.v1.UserIssuer that holds keys only
	FetchedAt int64  `json:"fetched_at"`
}

// userIssuers are those of the index.
type userIssuers struct {
	byName map[string]*UserIssuer
	keys   map[string]fetchedKeys
}

type fetchedKeys struct {
	url      string
	keys     []*policyv1.UserKey
	at       time.Time
	revision store.Revision
}

func newUserIssuers() userIssuers {
	return userIssuers{map[string]*UserIssuer{}, map[string]fetchedKeys{}}
}

func (u *userIssuers) apply(name string, ev store.Event) error {
	if ev.Deleted {
		delete(u.byName, name)
		return nil
	}
	var rec userIssuerRecord
	if err := decodeRecord(ev.Item, &rec, func() int { return rec.V }); err != nil {
		return err
	}
	i := &UserIssuer{Compiled: &policyv1.UserIssuer{}, JWKSURL: rec.JWKSURL, Document: rec.Document.domain(), CreatedAt: fromUnix(rec.CreatedAt), Revision: ev.Modified}
	if err := proto.Unmarshal(rec.Compiled, i.Compiled); err != nil {
		return fmt.Errorf("record %s: %w (is the store damaged?)", ev.Key, err)
	}
	i.Compiled.Revision = int64(ev.Modified)
	u.byName[name] = u.withKeys(i)
	return nil
}

func (u *userIssuers) applyKeys(name string, ev store.Event) error {
	delete(u.keys, name)
	if !ev.Deleted {
		var rec userKeysRecord
		if err := decodeRecord(ev.Item, &rec, func() int { return rec.V }); err != nil {
			return err
		}
		var held policyv1.UserIssuer
		if err := proto.Unmarshal(rec.Keys, &held); err != nil {
			return fmt.Errorf("record %s: %w (is the store damaged?)", ev.Key, err)
		}
		u.keys[name] = fetchedKeys{rec.JWKSURL, held.Keys, fromUnix(rec.FetchedAt), ev.Modified}
	}
	if i := u.byName[name]; i != nil {
		u.byName[name] = u.withKeys(i)
	}
	return nil
}

// withKeys returns i with the keys that were fetched for it.
func (u *userIssuers) withKeys(i *UserIssuer) *UserIssuer {
	if i.JWKSURL == "" {
		return i
	}
	out := *i
	out.Compiled = proto.CloneOf(i.Compiled)
	out.Compiled.Keys, out.KeysRevision, out.FetchedAt, out.Compiled.Revision = nil, 0, time.Time{}, int64(i.Revision)
	if k, ok := u.keys[i.Compiled.Name]; ok && k.url == i.JWKSURL {
		out.Compiled.Keys, out.KeysRevision, out.FetchedAt = k.keys, k.revision, k.at
		out.Compiled.Revision = int64(max(i.Revision, k.revision))
	}
	return &out
}

// sorted returns all in order of name.
func (u *userIssuers) sorted() []*UserIssuer {
	out := make([]*UserIssuer, 0, len(u.byName))
	for _, i := range u.byName {
		out = append(out, i)
	}
	slices.SortFunc(out, func(a, b *UserIssuer) int { return strings.Compare(a.Compiled.Name, b.Compiled.Name) })
	return out
}

func (x *resource) encodeUserIssuer(created time.Time) ([]byte, error) {
	b, err := proto.Marshal(x.issuer)
	if err != nil {
		return nil, err
	}
	return marshal(userIssuerRecord{V: recordVersion, Document: x.doc.document(), Compiled: b, JWKSURL: x.jwksURL, CreatedAt: unix(created)})
}

// differences lists what applying x changes of i.
func (i *UserIssuer) differences(x *resource, diff func(field string, a, b any)) {
	was, is := i.Compiled, x.issuer
	diff("issuer", was.Issuer, is.Issuer)
	diff("audience", was.Audience, is.Audience)
	diff("header", was.Header, is.Header)
	diff("jwksURL", i.JWKSURL, x.jwksURL)
	if i.JWKSURL == "" || x.jwksURL == "" {
		diff("keys", keyIDs(was), keyIDs(is))
	}
	if i.JWKSURL == "" && x.jwksURL == "" && fmt.Sprint(keyIDs(was)) == fmt.Sprint(keyIDs(is)) && !slices.EqualFunc(was.Keys, is.Keys, func(a, b *policyv1.UserKey) bool { return proto.Equal(a, b) }) {
		diff("keys", "as they were", "others of the same ids")
	}
}

func keyIDs(i *policyv1.UserIssuer) []string {
	out := []string{}
	for _, k := range i.Keys {
		out = append(out, k.KeyId)
	}
	return out
}

// checkUserIssuers refuses a plan after which there are too many, or two issue under one name. mu is held.
func (r *Registry) checkUserIssuers(p *Plan, all []*resource) error {
	after := map[string]string{} // name -> iss
	for name, i := range r.ix.issuers.byName {
		after[name] = i.Compiled.Issuer
	}
	for _, w := range p.writes {
		if name, ok := strings.CutPrefix(w.Key, userIssuerPrefix); ok && w.Delete {
			delete(after, name)
		}
	}
	given := map[string]*resource{}
	for _, x := range all {
		if x.issuer != nil {
			after[x.name], given[x.name] = x.issuer.Issuer, x
		}
	}
	if len(given) == 0 {
		return nil
	}
	if len(after) > MaxUserIssuers {
		return invalid("documents", "", "there would be %d UserIssuers, at most %d are allowed", len(after), MaxUserIssuers)
	}
	for name, x := range given {
		for other, iss := range after {
			if other != name && iss == x.issuer.Issuer {
				return fmt.Errorf("%s:%d: UserIssuer %q has the issuer %q of UserIssuer %q; tokens would belong to both", x.doc.File, x.doc.Line, name, clip(iss), other)
			}
		}
	}
	return nil
}

// UserIssuers returns all in order of name.
func (r *Registry) UserIssuers() []*UserIssuer {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.ix.issuers.sorted()
}

// UserIssuer returns one. ErrNotFound if there is none.
func (r *Registry) UserIssuer(name string) (*UserIssuer, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if i := r.ix.issuers.byName[name]; i != nil {
		return i, nil
	}
	return nil, ErrNotFound
}

// UserIssuersChanged has one slot, which is filled when a document came, changed or went: look again. It is for one reader.
func (r *Registry) UserIssuersChanged() <-chan struct{} { return r.issuersChanged }

// StoreUserKeys stores keys that were fetched for i in the place of those that it has. ErrConflict if the document or the
// keys changed while they were fetched.
func (r *Registry) StoreUserKeys(ctx context.Context, i *UserIssuer, keys []*policyv1.UserKey) error {
	if i.JWKSURL == "" {
		return errors.New("the issuer's keys are in its document")
	}
	b, err := proto.Marshal(&policyv1.UserIssuer{Keys: keys})
	if err != nil {
		return err
	}
	value, err := marshal(userKeysRecord{recordVersion, i.JWKSURL, b, unix(r.c.Now())})
	if err != nil {
		return err
	}
	name := i.Compiled.Name
	r.mu.RLock()
	at := r.ix.issuers.keys[name].revision
	r.mu.RUnlock()
	if i.KeysRevision != 0 && at != i.KeysRevision {
		return ErrConflict
	}
	_, err = r.commit(ctx, []store.Check{{Key: userIssuerPrefix + name, Modified: i.Revision}, {Key: userKeysPrefix + name, Modified: at}},
		[]store.Write{{Key: userKeysPrefix + name, Value: value}})
	return err
}
