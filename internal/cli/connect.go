package cli

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/signet-id/signet/spiffe"
)

const (
	defaultCASocket  = "/run/signet/ca/admin.sock"
	envCASocket      = "SIGNET_CA_SOCKET"
	envEndpoint      = "SPIFFE_ENDPOINT_SOCKET"
	defaultTimeout   = 30 * time.Second
	identityWait     = 10 * time.Second // how long the Workload API may take to give us an identity for --server
	maxAnswer        = 16 << 20         // bytes of one message from the CA
	endpointFlagHelp = "Workload API address, such as unix:///run/signet/agent.sock (default $" + envEndpoint + ")"
)

// caFlags say how to reach the CA.
type caFlags struct {
	socket   string
	server   string
	endpoint string
	timeout  time.Duration
}

// reachesCA gives cmd the flags that say how to reach the CA.
func (a *app) reachesCA(cmd *cobra.Command) *cobra.Command {
	f := cmd.Flags()
	a.reachesSocket(cmd)
	f.StringVar(&a.ca.server, "server", "", "HOST:PORT of the CA, over mTLS as the identity that the Workload API gives")
	f.StringVar(&a.ca.endpoint, "endpoint", "", "with --server: "+endpointFlagHelp)
	exclusive(cmd, "socket", "server")
	return cmd
}

// reachesSocket adds the flags of what is served on the admin socket only.
func (a *app) reachesSocket(cmd *cobra.Command) *cobra.Command {
	f := cmd.Flags()
	f.StringVar(&a.ca.socket, "socket", "", "admin socket of the CA (default $"+envCASocket+", else "+defaultCASocket+")")
	f.DurationVar(&a.ca.timeout, "timeout", defaultTimeout, "how long to wait for the CA")
	return cmd
}

// withCA connects to the CA and runs do, which has --timeout to end.
func (a *app) withCA(ctx context.Context, do func(context.Context, *caConn) error) error {
	if a.ca.timeout <= 0 {
		return usagef("--timeout %s is not a positive duration, such as 30s", a.ca.timeout)
	}
	ctx, cancel := context.WithTimeout(ctx, a.ca.timeout)
	defer cancel()
	return a.withCAUnbounded(ctx, do)
}

// withCAByCall is withCA for what takes many calls, as large sets of documents do: each call has --timeout to end.
func (a *app) withCAByCall(ctx context.Context, do func(context.Context, *caConn) error) error {
	if a.ca.timeout <= 0 {
		return usagef("--timeout %s is not a positive duration, such as 30s", a.ca.timeout)
	}
	return a.withCAUnbounded(ctx, func(ctx context.Context, c *caConn) error {
		c.perCall = a.ca.timeout
		return do(ctx, c)
	})
}

// withCAUnbounded is withCA for streams that go on until ctx ends.
func (a *app) withCAUnbounded(ctx context.Context, do func(context.Context, *caConn) error) error {
	c, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	return do(ctx, c)
}

// A caConn is a connection to the CA that remembers why dialing went wrong, since gRPC tells it only as text.
type caConn struct {
	*grpc.ClientConn
	address string
	overTCP bool
	source  *workloadapi.X509Source // over TCP
	perCall time.Duration           // each unary call has so long, if not 0

	mu sync.Mutex // guards what follows
	// lastDial is why the newest dial went wrong; nil if it did not.
	lastDial error
	// trustDomain is the CA's own; zero until asked for.
	trustDomain spiffeid.TrustDomain
}

func (a *app) connect(ctx context.Context) (*caConn, error) {
	if a.ca.server != "" {
		return a.connectTCP(ctx)
	}
	c := &caConn{address: a.ca.socket}
	if c.address == "" {
		c.address = os.Getenv(envCASocket)
	}
	if c.address == "" {
		c.address = defaultCASocket
	}
	c.address = strings.TrimPrefix(strings.TrimPrefix(c.address, "unix://"), "unix:")
	return c, c.open("unix", c.address, insecure.NewCredentials())
}

func (a *app) connectTCP(ctx context.Context) (*caConn, error) {
	if _, _, err := net.SplitHostPort(a.ca.server); err != nil {
		return nil, usagef("--server %q is not of the form HOST:PORT", a.ca.server)
	}
	options, err := endpointOptions(a.ca.endpoint)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, identityWait)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(options...))
	if err != nil {
		return nil, withHint(fmt.Errorf("asking the Workload API for the identity to use with --server: %w", err),
			"is an agent running at $%s (or --endpoint), and has it an entry for you? 'signet svid fetch x509' shows", envEndpoint)
	}
	c := &caConn{address: a.ca.server, overTCP: true, source: source}
	svid, err := source.GetX509SVID()
	if err != nil {
		source.Close()
		return nil, fmt.Errorf("choosing the identity to use with --server: %w", err)
	}
	c.trustDomain = svid.ID.TrustDomain()
	server, err := spiffeid.FromPath(c.trustDomain, "/spire/server")
	if err != nil {
		source.Close()
		return nil, err
	}
	conf := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(server))
	conf.MinVersion = tls.VersionTLS13
	if err := c.open("tcp", a.ca.server, credentials.NewTLS(conf)); err != nil {
		source.Close()
		return nil, err
	}
	return c, nil
}

func (c *caConn) open(network, address string, creds credentials.TransportCredentials) error {
	dialer := &net.Dialer{Timeout: 10 * time.Second}
	conn, err := grpc.NewClient("passthrough:///signet-ca",
		grpc.WithTransportCredentials(&rememberingCredentials{TransportCredentials: creds, conn: c}),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, address)
			c.remember(err)
			return conn, err
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithDisableServiceConfig(),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			if c.perCall > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, c.perCall)
				defer cancel()
			}
			return invoke(ctx, method, req, reply, cc, opts...)
		}),
	)
	if err != nil {
		return fmt.Errorf("connecting to the CA at %q: %w", address, err)
	}
	c.ClientConn = conn
	return nil
}

// rememberingCredentials note a failed TLS handshake as a failed dial.
type rememberingCredentials struct {
	credentials.TransportCredentials
	conn *caConn
}

func (r *rememberingCredentials) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := r.TransportCredentials.ClientHandshake(ctx, authority, raw)
	r.conn.remember(err)
	return conn, info, err
}

func (r *rememberingCredentials) Clone() credentials.TransportCredentials {
	return &rememberingCredentials{TransportCredentials: r.TransportCredentials.Clone(), conn: r.conn}
}

func (c *caConn) remember(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lastDial = err
}

func (c *caConn) dialError() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lastDial
}

// Close ends the connection and forgets the identity it was made with.
func (c *caConn) Close() {
	c.ClientConn.Close()
	if c.source != nil {
		c.source.Close()
	}
}

// unreachable explains why there is no connection.
func (c *caConn) unreachable(cause error) error {
	if c.overTCP {
		return withHint(fmt.Errorf("the CA at %q cannot be reached: %w", c.address, cause),
			"check the address, and that the CA of trust domain %s listens there", c.trustDomain)
	}
	err := fmt.Errorf("the CA's admin socket %q cannot be reached: %w", c.address, cause)
	switch {
	case errors.Is(cause, fs.ErrNotExist):
		return withHint(err, "is the CA running on this host? --socket or $%s names its socket; 'signet dev' starts one to try", envCASocket)
	case errors.Is(cause, syscall.ECONNREFUSED):
		return withHint(err, "the socket is left over from a CA that no longer runs: start it with 'signet ca run --config FILE'")
	case errors.Is(cause, fs.ErrPermission):
		return withHint(err, "run this as root, as the CA's own user, or as a user of admin_socket in the CA's configuration")
	}
	return err
}

// ownTrustDomain asks the CA for its trust domain, once.
func (c *caConn) ownTrustDomain(ctx context.Context) (spiffeid.TrustDomain, error) {
	c.mu.Lock()
	td := c.trustDomain
	c.mu.Unlock()
	if !td.IsZero() {
		return td, nil
	}
	bundle, err := bundlev1.NewBundleClient(c).GetBundle(ctx, &bundlev1.GetBundleRequest{OutputMask: &types.BundleMask{}})
	if err != nil {
		return td, caError("asking the CA for its trust domain", c, err)
	}
	if td, err = spiffe.ParseTrustDomain(bundle.GetTrustDomain()); err != nil {
		return td, fmt.Errorf("the CA names its trust domain %q: %w", bundle.GetTrustDomain(), err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.trustDomain = td
	return td, nil
}

// id parses an ID that may be written relative to the CA's trust domain, such as /web.
func (c *caConn) id(ctx context.Context, flag, s string) (spiffeid.ID, error) {
	if strings.HasPrefix(s, "/") {
		td, err := c.ownTrustDomain(ctx)
		if err != nil {
			return spiffeid.ID{}, err
		}
		s = td.IDString() + s
	}
	return fullID(flag, s)
}

// fullID parses an ID that is written out.
func fullID(flag, s string) (spiffeid.ID, error) {
	id, err := spiffe.ParseWorkloadID(s)
	if err != nil {
		return spiffeid.ID{}, &usageError{err: fmt.Errorf("%s: %w", flag, err), hint: "an ID looks like spiffe://example.org/web, or /web for the CA's own trust domain"}
	}
	return id, nil
}

// wireID is id for a field of a request.
func (c *caConn) wireID(ctx context.Context, flag, s string) (*types.SPIFFEID, error) {
	id, err := c.id(ctx, flag, s)
	if err != nil {
		return nil, err
	}
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}, nil
}

// idString writes an ID of the wire; what is wrong in it stays visible.
func idString(id *types.SPIFFEID) string {
	if id == nil {
		return ""
	}
	return "spiffe://" + id.GetTrustDomain() + id.GetPath()
}

// endpointOptions turn --endpoint, or the environment, into options of the Workload API client.
func endpointOptions(flag string) ([]workloadapi.ClientOption, error) {
	address := flag
	if address == "" {
		address = os.Getenv(envEndpoint)
	}
	if address == "" {
		return nil, &usageError{err: fmt.Errorf("no Workload API address: neither --endpoint nor $%s is set", envEndpoint),
			hint: "for example: export " + envEndpoint + "=unix:///run/signet/agent.sock"}
	}
	if _, _, err := spiffe.ParseEndpoint(address); err != nil {
		return nil, &usageError{err: err, hint: "--endpoint, or $" + envEndpoint + ", is such as unix:///run/signet/agent.sock"}
	}
	return []workloadapi.ClientOption{workloadapi.WithAddr(address)}, nil
}
