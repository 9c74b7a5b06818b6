package ca

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/keepalive"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/adminapi"
	"github.com/signet-id/signet/internal/version"
)

// This file holds the servers: what they listen on, how they run and how they end.

// Limits of the port.
const (
	maxStreamsPerConn = 250
	maxRequestBytes   = 4 << 20
	// maxHeaderBytes bounds the metadata of a call. gRPC's own bound of 16 MiB is one for trusted callers.
	maxHeaderBytes   = 64 << 10
	handshakeTimeout = 10 * time.Second
	// windowBytes is what a caller may send before it is read. A fixed window saves a ping, which is to find out how large
	// it should be, in every call.
	windowBytes      = 1 << 20
	keepaliveTime    = 5 * time.Minute
	keepaliveTimeout = 20 * time.Second
	minClientPing    = 30 * time.Second
	// maxIdle ends connections on which no call is under way; an agent that follows is never idle.
	maxIdle = 5 * time.Minute
	// strangerLife is how long a connection without a client certificate lasts: an attestation is done in two minutes.
	strangerLife = 10 * time.Minute
)

// bind takes the TCP addresses before anything is made: a CA that cannot serve leaves nothing behind.
func (ca *CA) bind() error {
	var err error
	lc := net.ListenConfig{}
	if ca.port, err = lc.Listen(context.Background(), "tcp", ca.c.Listen); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	if ca.c.Metrics.Listen != "" {
		if ca.web, err = lc.Listen(context.Background(), "tcp", ca.c.Metrics.Listen); err != nil {
			return fmt.Errorf("metrics.listen: %w", err)
		}
	}
	return nil
}

// makeServers makes what will serve on the addresses.
func (ca *CA) makeServers() {
	ca.health = health.NewServer()
	ca.admin = adminapi.New(adminapi.Config{TrustDomain: ca.td, Registry: ca.reg, Authority: ca.set, Rotation: ca.rotator, Audit: ca.audit, Epoch: ca.store.Epoch(),
		Version: version.String(), Following: ca.following, OwnBundle: ca.node.OwnBundle, Refresh: ca.poller.Refresh, FederationStatus: ca.federationStatus, Observations: ca.observationsForAdmins(), Pods: ca.podsForAdmins(), LogLevel: ca.logLevel(), Canary: ca.leaks.CanaryIssued, Certificate: ca.svid.get, Started: ca.started, Now: ca.c.Now, Log: ca.log, Issued: ca.metrics.issued, Stop: ca.stop})
	common := []grpc.ServerOption{
		grpc.UnaryInterceptor(ca.guard.Unary), grpc.StreamInterceptor(ca.guard.Stream),
		grpc.MaxRecvMsgSize(maxRequestBytes), grpc.MaxHeaderListSize(maxHeaderBytes), grpc.MaxConcurrentStreams(maxStreamsPerConn), grpc.ConnectionTimeout(handshakeTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: maxIdle, Time: keepaliveTime, Timeout: keepaliveTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minClientPing, PermitWithoutStream: true}),
		grpc.InitialWindowSize(windowBytes), grpc.InitialConnWindowSize(windowBytes),
		grpc.WaitForHandlers(true),
	}
	ca.tcp = grpc.NewServer(append(slices.Clone(common), grpc.InTapHandle(ca.guard.BoundCall),
		grpc.Creds(access.LimitedCredentials{TransportCredentials: ca.guard.Credentials(), Admit: ca.limiter.connect, Enter: ca.limiter.enter, StrangerLife: strangerLife}))...)
	ca.local = grpc.NewServer(append(common, grpc.Creds(access.LocalCredentials{Allow: ca.allowLocal, Log: ca.log}))...)
	for _, s := range []*grpc.Server{ca.tcp, ca.local} {
		register(s, ca.node, ca.admin, liveHealth{ca.health, ca})
		if !ca.c.SPIREOnly {
			nodev1.RegisterNodeServer(s, ca.node)
		}
	}
}

// shutdownGrace is how long calls may take to end after the CA was told to stop.
const shutdownGrace = 5 * time.Second

// Run serves until ctx ends or a part fails, and returns only when every goroutine it started has ended and everything
// is closed.
func (ca *CA) Run(ctx context.Context) error {
	defer ca.Close()
	g, gctx := errgroup.WithContext(ctx)
	// The registry outlives the servers: a call in flight waits for its own write to be indexed.
	regCtx, regStop := context.WithCancel(context.WithoutCancel(ctx))
	defer regStop()
	regDone := make(chan error, 1)
	go func() { regDone <- ca.reg.Run(regCtx) }()
	g.Go(func() error {
		select {
		case err := <-regDone:
			regDone <- err
			if err == nil {
				err = errors.New("stopped following the store")
			}
			return err
		case <-gctx.Done():
			return nil
		}
	})
	g.Go(func() error { return serve(ca.tcp, ca.port) })
	g.Go(func() error { return serve(ca.local, ca.socket) })
	g.Go(func() error { return ca.maintain(gctx) })
	g.Go(func() error { return ca.keepFresh(gctx) })
	g.Go(func() error {
		ca.set.Prove(gctx)
		ca.noteHealth()
		return nil
	})
	if ca.upstream != nil {
		g.Go(func() error { return ca.upstream.run(gctx) })
	}
	g.Go(func() error { return ca.rotator.Run(gctx) })
	if ca.c.CRL.Enabled {
		g.Go(func() error { return (&crlKeeper{ca: ca}).run(gctx) })
	}
	if ca.observations != nil {
		g.Go(func() error {
			ca.observations.Run(gctx)
			return nil
		})
	}
	g.Go(func() error { return ca.poller.Run(gctx) })
	g.Go(func() error { return ca.userKeys.Run(gctx) })
	g.Go(func() error { return ca.moveRollouts(gctx) })
	g.Go(func() error { return ca.runPods(gctx) })
	for _, k := range ca.clusters {
		for _, part := range k.parts {
			g.Go(func() error { return part(gctx) })
		}
	}
	if ca.web != nil {
		g.Go(func() error { return ca.serveMetrics(gctx) })
	}
	g.Go(func() error {
		<-gctx.Done()
		ca.shutdown()
		return nil
	})
	ca.noteHealth()
	ca.log.Info("serving", "trust_domain", ca.td.Name(), "listen", ca.port.Addr().String(), "admin_socket", ca.c.AdminSocket.Path, "version", version.String())
	err := g.Wait()
	ca.refusals.Flush(context.WithoutCancel(ctx))
	regStop()
	<-regDone
	return err
}

func serve(s *grpc.Server, l net.Listener) error {
	if err := s.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// shutdown ends streams with Unavailable, lets calls finish, then cuts.
func (ca *CA) shutdown() {
	ca.stopping.Store(true)
	ca.health.Shutdown()
	close(ca.stop)
	ca.limiter.stop()
	ca.node.Shutdown()
	done := make(chan struct{})
	go func() {
		defer close(done)
		ca.tcp.GracefulStop()
		ca.local.GracefulStop()
	}()
	t := time.NewTimer(shutdownGrace)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
		ca.tcp.Stop()
		ca.local.Stop()
		<-done
	}
}

func (ca *CA) serveMetrics(ctx context.Context) error {
	srv := &http.Server{Handler: ca.metrics.handler(), ReadHeaderTimeout: handshakeTimeout, MaxHeaderBytes: 16 << 10}
	errc := make(chan error, 1)
	go func() { errc <- srv.Serve(ca.web) }()
	<-ctx.Done()
	sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if err := srv.Shutdown(sctx); err != nil {
		srv.Close()
	}
	if err := <-errc; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
