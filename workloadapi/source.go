package workloadapi

import (
	"context"
	"crypto"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi/peer"
)

// Errors that a Source returns and the endpoint understands. They may be wrapped. Any other error is logged and leaves
// the endpoint as Internal, without its text.
var (
	// ErrNotReady says that nothing was ever synchronised with the CA, so that "no" would be a guess. The caller gets
	// Unavailable. [Workload Endpoint §6, Workload API §5.2.1]
	ErrNotReady = errors.New("the agent has not synchronised with its CA yet")

	// ErrNoIdentity says that no registration entry gives the caller an identity, or not the one it asked for. The two
	// cases are the same to the caller, which gets PermissionDenied. [Workload API §5.2.1, §6.2.1]
	ErrNoIdentity = errors.New("no identity issued")

	// ErrUnavailable says that the caller is entitled to what it asked for, but it cannot be had right now, such as a
	// JWT-SVID that is not cached while the CA is out of reach or refuses it. The caller gets Unavailable and tries again.
	ErrUnavailable = errors.New("the CA is out of reach or refuses, and nothing valid is cached: the agent's log says why")

	// ErrTooMany says that the caller's user asks for new JWT-SVIDs faster than the agent lets one user ask the CA. The
	// caller gets ResourceExhausted.
	ErrTooMany = errors.New("the caller's user asks for too many new JWT-SVIDs: use each until it expires, and name the one SPIFFE ID that is needed")
)

// A Caller is an attested process.
type Caller struct {
	// PID is the process id as this agent's PID namespace counts it. It is for logs: only a peer.Process is proof of
	// which process it names.
	PID int32

	// UID and GID are the effective ids at the time of attestation.
	UID, GID uint32

	// Selectors is what attestation found out, without repetitions, in no particular order. Nobody changes it.
	Selectors []spiffe.Selector

	// Known says that Selectors had been found out about State before, and that State was read just now. Otherwise it was read
	// before the selectors were found out, and the process may have changed meanwhile.
	Known bool

	// State is the state of the process that Selectors describes. The endpoint answers only while the process is still
	// in that very state. A Source does not need it.
	State peer.Snapshot

	// Fleeting says that an equal State does not mean that Selectors still hold, since the content of the executable could
	// change without a trace in it. The endpoint attests such a caller again before each answer.
	Fleeting bool

	// Provisional says that there is more to be found out, which so far decides nothing: the caller is answered at once. A stream
	// is attested again soon.
	Provisional bool
}

// An Identity is one X509-SVID with what its holder may know.
type Identity struct {
	ID spiffeid.ID

	// EntryID is the id of the registration entry behind the identity.
	EntryID string

	// Hint is the operator's word on what the identity is for, or empty.
	Hint string

	// Chain is concatenated DER: the leaf first, then intermediates, no root. [Workload API §5.2.1]
	Chain []byte

	// Key is the private key of the leaf as unencrypted PKCS#8 DER. It is a secret: never logged.
	Key []byte

	// NotAfter is the end of the leaf's validity.
	NotAfter time.Time

	// FederatesWith names the foreign trust domains whose bundles the holder may have.
	FederatesWith []spiffeid.TrustDomain

	// Privileged says that the identity opens doors at the CA: it is an admin's or a CA's below. Only the workload itself
	// gets it, nobody who speaks for it.
	Privileged bool

	// WIT is a WIT-SVID of the identity, in updates of WatchWIT only.
	WIT *WITSVID
}

// A WITSVID is one WIT-SVID with the key that it is bound to. It never changes. [WIT-SVID §3]
type WITSVID struct {
	// Token is the JWS compact serialization. Without Key it is of no use.
	Token string

	// Key is the private key as a JWK. It is a secret: never logged.
	Key string
}

// An Update is the complete state for one caller. The receiver does not change what it points to: many callers may
// share it.
type Update struct {
	// Identities has the default identity first; the rest is in an order that is the same after a restart (the oldest
	// entry first). Of two identities with the same hint the endpoint returns the earlier one. Empty means that the
	// caller has none, or none any more, or, where Entitled, not yet.
	Identities []Identity

	// TrustDomain is our own trust domain.
	TrustDomain spiffeid.TrustDomain

	// X509Bundles holds, as concatenated DER, the X.509 authorities of our own trust domain and of those that an identity
	// federates with. Our own is there also for a caller without an identity.
	X509Bundles map[spiffeid.TrustDomain][]byte

	// CRLs holds, as DER, certificate revocation lists of the X.509 authorities in X509Bundles; nil where there are none.
	CRLs map[spiffeid.TrustDomain][][]byte

	// JWTBundles holds the JWT authorities of the same trust domains by key id.
	JWTBundles map[spiffeid.TrustDomain]map[string]crypto.PublicKey

	// WITBundles holds the WIT authorities of the same trust domains by key id; a trust domain without any has none.
	WITBundles map[spiffeid.TrustDomain]map[string]crypto.PublicKey

	// Policies are the call policies of the caller's own IDs and no others; nil if policies were never synchronised.
	Policies *policyv1.PolicySet

	// Revocations are all that is revoked, whether or not it concerns the caller; nil where nothing ever was.
	Revocations *policy.Revocations

	// NoPolicies says that the CA is one without call policies, as a SPIRE server, so that none will come.
	NoPolicies bool

	// Offline is since when the agent has had no contact to its CA, so that Policies may be out of date; zero while it has.
	Offline time.Time

	// Entitled says that the caller has at least one registration entry, even though its SVID may still be on its way.
	Entitled bool

	// Pending says that an identity of the caller's is left out, because its SVID is still on its way.
	Pending bool

	// BundleRevision is the revision of the bundles in this update. The endpoint hands it back to an Acknowledger.
	BundleRevision int64
}

// A JWTSVID is one token. Token is a secret: never logged.
type JWTSVID struct {
	ID spiffeid.ID

	// Token is the JWT-SVID in JWS compact serialization.
	Token string

	// Hint is the operator's word on what the identity is for, or empty.
	Hint string

	// Privileged is as in Identity.
	Privileged bool
}

// A Source knows the identities of callers. The agent's SVID cache is one. Its methods are called concurrently.
type Source interface {
	// Watch sends the caller's identities: the present ones at once, then the full set again after each change. A slow
	// reader misses states in between, never the last one. The channel is closed when ctx ends, and only then.
	//
	// The first update is sent when it is settled: registration in flight has been waited for. A caller without an
	// identity gets an update without identities (it may be allowed to have the bundles), or ErrNoIdentity.
	//
	// Errors: ErrNotReady, ErrNoIdentity, and ctx's.
	Watch(ctx context.Context, caller Caller) (<-chan Update, error)

	// FetchJWTSVIDs returns one token for each of the caller's identities, in the order of Update.Identities, or for id
	// alone if it is not zero. Each token's aud holds exactly audience, in that order.
	//
	// Errors: ErrNotReady, ErrNoIdentity (also if id is not the caller's), ErrUnavailable, ErrTooMany, and ctx's.
	FetchJWTSVIDs(ctx context.Context, caller Caller, id spiffeid.ID, audience []string) ([]JWTSVID, error)
}

// A WITSource is a Source that has WIT-SVIDs.
type WITSource interface {
	// WatchWIT is Source.Watch for a caller that wants WIT-SVIDs: each identity has one, and there is a further update when
	// one was renewed. An identity whose WIT-SVID is still on its way is left out, and Entitled stays.
	WatchWIT(ctx context.Context, caller Caller) (<-chan Update, error)
}

// An Acknowledger is a Source that counts which bundles have reached workloads. Activation of an authority waits for it.
type Acknowledger interface {
	// HandedOn is told that the update with that BundleRevision, received from the channel that Watch returned, has been
	// written to the caller's stream, or needed no writing because the stream's messages do not show the difference. It
	// must not block. A subscription that ends is not reported: its channel is closed.
	HandedOn(watch <-chan Update, bundleRevision int64)
}

// An Attestor says what a process is. It is called concurrently, once per call and again whenever the process differs
// from what it was.
type Attestor interface {
	// Attest collects the selectors of the process. The Caller's State is a snapshot that was taken before the selectors
	// were collected and that each of them agrees with.
	//
	// Errors: those of peer.Process.Snapshot, and ctx's. That a part of attestation could not be done is no error: the
	// caller then lacks those selectors.
	Attest(ctx context.Context, p *peer.Process) (Caller, error)
}
