// Package faultca is a small CA whose faults tests choose: it attests, renews, issues and follows over real TLS, and each
// of its answers can be replaced, delayed or lost. Only tests of the agent use it; the real CA is tested with the agent
// elsewhere.
package faultca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"math/big"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// AgentPath is the path of the agent's SPIFFE ID.
const AgentPath = "/spire/agent/join_token/n1"

// A CA is one that listens on Addr until the test ends. Its hooks are set before the agent is started, or under Lock.
type CA struct {
	TrustDomain spiffeid.TrustDomain
	Root        *x509.Certificate
	Addr        string

	sync.Mutex
	// Attest sees the token and the key, and may refuse. Nil accepts.
	Attest func(token string, key *ecdsa.PublicKey) error
	// Judge takes evidence of other kinds than join tokens; it may challenge, and refuse. Nil: only tokens are taken.
	Judge func(kind string, payload []byte, challenge func([]byte) ([]byte, error)) error
	// Reattestable is what an agent is told that came with evidence.
	Reattestable bool
	// Lose makes AttestAgent end without a reply after it has accepted.
	Lose bool
	// Follow is the whole of a Follow stream; serial is that of the agent's SVID.
	Follow func(stream nodev1.Node_FollowServer, serial string) error
	// Held are the entries that Answer sends.
	Held []*nodev1.Entry
	// Issue replaces the answers of IssueX509SVIDs.
	Issue func(*nodev1.IssueX509SVIDsRequest) (*nodev1.IssueX509SVIDsResponse, error)
	// IssueJWT replaces the answers of IssueJWTSVIDs.
	IssueJWT func(context.Context, *nodev1.IssueJWTSVIDsRequest) (*nodev1.IssueJWTSVIDsResponse, error)
	// Entries, Deny, BatchX509 and SingleJWT are of one that StartSPIRE has made: the entries, why an agent with that serial is
	// refused, and what replaces the answers of BatchNewX509SVID and NewJWTSVID. Polls counts SyncAuthorizedEntries.
	Entries   []*types.Entry
	Deny      func(serial string) error
	BatchX509 func(*svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error)
	SingleJWT func(*svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error)
	Polls     int
	// AgentTTL is the life of agents' SVIDs; 0: an hour.
	AgentTTL time.Duration
	// Renewals counts RenewAgent calls.
	Renewals int
	// OtherBundle makes GetBundle hand out these authorities instead of Root.
	OtherBundle []*x509.Certificate

	key    *ecdsa.PrivateKey
	serial int64
	server *grpc.Server

	agentv1.UnimplementedAgentServer
	bundlev1.UnimplementedBundleServer
	svidv1.UnimplementedSVIDServer
}

// Start makes a CA that listens. The server's SVID has the given path.
func Start(t testing.TB, serverPath string) *CA {
	t.Helper()
	return start(t, serverPath, true)
}

// start makes a CA with or without signet.node.v1.
func start(t testing.TB, serverPath string, node bool, options ...grpc.ServerOption) *CA {
	t.Helper()
	ca := &CA{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org")}
	var err error
	if ca.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "fault CA"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: []byte("root"),
		URIs: []*url.URL{{Scheme: "spiffe", Host: ca.TrustDomain.Name()}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, ca.key.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	if ca.Root, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := ca.Sign(serverPath, key.Public(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ca.Addr = listener.Addr().String()
	ca.server = grpc.NewServer(append(options, grpc.Creds(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, ClientAuth: tls.RequestClientCert, SessionTicketsDisabled: true,
		Certificates: []tls.Certificate{{Certificate: [][]byte{leaf, ca.Root.Raw}, PrivateKey: key}},
	})))...)
	agentv1.RegisterAgentServer(ca.server, ca)
	bundlev1.RegisterBundleServer(ca.server, ca)
	svidv1.RegisterSVIDServer(ca.server, ca)
	if node {
		nodev1.RegisterNodeServer(ca.server, &nodeServer{ca: ca})
	} else {
		entryv1.RegisterEntryServer(ca.server, &entryServer{ca: ca})
	}
	served := make(chan error, 1)
	go func() { served <- ca.server.Serve(listener) }()
	t.Cleanup(func() {
		ca.server.Stop()
		<-served
	})
	return ca
}

// Pin is the hash of the authority's SPKI as join tokens carry it.
func (ca *CA) Pin() string {
	sum := sha256.Sum256(ca.Root.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// Sign issues a leaf for path.
func (ca *CA) Sign(path string, key any, ttl time.Duration) ([]byte, error) {
	ca.serial++
	now := time.Now()
	return x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1000 + ca.serial), NotBefore: now.Add(-30 * time.Second), NotAfter: now.Add(ttl),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs: []*url.URL{{Scheme: "spiffe", Host: ca.TrustDomain.Name(), Path: path}},
	}, ca.Root, key, ca.key)
}

func (ca *CA) signAgent(csr []byte) (*types.X509SVID, *ecdsa.PublicKey, error) {
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, nil, status.Error(codes.InvalidArgument, err.Error())
	}
	key, ok := request.PublicKey.(*ecdsa.PublicKey)
	if !ok || request.CheckSignature() != nil {
		return nil, nil, status.Error(codes.InvalidArgument, "bad CSR")
	}
	ttl := ca.AgentTTL
	if ttl == 0 {
		ttl = time.Hour
	}
	der, err := ca.Sign(AgentPath, key, ttl)
	if err != nil {
		return nil, nil, err
	}
	return &types.X509SVID{CertChain: [][]byte{der}, ExpiresAt: time.Now().Add(ttl).Unix()}, key, nil
}

// AttestAgent is SPIRE's.
func (ca *CA) AttestAgent(stream agentv1.Agent_AttestAgentServer) error {
	m, err := stream.Recv()
	if err != nil {
		return err
	}
	ca.Lock()
	judge := ca.Judge
	ca.Unlock()
	data := m.GetParams().GetData()
	evidence := data.GetType() != "join_token"
	if evidence {
		if judge == nil {
			return status.Error(codes.PermissionDenied, "only join tokens are taken here")
		}
		err := judge(data.GetType(), data.GetPayload(), func(question []byte) ([]byte, error) {
			if err := stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Challenge{Challenge: question}}); err != nil {
				return nil, err
			}
			m, err := stream.Recv()
			return m.GetChallengeResponse(), err
		})
		if err != nil {
			return err
		}
	}
	ca.Lock()
	defer ca.Unlock()
	svid, key, err := ca.signAgent(m.GetParams().GetParams().GetCsr())
	if err != nil {
		return err
	}
	if ca.Attest != nil && !evidence {
		if err := ca.Attest(string(m.GetParams().GetData().GetPayload()), key); err != nil {
			return err
		}
	}
	if ca.Lose {
		return status.Error(codes.Unavailable, "the reply is lost")
	}
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{Result: &agentv1.AttestAgentResponse_Result{
		Svid: svid, Reattestable: evidence && ca.Reattestable}}})
}

// RenewAgent is SPIRE's.
func (ca *CA) RenewAgent(_ context.Context, r *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	ca.Lock()
	defer ca.Unlock()
	ca.Renewals++
	svid, _, err := ca.signAgent(r.GetParams().GetCsr())
	return &agentv1.RenewAgentResponse{Svid: svid}, err
}

// GetBundle is SPIRE's.
func (ca *CA) GetBundle(context.Context, *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	ca.Lock()
	defer ca.Unlock()
	b := &types.Bundle{TrustDomain: ca.TrustDomain.Name()}
	authorities := ca.OtherBundle
	if authorities == nil {
		authorities = []*x509.Certificate{ca.Root}
	}
	for _, a := range authorities {
		b.X509Authorities = append(b.X509Authorities, &types.X509Certificate{Asn1: a.Raw})
	}
	return b, nil
}

// Bundle is the own bundle as Follow sends it.
func (ca *CA) Bundle() *nodev1.Bundle {
	return &nodev1.Bundle{TrustDomain: ca.TrustDomain.Name(), Revision: 1, X509Authorities: []*nodev1.X509Authority{
		{Certificate: ca.Root.Raw, AuthorityId: "root", State: nodev1.AuthorityState_AUTHORITY_STATE_ACTIVE},
	}}
}

// nodeServer is the signet.node.v1 side of a CA; its methods would hide CA's hooks of the same names.
type nodeServer struct {
	nodev1.UnimplementedNodeServer
	ca *CA
}

// serialOf is that of the caller's SVID.
func serialOf(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(credentials.TLSInfo); ok && len(info.State.PeerCertificates) > 0 {
			return info.State.PeerCertificates[0].SerialNumber.String()
		}
	}
	return ""
}

func (n *nodeServer) Follow(stream nodev1.Node_FollowServer) error {
	serial := serialOf(stream.Context())
	n.ca.Lock()
	follow := n.ca.Follow
	n.ca.Unlock()
	if follow == nil {
		return n.ca.Answer(stream)
	}
	return follow(stream, serial)
}

func (n *nodeServer) IssueX509SVIDs(_ context.Context, r *nodev1.IssueX509SVIDsRequest) (*nodev1.IssueX509SVIDsResponse, error) {
	n.ca.Lock()
	issue := n.ca.Issue
	n.ca.Unlock()
	if issue == nil {
		return nil, status.Error(codes.Unimplemented, "nothing to issue")
	}
	return issue(r)
}

func (n *nodeServer) IssueJWTSVIDs(ctx context.Context, r *nodev1.IssueJWTSVIDsRequest) (*nodev1.IssueJWTSVIDsResponse, error) {
	n.ca.Lock()
	issue := n.ca.IssueJWT
	n.ca.Unlock()
	if issue == nil {
		return nil, status.Error(codes.Unimplemented, "nothing to issue")
	}
	return issue(ctx, r)
}

// Stop cuts all connections and listens no more.
func (ca *CA) Stop() { ca.server.Stop() }

// Answer is a Follow that sends a snapshot of revision 1 with the entries Held and answers every Sync.
func (ca *CA) Answer(stream nodev1.Node_FollowServer) error {
	hello, err := stream.Recv()
	if err != nil {
		return err
	}
	if hello.GetHello().GetRevision() != 1 || hello.GetHello().GetEpoch() != "e" {
		m := &nodev1.FollowResponse{Format: 1, Epoch: "e", To: 1, Snapshot: true, Complete: true, Bundles: []*nodev1.Bundle{ca.Bundle()}, Entries: ca.Held}
		if err := stream.Send(m); err != nil {
			return err
		}
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		if s := m.GetSync(); s != nil {
			if err := stream.Send(&nodev1.FollowResponse{Format: 1, Epoch: "e", From: 1, To: 1, SyncIds: []uint64{s.GetId()}}); err != nil {
				return err
			}
		}
	}
}

// Denied is the answer to an agent that is not welcome.
func Denied(reason types.PermissionDeniedDetails_Reason) error {
	s, err := status.New(codes.PermissionDenied, "the agent is not welcome").WithDetails(&types.PermissionDeniedDetails{Reason: reason})
	if err != nil {
		return err
	}
	return s.Err()
}
