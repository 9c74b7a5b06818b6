package interop

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// controller runs an unmodified spire-controller-manager against the CA's admin socket.
func controller(t *testing.T, ca *server, extra string, env ...string) *process {
	t.Helper()
	dir := shortDir(t)
	config := writeFile(t, dir+"/config.yaml", fmt.Sprintf(`apiVersion: spire.spiffe.io/v1alpha1
kind: ControllerManagerConfig
metadata: {name: config}
metrics: {bindAddress: "0"}
health: {healthProbeBindAddress: "0"}
entryIDPrefix: scm
className: scm
watchClassless: true
clusterName: test
clusterDomain: cluster.local
trustDomain: %s
gcInterval: 1000000000
spireServerSocketPath: %s
%s`, trustDomain, ca.socket, extra))
	p := daemon(t, "spire-controller-manager", foreign(t, envController), "--config", config)
	p.env = append(env, "ENABLE_WEBHOOKS=false")
	return p
}

// entryOf returns the only entry of an ID, or an error.
func entryOf(ctx context.Context, s *server, path string) (*types.Entry, error) {
	answer, err := entryv1.NewEntryClient(s.conn).ListEntries(ctx, &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{BySpiffeId: &types.SPIFFEID{TrustDomain: trustDomain, Path: path}}})
	if err != nil {
		return nil, err
	}
	if len(answer.Entries) != 1 {
		return nil, fmt.Errorf("%d entries of %s", len(answer.Entries), path)
	}
	return answer.Entries[0], nil
}

// TestControllerManagerStatic has the controller-manager keep entries and a federation relationship from files: it creates,
// changes and deletes them, and does not touch what is not its own.
func TestControllerManagerStatic(t *testing.T) {
	foreign(t, envController)
	ctx := bounded(t, 2*time.Minute)
	ca := startCA(t, ctx, "")
	partner := strings.ReplaceAll(must[string](t)(startCA(t, ctx, "").signet(ctx, "bundle", "show", "--format", "spiffe")), "\n", "")
	manifests := shortDir(t)
	entry := func(more string) string {
		return "apiVersion: spire.spiffe.io/v1alpha1\nkind: ClusterStaticEntry\nmetadata: {name: web}\nspec:\n  spiffeID: spiffe://example.org/web\n  parentID: spiffe://example.org/node\n" +
			"  selectors: [\"unix:uid:1\", \"unix:gid:2\"]\n  federatesWith: [partner.example]\n  hint: front\n  jwtSVIDTTL: 60s\n" + more
	}
	writeFile(t, manifests+"/web.yaml", entry("  x509SVIDTTL: 600s\n  dnsNames: [web.internal]\n"))
	writeFile(t, manifests+"/partner.yaml", fmt.Sprintf("apiVersion: spire.spiffe.io/v1alpha1\nkind: ClusterFederatedTrustDomain\nmetadata: {name: partner}\nspec:\n  trustDomain: partner.example\n"+
		"  bundleEndpointURL: https://127.0.0.1:1/bundle\n  bundleEndpointProfile: {type: https_spiffe, endpointSPIFFEID: spiffe://partner.example/bundle}\n  trustDomainBundle: '%s'\n", partner))
	must[string](t)(ca.signet(ctx, "entry", "create", "--id", "mine", "--spiffe-id", "/mine", "--parent-id", "/node", "--selector", "unix:uid:3"))
	p := controller(t, ca, "staticManifestPath: "+manifests+"\n")
	p.start()

	var first *types.Entry
	if err := eventually(ctx, func() (err error) {
		first, err = entryOf(ctx, ca, "/web")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(first.Id, "scm.") || first.X509SvidTtl != 600 || first.JwtSvidTtl != 60 || len(first.DnsNames) != 1 || first.Hint != "front" ||
		len(first.Selectors) != 2 || len(first.FederatesWith) != 1 || first.FederatesWith[0] != "partner.example" {
		t.Errorf("it made %v", first)
	}
	td := trustdomainv1.NewTrustDomainClient(ca.conn)
	var fr *types.FederationRelationship
	if err := eventually(ctx, func() (err error) {
		fr, err = td.GetFederationRelationship(ctx, &trustdomainv1.GetFederationRelationshipRequest{TrustDomain: "partner.example"})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if fr.GetHttpsSpiffe().GetEndpointSpiffeId() != "spiffe://partner.example/bundle" || fr.BundleEndpointUrl != "https://127.0.0.1:1/bundle" {
		t.Errorf("it made %v", fr)
	}

	writeFile(t, manifests+"/web.yaml", entry("  x509SVIDTTL: 1200s\n  dnsNames: [web.internal, www.internal]\n"))
	if err := eventually(ctx, func() error {
		e, err := entryOf(ctx, ca, "/web")
		if err == nil && (e.X509SvidTtl != 1200 || len(e.DnsNames) != 2 || e.Id != first.Id || e.RevisionNumber == first.RevisionNumber) {
			err = fmt.Errorf("the entry is %v", e)
		}
		return err
	}); err != nil {
		t.Errorf("a change: %v", err)
	}
	// It does nothing while nothing changes: the entry's revision stays over further rounds.
	steady := must[*types.Entry](t)(entryOf(ctx, ca, "/web")).RevisionNumber
	ca.kill() // it comes back by itself, too
	ca.up(ctx)
	if err := os.Remove(manifests + "/partner.yaml"); err != nil {
		t.Fatal(err)
	}
	writeFile(t, manifests+"/other.yaml", "apiVersion: spire.spiffe.io/v1alpha1\nkind: ClusterStaticEntry\nmetadata: {name: other}\nspec: {spiffeID: \"spiffe://example.org/other\", parentID: \"spiffe://example.org/node\", selectors: [\"unix:uid:9\"], admin: true, downstream: true}\n")
	if err := eventually(ctx, func() error {
		e, err := entryOf(ctx, ca, "/other")
		if err == nil && (!e.Admin || !e.Downstream) {
			err = fmt.Errorf("it made %v", e)
		}
		_, frErr := td.GetFederationRelationship(ctx, &trustdomainv1.GetFederationRelationshipRequest{TrustDomain: "partner.example"})
		if frErr == nil {
			err = errors.Join(err, errors.New("the federation relationship was not deleted"))
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	if e := must[*types.Entry](t)(entryOf(ctx, ca, "/web")); e.RevisionNumber != steady {
		t.Errorf("the entry was changed without need: revision %d, was %d", e.RevisionNumber, steady)
	}
	if err := os.Remove(manifests + "/web.yaml"); err != nil {
		t.Fatal(err)
	}
	if err := eventually(ctx, func() error {
		if e, err := entryOf(ctx, ca, "/web"); err == nil {
			return fmt.Errorf("it did not delete %v", e)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if _, err := entryOf(ctx, ca, "/mine"); err != nil {
		t.Errorf("it deleted an entry that is not its own: %v", err)
	}
	p.end(syscall.SIGTERM)
}
