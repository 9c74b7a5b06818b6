package registry

import (
	"context"
	"slices"
	"strings"

	"github.com/signet-id/signet/ca/store"
)

const crlPrefix = "crl/"

// A CRL is the newest list of revoked X509-SVIDs of one authority, with what is needed to make the next. It is never changed
// in place.
type CRL struct {
	Authority              string
	Number                 int64
	DER                    []byte
	ThisUpdate, NextUpdate int64
	// Listed are the serial numbers that were found to be hit by a revocation of something else, so that a replica whose audit
	// log does not have them keeps them.
	Listed   []ListedSVID
	Revision store.Revision
}

// A ListedSVID is an X509-SVID that was issued, and is hit by an item of what is revoked.
type ListedSVID struct {
	Serial     []byte `json:"serial"`
	Until      int64  `json:"until"` // its end
	Revocation string `json:"revocation"`
}

type crlRecord struct {
	V          int          `json:"v"`
	Number     int64        `json:"number"`
	DER        []byte       `json:"der"`
	ThisUpdate int64        `json:"this_update"`
	NextUpdate int64        `json:"next_update"`
	Listed     []ListedSVID `json:"listed,omitempty"`
}

func (ix *index) applyCRL(id string, ev store.Event, ch *changes) error {
	ch.crls = true
	if ev.Deleted {
		delete(ix.crls, id)
		return nil
	}
	var r crlRecord
	if err := decodeRecord(ev.Item, &r, func() int { return r.V }); err != nil {
		return err
	}
	ix.crls[id] = &CRL{id, r.Number, r.DER, r.ThisUpdate, r.NextUpdate, r.Listed, ev.Modified}
	return nil
}

// CRLs returns the newest CRL of each authority, in order of its id.
func (r *Registry) CRLs() []*CRL {
	r.mu.RLock()
	defer r.mu.RUnlock()
	out := make([]*CRL, 0, len(r.ix.crls))
	for _, c := range r.ix.crls {
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b *CRL) int { return strings.Compare(a.Authority, b.Authority) })
	return out
}

// PutCRL stores the CRL that follows c.Revision, 0: the first one of its authority. ErrConflict if another replica was faster.
func (r *Registry) PutCRL(ctx context.Context, c *CRL) error {
	b, err := marshal(crlRecord{recordVersion, c.Number, c.DER, c.ThisUpdate, c.NextUpdate, c.Listed})
	if err != nil {
		return err
	}
	_, err = r.commit(ctx, []store.Check{{Key: crlPrefix + c.Authority, Modified: c.Revision}}, []store.Write{{Key: crlPrefix + c.Authority, Value: b}})
	return err
}

// DeleteCRL forgets the CRL of an authority that is none any more.
func (r *Registry) DeleteCRL(ctx context.Context, c *CRL) error {
	_, err := r.commit(ctx, []store.Check{{Key: crlPrefix + c.Authority, Modified: c.Revision}}, []store.Write{{Key: crlPrefix + c.Authority, Delete: true}})
	return err
}

// RevokedAt returns the revision of the last change of what is revoked that is remembered.
func (r *Registry) RevokedAt() store.Revision {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if n := len(r.ix.revocations.changes); n > 0 {
		return r.ix.revocations.changes[n-1].at
	}
	return r.ix.revocations.since
}

func (f *Follower) crls(ix *index, h *held, d *Delta) {
	for id, c := range ix.crls {
		if h.hold(itemKey{'c', id}, itemVersion{rev: c.Revision}, d.To) {
			d.CRLs = append(d.CRLs, c)
		}
	}
	for k := range h.items {
		if k.kind == 'c' && ix.crls[k.name] == nil && h.drop(k, d.To) {
			d.RemovedCRLs = append(d.RemovedCRLs, k.name)
		}
	}
}
