package helm

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/ca"

	// Drivers of key stores, as the program in the image has them.
	_ "go.step.sm/crypto/kms/awskms"
)

// matrix returns values that an operator may have, by what they are about. Each is laid over needed.
func matrix(t *testing.T) map[string]string {
	t.Helper()
	data, err := os.ReadFile("testdata/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var nodes map[string]yaml.Node
	if err := yaml.Unmarshal(data, &nodes); err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for name, n := range nodes {
		text, err := yaml.Marshal(&n)
		if err != nil {
			t.Fatal(err)
		}
		out[name] = string(text)
	}
	return out
}

// TestRender: whatever an operator chooses, the API server knows every field, and CA and agent take their configuration.
func TestRender(t *testing.T) {
	for name, values := range matrix(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rendered, err := render(t, nil, needed, values)
			if err != nil {
				t.Fatal(err)
			}
			all := objects(t, rendered)
			if len(all) < 4 {
				t.Fatalf("%d objects", len(all))
			}
			checkConfigs(t, all)
			checkPods(t, all)
			for _, o := range all {
				if m, ok := o.(interface{ GetLabels() map[string]string }); !ok || m.GetLabels()["app.kubernetes.io/part-of"] != "signet" {
					t.Errorf("%T %s is not labelled as a part of signet", o, nameOf(o))
				}
			}
		})
	}
}

// checkConfigs reads the configurations as the daemons do.
func checkConfigs(t *testing.T, all []runtime.Object) {
	t.Helper()
	read := 0
	for _, o := range all {
		m, ok := o.(*corev1.ConfigMap)
		if !ok {
			continue
		}
		if text, ok := m.Data["ca.yaml"]; ok {
			read++
			if _, err := ca.ReadConfig([]byte(text), "ca.yaml"); err != nil {
				t.Errorf("the CA refuses its configuration: %v\n%s", err, text)
			}
		}
		if text, ok := m.Data["agent.yaml"]; ok {
			read++
			if _, err := agent.ReadConfig([]byte(text), "agent.yaml"); err != nil {
				t.Errorf("the agent refuses its configuration: %v\n%s", err, text)
			}
		}
	}
	if read == 0 {
		t.Error("there is no configuration")
	}
}

// podSpecs are the specs of all pods that objects make, by the object's name.
func podSpecs(all []runtime.Object) map[string]corev1.PodSpec {
	specs := map[string]corev1.PodSpec{}
	for _, o := range all {
		switch o := o.(type) {
		case *appsv1.StatefulSet:
			specs[o.Name] = o.Spec.Template.Spec
		case *appsv1.DaemonSet:
			specs[o.Name] = o.Spec.Template.Spec
		}
	}
	return specs
}

// configs reads what the chart makes of values.
func configs(t *testing.T, values ...string) (ca.Config, agent.Config, []runtime.Object) {
	t.Helper()
	rendered, err := render(t, nil, append([]string{needed}, values...)...)
	if err != nil {
		t.Fatal(err)
	}
	all := objects(t, rendered)
	var caConfig ca.Config
	var agentConfig agent.Config
	if m, ok := find[*corev1.ConfigMap](t, all, "signet-ca"); ok {
		if caConfig, err = ca.ReadConfig([]byte(m.Data["ca.yaml"]), "ca.yaml"); err != nil {
			t.Fatal(err)
		}
	}
	if m, ok := find[*corev1.ConfigMap](t, all, "signet-agent"); ok {
		if agentConfig, err = agent.ReadConfig([]byte(m.Data["agent.yaml"]), "agent.yaml"); err != nil {
			t.Fatal(err)
		}
	}
	return caConfig, agentConfig, all
}

// The two halves fit together: the agent goes to the CA's Service, shows a token that the CA takes, and is one of the accounts
// that may attest.
func TestHalvesFit(t *testing.T) {
	c, a, all := configs(t, "ca: {service: {port: 8443}, audiences: [signet-prod, spire-server]}")
	cluster := c.NodeAttestors.K8sPSAT.Clusters["prod"]
	if !slices.Equal(cluster.ServiceAccounts, []string{"signet-system:signet-agent"}) || !slices.Equal(cluster.Audiences, []string{"signet-prod", "spire-server"}) {
		t.Errorf("the CA lets in %+v", cluster)
	}
	if a.ServerAddress != "signet-ca.signet-system.svc:8443" || a.NodeAttestation.K8sPSAT.Cluster != "prod" {
		t.Errorf("the agent goes to %s as of %s", a.ServerAddress, a.NodeAttestation.K8sPSAT.Cluster)
	}
	s, ok := find[*corev1.Service](t, all, "signet-ca")
	if !ok || s.Spec.Ports[0].Port != 8443 || s.Spec.Ports[0].TargetPort.StrVal != "api" {
		t.Errorf("the Service is %+v", s)
	}
	spec := podSpecs(all)["signet-agent"]
	mounts := map[string]string{}
	for _, m := range spec.Containers[0].VolumeMounts {
		mounts[m.Name] = m.MountPath
	}
	for _, v := range spec.Volumes {
		switch v.Name {
		case "token":
			p := v.Projected.Sources[0].ServiceAccountToken
			if p.Audience != "signet-prod" || filepath.Join(mounts["token"], p.Path) != a.NodeAttestation.K8sPSAT.TokenPath {
				t.Errorf("the token is %+v in %s; the agent looks at %s", p, mounts["token"], a.NodeAttestation.K8sPSAT.TokenPath)
			}
		case "bundle":
			if v.ConfigMap.Name != "signet-bundle" || v.ConfigMap.Optional != nil || filepath.Join(mounts["bundle"], v.ConfigMap.Items[0].Path) != a.TrustBundlePath {
				t.Errorf("the bundle is %+v in %s; the agent looks at %s", v.ConfigMap, mounts["bundle"], a.TrustBundlePath)
			}
		case "socket", "data":
			if v.HostPath.Path != mounts[v.Name] {
				t.Errorf("%s is mounted as %s: paths in the log would not be those of the node", v.HostPath.Path, mounts[v.Name])
			}
		}
	}
	if a.SocketPath != "/run/signet/agent/agent.sock" || mounts["socket"] != "/run/signet/agent" || mounts["data"]+"/agent" != a.DataDir || !a.HandOver {
		t.Errorf("socket %s, mounts %v", a.SocketPath, mounts)
	}
	// What the pod gets from its environment is asked for by these names.
	k := a.WorkloadAttestation.K8s
	for _, e := range spec.Containers[0].Env {
		if e.Name != k.KubeletAddressEnv && e.Name != k.NodeNameEnv || e.ValueFrom.FieldRef == nil {
			t.Errorf("environment %+v", e)
		}
	}
}

// config is merged over what the chart makes, and a mistake in it is the daemon's to refuse, with the key's name.
func TestConfigIsMerged(t *testing.T) {
	c, a, _ := configs(t, "ca: {config: {ttl: {x509: 30m}, metrics: {listen: '127.0.0.1:1'}}}\nagent: {config: {workload_attestation: {k8s: {cgroup_roots: [/x]}}}}")
	if c.TTL.X509.String() != "30m0s" || c.Metrics.Listen != "127.0.0.1:1" || c.TrustDomain != "example.org" {
		t.Errorf("the CA has ttl.x509 %v, metrics %q, trust domain %q", c.TTL.X509, c.Metrics.Listen, c.TrustDomain)
	}
	if k := a.WorkloadAttestation.K8s; !slices.Equal(k.CgroupRoots, []string{"/x"}) || k.NodeNameEnv != "NODE_NAME" {
		t.Errorf("the agent has %+v", k)
	}
	rendered, err := render(t, nil, needed, "ca: {config: {tll: {x509: 30m}}}")
	if err != nil {
		t.Fatal(err)
	}
	m, _ := find[*corev1.ConfigMap](t, objects(t, rendered), "signet-ca")
	if _, err := ca.ReadConfig([]byte(m.Data["ca.yaml"]), "ca.yaml"); err == nil || !strings.Contains(err.Error(), "tll") {
		t.Errorf("a key that does not exist: %v", err)
	}
}

// A changed configuration starts the pods anew; a new version of the chart alone does not.
func TestRestartsForAChange(t *testing.T) {
	template := func(values string) map[string]string {
		_, _, all := configs(t, values)
		out := map[string]string{}
		for _, o := range all {
			switch o := o.(type) {
			case *appsv1.StatefulSet:
				out[o.Name] = fmt.Sprintf("%v %v", o.Spec.Template.Annotations, o.Spec.Template.Labels)
			case *appsv1.DaemonSet:
				out[o.Name] = fmt.Sprintf("%v %v", o.Spec.Template.Annotations, o.Spec.Template.Labels)
			}
		}
		return out
	}
	was := template("{}")
	for values, restarts := range map[string]string{
		"agent: {config: {max_offline: 48h}}": "signet-agent",
		"ca: {config: {ttl: {x509: 30m}}}":    "signet-ca",
		"networkPolicy: {enabled: false}":     "",
	} {
		for name, is := range template(values) {
			if (is != was[name]) != (name == restarts) {
				t.Errorf("%s: %s has %s, before %s", values, name, is, was[name])
			}
		}
	}
	for name, is := range was {
		if strings.Contains(is, "helm.sh/chart") || strings.Contains(is, "app.kubernetes.io/version") {
			t.Errorf("the pods of %s are labelled with the chart's version: %s", name, is)
		}
	}
}

// With one replica there is no budget, which would only keep nodes from being drained.
// Several have one, which lets a node be drained whatever state a replica is in.
func TestDisruptionBudget(t *testing.T) {
	c, _, all := configs(t, matrix(t)["replicas"])
	b, ok := find[*policyv1.PodDisruptionBudget](t, all, "signet-ca")
	if !ok || b.Spec.MaxUnavailable.IntVal != 1 || c.Store.Etcd == nil || c.Store.Etcd.TLS.KeyFile != "/run/secrets/etcd/tls.key" || c.Seal.SystemdCredential != "seal-key" {
		t.Errorf("three replicas have the budget %+v, store %+v and seal %+v", b, c.Store, c.Seal)
	}
	if _, _, all := configs(t); len(all) > 0 {
		if b, ok := find[*policyv1.PodDisruptionBudget](t, all, "signet-ca"); ok {
			t.Errorf("one replica has the budget %+v", b.Spec)
		}
	}
}

// Custom resources are made, upgraded and left behind.
func TestCRDs(t *testing.T) {
	files, err := filepath.Glob(chart + "/files/crds*/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	rendered, err := render(t, nil, needed, "crds: {spire: true}")
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Count(rendered, "\nkind: CustomResourceDefinition\n"); got != len(files) {
		t.Errorf("%d custom resources of %d files", got, len(files))
	}
	if got := strings.Count(rendered, "helm.sh/resource-policy: keep"); got != len(files) {
		t.Errorf("%d of %d custom resources outlive the chart", got, len(files))
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(data), "\n---\n") {
			t.Errorf("%s holds several documents; of them only the first would be installed", f)
		}
	}
}

// A CA that goes from one seal key to another has both of them, and nothing else of their Secret.
func TestPreviousSealKey(t *testing.T) {
	for name, want := range map[string]string{"another seal key": "second seal-key", "from a Secret to a KMS": "seal-key", "seal secret": "seal-key", "seal kms": ""} {
		c, _, all := configs(t, matrix(t)[name])
		spec := podSpecs(all)["signet-ca"]
		var got []string
		for _, v := range spec.Volumes {
			if v.Secret != nil {
				for _, i := range v.Secret.Items {
					got = append(got, i.Path)
				}
			}
		}
		env := slices.ContainsFunc(spec.Containers[0].Env, func(e corev1.EnvVar) bool { return e.Name == "CREDENTIALS_DIRECTORY" })
		if strings.Join(got, " ") != want || env != (want != "") || c.Seal.Previous.SystemdCredential != "" && !slices.Contains(got, c.Seal.Previous.SystemdCredential) {
			t.Errorf("%s: the CA has the keys %q of the Secret (%t), and names %+v", name, got, env, c.Seal)
		}
	}
}

// The notes after an installation say what keeps others out though the values ask for them, and how pods get their first identity.
func TestNotes(t *testing.T) {
	const identity, caFrom, metricsFrom = `spiffeID: "/ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}", "on": ["k8s_psat:cluster:prod"]`, "networkPolicy.caFrom is empty", "networkPolicy.metricsFrom is empty"
	for set, want := range map[string][]string{
		"log.level=info": {identity},
		"ca.service.type=NodePort,serviceMonitor.enabled=true":                                                                                                 {identity, caFrom, metricsFrom},
		"ca.service.type=NodePort,serviceMonitor.enabled=true,networkPolicy.enabled=false":                                                                     {identity},
		"ca.service.type=NodePort,serviceMonitor.enabled=true,networkPolicy.caFrom[0].ipBlock.cidr=10.0.0.0/8,networkPolicy.metricsFrom[0].podSelector.x=null": {identity},
		"ca.kubernetes.pods=false": {},
	} {
		out, stderr, err := helm(t, "install", "signet", chart, "--dry-run=client", "--namespace", "signet-system", "--set", "trustDomain=example.org,clusterName=prod,"+set)
		_, notes, _ := strings.Cut(out, "\nNOTES:\n")
		if err != nil || notes == "" {
			t.Fatalf("%s: %v %s", set, err, stderr)
		}
		for _, line := range []string{identity, caFrom, metricsFrom} {
			if strings.Contains(notes, line) != slices.Contains(want, line) {
				t.Errorf("%s: the notes are to say %q: %t\n%s", set, line, slices.Contains(want, line), notes)
			}
		}
	}
}
