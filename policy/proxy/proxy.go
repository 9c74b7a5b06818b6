package proxy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/user"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/policy/internal/live"
)

// A Proxy is all listeners of a configuration, with the identity that they share. It holds its sockets from New on and serves while
// Run runs. Its methods may be called concurrently.
type Proxy struct {
	config   Config
	log      *slog.Logger
	level    *slog.LevelVar
	id       *identity
	metrics  *metrics
	listen   net.Listener // of the metrics; nil: none
	inbound  []*inbound
	outbound []*outbound

	draining atomic.Bool
	ready    chan struct{} // closed once everything is there for the first time
	once     sync.Once

	reloading sync.Mutex
	running   Config // what is in force; guarded by reloading
}

// errWithdrawn is why a connection ends that would not be let in any more.
var errWithdrawn = errors.New("the peer would not be let in any more")

// New listens. The configuration must be one that Check has passed.
func New(c Config) (*Proxy, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	return newProxy(c, nil)
}

// newProxy makes a proxy with an identity, or, if it is nil, the one that the agent gives.
func newProxy(c Config, id *identity) (_ *Proxy, err error) {
	p := &Proxy{config: c, running: c, level: new(slog.LevelVar), ready: make(chan struct{})}
	p.log = p.logger()
	if id == nil {
		id = &identity{addr: c.AgentSocket, maxOffline: c.MaxOffline, log: p.log, now: c.Now}
	}
	id.changed = p.changed
	p.id = id
	p.metrics = newMetrics(p)
	table := live.New(live.Config{Policies: id, Now: c.Now})
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	for i := range c.Inbound {
		l, err := p.listener(c.Inbound[i].Name, c.Inbound[i].Listen, "")
		if err != nil {
			return nil, fmt.Errorf("inbound[%d].listen: %w", i, err)
		}
		in, err := newInbound(c.Inbound[i], l, id, table, c.Now)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("inbound[%d]: %w", i, err), l.l.Close())
		}
		p.inbound = append(p.inbound, in)
	}
	for i := range c.Outbound {
		l, err := p.listener(c.Outbound[i].Name, c.Outbound[i].Listen, c.Outbound[i].SocketGroup)
		if err != nil {
			return nil, fmt.Errorf("outbound[%d].listen: %w", i, err)
		}
		p.outbound = append(p.outbound, newOutbound(c.Outbound[i], l, id, table, c.Now))
	}
	if c.Metrics.Listen != "" {
		if p.listen, err = net.Listen("tcp", c.Metrics.Listen); err != nil {
			return nil, fmt.Errorf("metrics.listen: %w", err)
		}
	}
	return p, nil
}

// Close ends a proxy that does not run.
func (p *Proxy) Close() error {
	var errs []error
	for _, l := range p.listeners() {
		errs = append(errs, l.l.Close())
	}
	if p.listen != nil {
		errs = append(errs, p.listen.Close())
	}
	return errors.Join(errs...)
}

func (p *Proxy) listeners() []*listener {
	var all []*listener
	for _, in := range p.inbound {
		all = append(all, in.listener)
	}
	for _, out := range p.outbound {
		all = append(all, out.listener)
	}
	return all
}

func (p *Proxy) fronts() []*front {
	var all []*front
	for _, in := range p.inbound {
		all = append(all, in.front)
	}
	for _, out := range p.outbound {
		all = append(all, out.front)
	}
	return slices.DeleteFunc(all, func(f *front) bool { return f == nil })
}

// listener listens, or takes the socket of that name that was passed in.
func (p *Proxy) listener(name, address, group string) (*listener, error) {
	l := &listener{name: name, log: p.log.With("listener", name), counts: p.metrics.of(name)}
	if f := p.config.Sockets[name]; f != nil {
		var err error
		l.l, err = net.FileListener(f)
		return l, err
	}
	network, addr := split(address)
	if network == "unix" {
		var err error
		l.l, err = listenUnix(addr, group)
		return l, err
	}
	config := net.ListenConfig{KeepAliveConfig: keepAlive, Control: unacknowledged}
	var err error
	l.l, err = config.Listen(context.Background(), network, addr)
	return l, err
}

// listenUnix listens on a socket that only this user, root and the group may connect to. One that a process left behind that is gone
// is removed.
func listenUnix(path, group string) (net.Listener, error) {
	gid := -1
	if group != "" {
		n, err := strconv.Atoi(group)
		if err != nil {
			g, err := user.LookupGroup(group)
			if err != nil {
				return nil, fmt.Errorf("socket_group: %w", err)
			}
			if n, err = strconv.Atoi(g.Gid); err != nil {
				return nil, fmt.Errorf("socket_group: %w", err)
			}
		}
		gid = n
	}
	if c, err := net.Dial("unix", path); err == nil {
		return nil, errors.Join(fmt.Errorf("%s is in use (is another proxy running?)", path), c.Close())
	} else if errors.Is(err, unix.ECONNREFUSED) {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("removing the socket of a process that is gone: %w", err)
		}
	}
	// Nobody may connect before the socket's mode and group are right.
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, err
	}
	if gid >= 0 {
		if err := os.Chown(path, -1, gid); err != nil {
			return nil, errors.Join(fmt.Errorf("socket_group: %w (this process's user must be in the group)", err), l.Close())
		}
		if err := os.Chmod(path, 0o660); err != nil {
			return nil, errors.Join(err, l.Close())
		}
	}
	return l, nil
}

// Run serves until ctx ends, lets connections end for DrainTimeout, and returns when every goroutine it started has ended.
func (p *Proxy) Run(ctx context.Context) error {
	// Connections outlive ctx while they drain.
	hard, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	defer p.id.closeTokens()
	g, ctx := errgroup.WithContext(ctx)
	if p.id.addr != "" {
		g.Go(func() error { return p.id.run(hard) })
	}
	var serving errgroup.Group
	for _, l := range p.listeners() {
		p.log.Info("listening", "listener", l.name, "address", l.l.Addr().String())
		serving.Go(func() error { return l.accept(hard) })
	}
	for _, f := range p.fronts() {
		serving.Go(f.run)
	}
	if p.listen != nil {
		p.log.Info("listening", "listener", "metrics", "address", p.listen.Addr().String())
		g.Go(func() error { return p.metrics.serve(ctx, p.listen, p.notReady) })
	}
	g.Go(func() error {
		p.sayWhatIsMissing(ctx)
		return nil
	})
	g.Go(func() error {
		defer cut()
		<-ctx.Done()
		p.drain()
		return serving.Wait()
	})
	return g.Wait()
}

// drain stops listening and gives what is under way time to end.
func (p *Proxy) drain() {
	p.draining.Store(true)
	ctx, cancel := context.WithTimeout(context.Background(), p.config.DrainTimeout)
	defer cancel()
	var left int64
	for _, l := range p.listeners() {
		_ = l.l.Close() // it never fails for a listener that is open
		left += l.open.Load()
	}
	p.log.Info("no new connections are taken; those that are open may end", "open", left, "drain_timeout", p.config.DrainTimeout)
	var fronts sync.WaitGroup
	for _, f := range p.fronts() {
		fronts.Go(func() { f.drain(ctx) })
	}
	fronts.Wait()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for _, l := range p.listeners() {
			l.serving.Wait()
		}
	}()
	select {
	case <-ended:
		return
	case <-ctx.Done():
	}
	for ended != nil {
		for _, in := range p.inbound {
			in.stop()
		}
		for _, out := range p.outbound {
			out.stop()
		}
		// A connection whose handshake was under way becomes one that is relayed in the meantime.
		timer := time.NewTimer(10 * time.Millisecond)
		select {
		case <-ended:
			ended = nil
		case <-timer.C:
		}
		timer.Stop()
	}
}

// changed looks whether everything is there now.
func (p *Proxy) changed() {
	if p.notReady() == "" {
		p.once.Do(func() { close(p.ready) })
	}
}

// missingEvery is how often it is looked whether something is missing. A start takes less.
const missingEvery = 3 * time.Second

// sayWhatIsMissing logs, until ctx ends, why the proxy is not ready, and that it is again.
func (p *Proxy) sayWhatIsMissing(ctx context.Context) {
	t := time.NewTicker(missingEvery)
	defer t.Stop()
	said := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		why := p.notReady()
		switch {
		case why == said:
		case why == "":
			p.log.Info("ready: nothing is missing any more")
		default:
			p.log.Warn("not ready", "missing", why)
		}
		said = why
	}
}

// Ready is closed once every listener has had an X509-SVID and policies.
func (p *Proxy) Ready() <-chan struct{} { return p.ready }

// Alive returns nil: what the proxy does for one connection waits for no other.
func (p *Proxy) Alive() error {
	p.reloading.Lock()
	defer p.reloading.Unlock()
	return nil
}

// Summary is the proxy's state in a line.
func (p *Proxy) Summary() string {
	if why := p.notReady(); why != "" {
		return "not ready: " + why
	}
	var open int64
	for _, l := range p.listeners() {
		open += l.open.Load()
	}
	return fmt.Sprintf("%d listeners, %d connections", len(p.inbound)+len(p.outbound), open)
}

// notReady says what is missing; empty: nothing is.
func (p *Proxy) notReady() string {
	if p.draining.Load() {
		return "ending"
	}
	now := p.config.Now()
	for _, in := range p.inbound {
		if problem := in.svid.problem(now); problem != "" {
			return "listener " + in.name + ": " + problem
		}
	}
	for _, out := range p.outbound {
		if problem := out.config.Load().svid.problem(now); problem != "" {
			return "listener " + out.name + ": " + problem
		}
	}
	if p.id.Policies() == nil {
		return "the agent has not given call policies to this process yet"
	}
	return ""
}

func (p *Proxy) logger() *slog.Logger {
	if p.config.Log != nil {
		return p.config.Log
	}
	if level, err := p.config.Logging.level(); err == nil {
		p.level.Set(level)
	}
	options := &slog.HandlerOptions{Level: p.level}
	if p.config.Logging.Format == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, options))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, options))
}
