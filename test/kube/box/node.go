package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A node is process 1 of the node's PID namespace. When it ends, the kernel
// kills all that runs there.
type node struct {
	dir          string
	number       int // 1 has the control plane
	nodes        int // how many there are
	cgroup       string
	controlPlane bool // no node: etcd, the API server and the controllers, in the machine's network
	audit        bool
	at           addresses
	ctx          context.Context // ends when the node is told to end

	mu     sync.Mutex
	exited map[int]chan syscall.WaitStatus // by the PID of a child
}

func runNode(args []string) error {
	fs := flag.NewFlagSet("node", flag.ExitOnError)
	n := &node{exited: map[int]chan syscall.WaitStatus{}}
	fs.StringVar(&n.dir, "dir", "", "")
	fs.IntVar(&n.number, "number", 1, "")
	fs.IntVar(&n.nodes, "nodes", 1, "")
	fs.StringVar(&n.cgroup, "cgroup-root", "/", "")
	fs.BoolVar(&n.controlPlane, "control-plane", false, "")
	fs.BoolVar(&n.audit, "audit", false, "")
	fs.StringVar(&n.at.api, "api", apiAddr, "")
	fs.StringVar(&n.at.etcd, "etcd", etcdAddr, "")
	fs.StringVar(&n.at.peer, "peer", etcdPeer, "")
	pause := fs.String("pause", "", "")
	targets := fs.String("targets", "", "")
	outward := fs.String("outward", "", "")
	fs.Parse(args)
	if os.Getpid() != 1 {
		return errors.New(`started by "kubebox up" only`)
	}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	n.ctx = ctx
	go n.reap()
	if n.controlPlane {
		if err := privateProc(); err != nil {
			return err
		}
	} else if err := n.build(*targets, *outward); err != nil {
		return err
	}
	failed := make(chan error, 1)
	go func() {
		if err := n.boot(*pause); err != nil {
			failed <- err
		}
	}()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return nil
	}
}

// build makes the machine that the cluster runs on: file system, network and
// cgroups, and the ways in and out.
func (n *node) build(targets, outward string) error {
	if err := n.mounts(); err != nil {
		return err
	}
	if err := n.network(); err != nil {
		return err
	}
	if err := n.makeCgroupRoot(); err != nil {
		return err
	}
	for i, target := range split(targets) {
		if err := forwardFile(uintptr(3+i), target); err != nil {
			return err
		}
	}
	for _, port := range split(outward) {
		l, err := net.Listen("tcp", nodeIP+":"+port)
		if err != nil {
			return err
		}
		go forwardAll(l, "unix", outwardSocket(n.dir, port))
	}
	return nil
}

func split(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' })
}

func (n *node) place() place { return placeOf(n.number) }

// boot starts the components, in the order in which they need each other, and
// waits until the cluster can run pods.
func (n *node) boot(pause string) error {
	start := time.Now()
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	if n.number > 1 {
		return n.join(self, pause)
	}
	if n.audit {
		if err := writeFile(n.dir, "audit.yaml", auditPolicy); err != nil {
			return err
		}
	}
	// A component started by name, from this binary.
	component := func(name string, args ...string) func() error {
		return n.keep(name, fixed(append([]string{self, name}, args...)...))
	}
	file := func(name string) string { return filepath.Join(n.dir, name) }
	key := func(name string) string { return filepath.Join(n.dir, "pki", name) }
	first := []func() error{
		component("etcd", file("etcd"), n.at.etcd, n.at.peer),
		component("kube-apiserver", n.apiServer()...),
	}
	if !n.controlPlane {
		first = append(first, n.containerd())
	}
	for _, f := range first {
		if err := f(); err != nil {
			return err
		}
	}
	api, err := n.client("admin")
	if err != nil {
		return err
	}
	if err := n.awaitAPI(api); err != nil {
		return err
	}
	n.say(start, "API server ready")
	args := []string{
		"--feature-gates=" + featureGates,
		"--kubeconfig=" + file("controllers.kubeconfig"),
		"--service-account-private-key-file=" + key("sa.key"), "--root-ca-file=" + key("ca.crt"),
		"--cluster-signing-cert-file=" + key("ca.crt"), "--cluster-signing-key-file=" + key("ca.key"),
		"--use-service-account-credentials=true",
		"--leader-elect=false", "--bind-address=127.0.0.1",
		// Its default of 20 a second makes it take four seconds to start.
		"--kube-api-qps=500", "--kube-api-burst=1000",
	}
	if n.controlPlane {
		// Nodes and pods that tests make stay as they are made.
		args = append(args, "--secure-port=0",
			"--controllers=*,-node-lifecycle-controller,-taint-eviction-controller,-pod-garbage-collector-controller")
	}
	controllers := component("kube-controller-manager", args...)
	if err := controllers(); err != nil {
		return err
	}
	if n.controlPlane {
		return n.ready(start, api, func() error { return nil })
	}
	if err := n.serveDNS(api); err != nil {
		return err
	}
	scheduler := component("kube-scheduler",
		"--kubeconfig="+file("scheduler.kubeconfig"),
		"--leader-elect=false", "--bind-address=127.0.0.1",
	)
	if err := scheduler(); err != nil {
		return err
	}
	if err := n.runPods(self, pause); err != nil {
		return err
	}
	return n.ready(start, api, func() error {
		for number := 1; number <= n.nodes; number++ {
			name := placeOf(number).name
			status, err := api.get("/api/v1/nodes/" + name)
			if err != nil {
				return err
			}
			if !nodeReady(status) {
				return fmt.Errorf("%s is not ready", name)
			}
		}
		return nil
	})
}

// join makes this a further node of a cluster whose control plane starts at
// the same time.
func (n *node) join(self, pause string) error {
	if err := n.containerd()(); err != nil {
		return err
	}
	api, err := n.client("node")
	if err != nil {
		return err
	}
	if err := n.awaitAPI(api); err != nil {
		return err
	}
	return n.runPods(self, pause)
}

func (n *node) awaitAPI(api *apiClient) error {
	return n.await("the API server", 2*time.Minute, func() error { return api.ok("/readyz") })
}

func (n *node) containerd() func() error {
	return n.keep("containerd", fixed("containerd", "--config", filepath.Join(n.dir, "etc/containerd.toml")))
}

// runPods starts kube-proxy and the kubelet, once containerd serves.
func (n *node) runPods(self, pause string) error {
	if err := n.await("containerd", time.Minute, func() error { return n.run("ctr", "version") }); err != nil {
		return err
	}
	if pause != "" {
		if err := n.run("ctr", "-n", "k8s.io", "images", "import", pause); err != nil {
			return err
		}
	}
	file := func(name string) string { return filepath.Join(n.dir, name) }
	named := func(args ...string) func() []string { // it may be renamed
		return func() []string {
			name, err := os.ReadFile(file(nodeNameFile))
			if err != nil {
				name = []byte(n.place().name)
			}
			return append(slices.Clone(args), "--hostname-override="+string(name))
		}
	}
	return errors.Join(
		n.keep("kube-proxy", named(self, "kube-proxy", "--config="+file("etc/proxy.yaml")))(),
		n.keep("kubelet", named(self, "kubelet", "--config="+file("etc/kubelet.yaml"), "--kubeconfig="+file("node.kubeconfig"), "--node-ip="+n.place().ip))())
}

// auditPolicy has a line for each request, watches too, when it comes.
const auditPolicy = `{"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["ResponseStarted", "ResponseComplete", "Panic"], "rules": [{"level": "Metadata"}]}`

// apiServer returns the API server's arguments.
func (n *node) apiServer() []string {
	key := func(name string) string { return filepath.Join(n.dir, "pki", name) }
	host, port, _ := strings.Cut(n.at.api, ":")
	args := []string{
		"--etcd-servers=http://" + n.at.etcd,
		"--secure-port=" + port, "--advertise-address=" + nodeIP,
		"--tls-cert-file=" + key("apiserver.crt"), "--tls-private-key-file=" + key("apiserver.key"),
		"--client-ca-file=" + key("ca.crt"),
		"--service-cluster-ip-range=" + serviceCIDR,
		"--service-account-issuer=" + issuer,
		"--service-account-key-file=" + key("sa.pub"), "--service-account-signing-key-file=" + key("sa.key"),
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--allow-privileged=true",
		"--shutdown-delay-duration=0s",
		"--feature-gates=" + featureGates,
		"--runtime-config=" + betaAPIs,
	}
	if n.audit {
		args = append(args, "--audit-policy-file="+filepath.Join(n.dir, "audit.yaml"), "--audit-log-path="+filepath.Join(n.dir, "audit.log"))
	}
	if n.controlPlane {
		// Nobody looks for it at its advertised address, where it is not.
		return append(args, "--bind-address="+host, "--endpoint-reconciler-type=none")
	}
	return append(args, "--bind-address=0.0.0.0",
		"--kubelet-certificate-authority="+key("ca.crt"),
		"--kubelet-client-certificate="+key("apiserver-kubelet.crt"),
		"--kubelet-client-key="+key("apiserver-kubelet.key"),
		"--kubelet-preferred-address-types=InternalIP")
}

// ready waits until the cluster is of use, and says so.
func (n *node) ready(start time.Time, api *apiClient, node func() error) error {
	err := n.await("the node and the default service account", 2*time.Minute, func() error {
		return errors.Join(node(), api.ok("/api/v1/namespaces/default/serviceaccounts/default"),
			api.ok("/api/v1/namespaces/default/configmaps/kube-root-ca.crt"))
	})
	if err != nil {
		return err
	}
	n.say(start, "ready")
	return writeFile(n.dir, "ready", "")
}

func (n *node) say(start time.Time, what string) {
	fmt.Printf("kubebox: %s after %.1fs\n", what, time.Since(start).Seconds())
}
