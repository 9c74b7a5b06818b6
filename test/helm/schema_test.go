package helm

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

var update = flag.Bool("update", false, "write the table of values in docs/kubernetes/chart.md anew")

func TestLint(t *testing.T) {
	out, stderr, err := helm(t, "lint", "--strict", chart, "--set", "trustDomain=example.org,clusterName=prod")
	if err != nil || !strings.Contains(out, "0 chart(s) failed") {
		t.Errorf("%v: %s%s", err, out, stderr)
	}
}

// TestRefused: what is unknown or cannot work is refused before anything is installed, by the name of the value.
func TestRefused(t *testing.T) {
	for values, want := range map[string]string{
		"trustDomain: ''":                   "/trustDomain",
		"trustDomain: Example.org":          "/trustDomain",
		"trustDomain: spiffe://example.org": "/trustDomain",
		"clusterName: ''":                   "/clusterName",
		"clusterName: a/b":                  "/clusterName",
		"trustdomain: example.org":          "'trustdomain'",
		"ca: {replica: 3}":                  "'replica'",
		"ca: {replicas: 0}":                 "/ca/replicas",
		"ca: {replicas: 3}":                 "ca.replicas: 3 replicas need ca.store.type: etcd",
		"ca: {replicas: '2'}":               "/ca/replicas",
		"ca: {store: {type: mysql}}":        "/ca/store/type",
		"ca: {store: {type: etcd, etcd: {endpoints: ['https://e:2379'], tlsSecret: t}}}": "ca.seal.source",
		"ca: {store: {type: etcd}}":                                         "ca.store.etcd.endpoints: missing",
		"ca: {store: {type: etcd, etcd: {endpoints: ['https://e:2379']}}}":  "ca.store.etcd.tlsSecret: missing",
		"ca: {store: {etcd: {endpoints: ['http://e:2379']}}}":               "/ca/store/etcd/endpoints/0",
		"ca: {kubernetes: {podCertificates: true, pods: false}}":            "ca.kubernetes.podCertificates: needs",
		"ca: {store: {etcd: {endpoints: [etcd]}}}":                          "/ca/store/etcd/endpoints/0",
		"ca: {store: {etcd: {prefix: signet}}}":                             "/ca/store/etcd/prefix",
		"ca: {seal: {source: secret}}":                                      "/ca/seal/secretName",
		"ca: {config: {seal: {previous: {systemd_credential: old}}}}":       "ca.seal.secretName: missing",
		"ca: {seal: {source: kms}}":                                         "/ca/seal/kms",
		"ca: {seal: {source: password}}":                                    "/ca/seal/source",
		"ca: {persistence: {size: big}}":                                    "/ca/persistence/size",
		"ca: {persistence: {enabled: 'yes'}}":                               "/ca/persistence/enabled",
		"ca: {service: {port: 70000}}":                                      "/ca/service/port",
		"ca: {service: {type: ExternalName}}":                               "/ca/service/type",
		"ca: {agentServiceAccounts: [signet-agent]}":                        "/ca/agentServiceAccounts/0",
		"ca: {audiences: []}":                                               "/ca/audiences",
		"ca: {adminIDs: [/admin]}":                                          "/ca/adminIDs/0",
		"ca: {metrics: {address: localhost}}":                               "/ca/metrics/address",
		"ca: {config: text}":                                                "/ca/config",
		"ca: {extraEnv: [{value: x}]}":                                      "/ca/extraEnv/0",
		"ca: {extraVolumes: [{secret: {secretName: x}}]}":                   "/ca/extraVolumes/0",
		"ca: {extraVolumeMounts: [{name: x}]}":                              "/ca/extraVolumeMounts/0",
		"ca: {enabled: false}":                                              "agent.serverAddress: missing",
		"ca: {enabled: false}\nagent: {serverAddress: 'ca:8081'}":           "agent.bundleConfigMap: missing",
		"ca: {kubernetes: {bundle: false}}":                                 "agent.bundleConfigMap: missing",
		"ca: {kubernetes: {injection: true}}":                               "/ca/kubernetes/injection",
		"ca: {kubernetes: {injection: {failurePolicy: Never}}}":             "/ca/kubernetes/injection/failurePolicy",
		"ca: {kubernetes: {injection: {port: 443}}}":                        "/ca/kubernetes/injection/port",
		"ca: {kubernetes: {injection: {port: 8081}}}":                       "/ca/kubernetes/injection/port",
		"ca: {kubernetes: {injection: {namespaceSelector: {label: x}}}}":    "/ca/kubernetes/injection/namespaceSelector",
		"ca: {kubernetes: {secrets: true}}":                                 "'secrets'",
		"agent: {serverAddress: 'https://ca:8081'}":                         "/agent/serverAddress",
		"agent: {socket: {directory: run/signet}}":                          "/agent/socket/directory",
		"agent: {socket: {directory: /run/signet/}}":                        "/agent/socket/directory",
		"agent: {socket: {name: a/b}}":                                      "/agent/socket/name",
		"agent: {socket: {directory: /var/lib}}":                            "agent.socket.directory: /var/lib, which pods mount, and /var/lib/signet/agent",
		"agent: {socket: {directory: /var/lib/signet/agent}}":               "agent.socket.directory",
		"agent: {socket: {directory: /data/agent/s}, dataDirectory: /data}": "agent.socket.directory",
		"agent: {socket: {mount: nfs}}":                                     "/agent/socket/mount",
		"agent: {dataDirectory: '/var/lib/my agent'}":                       "/agent/dataDirectory",
		"agent: {kubelet: {certificate: insecure}}":                         "/agent/kubelet/certificate",
		"agent: {update: {maxSurge: 0}}":                                    "/agent/update/maxSurge",
		"agent: {update: {maxSurge: 0%}}":                                   "/agent/update/maxSurge",
		"agent: {privileged: true}":                                         "'privileged'",
		"image: {tag: 'a b'}":                                               "/image/tag",
		"image: {registry: images.example.org/}":                            "/image/registry",
		"image: {pullPolicy: Sometimes}":                                    "/image/pullPolicy",
		"log: {level: trace}":                                               "/log/level",
		"networkPolicy: {caFrom: everybody}":                                "/networkPolicy/caFrom",
		"serviceMonitor: {enabled: maybe}":                                  "/serviceMonitor/enabled",
		"serviceMonitor: {interval: often}":                                 "/serviceMonitor/interval",
	} {
		t.Run(values, func(t *testing.T) {
			t.Parallel()
			if _, err := render(t, nil, needed, values); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v; want %q", err, want)
			}
		})
	}
}

// TestRefusedThere: so is what this cluster, or the API server for this name of a release, cannot have.
func TestRefusedThere(t *testing.T) {
	for _, tt := range []struct{ release, kubernetes, set, want string }{
		{"signet", "1.35.0", "log.level=info", ""},
		{"signet", "1.33.5-gke.1", "log.level=info", ""},
		{"signet", "1.32.9-eks-1", "log.level=info", "agent.kubelet.legacyAuthorization: Kubernetes v1.32.9-eks-1 knows no nodes/pods"},
		{"signet", "1.32.9-eks-1", "agent.kubelet.legacyAuthorization=true", ""},
		{"signet", "1.28.0", "ca.kubernetes.injection.enabled=true,agent.enabled=false", "ca.kubernetes.injection.enabled: needs native sidecars"},
		{"signet", "1.27.0", "agent.kubelet.legacyAuthorization=true", "kubeVersion: >=1.28"},
		{strings.Repeat("s", 40), "1.35.0", "log.level=info", ""},
		{strings.Repeat("s", 41), "1.35.0", "log.level=info", "release name"},
		{"signet.prod", "1.35.0", "log.level=info", `release name "signet.prod": names of pods and Services begin with it`},
	} {
		_, stderr, err := helm(t, "template", tt.release, chart, "--kube-version", tt.kubernetes, "--set", "trustDomain=example.org,clusterName=prod,"+tt.set)
		if (err == nil) != (tt.want == "") || !strings.Contains(stderr, tt.want) {
			t.Errorf("%+v: %v, %s", tt, err, stderr)
		}
	}
}

// A schema is as much of JSON Schema as values.schema.json uses to say which values there are.
type schema struct {
	Type                 any
	Properties           map[string]schema
	AdditionalProperties any
}

// TestValuesAndSchema: values.yaml and the schema name the same values, each of them with a comment, and in every section
// whatever is unknown is refused.
func TestValuesAndSchema(t *testing.T) {
	s, _ := sections(t)
	delete(s.Properties, "global") // Helm's own
	var inSchema, open []string
	var walk func(path string, s schema)
	walk = func(path string, s schema) {
		if s.Properties == nil {
			inSchema = append(inSchema, path)
			return
		}
		if s.AdditionalProperties != false {
			open = append(open, path)
		}
		for k, p := range s.Properties {
			walk(strings.TrimPrefix(path+"."+k, "."), p)
		}
	}
	walk("", s)
	slices.Sort(inSchema)
	if len(open) > 0 {
		t.Errorf("sections %q take unknown values", open)
	}
	var inValues []string
	for _, v := range values(t) {
		inValues = append(inValues, v.path)
		if v.comment == "" {
			t.Errorf("values.yaml says nothing about %s", v.path)
		}
	}
	slices.Sort(inValues)
	if !slices.Equal(inValues, inSchema) {
		t.Errorf("values.yaml has\n%s\nthe schema\n%s", strings.Join(inValues, "\n"), strings.Join(inSchema, "\n"))
	}
}

// A value is one line of the table in the documentation.
type value struct{ path, standard, comment string }

// values reads values.yaml: each value with what stands above it, or above its section if it is the first there.
func values(t *testing.T) []value {
	t.Helper()
	data, err := os.ReadFile(chart + "/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(data, &doc); err != nil {
		t.Fatal(err)
	}
	_, schemaProperties := sections(t)
	var out []value
	var walk func(path, above string, n *yaml.Node)
	walk = func(path, above string, n *yaml.Node) {
		for i := 0; i < len(n.Content); i += 2 {
			k, v := n.Content[i], n.Content[i+1]
			at := strings.TrimPrefix(path+"."+k.Value, ".")
			comment := plain(k.HeadComment)
			if schemaProperties[at] {
				walk(at, comment, v)
				continue
			}
			if comment == "" && i == 0 {
				comment = above
			}
			standard, err := json.Marshal(decoded(t, v))
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, value{at, string(standard), comment})
		}
	}
	walk("", "", doc.Content[0])
	return out
}

// sections are the paths of the schema that have properties.
func sections(t *testing.T) (schema, map[string]bool) {
	t.Helper()
	data, err := os.ReadFile(chart + "/values.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var s schema
	if err := json.Unmarshal(data, &s); err != nil {
		t.Fatal(err)
	}
	out := map[string]bool{}
	var walk func(path string, s schema)
	walk = func(path string, s schema) {
		if s.Properties != nil {
			out[path] = true
		}
		for k, p := range s.Properties {
			walk(strings.TrimPrefix(path+"."+k, "."), p)
		}
	}
	walk("", s)
	return s, out
}

func decoded(t *testing.T, n *yaml.Node) (v any) {
	t.Helper()
	if err := n.Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

// plain is a comment without its marks; of several blocks the one next to the value.
func plain(comment string) string {
	blocks := strings.Split(comment, "\n\n")
	var words []string
	for line := range strings.Lines(blocks[len(blocks)-1]) {
		words = append(words, strings.Fields(strings.TrimLeft(line, "# "))...)
	}
	return strings.Join(words, " ")
}

const (
	begin = "<!-- values: made from values.yaml by make docs -->\n"
	end   = "<!-- end of values -->\n"
)

// TestValuesAreDocumented: the table in docs/kubernetes/chart.md is that of values.yaml.
func TestValuesAreDocumented(t *testing.T) {
	page := root + "/docs/kubernetes/chart.md"
	data, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(data), begin)
	have, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the values", page)
	}
	var b strings.Builder
	b.WriteString("| value | default | meaning |\n|---|---|---|\n")
	for _, v := range values(t) {
		fmt.Fprintf(&b, "| `%s` | `%s` | %s |\n", v.path, v.standard, strings.ReplaceAll(v.comment, "|", "\\|"))
	}
	if *update {
		if err := os.WriteFile(page, []byte(before+begin+b.String()+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if have != b.String() {
		t.Errorf("the values in %s are not those of values.yaml; run make docs", page)
	}
}
