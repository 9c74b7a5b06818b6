// Package ca is the CA put together: the store, the authorities, the registry, the audit log, and the doors for nodes
// and operators on one TCP port and one Unix socket.
package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/status"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/adminapi"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/federation"
	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/kube/inject"
	"github.com/signet-id/signet/ca/kube/pods"
	"github.com/signet-id/signet/ca/nodeapi"
	"github.com/signet-id/signet/ca/observations"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/rotation"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/store/etcd"
	"github.com/signet-id/signet/ca/userkeys"
	"github.com/signet-id/signet/internal/durable"
	"github.com/signet-id/signet/spiffe"
)

// A CA is opened by New, serves in Run, and is closed by the end of Run or by Close.
type CA struct {
	c        Config
	td       spiffeid.TrustDomain
	log      *slog.Logger
	level    *slog.LevelVar
	store    store.Store
	opened   opened
	shared   *etcd.Store // the store, if other replicas may run on it; otherwise nil
	dirLock  io.Closer   // of data_dir, where the store itself has none
	freshAt  atomic.Pointer[time.Time]
	audit    *auditlog.Log
	keys     *keys.Ring
	set      *authority.Set
	reg      *registry.Registry
	guard    *access.Guard
	refusals *access.Refusals
	limiter  *limiter
	leaks    *leaks
	node     *nodeapi.API
	rotator  *rotation.Rotator
	poller   *federation.Poller
	userKeys *userkeys.Poller
	svid     *serverSVID

	upstream  *upstreamKeeper // nil without an upstream CA
	clusters  []*kubeCluster
	injectors []*inject.Server
	pods      *pods.Expander // nil without a cluster
	admin     *adminapi.API  // the operators' door, which custom resources go through as well
	// podRefused are told of pods that do not get what a rule would give them; they must not block. All are there before Run.
	podRefused []func(pods.Refusal)

	observations *observations.Observations    // nil: none are taken
	observers    []func(*policyv1.Observation) // told of each; they must neither block nor change it

	metrics *metrics
	health  *health.Server
	port    net.Listener
	socket  net.Listener
	tcp     *grpc.Server
	local   *grpc.Server
	web     net.Listener

	reconfigured atomic.Pointer[Config]
	stopping     atomic.Bool
	started      time.Time
	stop         chan struct{}
}

// New checks the configuration, opens everything and binds its addresses. When it returns without an error the CA is
// ready to serve; with an error nothing is left open.
func New(ctx context.Context, c Config) (ca *CA, err error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	ca = &CA{c: c, td: c.trustDomain(), level: new(slog.LevelVar), started: c.Now(), stop: make(chan struct{})}
	defer func() {
		if err != nil {
			ca.Close()
			ca = nil
		}
	}()
	ca.log = ca.logger()
	ca.reconfigured.Store(&c)
	if err := ca.bind(); err != nil {
		return ca, err
	}
	if err := durable.MkdirAll(c.DataDir, 0o750); err != nil {
		return ca, fmt.Errorf("data_dir: %w", err)
	}
	ca.metrics = newMetrics(ca)
	if err = ca.openStore(ctx); err != nil {
		return ca, err
	}
	// The store's lock keeps a second CA on this data directory from taking the socket away.
	if ca.socket, err = ca.listenAdmin(); err != nil {
		return ca, fmt.Errorf("admin_socket: %w", err)
	}
	ca.store = ca.metrics.timed(ca.opened)
	if err := ca.checkTrustDomain(ctx); err != nil {
		return ca, err
	}
	if ca.audit, err = auditlog.Open(auditlog.Config{Dir: c.Audit.Dir, Reserve: c.Audit.Reserve, MaxFileBytes: c.Audit.MaxFileBytes, Keep: c.Audit.Keep, Now: c.Now, Log: ca.log}); err != nil {
		return ca, err
	}
	ca.keys = c.Keys.ring(ca.td, ca.log)
	seal, err := ca.openSeal(ctx)
	if err != nil {
		return ca, err
	}
	driver, err := c.Upstream.open(ca.td, ca.keys, c.Now, ca.log)
	if err != nil {
		return ca, err
	}
	var above authority.Upstream
	if driver != nil {
		ca.upstream = newUpstreamKeeper(ca, driver)
		above = ca.upstream
	}
	if ca.set, err = authority.Open(ctx, authority.Config{TrustDomain: ca.td, Upstream: above, UpstreamTTL: c.Upstream.TTL, Store: ca.store, Seal: seal, Keys: ca.keys, Exclusive: !ca.replicated(), Now: c.Now, Log: ca.log,
		X509Lifetime: c.Authorities.X509Lifetime, JWTLifetime: c.Authorities.JWTLifetime, RefreshHint: c.Authorities.RefreshHint,
		DefaultX509TTL: c.TTL.X509, DefaultJWTTTL: c.TTL.JWT, MaxX509TTL: c.TTL.MaxX509, MaxJWTTTL: c.TTL.MaxJWT, Issuer: c.JWTIssuer, WIT: c.WIT.authority()}); err != nil {
		return ca, err
	}
	if ca.reg, err = registry.Open(ctx, registry.Config{TrustDomain: ca.td, Store: ca.store, Replicated: ca.replicated(), Now: c.Now, Log: ca.log,
		CheckTTL: ca.checkTTL, CheckRevokedAuthority: ca.checkRevokedAuthority, Admins: func() []spiffeid.ID { return ca.reconfigured.Load().adminIDs() }, CheckBundle: ca.checkForeignBundle, Observe: ca.observe, Relisted: ca.reloadAuthorities, OwnerGone: ca.ownerGone, Callers: ca.callersSeen}); err != nil {
		return ca, err
	}
	// What changed between the two listings reaches the authorities by this one; the watch continues it.
	if err = ca.reloadAuthorities(ctx); err != nil {
		return ca, err
	}
	if ca.upstream != nil {
		// JWT keys are known above before tokens are signed with them. If the upstream is away, they follow when it is back.
		ca.upstream.note(ctx, "publishing JWT keys", ca.upstream.publish(ctx))
	}
	ca.svid = newServerSVID(ca.td, ca.set, ca.audit, c.Now)
	ca.refusals = access.NewRefusals(ca.audit, c.Now, ca.log)
	ca.limiter = newLimiter(ca)
	ca.leaks = newLeaks(ca)
	ca.guard = &access.Guard{TrustDomain: ca.td, Registry: ca.reg, Bundles: bundles{ca.set, ca.reg}, Own: ca.set.Own(), Appended: ca.set.HasAppendedX509, OwnIssuer: ca.set.OwnIssuer, Trusted: bundles{ca.set, ca.reg}.trusted, AllowLocal: ca.allowLocal, Certificate: ca.svid.get,
		AdminIDs: func() []spiffeid.ID { return ca.reconfigured.Load().adminIDs() }, Methods: methods(), Slow: slowMethods(), Endless: endlessMethods(), Limit: ca.limiter.admit, Superseded: ca.leaks.superseded, Stale: ca.tooStale, Operator: ca.fresh, Refused: ca.refused, Now: c.Now, Log: ca.log}
	ca.rotator = rotation.New(rotation.Config{TrustDomain: ca.td, Set: ca.set, Registry: ca.reg, Audit: ca.audit, Automatic: c.Authorities.Rotate == rotateAuto,
		ActivationDeadline: c.Authorities.ActivationDeadline, RefreshHint: ca.set.Bundle().RefreshHint, Federated: ca.federated,
		Following: ca.rotationFollowers, Settle: c.settle, Now: c.Now, Log: ca.log})
	attestors, err := c.NodeAttestors.open(ctx, attestorEnv{td: ca.td, authorities: ca.set, now: c.Now, log: ca.log})
	if err != nil {
		return ca, err
	}
	ca.openObservations()
	ca.node = nodeapi.New(nodeapi.Config{Attestors: append(attestors, c.attestors...), TrustDomain: ca.td, Registry: ca.reg, Authority: ca.set, Audit: ca.audit, Refusals: ca.refusals, Guard: ca.guard, Leaks: ca.leaks,
		Epoch: ca.store.Epoch(), AgentTTL: c.TTL.Agent, Recovery: c.TTL.AgentRecovery, SyncPage: c.SyncPage,
		Observations: ca.observationsOfNodes(), MaxDownstreamTTL: c.Downstream.MaxTTL, DownstreamDepth: c.Downstream.Depth, Rotation: ca.rotator, ReissueRate: c.Authorities.ReissueRate, Now: c.Now, Log: ca.log, Issued: ca.metrics.issued})
	if ca.poller, err = newPoller(ca); err != nil {
		return ca, err
	}
	ca.observers = append(ca.observers, ca.noteDenial)
	if ca.userKeys, err = newUserKeys(ca); err != nil {
		return ca, err
	}
	if err := ca.openKubernetes(); err != nil {
		return ca, err
	}
	ca.makeServers()
	return ca, nil
}

// bundles are what client certificates must chain to: the own authorities for agents and admins, those of foreign trust
// domains for the foreign admins that the configuration names. Own authorities that were revoked are among them, so that
// who holds an SVID of one is told in its first call; trusted is what counts then.
type bundles struct {
	own     *authority.Set
	foreign *registry.Registry
}

// GetX509BundleForTrustDomain implements x509bundle.Source.
func (b bundles) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	stored, err := b.foreign.Bundle(td)
	if err != nil { // not foreign, or not known
		if td != b.own.Bundle().TrustDomain {
			return nil, err
		}
		return b.own.KnownX509(), nil
	}
	parsed, _, err := spiffe.ParseBundle(td, stored.Content)
	if err != nil {
		return nil, err
	}
	return parsed.X509Bundle(), nil
}

// trusted tells whether a chain that was verified earlier is trusted now.
func (b bundles) trusted(td spiffeid.TrustDomain, chain []*x509.Certificate) bool {
	if td == b.own.Bundle().TrustDomain {
		return b.own.Trusts(chain)
	}
	foreign, err := b.GetX509BundleForTrustDomain(td)
	return err == nil && foreign.HasX509Authority(chain[len(chain)-1])
}

// federated tells whether others fetch the bundle of whom no acknowledgement is had: the trust domains with which this one
// federates, and other servers of the same trust domain, which hand it on to agents that only they know. These are the CAs below
// this one, and those whose authorities were appended, or whose JWT keys came from above.
func (ca *CA) federated() bool {
	if len(ca.reg.Federations()) > 0 || len(ca.reg.Bundles()) > 0 || ca.reg.HasDownstream() || len(ca.set.Appended()) > 0 {
		return true
	}
	return slices.ContainsFunc(ca.set.Bundle().JWT, func(a authority.JWTAuthority) bool { return a.Origin != "" })
}

// rotationFollowers returns what is known of the agents that follow this replica.
func (ca *CA) rotationFollowers() map[spiffeid.ID]rotation.Follower {
	out := map[spiffeid.ID]rotation.Follower{}
	for id, st := range ca.node.Status() {
		out[id] = rotation.Follower{HandedOn: st.HandedOn, InUse: st.InUse}
	}
	return out
}

const trustDomainKey = "meta/trust_domain"

// checkTrustDomain writes the trust domain into a new store and refuses a store of another one.
func (ca *CA) checkTrustDomain(ctx context.Context) error {
	it, err := ca.store.Get(ctx, trustDomainKey)
	if errors.Is(err, store.ErrNotFound) {
		_, err = ca.store.Commit(ctx, []store.Check{{Key: trustDomainKey}}, []store.Write{{Key: trustDomainKey, Value: []byte(ca.td.Name())}})
		if _, lost := errors.AsType[*store.ConflictError](err); !lost {
			return err
		}
		it, err = ca.store.Get(ctx, trustDomainKey) // another replica was faster
	}
	if err != nil {
		return err
	}
	if string(it.Value) != ca.td.Name() && ca.replicated() {
		return fmt.Errorf("store.etcd.prefix %s belongs to trust domain %q, not to %q; use another prefix, or correct trust_domain", ca.c.Store.Etcd.Prefix, it.Value, ca.td.Name())
	}
	if string(it.Value) != ca.td.Name() {
		return fmt.Errorf("data_dir %s belongs to trust domain %q, not to %q; use another data_dir, or correct trust_domain", ca.c.DataDir, it.Value, ca.td.Name())
	}
	return nil
}

func (ca *CA) checkTTL(x, j time.Duration) error {
	if x != 0 {
		if err := ca.set.CheckTTL(x); err != nil {
			return err
		}
	}
	if j != 0 {
		return ca.set.CheckJWTTTL(j)
	}
	return nil
}

// observe shows each batch of the store to the authorities, and their followers the new bundle.
func (ca *CA) observe(b store.Batch) {
	before := ca.set.Bundle().Sequence
	if err := ca.set.Observe(b); err != nil {
		ca.log.Error("following the authorities' records", "err", err)
	}
	if ca.set.Bundle().Sequence != before && ca.reg != nil {
		ca.reg.OwnBundleChanged()
		if ca.rotator != nil {
			ca.rotator.BundleChanged()
		}
		ca.publishedBundleChanged()
	}
}

func (ca *CA) reloadAuthorities(ctx context.Context) error {
	var items []store.Item
	if _, err := ca.store.List(ctx, "authority/", 0, func(it store.Item) error { items = append(items, it); return nil }); err != nil {
		return err
	}
	return ca.set.Load(items)
}

// refused audits and counts callers that package access turned away.
func (ca *CA) refused(ctx context.Context, c *access.Caller, method string, err error) {
	st := status.Convert(err)
	ca.metrics.refusals.WithLabelValues(refusalReason(st)).Inc()
	ca.refusals.Record(ctx, c, auditlog.Record{Time: ca.c.Now(), Event: "call.refused", Actor: c.String(), ActorKind: c.KindName(), Outcome: auditlog.Refused,
		Details: map[string]any{"method": method, "reason": st.Message(), "address": c.Address}})
}

// refusalReason names why a call was refused: SPIRE's reason if there is one, else the code.
func refusalReason(st *status.Status) string {
	for _, d := range st.Details() {
		if p, ok := d.(*types.PermissionDeniedDetails); ok {
			return strings.ToLower(p.Reason.String())
		}
	}
	return strings.ToLower(st.Code().String())
}

func (ca *CA) following() map[spiffeid.ID]adminapi.Following {
	out := map[spiffeid.ID]adminapi.Following{}
	for id, st := range ca.node.Status() {
		out[id] = adminapi.Following{Acknowledged: st.Acknowledged, Version: st.Version, Address: st.Address, Entries: st.Entries}
	}
	return out
}

// Addr returns the TCP address that the CA listens on.
func (ca *CA) Addr() net.Addr { return ca.port.Addr() }

// AdminSocket returns the path of the admin socket.
func (ca *CA) AdminSocket() string { return ca.c.AdminSocket.Path }

// MetricsAddr returns the address of /metrics, or nil.
func (ca *CA) MetricsAddr() net.Addr {
	if ca.web == nil {
		return nil
	}
	return ca.web.Addr()
}

// Bundle returns the trust domain's bundle in SPIFFE bundle format.
func (ca *CA) Bundle() ([]byte, error) {
	return spiffe.MarshalBundle(ca.set.Bundle().SPIFFE())
}

// sweepInterval is how often agents are told of entries that ended, and what ended long ago is removed.
const sweepInterval = 10 * time.Second

func (ca *CA) maintain(ctx context.Context) error {
	t := time.NewTicker(sweepInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		ca.noteHealth()
		ended := ca.reg.NoteEnds()
		if _, err := ca.reg.Sweep(ctx); err != nil && ctx.Err() == nil {
			ca.log.Warn("removing what has ended", "err", err)
		}
		ca.expireRevocations(ctx)
		var records []auditlog.Record
		for _, e := range ended {
			records = append(records, auditlog.Record{Time: ca.c.Now(), Event: "entry.expired", Actor: registry.ServerID(ca.td).String(), ActorKind: "system",
				Subject: e.IDText(), Outcome: auditlog.Done, Details: map[string]any{"entry_id": string(e.ID)}})
		}
		if len(records) > 0 {
			if err := ca.audit.Append(ctx, auditlog.Essential, records...); err != nil {
				ca.log.Error("audit of ended entries", "err", err)
			}
		}
		ca.sweepAppended(ctx)
		ca.refusals.Flush(ctx)
		if _, err := ca.set.DropEnded(ctx); err != nil && ctx.Err() == nil {
			ca.log.Warn("removing JWT keys of downstream CAs that have ended", "err", err)
		}
		dropped, err := ca.set.DropUpstream(ctx)
		if err != nil && ctx.Err() == nil {
			ca.log.Warn("removing what the former upstream CA published", "err", err)
		}
		if dropped {
			ca.log.Info("removed what the former upstream CA published, which nothing leads to any more")
		}
		if _, err := ca.svid.get(); err != nil {
			ca.log.Error("the CA's own X509-SVID", "err", err)
		}
	}
}

// sweepAppended forgets appended authorities that ended long ago.
func (ca *CA) sweepAppended(ctx context.Context) {
	gone, err := ca.set.SweepAppended(ctx)
	if err != nil && ctx.Err() == nil {
		ca.log.Warn("removing appended authorities that ended", "err", err)
	}
	var records []auditlog.Record
	for _, x := range gone {
		records = append(records, auditlog.Record{Time: ca.c.Now(), Event: "authority.ended", Actor: registry.ServerID(ca.td).String(), ActorKind: "system",
			Subject: ca.td.IDString(), Outcome: auditlog.Done, Details: adminapi.AppendedDetails(x)})
	}
	if len(records) > 0 {
		if err := ca.audit.Append(ctx, auditlog.Essential, records...); err != nil {
			ca.log.Error("audit of appended authorities that ended", "err", err)
		}
	}
}

// Health returns nil if the CA can do its work, or what keeps it from it.
func (ca *CA) Health() error {
	if ca.stopping.Load() {
		return errors.New("shutting down")
	}
	if err := ca.storeHealth(); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if err := ca.audit.Health(); err != nil {
		if errors.Is(err, auditlog.ErrDisk) {
			return fmt.Errorf("disk: %w", err)
		}
		return fmt.Errorf("audit: %w", err)
	}
	if err := ca.set.Health(); err != nil {
		if problems := ca.upstream.problems(); len(problems) > 0 {
			return fmt.Errorf("authority: %w (%s)", err, strings.Join(problems, "; "))
		}
		return fmt.Errorf("authority: %w", err)
	}
	if err := ca.upstream.health(); err != nil {
		return err
	}
	return nil
}

// Close lets go of everything that New opened. After Run it does nothing.
func (ca *CA) Close() {
	for _, l := range []net.Listener{ca.port, ca.socket, ca.web} {
		if l != nil {
			l.Close()
		}
	}
	for _, k := range ca.clusters {
		k.client.Close()
	}
	for _, s := range ca.injectors {
		s.Close() // after Run there is nothing left to close
	}
	if ca.limiter != nil {
		ca.limiter.stop()
	}
	if ca.tcp != nil {
		ca.tcp.Stop()
	}
	if ca.local != nil {
		ca.local.Stop()
	}
	if ca.keys != nil {
		ca.keys.Close()
	}
	if ca.upstream != nil {
		if err := ca.upstream.driver.Close(); err != nil {
			ca.log.Warn("letting go of the upstream CA", "err", err)
		}
	}
	if ca.audit != nil {
		if err := ca.audit.Close(); err != nil && !errors.Is(err, auditlog.ErrClosed) {
			ca.log.Error("closing the audit log", "err", err)
		}
	}
	if ca.opened != nil {
		if err := ca.opened.Close(); err != nil && !errors.Is(err, store.ErrClosed) {
			ca.log.Error("closing the store", "err", err)
		}
	}
	if ca.dirLock != nil {
		ca.dirLock.Close()
	}
}

// Reload takes over from a new configuration what can change while running, and returns the names of the fields that
// differ and need a restart.
func (ca *CA) Reload(c Config) (needRestart []string, err error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	old := ca.reconfigured.Load()
	now := *old
	now.Logging.Level, now.AdminIDs, now.AdminSocket.UIDs, now.AdminSocket.Group = c.Logging.Level, c.AdminIDs, c.AdminSocket.UIDs, c.AdminSocket.Group
	if lv, err := c.Logging.level(); err == nil && c.Logging.Level != old.Logging.Level {
		ca.level.Set(lv) // one that was set by SetLogLevel stays otherwise
	}
	if err := now.AdminSocket.admit(); err != nil {
		return nil, fmt.Errorf("admin_socket: %w", err)
	}
	ca.reconfigured.Store(&now)
	have, want := reflect.ValueOf(now), reflect.ValueOf(c)
	for i := range have.NumField() {
		tag := have.Type().Field(i).Tag.Get("yaml")
		if tag != "-" && !reflect.DeepEqual(have.Field(i).Interface(), want.Field(i).Interface()) {
			needRestart = append(needRestart, tag)
		}
	}
	return needRestart, nil
}

func (ca *CA) logger() *slog.Logger {
	lv, _ := ca.c.Logging.level()
	ca.level.Set(lv)
	if ca.c.Log != nil {
		return ca.c.Log
	}
	o := &slog.HandlerOptions{Level: ca.level}
	if ca.c.Logging.Format == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, o))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, o))
}
