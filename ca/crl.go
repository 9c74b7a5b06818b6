package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/adminapi"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/policy"
)

// A crlKeeper keeps a CRL for each X.509 authority: it lists the serial numbers that are revoked, and those that this CA's audit
// log says it issued and that a revocation of an ID or an agent hits. The lists are in the store, so that all replicas hand on
// the same, each adds what its own log knows, and their numbers only rise.
type crlKeeper struct {
	ca *CA
	// after is the number of an audit record before which there is nothing that is still valid. Only run uses it.
	after uint64
}

const (
	// maxListed bounds one CRL, which goes to every agent and into one record of the store.
	maxListed = 5_000
	// crlSettle is how long changes are gathered before the lists are made anew, and crlLook how often the clock is looked at.
	crlSettle = 200 * time.Millisecond
	crlLook   = 30 * time.Second
)

// run keeps the lists until ctx ends.
func (k *crlKeeper) run(ctx context.Context) error {
	done := store.Revision(-1)
	for {
		moved := k.ca.reg.Moved()
		if at := k.ca.reg.RevokedAt(); at != done {
			if !sleep(ctx, crlSettle) {
				return nil
			}
			at = k.ca.reg.RevokedAt()
			if err := k.renew(ctx); err == nil {
				done = at
			} else if ctx.Err() == nil {
				k.ca.log.Error("making the CRLs", "err", err)
				if !sleep(ctx, crlLook) {
					return nil
				}
				continue
			}
		}
		timer := time.NewTimer(crlLook)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-moved:
			timer.Stop()
		case <-timer.C:
			done = -1 // a list may be due, or an authority new
		}
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// renew makes those lists anew that are due or say something else than is revoked.
func (k *crlKeeper) renew(ctx context.Context) error {
	found, err := k.search(ctx)
	if err != nil {
		return err
	}
	due := map[string]bool{}
	have := map[string]*registry.CRL{}
	for _, c := range k.ca.reg.CRLs() {
		have[c.Authority] = c
	}
	for _, id := range k.ca.set.CRLIssuers(k.ca.c.Now()) {
		due[id] = true
		c := have[id]
		if c == nil {
			c = &registry.CRL{Authority: id}
		}
		err := k.renewOne(ctx, c, found[id])
		if errors.Is(err, registry.ErrConflict) {
			continue // another replica was faster; its list is looked at with the next change, which it is
		}
		if err != nil {
			return err
		}
	}
	for id, c := range have {
		if !due[id] {
			if err := k.ca.reg.DeleteCRL(ctx, c); err != nil && !errors.Is(err, registry.ErrConflict) {
				return err
			}
		}
	}
	return nil
}

// search returns, by authority, what the audit log says was issued, has not ended, and is hit by something else than its own
// serial number.
func (k *crlKeeper) search(ctx context.Context) (map[string][]registry.ListedSVID, error) {
	items, _ := k.ca.reg.RevokedItems()
	wide := slices.DeleteFunc(items, func(it *policyv1.Revocation) bool {
		return it.TokensOnly || it.GetSpiffeId() == "" && it.GetSerialPrefix() == nil
	})
	out := map[string][]registry.ListedSVID{}
	if len(wide) == 0 {
		return out, nil
	}
	revocations := policy.CompileRevocations(&policyv1.RevocationSet{Revocations: wide}, k.ca.td)
	now := k.ca.c.Now()
	oldest := uint64(0)
	err := k.ca.audit.Search(ctx, auditlog.Filter{AfterSeq: k.after, Outcome: auditlog.Done}, func(r auditlog.Record) error {
		svid, leaf, ok := adminapi.IssuedBy(r)
		if !ok || leaf == nil || !now.Before(leaf.NotAfter) {
			return nil
		}
		if oldest == 0 {
			oldest = r.Seq
		}
		if name, found := revocations.X509SVID(leaf); found {
			out[svid.AuthorityId] = append(out[svid.AuthorityId], registry.ListedSVID{Serial: leaf.SerialNumber.Bytes(), Until: leaf.NotAfter.Unix(), Revocation: name})
		}
		return nil
	})
	if err != nil && !errors.Is(err, auditlog.ErrMalformed) {
		return nil, fmt.Errorf("looking for what was issued: %w", err)
	}
	if oldest > 0 {
		k.after = oldest - 1
	}
	return out, nil
}

// renewOne makes the list that follows c, if it is due or says something else.
func (k *crlKeeper) renewOne(ctx context.Context, c *registry.CRL, found []registry.ListedSVID) error {
	now := k.ca.c.Now()
	items, _ := k.ca.reg.RevokedItems()
	since := map[string]time.Time{} // by name of an item
	for _, d := range k.ca.reg.Revocations() {
		for _, it := range d.Items {
			since[it.Name] = d.CreatedAt
		}
	}
	listed := map[string]registry.ListedSVID{}
	for _, l := range append(slices.Clone(c.Listed), found...) {
		if _, still := since[l.Revocation]; still && now.Unix() < l.Until {
			listed[string(l.Serial)] = l
		}
	}
	next := &registry.CRL{Authority: c.Authority, Number: max(c.Number+1, now.Unix()), Revision: c.Revision}
	entries := map[string]time.Time{}
	for _, it := range items {
		if s := it.GetSerial(); s != nil && len(entries) < maxListed {
			entries[string(s)] = since[it.Name]
		}
	}
	left := 0
	for _, serial := range sortedKeys(listed) {
		if _, twice := entries[serial]; !twice && len(entries) >= maxListed {
			left++
			continue
		}
		entries[serial] = since[listed[serial].Revocation]
		next.Listed = append(next.Listed, listed[serial])
	}
	list := make([]x509.RevocationListEntry, 0, len(entries))
	for _, serial := range sortedKeys(entries) {
		list = append(list, x509.RevocationListEntry{SerialNumber: new(big.Int).SetBytes([]byte(serial)), RevocationTime: entries[serial].UTC()})
	}
	validity := k.ca.c.CRL.Validity
	age := now.Sub(time.Unix(c.ThisUpdate, 0))
	if c.DER != nil && age >= 0 && age < validity/3 && sameEntries(c.DER, list) {
		return nil
	}
	if left > 0 {
		k.ca.log.Error("a CRL has no room for all that is revoked; rely on signet's enforcement points, or revoke the authority", "authority_id", c.Authority, "listed", len(list), "left_out", left)
	}
	this := now.UTC().Truncate(time.Second)
	next.ThisUpdate, next.NextUpdate = this.Unix(), this.Add(validity).Unix()
	der, err := k.ca.set.SignCRL(ctx, c.Authority, big.NewInt(next.Number), list, this, this.Add(validity))
	if err != nil {
		return err
	}
	next.DER = der
	rec := auditlog.Record{Time: now, Event: "revocation.listed", Actor: registry.ServerID(k.ca.td).String(), ActorKind: "system", Subject: c.Authority, Outcome: auditlog.Done,
		Details: map[string]any{"number": next.Number, "listed": len(list), "left_out": left, "next_update": next.NextUpdate}}
	if err := k.ca.audit.Append(ctx, auditlog.Essential, rec); err != nil {
		return err
	}
	return k.ca.reg.PutCRL(store.WithReserve(ctx), next)
}

// sameEntries tells whether a list says what it should.
func sameEntries(der []byte, want []x509.RevocationListEntry) bool {
	have, err := x509.ParseRevocationList(der)
	if err != nil || len(have.RevokedCertificateEntries) != len(want) {
		return false
	}
	numbers := func(list []x509.RevocationListEntry) []string {
		out := make([]string, len(list))
		for i, e := range list {
			out[i] = string(bytes.Clone(e.SerialNumber.Bytes()))
		}
		slices.Sort(out)
		return out
	}
	return slices.Equal(numbers(have.RevokedCertificateEntries), numbers(want))
}

func sortedKeys[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}
