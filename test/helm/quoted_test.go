package helm

import (
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
)

// A value is the text that it is, whatever YAML would read in it: a number, a truth, a comment, more fields.
func TestValuesAreText(t *testing.T) {
	const values = `
image: {registry: "localhost:5000/{x}", tag: "1.0", pullSecrets: ["123"]}
ca:
  audiences: ["spire, expirationSeconds: 86400 #"]
  webRootsConfigMap: "0"
  priorityClassName: "1e3"
  store: {type: etcd, etcd: {endpoints: ["https://etcd:2379"], tlsSecret: "123"}}
  seal: {source: kms, kms: "awskms:x"}
  persistence: {size: "1", storageClass: "null"}
agent:
  dataDirectory: "/var/lib/{signet}"
  socket: {directory: "/run/[signet]"}
  bundleConfigMap: "0123"
  priorityClassName: "true"
  kubelet: {certificate: selfSigned, certificateFile: "/etc/{kubelet}.crt"}
`
	rendered, err := render(t, []string{"--namespace", "42"}, needed, values)
	if err != nil {
		t.Fatal(err)
	}
	all := objects(t, rendered) // which refuses what is of the wrong type
	same := func(what, got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%s is %q, want %q", what, got, want)
		}
	}
	ds, ok := find[*appsv1.DaemonSet](t, all, "signet-agent")
	if !ok {
		t.Fatal("there are no agents")
	}
	volumes := map[string]corev1.VolumeSource{}
	for _, v := range ds.Spec.Template.Spec.Volumes {
		volumes[v.Name] = v.VolumeSource
	}
	token := volumes["token"].Projected.Sources[0].ServiceAccountToken
	same("the token's audience", token.Audience, "spire, expirationSeconds: 86400 #")
	if *token.ExpirationSeconds != 3600 {
		t.Errorf("the token lasts %d s", *token.ExpirationSeconds)
	}
	same("the data directory", volumes["data"].HostPath.Path, "/var/lib/{signet}")
	same("the socket's directory", volumes["socket"].HostPath.Path, "/run/[signet]")
	same("the kubelet's certificate", volumes["kubelet-certificate"].HostPath.Path, "/etc/{kubelet}.crt")
	same("the bundle", volumes["bundle"].ConfigMap.Name, "0123")
	same("the agents' priority", ds.Spec.Template.Spec.PriorityClassName, "true")
	same("the namespace", ds.Namespace, "42")
	same("the pull secret", ds.Spec.Template.Spec.ImagePullSecrets[0].Name, "123")
	same("the image", ds.Spec.Template.Spec.Containers[0].Image, "localhost:5000/{x}/signet-agent:1.0")
	for _, m := range ds.Spec.Template.Spec.Containers[0].VolumeMounts {
		if m.Name == "data" {
			same("the data directory in the pod", m.MountPath, "/var/lib/{signet}")
		}
	}
	ca, ok := find[*appsv1.StatefulSet](t, all, "signet-ca")
	if !ok {
		t.Fatal("there is no CA")
	}
	same("the CA's priority", ca.Spec.Template.Spec.PriorityClassName, "1e3")
	same("the storage class", *ca.Spec.VolumeClaimTemplates[0].Spec.StorageClassName, "null")
	for _, v := range ca.Spec.Template.Spec.Volumes {
		switch v.Name {
		case "etcd-tls":
			same("the Secret for etcd", v.Secret.SecretName, "123")
		case "web-roots":
			same("the web's roots", v.ConfigMap.Name, "0")
		}
	}
}
