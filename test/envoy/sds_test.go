package envoy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-id/signet/agent"
	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/test/signettest"
)

// TestHandshake makes mTLS from nothing but what SDS delivers: one side takes it by state of the world, the other by delta.
func TestHandshake(t *testing.T) {
	n := start(t)
	n.identity("web")
	n.identity("db")
	server := n.world(modern(), "spiffe://example.org/db", "ROOTCA").next()
	wantNames(t, server, "spiffe://example.org/db", "ROOTCA")
	client := n.world(nil, "spiffe://example.org/web", "spiffe://example.org").next() // no word on its version: a plain context
	wantNames(t, client, "spiffe://example.org/web", "spiffe://example.org")
	if client["spiffe://example.org"].GetValidationContext().GetCustomValidatorConfig() != nil {
		t.Error("a client that does not say that it is an Envoy gets a validator that only Envoys have")
	}
	serverRoots, _ := pool(t, server["ROOTCA"], "example.org")
	clientRoots, _ := pool(t, client["spiffe://example.org"], "")

	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	listening := tls.Server(a, &tls.Config{Certificates: []tls.Certificate{certificate(t, server["spiffe://example.org/db"])}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: serverRoots})
	done := make(chan error, 1)
	go func() { done <- listening.HandshakeContext(bounded(t)) }()
	var peer string
	dialling := tls.Client(b, &tls.Config{Certificates: []tls.Certificate{certificate(t, client["spiffe://example.org/web"])}, InsecureSkipVerify: true, // no DNS name is verified: the ID is
		VerifyConnection: func(s tls.ConnectionState) error {
			peer = leafID(s.PeerCertificates[0])
			inner := x509.NewCertPool()
			for _, c := range s.PeerCertificates[1:] {
				inner.AddCert(c)
			}
			_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: clientRoots, Intermediates: inner})
			return err
		}})
	if err := dialling.HandshakeContext(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := leafID(listening.ConnectionState().PeerCertificates[0]); got != "spiffe://example.org/web" || peer != "spiffe://example.org/db" {
		t.Errorf("the peers are %s and %s", got, peer)
	}
}

func TestOnlyOnesOwn(t *testing.T) {
	n := start(t)
	n.identity("web")
	n.Apply(document("someone-else", 54321))
	c := n.changes(modern(), "spiffe://example.org/someone-else", "spiffe://example.org/nobody", "default", "spiffe://partner.example")
	c.want([]string{"default"}, []string{"spiffe://example.org/nobody", "spiffe://example.org/someone-else", "spiffe://partner.example"})
	all := n.changes(modern())
	all.want([]string{"spiffe://example.org", "spiffe://example.org/web"}, nil)

	resp, err := n.sds.FetchSecrets(bounded(t), &discoveryv3.DiscoveryRequest{Node: modern(), ResourceNames: []string{"spiffe://example.org/someone-else", "default", "ALL"}})
	if err != nil {
		t.Fatal(err)
	}
	wantNames(t, secrets(t, resp), "default", "ALL")
	for _, name := range []string{"spiffe://example.org/someone-else", "spiffe://example.org/nobody"} {
		_, err := n.sds.FetchSecrets(bounded(t), &discoveryv3.DiscoveryRequest{ResourceNames: []string{name}})
		wantCode(t, err, codes.NotFound, name)
	}
}

func TestCallersAreAttested(t *testing.T) {
	n := start(t, func(c *agent.Config) { c.RegistrationWait = 1 })
	_, err := n.sds.FetchSecrets(bounded(t), &discoveryv3.DiscoveryRequest{})
	wantCode(t, err, codes.PermissionDenied, fmt.Sprintf("process %d", os.Getpid()))
	_, err = n.world(modern(), "default").stream.Recv()
	wantCode(t, err, codes.PermissionDenied, "no identity issued")
	_, err = n.changes(modern(), "default").stream.Recv()
	wantCode(t, err, codes.PermissionDenied, "no identity issued")
}

// TestWEP_08_HeaderWhereTheConfigurationDemandsIt also shows names that the configuration chooses.
func TestWEP_08_HeaderWhereTheConfigurationDemandsIt(t *testing.T) {
	n := start(t, func(c *agent.Config) {
		c.RequireHeaderEverywhere = true
		c.SDS = agent.SDS{DefaultSVIDName: "mine", DefaultBundleName: "ours", DefaultAllBundlesName: "everyone"}
	})
	n.identity("web")
	_, err := n.sds.FetchSecrets(bounded(t), &discoveryv3.DiscoveryRequest{ResourceNames: []string{"mine"}})
	wantCode(t, err, codes.InvalidArgument, "workload.spiffe.io")
	resp, err := n.sds.FetchSecrets(metadata.AppendToOutgoingContext(bounded(t), "workload.spiffe.io", "true"),
		&discoveryv3.DiscoveryRequest{Node: modern(), ResourceNames: []string{"mine", "ours", "everyone", "default", "ROOTCA", "ALL"}})
	if err != nil {
		t.Fatal(err)
	}
	wantNames(t, secrets(t, resp), "mine", "ours", "everyone")
}

// TestUnknownResourceComesWhenItExists: state of the world says nothing of it, delta says once that it is not there.
func TestUnknownResourceComesWhenItExists(t *testing.T) {
	n := start(t)
	n.identity("web")
	w := n.world(modern(), "spiffe://example.org/late")
	c := n.changes(modern(), "spiffe://example.org/late")
	c.want(nil, []string{"spiffe://example.org/late"})
	n.identity("late")
	wantNames(t, w.next(), "spiffe://example.org/late")
	c.want([]string{"spiffe://example.org/late"}, nil)
}

func TestSubscribeAndUnsubscribeWhileOpen(t *testing.T) {
	n := start(t)
	n.identity("web")
	w := n.world(modern(), "default")
	wantNames(t, w.next(), "default")
	w.ack("default", "ROOTCA")
	wantNames(t, w.next(), "default", "ROOTCA")
	w.ack("ROOTCA")
	w.ack("ROOTCA", "ALL")
	wantNames(t, w.next(), "ROOTCA", "ALL")

	c := n.changes(modern(), "default")
	c.want([]string{"default"}, nil)
	c.send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"ROOTCA"}, ResourceNamesUnsubscribe: []string{"default"}})
	c.want([]string{"ROOTCA"}, nil)
	c.send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default"}})
	c.want([]string{"default"}, nil)

	// A client that has nothing more to say ends its stream well.
	if err := w.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("after the client's end: %v", err)
	}
}

// TestDeletionIsPushed deletes one identity of two, then the other.
func TestDeletionIsPushed(t *testing.T) {
	n := start(t, func(c *agent.Config) { c.RegistrationWait = 1 })
	n.identity("web")
	n.identity("db")
	w := n.world(modern(), "spiffe://example.org/web", "spiffe://example.org/db", "ROOTCA")
	wantNames(t, w.next(), "spiffe://example.org/web", "spiffe://example.org/db", "ROOTCA")
	w.ack("spiffe://example.org/web", "spiffe://example.org/db", "ROOTCA")
	c := n.changes(modern(), "spiffe://example.org/web", "spiffe://example.org/db")
	c.want([]string{"spiffe://example.org/web", "spiffe://example.org/db"}, nil)

	n.Delete("Identity", "db")
	wantNames(t, w.next(), "spiffe://example.org/web", "ROOTCA")
	c.want(nil, []string{"spiffe://example.org/db"})
	n.Delete("Identity", "web")
	_, err := w.stream.Recv()
	wantCode(t, err, codes.PermissionDenied)
	_, err = c.stream.Recv()
	wantCode(t, err, codes.PermissionDenied)
}

// TestRotationIsPushed lets a short SVID rotate twice, then an authority.
func TestRotationIsPushed(t *testing.T) {
	n := start(t)
	n.identity("web", "x509TTL: 4s")
	w := n.world(modern(), "default", "ROOTCA")
	c := n.changes(modern(), "default")
	seen := map[string]bool{}
	for range 3 {
		got := w.next()
		w.ack("default", "ROOTCA")
		pair := certificate(t, got["default"])
		serial := pair.Leaf.SerialNumber.String()
		if seen[serial] {
			t.Errorf("SVID %s came twice", serial)
		}
		seen[serial] = true
		roots, _ := pool(t, got["ROOTCA"], "example.org")
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
			t.Errorf("the SVID and the validation context of one response do not fit: %v", err)
		}
		c.want([]string{"default"}, nil)
	}
	bundles := n.changes(modern(), "ROOTCA")
	bundles.want([]string{"ROOTCA"}, nil)
	if _, err := adminv1.NewAdminClient(n.AdminConn()).PrepareAuthority(t.Context(), &adminv1.PrepareAuthorityRequest{Type: adminv1.AuthorityType_AUTHORITY_TYPE_X509}); err != nil {
		t.Fatal(err)
	}
	bundles.want([]string{"ROOTCA"}, nil)
}

// TestRefusedResponse: what an Envoy refuses is logged, counted and not sent again; what is new later is.
func TestRefusedResponse(t *testing.T) {
	n := start(t)
	n.identity("web")
	w := n.world(modern(), "default")
	wantNames(t, w.next(), "default")
	w.nack("", "no \x1b[31mred\n"+strings.Repeat("x", 4096), "default")
	w.nack("", "again", "default")
	w.send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default", "ROOTCA"}, ResponseNonce: w.last.Nonce})
	wantNames(t, w.next(), "default", "ROOTCA") // and no response between
	c := n.changes(modern(), "default")
	resp := c.want([]string{"default"}, nil)
	c.send(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: resp.Nonce, ResourceNamesSubscribe: []string{"ROOTCA"}})
	c.want([]string{"ROOTCA"}, nil)

	if got := n.metric("signet_agent_sds_rejected_total"); got != "1" {
		t.Errorf("%s refusals are counted, want 1", got)
	}
	logged := ""
	for line := range strings.Lines(n.log.String()) {
		if strings.Contains(line, "Envoy refuses") {
			logged += line
		}
	}
	if !strings.Contains(logged, `no \\x1b[31mred\\n`) || strings.Count(logged, "\n") != 1 || len(logged) > 1000 || strings.Contains(logged, "\x1b") {
		t.Errorf("the log has %q", logged)
	}
}

func TestFederationHoldsTrustDomainsApart(t *testing.T) {
	n := start(t)
	partner, err := signettest.NewOrganisation(t.TempDir(), "partner")
	if err != nil {
		t.Fatal(err)
	}
	set, err := bundlev1.NewBundleClient(n.AdminConn()).BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{
		Bundle: []*types.Bundle{{TrustDomain: "partner.example", X509Authorities: []*types.X509Certificate{{Asn1: partner.Root.Raw}}}}})
	if err != nil || set.Results[0].Status.Code != 0 {
		t.Fatal(set, err)
	}
	n.identity("web")
	c := n.changes(modern(), "ALL", "spiffe://partner.example", "spiffe://example.org")
	c.want([]string{"ALL", "spiffe://example.org"}, []string{"spiffe://partner.example"})
	old := n.changes(nil, "ALL", "ROOTCA", "spiffe://partner.example")
	old.want([]string{"ROOTCA"}, []string{"ALL", "spiffe://partner.example"})
	n.identity("web", "federatesWith: [partner.example]")
	resp := c.want([]string{"ALL", "spiffe://partner.example"}, nil)
	all := secrets(t, &discoveryv3.DiscoveryResponse{Resources: []*anypb.Any{resp.Resources[0].Resource, resp.Resources[1].Resource}})
	for _, td := range []string{"example.org", "partner.example"} {
		if _, authorities := pool(t, all["ALL"], td); authorities != 1 {
			t.Errorf("ALL has %d authorities for %s", authorities, td)
		}
	}
	if _, authorities := pool(t, all["spiffe://partner.example"], "example.org"); authorities != 0 {
		t.Error("the partner's validation context has authorities for our trust domain")
	}
	old.want([]string{"spiffe://partner.example"}, nil)

	// One Envoy may do without.
	plain := modern()
	plain.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{"disable_spiffe_cert_validation": structpb.NewBoolValue(true)}}
	got := n.world(plain, "ALL", "ROOTCA").next()
	wantNames(t, got, "ROOTCA")
	if got["ROOTCA"].GetValidationContext().GetTrustedCa() == nil {
		t.Error("an Envoy that does not want the SPIFFE validator gets it")
	}
}

// TestHostileRequests: what is wrong ends its own stream, with a reason, and nothing else.
func TestHostileRequests(t *testing.T) {
	n := start(t)
	n.identity("web")
	calm := n.world(modern(), "default")
	wantNames(t, calm.next(), "default")

	many := make([]string, 300)
	for i := range many {
		many[i] = fmt.Sprint("x", i)
	}
	w := n.world(modern(), many...)
	_, err := w.stream.Recv()
	wantCode(t, err, codes.InvalidArgument, "300 resources are named: at most 256")
	w = n.world(modern(), "default")
	w.send(&discoveryv3.DiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster"})
	for err = error(nil); err == nil; {
		_, err = w.stream.Recv()
	}
	wantCode(t, err, codes.InvalidArgument, "only resources of type")
	_, err = n.sds.FetchSecrets(bounded(t), &discoveryv3.DiscoveryRequest{ResourceNames: []string{strings.Repeat("x", 3000)}})
	wantCode(t, err, codes.InvalidArgument, "3000 bytes")

	// The node of a real Envoy, which names each of its extensions, is taken; more than that is not.
	large := modern()
	for i := range 1000 {
		large.Extensions = append(large.Extensions, &corev3.Extension{Name: fmt.Sprintf("envoy.filters.http.some_extension_%d", i), Category: "envoy.filters.http",
			TypeUrls: []string{fmt.Sprintf("envoy.extensions.filters.http.some_extension_%d.v3.SomeExtension", i)}})
	}
	wantNames(t, n.world(large, "default").next(), "default")
	_, err = n.sds.FetchSecrets(bounded(t), &discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: strings.Repeat("x", 1<<20)}})
	wantCode(t, err, codes.ResourceExhausted)

	calm.ack("default", "ROOTCA")
	wantNames(t, calm.next(), "default", "ROOTCA")
}

// TestSlowReaderGetsTheNewest lets a client that does not read miss what is in between, and blocks nobody by it.
func TestSlowReaderGetsTheNewest(t *testing.T) {
	n := start(t)
	n.identity("first")
	slow := n.world(modern())
	slow.next()
	const changes = 100 // each adds to what every response has, so that they soon fill what the transport buffers
	for i := range changes {
		n.identity(fmt.Sprintf("svc-%d", i))
	}
	last := fmt.Sprintf("spiffe://example.org/svc-%d", changes-1)
	wantNames(t, n.world(modern(), last).next(), last)
	messages := 0
	for {
		got := slow.next()
		messages++
		if got[last] != nil {
			if len(got) != changes+2 {
				t.Errorf("the last response has %d resources, want %d", len(got), changes+2)
			}
			break
		}
	}
	if messages > changes/2 {
		t.Errorf("a client that did not read is sent %d of %d states", messages, changes)
	}
}

// TestStoppedAgentIsUnavailable: Envoy comes back by itself.
func TestStoppedAgentIsUnavailable(t *testing.T) {
	n := start(t)
	n.identity("web")
	w := n.world(modern(), "default")
	before := certificate(t, w.next()["default"])
	if err := n.StopAgent(); err != nil {
		t.Fatal(err)
	}
	_, err := w.stream.Recv()
	wantCode(t, err, codes.Unavailable)
	if err := n.RestartAgent(context.Background()); err != nil {
		t.Fatal(err)
	}
	n.conn.ResetConnectBackoff()
	w = n.world(modern(), "default")
	if after := certificate(t, w.next()["default"]); leafID(after.Leaf) != leafID(before.Leaf) {
		t.Errorf("after the restart the caller is %s", leafID(after.Leaf))
	}
}
