package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-id/signet/agent/caclient"
	"github.com/signet-id/signet/agent/nodeattest"
	"github.com/signet-id/signet/agent/svidcache"
	"github.com/signet-id/signet/spiffe"
)

const (
	retryMin = time.Second
	retryMax = 30 * time.Second
	// lookEvery is the longest time for which the wall clock is not looked at.
	lookEvery = 30 * time.Second
	// maxEvidence bounds one attestation with the gathering of its evidence.
	maxEvidence = 2 * time.Minute
)

// A node is this agent's own identity: how it is won, kept on disk, renewed and won back.
type node struct {
	config Config
	td     spiffeid.TrustDomain
	log    *slog.Logger
	dir    *nodeDir
	client *caclient.Client

	attestor nodeattest.Attestor // nil: join tokens

	record atomic.Pointer[nodeRecord] // nil before the first attestation
	status atomic.Pointer[nodeStatus]
	wonAt  atomic.Pointer[time.Time] // the last attestation, on the steady clock; nil before
	wake   chan struct{}             // one slot: the SVID or the means to attest have changed

	planned atomic.Pointer[plannedRenewal] // nil: none
	replan  chan struct{}                  // one slot: a renewal was planned
	own     func(spiffeid.ID)              // is told who the agent is when that is new; may be nil

	mu        sync.Mutex // one change of the record at a time, with its file
	attesting sync.Mutex // one attestation at a time
	bootstrap atomic.Pointer[bootstrap]
}

// A bootstrap is what the configuration says about attesting; Reload replaces it.
type bootstrap struct {
	token                 nodeattest.Secret
	tokenFile, bundleFile string
}

// A nodeStatus is the node's state in words.
type nodeStatus struct {
	state  State
	detail string
}

func openNode(c Config, log *slog.Logger) (*node, error) {
	attestor, err := c.NodeAttestation.open()
	if err != nil {
		return nil, err
	}
	dir, err := openNodeDir(c.DataDir, c.trustDomain())
	if err != nil {
		return nil, err
	}
	n := &node{attestor: attestor, config: c, td: c.trustDomain(), log: log, dir: dir, wake: make(chan struct{}, 1), replan: make(chan struct{}, 1)}
	n.setBootstrap(c)
	n.setStatus(Starting, "")
	record, err := dir.load()
	if err != nil {
		log.Error("the agent's record cannot be used; it attests afresh", "err", err)
	}
	n.record.Store(record)
	if record == nil && attestor == nil && c.JoinToken == "" && c.JoinTokenFile == "" {
		return nil, errors.Join(fmt.Errorf("join_token: missing, and data_dir %q holds no SVID from an earlier attestation; "+
			"make a token with signet token create, or configure node_attestation", c.DataDir), dir.close())
	}
	return n, nil
}

func (n *node) setBootstrap(c Config) {
	n.bootstrap.Store(&bootstrap{token: c.JoinToken, tokenFile: c.JoinTokenFile, bundleFile: c.TrustBundlePath})
	n.rouse()
}

// kind is how this node attests.
func (n *node) kind() string {
	if n.attestor == nil {
		return nodeattest.JoinToken{}.Type()
	}
	return n.attestor.Type()
}

// calm forgets what roused the node before.
func (n *node) calm() {
	select {
	case <-n.wake:
	default:
	}
}

// identity returns the agent's present SVID, or nil.
func (n *node) identity() *x509svid.SVID {
	if r := n.record.Load(); r != nil {
		return r.svid
	}
	return nil
}

// id returns the agent's own ID, or zero.
func (n *node) id() spiffeid.ID {
	if svid := n.identity(); svid != nil {
		return svid.ID
	}
	return spiffeid.ID{}
}

// GetX509BundleForTrustDomain returns the bundle by which the agent verifies its CA. It is x509bundle.Source's.
func (n *node) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	r := n.record.Load()
	if r == nil {
		return nil, errors.New("the agent has no bundle yet")
	}
	return r.bundle.GetX509BundleForTrustDomain(td)
}

// replace puts another record in the place of the present one, on disk first.
func (n *node) replace(change func(old *nodeRecord) *nodeRecord) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	r := change(n.record.Load())
	if r == nil {
		return nil
	}
	if err := n.dir.save(r); err != nil {
		return err
	}
	renewed := n.identity() != r.svid
	n.record.Store(r)
	if n.own != nil {
		n.own(r.svid.ID)
	}
	if renewed {
		n.rouse()
	}
	return nil
}

// rouse ends the sleep of a node that waits for better days.
func (n *node) rouse() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// takeBundle keeps the trust domain's new authorities. If one is gone, the CA must show again that it is still trusted; if
// the one of the agent's own SVID is tainted, the SVID is renewed with the wave.
func (n *node) takeBundle(a svidcache.Authorities) {
	authorities := a.X509
	removed := false
	err := n.replace(func(old *nodeRecord) *nodeRecord {
		if old == nil {
			return nil
		}
		next := *old
		next.bundle = x509bundle.FromX509Authorities(n.td, authorities)
		if next.bundle.Equal(old.bundle) {
			return nil
		}
		for _, c := range old.bundle.X509Authorities() {
			removed = removed || !slices.ContainsFunc(authorities, c.Equal)
		}
		return &next
	})
	if err != nil {
		n.log.Error("the bundle was not saved; after a restart the agent may not know its CA", "err", err)
	}
	if removed {
		n.client.Reconnect()
	}
	n.planRenewal(a)
}

// A plannedRenewal is the renewal of an SVID before its time.
type plannedRenewal struct {
	svid *x509svid.SVID
	at   time.Time // on the steady clock
}

// planRenewal gives the agent's own SVID its moment in the wave, if its authority is tainted.
func (n *node) planRenewal(a svidcache.Authorities) {
	svid := n.identity()
	if svid == nil {
		return
	}
	chain := svid.Certificates
	if _, tainted := a.Tainted[string(chain[len(chain)-1].AuthorityKeyId)]; !tainted {
		return
	}
	if p := n.planned.Load(); p != nil && p.svid == svid {
		return
	}
	n.planned.Store(&plannedRenewal{svid: svid, at: time.Now().Add(rand.N(a.Reissue + 1))})
	select {
	case n.replan <- struct{}{}:
	default:
	}
}

// planFor returns how long until the SVID is to be renewed although its time has not come, and whether it is to be.
func (n *node) planFor(svid *x509svid.SVID) (time.Duration, bool) {
	p := n.planned.Load()
	if p == nil || p.svid != svid {
		return 0, false
	}
	return time.Until(p.at), true
}

// run keeps the agent connected to its CA until ctx ends. Nothing that the CA says ends it.
func (n *node) run(ctx context.Context) error {
	wait := retryMin
	for ctx.Err() == nil {
		n.calm()
		if n.identity() == nil {
			n.setStatus(Attesting, "")
			if _, err := n.attest(ctx, nil); err != nil && ctx.Err() == nil {
				delay := spread(wait)
				n.setStatus(Attesting, err.Error())
				n.log.Warn("this node is not attested yet", "retry_in", delay.Round(time.Millisecond), "err", err)
				n.sleep(ctx, delay)
				wait = min(2*wait, retryMax)
			}
			continue
		}
		n.setStatus(Connecting, "")
		began := time.Now()
		err := n.client.Run(ctx)
		if err == nil {
			return nil
		}
		if time.Since(began) > retryMax {
			wait = retryMin
		}
		if u, ok := errors.AsType[*caclient.UnverifiedError](err); ok {
			wait = n.unverified(ctx, u, wait)
			continue
		}
		wait = n.denied(ctx, err, wait)
	}
	return nil
}

// unverified looks for the CA by what the configuration names to verify it, if the bundle that the agent holds does not:
// it may have been made anew. It waits if that finds none.
func (n *node) unverified(ctx context.Context, err error, wait time.Duration) time.Duration {
	record := n.record.Load()
	other, otherErr := n.otherAnchor(record)
	if other {
		if n.wonJustNow() {
			n.sleep(ctx, spread(wait))
		}
		did, attestErr := n.attest(ctx, record.svid)
		if did {
			return min(2*wait, retryMax)
		}
		otherErr = attestErr
	}
	if ctx.Err() == nil {
		delay := spread(wait)
		n.log.Warn("no connection to the CA: the bundle that the agent holds does not verify it; if it was made anew, "+n.anchorRemedy(),
			"server_address", n.config.ServerAddress, "retry_in", delay.Round(time.Millisecond), "err", errors.Join(err, otherErr))
		n.sleep(ctx, delay)
	}
	return min(2*wait, retryMax)
}

// wonJustNow says that the node has attested a moment ago; doing it again and again would only burden the CA.
func (n *node) wonJustNow() bool {
	won := n.wonAt.Load()
	return won != nil && time.Since(*won) < retryMax
}

// denied looks for a way back after the CA has refused the agent, and waits if it finds none.
func (n *node) denied(ctx context.Context, err error, wait time.Duration) time.Duration {
	var d *caclient.DeniedError
	refused := n.identity()
	if errors.As(err, &d) {
		refused = d.SVID
	}
	if d != nil && d.Reason == caclient.Banned {
		n.setStatus(Banned, err.Error())
		how := "signet agent unban"
		if n.client.Server() == caclient.SPIRE {
			how = "spire-server agent evict, after which the agent must attest again"
		}
		n.log.Error("this agent is banned: it issues nothing new and serves what it holds until it ends; an operator can end the ban with "+how,
			"retry_in", retryMax, "err", err)
		n.sleep(ctx, spread(retryMax))
		return retryMax
	}
	n.setStatus(Refused, err.Error())
	if n.wonJustNow() {
		delay := spread(wait)
		n.log.Warn("the CA refuses the SVID that it has just issued", "retry_in", delay.Round(time.Millisecond), "err", err)
		n.sleep(ctx, delay)
	}
	did, attestErr := n.attest(ctx, refused)
	if did {
		return min(2*wait, retryMax)
	}
	if ctx.Err() == nil {
		delay := spread(wait)
		n.log.Error("the CA refuses this agent, and it cannot attest again by itself; "+n.remedy(), "retry_in", delay.Round(time.Millisecond), "err", err, "attest_err", attestErr)
		n.sleep(ctx, delay)
	}
	return min(2*wait, retryMax)
}

// renew replaces the agent's SVID at half of its life, until ctx ends.
func (n *node) renew(ctx context.Context) error {
	wait := retryMin
	var due time.Time
	var of *x509svid.SVID
	for ctx.Err() == nil {
		svid := n.identity()
		if svid == nil {
			n.nap(ctx, retryMin)
			continue
		}
		if of != svid {
			of, due, wait = svid, halfLife(svid.Certificates[0], n.config.Now()), retryMin
		}
		now := n.config.Now()
		leaf := svid.Certificates[0]
		// A clock that went back leaves an SVID that is not valid yet, and the CA refuses it.
		valid := now.Before(leaf.NotAfter) && !now.Before(leaf.NotBefore)
		left := due.Sub(now)
		if planned, ok := n.planFor(svid); ok {
			left = min(left, planned)
		}
		if left > 0 && !now.Before(leaf.NotBefore) {
			n.nap(ctx, min(left, lookEvery))
			continue
		}
		err := n.renewOnce(ctx, svid)
		if err == nil || ctx.Err() != nil {
			continue
		}
		delay := spread(wait)
		if !valid {
			// The CA may see it otherwise, if it is this clock that is wrong; so both ways are tried.
			if n.reattests() {
				// That was it already.
			} else if did, attestErr := n.attest(ctx, svid); did {
				continue
			} else if !errors.Is(attestErr, errNoFreshToken) {
				err = errors.Join(err, attestErr)
			}
			n.log.Error("the agent's SVID is not valid now; if the clock is right, "+n.remedy(),
				"not_before", leaf.NotBefore, "not_after", svid.Certificates[0].NotAfter, "now", now, "retry_in", delay.Round(time.Millisecond), "err", err)
		} else if !errors.Is(err, caclient.ErrUnreachable) { // that one the client tells of
			n.log.Warn("the agent's SVID was not renewed", "not_after", svid.Certificates[0].NotAfter, "retry_in", delay.Round(time.Millisecond), "err", err)
		}
		n.nap(ctx, delay)
		wait = min(2*wait, retryMax)
	}
	return nil
}

// renewOnce replaces the SVID: by attesting again where the CA wants it so, else by asking for a new one.
func (n *node) renewOnce(ctx context.Context, old *x509svid.SVID) error {
	if n.reattests() {
		_, err := n.attest(ctx, old)
		return err
	}
	err := n.renewByKey(ctx, old)
	d, denied := errors.AsType[*caclient.DeniedError](err)
	// A CA that cannot be reached may be one that was made anew, which only trust_bundle_path verifies.
	if denied && d.Reason == caclient.MustReattest || n.attestor != nil && errors.Is(err, caclient.ErrUnreachable) {
		_, err = n.attest(ctx, old)
	}
	return err
}

// reattests says that the agent renews by attesting again.
func (n *node) reattests() bool {
	r := n.record.Load()
	return n.attestor != nil && r != nil && r.reattestable
}

// renewByKey asks for a new SVID for a new key and keeps it on disk before anything uses it: with its first use the CA
// forgets the old one.
func (n *node) renewByKey(ctx context.Context, old *x509svid.SVID) error {
	key, err := nodeattest.NewKey()
	if err != nil {
		return err
	}
	csr, err := nodeattest.CSR(key)
	if err != nil {
		return err
	}
	chain, err := n.client.RenewAgent(ctx, csr)
	if err != nil {
		return err
	}
	svid, err := readAgentSVID(n.td, chain, key)
	if err != nil {
		return fmt.Errorf("what the CA issued is unusable: %w", err)
	}
	if svid.ID != old.ID {
		return fmt.Errorf("the CA renewed %q as %q", old.ID, svid.ID)
	}
	// In the place of a good one it would lock this node out.
	now := n.config.Now()
	if begin := svid.Certificates[0].NotBefore; now.Before(begin) {
		now = begin // that clocks disagree shows at once, and passes
	}
	if _, _, err := spiffe.VerifyX509SVID(svid.Certificates, n, spiffe.X509Options{Now: now}); err != nil {
		return fmt.Errorf("what the CA issued is unusable: %w", err)
	}
	replaced := false
	err = n.replace(func(r *nodeRecord) *nodeRecord {
		if r.svid != old {
			return nil // the node has attested meanwhile
		}
		replaced = true
		next := *r
		next.svid = svid
		return &next
	})
	if err != nil || !replaced {
		return err
	}
	n.log.Info("the agent's SVID is renewed", "node_id", svid.ID.String(), "not_after", svid.Certificates[0].NotAfter)
	n.client.Reconnect()
	return nil
}

func (n *node) inSync() { n.setStatus(InSync, "") }

func (n *node) setStatus(s State, detail string) {
	n.status.Store(&nodeStatus{state: s, detail: detail})
}

// sleep waits for d, for ctx's end, or until the SVID or the means to attest have changed.
func (n *node) sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-n.wake:
	case <-ctx.Done():
	}
}

// nap waits for d, for ctx's end, or until a renewal was planned.
func (n *node) nap(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-n.replan:
	case <-ctx.Done():
	}
}

// spread returns d with jitter: half to one and a half of it.
func spread(d time.Duration) time.Duration { return d/2 + rand.N(d) }

// halfLife returns a moment about half way through what is left of a certificate's life, a tenth of it to either side.
// It does not begin at NotBefore, which CAs put back: a short life would be half over from the start.
func halfLife(c *x509.Certificate, now time.Time) time.Time {
	from := now
	if from.Before(c.NotBefore) || !from.Before(c.NotAfter) {
		from = c.NotBefore
	}
	life := c.NotAfter.Sub(from)
	return from.Add(life*9/20 + rand.N(life/10+1))
}
