package brokerclient

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-id/signet/spiffe"
)

// maxMessageBytes bounds what a server may send: many SVIDs, and the bundles of many trust domains.
const maxMessageBytes = 16 << 20

// Config says how a Client works.
type Config struct {
	// Addr is the endpoint's address, such as unix:///run/signet-broker/broker.sock or tcp://broker.example.com:8443. Empty
	// means the value of SPIFFE_BROKER_SOCKET.
	Addr string

	// SVID has the broker's own X509-SVID. It is asked at each handshake, so that a renewed one is used: an X509Source of
	// go-spiffe's package workloadapi is such. Required.
	SVID x509svid.Source

	// Bundles verify the server. The same X509Source will do. Required.
	Bundles x509bundle.Source

	// Server says whether the server's SPIFFE ID is the expected one: ServerID, or AnyAgent. Required.
	Server func(spiffeid.ID) error

	// RetryMin and RetryMax bound the pauses between attempts, which double each time and are spread by half to either
	// side. Zero means 500 ms and 30 s.
	RetryMin, RetryMax time.Duration

	// RetryDenied repeats calls also after PermissionDenied, for servers whose policy changes. The data is dropped all the
	// same. The standard's summary says to report and not to retry, so it is not the default.
	RetryDenied bool

	// Jitter is by how much updates that take nothing away are held back at most when they are handed on, so that many
	// workloads do not all reload at once. Zero means 2 s; negative means not at all. [Broker API §4.4]
	Jitter time.Duration

	// Log gets what is not returned: attempts that failed, messages that were discarded. Nil means nowhere.
	Log *slog.Logger

	// Now is the clock that the server's SVID is judged by. Nil means time.Now.
	Now func() time.Time
}

// ServerID expects exactly the ID, which is that of the agent on this node: signet agent status shows it.
func ServerID(want spiffeid.ID) func(spiffeid.ID) error {
	return func(id spiffeid.ID) error {
		if id != want {
			return fmt.Errorf("the Broker Endpoint's server is %q, not %q", id, want)
		}
		return nil
	}
}

// AnyAgent expects any agent of a trust domain: an ID below /spire/agent, which CAs give to nodes alone. It is weaker than
// ServerID: an agent of another node would do as well.
func AnyAgent(td spiffeid.TrustDomain) func(spiffeid.ID) error {
	return func(id spiffeid.ID) error {
		if !id.MemberOf(td) || !strings.HasPrefix(id.Path(), "/spire/agent/") {
			return fmt.Errorf("the Broker Endpoint's server is %q, no agent of trust domain %q", id, td.Name())
		}
		return nil
	}
}

// A Client is a connection to a Broker Endpoint, shared by all workloads and cut off by none of them. It is safe for
// concurrent use.
type Client struct {
	cfg    Config
	target string
	remote bool // the server may be on another host

	mu     sync.Mutex
	link   *link // the present one
	closed bool
}

// A link is one gRPC connection and the SVID that its last handshake showed.
type link struct {
	conn  *grpc.ClientConn
	api   brokerpb.APIClient
	shown atomic.Pointer[x509.Certificate]
}

// New checks the configuration. It connects when the first call is made.
func New(cfg Config) (*Client, error) {
	switch {
	case cfg.SVID == nil || cfg.Bundles == nil:
		return nil, errors.New("config of the broker client: SVID and Bundles are needed, such as an X509Source")
	case cfg.Server == nil:
		return nil, errors.New("config of the broker client: Server is nil, so that any workload of the trust domain could pose as the server; use ServerID")
	case cfg.RetryMin < 0 || cfg.RetryMax < 0 || cfg.RetryMax != 0 && cfg.RetryMax < cfg.RetryMin:
		return nil, fmt.Errorf("config of the broker client: RetryMin %s and RetryMax %s: must not be negative, and RetryMax not the smaller", cfg.RetryMin, cfg.RetryMax)
	}
	network, address, err := spiffe.ResolveBrokerEndpoint(cfg.Addr, os.Getenv)
	if err != nil {
		return nil, err
	}
	if cfg.RetryMin == 0 {
		cfg.RetryMin = 500 * time.Millisecond
	}
	if cfg.RetryMax == 0 {
		cfg.RetryMax = max(30*time.Second, cfg.RetryMin)
	}
	if cfg.Jitter == 0 {
		cfg.Jitter = 2 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	c := &Client{cfg: cfg, target: "unix:" + address}
	if network == "tcp" {
		c.target = "dns:///" + address
		host, _, _ := net.SplitHostPort(address)
		ip := net.ParseIP(host)
		c.remote = ip == nil && host != "localhost" || ip != nil && !ip.IsLoopback()
	}
	return c, nil
}

// Close closes the connection. Calls under way end.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.link == nil {
		return nil
	}
	err := c.link.conn.Close()
	c.link = nil
	return err
}

// current returns the connection, which it makes if there is none.
func (c *Client) current() (*link, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errClosed
	}
	if c.link != nil {
		return c.link, nil
	}
	l := &link{}
	conn, err := grpc.NewClient(c.target,
		grpc.WithTransportCredentials(credentials.NewTLS(c.tls(l))),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return invoke(withHeader(ctx), method, req, reply, cc, opts...)
		}),
		grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return open(withHeader(ctx), desc, cc, method, opts...)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes)),
		grpc.WithDisableServiceConfig(), // the DNS of a server says nothing about retries here
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: 10 * time.Second,
			Backoff: backoff.Config{BaseDelay: c.cfg.RetryMin, Multiplier: 2, Jitter: 0.5, MaxDelay: c.cfg.RetryMax}}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: time.Minute, Timeout: 20 * time.Second}),
	)
	if err != nil {
		return nil, fmt.Errorf("connecting to the Broker Endpoint: %w", err)
	}
	l.conn, l.api = conn, brokerpb.NewAPIClient(conn)
	c.link = l
	return l, nil
}

// withHeader adds what each call to a Broker Endpoint carries. [Broker Endpoint §3]
func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "broker.spiffe.io", "true")
}

func (c *Client) tls(l *link) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS12,
		SessionTicketsDisabled: true,
		Time:                   c.cfg.Now,
		InsecureSkipVerify:     true, // VerifyConnection verifies, by SPIFFE's rules instead of by host name
		VerifyConnection: spiffe.VerifyConnection(c.cfg.Bundles, c.cfg.Now, func(id spiffeid.ID, _ [][]*x509.Certificate) error {
			return c.cfg.Server(id)
		}),
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			svid, err := c.cfg.SVID.GetX509SVID()
			if err != nil {
				return nil, fmt.Errorf("the broker's own X509-SVID: %w", err)
			}
			l.shown.Store(svid.Certificates[0])
			cert := &tls.Certificate{PrivateKey: svid.PrivateKey}
			for _, part := range svid.Certificates {
				cert.Certificate = append(cert.Certificate, part.Raw)
			}
			return cert, nil
		},
	}
}

// renew gives up a connection whose SVID the server does not take any more. It is false while the broker has no other one:
// trying again with the same would be of no use. [Broker Endpoint §6]
func (c *Client) renew(l *link) bool {
	svid, err := c.cfg.SVID.GetX509SVID()
	if shown := l.shown.Load(); err != nil || shown != nil && svid.Certificates[0].Equal(shown) {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link == l {
		c.link = nil
		l.conn.Close()
	}
	return true
}

// A Reference names a workload.
type Reference struct {
	message proto.Message
	local   bool // it means something on this node alone
	err     error
}

// Process names a process of this node by its id, as the agent counts it.
func Process(pid int32) Reference {
	r := Reference{message: &brokerpb.WorkloadPIDReference{Pid: pid}, local: true}
	if pid <= 0 {
		r.err = fmt.Errorf("process id %d is not positive", pid)
	}
	return r
}

// Pod names a pod by namespace and name, by UID, or by both, which the server then compares.
func Pod(namespace, name, uid string) Reference {
	ref := &brokerpb.KubernetesObjectReference{Type: &brokerpb.KubernetesObjectType{Plural: "pods", Group: "core"}, Uid: uid}
	if namespace != "" || name != "" {
		ref.Key = &brokerpb.KubernetesObjectKey{Namespace: namespace, Name: name}
	}
	r := Reference{message: ref}
	switch {
	case name == "" && uid == "":
		r.err = errors.New("a pod needs a name or a UID")
	case (namespace == "") != (name == ""):
		r.err = fmt.Errorf("pod %q/%q: namespace and name go together", namespace, name)
	}
	return r
}

// Other names a workload by another message, which the server must understand. Local ones mean something on this node
// alone, and are not sent to other hosts.
func Other(message proto.Message, local bool) Reference {
	return Reference{message: message, local: local}
}

func (c *Client) pack(r Reference) (*brokerpb.WorkloadReference, error) {
	switch {
	case r.err != nil:
		return nil, r.err
	case r.message == nil:
		return nil, errors.New("the reference is empty; use Process or Pod")
	case r.local && c.remote:
		// There it would name somebody else. [Broker API §3.1.2]
		return nil, fmt.Errorf("a reference to a process of this node is not sent to %s: use the agent's Unix socket", strings.TrimPrefix(c.target, "dns:///"))
	}
	packed, err := anypb.New(r.message)
	if err != nil {
		return nil, fmt.Errorf("packing the reference: %w", err)
	}
	return &brokerpb.WorkloadReference{Reference: packed}, nil
}
