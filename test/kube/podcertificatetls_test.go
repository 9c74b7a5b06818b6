//go:build kube

package kube

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/test/signettest"
)

// TestPodCertificatesBetweenPods: two pods that have nothing but what the kubelet puts into a volume (a Pod Certificate and a
// ClusterTrustBundle) call each other by mutual TLS. There is no agent. A kubelet that is started anew asks anew, and the calls go on
// with the new certificates; who is revoked gets none, and the pod says why.
func TestPodCertificatesBetweenPods(t *testing.T) {
	i := newInstaller(t, 8*time.Minute)
	i.restrict()
	i.kubectl("create", "namespace", installation)
	i.kubectl("label", "namespace", installation, "pod-security.kubernetes.io/enforce=restricted")
	i.helm("install signet deploy/helm/signet --namespace "+installation+" --wait --timeout 2m", "agent: {enabled: false}\nca: {kubernetes: {podCertificates: true}}")
	i.apply(fmt.Sprintf(`apiVersion: signet-id.github.io/v1alpha1
kind: Identity
metadata: {name: web}
spec: {spiffeID: "/ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}", match: ["k8s:ns:%s"], on: ["k8s_psat:cluster:prod"]}
---
apiVersion: signet-id.github.io/v1alpha1
kind: Revocation
metadata: {name: stolen}
spec: {id: /ns/%[1]s/sa/agent, reason: a test}
`, i.namespace))
	i.kubectl("wait", "--for=condition=Accepted", "identities.signet-id.github.io/web", "revocations.signet-id.github.io/stolen", "--timeout=60s")
	i.kubectl("wait", "--for=create", "clustertrustbundle/signet-id.github.io:x509-svid:example.org", "--timeout=60s")

	i.certified("example.org", "serve", "web", `serve, ":9443"`)
	i.certified("example.org", "stolen", "agent", "wait")
	i.event(i.namespace, "stolen", "Revoked")
	i.prints("serve", "serving spiffe://example.org/ns/"+i.namespace+"/sa/web")
	ip := i.field("pod/serve", ".status.podIP")
	i.certified("example.org", "call", "ca", `call, "`+ip+`:9443"`)
	calls := i.goesOn()
	t.Logf("%d calls, %s", calls, i.svids("call"))

	i.kubebox("stop", "kubelet")
	i.kubebox("start", "kubelet")
	for len(i.svids("call")) < 2 || len(i.svids("serve")) < 2 {
		pause(t, i.ctx)
	}
	i.goesOn()

	if got := i.field("pod/stolen", ".status.phase"); got != "Pending" {
		t.Errorf("the pod whose SPIFFE ID is revoked is %s", got)
	}
}

// TestPodCertificateRenewed: a kubelet renews by itself, some minutes after the status's beginRefreshAt, while two pods go on calling each
// other. That is half an hour after issuance, since Kubernetes takes no certificate of less than an hour, and its clock is the machine's.
func TestPodCertificateRenewed(t *testing.T) {
	if os.Getenv("SIGNET_KUBE_RENEWAL") == "" {
		t.Skip("SIGNET_KUBE_RENEWAL is not set; set it to 1, and it waits half an hour")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Minute)
	defer cancel()
	k := first(t, ctx)
	k.allow()
	// Another trust domain than that of the chart's tests, so that both can run in a cluster.
	const td = "renewal.example"
	k.may("sign", watchRules+signRules+"\n- {apiGroups: [certificates.k8s.io], resources: [clustertrustbundles], resourceNames: ['signet-id.github.io:x509-svid:"+td+"'], verbs: [list, watch, create, patch]}")
	k.atEnd("delete", "clustertrustbundle", "signet-id.github.io:x509-svid:"+td)
	s := signettest.Start(t, signettest.Config{TrustDomain: td, CA: func(c *ca.Config) {
		c.Kubernetes = ca.Kubernetes{Clusters: map[string]ca.KubernetesCluster{"prod": {Kubeconfig: k.credentials("ca"), Namespace: k.namespace, Pods: &ca.KubernetesPods{},
			PodCertificates: &ca.PodCertificates{}, Bundle: &ca.KubernetesBundle{}}}}
	}})
	s.Apply("kind: Identity\nname: pods\nspiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}\non: [k8s_psat:cluster:prod]\n")
	k.certified(td, "serve", "web", `serve, ":9443"`)
	k.prints("serve", "serving ")
	k.certified(td, "call", "web", `call, "`+k.field("pod/serve", ".status.podIP")+`:9443"`)
	k.goesOn()
	was, began := k.svids("call"), time.Now()
	requests := func() string {
		return k.kubectl("-n", k.namespace, "get", "podcertificaterequests", "-o", `jsonpath={range .items[*]}{.spec.podName} {.status.notBefore} {.status.beginRefreshAt} {.status.notAfter}{"\n"}{end}`)
	}
	t.Logf("at %s %s\n%s", began.UTC().Format(time.TimeOnly), was, requests())
	begin, err := time.Parse(time.RFC3339, k.kubectl("-n", k.namespace, "get", "podcertificaterequests", "--field-selector=spec.podName=call", "-o", "jsonpath={.items[0].status.beginRefreshAt}"))
	if err != nil || time.Until(begin) < 25*time.Minute {
		t.Fatalf("the kubelet is told to renew at %v, %v", begin, err)
	}
	pauseFor(t, ctx, time.Until(begin))
	for len(k.svids("call")) < 2 || len(k.svids("serve")) < 2 {
		pauseFor(t, ctx, 5*time.Second)
	}
	t.Logf("renewed after %s: %s\n%s", time.Since(began).Round(time.Second), k.svids("call"), requests())
	t.Logf("%d calls, none failed", k.goesOn())
}

// certified runs a pod that has a Pod Certificate and the trust bundle in a volume, as the documentation says, and nothing else.
func (k *cluster) certified(td, name, serviceAccount, args string) {
	k.t.Helper()
	k.unprivileged(name, serviceAccount, args, "{name: SVID_FILES, value: /run/svid}", "{name: svid, projected: {sources: ["+
		"{podCertificate: {signerName: signet-id.github.io/x509-svid, keyType: ECDSAP256, credentialBundlePath: credentials.pem}}, "+
		"{clusterTrustBundle: {name: 'signet-id.github.io:x509-svid:"+td+"', path: bundle.pem}}]}}", "{name: svid, mountPath: /run/svid, readOnly: true}")
}

// svids are the SVIDs that a pod has had, as it printed them; none while its log cannot be read, as when its kubelet is away.
func (k *cluster) svids(pod string) []string {
	out, err := k.try("", "-n", k.namespace, "logs", pod)
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimSpace(grep(out, "svid: ")), "\n")
}

var called = regexp.MustCompile(`calls: (\d+) failed: (\d+)`)

// goesOn waits for some calls more, and returns how many there were. None has ever failed.
func (k *cluster) goesOn() (calls int) {
	k.t.Helper()
	read := func() (int, string) {
		line := k.prints("call", "calls: ")
		m := called.FindStringSubmatch(line)
		if m == nil {
			k.t.Fatalf("the caller says %q", line)
		}
		n, _ := strconv.Atoi(m[1]) // digits
		return n, m[2]
	}
	from, _ := read()
	for {
		now, failed := read()
		if failed != "0" {
			k.t.Fatalf("%s of %d calls failed: %s", failed, now, k.kubectl("-n", k.namespace, "logs", "call", "--tail=20"))
		}
		if now >= from+20 {
			return now
		}
		pause(k.t, k.ctx)
	}
}
