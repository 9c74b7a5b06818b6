package spireserver

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

const (
	// maxAuthorities bounds the authorities of each kind in one bundle.
	maxAuthorities = 1000
	// revisionBits is the room for an entry's own revision number below the time of its creation.
	revisionBits = 30
)

// A stamp tells two states of an entry apart.
type stamp struct{ revision, createdAt int64 }

// A revised says at which state an entry is.
type revised interface {
	GetRevisionNumber() int64
	GetCreatedAt() int64
}

func stampOf(e revised) stamp { return stamp{e.GetRevisionNumber(), e.GetCreatedAt()} }

// order is a number that rises with each change of an entry. A SPIRE server counts an entry's changes, and begins anew with
// one that takes the place of another of the same id; then its creation is later. The same state has the same number,
// also after a restart of the agent.
func (s stamp) order() int64 {
	return max(s.createdAt, 0)<<revisionBits | min(s.revision, 1<<revisionBits-1)
}

// errStored says that an entry's SVIDs are for a store of SPIRE's agents and not for workloads.
var errStored = errors.New("its SVIDs are for a store (store_svid)")

// translateEntry says an entry in signet's words. What is wrong with an entry otherwise, says whoever takes it.
func translateEntry(e *types.Entry) (*nodev1.Entry, error) {
	switch {
	case e.GetRevisionNumber() < 0:
		return nil, fmt.Errorf("its revision %d is negative", e.GetRevisionNumber())
	case e.GetStoreSvid():
		return nil, errStored
	}
	t := &nodev1.Entry{
		Id: e.GetId(), Revision: stampOf(e).order(), CreatedAt: e.GetCreatedAt(),
		SpiffeId: "spiffe://" + e.GetSpiffeId().GetTrustDomain() + e.GetSpiffeId().GetPath(), FederatesWith: e.GetFederatesWith(),
		Hint: e.GetHint(), Admin: e.GetAdmin(), Downstream: e.GetDownstream(), ExpiresAt: e.GetExpiresAt(),
		JwtIncludeJti: e.GetAdditionalAttributes().GetJwtSvidIncludeJti(), DisableX509Prefetch: e.GetAdditionalAttributes().GetDisableX509SvidPrefetch(),
	}
	for _, s := range e.GetSelectors() {
		if strings.Contains(s.GetType(), ":") {
			// Written as one text, it would be another selector, which another process may have.
			return nil, fmt.Errorf("the selector type %q has a colon", s.GetType())
		}
		t.Selectors = append(t.Selectors, s.GetType()+":"+s.GetValue())
	}
	return t, nil
}

// translateBundle says a bundle in signet's words. SPIRE has no names for authorities that its agents would know, and says
// of their state only that they are tainted; what those signed is to be renewed at once.
func translateBundle(b *types.Bundle) *nodev1.Bundle {
	t := &nodev1.Bundle{TrustDomain: b.GetTrustDomain(), SequenceNumber: b.GetSequenceNumber(), RefreshHint: b.GetRefreshHint()}
	for _, a := range b.GetX509Authorities() {
		t.X509Authorities = append(t.X509Authorities, &nodev1.X509Authority{Certificate: a.GetAsn1(), State: stateOf(a.GetTainted())})
	}
	for _, a := range b.GetJwtAuthorities() {
		t.JwtAuthorities = append(t.JwtAuthorities, &nodev1.JWTAuthority{
			KeyId: a.GetKeyId(), PublicKey: a.GetPublicKey(), ExpiresAt: a.GetExpiresAt(), State: stateOf(a.GetTainted()),
		})
	}
	for _, a := range b.GetWitAuthorities() {
		t.WitAuthorities = append(t.WitAuthorities, &nodev1.JWTAuthority{
			KeyId: a.GetKeyId(), PublicKey: a.GetPublicKey(), ExpiresAt: a.GetExpiresAt(), State: stateOf(a.GetTainted()),
		})
	}
	return t
}

func stateOf(tainted bool) nodev1.AuthorityState {
	if tainted {
		return nodev1.AuthorityState_AUTHORITY_STATE_TAINTED
	}
	return nodev1.AuthorityState_AUTHORITY_STATE_UNSPECIFIED
}
