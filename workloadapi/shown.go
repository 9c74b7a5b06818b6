package workloadapi

import (
	"crypto"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/spiffe"
)

const (
	// maxAudiences bounds the audiences of one JWT-SVID. A token should have one. [JWT-SVID §3.2]
	maxAudiences = 32

	// maxAudienceBytes bounds one of them; a SPIFFE ID has at most 2048 bytes.
	maxAudienceBytes = 2048
)

// X509SVIDs returns what a message with the X509-SVIDs of an update shows: the identities, and the bundles of foreign trust
// domains by their SPIFFE IDs. It is all of that or an error: a client discards a message in which anything is missing.
// [Workload API §5.2.1]
func X509SVIDs(u Update) (identities []Identity, federated map[string][]byte, err error) {
	identities = distinctHints(u.Identities, func(i Identity) string { return i.Hint })
	for _, i := range identities {
		switch {
		case i.ID.IsZero() || i.ID.Path() == "":
			return nil, nil, fmt.Errorf("entry %q has the SPIFFE ID %q, which names no workload", i.EntryID, i.ID)
		case len(i.Chain) == 0 || len(i.Key) == 0:
			return nil, nil, fmt.Errorf("the X509-SVID or the key of %q is missing", i.ID)
		case len(u.X509Bundles[i.ID.TrustDomain()]) == 0:
			return nil, nil, fmt.Errorf("the X.509 bundle for %q is missing", i.ID)
		}
	}
	federated = map[string][]byte{}
	for td := range allowedDomains(u, identities) {
		if bundle := u.X509Bundles[td]; td != u.TrustDomain && len(bundle) > 0 {
			federated[td.IDString()] = bundle
		}
	}
	return identities, federated, nil
}

// X509Bundles returns the X.509 bundles of our own trust domain and of those that an update's identities federate with, by
// the SPIFFE IDs of the trust domains. Without our own there is none. [Workload API §5.2.2]
func X509Bundles(u Update) (map[string][]byte, error) {
	bundles := map[string][]byte{}
	for td := range allowedDomains(u, u.Identities) {
		if bundle := u.X509Bundles[td]; len(bundle) > 0 {
			bundles[td.IDString()] = bundle
		}
	}
	if bundles[u.TrustDomain.IDString()] == nil {
		return nil, fmt.Errorf("the X.509 bundle of our own trust domain %q is missing", u.TrustDomain.Name())
	}
	return bundles, nil
}

// JWTBundles returns the JWT bundles of our own trust domain and of those that an update's identities federate with, as
// plain JWK Sets without use and sequence, by the SPIFFE IDs of the trust domains. A foreign one that cannot be written is
// left out and told to skipped. [Workload API §6.2.2]
func JWTBundles(u Update, skipped func(spiffeid.TrustDomain, error)) (map[string][]byte, error) {
	bundles := map[string][]byte{}
	for td := range allowedDomains(u, u.Identities) {
		keys, ok := u.JWTBundles[td]
		if !ok && td != u.TrustDomain {
			continue
		}
		jwks, err := spiffe.MarshalJWKS(withKeyID(keys))
		switch {
		case err == nil:
			bundles[td.IDString()] = jwks
		case td == u.TrustDomain:
			return nil, fmt.Errorf("the JWT bundle of our own trust domain %q: %w", td.Name(), err)
		default:
			skipped(td, err)
		}
	}
	return bundles, nil
}

// DistinctJWTSVIDs leaves out those that repeat an earlier hint.
func DistinctJWTSVIDs(svids []JWTSVID) []JWTSVID {
	return distinctHints(svids, func(s JWTSVID) string { return s.Hint })
}

// ForSpeaker leaves of an update what somebody may be handed who speaks for the workload, if may allows the SPIFFE ID. What
// opens doors at the CA is for the workload itself alone, under whatever entry it comes.
func ForSpeaker(u Update, may func(spiffeid.ID) bool) Update {
	all := u.Identities
	u.Identities = forSpeaker(all, may, func(i Identity) (spiffeid.ID, bool) { return i.ID, i.Privileged })
	if len(all) > 0 && len(u.Identities) == 0 {
		u.Entitled = false
	}
	return u
}

// JWTForSpeaker is ForSpeaker for JWT-SVIDs.
func JWTForSpeaker(all []JWTSVID, may func(spiffeid.ID) bool) []JWTSVID {
	return forSpeaker(all, may, func(s JWTSVID) (spiffeid.ID, bool) { return s.ID, s.Privileged })
}

func forSpeaker[T any](all []T, may func(spiffeid.ID) bool, of func(T) (id spiffeid.ID, privileged bool)) []T {
	doors := map[spiffeid.ID]bool{}
	for _, one := range all {
		if id, privileged := of(one); privileged {
			doors[id] = true
		}
	}
	var left []T
	for _, one := range all {
		if id, _ := of(one); may(id) && !doors[id] {
			left = append(left, one)
		}
	}
	return left
}

// CheckAudience says what is wrong with the audiences that a JWT-SVID is asked for. The error is an ArgumentError.
func CheckAudience(audience []string) error {
	if len(audience) == 0 {
		return badArgument("audience is empty: name the recipient of the JWT-SVID")
	}
	if len(audience) > maxAudiences {
		return badArgument("audience has %d values: at most %d are allowed, and one is best", len(audience), maxAudiences)
	}
	for i, a := range audience {
		if a == "" {
			return badArgument("audience[%d] is empty: name the recipient of the JWT-SVID", i)
		}
		if len(a) > maxAudienceBytes {
			return badArgument("audience[%d] is %d bytes long: at most %d are allowed", i, len(a), maxAudienceBytes)
		}
	}
	return nil
}

// withKeyID leaves out a key without id: a client would discard the whole update for it. (WAPI-49)
func withKeyID(keys map[string]crypto.PublicKey) map[string]crypto.PublicKey {
	if _, ok := keys[""]; !ok {
		return keys
	}
	named := make(map[string]crypto.PublicKey, len(keys))
	for kid, key := range keys {
		if kid != "" {
			named[kid] = key
		}
	}
	return named
}

// allowedDomains is our own trust domain and those that the identities federate with. A bundle of any other does not
// leave, whatever the source put into the update. (WAPI-36)
func allowedDomains(u Update, identities []Identity) map[spiffeid.TrustDomain]bool {
	allowed := map[spiffeid.TrustDomain]bool{u.TrustDomain: true}
	for _, i := range identities {
		for _, td := range i.FederatesWith {
			allowed[td] = true
		}
	}
	return allowed
}

// TrustDomains is whose bundles the caller may have.
func (u *Update) TrustDomains() map[spiffeid.TrustDomain]bool {
	return allowedDomains(*u, u.Identities)
}

// distinctHints leaves out what repeats an earlier non-empty hint. The order is the source's: the default identity, then
// the oldest entry first. [Workload API §5.2.1]
func distinctHints[T any](all []T, hint func(T) string) []T {
	seen := map[string]bool{}
	var distinct []T
	for _, one := range all {
		if h := hint(one); h != "" {
			if seen[h] {
				continue
			}
			seen[h] = true
		}
		distinct = append(distinct, one)
	}
	return distinct
}
