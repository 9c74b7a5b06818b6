// Package nested has tests of CAs below CAs, all of them real: signet below signet, with the upper CA's agent between them,
// and workloads of both sides that speak with each other.
package nested

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/test/signettest"
)

// patience bounds each wait for what happens by itself.
const patience = 60 * time.Second

// until waits for a condition, which it asks about again and again, and fails the test if it does not come.
func until(t *testing.T, what string, done func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := done()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// allowDownstream creates the entry of a CA below s that runs as this process.
func allowDownstream(t *testing.T, s *signettest.Signet, path string) {
	t.Helper()
	agents, err := agentv1.NewAgentClient(s.AdminConn()).ListAgents(t.Context(), &agentv1.ListAgentsRequest{})
	if err != nil || len(agents.Agents) != 1 {
		t.Fatal(agents, err)
	}
	r, err := entryv1.NewEntryClient(s.AdminConn()).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
		SpiffeId: &types.SPIFFEID{TrustDomain: s.TrustDomain().Name(), Path: path}, ParentId: agents.Agents[0].Id, Downstream: true,
		Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Getuid())}}}}})
	if err != nil || r.Results[0].Status.Code != 0 {
		t.Fatal(r, err)
	}
}

// startBelow starts a CA below upper.
func startBelow(t *testing.T, upper *signettest.Signet, path string) *signettest.Signet {
	t.Helper()
	allowDownstream(t, upper, path)
	return signettest.Start(t, signettest.Config{CA: func(c *ca.Config) {
		c.Metrics.Listen = "127.0.0.1:0"
		c.Authorities.RefreshHint = time.Second // others are waited for during five of them
		c.Upstream.SPIRE = &ca.UpstreamSPIRE{ServerAddress: upper.CAAddr(), AgentSocket: upper.AgentSocket(), SPIFFEID: upper.ID(path).String()}
	}})
}

// workload returns the identity of this process at one side.
func workload(t *testing.T, s *signettest.Signet, name string) *workloadapi.X509Source {
	t.Helper()
	s.Apply(fmt.Sprintf("kind: Identity\nname: %s\nspiffeID: /%s\nmatch: [\"unix:uid:%d\"]\n", name, name, os.Getuid()))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	id := s.ID("/" + name)
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(s.WorkloadAPI())), workloadapi.WithDefaultX509SVIDPicker(pick(id)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { source.Close() })
	until(t, "the SVID of "+id.String(), func() error {
		svid, err := source.GetX509SVID()
		if err == nil && svid.ID != id {
			err = fmt.Errorf("there is %s", svid.ID)
		}
		return err
	})
	return source
}

// speak makes one mTLS connection from client to server, and returns what each saw of the other.
func speak(t *testing.T, server, client *workloadapi.X509Source, serverID, clientID spiffeid.ID) error {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(server, server, tlsconfig.AuthorizeID(clientID)))
	if err != nil {
		return err
	}
	defer l.Close()
	accepted := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err == nil {
			defer conn.Close()
			_, err = io.WriteString(conn, "hello")
		}
		accepted <- err
	}()
	conn, err := tls.Dial("tcp", l.Addr().String(), tlsconfig.MTLSClientConfig(client, client, tlsconfig.AuthorizeID(serverID)))
	if err != nil {
		l.Close()
		return errors.Join(err, <-accepted)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	text, err := io.ReadAll(conn)
	if err == nil && string(text) != "hello" {
		err = fmt.Errorf("read %q", text)
	}
	return errors.Join(err, <-accepted)
}

func bundleOf(t *testing.T, s *signettest.Signet) *types.Bundle {
	t.Helper()
	b, err := bundlev1.NewBundleClient(s.AdminConn()).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func roots(b *types.Bundle) []string {
	var out []string
	for _, a := range b.X509Authorities {
		out = append(out, string(a.Asn1))
	}
	slices.Sort(out)
	return out
}

func jwtKeys(b *types.Bundle) []string {
	var out []string
	for _, k := range b.JwtAuthorities {
		out = append(out, k.KeyId)
	}
	slices.Sort(out)
	return out
}

func TestSignetBelowSignet(t *testing.T) {
	upper := signettest.Start(t, signettest.Config{})
	lower := startBelow(t, upper, "/ca/lower")

	// One trust domain: the same roots and the same JWT keys on both sides.
	if u, l := roots(bundleOf(t, upper)), roots(bundleOf(t, lower)); !slices.Equal(u, l) || len(u) != 1 {
		t.Fatalf("the upper CA publishes %d roots, the lower %d, or others", len(u), len(l))
	}
	until(t, "the same JWT keys on both sides", func() error {
		if u, l := jwtKeys(bundleOf(t, upper)), jwtKeys(bundleOf(t, lower)); !slices.Equal(u, l) || len(u) != 2 {
			return fmt.Errorf("the upper CA has %v, the lower %v", u, l)
		}
		return nil
	})

	above, below := workload(t, upper, "above"), workload(t, lower, "below")
	svid, err := below.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	if n := len(svid.Certificates); n != 2 || svid.Certificates[1].IsCA == false || slices.Contains(roots(bundleOf(t, upper)), string(svid.Certificates[1].Raw)) {
		t.Errorf("the lower workload's chain has %d certificates, want its own and the intermediate", n)
	}
	for _, way := range []struct {
		name           string
		server, client *workloadapi.X509Source
		sID, cID       spiffeid.ID
	}{
		{"the lower calls the upper", above, below, upper.ID("/above"), lower.ID("/below")},
		{"the upper calls the lower", below, above, lower.ID("/below"), upper.ID("/above")},
	} {
		if err := speak(t, way.server, way.client, way.sID, way.cID); err != nil {
			t.Errorf("%s: %v", way.name, err)
		}
	}

	// JWT-SVIDs of each side are good at the other.
	for _, way := range []struct {
		name     string
		from, to *signettest.Signet
		subject  spiffeid.ID
	}{{"upper to lower", upper, lower, upper.ID("/above")}, {"lower to upper", lower, upper, lower.ID("/below")}} {
		token, err := workloadapi.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "test", Subject: way.subject}, workloadapi.WithAddr(way.from.WorkloadAPI()))
		if err != nil {
			t.Fatalf("%s: %v", way.name, err)
		}
		until(t, "a JWT-SVID, "+way.name, func() error {
			got, err := workloadapi.ValidateJWTSVID(t.Context(), token.Marshal(), "test", workloadapi.WithAddr(way.to.WorkloadAPI()))
			if err == nil && got.ID != way.subject {
				err = fmt.Errorf("it is %s", got.ID)
			}
			return err
		})
	}
}

// TestRootTaintedAbove: when the upper CA taints a root, the lower one gets below another, and re-issues what it has signed
// below the tainted one long before that ends: the upper CA is about to revoke it.
func TestRootTaintedAbove(t *testing.T) {
	upper := signettest.Start(t, signettest.Config{})
	lower := startBelow(t, upper, "/ca/lower")
	below := workload(t, lower, "below")
	old := bundleOf(t, upper).X509Authorities[0].Asn1
	admin := adminv1.NewAdminClient(upper.AdminConn())
	const x509Type = adminv1.AuthorityType_AUTHORITY_TYPE_X509
	all, err := admin.ListAuthorities(t.Context(), &adminv1.ListAuthoritiesRequest{Type: x509Type})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := admin.PrepareAuthority(t.Context(), &adminv1.PrepareAuthorityRequest{Type: x509Type}); err != nil {
		t.Fatal(err)
	}
	until(t, "the new root below", func() error {
		if n := len(bundleOf(t, lower).X509Authorities); n != 2 {
			return fmt.Errorf("%d roots", n)
		}
		return nil
	})
	s, err := admin.ActivateAuthority(t.Context(), &adminv1.ActivateAuthorityRequest{Type: x509Type, Force: true})
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = s.Recv()
	}
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if _, err := admin.TaintAuthority(t.Context(), &adminv1.EndAuthorityRequest{Type: x509Type, Id: all.Authorities[0].Id}); err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(old)
	if err != nil {
		t.Fatal(err)
	}
	until(t, "an SVID below the new root", func() error {
		svid, err := below.GetX509SVID()
		if err == nil && svid.Certificates[1].CheckSignatureFrom(root) == nil {
			err = errors.New("the SVID is still below the tainted root")
		}
		return err
	})
	for _, a := range bundleOf(t, lower).X509Authorities {
		if a.Tainted != slices.Equal(a.Asn1, old) {
			t.Errorf("in the lower bundle a root is tainted: %t", a.Tainted)
		}
	}
}

func TestUpstreamIsAwayAndComesBack(t *testing.T) {
	upper := signettest.Start(t, signettest.Config{})
	lower := startBelow(t, upper, "/ca/lower")
	below := workload(t, lower, "below")
	if err := upper.StopCA(); err != nil {
		t.Fatal(err)
	}
	ready := func() string {
		r, err := http.Get("http://" + lower.CA().MetricsAddr().String() + "/ready")
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		text, err := io.ReadAll(io.LimitReader(r.Body, 1<<16))
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(r.StatusCode, " ", string(text))
	}
	until(t, "/ready names the upstream", func() error {
		if text := ready(); !strings.HasPrefix(text, "200 ready") || !strings.Contains(text, "warning: upstream SPIFFE server "+upper.CAAddr()) {
			return errors.New(text)
		}
		return nil
	})
	// What is there goes on, and new workloads get their SVIDs.
	other := workload(t, lower, "another")
	if err := speak(t, below, other, lower.ID("/below"), lower.ID("/another")); err != nil {
		t.Error(err)
	}
	// The lower CA starts without its upstream, too.
	if err := lower.RestartCA(t.Context()); err != nil {
		t.Fatalf("the lower CA does not start while its upstream is away: %v", err)
	}
	if err := upper.RestartCA(t.Context()); err != nil {
		t.Fatal(err)
	}
	until(t, "the upstream is back", func() error {
		if text := ready(); text != "200 ready\n" {
			return errors.New(text)
		}
		return nil
	})
}

// Without a downstream entry there is no CA below, and the error says what is missing.
func TestNoEntryNoCA(t *testing.T) {
	upper := signettest.Start(t, signettest.Config{})
	upper.Apply(fmt.Sprintf("kind: Identity\nname: plain\nspiffeID: /plain\nmatch: [\"unix:uid:%d\"]\n", os.Getuid()))
	dir := t.TempDir()
	_, err := ca.New(t.Context(), ca.Config{TrustDomain: "example.org", Listen: "127.0.0.1:0", DataDir: dir + "/ca", AdminSocket: ca.AdminSocket{Path: dir + "/admin/s"},
		Seal: ca.Seal{KeyFile: dir + "/seal.key", Create: true}, Audit: ca.Audit{Reserve: 1 << 20},
		Upstream: ca.Upstream{SPIRE: &ca.UpstreamSPIRE{ServerAddress: upper.CAAddr(), AgentSocket: upper.AgentSocket()}}})
	if err == nil || !strings.Contains(err.Error(), "upstream SPIFFE server "+upper.CAAddr()) || !strings.Contains(err.Error(), "NewDownstreamX509CA") {
		t.Errorf("a CA below without an entry: %v", err)
	}
}

// A server that is not the upstream's, whatever it presents, gets no request.
func TestServerThatIsNotTheUpstream(t *testing.T) {
	upper := signettest.Start(t, signettest.Config{})
	allowDownstream(t, upper, "/ca/lower")
	source, err := workloadapi.NewX509Source(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr(upper.WorkloadAPI())))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	// It has a good SVID of the trust domain, but is not /spire/server.
	l, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeAny()))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	read := make(chan int, 16)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				close(read)
				return
			}
			n, _ := conn.Read(make([]byte, 1024))
			conn.Close()
			read <- n
		}
	}()
	dir := t.TempDir()
	_, err = ca.New(t.Context(), ca.Config{TrustDomain: "example.org", Listen: "127.0.0.1:0", DataDir: dir + "/ca", AdminSocket: ca.AdminSocket{Path: dir + "/admin/s"},
		Seal: ca.Seal{KeyFile: dir + "/seal.key", Create: true}, Audit: ca.Audit{Reserve: 1 << 20},
		Upstream: ca.Upstream{SPIRE: &ca.UpstreamSPIRE{ServerAddress: l.Addr().String(), AgentSocket: upper.AgentSocket()}}})
	if err == nil || !strings.Contains(err.Error(), "not spiffe://example.org/spire/server") {
		t.Errorf("another server as upstream: %v", err)
	}
	l.Close()
	for n := range read {
		if n > 0 {
			t.Errorf("the server read %d bytes of a request", n)
		}
	}
}
