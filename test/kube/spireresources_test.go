//go:build kube

package kube

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/ca/kube/pods"
	"github.com/signet-id/signet/ca/kube/spireresources"
	"github.com/signet-id/signet/ca/kube/watch"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store/bolt"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/test/signettest"
)

// spireCRDs are our definitions of spire-controller-manager's resources, or its own if SPIRE_CONTROLLER_MANAGER_CRDS names them.
func spireCRDs() string {
	if files := os.Getenv("SPIRE_CONTROLLER_MANAGER_CRDS"); files != "" {
		return files
	}
	return "../../deploy/helm/signet/files/crds-spire"
}

// A madeUp cluster has nodes and pods that nobody runs, in namespaces of its own: an API server is enough for it.
type madeUp struct {
	*cluster
	mark  string // in all names
	class string // of its resources
}

func newMadeUp(t *testing.T, ctx context.Context) *madeUp {
	t.Helper()
	k := &cluster{t: t, ctx: ctx, kubeconfig: need(t, "SIGNET_KUBECONFIG", "the path of a kubeconfig of a running API server's admin")}
	m := &madeUp{cluster: k, mark: "scm" + strings.ToLower(rand.Text()[:6])}
	m.class = m.mark
	k.kubectl("apply", "-f", spireCRDs())
	for _, crd := range []string{"clusterspiffeids", "clusterstaticentries", "clusterfederatedtrustdomains"} {
		k.kubectl("wait", "--for=condition=Established", "crd/"+crd+".spire.spiffe.io", "--timeout=60s")
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		k.ctx = ctx
		for _, kind := range []string{"clusterspiffeid", "clusterstaticentry", "clusterfederatedtrustdomain", "node", "namespace"} {
			k.kubectl("delete", kind, "-l", "mark="+m.mark, "--wait=false", "--ignore-not-found")
		}
	})
	return m
}

// node makes a node and returns its UID.
func (m *madeUp) node(name string, labels string) string {
	m.t.Helper()
	m.apply(fmt.Sprintf("apiVersion: v1\nkind: Node\nmetadata: {name: %s-%s, labels: {mark: %s%s}}\nspec: {podCIDR: 10.77.0.0/24}\n", m.mark, name, m.mark, labels))
	return m.kubectl("get", "node", m.mark+"-"+name, "-o", "jsonpath={.metadata.uid}")
}

func (m *madeUp) ns(name, labels string) {
	m.t.Helper()
	m.apply(fmt.Sprintf("apiVersion: v1\nkind: Namespace\nmetadata: {name: %s-%s, labels: {mark: %s%s}}\n", m.mark, name, m.mark, labels))
	for {
		if _, err := m.try("", "-n", m.mark+"-"+name, "get", "serviceaccount", "default"); err == nil {
			return
		}
		pause(m.t, m.ctx)
	}
}

// pod makes a pod on a node, with an address and ready, so that Services are before it.
func (m *madeUp) pod(ns, name, node, sa, labels string, address int) {
	m.t.Helper()
	m.apply(fmt.Sprintf(`apiVersion: v1
kind: ServiceAccount
metadata: {name: %[5]s, namespace: %[1]s-%[2]s}
---
apiVersion: v1
kind: Pod
metadata: {name: %[3]s, namespace: %[1]s-%[2]s, labels: {%[6]s}, annotations: {example.org/team: blue}}
spec:
  nodeName: %[1]s-%[4]s
  serviceAccountName: %[5]s
  containers: [{name: main, image: example.org/main:1}, {name: side, image: example.org/side:2}]
`, m.mark, ns, name, node, sa, labels))
	m.kubectl("-n", m.mark+"-"+ns, "patch", "pod", name, "--subresource=status", "--type=merge", "-p",
		fmt.Sprintf(`{"status":{"phase":"Running","hostIP":"10.77.1.1","hostIPs":[{"ip":"10.77.1.1"}],"podIP":"10.77.0.%[1]d","podIPs":[{"ip":"10.77.0.%[1]d"}],"conditions":[{"type":"Ready","status":"True"}]}}`, address))
}

func (m *madeUp) service(ns, name, selector string) {
	m.t.Helper()
	m.apply(fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: %s, namespace: %s-%s}\nspec: {clusterIP: None, selector: {%s}, ports: [{port: 80}]}\n", name, m.mark, ns, selector))
}

// resource makes a custom resource of spire-controller-manager's.
func (m *madeUp) resource(kind, name, spec string) {
	m.t.Helper()
	m.apply(fmt.Sprintf("apiVersion: spire.spiffe.io/v1alpha1\nkind: %s\nmetadata: {name: %s-%s, labels: {mark: %s}}\nspec: {className: %s, %s}\n", kind, m.mark, name, m.mark, m.class, spec))
}

// younger applies a resource that is younger than another one. Ages are whole seconds at the API server, and of two of one second their
// UIDs, which are chance, say which is the older.
func (m *madeUp) younger(ctx context.Context, kind, than, name, spec string) {
	m.t.Helper()
	made := func(name string) string {
		return m.kubectl("get", kind, m.mark+"-"+name, "-o", "jsonpath={.metadata.creationTimestamp}")
	}
	until(m.t, ctx, func() string {
		m.resource(kind, name, spec)
		if at := made(name); at == made(than) {
			m.kubectl("delete", kind, m.mark+"-"+name)
			return fmt.Sprintf("%s is not younger than %s: both are of %s", name, than, at)
		}
		return ""
	})
}

// manager runs an unmodified spire-controller-manager for the resources of m on a CA.
func (m *madeUp) manager(ctx context.Context, socket, extra string) (stop func()) {
	m.t.Helper()
	program := need(m.t, "SPIRE_CONTROLLER_MANAGER_BIN", "the path of an unmodified spire-controller-manager")
	dir := shortDir(m.t)
	config := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(config, fmt.Appendf(nil, `apiVersion: spire.spiffe.io/v1alpha1
kind: ControllerManagerConfig
metadata: {name: config}
metrics: {bindAddress: "0"}
health: {healthProbeBindAddress: "0"}
className: %s
clusterName: prod
clusterDomain: cluster.local
trustDomain: example.org
ignoreNamespaces: [kube-system, %s-ignored]
gcInterval: 1000000000
spireServerSocketPath: %s
%s`, m.class, m.mark, socket, extra), 0o600); err != nil {
		m.t.Fatal(err)
	}
	return background(m.t, ctx, []string{"KUBECONFIG=" + m.kubeconfig, "ENABLE_WEBHOOKS=false"}, program, "--config", config)
}

// A reading is our side: the resources of a cluster read into a registry.
type reading struct {
	reg *registry.Registry
	x   *pods.Expander
	r   *spireresources.Reader
	run func(f func(context.Context) error)
}

func (m *madeUp) read(ctx context.Context) *reading {
	m.t.Helper()
	td := spiffeid.RequireTrustDomainFromString("example.org")
	s, err := bolt.Open(bolt.Config{Dir: m.t.TempDir()})
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { s.Close() })
	reg, err := registry.Open(ctx, registry.Config{TrustDomain: td, Store: s})
	if err != nil {
		m.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(ctx)
	out := &reading{reg: reg}
	out.run = func(f func(context.Context) error) {
		done := make(chan error, 1)
		go func() { done <- f(ctx) }()
		m.t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				m.t.Error(err)
			}
		})
	}
	out.run(reg.Run)
	client, err := kube.Open("prod", m.kubeconfig)
	if err != nil {
		m.t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(m.t.Output(), nil))
	out.x = pods.New(pods.Config{Registry: reg, Log: log})
	out.run(watch.New(watch.Config{Client: client, Expander: out.x, KeepObjects: true, Log: log}).Run)
	out.r = spireresources.New(spireresources.Config{Client: client, TrustDomain: td, Registry: reg, Expander: out.x, ClassName: m.class, ClusterDomain: "cluster.local",
		IgnoreNamespaces: []*regexp.Regexp{regexp.MustCompile("kube-system"), regexp.MustCompile(m.mark + "-ignored")}, Log: log, StatusEvery: 100 * time.Millisecond,
		Apply: func(ctx context.Context, docs []strictyaml.Document, o registry.Options, _ func(registry.Ref) string) error {
			p, err := reg.Plan(docs, o)
			if err != nil {
				return err
			}
			_, err = reg.Apply(ctx, p)
			return err
		},
		Audit: func(context.Context, ...auditlog.Record) error { return nil }})
	out.run(out.r.Run)
	return out
}

// An identity is what of a registration entry matters: the rest is how the two sides come to it.
type identity struct {
	ID, Node      string
	Selectors     []string
	X509, JWT     time.Duration
	DNS, Federate []string
	Hint          string
}

func (i identity) String() string {
	b, _ := json.Marshal(i)
	return string(b)
}

func (g *reading) identities() []string {
	var out []string
	for _, p := range g.x.All("prod") {
		for _, e := range g.x.Entries("prod", p.UID) {
			i := identity{ID: e.SPIFFEID.String(), Node: p.NodeUID, X509: e.X509TTL, JWT: e.JWTTTL, DNS: slices.Sorted(slices.Values(e.DNSNames)), Hint: e.Hint}
			for _, s := range e.Selectors {
				i.Selectors = append(i.Selectors, s.String())
			}
			slices.Sort(i.Selectors)
			for _, td := range e.FederatesWith {
				i.Federate = append(i.Federate, td.Name())
			}
			out = append(out, i.String())
		}
	}
	slices.Sort(out)
	return out
}

// registered are the identities that are entries of a CA.
func registered(t *testing.T, ctx context.Context, conn grpc.ClientConnInterface) []string {
	t.Helper()
	var out []string
	for token := ""; ; {
		page, err := entryv1.NewEntryClient(conn).ListEntries(ctx, &entryv1.ListEntriesRequest{PageSize: 200, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range page.Entries {
			node, ok := strings.CutPrefix(e.ParentId.Path, "/spire/agent/k8s_psat/prod/")
			if !ok {
				continue
			}
			i := identity{ID: "spiffe://example.org" + e.SpiffeId.Path, Node: node, X509: time.Duration(e.X509SvidTtl) * time.Second, JWT: time.Duration(e.JwtSvidTtl) * time.Second,
				DNS: slices.Sorted(slices.Values(e.DnsNames)), Federate: slices.Sorted(slices.Values(e.FederatesWith)), Hint: e.Hint}
			for _, s := range e.Selectors {
				i.Selectors = append(i.Selectors, s.Type+":"+s.Value)
			}
			slices.Sort(i.Selectors)
			out = append(out, i.String())
		}
		if token = page.NextPageToken; token == "" {
			slices.Sort(out)
			return out
		}
	}
}

const idTemplate = `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/%s"`

// clusterSPIFFEIDs are specs by name. They are all for the pods of their mark by the namespaceSelector that is added.
var differing = map[string]string{
	"plain":        `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/plain/ns/{{ .PodMeta.Namespace }}/sa/{{ .PodSpec.ServiceAccountName }}"`,
	"per-pod":      `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/pod/{{ .PodMeta.Namespace }}/{{ .PodMeta.Name }}", ttl: 10m, jwtTtl: 90s`,
	"fractions":    `spiffeIDTemplate: "spiffe://example.org/fraction/{{ .PodMeta.UID }}", ttl: 600.9s, jwtTtl: 1m0.5s`,
	"cluster":      `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/{{ .ClusterName }}/{{ .ClusterDomain }}/{{ .PodMeta.Name }}"`,
	"node":         `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/node/{{ .NodeMeta.Labels.rack }}/{{ .NodeMeta.UID }}/{{ len .NodeSpec.PodCIDR }}/{{ .PodMeta.Name }}"`,
	"chosen":       `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/chosen/{{ .PodMeta.Name }}", podSelector: {matchLabels: {app: web}}`,
	"expression":   `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/expr/{{ .PodMeta.Name }}", podSelector: {matchExpressions: [{key: app, operator: In, values: [web, api]}, {key: tier, operator: DoesNotExist}]}`,
	"not-in":       `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/notin/{{ .PodMeta.Name }}", podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [web]}]}`,
	"nobody":       `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/nobody", podSelector: {matchLabels: {app: nothing}}`,
	"labels":       `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/label/{{ .PodMeta.Labels.app }}/{{ .PodMeta.Name }}"`,
	"missing":      `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/missing/{{ .PodMeta.Labels.tier }}"`,
	"index":        `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/index/{{ index .PodMeta.Annotations \"example.org/team\" }}/{{ .PodMeta.Name }}"`,
	"conditional":  `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/{{ if eq .PodMeta.Labels.app \"web\" }}web{{ else }}other{{ end }}/{{ .PodMeta.Name }}"`,
	"containers":   `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/containers{{ range .PodSpec.Containers }}/{{ .Name }}{{ end }}/{{ .PodMeta.Name }}"`,
	"selectors":    `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/sel/{{ .PodMeta.Name }}", workloadSelectorTemplates: ["k8s:container-name:main", "k8s:ns:{{ .PodMeta.Namespace }}", "k8s:container-name:main"]`,
	"bad-selector": `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/badsel/{{ .PodMeta.Name }}", workloadSelectorTemplates: ["nothing"]`,
	"dns":          `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/dns/{{ .PodMeta.Name }}", dnsNameTemplates: ["{{ .PodMeta.Name }}.{{ .PodMeta.Namespace }}.{{ .ClusterDomain }}", "extra.internal", "extra.internal"]`,
	"services":     `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/svc/{{ .PodMeta.Name }}", autoPopulateDNSNames: true, dnsNameTemplates: ["{{ .PodMeta.Name }}.internal", "front"]`,
	"hint":         `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/hint/{{ .PodMeta.Name }}", hint: "for databases"`,
	"federates":    `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/fed/{{ .PodMeta.Name }}", federatesWith: [partner.example, second.example]`,
	"masked":       `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/plain/ns/{{ .PodMeta.Namespace }}/sa/{{ .PodSpec.ServiceAccountName }}", ttl: 5m`,
	"same-id":      `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/plain/ns/{{ .PodMeta.Namespace }}/sa/{{ .PodSpec.ServiceAccountName }}", workloadSelectorTemplates: ["k8s:container-name:side"]`,
	"bad-template": `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/{{ .Nothing }}"`,
	"unparsable":   `spiffeIDTemplate: "spiffe://{{ .TrustDomain "`,
	"bad-id":       `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/a//b"`,
	"foreign":      `spiffeIDTemplate: "spiffe://other.example/x"`,
	"no-scheme":    `spiffeIDTemplate: "/relative/{{ .PodMeta.Name }}"`,
	"bad-fed":      `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/badfed/{{ .PodMeta.Name }}", federatesWith: ["Not A Name"]`,
	"defines":      `spiffeIDTemplate: "{{ define \"x\" }}{{ .TrustDomain }}/def{{ end }}spiffe://{{ template \"x\" . }}/{{ with .PodMeta }}{{ .Name }}{{ end }}"`,
	"functions":    `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/fn/{{ printf \"%s-%d\" .PodMeta.Name (len .PodSpec.Containers) }}/{{ urlquery \"a\" }}/{{ slice .PodMeta.Name 0 2 }}"`,
	"fallback":     `spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/fallback/{{ .PodMeta.Name }}", fallback: true`,
}

// The same resources and pods give the same identities by spire-controller-manager and by signet, and the same status.
func TestSPIREResourcesAreReadAsTheirControllerDoes(t *testing.T) {
	ctx := bounded(t)
	m := newMadeUp(t, ctx)
	m.node("n1", ", rack: r1")
	m.node("n2", "")
	m.ns("a", ", team: red")
	m.ns("b", ", team: blue")
	m.ns("alone", ", team: none")
	m.ns("ignored", ", team: red")
	m.pod("a", "web-1", "n1", "web", "app: web, tier: front", 11)
	m.pod("a", "web-2", "n2", "web", "app: web", 12)
	m.pod("a", "api-1", "n1", "api", "app: api", 13)
	m.pod("b", "job-1", "n2", "default", "app: job, tier: back", 14)
	m.pod("alone", "lone-1", "n2", "lone", "app: lone", 16)
	m.pod("ignored", "web-9", "n1", "web", "app: web", 17)
	m.service("a", "front", "app: web")
	m.service("a", "all", "")
	m.service("b", "jobs", "app: job")
	for _, name := range slices.Sorted(maps.Keys(differing)) {
		spec := differing[name]
		if name == "fallback" {
			spec += ", namespaceSelector: {matchExpressions: [{key: mark, operator: In, values: [" + m.mark + "]}]}"
		} else {
			spec += ", namespaceSelector: {matchLabels: {mark: " + m.mark + "}, matchExpressions: [{key: team, operator: NotIn, values: [none]}]}"
		}
		m.resource("ClusterSPIFFEID", name, spec)
	}
	m.class = "other"
	m.resource("ClusterSPIFFEID", "other-class", fmt.Sprintf(idTemplate, "other-class/{{ .PodMeta.Name }}"))
	m.class = m.mark

	s := signettest.Start(t, signettest.Config{})
	theirs := func() []string { return registered(t, ctx, s.AdminConn()) }
	m.manager(ctx, s.CASocket(), "")
	ours := m.read(ctx)
	agree := func(what string, least int) {
		t.Helper()
		var a, b []string
		for {
			a, b = theirs(), ours.identities()
			if len(a) >= least && slices.Equal(a, b) {
				return
			}
			select {
			case <-time.After(250 * time.Millisecond):
			case <-ctx.Done():
				for _, x := range a {
					if !slices.Contains(b, x) {
						t.Errorf("%s: only spire-controller-manager has %s", what, x)
					}
				}
				for _, x := range b {
					if !slices.Contains(a, x) {
						t.Errorf("%s: only signet has %s", what, x)
					}
				}
				t.Fatalf("%s: %d and %d identities", what, len(a), len(b))
			}
		}
	}
	agree("at first", 60)
	m.kubectl("-n", m.mark+"-a", "delete", "pod", "web-2", "--wait=false", "--grace-period=0", "--force")
	m.kubectl("-n", m.mark+"-a", "label", "pod", "web-1", "app=api", "--overwrite")
	m.kubectl("label", "namespace", m.mark+"-b", "team=none", "--overwrite")
	m.kubectl("delete", "clusterspiffeid", m.mark+"-per-pod")
	m.kubectl("-n", m.mark+"-a", "delete", "service", "front")
	m.resource("ClusterSPIFFEID", "hint", differing["hint"]+`, ttl: 7m, namespaceSelector: {matchLabels: {team: red}}`)
	m.pod("a", "new-1", "n1", "web", "app: web", 18)
	agree("after changes", 30)

	// The status is as theirs, which ours finds and does not write again.
	statuses := func() map[string]any {
		var list struct {
			Items []struct {
				Metadata struct{ Name string }
				Spec     struct{ ClassName string }
				Status   any
			}
		}
		if err := json.Unmarshal([]byte(m.kubectl("get", "clusterspiffeids", "-l", "mark="+m.mark, "-o", "json")), &list); err != nil {
			t.Fatal(err)
		}
		out := map[string]any{}
		for _, i := range list.Items {
			if i.Spec.ClassName == m.class {
				out[i.Metadata.Name] = i.Status
			}
		}
		return out
	}
	// Their statuses follow their entries. A pass that knows the first of these two has seen all changes, and one that knows the second
	// comes after it.
	for _, mark := range []string{"mark-1", "mark-2"} {
		m.resource("ClusterSPIFFEID", mark, fmt.Sprintf(idTemplate, "mark/{{ .PodMeta.Name }}")+", namespaceSelector: {matchLabels: {team: red}}, podSelector: {matchLabels: {app: nobody}}")
		until(t, ctx, func() string {
			if m.status("clusterspiffeid", mark) == "" {
				return "spire-controller-manager has not come to " + mark
			}
			return ""
		})
	}
	want := statuses()
	for _, name := range slices.Sorted(maps.Keys(want)) {
		m.kubectl("patch", "clusterspiffeid", name, "--subresource=status", "--type=merge", "-p", `{"status":null}`)
	}
	ours.run(ours.r.Lead)
	// A spec that cannot be read selects nothing by theirs; ours counts the pods that get nothing for it.
	for {
		got := statuses()
		same := true
		for name, st := range want {
			parsed := !strings.HasSuffix(name, "-unparsable") && !strings.HasSuffix(name, "-bad-fed")
			if parsed && !reflect.DeepEqual(st, got[name]) {
				same = false
			}
		}
		if same {
			break
		}
		select {
		case <-time.After(250 * time.Millisecond):
		case <-ctx.Done():
			for name, st := range want {
				if !reflect.DeepEqual(st, got[name]) {
					t.Errorf("status of %s is %v, want %v", name, got[name], st)
				}
			}
			t.FailNow()
		}
	}
}

// until waits until problem finds none.
func until(t *testing.T, ctx context.Context, problem func() string) {
	t.Helper()
	for {
		p := problem()
		if p == "" {
			return
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			t.Fatal(p)
		}
	}
}

func (m *madeUp) status(kind, name string) string {
	m.t.Helper()
	return m.kubectl("get", kind, m.mark+"-"+name, "-o", "jsonpath={.status}")
}

// ClusterStaticEntries are entries that belong to them, from the first to the last; what the controller left behind is taken over.
func TestClusterStaticEntries(t *testing.T) {
	ctx := bounded(t)
	m := newMadeUp(t, ctx)
	g := m.read(ctx)
	td := spiffeid.RequireTrustDomainFromString("example.org")
	left := &registry.Entry{ID: "scm.left-over", SPIFFEID: spiffeid.RequireFromPath(td, "/left"), ParentID: spiffeid.RequireFromPath(td, "/node"), Selectors: []spiffe.Selector{{Type: "unix", Value: "uid:7"}}, Hint: "old"}
	if got := g.reg.CreateEntries(ctx, []*registry.Entry{left})[0]; got.Err != nil {
		t.Fatal(got.Err)
	}
	m.resource("ClusterStaticEntry", "left", `spiffeID: "spiffe://example.org/left", parentID: "spiffe://example.org/node", selectors: ["unix:uid:7"], hint: new, x509SVIDTTL: 600.5s`)
	m.resource("ClusterStaticEntry", "full", `spiffeID: "spiffe://example.org/full", parentID: "spiffe://example.org/node", selectors: ["unix:uid:1", "unix:gid:2"], federatesWith: [partner.example], x509SVIDTTL: 10m, jwtSVIDTTL: 2m, dnsNames: [a.internal], admin: true`)
	m.younger(ctx, "ClusterStaticEntry", "full", "twice", `spiffeID: "spiffe://example.org/full", parentID: "spiffe://example.org/node", selectors: ["unix:gid:2", "unix:uid:1"]`)
	m.resource("ClusterStaticEntry", "alias", `spiffeID: "spiffe://example.org/node", parentID: "spiffe://example.org/spire/server", selectors: ["k8s_psat:cluster:prod"]`)
	m.resource("ClusterStaticEntry", "bad", `spiffeID: "spiffe://example.org/bad", parentID: "spiffe://example.org/node", selectors: ["nothing"]`)
	m.resource("ClusterStaticEntry", "foreign", `spiffeID: "spiffe://other.example/x", parentID: "spiffe://example.org/node", selectors: ["unix:uid:1"]`)
	g.run(g.r.Lead)
	want := map[string]string{"left": `{"masked":false,"rendered":true,"set":true}`, "full": `{"masked":false,"rendered":true,"set":true}`, "twice": `{"masked":true,"rendered":true,"set":false}`,
		"alias": `{"masked":false,"rendered":true,"set":true}`, "bad": `{"masked":false,"rendered":false,"set":false}`, "foreign": `{"masked":false,"rendered":true,"set":false}`}
	until(t, ctx, func() string {
		for name, st := range want {
			if got := m.status("clusterstaticentry", name); got != st {
				return fmt.Sprintf("status of %s is %s, want %s", name, got, st)
			}
		}
		return ""
	})
	e, err := g.reg.Entry("scm.left-over")
	if err != nil || e.Hint != "new" || e.X509TTL != 10*time.Minute || e.Owner != "kubernetes/prod/spire/ClusterStaticEntry/"+m.mark+"-left" {
		t.Errorf("the entry that was there: %+v %v", e, err)
	}
	owned := g.reg.OwnedEntries(spireresources.Source("prod"))
	if len(owned) != 3 {
		t.Fatalf("%d entries, want 3", len(owned))
	}
	for _, e := range owned {
		if e.SPIFFEID.Path() == "/full" && (!e.Admin || e.JWTTTL != 2*time.Minute || len(e.Selectors) != 2 || len(e.FederatesWith) != 1 || len(e.DNSNames) != 1) {
			t.Errorf("the entry is %+v", e)
		}
		if _, _, err := g.reg.DeleteEntry(ctx, e.ID); err == nil || !strings.Contains(err.Error(), "belongs to kubernetes/prod/spire/ClusterStaticEntry/") {
			t.Errorf("somebody else deletes it: %v", err)
		}
		if _, err := g.reg.UpdateEntry(ctx, e.ID, func(e *registry.Entry) error { e.Hint = "mine"; return nil }); err == nil || !strings.Contains(err.Error(), "belongs to") {
			t.Errorf("somebody else changes it: %v", err)
		}
	}
	// The older one goes, and the other takes its place with the same entry.
	m.kubectl("delete", "clusterstaticentry", m.mark+"-full")
	until(t, ctx, func() string {
		if got := m.status("clusterstaticentry", "twice"); got != `{"masked":false,"rendered":true,"set":true}` {
			return "the one that was masked: " + got
		}
		return ""
	})
	m.kubectl("delete", "clusterstaticentry", m.mark+"-twice", m.mark+"-left", m.mark+"-alias")
	until(t, ctx, func() string {
		if n := len(g.reg.OwnedEntries(spireresources.Source("prod"))); n > 0 {
			return fmt.Sprint(n, " entries outlive their resources")
		}
		return ""
	})
}

// ClusterFederatedTrustDomains are relationships that belong to them.
func TestClusterFederatedTrustDomains(t *testing.T) {
	ctx := bounded(t)
	m := newMadeUp(t, ctx)
	g := m.read(ctx)
	td := func(name string) spiffeid.TrustDomain {
		return spiffeid.RequireTrustDomainFromString(name + ".example")
	}
	if err := g.reg.CreateFederation(ctx, &registry.Federation{TrustDomain: td("left"), URL: "https://127.0.0.1:1/", Profile: registry.ProfileWeb}, nil); err != nil {
		t.Fatal(err)
	}
	m.resource("ClusterFederatedTrustDomain", "left", `trustDomain: left.example, bundleEndpointURL: "https://127.0.0.1:1/", bundleEndpointProfile: {type: https_web}`)
	m.resource("ClusterFederatedTrustDomain", "spiffe", `trustDomain: two.example, bundleEndpointURL: "https://127.0.0.1:2/", bundleEndpointProfile: {type: https_spiffe, endpointSPIFFEID: "spiffe://two.example/b"}, trustDomainBundle: '`+foreignBundle(t)+`'`)
	m.younger(ctx, "ClusterFederatedTrustDomain", "spiffe", "two-again", `trustDomain: two.example, bundleEndpointURL: "https://127.0.0.1:3/", bundleEndpointProfile: {type: https_web}`)
	m.resource("ClusterFederatedTrustDomain", "own", `trustDomain: example.org, bundleEndpointURL: "https://127.0.0.1:3/", bundleEndpointProfile: {type: https_web}`)
	g.run(g.r.Lead)
	until(t, ctx, func() string {
		for name, url := range map[string]string{"left": "https://127.0.0.1:1/", "two": "https://127.0.0.1:2/"} {
			f, err := g.reg.Federation(td(name))
			if err != nil || f.URL != url || f.Document == nil || f.Document.Owner != spireresources.Source("prod") {
				return fmt.Sprintf("the relationship with %s: %+v %v", name, f, err)
			}
		}
		return ""
	})
	if _, err := g.reg.Bundle(td("two")); err != nil {
		t.Error(err)
	}
	if n := len(g.reg.Federations()); n != 2 {
		t.Errorf("%d relationships", n)
	}
	if err := g.reg.DeleteFederation(ctx, td("left")); err == nil || !strings.Contains(err.Error(), "belongs to") {
		t.Errorf("somebody else ends it: %v", err)
	}
	m.kubectl("delete", "clusterfederatedtrustdomain", m.mark+"-left", m.mark+"-spiffe")
	until(t, ctx, func() string {
		all := g.reg.Federations()
		if len(all) != 1 || all[0].TrustDomain != td("two") || all[0].URL != "https://127.0.0.1:3/" {
			return fmt.Sprintf("left are %v", all)
		}
		return ""
	})
}

// foreignBundle is a bundle document of a trust domain that is nobody's.
func foreignBundle(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../ca/registry/testdata/partner.json")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}
