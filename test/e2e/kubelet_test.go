package e2e

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/test/signettest"
)

// While the kubelet cannot be asked, what other methods find out counts nevertheless.
func TestKubeletAwayHidesNothing(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	s := signettest.Start(t, signettest.Config{Agent: func(c *agent.Config) {
		c.WorkloadAttestation.K8s = &agent.K8sAttestation{KubeletReadOnlyPort: l.Addr().(*net.TCPAddr).Port}
	}})
	s.Apply(fmt.Sprintf("kind: Identity\nname: web\nspiffeID: /web\nmatch: ['unix:uid:%d']\n", os.Getuid()))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	x, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr(s.WorkloadAPI()))
	if err != nil || x.DefaultSVID().ID.Path() != "/web" {
		t.Errorf("%v, %v", x, err)
	}
}

// A process in a pod's cgroup gets the identity that its service account has, by an agent, a CA and what a kubelet says.
func TestPodIdentity(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("making cgroups needs root")
	}
	const uid = "0c0c0c0c-1111-2222-3333-444444444444"
	id := strings.Repeat("c", 64)
	root := fmt.Sprintf("signet-e2e-%d", os.Getpid())
	hierarchy := "/sys/fs/cgroup/pids"
	if _, err := os.Stat(filepath.Join(hierarchy, "cgroup.procs")); err != nil {
		hierarchy = "/sys/fs/cgroup"
	}
	dir := filepath.Join(hierarchy, root, "kubepods/burstable/pod"+uid, id)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Skipf("cgroups cannot be made here: %v", err)
	}
	t.Cleanup(func() {
		for d := dir; d != hierarchy; d = filepath.Dir(d) {
			_ = os.Remove(d)
		}
	})
	kubelet := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"kind":"PodList","items":[{"metadata":{"name":"web-1","namespace":"shop","uid":%q},"spec":{"serviceAccountName":"web","nodeName":"n"},
			"status":{"phase":"Running","containerStatuses":[{"name":"web","image":"web:1","containerID":"containerd://%s","state":{"running":{}}}]}}]}`, uid, id)
	})}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = kubelet.Serve(l) }()
	t.Cleanup(func() { kubelet.Close() })
	s := signettest.Start(t, signettest.Config{Agent: func(c *agent.Config) {
		c.WorkloadAttestation.K8s = &agent.K8sAttestation{KubeletReadOnlyPort: l.Addr().(*net.TCPAddr).Port, CgroupRoots: []string{"/" + root}}
	}})
	s.Apply("kind: Identity\nname: pods\nspiffeID: /shop/web\nmatch: ['k8s:ns:shop', 'k8s:sa:web', 'k8s:container-name:web']\n")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", `echo $$ >"$1/cgroup.procs" && exec "$2" svid fetch x509 --endpoint "$3"`, "sh", dir, self, s.WorkloadAPI())
	cmd.Env = append(os.Environ(), asSignet+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "spiffe://example.org/shop/web") {
		t.Errorf("%v: %s", err, out)
	}
}
