package envoy

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	httpauthzv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3"
	httprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	tcpauthzv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/ext_authz/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-id/signet/internal/cli"
	"github.com/signet-id/signet/test/envoycheck"
)

// bootstrap is what 'signet envoy config' prints.
func bootstrap(t testing.TB, args ...string) []byte {
	t.Helper()
	var out, errs bytes.Buffer
	if code := cli.Main(bounded(t), append([]string{"envoy", "config"}, args...), strings.NewReader(""), &out, &errs); code != 0 {
		t.Fatalf("signet envoy config %q: exit status %d: %s", args, code, errs.String())
	}
	return out.Bytes()
}

// parse reads a bootstrap as Envoy does: no field that it does not know, and every rule of its own validation.
func parse(t testing.TB, text []byte) *bootstrapv3.Bootstrap {
	t.Helper()
	var generic map[string]any
	if err := yaml.Unmarshal(text, &generic); err != nil {
		t.Fatalf("%v in:\n%s", err, text)
	}
	raw, err := json.Marshal(generic)
	if err != nil {
		t.Fatal(err)
	}
	var b bootstrapv3.Bootstrap
	if err := protojson.Unmarshal(raw, &b); err != nil {
		t.Fatalf("%v in:\n%s", err, text)
	}
	if err := b.ValidateAll(); err != nil {
		t.Errorf("Envoy would refuse the bootstrap: %v", err)
	}
	return &b
}

// unpack takes a typed_config apart, and holds it to Envoy's rules too.
func unpack[M interface {
	proto.Message
	ValidateAll() error
}](t testing.TB, config *anypb.Any, into M) M {
	t.Helper()
	if err := config.UnmarshalTo(into); err != nil {
		t.Fatal(err)
	}
	if err := into.ValidateAll(); err != nil {
		t.Errorf("Envoy would refuse %s: %v", config.TypeUrl, err)
	}
	return into
}

func TestBootstrap(t *testing.T) {
	b := parse(t, bootstrap(t, "--service", "/web", "--trust-domain", "example.org", "--endpoint", "unix:///run/agent.sock", "--listen", "[::1]:8443", "--local", "app:80",
		"--allow", "/ingress", "--allow", "/ns/shop/**", "--allow", "/**", "--upstream", "127.0.0.1:15432=/db@db.internal:5432",
		"--upstream", "127.0.0.1:9000=spiffe://partner.example/reports@192.0.2.7:443"))
	if b.Node.GetId() != "spiffe://example.org/web" || len(b.StaticResources.Listeners) != 3 || len(b.StaticResources.Clusters) != 4 || b.Admin != nil {
		t.Errorf("node %q, %d listeners, %d clusters, admin %v", b.Node.GetId(), len(b.StaticResources.Listeners), len(b.StaticResources.Clusters), b.Admin)
	}
	inbound := b.StaticResources.Listeners[0]
	if a := inbound.Address.GetSocketAddress(); a.GetAddress() != "::1" || a.GetPortValue() != 8443 {
		t.Errorf("the listener is at %v", a)
	}
	down := unpack(t, inbound.FilterChains[0].TransportSocket.GetTypedConfig(), &tlsv3.DownstreamTlsContext{})
	combined := down.CommonTlsContext.GetCombinedValidationContext()
	if !down.RequireClientCertificate.GetValue() || down.CommonTlsContext.TlsCertificateSdsSecretConfigs[0].Name != "spiffe://example.org/web" ||
		combined.ValidationContextSdsSecretConfig.Name != "spiffe://example.org" {
		t.Errorf("callers meet %v", down)
	}
	var allowed []string
	for _, m := range combined.DefaultValidationContext.MatchTypedSubjectAltNames {
		if m.SanType != tlsv3.SubjectAltNameMatcher_URI {
			t.Errorf("a matcher is for %v", m.SanType)
		}
		allowed = append(allowed, m.Matcher.GetExact()+"|"+m.Matcher.GetPrefix())
	}
	if want := []string{"spiffe://example.org/ingress|", "|spiffe://example.org/ns/shop/", "|spiffe://example.org/"}; !slices.Equal(allowed, want) {
		t.Errorf("allowed are %q, want %q", allowed, want)
	}
	for i, want := range []struct{ id, context string }{{"spiffe://example.org/db", "spiffe://example.org"}, {"spiffe://partner.example/reports", "spiffe://partner.example"}} {
		up := unpack(t, b.StaticResources.Clusters[i+1].TransportSocket.GetTypedConfig(), &tlsv3.UpstreamTlsContext{})
		combined := up.CommonTlsContext.GetCombinedValidationContext()
		matchers := combined.DefaultValidationContext.MatchTypedSubjectAltNames
		if len(matchers) != 1 || matchers[0].Matcher.GetExact() != want.id || combined.ValidationContextSdsSecretConfig.Name != want.context ||
			up.CommonTlsContext.TlsCertificateSdsSecretConfigs[0].Name != "spiffe://example.org/web" {
			t.Errorf("upstream %d is verified by %v", i, combined)
		}
	}
	agent := b.StaticResources.Clusters[3]
	if agent.Name != "signet_agent" || agent.LoadAssignment.Endpoints[0].LbEndpoints[0].GetEndpoint().Address.GetPipe().GetPath() != "/run/agent.sock" {
		t.Errorf("the agent's cluster is %v", agent)
	}
	mixed := parse(t, bootstrap(t, "--service", "spiffe://example.org/web", "--allow", "/a", "--allow", "spiffe://partner.example/b"))
	down = unpack(t, mixed.StaticResources.Listeners[0].FilterChains[0].TransportSocket.GetTypedConfig(), &tlsv3.DownstreamTlsContext{})
	if got := down.CommonTlsContext.GetCombinedValidationContext().ValidationContextSdsSecretConfig.Name; got != "ALL" {
		t.Errorf("callers of two trust domains are verified by %q", got)
	}
}

// TestBootstrapNamesWhatTheAgentHas: the trust domain is asked of the agent, which then has each resource that the
// bootstrap names.
func TestBootstrapNamesWhatTheAgentHas(t *testing.T) {
	n := start(t)
	n.identity("web")
	b := parse(t, bootstrap(t, "--service", "/web", "--allow", "/web", "--endpoint", n.WorkloadAPI()))
	down := unpack(t, b.StaticResources.Listeners[0].FilterChains[0].TransportSocket.GetTypedConfig(), &tlsv3.DownstreamTlsContext{})
	names := []string{down.CommonTlsContext.TlsCertificateSdsSecretConfigs[0].Name, down.CommonTlsContext.GetCombinedValidationContext().ValidationContextSdsSecretConfig.Name}
	wantNames(t, n.world(modern(), names...).next(), names...)
	socket := b.StaticResources.Clusters[1].LoadAssignment.Endpoints[0].LbEndpoints[0].GetEndpoint().Address.GetPipe().GetPath()
	if socket != n.AgentSocket() {
		t.Errorf("the bootstrap has the socket %q, want %q", socket, n.AgentSocket())
	}
}

// TestBootstrapAlwaysVerifies: whatever is asked for, callers are verified and the agent is asked, unless policies are
// declined by name; without an answer nobody gets through, and paths go through as they came.
func TestBootstrapAlwaysVerifies(t *testing.T) {
	for _, protocol := range []string{"tcp", "http", "grpc"} {
		for _, without := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, policies %t", protocol, !without), func(t *testing.T) {
				args := []string{"--service", "spiffe://example.org/web", "--protocol", protocol, "--max-connection", "90s"}
				if without {
					args = append(args, "--without-policies", "--allow", "/**")
				}
				b := parse(t, bootstrap(t, args...))
				chain := b.StaticResources.Listeners[0].FilterChains[0]
				down := unpack(t, chain.TransportSocket.GetTypedConfig(), &tlsv3.DownstreamTlsContext{})
				combined := down.CommonTlsContext.GetCombinedValidationContext()
				matchers := combined.GetDefaultValidationContext().GetMatchTypedSubjectAltNames()
				if !down.RequireClientCertificate.GetValue() || combined.GetValidationContextSdsSecretConfig().GetName() != "spiffe://example.org" ||
					len(matchers) != 1 || matchers[0].SanType != tlsv3.SubjectAltNameMatcher_URI || matchers[0].Matcher.GetPrefix() != "spiffe://example.org/" {
					t.Errorf("callers meet %v", down)
				}
				if protocol == "tcp" {
					if !without {
						authz := unpack(t, chain.Filters[0].GetTypedConfig(), &tcpauthzv3.ExtAuthz{})
						if authz.FailureModeAllow || !authz.IncludePeerCertificate || authz.ShadowMode || authz.GrpcService.GetEnvoyGrpc().GetClusterName() != "signet_agent" {
							t.Errorf("the filter is %v", authz)
						}
					}
					last := unpack(t, chain.Filters[len(chain.Filters)-1].GetTypedConfig(), &tcpproxyv3.TcpProxy{})
					if last.MaxDownstreamConnectionDuration.GetSeconds() != 90 {
						t.Errorf("a connection lasts %v", last.MaxDownstreamConnectionDuration)
					}
					return
				}
				hcm := unpack(t, chain.Filters[0].GetTypedConfig(), &hcmv3.HttpConnectionManager{})
				if hcm.NormalizePath.GetValue() || hcm.NormalizePath == nil || hcm.MergeSlashes || hcm.PathWithEscapedSlashesAction != hcmv3.HttpConnectionManager_KEEP_UNCHANGED ||
					hcm.ForwardClientCertDetails != hcmv3.HttpConnectionManager_SANITIZE_SET || hcm.CommonHttpProtocolOptions.MaxConnectionDuration.GetSeconds() != 90 {
					t.Errorf("the connection manager is %v", hcm)
				}
				if without {
					if len(hcm.HttpFilters) != 1 {
						t.Errorf("%d filters", len(hcm.HttpFilters))
					}
					return
				}
				authz := unpack(t, hcm.HttpFilters[0].GetTypedConfig(), &httpauthzv3.ExtAuthz{})
				if authz.FailureModeAllow || !authz.IncludePeerCertificate || !authz.EncodeRawHeaders || authz.ShadowMode || authz.FilterEnabled != nil || authz.WithRequestBody != nil ||
					authz.StatusOnError.GetCode() != 403 || authz.GetGrpcService().GetEnvoyGrpc().GetClusterName() != "signet_agent" || authz.GetGrpcService().GetTimeout().GetSeconds() != 1 {
					t.Errorf("the filter is %v", authz)
				}
			})
		}
	}
}

// TestRBACFilters reads what 'signet envoy rbac' prints as Envoy does.
func TestRBACFilters(t *testing.T) {
	file := filepath.Join(t.TempDir(), "p.yaml")
	if err := os.WriteFile(file, []byte(webPolicy), 0o600); err != nil {
		t.Fatal(err)
	}
	type filter interface {
		proto.Message
		ValidateAll() error
		GetRules() *rbacv3.RBAC
	}
	for protocol, into := range map[string]func() filter{
		"http": func() filter { return &httprbacv3.RBAC{} },
		"tcp":  func() filter { return &tcprbacv3.RBAC{} },
	} {
		var out, errs bytes.Buffer
		if code := cli.Main(bounded(t), []string{"envoy", "rbac", "-f", file, "--trust-domain", "example.org", "--protocol", protocol, "/web"}, strings.NewReader(""), &out, &errs); code != 0 {
			t.Fatal(errs.String())
		}
		var filters []map[string]any
		if err := yaml.Unmarshal(out.Bytes(), &filters); err != nil || len(filters) != 2 {
			t.Fatalf("%v in\n%s", err, out.String())
		}
		caller := &envoycheck.RBAC{T: t, URIs: []string{"spiffe://example.org/tls"}}
		if protocol == "http" {
			caller.Headers = map[string][]string{":method": {"GET"}, ":path": {"/anything"}}
		}
		for _, f := range filters {
			raw, err := json.Marshal(f["typed_config"])
			if err != nil {
				t.Fatal(err)
			}
			var any anypb.Any
			if err := protojson.Unmarshal(raw, &any); err != nil {
				t.Fatalf("%v in\n%s", err, out.String())
			}
			if rules := unpack(t, &any, into()).GetRules(); !caller.Passes(rules) {
				t.Errorf("%s: the caller that is allowed does not pass %v", protocol, rules)
			}
		}
	}
}

// TestRealEnvoy runs the bootstrap with the Envoy that ENVOY_BIN names: a caller that the policies allow gets through, one that
// they do not gets the id of the decision, and both is so still after the SVIDs have rotated.
func TestRealEnvoy(t *testing.T) {
	envoy := os.Getenv("ENVOY_BIN")
	if envoy == "" {
		t.Skip("ENVOY_BIN names no Envoy")
	}
	n := start(t)
	n.identity("web", "x509TTL: 6s")
	n.identity("stranger")
	n.Apply("kind: CallPolicy\nname: web\nservice: /web\nallow:\n  - from: [/web]\n    http: [{methods: [GET], paths: [/]}]\n")
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") }))
	defer service.Close()
	address := freeAddress(t)
	file := filepath.Join(t.TempDir(), "envoy.yaml")
	if err := os.WriteFile(file, bootstrap(t, "--service", "/web", "--protocol", "http", "--endpoint", n.WorkloadAPI(), "--listen", address,
		"--local", service.Listener.Addr().String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(bounded(t), envoy, "--mode", "validate", "-c", file).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	log := &lockedBuffer{}
	ctx, stop := context.WithCancel(bounded(t))
	cmd := exec.CommandContext(ctx, envoy, "-c", file, "--use-dynamic-base-id", "--concurrency", "1")
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		stop()
		_ = cmd.Wait() // killed
		if t.Failed() {
			t.Log(log.String())
		}
	}()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(n.WorkloadAPI())))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	call := func(id string) (serial string, err error) {
		svids, err := workloadapi.FetchX509SVIDs(ctx, workloadapi.WithAddr(n.WorkloadAPI()))
		if err != nil {
			return "", err
		}
		for _, s := range svids {
			if s.ID.String() != id {
				continue
			}
			config := tlsconfig.MTLSClientConfig(s, source, tlsconfig.AuthorizeID(spiffeid.RequireFromString("spiffe://example.org/web")))
			client := &http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}
			resp, err := client.Get("https://" + address)
			if err != nil {
				return "", err
			}
			defer resp.Body.Close()
			if resp.StatusCode == http.StatusForbidden && resp.Header.Get("Signet-Decision-Id") != "" {
				return "", errDecided
			}
			if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "hello" {
				return "", fmt.Errorf("the service says %q, %w", body, err)
			}
			return resp.TLS.PeerCertificates[0].SerialNumber.String(), nil
		}
		return "", errors.New("no such SVID")
	}
	serials := map[string]bool{}
	retry := time.NewTicker(200 * time.Millisecond)
	defer retry.Stop()
	for len(serials) < 3 { // it comes up, and rotates twice
		select {
		case <-ctx.Done():
			t.Fatalf("Envoy has shown %d SVIDs", len(serials))
		case <-retry.C:
		}
		serial, err := call("spiffe://example.org/web")
		if err != nil {
			if len(serials) > 0 {
				t.Fatalf("an allowed caller is refused: %v", err)
			}
			continue
		}
		serials[serial] = true
		if _, err := call("spiffe://example.org/stranger"); !errors.Is(err, errDecided) {
			t.Fatalf("a caller that is not allowed: %v", err)
		}
	}
	if _, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}); err == nil {
		t.Error("a caller without a certificate gets through")
	}
}

var errDecided = errors.New("denied by a decision")

func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
