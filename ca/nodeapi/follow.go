package nodeapi

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"io"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

// FollowFormat is the newest version of FollowResponse that this CA sends.
const FollowFormat = 1

const (
	// maxPartBytes bounds one message of a snapshot, well below gRPC's 4 MiB.
	maxPartBytes = 1 << 20
	// maxDeltaItems and maxDeltaBytes are how large a difference may be; beyond it a snapshot in parts is sent instead.
	maxDeltaItems = 1000
	maxDeltaBytes = 2 << 20
	// maxSyncs is how many Sync requests may wait for one answer.
	maxSyncs = 64
	// recheck is how often a stream's rights are judged by the wall clock when nothing else happens.
	recheck = 20 * time.Second
)

// A FollowStatus says what is known of an agent that follows this replica.
type FollowStatus struct {
	Connected    bool
	Acknowledged store.Revision
	Sent         store.Revision
	HandedOn     []string
	// InUse are the X.509 authorities of which the agent, or one of its workloads, holds an X509-SVID; nil before it has
	// said anything.
	InUse   []string
	Version string
	Address string
	Entries int
}

// followState is one Follow stream.
type followState struct {
	cancel  context.CancelFunc
	acked   atomic.Int64
	sent    atomic.Int64
	entries atomic.Int64
	handed  atomic.Pointer[[]string]
	inUse   atomic.Pointer[[]string]
	own     []string // ids of the authorities to which the SVID of this connection chains
	version string
	address string
}

// Status returns the state of each Follow stream by agent.
func (a *API) Status() map[spiffeid.ID]FollowStatus {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make(map[spiffeid.ID]FollowStatus, len(a.streams))
	for id, s := range a.streams {
		st := FollowStatus{Connected: true, Acknowledged: store.Revision(s.acked.Load()), Sent: store.Revision(s.sent.Load()), Version: s.version, Address: s.address, Entries: int(s.entries.Load())}
		if h := s.handed.Load(); h != nil {
			st.HandedOn = *h
		}
		if u := s.inUse.Load(); u != nil {
			st.InUse = append(slices.Clone(*u), s.own...)
		}
		out[id] = st
	}
	return out
}

// Follow keeps one agent up to date. [DESIGN §4]
func (a *API) Follow(s nodev1.Node_FollowServer) error {
	ctx, cancel := context.WithCancel(s.Context())
	defer cancel()
	c := access.From(ctx)
	first, err := receiveSoon(ctx, s.Recv, maxHello, errNoHello)
	if errors.Is(err, errNoHello) {
		return err
	}
	if err != nil {
		return status.Error(codes.InvalidArgument, "the first message must be hello")
	}
	hello := first.GetHello()
	switch {
	case hello == nil:
		return status.Error(codes.InvalidArgument, "the first message must be hello")
	case hello.Format < FollowFormat:
		return status.Errorf(codes.FailedPrecondition, "format %d is older than this CA speaks (%d); upgrade the agent", hello.Format, FollowFormat)
	}
	// An agent that comes from another replica may know more than this one has seen: sent a snapshot now, it would drop that.
	if hello.Epoch == a.c.Epoch {
		bctx, bcancel := context.WithTimeout(ctx, maxCatchUp)
		err := a.awaitHeld(bctx, store.Revision(hello.Revision))
		bcancel()
		if err != nil {
			return a.toStatus(err)
		}
	}
	st := &followState{cancel: cancel, version: clip(hello.AgentVersion), address: c.Address, own: c.AuthorityIDs()}
	if err := a.c.Registry.NoteFollows(ctx, c.Node, st.version); err != nil && ctx.Err() == nil { // not worth a refusal
		a.c.Log.Info("the agent's version was not noted", "node_id", c.ID.String(), "err", err)
	}
	a.enter(c.ID, st)
	defer a.leave(c.ID, st)

	claim, err := claimOf(hello.Position)
	if err != nil {
		return err
	}
	f := a.c.Registry.FollowOn(c.ID, store.Revision(hello.Revision), hello.Epoch == a.c.Epoch, claim)
	if f.Waits() {
		a.c.Log.Info("the agent was told more of its cluster than is known here; until it is, the agent keeps what it holds of pods", "node_id", c.ID.String(), "cluster", claim.Cluster)
	}

	syncs := make(chan uint64, maxSyncs)
	recvErr := make(chan error, 1)
	go func() { recvErr <- a.receive(ctx, c.ID, s, st, syncs) }()
	pushErr := make(chan error, 1)
	go func() {
		defer f.Close()
		pushErr <- a.push(ctx, s, c, f, st, syncs, recvErr)
	}()
	return a.supervise(ctx, c, pushErr)
}

// awaitHeld returns when everything up to a revision that an agent holds is in memory, with the entries that pods have by it.
func (a *API) awaitHeld(ctx context.Context, rev store.Revision) error {
	if rev <= a.c.Registry.Revision() {
		return a.c.Registry.WaitFor(ctx, rev)
	}
	_, err := a.c.Registry.Barrier(ctx)
	return err
}

// Bounds of the position that an agent says.
const maxPositions, maxPositionName = 16, 64

// claimOf reads the position that an agent says it was told.
func claimOf(p *nodev1.Position) (registry.Claim, error) {
	if p == nil {
		return registry.Claim{}, nil
	}
	if len(p.Versions) > maxPositions {
		return registry.Claim{}, status.Errorf(codes.InvalidArgument, "hello.position has %d versions, at most %d", len(p.Versions), maxPositions)
	}
	c := registry.Claim{Cluster: p.Cluster, Position: make(registry.Position, len(p.Versions))}
	for of, version := range p.Versions {
		if len(of) > maxPositionName {
			return registry.Claim{}, status.Errorf(codes.InvalidArgument, "hello.position: %q… is no kind of object", clip(of[:maxPositionName]))
		}
		c.Position[of] = version
	}
	return c, nil
}

// maxCatchUp bounds the wait of an agent for what this replica has not seen yet.
const maxCatchUp = 10 * time.Second

// maxHello is how long an agent may take to say hello. Until then nothing watches its rights.
const maxHello = 30 * time.Second

var errNoHello = status.Errorf(codes.DeadlineExceeded, "no hello came for %v; follow again", maxHello)

// supervise returns when the stream has to end. An agent that reads nothing blocks push in the middle of a message for
// ever; the handler's return ends that, too.
func (a *API) supervise(ctx context.Context, c *access.Caller, pushErr <-chan error) error {
	timer := time.NewTicker(recheck)
	defer timer.Stop()
	for {
		select {
		case err := <-pushErr:
			return err
		case <-ctx.Done():
			return errReplaced
		case <-a.stop:
			return errStopping
		case <-timer.C:
			if _, err := a.c.Guard.CheckAgent(ctx, c); err != nil {
				return err
			}
		}
	}
}

var (
	errReplaced = status.Error(codes.Aborted, "a newer Follow stream of this agent replaced this one")
	errStopping = status.Error(codes.Unavailable, "the CA is shutting down")
)

// enter registers a stream. A second stream of the same agent ends the first: the agent reconnected faster than its
// old connection was found dead.
func (a *API) enter(id spiffeid.ID, st *followState) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if old := a.streams[id]; old != nil {
		old.cancel()
		a.c.Log.Info("a newer Follow stream replaces the old one", "node_id", id.String(), "old_address", old.address, "address", st.address)
	}
	a.streams[id] = st
}

func (a *API) leave(id spiffeid.ID, st *followState) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.streams[id] == st {
		delete(a.streams, id)
	}
}

// receive reads the agent's messages until the stream ends. It ends with the stream's context, which the handler's
// return cancels.
func (a *API) receive(ctx context.Context, agent spiffeid.ID, s nodev1.Node_FollowServer, st *followState, syncs chan<- uint64) error {
	for {
		m, err := s.Recv()
		if err != nil {
			return err
		}
		switch {
		case m.GetAck() != nil:
			const maxAuthorities = 64
			st.acked.Store(m.GetAck().Revision)
			if u := m.GetAck().AuthoritiesInUse; len(u) <= maxAuthorities {
				st.inUse.Store(&u)
			}
			if h := m.GetAck().AuthoritiesHandedOn; len(h) <= maxAuthorities {
				st.handed.Store(&h)
				a.c.Rotation.HandedOn(agent, h)
			}
		case m.GetSync() != nil:
			select {
			case syncs <- m.GetSync().Id:
			case <-ctx.Done():
				return ctx.Err()
			}
		default:
			return status.Error(codes.InvalidArgument, "expected ack or sync")
		}
	}
}

func (a *API) push(ctx context.Context, s nodev1.Node_FollowServer, c *access.Caller, f *registry.Follower, st *followState, syncs <-chan uint64, recvErr <-chan error) error {
	for {
		var pending []uint64
		select {
		case <-f.Wake():
		case id := <-syncs:
			pending = append(pending, id)
		case err := <-recvErr:
			if errors.Is(err, io.EOF) || ctx.Err() != nil {
				return status.Error(codes.Aborted, "the stream was ended by the agent or replaced by a newer one")
			}
			return err
		case <-ctx.Done():
			return errReplaced
		case <-a.stop:
			return errStopping
		}
		for more := true; more && len(pending) > 0 && len(pending) < maxSyncs; {
			select {
			case id := <-syncs:
				pending = append(pending, id)
			default:
				more = false
			}
		}
		if len(pending) > 0 {
			if err := f.AwaitBarrier(ctx); err != nil {
				return a.toStatus(err)
			}
		}
		// The right to follow is judged before anything is sent: a ban reaches this line together with the change.
		if _, err := a.c.Guard.CheckAgent(ctx, c); err != nil {
			a.lastWord(s, c, f)
			return err
		}
		d := f.Next(len(pending) > 0)
		if d == nil {
			continue
		}
		if err := a.send(s, d, f, pending); err != nil {
			return err
		}
		st.entries.Store(int64(f.Held()))
		st.sent.Store(int64(d.To))
	}
}

// lastWord sends an agent whose authority was revoked the bundle that says so and holds the authority in its place:
// without it, the agent could not verify the CA when it comes back. What else has changed comes with it, for it is the
// agent's own.
func (a *API) lastWord(s nodev1.Node_FollowServer, c *access.Caller, f *registry.Follower) {
	n, err := a.c.Registry.Node(c.ID)
	if !a.c.Guard.Untrusted(c) || err != nil || n.Banned || n.Serial != c.Serial || !a.c.Now().Before(c.Expires) {
		return
	}
	if d := f.Next(false); d != nil {
		_ = a.send(s, d, f, nil) // the stream ends in any case
	}
}

// send sends one Delta, a snapshot in parts.
func (a *API) send(s nodev1.Node_FollowServer, d *registry.Delta, f *registry.Follower, syncs []uint64) error {
	items := a.items(d)
	if !d.Snapshot && tooLarge(d, items) {
		f.Restart()
		if d = f.Next(true); d == nil {
			return status.Error(codes.Internal, "internal error")
		}
		items = a.items(d)
	}
	part := a.newPart(d)
	size := 0
	for _, it := range items {
		n := proto.Size(it.message)
		if d.Snapshot && size > 0 && size+n > maxPartBytes {
			if err := s.Send(part); err != nil {
				return err
			}
			part, size = a.newPart(d), 0
		}
		it.add(part)
		size += n
	}
	part.Complete = true
	part.SyncIds = syncs
	part.PolicyDefaults = d.Defaults
	for _, id := range d.RemovedEntries {
		part.RemovedEntryIds = append(part.RemovedEntryIds, string(id))
	}
	part.UnknownEntryPrefixes = d.UnknownPrefixes
	if d.Position != nil {
		part.Position = &nodev1.Position{Cluster: d.Position.Cluster, Versions: d.Position.Position}
	}
	part.RemovedPolicies = d.RemovedPolicies
	part.RemovedRevocations = d.RemovedRevocations
	part.RemovedCrls = d.RemovedCRLs
	part.RemovedUserIssuers = d.RemovedUserIssuers
	for _, td := range d.RemovedBundles {
		part.RemovedBundles = append(part.RemovedBundles, td.Name())
	}
	return s.Send(part)
}

// tooLarge tells whether a difference is better sent as a snapshot: what came or went with the parent of many entries.
func tooLarge(d *registry.Delta, items []item) bool {
	if len(items)+len(d.RemovedEntries)+len(d.RemovedPolicies)+len(d.RemovedBundles)+len(d.RemovedRevocations)+len(d.RemovedUserIssuers) > maxDeltaItems {
		return true
	}
	size := 0
	for _, it := range items {
		size += proto.Size(it.message)
	}
	return size > maxDeltaBytes
}

func (a *API) newPart(d *registry.Delta) *nodev1.FollowResponse {
	return &nodev1.FollowResponse{Format: FollowFormat, Epoch: a.c.Epoch, From: int64(d.From), To: int64(d.To), Snapshot: d.Snapshot}
}

// item is one thing to send with the way it goes into a message.
type item struct {
	message proto.Message
	add     func(*nodev1.FollowResponse)
}

func (a *API) items(d *registry.Delta) []item {
	var out []item
	if d.OwnBundle {
		b := ownBundle(a.c.Authority.Bundle())
		b.ReissueSeconds = a.reissueSeconds(b)
		out = append(out, item{b, func(m *nodev1.FollowResponse) { m.Bundles = append(m.Bundles, b) }})
	}
	for _, fb := range d.Bundles {
		b, err := foreignBundle(fb)
		if err != nil {
			a.c.Log.Error("a stored foreign bundle cannot be read", "trust_domain", fb.TrustDomain.Name(), "err", err)
			continue
		}
		out = append(out, item{b, func(m *nodev1.FollowResponse) { m.Bundles = append(m.Bundles, b) }})
	}
	for _, c := range d.CRLs {
		m := &nodev1.CRL{AuthorityId: c.Authority, Revision: int64(c.Revision), Crl: c.DER, NextUpdate: c.NextUpdate}
		out = append(out, item{m, func(r *nodev1.FollowResponse) { r.Crls = append(r.Crls, m) }})
	}
	for _, r := range d.Revocations {
		out = append(out, item{r, func(m *nodev1.FollowResponse) { m.Revocations = append(m.Revocations, r) }})
	}
	for _, p := range d.Policies {
		out = append(out, policyItem(p))
	}
	for _, i := range d.UserIssuers {
		out = append(out, item{i, func(m *nodev1.FollowResponse) { m.UserIssuers = append(m.UserIssuers, i) }})
	}
	for _, e := range d.Entries {
		m := protoEntry(e)
		out = append(out, item{m, func(r *nodev1.FollowResponse) { r.Entries = append(r.Entries, m) }})
	}
	return out
}

func policyItem(p *policyv1.Policy) item {
	return item{p, func(m *nodev1.FollowResponse) { m.Policies = append(m.Policies, p) }}
}

func protoEntry(e *registry.Entry) *nodev1.Entry {
	m := &nodev1.Entry{Id: string(e.ID), Revision: int64(e.Revision), CreatedAt: e.CreatedAt.Unix(), SpiffeId: e.SPIFFEID.String(),
		Hint: e.Hint, Admin: e.Admin, Downstream: e.Downstream, JwtIncludeJti: e.JWTIncludeJTI, DisableX509Prefetch: e.NoX509Prefetch}
	for _, s := range e.Selectors {
		m.Selectors = append(m.Selectors, s.String())
	}
	for _, td := range e.FederatesWith {
		m.FederatesWith = append(m.FederatesWith, td.Name())
	}
	if !e.ExpiresAt.IsZero() {
		m.ExpiresAt = e.ExpiresAt.Unix()
	}
	return m
}

func marshalKey(key crypto.PublicKey) ([]byte, error) { return x509.MarshalPKIXPublicKey(key) }

var protoStates = map[authority.State]nodev1.AuthorityState{
	authority.StatePrepared: nodev1.AuthorityState_AUTHORITY_STATE_PREPARED,
	authority.StateActive:   nodev1.AuthorityState_AUTHORITY_STATE_ACTIVE,
	authority.StateOld:      nodev1.AuthorityState_AUTHORITY_STATE_OLD,
	authority.StateTainted:  nodev1.AuthorityState_AUTHORITY_STATE_TAINTED,
}

// Bounds of the time in which agents renew what a tainted authority signed. After the longer one there is nothing left of
// it but SVIDs with uncommonly long TTLs; agents know it, too.
const (
	minReissue = 2 * time.Second
	maxReissue = 24 * time.Hour
)

// reissueSeconds is how long the agents together take to renew what a tainted authority signed, so that they ask for no
// more than ReissueRate SVIDs a second. It is counted wide: the entries of those who follow this replica, and the agents.
func (a *API) reissueSeconds(b *nodev1.Bundle) int64 {
	if !slices.ContainsFunc(b.X509Authorities, func(x *nodev1.X509Authority) bool {
		return x.State == nodev1.AuthorityState_AUTHORITY_STATE_TAINTED
	}) {
		return 0
	}
	_, svids, _ := a.c.Registry.Counts()
	a.mu.Lock()
	for _, s := range a.streams {
		svids += int(s.entries.Load())
	}
	a.mu.Unlock()
	return int64(waveOf(svids, a.c.ReissueRate) / time.Second)
}

// waveOf is how long it takes to renew so many SVIDs at so many a second.
func waveOf(svids, rate int) time.Duration {
	seconds := min((svids+rate-1)/rate, int(maxReissue/time.Second))
	return max(time.Duration(seconds)*time.Second, minReissue)
}

func ownBundle(b authority.Bundle) *nodev1.Bundle {
	m := &nodev1.Bundle{TrustDomain: b.TrustDomain.Name(), Revision: int64(b.Sequence), SequenceNumber: b.Sequence, RefreshHint: int64(b.RefreshHint / time.Second)}
	for _, x := range b.X509 {
		m.X509Authorities = append(m.X509Authorities, &nodev1.X509Authority{Certificate: x.Certificate.Raw, AuthorityId: x.ID, State: protoStates[x.State]})
	}
	m.JwtAuthorities, m.WitAuthorities = tokenAuthorities(b.JWT), tokenAuthorities(b.WIT)
	return m
}

func tokenAuthorities(all []authority.JWTAuthority) (out []*nodev1.JWTAuthority) {
	for _, j := range all {
		der, err := marshalKey(j.PublicKey)
		if err != nil {
			continue // the authority package made this key itself
		}
		out = append(out, &nodev1.JWTAuthority{KeyId: j.KeyID, PublicKey: der, ExpiresAt: unix(j.ExpiresAt), State: protoStates[j.State]})
	}
	return out
}

func foreignBundle(b *registry.Bundle) (*nodev1.Bundle, error) {
	parsed, _, err := spiffe.ParseBundle(b.TrustDomain, b.Content)
	if err != nil {
		return nil, err
	}
	m := &nodev1.Bundle{TrustDomain: b.TrustDomain.Name(), Revision: int64(b.Revision)}
	if n, ok := parsed.SequenceNumber(); ok {
		m.SequenceNumber = n
	}
	if h, ok := parsed.RefreshHint(); ok {
		m.RefreshHint = int64(h / time.Second)
	}
	for _, x := range parsed.X509Authorities() {
		m.X509Authorities = append(m.X509Authorities, &nodev1.X509Authority{Certificate: x.Raw})
	}
	if m.JwtAuthorities, err = foreignKeys(parsed.JWTAuthorities()); err != nil {
		return nil, err
	}
	if m.WitAuthorities, err = foreignKeys(parsed.WITAuthorities()); err != nil {
		return nil, err
	}
	return m, nil
}

func foreignKeys(keys map[string]crypto.PublicKey) (out []*nodev1.JWTAuthority, err error) {
	for _, kid := range slices.Sorted(maps.Keys(keys)) {
		der, err := marshalKey(keys[kid])
		if err != nil {
			return nil, err
		}
		out = append(out, &nodev1.JWTAuthority{KeyId: kid, PublicKey: der})
	}
	return out, nil
}
