package inject

import (
	"encoding/json"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

const (
	containerName  = "signet-proxy"
	volumeName     = "signet-workload-api"
	socketDir      = "/run/signet/agent"
	configVariable = "SIGNET_PROXY_CONFIG"
	// annotationDone marks pods that were worked on, so that a second look leaves them alone.
	annotationDone = "signet-id.github.io/injected"
	csiDriver      = "csi.spiffe.io"
	userID         = 65532
)

// An operation is one of a JSON Patch. [RFC 6902]
type operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value"`
}

// patch returns what puts the proxy into the pod; nil: nothing is to be done. The error tells the pod's author what to mend.
func patch(pod *pod, namespace string, o Options) ([]byte, error) {
	if pod.Metadata.Labels[Label] != "true" {
		if v, ok := pod.Metadata.Labels[Label]; ok && v != "false" {
			return nil, fmt.Errorf("label %s: %q is neither \"true\" nor \"false\"", Label, clip(v))
		}
		return nil, nil
	}
	has := func(c container) bool { return c.Name == containerName }
	if slices.ContainsFunc(pod.Spec.InitContainers, has) && pod.Metadata.Annotations[annotationDone] != "" {
		return nil, nil // a webhook after us changed the pod, and we are asked again
	}
	if slices.ContainsFunc(pod.Spec.InitContainers, has) || slices.ContainsFunc(pod.Spec.Containers, has) {
		return nil, fmt.Errorf("label %s is set, and the pod has a container %s of its own; give that another name, or take the label away", Label, containerName)
	}
	if slices.ContainsFunc(pod.Spec.Volumes, func(v named) bool { return v.Name == volumeName }) {
		return nil, fmt.Errorf("label %s is set, and the pod has a volume %s of its own; give that another name", Label, volumeName)
	}
	if pod.Spec.OS != nil && pod.Spec.OS.Name == string(corev1.Windows) {
		return nil, fmt.Errorf("label %s is set on a pod for Windows, where the proxy does not run; take the label away", Label)
	}
	account := pod.Spec.ServiceAccountName
	if account == "" {
		account = "default"
	}
	w, err := read(pod.Metadata.Annotations, namespace, account, o)
	if err != nil {
		return nil, err
	}
	if err := w.clashes(pod); err != nil {
		return nil, err
	}
	container, err := w.container(o)
	if err != nil {
		return nil, err
	}
	var ops []operation
	add := func(path string, empty bool, first bool, value any) {
		switch {
		case empty:
			ops = append(ops, operation{"add", path, []any{value}})
		case first:
			ops = append(ops, operation{"add", path + "/0", value})
		default:
			ops = append(ops, operation{"add", path + "/-", value})
		}
	}
	// First, so that it is there for the other init containers.
	add("/spec/initContainers", len(pod.Spec.InitContainers) == 0, true, container)
	add("/spec/volumes", len(pod.Spec.Volumes) == 0, false, w.socketVolume(o))
	if pod.Metadata.Annotations == nil {
		ops = append(ops, operation{"add", "/metadata/annotations", map[string]string{annotationDone: "proxy"}})
	} else {
		ops = append(ops, operation{"add", "/metadata/annotations/signet-id.github.io~1injected", "proxy"})
	}
	return json.Marshal(ops)
}

// clashes refuses a port of the proxy that a container says is its own.
func (w *wish) clashes(pod *pod) error {
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		for _, p := range c.Ports {
			if by := w.inboundPortsTaken[int(p.ContainerPort)]; by != "" {
				return fmt.Errorf("annotation %s: container %q has port %d, on which the proxy is to listen; have the program listen on another port, on 127.0.0.1", by, clip(c.Name), p.ContainerPort)
			}
		}
	}
	return nil
}

type proxyConfig struct {
	AgentSocket string     `json:"agent_socket"`
	Inbound     []inbound  `json:"inbound,omitempty"`
	Outbound    []outbound `json:"outbound,omitempty"`
	Metrics     struct {
		Listen string `json:"listen"`
	} `json:"metrics"`
}

func (w *wish) container(o Options) (corev1.Container, error) {
	c := proxyConfig{AgentSocket: "unix://" + socketDir + "/" + o.SocketName, Inbound: w.inbound, Outbound: w.outbound}
	// The kubelet writes the pod's address in, so that its own probes reach the port.
	c.Metrics.Listen = fmt.Sprintf("[$(POD_IP)]:%d", w.statusPort)
	text, err := json.Marshal(c)
	if err != nil {
		return corev1.Container{}, fmt.Errorf("the proxy's configuration: %w", err)
	}
	always, yes, no, user := corev1.ContainerRestartPolicyAlways, true, false, int64(userID)
	probe := func(path string, period, failures int32) *corev1.Probe {
		return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: path, Port: intstr.FromInt32(int32(w.statusPort))}}, PeriodSeconds: period, FailureThreshold: failures, TimeoutSeconds: 2}
	}
	ports := []corev1.ContainerPort{{Name: "signet-status", ContainerPort: int32(w.statusPort), Protocol: corev1.ProtocolTCP}}
	for _, in := range w.inbound {
		ports = append(ports, corev1.ContainerPort{Name: "signet-" + in.Name, ContainerPort: int32(in.port), Protocol: corev1.ProtocolTCP})
	}
	return corev1.Container{
		Name: containerName, Image: o.Image, Args: []string{"-config-env", configVariable}, RestartPolicy: &always,
		Env: []corev1.EnvVar{
			{Name: "POD_IP", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "status.podIP"}}},
			{Name: configVariable, Value: string(text)},
		},
		Ports: ports, Resources: corev1.ResourceRequirements{Requests: w.requests, Limits: w.limits},
		VolumeMounts: []corev1.VolumeMount{{Name: volumeName, MountPath: socketDir, ReadOnly: true}},
		// The program starts once the proxy has an SVID and policies, and the pod is ready while it has.
		StartupProbe: probe("/ready", 1, 120), ReadinessProbe: probe("/ready", 10, 3), LivenessProbe: probe("/live", 10, 6),
		TerminationMessagePath: corev1.TerminationMessagePathDefault, TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError,
		SecurityContext: &corev1.SecurityContext{RunAsNonRoot: &yes, RunAsUser: &user, RunAsGroup: &user, ReadOnlyRootFilesystem: &yes, AllowPrivilegeEscalation: &no, Privileged: &no,
			Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}, SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}},
	}, nil
}

func (w *wish) socketVolume(o Options) corev1.Volume {
	if w.volume == volumeCSI {
		yes := true
		return corev1.Volume{Name: volumeName, VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: csiDriver, ReadOnly: &yes}}}
	}
	directory := corev1.HostPathDirectory
	return corev1.Volume{Name: volumeName, VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: o.HostPath, Type: &directory}}}
}
