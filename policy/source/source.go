// Package source keeps the call policies of a workload up to date: it watches the agent's socket, as go-spiffe's
// X509Source does for SVIDs. A Source goes into the Policies field of the enforcement points.
package source

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/api/signet/policy/v1/policyapi"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/spiffe"
)

const (
	// keepaliveTime and keepaliveTimeout find an agent that does not answer any more although its socket is open.
	keepaliveTime    = time.Minute
	keepaliveTimeout = 20 * time.Second

	// DefaultMaxOffline is how long policies hold without an agent.
	DefaultMaxOffline = 24 * time.Hour

	// mostMaxOffline bounds what an agent may say, so that it can be counted with.
	mostMaxOffline = 366 * 24 * time.Hour

	// maxResponse is the largest policy set that is read, in bytes.
	maxResponse = 64 << 20

	firstRetry = 500 * time.Millisecond
	lastRetry  = 30 * time.Second
)

// Options changes how a Source works. The zero value is good.
type Options struct {
	// Addr is the agent's socket, such as unix:///run/signet/agent.sock. Empty means what SPIFFE_ENDPOINT_SOCKET says.
	Addr string
	// MaxOffline is how long the last policies hold after the contact to the CA was lost, be it this program's to the agent
	// or the agent's to its CA, and how long they hold in place of newer ones that cannot be read; after that every call is
	// denied until that ends. Zero means what the agent's configuration says as max_offline, and 24 hours by default. Where
	// both say something, the shorter time holds.
	MaxOffline time.Duration
	// MaxRevocationStaleness is how long after the contact to the CA was lost calls go on by the revocations that are known;
	// after that every call is denied until there is contact again. Zero means what the agent's configuration says as
	// max_revocation_staleness, and no limit beside MaxOffline by default. Where both say something, the shorter time holds.
	MaxRevocationStaleness time.Duration
	// Log gets the loss and the return of the contact. Nil means slog.Default.
	Log *slog.Logger
	// Now is the clock for MaxOffline and MaxRevocationStaleness. Nil means time.Now.
	Now func() time.Time
}

// A Source has the policies of this workload. It is safe for concurrent use.
type Source struct {
	options Options
	conn    *grpc.ClientConn
	cancel  context.CancelFunc
	done    chan struct{}
	reports *reporter

	current atomic.Pointer[state]
	changed chan struct{} // one slot

	mu      sync.Mutex
	ready   chan struct{}              // closed with the first set or a fatal error
	err     error                      // why there is no set: fatal if ready is closed, otherwise the last trouble
	readers map[chan struct{}]struct{} // of Subscribe
}

// state is what the agent said last.
type state struct {
	bare            *policy.Policies // as compiled, without revocations
	policies, stale *policy.Policies // with the revocations
	revocations     *policy.Revocations
	told            *policyv1.RevocationSet // what the agent says, while revocations hold more; nil otherwise
	services        []spiffeid.ID
	lost            time.Time // when the contact to the agent was lost; zero while there is one
	apart           time.Time // when the first of lost and offline was seen, on the steady clock; zero while there is contact
	offline         time.Time // when the agent said that it lost the contact to its CA; zero while it has one
	maxOffline      time.Duration
	maxStaleness    time.Duration // 0: none
	refused         time.Time     // when the first of the sets came that could not be taken since; zero if none did
}

// tooOld says whether policies or revocations are too old to be relied on.
func (st *state) tooOld(now time.Time) bool {
	if since := st.since(st.lost, st.offline, st.refused); !since.IsZero() && now.Sub(since) > st.maxOffline {
		return true
	}
	since := st.since(st.lost, st.offline)
	if st.maxStaleness > 0 && !since.IsZero() && now.Sub(since) > st.maxStaleness {
		return true
	}
	if st.apart.IsZero() {
		return false
	}
	// A wall clock that was set back must not make what is old young.
	apart := time.Since(st.apart)
	return apart > st.maxOffline || st.maxStaleness > 0 && apart > st.maxStaleness
}

// setApart notes since when there has been no contact, from the state before on.
func (st *state) setApart(before *state) {
	switch {
	case st.lost.IsZero() && st.offline.IsZero():
		st.apart = time.Time{}
	case before != nil && !before.apart.IsZero():
		st.apart = before.apart
	default:
		st.apart = time.Now()
	}
}

// since is the earliest of the times that are not zero; zero if all are.
func (st *state) since(times ...time.Time) time.Time {
	var since time.Time
	for _, t := range times {
		if since.IsZero() || !t.IsZero() && t.Before(since) {
			since = t
		}
	}
	return since
}

// New connects to the agent and waits for the first policies, until ctx ends. The error then says what went wrong last. A
// set of a newer format than this program reads is an error at once, for which errors.Is(err, policy.ErrFormat) holds.
func New(ctx context.Context, o Options) (*Source, error) {
	if o.MaxOffline < 0 {
		return nil, fmt.Errorf("option MaxOffline is %v; it must not be negative", o.MaxOffline)
	}
	if o.MaxRevocationStaleness < 0 {
		return nil, fmt.Errorf("option MaxRevocationStaleness is %v; it must not be negative", o.MaxRevocationStaleness)
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	network, address, err := spiffe.ResolveEndpoint(o.Addr, os.Getenv)
	if err != nil {
		return nil, fmt.Errorf("option Addr: %w", err)
	}
	conn, err := grpc.NewClient("passthrough:///agent",
		grpc.WithTransportCredentials(insecure.NewCredentials()), // the endpoint is local and has no TLS [Workload Endpoint §3]
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, address)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxResponse)),
		// An agent that is stopped keeps its connections open; it counts as lost all the same.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
	)
	if err != nil {
		return nil, fmt.Errorf("connecting to the agent at %s: %w", address, err)
	}
	background, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s := &Source{options: o, conn: conn, cancel: cancel, done: make(chan struct{}), changed: make(chan struct{}, 1), ready: make(chan struct{})}
	s.reports = newReporter(s)
	go s.reports.run(background)
	go s.run(background)
	select {
	case <-s.ready:
		s.mu.Lock()
		err = s.err
		s.mu.Unlock()
	case <-ctx.Done():
		s.mu.Lock()
		err = fmt.Errorf("waiting for policies of the agent at %s: %w", address, errors.Join(context.Cause(ctx), s.err))
		s.mu.Unlock()
	}
	if err != nil {
		_ = s.Close() // nothing is held that could be lost
		return nil, err
	}
	return s, nil
}

// Policies returns the policies of the moment. They deny every call once the contact to the agent, or the agent's to its
// CA, has been lost for longer than MaxOffline, or the agent has had only newer policies for so long that this program
// cannot read.
func (s *Source) Policies() *policy.Policies {
	st := s.current.Load()
	if st == nil {
		return nil
	}
	if st.tooOld(s.now()) {
		return st.stale
	}
	return st.policies
}

// ServiceID returns the workload's default SPIFFE ID, as the agent knows it.
func (s *Source) ServiceID() spiffeid.ID {
	if ids := s.ServiceIDs(); len(ids) > 0 {
		return ids[0]
	}
	return spiffeid.ID{}
}

// ServiceIDs returns all SPIFFE IDs of the workload, the default one first.
func (s *Source) ServiceIDs() []spiffeid.ID {
	if st := s.current.Load(); st != nil {
		return slices.Clone(st.services)
	}
	return nil
}

// Updated returns a channel with one slot that is filled after each change of the policies or revocations. It is for one
// reader; Subscribe is for several.
func (s *Source) Updated() <-chan struct{} { return s.changed }

// Subscribe returns a channel with one slot that is filled after each change of the policies or revocations, until stop is
// called. It is not filled when they become too old.
func (s *Source) Subscribe() (changed <-chan struct{}, stop func()) {
	c := make(chan struct{}, 1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.readers == nil {
		s.readers = make(map[chan struct{}]struct{})
	}
	s.readers[c] = struct{}{}
	return c, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.readers, c)
	}
}

// tell fills the slots of those who want to know of changes.
func (s *Source) tell() {
	s.mu.Lock()
	defer s.mu.Unlock()
	fill(s.changed)
	for c := range s.readers {
		fill(c)
	}
}

func fill(slot chan struct{}) {
	select {
	case slot <- struct{}{}:
	default:
	}
}

// Close ends the watch and waits for it, after it has reported to the agent what was decided last, for at most a second.
// The policies stay as they are. It may be called more than once.
func (s *Source) Close() error {
	s.reports.close()
	s.cancel()
	<-s.done
	return nil
}

// now is the wall clock: the monotonic one stands still while a machine sleeps.
func (s *Source) now() time.Time { return s.options.Now().Round(0) }

func (s *Source) run(ctx context.Context) {
	defer close(s.done)
	defer s.conn.Close()
	wait := firstRetry
	for {
		received, err := s.watch(ctx)
		if st := s.current.Load(); st != nil && st.lost.IsZero() {
			lost := *st
			lost.lost = s.now()
			lost.setApart(st)
			s.current.Store(&lost)
		}
		if ctx.Err() != nil {
			return
		}
		s.trouble(err)
		if received {
			wait = firstRetry
		}
		// Half to the whole of the wait: workloads of a restarted agent do not all come back at once.
		pause := time.NewTimer(wait/2 + rand.N(wait/2))
		select {
		case <-ctx.Done():
			pause.Stop()
			return
		case <-pause.C:
		}
		wait = min(2*wait, lastRetry)
	}
}

// watch reads one stream to its end.
func (s *Source) watch(ctx context.Context) (received bool, err error) {
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true"))
	defer cancel()
	stream, err := policyapi.NewPoliciesClient(s.conn).Watch(ctx, &policyapi.WatchRequest{Format: policy.Format, Partial: true})
	if err != nil {
		return false, err
	}
	for {
		response, err := stream.Recv()
		if err != nil {
			return received, err
		}
		if !received {
			s.reports.connected()
		}
		received = true
		if err := s.take(response); err != nil {
			// The old policies stay, and so does the stream: the next set may be one that can be read.
			s.options.Log.Error("policies of the agent refused; the last ones stay in force until max_offline or better ones", "err", err, "max_offline", s.maxOffline(response))
			s.refuse(err)
			s.contact(response)
		}
	}
}

// take makes a response the policies and revocations of the moment. What it does not repeat stays as it is: an agent that
// was away, or one that knows nothing of revocations, revives nobody.
func (s *Source) take(r *policyapi.WatchResponse) error {
	if r.GetPartial() {
		return s.takePart(r)
	}
	var old *policy.Policies
	if before := s.current.Load(); before != nil {
		old = before.bare
	}
	bare, err := policy.CompileAfter(old, r.GetPolicies())
	if err != nil {
		return err
	}
	st := &state{bare: bare, offline: offlineSince(r), maxOffline: s.maxOffline(r), maxStaleness: s.maxStaleness(r)}
	st.setApart(s.current.Load())
	s.takeRevocations(st, r)
	st.unite()
	for _, service := range r.GetServiceIds() {
		id, err := spiffe.ParseWorkloadID(service)
		if err != nil {
			return fmt.Errorf("service ID from the agent: %w", err)
		}
		st.services = append(st.services, id)
	}
	s.taken(s.current.Swap(st), st)
	return nil
}

// takePart is take for a response that does not repeat the policies. If those were refused, it is about others than are in
// force, and the revocations count all the same.
func (s *Source) takePart(r *policyapi.WatchResponse) error {
	old := s.current.Load()
	if old == nil {
		return errors.New("the agent's first answer holds no policies")
	}
	st := *old
	st.lost, st.offline, st.maxOffline, st.maxStaleness = time.Time{}, offlineSince(r), s.maxOffline(r), s.maxStaleness(r)
	st.setApart(old)
	if s.takeRevocations(&st, r); st.revocations != old.revocations {
		st.unite()
	}
	s.taken(s.current.Swap(&st), &st)
	return nil
}

// takeRevocations makes those of a response the ones of st, which is of the last state or a new one; without any the last
// ones stay. An agent that has no contact to its CA un-revokes nothing: if it was started anew with an older cache, it knows
// less than it told before.
func (s *Source) takeRevocations(st *state, r *policyapi.WatchResponse) {
	old := s.current.Load()
	told := r.GetRevocations()
	if old != nil && told == nil {
		st.revocations, st.told = old.revocations, old.told
		if told = old.told; told == nil || r.GetOfflineSince() != 0 {
			return
		}
	}
	st.told = nil
	set := told
	if old != nil && r.GetOfflineSince() != 0 && told.GetRevision() < old.revocations.Revision() {
		st.told, set = told, withOlder(old.revocations.Set(), told)
	}
	st.revocations = policy.CompileRevocations(set, st.trustDomain())
	if name := st.revocations.Unknown(); name != "" {
		s.options.Log.Error("a revocation is of a kind that this program does not know: every call is denied until the program is upgraded or the revocation is gone", "revocation", name)
	}
}

// withOlder adds to held what an older set has besides.
func withOlder(held, older *policyv1.RevocationSet) *policyv1.RevocationSet {
	all := &policyv1.RevocationSet{Revision: held.GetRevision(), Revocations: slices.Clone(held.GetRevocations())}
	have := make(map[string]bool, len(all.Revocations))
	for _, one := range all.Revocations {
		have[one.GetName()] = true
	}
	for _, one := range older.GetRevocations() {
		if !have[one.GetName()] {
			all.Revocations = append(all.Revocations, one)
		}
	}
	return all
}

// unite puts policies and revocations together.
func (st *state) unite() {
	st.policies = st.bare.WithRevocations(st.revocations)
	st.stale = st.policies.Stale()
}

func (st *state) trustDomain() spiffeid.TrustDomain {
	return st.bare.TrustDomain()
}

// taken tells of what is different.
func (s *Source) taken(old, st *state) {
	if old != nil && !old.lost.IsZero() {
		s.options.Log.Info("policies are watched again")
	}
	if hadContact := old == nil || old.offline.IsZero(); hadContact != st.offline.IsZero() {
		if hadContact {
			s.options.Log.Warn("the agent has no contact to its CA: the policies may be out of date",
				"offline_since", st.offline, "denies_from", st.offline.Add(st.maxOffline))
		} else {
			s.options.Log.Info("the agent has contact to its CA again")
		}
	}
	s.mu.Lock()
	s.err = nil
	s.settle()
	s.mu.Unlock()
	s.tell()
}

// contact notes that the agent is there, although its policies are not taken: those in force are out of date.
func (s *Source) contact(r *policyapi.WatchResponse) {
	if st := s.current.Load(); st != nil {
		found := *st
		found.lost, found.offline, found.maxOffline, found.maxStaleness = time.Time{}, offlineSince(r), s.maxOffline(r), s.maxStaleness(r)
		found.setApart(st)
		s.takeRevocations(&found, r) // they can be read although the policies cannot
		news := found.revocations != st.revocations
		if news {
			found.unite()
		}
		if found.refused.IsZero() {
			found.refused = s.now()
		}
		s.current.Store(&found)
		if news {
			s.tell()
		}
	}
}

// offlineSince is when the agent lost the contact to its CA; zero while it has one.
func offlineSince(r *policyapi.WatchResponse) time.Time {
	if r.GetOfflineSince() == 0 {
		return time.Time{}
	}
	return time.Unix(r.GetOfflineSince(), 0)
}

// maxOffline is how long policies hold without contact, by what this program and its agent say.
func (s *Source) maxOffline(r *policyapi.WatchResponse) time.Duration {
	agent := time.Duration(min(r.GetMaxOffline(), int64(mostMaxOffline/time.Second))) * time.Second
	own := s.options.MaxOffline
	switch {
	case agent <= 0 && own == 0:
		return DefaultMaxOffline
	case agent <= 0, own > 0 && own < agent:
		return own
	}
	return agent
}

// maxStaleness is how long revocations hold without contact; 0: as long as policies.
func (s *Source) maxStaleness(r *policyapi.WatchResponse) time.Duration {
	agent := time.Duration(min(max(r.GetMaxRevocationStaleness(), 0), int64(mostMaxOffline/time.Second))) * time.Second
	own := s.options.MaxRevocationStaleness
	if agent == 0 || own > 0 && own < agent {
		return own
	}
	return agent
}

// refuse ends New if the first set cannot be used.
func (s *Source) refuse(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.ready:
	default:
		s.err = err
		s.settle()
	}
}

// trouble notes and logs why a stream ended.
func (s *Source) trouble(err error) {
	s.options.Log.Warn("no contact to the agent for policies; trying again", "err", err)
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.ready:
	default:
		s.err = err
	}
}

// settle lets New return. The caller holds mu.
func (s *Source) settle() {
	select {
	case <-s.ready:
	default:
		close(s.ready)
	}
}
