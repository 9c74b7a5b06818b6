package onbehalf

import (
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent"
)

func statusOf(err error) codes.Code { return status.Code(err) }

// delegates has an agent on whose admin socket /speaker, which this test is, is a delegate.
func delegates(t testing.TB, ids ...string) (*world, delegatedv1.DelegatedIdentityClient) {
	t.Helper()
	w := newWorld(t, func(_ *world, c *agent.Config) { c.AdminSocket.AuthorizedDelegates = ids })
	conn, err := grpc.NewClient("unix:"+w.AgentAdminSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return w, delegatedv1.NewDelegatedIdentityClient(conn)
}

func (w *world) selectors() []*types.Selector {
	return []*types.Selector{{Type: "unix", Value: "path:" + w.program}, {Type: "unix", Value: "uid:0"}}
}

func paths(m *delegatedv1.SubscribeToX509SVIDsResponse) string {
	var all []string
	for _, s := range m.X509Svids {
		all = append(all, s.X509Svid.Id.Path)
	}
	return strings.Join(all, " ")
}

func recv[M any](t testing.TB, stream grpc.ServerStreamingClient[M], err error) *M {
	t.Helper()
	var m *M
	if err == nil {
		m, err = stream.Recv()
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestDelegateBySelectors: the delegate's word is taken; what there is comes at once, also if it is nothing yet, and
// changes follow.
func TestDelegateBySelectors(t *testing.T) {
	w, c := delegates(t, "/speaker")
	stream, err := c.SubscribeToX509SVIDs(w.ctx, &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: w.selectors()})
	m := recv(t, stream, err)
	if paths(m) != "/w" {
		t.Fatalf("the delegate gets %q", paths(m))
	}
	svid := m.X509Svids[0]
	leaf, err := x509.ParseCertificate(svid.X509Svid.CertChain[0])
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(svid.X509SvidKey)
	if err != nil {
		t.Fatal(err)
	}
	if !leaf.PublicKey.(*ecdsa.PublicKey).Equal(key.(*ecdsa.PrivateKey).Public()) || svid.X509Svid.ExpiresAt != leaf.NotAfter.Unix() ||
		leaf.URIs[0].String() != "spiffe://example.org/w" || svid.X509Svid.Id.TrustDomain != "example.org" {
		t.Errorf("the SVID %v does not agree with its key and its fields", leaf.URIs)
	}

	none, err := c.SubscribeToX509SVIDs(w.ctx, &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: []*types.Selector{{Type: "k8s", Value: "ns:shop"}}})
	if m := recv(t, none, err); len(m.X509Svids) != 0 {
		t.Fatalf("for selectors without an entry the delegate gets %q", paths(m))
	}
	w.Apply("kind: Identity\nname: shop\nspiffeID: /shop\nmatch: [\"k8s:ns:shop\"]\n")
	m = recv(t, none, nil)
	for len(m.X509Svids) == 0 { // the entry may come before its SVID
		m = recv(t, none, nil)
	}
	if paths(m) != "/shop" {
		t.Errorf("after it was registered: %q", paths(m))
	}
	w.Delete("Identity", "shop")
	if m := recv(t, none, nil); len(m.X509Svids) != 0 {
		t.Errorf("after its entry was deleted: %q", paths(m))
	}
	if !strings.Contains(w.log.String(), `msg="X509-SVIDs handed to a delegate" delegate=spiffe://example.org/speaker`) {
		t.Error("the agent's log does not say who got what")
	}
}

// TestDelegateByProcess: the process is attested by the agent, pinned, and its end is the stream's.
func TestDelegateByProcess(t *testing.T) {
	w, c := delegates(t, "/other", "/speaker")
	pid, kill := w.start()
	stream, err := c.SubscribeToX509SVIDs(w.ctx, &delegatedv1.SubscribeToX509SVIDsRequest{Pid: pid})
	if m := recv(t, stream, err); paths(m) != "/w" {
		t.Fatalf("for the process the delegate gets %q", paths(m))
	}
	began := time.Now()
	kill()
	wantCode(t, ended(stream), codes.NotFound)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the stream ended after %s", took)
	}
	stream, err = c.SubscribeToX509SVIDs(w.ctx, &delegatedv1.SubscribeToX509SVIDsRequest{Pid: pid})
	if err == nil {
		_, err = stream.Recv()
	}
	wantCode(t, err, codes.NotFound)
	if _, err := c.FetchJWTSVIDs(w.ctx, &delegatedv1.FetchJWTSVIDsRequest{Pid: pid, Audience: []string{"a"}}); statusOf(err) != codes.NotFound {
		t.Errorf("JWT-SVIDs for a process that is gone: %v, want NotFound", err)
	}
}

// TestDelegateMistakes has what a request may not say, with SPIRE's codes.
func TestDelegateMistakes(t *testing.T) {
	w, c := delegates(t, "/speaker")
	many := make([]*types.Selector, 1025)
	for i := range many {
		many[i] = &types.Selector{Type: "a", Value: fmt.Sprint(i)}
	}
	for name, tt := range map[string]struct {
		selectors []*types.Selector
		pid       int32
	}{
		"neither":         {nil, 0},
		"both":            {w.selectors(), int32(os.Getpid())},
		"no type":         {[]*types.Selector{{Value: "uid:1"}}, 0},
		"no value":        {[]*types.Selector{{Type: "unix"}}, 0},
		"type with colon": {[]*types.Selector{{Type: "unix:uid", Value: "1"}}, 0},
		"negative":        {nil, -1},
		"too many":        {many, 0},
	} {
		stream, err := c.SubscribeToX509SVIDs(w.ctx, &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: tt.selectors, Pid: tt.pid})
		if err == nil {
			_, err = stream.Recv()
		}
		if statusOf(err) != codes.InvalidArgument {
			t.Errorf("%s: SubscribeToX509SVIDs = %v, want InvalidArgument", name, err)
		}
		if _, err := c.FetchJWTSVIDs(w.ctx, &delegatedv1.FetchJWTSVIDsRequest{Selectors: tt.selectors, Pid: tt.pid, Audience: []string{"a"}}); statusOf(err) != codes.InvalidArgument {
			t.Errorf("%s: FetchJWTSVIDs = %v, want InvalidArgument", name, err)
		}
	}
	for name, audience := range map[string][]string{"no audience": nil, "an empty one": {""}} {
		if _, err := c.FetchJWTSVIDs(w.ctx, &delegatedv1.FetchJWTSVIDsRequest{Selectors: w.selectors(), Audience: audience}); statusOf(err) != codes.InvalidArgument {
			t.Errorf("%s: %v, want InvalidArgument", name, err)
		}
	}
	_, err := c.FetchJWTSVIDs(w.ctx, &delegatedv1.FetchJWTSVIDsRequest{Selectors: []*types.Selector{{Type: "k8s", Value: "ns:none"}}, Audience: []string{"a"}})
	wantCode(t, err, codes.PermissionDenied, "no identity issued")
}

// TestDelegateJWT: tokens for the workload, with their times.
func TestDelegateJWT(t *testing.T) {
	w, c := delegates(t, "/speaker")
	pid, _ := w.start()
	for name, req := range map[string]*delegatedv1.FetchJWTSVIDsRequest{"selectors": {Selectors: w.selectors()}, "process": {Pid: pid}} {
		req.Audience = []string{"b", "a"}
		resp, err := c.FetchJWTSVIDs(w.ctx, req)
		if err != nil || len(resp.Svids) != 1 {
			t.Fatalf("by %s: %v, %v", name, resp, err)
		}
		s := resp.Svids[0]
		token, err := jwtsvid.ParseInsecure(s.Token, []string{"a"})
		if err != nil {
			t.Fatal(err)
		}
		if token.ID.Path() != "/w" || s.Id.Path != "/w" || !slices.Equal(token.Audience, req.Audience) || token.Expiry.Unix() != s.ExpiresAt || s.IssuedAt == 0 || s.IssuedAt >= s.ExpiresAt {
			t.Errorf("by %s: token for %s, aud %q, fields %v", name, token.ID, token.Audience, s.Id)
		}
	}
	if log := w.log.String(); !strings.Contains(log, `msg="JWT-SVIDs handed to a delegate"`) || strings.Contains(log, "eyJ") {
		t.Error("the agent's log does not say who got a token, or has one in it")
	}
}

// TestDelegateBundles: all bundles of the node, again in full when they change.
func TestDelegateBundles(t *testing.T) {
	w, c := delegates(t, "/speaker")
	x, err := c.SubscribeToX509Bundles(w.ctx, &delegatedv1.SubscribeToX509BundlesRequest{})
	if m := recv(t, x, err); len(m.CaCertificates) != 1 || len(m.CaCertificates["spiffe://example.org"]) == 0 {
		t.Errorf("X.509 bundles: %d", len(m.CaCertificates))
	}
	j, err := c.SubscribeToJWTBundles(w.ctx, &delegatedv1.SubscribeToJWTBundlesRequest{})
	m := recv(t, j, err)
	bundle, err := jwtbundle.Parse(w.TrustDomain(), m.Bundles["spiffe://example.org"])
	if err != nil || len(m.Bundles) != 1 || bundle.Empty() {
		t.Errorf("JWT bundles: %d, %v", len(m.Bundles), err)
	}
}

// TestOnlyDelegates: a process whose IDs are not listed gets nothing, nor one without any; and one that is none any more
// loses its open streams.
func TestOnlyDelegates(t *testing.T) {
	w, c := delegates(t, "/other")
	calls := func() map[string]error {
		x, err1 := c.SubscribeToX509SVIDs(w.ctx, &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: w.selectors()})
		if err1 == nil {
			_, err1 = x.Recv()
		}
		_, err2 := c.FetchJWTSVIDs(w.ctx, &delegatedv1.FetchJWTSVIDsRequest{Selectors: w.selectors(), Audience: []string{"a"}})
		b, err3 := c.SubscribeToX509Bundles(w.ctx, &delegatedv1.SubscribeToX509BundlesRequest{})
		if err3 == nil {
			_, err3 = b.Recv()
		}
		j, err4 := c.SubscribeToJWTBundles(w.ctx, &delegatedv1.SubscribeToJWTBundlesRequest{})
		if err4 == nil {
			_, err4 = j.Recv()
		}
		return map[string]error{"SubscribeToX509SVIDs": err1, "FetchJWTSVIDs": err2, "SubscribeToX509Bundles": err3, "SubscribeToJWTBundles": err4}
	}
	for name, err := range calls() {
		if statusOf(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "caller not configured as an authorized delegate") {
			t.Errorf("%s for somebody who is no delegate: %v", name, err)
		}
	}
	w.Delete("Identity", "speaker")
	for w.ctx.Err() == nil && strings.Contains(fmt.Sprint(calls()["FetchJWTSVIDs"]), "caller not configured") {
		// until the agent has heard of it
	}
	for name, err := range calls() {
		if statusOf(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "no identity issued") {
			t.Errorf("%s for somebody without an identity: %v", name, err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	w.identity("speaker", "/other", self)
	for name, err := range calls() {
		if err != nil {
			t.Errorf("%s for a delegate: %v", name, err)
		}
	}
	x, err := c.SubscribeToX509SVIDs(w.ctx, &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: w.selectors()})
	recv(t, x, err)
	b, err := c.SubscribeToX509Bundles(w.ctx, &delegatedv1.SubscribeToX509BundlesRequest{})
	recv(t, b, err)
	w.Delete("Identity", "speaker")
	wantCode(t, ended(x), codes.PermissionDenied)
	wantCode(t, ended(b), codes.PermissionDenied)
}

// TestNoDelegatesNoService: without delegates in the configuration the API is not there at all.
func TestNoDelegatesNoService(t *testing.T) {
	w, c := delegates(t)
	_, err := c.FetchJWTSVIDs(w.ctx, &delegatedv1.FetchJWTSVIDsRequest{Selectors: w.selectors(), Audience: []string{"a"}})
	wantCode(t, err, codes.Unimplemented)
}
