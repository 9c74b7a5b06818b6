package helm

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// checkPods holds every pod to what docs/kubernetes/chart.md says of it.
func checkPods(t *testing.T, all []runtime.Object) {
	t.Helper()
	for name, spec := range podSpecs(all) {
		agent := name == "signet-agent"
		if spec.HostNetwork || spec.HostIPC || spec.HostPID != agent || spec.ShareProcessNamespace != nil {
			t.Errorf("%s: hostNetwork %t, hostIPC %t, hostPID %t", name, spec.HostNetwork, spec.HostIPC, spec.HostPID)
		}
		pod := spec.SecurityContext
		if pod == nil || pod.SeccompProfile == nil || pod.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
			t.Errorf("%s: no seccomp profile: %+v", name, pod)
		}
		if !agent && (pod.RunAsNonRoot == nil || !*pod.RunAsNonRoot || *pod.RunAsUser == 0 || *pod.RunAsUser == 65534) {
			t.Errorf("%s runs as root: %+v", name, pod)
		}
		for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
			s := c.SecurityContext
			switch {
			case s == nil, s.Privileged != nil, s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation, s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem,
				s.Capabilities == nil || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}), s.ProcMount != nil, s.SeccompProfile != nil:
				t.Errorf("%s/%s: %+v", name, c.Name, s)
			}
			for _, capability := range s.Capabilities.Add {
				if !agent || capability != "SYS_PTRACE" && capability != "DAC_READ_SEARCH" {
					t.Errorf("%s/%s has the capability %s", name, c.Name, capability)
				}
			}
			for _, e := range c.Env {
				if e.ValueFrom != nil && e.ValueFrom.SecretKeyRef != nil {
					t.Errorf("%s/%s has a secret in its environment: %s", name, c.Name, e.Name)
				}
			}
			if len(c.EnvFrom) > 0 || c.LivenessProbe == nil || c.ReadinessProbe == nil || c.StartupProbe == nil || c.Resources.Requests.Memory().IsZero() {
				t.Errorf("%s/%s: probes or requests are missing, or there is an environment: %+v", name, c.Name, c)
			}
			for _, p := range c.Ports {
				if p.HostPort != 0 {
					t.Errorf("%s/%s has a port of the node: %+v", name, c.Name, p)
				}
			}
		}
	}
}

// shown says in lines what may be mounted and asked for.
func shown(all []runtime.Object) []string {
	var lines []string
	for name, spec := range podSpecs(all) {
		for _, v := range spec.Volumes {
			if v.HostPath != nil {
				lines = append(lines, fmt.Sprintf("%s: hostPath %s", name, v.HostPath.Path))
			}
			if v.Secret != nil {
				lines = append(lines, fmt.Sprintf("%s: secret %s %04o", name, v.Secret.SecretName, *v.Secret.DefaultMode))
			}
		}
		if spec.AutomountServiceAccountToken == nil || *spec.AutomountServiceAccountToken {
			lines = append(lines, fmt.Sprintf("%s: token of %s", name, spec.ServiceAccountName))
		}
		for _, c := range spec.Containers {
			for _, a := range c.SecurityContext.Capabilities.Add {
				lines = append(lines, fmt.Sprintf("%s: %s", name, a))
			}
		}
	}
	rules := func(kind, name string, rules []rbacv1.PolicyRule) {
		for _, r := range rules {
			line := fmt.Sprintf("%s %s: %s %s", kind, name, strings.Join(r.Verbs, ","), strings.Join(r.Resources, ","))
			if len(r.ResourceNames) > 0 {
				line += " named " + strings.Join(r.ResourceNames, ",")
			}
			lines = append(lines, line)
		}
	}
	for _, o := range all {
		switch o := o.(type) {
		case *rbacv1.ClusterRole:
			rules("ClusterRole", o.Name, o.Rules)
		case *rbacv1.Role:
			rules("Role", o.Namespace+"/"+o.Name, o.Rules)
		case *corev1.ServiceAccount:
			if o.AutomountServiceAccountToken == nil || *o.AutomountServiceAccountToken {
				lines = append(lines, "ServiceAccount "+o.Name+": mounts its token into pods that do not ask for it")
			}
		}
	}
	slices.Sort(lines)
	return lines
}

// explained is what of a line of shown the documentation must have.
func explained(line string) (words []string) {
	_, what, _ := strings.Cut(line, ": ")
	fields := strings.Fields(what)
	switch verbs, of := fields[0], fields[1:]; {
	case verbs == "hostPath" && strings.HasSuffix(of[0], ".crt"):
		return []string{"hostPath of the kubelet's certificate"}
	case verbs == "hostPath":
		return []string{"hostPath `" + of[0] + "`"}
	case verbs == "token":
		return []string{"token of its service account"}
	case verbs == "secret": // which the installer named
		return nil
	case len(of) == 0: // a capability
		return []string{verbs}
	case of[0] == "signers":
		return []string{"`" + verbs + "`"}
	default:
		for _, resource := range strings.Split(of[0], ",") {
			if kind, part, _ := strings.Cut(resource, "/"); part == "status" {
				words = append(words, "`"+kind+"`", "`status`")
				continue
			}
			words = append(words, "`"+resource+"`")
		}
		return words
	}
}

// TestPrivileges is the whole list: what is new in it is a decision, and is explained in docs/kubernetes/chart.md.
func TestPrivileges(t *testing.T) {
	text, err := os.ReadFile("../../docs/kubernetes/chart.md")
	if err != nil {
		t.Fatal(err)
	}
	_, page, _ := strings.Cut(string(text), "\n## Privileges\n")
	page, _, _ = strings.Cut(page, "\n## ")
	for _, word := range []string{"| `hostPID` |", "| user 0 |"} {
		if !strings.Contains(page, word) {
			t.Errorf("docs/kubernetes/chart.md does not explain %s", word)
		}
	}
	for values, want := range map[string][]string{
		"{}": {
			"ClusterRole signet-system-signet-agent: get nodes/pods",
			"ClusterRole signet-system-signet-ca: attest signers named signet-id.github.io/x509-svid",
			"ClusterRole signet-system-signet-ca: create events",
			"ClusterRole signet-system-signet-ca: create tokenreviews",
			"ClusterRole signet-system-signet-ca: get customresourcedefinitions named identities.signet-id.github.io,callpolicies.signet-id.github.io,clustercallpolicies.signet-id.github.io,federations.signet-id.github.io,revocations.signet-id.github.io",
			"ClusterRole signet-system-signet-ca: get pods,nodes",
			"ClusterRole signet-system-signet-ca: get,list,watch identities,callpolicies,clustercallpolicies,federations,revocations",
			"ClusterRole signet-system-signet-ca: get,list,watch,create,patch,delete configmaps named signet-bundle",
			"ClusterRole signet-system-signet-ca: list,watch namespaces",
			"ClusterRole signet-system-signet-ca: list,watch pods,nodes",
			"ClusterRole signet-system-signet-ca: list,watch,create,patch clustertrustbundles named signet-id.github.io:x509-svid:example.org",
			"ClusterRole signet-system-signet-ca: update identities/status,callpolicies/status,clustercallpolicies/status,federations/status,revocations/status",
			"Role signet-system/signet-ca: create leases",
			"Role signet-system/signet-ca: get,update leases named signet-ca",
			"signet-agent: hostPath /run/signet/agent",
			"signet-agent: hostPath /var/lib/signet",
			"signet-agent: token of signet-agent",
			"signet-ca: token of signet-ca",
		},
		"agent: {enabled: false}\nca: {kubernetes: {pods: false, bundle: false, resources: false, injection: {enabled: true}}}": {
			"ClusterRole signet-system-signet-ca: create tokenreviews",
			"ClusterRole signet-system-signet-ca: get pods,nodes",
			"ClusterRole signet-system-signet-ca: list,watch,patch mutatingwebhookconfigurations named signet-inject",
			"Role signet-system/signet-ca: create leases",
			"Role signet-system/signet-ca: get,update leases named signet-ca",
			"signet-ca: token of signet-ca",
		},
		"agent: {enabled: false}\nca: {kubernetes: {events: false, bundle: false, resources: false}}": {
			"ClusterRole signet-system-signet-ca: create tokenreviews",
			"ClusterRole signet-system-signet-ca: get pods,nodes",
			"ClusterRole signet-system-signet-ca: list,watch namespaces",
			"ClusterRole signet-system-signet-ca: list,watch pods,nodes",
			"Role signet-system/signet-ca: create leases",
			"Role signet-system/signet-ca: get,update leases named signet-ca",
			"signet-ca: token of signet-ca",
		},
		"agent: {executables: true, namespaceLabels: [x], kubelet: {legacyAuthorization: true, certificate: selfSigned}, bundleConfigMap: b}\nca: {seal: {source: secret, secretName: mine}, kubernetes: {pods: false, bundle: false, resources: false}}": {
			"ClusterRole signet-system-signet-agent: get namespaces",
			"ClusterRole signet-system-signet-agent: get nodes/proxy",
			"ClusterRole signet-system-signet-ca: create tokenreviews",
			"ClusterRole signet-system-signet-ca: get pods,nodes",
			"signet-agent: DAC_READ_SEARCH",
			"signet-agent: SYS_PTRACE",
			"signet-agent: hostPath /run/signet/agent",
			"signet-agent: hostPath /var/lib/kubelet/pki/kubelet.crt",
			"signet-agent: hostPath /var/lib/signet",
			"signet-agent: token of signet-agent",
			"signet-ca: secret mine 0440",
			"signet-ca: token of signet-ca",
		},
	} {
		_, _, all := configs(t, values, "crds: {aggregateRoles: false}")
		for _, line := range want {
			for _, word := range explained(line) {
				if !strings.Contains(page, word) {
					t.Errorf("docs/kubernetes/chart.md does not explain %q: it has no %s below Privileges", line, word)
				}
			}
		}
		if got := shown(all); !slices.Equal(got, want) {
			t.Errorf("%s:\n%s\nwant\n%s", values, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

// What users get by Kubernetes' own roles: to read, and to write what speaks for their namespace alone. The agents and the CA are bound to none of it.
func TestRolesOfUsers(t *testing.T) {
	_, _, all := configs(t)
	for name, want := range map[string]struct{ to, rule string }{
		"signet-system-signet-view": {"view", "get,list,watch identities,callpolicies,clustercallpolicies,federations,revocations"},
		"signet-system-signet-edit": {"edit", "create,update,patch,delete,deletecollection callpolicies"},
	} {
		r, ok := find[*rbacv1.ClusterRole](t, all, name)
		if !ok || r.Labels["rbac.authorization.k8s.io/aggregate-to-"+want.to] != "true" || !slices.Contains(shown([]runtime.Object{r}), "ClusterRole "+name+": "+want.rule) || len(r.Rules) != 1 {
			t.Errorf("%s is %+v", name, r)
		}
	}
	for _, o := range all {
		if b, ok := o.(*rbacv1.ClusterRoleBinding); ok && !strings.HasSuffix(b.RoleRef.Name, "signet-ca") && !strings.HasSuffix(b.RoleRef.Name, "signet-agent") {
			t.Errorf("%+v", b)
		}
	}
	if _, _, all := configs(t, "crds: {aggregateRoles: false}"); len(all) > 0 {
		for _, o := range all {
			if r, ok := o.(*rbacv1.ClusterRole); ok && (r.AggregationRule != nil || strings.HasSuffix(r.Name, "-view") || strings.HasSuffix(r.Name, "-edit")) {
				t.Errorf("there is a role %s that nobody asked for", r.Name)
			}
		}
	}
}

// Nobody may list or watch Secrets, run commands in pods, or do everything, whatever is switched on.
func TestNobodyReadsSecrets(t *testing.T) {
	for name, values := range matrix(t) {
		rendered, err := render(t, nil, needed, values)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range objects(t, rendered) {
			var rules []rbacv1.PolicyRule
			switch o := o.(type) {
			case *rbacv1.ClusterRole:
				rules = o.Rules
			case *rbacv1.Role:
				rules = o.Rules
			}
			for _, r := range rules {
				for _, resource := range r.Resources {
					if resource == "secrets" || resource == "*" || resource == "pods/exec" || resource == "serviceaccounts/token" || slices.Contains(r.Verbs, "*") || slices.Contains(r.APIGroups, "*") {
						t.Errorf("%s: %s may %v", name, nameOf(o), r)
					}
				}
			}
		}
	}
}
