// Package dev runs a real CA and a real agent in one process, talking over real mTLS on loopback, for development,
// demonstrations and tests. It needs no root and no configuration, and keeps its state in one directory.
package dev

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/signet-id/signet/agent"
	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/internal/durable"
	"github.com/signet-id/signet/internal/version"
)

// Config says what to run. The zero value of a field is its default.
type Config struct {
	// Dir holds the state, D/ca.sock, D/agent.sock, D/admin.sock (the agent's) and D/bundle.pem. It is made with mode 0700 if it does not exist.
	Dir string
	// TrustDomain is example.org by default. It cannot be changed for a directory that has state.
	TrustDomain string
	// Listen is the CA's address, 127.0.0.1:0 by default: a free port, remembered over restarts where possible.
	Listen string
	// NodeGroups are the groups of the one node, which Identities may name with `on: [node:group:G]`.
	NodeGroups []string
	// CA and Agent change the configurations before they are used. Nil: as they are.
	CA    func(*ca.Config)
	Agent func(*agent.Config)
	Now   func() time.Time
	Log   *slog.Logger // nil: discarded
}

// An Instance is a CA and an agent that serve. Close ends both.
type Instance struct {
	c  Config
	td spiffeid.TrustDomain

	mu    sync.Mutex // guards what a restart of the agent or the CA replaces
	ca    *running[*ca.CA]
	agent *running[*agent.Agent]
}

// running is a daemon under its own context.
type running[T any] struct {
	daemon T
	stop   context.CancelFunc
	done   chan struct{}
	err    error
}

func run[T interface{ Run(context.Context) error }](d T) *running[T] {
	ctx, cancel := context.WithCancel(context.Background())
	r := &running[T]{daemon: d, stop: cancel, done: make(chan struct{})}
	go func() {
		defer close(r.done)
		r.err = d.Run(ctx)
	}()
	return r
}

// readyTimeout bounds how long the agent may take to attest and synchronise.
const readyTimeout = 30 * time.Second

// Start starts both and returns when the agent holds the CA's state, so that workloads can be served.
func Start(ctx context.Context, c Config) (*Instance, error) {
	if c.Dir == "" {
		return nil, errors.New("dir is missing")
	}
	dir, err := filepath.Abs(c.Dir)
	if err != nil {
		return nil, err
	}
	c.Dir = dir
	if c.TrustDomain == "" {
		c.TrustDomain = "example.org"
	}
	if c.Listen == "" {
		c.Listen = rememberedAddress(dir)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("dir: %w", err)
	}
	i := &Instance{c: c}
	if err := i.startCA(ctx); err != nil {
		return nil, err
	}
	if err := i.startAgent(ctx); err != nil {
		i.Close()
		return nil, err
	}
	return i, nil
}

const addressFile = "ca.address"

// rememberedAddress is the port of the last run if it is free, so that agents elsewhere find the CA again.
func rememberedAddress(dir string) string {
	const any = "127.0.0.1:0"
	b, err := durable.ReadFile(filepath.Join(dir, addressFile), 256)
	if err != nil {
		return any
	}
	addr := strings.TrimSpace(string(b))
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return any
	}
	l.Close()
	return addr
}

func (i *Instance) caConfig() ca.Config {
	d := i.c.Dir
	c := ca.Config{TrustDomain: i.c.TrustDomain, Listen: i.c.Listen, DataDir: filepath.Join(d, "ca"),
		AdminSocket: ca.AdminSocket{Path: i.CASocket()}, Seal: ca.Seal{KeyFile: filepath.Join(d, "seal.key"), Create: true}, Now: i.c.Now, Log: i.c.Log}
	if i.c.CA != nil {
		i.c.CA(&c)
	}
	return c
}

func (i *Instance) startCA(ctx context.Context) error {
	c, err := ca.New(ctx, i.caConfig())
	if err != nil {
		return fmt.Errorf("CA: %w", err)
	}
	doc, err := c.Bundle()
	if err != nil {
		c.Close()
		return fmt.Errorf("CA: %w", err)
	}
	if err := i.writeFiles(c.Addr().String(), doc); err != nil {
		c.Close()
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.c.Listen = c.Addr().String()
	i.ca = run(c)
	return nil
}

// writeFiles writes the bundle and the address for whoever wants to attach another agent.
func (i *Instance) writeFiles(addr string, doc []byte) error {
	td, err := spiffeid.TrustDomainFromString(i.c.TrustDomain)
	if err != nil {
		return err
	}
	i.td = td
	b, err := spiffebundle.Parse(td, doc)
	if err != nil {
		return err
	}
	var out []byte
	for _, cert := range b.X509Authorities() {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	if err := durable.WriteFile(i.BundlePath(), out, 0o644); err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(i.c.Dir, addressFile), []byte(addr+"\n"), 0o600)
}

// startAgent starts the agent. Its first attestation uses a join token that is made here, through the admin socket,
// as an operator would.
func (i *Instance) startAgent(ctx context.Context) error {
	dir := filepath.Join(i.c.Dir, "agent")
	c := agent.Config{TrustDomain: i.c.TrustDomain, ServerAddress: i.CAAddr(), DataDir: dir, SocketPath: i.AgentSocket(),
		TrustBundlePath: i.BundlePath(), JoinTokenFile: filepath.Join(i.c.Dir, "join.token"),
		AdminSocket: agent.AdminSocket{Path: i.AgentAdminSocket(), AllowBesideSocket: true}, Version: version.String(), Now: i.c.Now, Log: i.c.Log}
	if err := i.freshToken(ctx, c.JoinTokenFile); err != nil {
		return err
	}
	if i.c.Agent != nil {
		i.c.Agent(&c)
	}
	a, err := agent.New(c)
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	r := run(a)
	t := time.NewTimer(readyTimeout)
	defer t.Stop()
	select {
	case <-a.Synced():
	case <-r.done:
		return fmt.Errorf("agent: %w", r.err)
	case <-ctx.Done():
		err = ctx.Err()
	case <-t.C:
		err = fmt.Errorf("not ready after %v", readyTimeout)
	}
	if err != nil {
		r.stop()
		<-r.done
		return fmt.Errorf("agent: %w", err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.agent = r
	return nil
}

// freshToken writes a join token that the agent takes if it must attest: on the first start, or when the SVID that it
// kept has expired.
func (i *Instance) freshToken(ctx context.Context, path string) error {
	conn, err := i.Admin()
	if err != nil {
		return err
	}
	defer conn.Close()
	r, err := adminv1.NewAdminClient(conn).CreateJoinToken(ctx, &adminv1.CreateJoinTokenRequest{NodeGroups: i.c.NodeGroups})
	if err != nil {
		return fmt.Errorf("join token: %w", err)
	}
	return durable.WriteFile(path, []byte(r.Token), 0o600)
}

// Admin connects to the CA's admin socket. The caller closes the connection.
func (i *Instance) Admin() (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+i.CASocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// CASocket, AgentSocket, AgentAdminSocket and BundlePath are the files that an Instance serves under its directory.
func (i *Instance) CASocket() string         { return filepath.Join(i.c.Dir, "ca.sock") }
func (i *Instance) AgentSocket() string      { return filepath.Join(i.c.Dir, "agent.sock") }
func (i *Instance) AgentAdminSocket() string { return filepath.Join(i.c.Dir, "admin.sock") }
func (i *Instance) BundlePath() string       { return filepath.Join(i.c.Dir, "bundle.pem") }

// WorkloadAPI is the value of SPIFFE_ENDPOINT_SOCKET for workloads.
func (i *Instance) WorkloadAPI() string { return "unix://" + i.AgentSocket() }

// CAAddr is the CA's TCP address.
func (i *Instance) CAAddr() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.c.Listen
}

// TrustDomain returns the trust domain.
func (i *Instance) TrustDomain() spiffeid.TrustDomain { return i.td }

// CA and Agent return the running daemons.
func (i *Instance) CA() *ca.CA {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.ca.daemon
}

// Agent returns the running agent.
func (i *Instance) Agent() *agent.Agent {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.agent.daemon
}

// Roots reads the X.509 authorities from the bundle file.
func (i *Instance) Roots() ([]*x509.Certificate, error) {
	b, err := os.ReadFile(i.BundlePath())
	if err != nil {
		return nil, err
	}
	var out []*x509.Certificate
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, cert)
	}
	return out, nil
}

// StopAgent ends the agent and StopCA the CA, as SIGTERM would.
func (i *Instance) StopAgent() error { return halt(&i.mu, &i.agent) }

// StopCA ends the CA.
func (i *Instance) StopCA() error { return halt(&i.mu, &i.ca) }

func halt[T any](mu *sync.Mutex, r **running[T]) error {
	mu.Lock()
	was := *r
	*r = nil
	mu.Unlock()
	if was == nil {
		return nil
	}
	was.stop()
	<-was.done
	return was.err
}

// RestartAgent and RestartCA start again what was stopped, on the same state and address.
func (i *Instance) RestartAgent(ctx context.Context) error {
	if err := i.StopAgent(); err != nil {
		return err
	}
	return i.startAgent(ctx)
}

// RestartCA stops the CA if it runs and starts it again.
func (i *Instance) RestartCA(ctx context.Context) error {
	if err := i.StopCA(); err != nil {
		return err
	}
	return i.startCA(ctx)
}

// Wait returns when ctx ends or one of the two ends by itself, which is an error.
func (i *Instance) Wait(ctx context.Context) error {
	i.mu.Lock()
	c, a := i.ca, i.agent
	i.mu.Unlock()
	ended := func(what string, done chan struct{}, err *error) func() error {
		return func() error {
			select {
			case <-ctx.Done():
				return nil
			case <-done:
				return fmt.Errorf("%s ended: %w", what, *err)
			}
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	ctx = gctx
	g.Go(ended("CA", c.done, &c.err))
	g.Go(ended("agent", a.done, &a.err))
	return g.Wait()
}

// Close ends the agent, then the CA, and waits for both.
func (i *Instance) Close() error { return errors.Join(i.StopAgent(), i.StopCA()) }
