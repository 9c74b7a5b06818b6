// Package agent is the node agent, put together: it proves to the CA what this node is, follows the CA's state, keeps
// X509-SVIDs and JWT-SVIDs for the node's workloads, and serves them the Workload API. The parts are in the packages
// below it and in workloadapi; here they meet. None of its states is terminal: it always looks for a way back.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/signet-id/signet/agent/adminapi"
	"github.com/signet-id/signet/agent/caclient"
	"github.com/signet-id/signet/agent/observations"
	"github.com/signet-id/signet/agent/sealed"
	"github.com/signet-id/signet/agent/svidcache"
	"github.com/signet-id/signet/agent/workloadattest"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/extauthz"
	"github.com/signet-id/signet/workloadapi"
	"github.com/signet-id/signet/workloadapi/broker"
	"github.com/signet-id/signet/workloadapi/delegated"
)

// An Agent is one node's agent. Run makes it work.
type Agent struct {
	config Config
	log    *slog.Logger
	level  *slog.LevelVar

	node       *node
	client     *caclient.Client
	cache      *svidcache.Cache
	attestor   *workloadattest.Attestor
	sealed     *sealed.Store // nil: nothing is kept
	endpoint   *workloadapi.Server
	admin      *adminapi.Server   // nil: there is no admin socket
	broker     *broker.Endpoint   // nil: there is none
	delegated  *delegated.Service // nil: there are no delegates
	extAuthz   *extauthz.Service  // nil: it is disabled
	brokerAddr net.Addr           // nil: not over TCP
	pods       broker.Pods        // nil: there is no k8s attestor

	observations *observations.Observations // nil: none are taken

	metrics *metrics
	web     net.Listener // nil: no metrics are served

	refusals *refusals
	started  time.Time
	contact  atomic.Pointer[contact] // nil: never was any

	ready     chan struct{}
	synced    chan struct{}
	syncOnce  sync.Once
	serving   atomic.Bool
	reloading sync.Mutex
	running   Config // what Reload has taken over; guarded by reloading
	closeOnce sync.Once
	closeErr  error
}

// New checks the configuration, takes the data directory and makes the socket. Whoever does not call Run calls Close.
func New(c Config) (*Agent, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	a := &Agent{
		config: c, running: c, level: new(slog.LevelVar), started: c.Now(), refusals: newRefusals(), ready: make(chan struct{}), synced: make(chan struct{}),
	}
	a.log = a.logger()
	if err := a.open(); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	return a, nil
}

// open puts the parts together.
func (a *Agent) open() error {
	c := a.config
	td := c.trustDomain()
	var err error
	if a.node, err = openNode(c, a.log); err != nil {
		return err
	}
	found := a.openCache()
	var keeper svidcache.Keeper
	if a.sealed != nil {
		keeper = a.sealed
	}
	door := &door{}
	prefetch := c.MaxPrefetch
	if c.DisablePrefetch {
		prefetch = -1
	}
	var wits svidcache.WITIssuer
	if c.WIT.Enabled {
		wits = door
	}
	a.cache, err = svidcache.New(svidcache.Config{
		TrustDomain: td, CA: door, WIT: wits, MaxPrefetch: prefetch, RegistrationWait: c.RegistrationWait, ServiceMatches: policy.ServiceMatches,
		Keeper: keeper, OnBundle: a.node.takeBundle, Log: a.log, Now: c.Now,
	})
	if err != nil {
		return err
	}
	a.client, err = caclient.New(caclient.Config{
		Address: c.ServerAddress, TrustDomain: td, Identity: a.node.identity, Bundles: a.node, Follower: a.cache,
		HeldAs: a.heldAs(found), InSync: a.inSync, Lost: a.lost, PollEvery: c.PollInterval, Version: c.Version, Log: a.log, Now: c.Now,
	})
	if err != nil {
		return err
	}
	door.client, a.node.client = a.client, a.client
	if found != nil {
		if err := a.restore(found); err != nil {
			a.log.Error("the agent begins afresh", "err", err)
		}
	}

	methods, err := c.WorkloadAttestation.open(a.log)
	if err != nil {
		return err
	}
	a.metrics = newMetrics(a)
	a.pods = podsOf(methods)
	a.metrics.attestsBy(methods)
	a.attestor, err = workloadattest.New(workloadattest.Config{Methods: methods, Enough: a.cache.Enough, Log: a.log, Now: c.Now, OnFailure: a.metrics.attestationFailed})
	if err != nil {
		return err
	}
	if c.Metrics.Listen != "" {
		if a.web, err = net.Listen("tcp", c.Metrics.Listen); err != nil {
			return fmt.Errorf("metrics.listen: %w", err)
		}
	}
	var witSource workloadapi.WITSource
	if c.WIT.Enabled {
		witSource = a.cache
	}
	envoys, err := a.envoys()
	if err != nil {
		return err
	}
	a.openObservations()
	services := []func(grpc.ServiceRegistrar, *workloadapi.Server){envoys}
	if err := a.openExtAuthz(); err != nil {
		return err
	}
	if a.extAuthz != nil {
		services = append(services, a.extAuthz.Register)
	}
	a.endpoint, err = workloadapi.New(workloadapi.Config{
		Socket: c.Sockets[SocketWorkload], Executables: c.Executables,
		Source: a.cache, WIT: witSource, Attestor: a.attestor, SocketPath: c.SocketPath, Log: a.log, Now: c.Now, JWTLeeway: c.JWTLeeway, MaxOffline: c.MaxOffline, MaxRevocationStaleness: c.MaxRevocationStaleness,
		AllowUnknownJWTHeaders: c.AllowUnknownJWTHeaders, RequireHeaderEverywhere: c.RequireHeaderEverywhere,
		AllowBundlesWithoutIdentity: c.AllowBundlesWithoutIdentity, MaxStreams: c.MaxStreams, MaxStreamsPerUID: c.MaxStreamsPerUID, MaxCallsPerSecond: c.MaxCallsPerSecond,
		OwnRates:     map[string]int{extauthz.CheckMethod: c.ExtAuthz.MaxChecksPerSecond},
		Observations: a.observationsOfWorkloads(), OnCall: a.ended, OnPush: a.metrics.push, Services: services,
	})
	if err != nil {
		return fmt.Errorf("socket_path: %w", err)
	}
	if err := a.openAdmin(); err != nil {
		return err
	}
	return a.openBroker()
}

// ended is told of the end of each call of a workload.
func (a *Agent) ended(c workloadapi.CallEnd) {
	a.metrics.call(c)
	a.refusals.note(c, time.Now())
}

// inSync is told that the CA has confirmed that the agent holds its newest state.
func (a *Agent) inSync() {
	a.node.inSync()
	a.cache.InSync()
	if was := a.contact.Load(); was == nil || !was.there {
		a.contact.Store(&contact{there: true, since: a.config.Now()})
	}
	if a.sealed != nil {
		a.sealed.InContact(true)
	}
	a.syncOnce.Do(func() { close(a.synced) })
}

// lost is told that the contact that inSync told of has ended.
func (a *Agent) lost() {
	a.cache.Offline()
	a.contact.Store(&contact{since: a.config.Now()})
	if a.sealed != nil {
		a.sealed.InContact(false)
	}
}

// Run serves until ctx ends or a part fails, and returns when everything has ended, within ten seconds: nil if that was
// because of ctx. Streams end with Unavailable, so that clients come back. It is called once.
func (a *Agent) Run(ctx context.Context) error {
	// The endpoint ends first, so that callers hear from it and not from a source that is gone.
	inner, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	a.serving.Store(true)
	a.log.Info("agent starts", "trust_domain", a.config.TrustDomain, "server_address", a.config.ServerAddress, "socket", a.config.SocketPath)
	group.Go(func() error {
		defer cancel()
		return a.serve(ctx)
	})
	group.Go(func() error { return a.cache.Run(inner) })
	if a.sealed != nil {
		group.Go(func() error { return a.sealed.Run(inner) })
	}
	if a.observations != nil {
		group.Go(func() error { // ends early, to hand on the rest while there is still a connection
			a.observations.Run(ctx)
			return nil
		})
	}
	group.Go(func() error { return a.node.run(inner) })
	group.Go(func() error { return a.node.renew(inner) })
	group.Go(func() error { return a.keepPlaces(ctx) })
	group.Go(func() error {
		select {
		case <-a.cache.Ready():
			close(a.ready)
		case <-inner.Done():
		}
		return nil
	})
	if a.web != nil {
		group.Go(func() error { return a.metrics.serve(ctx, a.web) })
	}
	err := group.Wait()
	a.log.Info("agent has stopped")
	return errors.Join(err, a.Close())
}

// serve answers on all sockets until ctx ends or one of them fails.
func (a *Agent) serve(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		defer a.serving.Store(false)
		if a.extAuthz != nil {
			defer a.extAuthz.Close()
		}
		return a.endpoint.Run(ctx)
	})
	if a.admin != nil {
		group.Go(func() error { return a.admin.Run(ctx) })
	}
	if a.broker != nil {
		group.Go(func() error { return a.broker.Run(ctx) })
	}
	return group.Wait()
}

// Ready is closed once the agent has the CA's state for the first time, be it from its sealed cache, and answers on its socket.
func (a *Agent) Ready() <-chan struct{} { return a.ready }

// Synced is closed once the CA has confirmed, in this run, that the agent holds its newest state.
func (a *Agent) Synced() <-chan struct{} { return a.synced }

// Addr is the socket's address as SPIFFE_ENDPOINT_SOCKET wants it.
func (a *Agent) Addr() string { return a.endpoint.Addr() }

// MetricsAddr is where metrics are served, or nil.
func (a *Agent) MetricsAddr() net.Addr {
	if a.web == nil {
		return nil
	}
	return a.web.Addr()
}

// Close lets go of everything that New took. Run does it by itself.
func (a *Agent) Close() error {
	a.closeOnce.Do(func() {
		var errs []error
		if a.endpoint != nil {
			errs = append(errs, a.endpoint.Close())
		}
		if a.extAuthz != nil {
			a.extAuthz.Close()
		}
		if a.admin != nil {
			errs = append(errs, a.admin.Close())
		}
		if a.broker != nil {
			errs = append(errs, a.broker.Close())
		}
		if a.delegated != nil {
			errs = append(errs, a.delegated.Close())
		}
		if a.attestor != nil {
			errs = append(errs, a.attestor.Close())
		}
		if a.web != nil {
			if err := a.web.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
				errs = append(errs, err)
			}
		}
		if a.node != nil {
			errs = append(errs, a.node.dir.close())
		}
		a.closeErr = errors.Join(errs...)
	})
	return a.closeErr
}

// Reload takes over from a new configuration what can change while running: the log level, and a fresh join token. It
// returns the names of the fields that differ and need a restart.
func (a *Agent) Reload(c Config) (needRestart []string, err error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	a.reloading.Lock()
	defer a.reloading.Unlock()
	a.running.Logging.Level = c.Logging.Level
	if level, err := c.Logging.level(); err == nil {
		a.level.Set(level)
	}
	a.running.JoinToken, a.running.JoinTokenFile, a.running.TrustBundlePath = c.JoinToken, c.JoinTokenFile, c.TrustBundlePath
	a.node.setBootstrap(c)
	have, want := reflect.ValueOf(a.running), reflect.ValueOf(c)
	for i := range have.NumField() {
		tag := have.Type().Field(i).Tag.Get("yaml")
		if tag != "-" && !reflect.DeepEqual(have.Field(i).Interface(), want.Field(i).Interface()) {
			needRestart = append(needRestart, tag)
		}
	}
	return needRestart, nil
}

func (a *Agent) logger() *slog.Logger {
	if a.config.Log != nil {
		return a.config.Log
	}
	if level, err := a.config.Logging.level(); err == nil {
		a.level.Set(level)
	}
	options := &slog.HandlerOptions{Level: a.level}
	if a.config.Logging.Format == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, options))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, options))
}
