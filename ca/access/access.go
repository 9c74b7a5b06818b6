// Package access says who calls the CA and whether they may: it makes the TLS configuration of the port, identifies the
// caller of each RPC, and holds the table of which kind of caller may call what. It never answers an RPC itself.
//
// Every RPC is judged anew: the certificate's expiry, and for agents the serial number and the ban, so that a
// connection that outlives its rights is of no use. [DESIGN §4, SPIRE-PROTOCOL §4, §10]
package access

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

// A Kind is what a caller is allowed to be. One caller can be several: an agent's ID may also be an admin's.
type Kind uint8

// The kinds of callers.
const (
	Anyone     Kind = 1 << iota // no certificate needed
	Agent                       // the current SVID of an attested agent
	Local                       // an admin on the admin Unix socket
	Admin                       // an admin by X509-SVID
	Downstream                  // a CA below this one, by the X509-SVID of an entry that an operator made for it
)

// A Caller is who calls an RPC.
type Caller struct {
	Kind    Kind        // every kind that was established
	ID      spiffeid.ID // zero for local and anonymous callers
	Serial  string      // decimal; agents and admins
	Expires time.Time   // of the SVID that was presented
	UID     uint32      // local callers
	gid     uint32
	groups  []uint32
	Address string
	Node    *registry.Node // agents, as of the start of the RPC

	appended bool // its SVID is of this trust domain, but this CA did not sign it
	// Revoked is the ID of an SVID that was presented although its authority was revoked. ID is zero then: it proves nothing.
	Revoked spiffeid.ID

	chains [][]*x509.Certificate // from the SVID to authorities, as they were verified
}

// String names the caller in the audit log.
func (c *Caller) String() string {
	switch {
	case !c.ID.IsZero():
		return c.ID.String()
	case c.Kind&Local != 0:
		return fmt.Sprintf("uid:%d", c.UID)
	}
	return "anonymous"
}

// AuthorityIDs returns the id of the X.509 authority that signed the caller's SVID, as a list of one; of none if there is no
// SVID.
func (c *Caller) AuthorityIDs() []string {
	for _, chain := range c.chains {
		return []string{hex.EncodeToString(chain[0].AuthorityKeyId)}
	}
	return nil
}

// Place is the host that the caller calls from: its address without the port.
func (c *Caller) Place() string {
	if host, _, err := net.SplitHostPort(c.Address); err == nil {
		return host
	}
	return c.Address
}

// KindName names how the caller was identified.
func (c *Caller) KindName() string {
	switch {
	case c.Kind&Local != 0:
		return "local"
	case c.Kind&Admin != 0:
		return "admin"
	case c.Kind&Agent != 0:
		return "agent"
	case c.Kind&Downstream != 0:
		return "downstream"
	}
	return "anonymous"
}

type callerKey struct{}

// From returns the caller of the RPC that ctx belongs to. It is never nil inside an RPC that passed the interceptors.
func From(ctx context.Context) *Caller {
	c, _ := ctx.Value(callerKey{}).(*Caller)
	if c == nil {
		c = &Caller{}
	}
	return c
}

// A Guard judges callers.
type Guard struct {
	TrustDomain spiffeid.TrustDomain
	Registry    *registry.Registry
	// Bundles returns the authorities that client certificates must chain to. There may be some among them that are
	// revoked: then the caller is told so instead of being cut off in the handshake.
	Bundles x509bundle.Source
	// Own are the authorities of this trust domain that are this CA's own, and Appended tells whether Bundles holds others
	// of it. What those signed passes the handshake, so that its owner can be told what to do, and has no rights here: who
	// holds an appended key could otherwise make himself any agent or admin.
	Own      x509bundle.Source
	Appended func() bool
	// OwnIssuer tells whether an issuer's certificate is of an authority of this CA, and not of one above or below it.
	OwnIssuer func(*x509.Certificate) bool
	// Trusted tells whether a chain, from an SVID of td to the authority it was verified with, is trusted now. It is asked in
	// every RPC, for an authority can be revoked while a connection lasts.
	Trusted func(td spiffeid.TrustDomain, chain []*x509.Certificate) bool
	// Certificate returns the CA's own SVID with its authority.
	Certificate func() (*tls.Certificate, error)
	// AdminIDs are admins besides those whom an entry makes one.
	AdminIDs func() []spiffeid.ID
	// AllowLocal tells whether a local caller is still an admin: the configuration can change under a connection.
	AllowLocal func(uid, gid uint32, groups []uint32) bool
	// Methods says who may call what, by full method name. What is not in it is refused.
	Methods map[string]Kind
	// Slow are methods that take a stranger longer than a moment, and Endless those that last for as long as their caller
	// likes; see BoundCall.
	Slow, Endless map[string]bool
	// StrangerCall is how long a call of a stranger may take. Zero: strangerCall.
	StrangerCall time.Duration
	// Limit takes what a call of a caller on the network costs from their allowance, waits, or refuses. The caller has been
	// identified and nothing else has been found out about them: this comes before what costs. req is nil for streams. A nil
	// Limit lets everything through.
	Limit func(ctx context.Context, c *Caller, method string, req any) error
	// Superseded is told of a call with an agent's X509-SVID that another one has replaced, from where the agent was not when
	// it was replaced: the agent, or its SVID, is in two places. Nil: nobody.
	Superseded func(ctx context.Context, c *Caller, n *registry.Node)
	// Stale returns why this replica must not judge agents: it may not know what others have committed. Nil: it always knows.
	Stale func() error
	// Operator is called before each call of an admin, with a chance to catch up with what other replicas have committed. Nil:
	// there are none.
	Operator func(ctx context.Context, c *Caller)
	// Refused is told of each refusal, for audit and metrics.
	Refused func(ctx context.Context, c *Caller, method string, err error)
	Now     func() time.Time
	Log     *slog.Logger
}

// tlsConfig returns the configuration of one connection to the port: TLS 1.3, no session tickets (so that every
// handshake is judged by the bundle of now), client certificates requested but not required, and verified if presented.
// verified is told how the client's leads to authorities. [DESIGN §4]
func (g *Guard) tlsConfig(verified func([][]*x509.Certificate)) *tls.Config {
	verify := spiffe.VerifyPeer(g.Bundles, g.Now, func(id spiffeid.ID, chains [][]*x509.Certificate) error {
		switch {
		case id.TrustDomain() != g.TrustDomain && !g.listed(id):
			return fmt.Errorf("client %s is not of trust domain %s", id, g.TrustDomain)
		case id.TrustDomain() == g.TrustDomain && !g.issuedHere(chains) && g.belowOwn(chains):
			// A CA below this one can sign any ID of the trust domain, an admin's and an agent's too. Here such an SVID
			// opens no door, so that who steals that CA's key cannot command this one. [docs/decisions]
			g.Log.Warn("refused a client whose X509-SVID was issued by another CA of the trust domain", "spiffe_id", id.String())
			return fmt.Errorf("the X509-SVID of client %s was issued by another CA of the trust domain, not by this one", id)
		}
		verified(chains)
		return nil
	})
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"h2"},
		SessionTicketsDisabled: true,
		ClientAuth:             tls.RequestClientCert,
		Time:                   g.Now,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return g.Certificate() },
		VerifyPeerCertificate: func(raw [][]byte, chains [][]*x509.Certificate) error {
			if len(raw) == 0 {
				return nil
			}
			return verify(raw, chains)
		},
	}
}

// issuedHere tells whether a leaf was signed by an authority of this CA itself.
func (g *Guard) issuedHere(chains [][]*x509.Certificate) bool {
	for _, chain := range chains {
		if len(chain) > 1 && g.OwnIssuer(chain[1]) {
			return true
		}
	}
	return false
}

// belowOwn tells whether a chain leads to a root of this CA; others are of appended authorities.
func (g *Guard) belowOwn(chains [][]*x509.Certificate) bool {
	own, err := g.Own.GetX509BundleForTrustDomain(g.TrustDomain)
	if err != nil {
		return true
	}
	for _, chain := range chains {
		if own.HasX509Authority(chain[len(chain)-1]) {
			return true
		}
	}
	return false
}

func (g *Guard) listed(id spiffeid.ID) bool {
	for _, a := range g.AdminIDs() {
		if a == id {
			return true
		}
	}
	return false
}

// Unary is the interceptor for unary RPCs.
func (g *Guard) Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, err := g.admit(ctx, info.FullMethod, req)
	if err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

// Stream is the interceptor for streaming RPCs.
func (g *Guard) Stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, err := g.admit(ss.Context(), info.FullMethod, nil)
	if err != nil {
		return err
	}
	return handler(srv, &stream{ss, ctx, g, info.FullMethod})
}

type stream struct {
	grpc.ServerStream
	ctx    context.Context
	guard  *Guard
	method string
}

// SendMsg judges the caller anew: a stream can outlive the rights with which it was opened.
func (s *stream) SendMsg(m any) error {
	c := *From(s.ctx)
	if c.Kind&(Admin|Local) != 0 { // who follows as an agent is judged by Follow itself
		c.Kind &^= Admin
		if err := s.guard.authorize(s.ctx, &c, s.method); err != nil {
			return err
		}
	}
	return s.ServerStream.SendMsg(m)
}

func (s *stream) Context() context.Context { return s.ctx }

func (g *Guard) admit(ctx context.Context, method string, req any) (context.Context, error) {
	c, err := g.identify(ctx)
	if err == nil && g.Limit != nil && c.Kind&Local == 0 {
		if err := g.Limit(ctx, c, method, req); err != nil {
			return nil, err // told of by whoever counts: a flood must not fill the audit log
		}
	}
	if err == nil {
		err = g.authorize(ctx, c, method)
	}
	if err != nil {
		if g.Refused != nil {
			g.Refused(ctx, c, method, err)
		}
		return nil, err
	}
	if g.Operator != nil && c.Kind&(Admin|Local) != 0 {
		g.Operator(ctx, c)
	}
	return context.WithValue(ctx, callerKey{}, c), nil
}

// identify finds out who calls, without judging whether they may.
func (g *Guard) identify(ctx context.Context) (*Caller, error) {
	c := &Caller{Kind: Anyone}
	p, ok := peer.FromContext(ctx)
	if !ok {
		return c, status.Error(codes.Unauthenticated, "no transport")
	}
	if p.Addr != nil {
		c.Address = p.Addr.String()
	}
	switch info := p.AuthInfo.(type) {
	case LocalInfo:
		c.Kind, c.UID, c.gid, c.groups, c.Address = Local|Anyone, info.UID, info.GID, info.Groups, "unix"
	case tlsInfo:
		if len(info.State.PeerCertificates) == 0 {
			return c, nil
		}
		leaf := info.State.PeerCertificates[0]
		id, err := spiffe.IDFromCertificate(leaf)
		if err != nil {
			return c, status.Errorf(codes.Unauthenticated, "client certificate: %v", err)
		}
		c.ID, c.Serial, c.Expires, c.chains = id, leaf.SerialNumber.String(), leaf.NotAfter, info.chains
		if id.TrustDomain() == g.TrustDomain && g.Appended() {
			_, _, err := spiffe.VerifyX509SVID(info.State.PeerCertificates, g.Own, spiffe.X509Options{Now: g.Now()})
			c.appended = err != nil
		}
		if !g.trusted(c) {
			c.ID, c.Revoked = spiffeid.ID{}, id
		}
	default:
		return c, status.Error(codes.Unauthenticated, "unknown transport")
	}
	return c, nil
}

// authorize decides whether c may call method, and completes c.
func (g *Guard) authorize(ctx context.Context, c *Caller, method string) error {
	allowed := g.Methods[method]
	denied := status.Errorf(codes.PermissionDenied, "authorization denied for method %s", method)
	if c.Kind&Local != 0 && !g.AllowLocal(c.UID, c.gid, c.groups) {
		return denied // was an admin when it connected
	}
	if allowed&c.Kind != 0 {
		return nil
	}
	if !c.Revoked.IsZero() {
		return revoked(c.Revoked)
	}
	if c.ID.IsZero() {
		return denied
	}
	if !g.trusted(c) { // revoked during a stream
		return revoked(c.ID)
	}
	if err := g.revokedSVID(c); err != nil {
		return err
	}
	if g.Now().After(c.Expires) {
		return Denied(types.PermissionDeniedDetails_AGENT_EXPIRED, "X509-SVID of %s has expired", c.ID)
	}
	if c.appended {
		if allowed&Agent != 0 && registry.IsAgentID(c.ID) {
			return attestedElsewhere(c.ID)
		}
		return denied
	}
	if allowed&Admin != 0 && (g.listed(c.ID) || c.ID.TrustDomain() == g.TrustDomain && g.Registry.IsAdmin(c.ID)) {
		c.Kind |= Admin
		return nil
	}
	if allowed&Agent != 0 && c.ID.TrustDomain() == g.TrustDomain && registry.IsAgentID(c.ID) {
		n, err := g.checkAgent(ctx, c, g.Superseded)
		if err != nil {
			return err
		}
		c.Kind |= Agent
		c.Node = n
		return nil
	}
	if allowed&Downstream != 0 && c.ID.TrustDomain() == g.TrustDomain {
		switch ok, err := g.isDownstream(ctx, c.ID); {
		case err != nil:
			return err
		case ok:
			c.Kind |= Downstream
			return nil
		}
	}
	return denied
}

// isDownstream tells whether an operator made id that of a downstream CA. A no is never given from an index that may lag.
func (g *Guard) isDownstream(ctx context.Context, id spiffeid.ID) (bool, error) {
	if g.Registry.IsDownstream(id) {
		return true, nil
	}
	if _, err := g.Registry.Barrier(ctx); err != nil {
		g.Log.Error("looking for the entry of a downstream CA", "spiffe_id", id.String(), "err", err)
		return false, status.Error(codes.Unavailable, "the store does not answer; try again")
	}
	return g.Registry.IsDownstream(id), nil
}

// CheckAgent returns the node of a calling agent if its SVID is the one it may use now. The first use of an SVID that a
// renewal handed out makes it the current one. A no is never given from an index that may lag: the store is asked.
func (g *Guard) CheckAgent(ctx context.Context, c *Caller) (*registry.Node, error) {
	// No alarm: a stream that is judged anew may have been left behind by an agent that moved on.
	return g.checkAgent(ctx, c, nil)
}

func (g *Guard) checkAgent(ctx context.Context, c *Caller, superseded func(context.Context, *Caller, *registry.Node)) (*registry.Node, error) {
	if g.Stale != nil {
		if err := g.Stale(); err != nil {
			return nil, err
		}
	}
	if !g.trusted(c) {
		return nil, revoked(c.ID)
	}
	if c.appended {
		return nil, attestedElsewhere(c.ID)
	}
	if err := g.revokedSVID(c); err != nil {
		return nil, err
	}
	if !g.Now().Before(c.Expires) {
		return nil, Denied(types.PermissionDeniedDetails_AGENT_EXPIRED, "agent X509-SVID of %s has expired", c.ID)
	}
	n, err := g.Registry.Node(c.ID)
	if err == nil && !n.Banned && n.Active && n.Serial == c.Serial {
		return n, nil
	}
	const attempts = 4
	for range attempts {
		n, err = g.Registry.NodeNow(ctx, c.ID)
		switch {
		case errors.Is(err, registry.ErrNotFound):
			return nil, Denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent %s is not attested", c.ID)
		case err != nil:
			g.Log.Error("reading a node", "node_id", c.ID.String(), "err", err)
			return nil, status.Error(codes.Unavailable, "the store does not answer; try again")
		case n.Banned:
			return nil, Denied(types.PermissionDeniedDetails_AGENT_BANNED, "agent %s is banned", c.ID)
		case n.Serial == "" && n.NewSerial == "":
			return nil, Denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent %s is not attested since its ban was lifted", c.ID)
		case n.Serial == c.Serial && n.Active:
			return n, nil
		case n.Serial == c.Serial:
			n.Active = true
		case n.NewSerial != "" && n.NewSerial == c.Serial:
			n.Promote(c.Place())
			n.Active = true
		default:
			if superseded != nil && !n.Knows(c.Place()) {
				superseded(ctx, c, n)
			}
			return nil, Denied(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE, "agent %s uses an X509-SVID that another one has replaced", c.ID)
		}
		err = g.Registry.PutNode(store.WithReserve(ctx), n, nil)
		if err == nil {
			return n, nil
		}
		if !errors.Is(err, registry.ErrConflict) {
			break
		}
	}
	g.Log.Error("noting the use of an agent's X509-SVID", "node_id", c.ID.String(), "err", err)
	return nil, status.Error(codes.Unavailable, "the store does not take the change; try again")
}

// revokedSVID refuses a caller whose X509-SVID an operator revoked. Its key may be in other hands: the agent must attest with
// something else.
func (g *Guard) revokedSVID(c *Caller) error {
	if len(c.chains) == 0 {
		return nil
	}
	if name, revoked := g.Registry.RevokedX509(c.chains[0][0], c.ID); revoked { // every chain begins with it
		return Denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "the X509-SVID of %s is revoked (Revocation %q)", c.ID, name)
	}
	return nil
}

func attestedElsewhere(id spiffeid.ID) error {
	return Denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent %s attested to another server of the trust domain; attest to this one", id)
}

// trusted tells whether a chain of the caller's SVID is trusted now.
func (g *Guard) trusted(c *Caller) bool {
	for _, chain := range c.chains {
		if g.Trusted(c.ID.TrustDomain(), chain) {
			return true
		}
	}
	return false
}

// revoked is the refusal of an SVID whose authority was revoked. An agent wins another one back with its key.
func revoked(id spiffeid.ID) error {
	return Denied(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE, "the authority that signed the X509-SVID of %s was revoked", id)
}

// Untrusted tells whether no chain of the caller's SVID is trusted any more.
func (g *Guard) Untrusted(c *Caller) bool { return !g.trusted(c) }

// Denied returns PermissionDenied with SPIRE's reason, by which agents decide what to do next. [SPIRE-PROTOCOL §12]
func Denied(reason types.PermissionDeniedDetails_Reason, format string, args ...any) error {
	st := status.Newf(codes.PermissionDenied, format, args...)
	if with, err := st.WithDetails(&types.PermissionDeniedDetails{Reason: reason}); err == nil {
		st = with
	}
	return st.Err()
}

// LocalInfo identifies an admin on the Unix socket. It exists only for connections whose peer was accepted.
type LocalInfo struct {
	credentials.CommonAuthInfo
	UID, GID uint32
	Groups   []uint32
}

// AuthType implements credentials.AuthInfo.
func (LocalInfo) AuthType() string { return "unix" }

// LocalCredentials is the transport of the admin socket: it asks the kernel who connects and refuses everybody but
// root, the CA's own user, and those whom Allow names.
type LocalCredentials struct {
	// Allow tells whether a peer with these credentials is an admin.
	Allow func(uid, gid uint32, groups []uint32) bool
	Log   *slog.Logger
}

// ServerHandshake implements credentials.TransportCredentials.
func (l LocalCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	uid, gid, groups, err := peerCredentials(conn)
	if err != nil {
		return nil, nil, fmt.Errorf("peer credentials: %w", err)
	}
	if !l.Allow(uid, gid, groups) {
		l.Log.Warn("refused a connection to the admin socket", "uid", uid, "gid", gid)
		return nil, nil, fmt.Errorf("uid %d is not an admin; see admin_socket in the CA's configuration", uid)
	}
	return conn, LocalInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity}, uid, gid, groups}, nil
}

// ClientHandshake implements credentials.TransportCredentials. These credentials are for servers.
func (LocalCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("local credentials are for servers")
}

// Info implements credentials.TransportCredentials.
func (LocalCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

// Clone implements credentials.TransportCredentials.
func (l LocalCredentials) Clone() credentials.TransportCredentials { return l }

// OverrideServerName implements credentials.TransportCredentials.
func (LocalCredentials) OverrideServerName(string) error { return nil }
