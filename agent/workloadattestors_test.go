package agent

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestFailedAttestationIsCountedByMethod(t *testing.T) {
	r := newRig(t)
	r.config.Metrics.Listen = "127.0.0.1:0"
	r.config.RegistrationWait = 1
	r.config.WorkloadAttestation.Unix.MaxHashBytes = 1 // no executable is that small
	a, _ := r.run()
	r.ready(a)
	metrics := func() string {
		t.Helper()
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		response, err := client.Get("http://" + a.MetricsAddr().String() + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(body)
	}
	const counter = `signet_agent_attestation_failures_total{method="unix"} `
	if body := metrics(); !strings.Contains(body, counter+"0\n") {
		t.Errorf("before anything failed there is no %s0", counter)
	}
	if _, err := workloadapi.FetchX509Context(t.Context(), workloadapi.WithAddr(a.Addr())); status.Code(err) != codes.PermissionDenied {
		t.Fatalf("fetching without an entry: %v", err)
	}
	if body := metrics(); !strings.Contains(body, counter) || strings.Contains(body, counter+"0\n") {
		t.Errorf("an executable that was not hashed does not show in %s", counter)
	}
	r.log.await(t, "workload attestation is incomplete")
}

func TestWorkloadAttestationConfig(t *testing.T) {
	rest := "trust_domain: example.org\nserver_address: ca\ndata_dir: /d\njoin_token: " + string(pinned) + "\nworkload_attestation: "
	for _, tt := range []struct {
		name, config string
		hash         int64
		bad          string
	}{
		{name: "the older name", config: "{max_hash_bytes: 7}", hash: 7},
		{name: "the present name", config: "{unix: {max_hash_bytes: -1, allow_fuse: true}}", hash: -1},
		{name: "both, the same", config: "{max_hash_bytes: 7, unix: {max_hash_bytes: 7}}", hash: 7},
		{name: "both", config: "{max_hash_bytes: 7, unix: {max_hash_bytes: 8}}", bad: "workload_attestation.max_hash_bytes: is the older name"},
		{name: "docker with its defaults", config: "{docker: {}}"},
		{name: "docker", config: "{docker: {sockets: [/run/d.sock], rootless: true, env: [STAGE], cgroup_parents: [/batch], timeout: 1s}}"},
		{name: "a socket's address", config: "{docker: {sockets: ['unix:///run/docker.sock']}}", bad: "workload_attestation.docker.sockets: "},
		{name: "a variable with its value", config: "{docker: {env: [STAGE=prod]}}", bad: "workload_attestation.docker.env: "},
		{name: "a parent that is all", config: "{docker: {cgroup_parents: [/]}}", bad: "workload_attestation.docker.cgroup_parents: "},
		{name: "a long wait", config: "{docker: {timeout: 5s}}", bad: "workload_attestation.docker.timeout: 5s is not between"},
		{name: "systemd with its defaults", config: "{systemd: {}}"},
		{name: "systemd", config: "{systemd: {bus_socket: /run/bus, timeout: 4s}}"},
		{name: "a relative bus", config: "{systemd: {bus_socket: bus}}", bad: "workload_attestation.systemd.bus_socket: "},
		{name: "k8s with its defaults", config: "{k8s: {}}"},
		{name: "k8s", config: "{k8s: {kubelet_address_env: NODE_IP, kubelet_secure_port: 10250, kubelet_ca_path: /ca, node_name_env: NODE, token_path: /t, cgroup_roots: [/kube], namespace_labels: [team], api_server: 'https://a', api_server_ca_path: /b}}"},
		{name: "k8s without TLS", config: "{k8s: {kubelet_read_only_port: 10255}}"},
		{name: "k8s, verified and not", config: "{k8s: {kubelet_ca_path: /ca, skip_kubelet_verification: true}}", bad: "workload_attestation.k8s.skip_kubelet_verification: "},
		{name: "k8s with half a certificate", config: "{k8s: {certificate_path: /c}}", bad: "workload_attestation.k8s.certificate_path: "},
		{name: "k8s by a name", config: "{k8s: {node_name: a, node_name_env: B}}", bad: "workload_attestation.k8s.node_name_env: "},
		{name: "misspelt", config: "{unix: {max_hash_byte: 7}}", bad: "agent.yaml:5:"},
	} {
		c, err := ReadConfig([]byte(rest+tt.config+"\n"), "agent.yaml")
		if tt.bad != "" {
			if err == nil || !strings.Contains(err.Error(), tt.bad) {
				t.Errorf("%s: %v, want %q", tt.name, err, tt.bad)
			}
			continue
		}
		if err != nil || c.WorkloadAttestation.Unix.MaxHashBytes != tt.hash {
			t.Errorf("%s: max_hash_bytes %d, %v; want %d", tt.name, c.WorkloadAttestation.Unix.MaxHashBytes, err, tt.hash)
		}
	}
}
