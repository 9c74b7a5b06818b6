//go:build kube

package kube

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestCSI: the SPIFFE CSI driver, unmodified and installed as its documentation says for SPIRE, hands out the socket of our agent. Pods under
// restricted Pod Security get their identities by it, also those that were there before the agent, and go on over roll-outs of agent and
// driver; so does a proxy that is injected. SPIFFE_CSI_BIN names the driver (github.com/spiffe/spiffe-csi), CSI_REGISTRAR_BIN
// csi-node-driver-registrar; both are static programs.
func TestCSI(t *testing.T) {
	driver, registrar := optional(t, "SPIFFE_CSI_BIN", "the program spiffe-csi-driver, built without cgo"), optional(t, "CSI_REGISTRAR_BIN", "the program csi-node-driver-registrar, built without cgo")
	i := newInstaller(t, 8*time.Minute)
	i.image("signet.test/csi-driver:e2e", driver+"=/driver")
	i.image("signet.test/csi-registrar:e2e", registrar+"=/registrar")
	const drivers = "spiffe-csi"
	i.kubectl("create", "namespace", drivers)
	i.atEnd("delete", "namespace", drivers)
	i.apply(csiDriver)
	i.atEnd("delete", "csidriver", "csi.spiffe.io")
	i.kubectl("-n", drivers, "rollout", "status", "daemonset/spiffe-csi", "--timeout=90s")
	i.until("the kubelet has the driver", func(out string, err error) bool { return err == nil && strings.Contains(out, "csi.spiffe.io") }, "get", "csinodes", "-o", "jsonpath={.items[*].spec.drivers[*].name}")

	i.restrict()
	i.atEnd("-n", i.namespace, "delete", "pods", "--all") // while the driver is there, without which no kubelet can unmount
	const socket, volume, mount = `{name: SPIFFE_ENDPOINT_SOCKET, value: "unix:///spiffe/spire-agent.sock"}`, "{name: spiffe, csi: {driver: csi.spiffe.io, readOnly: true}}", "{name: spiffe, mountPath: /spiffe, readOnly: true}"
	i.unprivileged("early", "web", "hold", socket, volume, mount) // it asks again until there is somebody to answer

	notes := i.helm("install signet deploy/helm/signet --namespace "+installation+" --create-namespace --wait --timeout 2m",
		"agent: {socket: {directory: /run/spire/agent-sockets, name: spire-agent.sock, mount: csi}}\nca: {kubernetes: {injection: {enabled: true, failurePolicy: Fail}}}")
	if !strings.Contains(notes, volume) || !strings.Contains(notes, "unix:///spiffe/spire-agent.sock") {
		t.Errorf("the notes after the installation are\n%s", notes)
	}
	i.signet("kind: Identity\nname: pods\nspiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}\non: [k8s_psat:cluster:prod]\n", "apply", "-f", "-")
	own := "/ns/" + i.namespace + "/sa/web"
	i.prints("early", "svid: "+own)
	i.unprivileged("hold", "web", "hold", socket, volume, mount)
	i.prints("hold", "svid: "+own)

	// A pod that would write there is not started: only the agent makes sockets in that directory.
	i.unprivileged("writer", "web", "wait", socket, "{name: spiffe, csi: {driver: csi.spiffe.io}}", mount)
	i.event(i.namespace, "writer", "readOnly must be set to 'true'")

	// Both are replaced under pods that run; what the pods mount stays.
	i.kubectl("-n", drivers, "rollout", "restart", "daemonset/spiffe-csi")
	i.kubectl("-n", drivers, "rollout", "status", "daemonset/spiffe-csi", "--timeout=90s")
	i.kubectl("-n", installation, "rollout", "restart", "daemonset/signet-agent")
	i.kubectl("-n", installation, "rollout", "status", "daemonset/signet-agent", "--timeout=90s")
	before := len(strings.Split(i.kubectl("-n", i.namespace, "logs", "hold"), "\n"))
	i.until("the pod has its SVID from the new agent", func(out string, err error) bool {
		lines := strings.Split(out, "\n")
		return err == nil && len(lines) >= before && strings.HasPrefix(lines[len(lines)-1], "svid: "+own)
	}, "-n", i.namespace, "logs", "hold")
	i.unprivileged("late", "web", "who", socket, volume, mount)
	i.says("late", "main", "ids: "+own)

	// The proxy that is injected mounts the same volume, so that restricted Pod Security lets its pod in.
	i.apply(fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata:
  name: injected
  namespace: %s
  labels: {signet-id.github.io/inject: "true"}
  annotations: {signet-id.github.io/inject-inbound: "8443=http:8080"}
spec:
  serviceAccountName: web
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: app
    image: %q
    args: [plain, "127.0.0.1:8080"]
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
`, i.namespace, need(t, "SIGNET_KUBE_WORKLOAD_IMAGE", "an image with test/kube/workload")))
	i.kubectl("-n", i.namespace, "wait", "--for=condition=Ready", "pod/injected", "--timeout=90s")

	// What was mounted goes with its pod.
	uid := i.field("pod/hold", ".metadata.uid")
	mounted := func() bool {
		out, err := i.tryShell(i.env, "cat /proc/$(cat "+filepath.Join(need(t, "SIGNET_KUBEBOX_DIR", "the state directory of the first cluster"), "node.pid")+")/mounts")
		if err != nil {
			t.Fatal(err, out)
		}
		return strings.Contains(out, uid+"/volumes/kubernetes.io~csi")
	}
	if !mounted() {
		t.Error("nothing is mounted for the pod")
	}
	i.kubectl("-n", i.namespace, "delete", "pod", "hold")
	for mounted() {
		pause(t, i.ctx)
	}
}

// image gives the first cluster's node an image.
func (i *installer) image(tag string, files ...string) {
	i.t.Helper()
	file := filepath.Join(i.t.TempDir(), "image.tar")
	if out, err := command(i.ctx, optional(i.t, "SIGNET_KUBEBOX", "the program kubebox"), append([]string{"image", "-tag", tag, "-o", file}, files...)...); err != nil {
		i.t.Fatalf("%v: %s", err, out)
	}
	i.kubebox("load", file)
}

// csiDriver is the driver as its documentation installs it beside SPIRE: it hands out /run/spire/agent-sockets.
const csiDriver = `apiVersion: storage.k8s.io/v1
kind: CSIDriver
metadata:
  name: csi.spiffe.io
  labels: {security.kubernetes.io/csi-ephemeral-volume-profile: restricted}
spec: {attachRequired: false, podInfoOnMount: true, fsGroupPolicy: None, volumeLifecycleModes: [Ephemeral]}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: spiffe-csi, namespace: spiffe-csi}
spec:
  selector: {matchLabels: {app: spiffe-csi}}
  template:
    metadata: {labels: {app: spiffe-csi}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: driver
        image: signet.test/csi-driver:e2e
        args: [-workload-api-socket-dir, /sockets, -csi-socket-path, /csi/csi.sock]
        env: [{name: MY_NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]
        securityContext: {privileged: true, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
        volumeMounts:
        - {name: sockets, mountPath: /sockets, readOnly: true}
        - {name: csi, mountPath: /csi}
        - {name: pods, mountPath: /var/lib/kubelet/pods, mountPropagation: Bidirectional}
      - name: registrar
        image: signet.test/csi-registrar:e2e
        args: [-csi-address, /csi/csi.sock, -kubelet-registration-path, /var/lib/kubelet/plugins/csi.spiffe.io/csi.sock]
        volumeMounts:
        - {name: csi, mountPath: /csi}
        - {name: registry, mountPath: /registration}
      volumes:
      - {name: sockets, hostPath: {path: /run/spire/agent-sockets, type: DirectoryOrCreate}}
      - {name: csi, hostPath: {path: /var/lib/kubelet/plugins/csi.spiffe.io, type: DirectoryOrCreate}}
      - {name: pods, hostPath: {path: /var/lib/kubelet/pods, type: Directory}}
      - {name: registry, hostPath: {path: /var/lib/kubelet/plugins_registry, type: Directory}}
`
