package main

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Addresses inside the nodes' network namespaces. Nothing outside them can
// reach them, so they are the same for every cluster.
const (
	nodeIP      = "10.90.0.1" // the first node's, where the control plane is
	nodeCIDR    = "10.90.0.0/24"
	clusterCIDR = "10.91.0.0/16" // of all pods
	serviceCIDR = "10.96.0.0/16"
	apiService  = "10.96.0.1"
	apiAddr     = "127.0.0.1:6443"
	etcdAddr    = "127.0.0.1:2379"
	etcdPeer    = "127.0.0.1:2380"
	issuer      = "https://kubernetes.default.svc"
	pauseImage  = "kubebox.test/pause:1"
)

// A place is that of one of the cluster's nodes, which count from 1.
type place struct{ name, ip, podCIDR string }

func placeOf(number int) place {
	return place{fmt.Sprint("node", number), fmt.Sprint("10.90.0.", number), fmt.Sprintf("10.91.%d.0/24", number-1)}
}

// below returns what a node has in a directory of the cluster: the first one
// has the directory itself.
func below(dir string, number int) string {
	if number == 1 {
		return dir
	}
	return filepath.Join(dir, placeOf(number).name)
}

// nodeDirs lists the state directories of a cluster's nodes, the cluster's own
// last.
func nodeDirs(dir string) []string {
	dirs, _ := filepath.Glob(filepath.Join(dir, "node[0-9]*")) // the pattern is well-formed
	return append(dirs, dir)
}

// stateDir is the default state directory.
func stateDir() string {
	if d := os.Getenv("KUBEBOX_DIR"); d != "" {
		return d
	}
	return "/tmp/kubebox"
}

func dirFlag(fs *flag.FlagSet) *string {
	return fs.String("dir", stateDir(), "state directory of the cluster ($KUBEBOX_DIR)")
}

// addresses are where the control plane listens.
type addresses struct{ api, etcd, peer string }

// freeAddresses are those of a control plane in the machine's own network.
func freeAddresses(apiPort string) (addresses, error) {
	var found []string
	for _, port := range []string{apiPort, "0", "0"} {
		l, err := net.Listen("tcp", "127.0.0.1:"+port)
		if err != nil {
			return addresses{}, err
		}
		defer l.Close()
		found = append(found, l.Addr().String())
	}
	return addresses{found[0], found[1], found[2]}, nil
}

// A mapping forwards a loopback port of the machine to one of the node, or the
// other way round.
type mapping struct{ from, to string }

type mappings []mapping

func (m *mappings) String() string { return fmt.Sprint(*m) }

func (m *mappings) Set(s string) error {
	from, to, ok := strings.Cut(s, ":")
	_, err1 := strconv.ParseUint(from, 10, 16)
	_, err2 := strconv.ParseUint(to, 10, 16)
	if !ok || err1 != nil || err2 != nil {
		return errors.New("want two ports, as PORT:NODEPORT")
	}
	*m = append(*m, mapping{from, to})
	return nil
}

// up makes nodes and runs the cluster in them until it is told to stop.
func up(args []string) (err error) {
	fs := flag.NewFlagSet("up", flag.ExitOnError)
	dir := dirFlag(fs)
	apiPort := fs.String("api-port", "16443", "loopback port of the machine for the API server (0: any free one)")
	cgroup := fs.String("cgroup-root", "/", "cgroup to put pods under; a second cluster at the same time needs its own")
	pause := fs.String("pause", "", "archive of the pause image")
	nodes := fs.Int("nodes", 1, "number of nodes; what the others than the first have is in node2, node3, ... in the state directory")
	keep := fs.Bool("keep", false, "keep the state directory at the end")
	controlPlane := fs.Bool("control-plane", false, "run etcd, the API server and the controller manager alone, in the machine's network: no node, no pods")
	audit := fs.Bool("audit", false, "write who asks the API server for what to audit.log in the state directory")
	var forward, outward mappings
	fs.Var(&forward, "forward", "PORT:NODEPORT to forward from the machine's loopback to the node's; can be repeated")
	fs.Var(&outward, "outward", "NODEPORT:PORT to forward from the node's address to the machine's loopback; can be repeated")
	fs.Parse(args)

	*dir, err = filepath.Abs(*dir)
	if err != nil {
		return err
	}
	if _, err := livePID(*dir); err == nil {
		return fmt.Errorf("a cluster is up in %s", *dir)
	}
	if err := removeState(*dir); err != nil {
		return err
	}
	const maxNodes = 9
	if *nodes < 1 || *nodes > maxNodes {
		return fmt.Errorf("-nodes %d: want 1 to %d", *nodes, maxNodes)
	}
	cmd := nodeCommand(*dir)
	cmds := []*exec.Cmd{cmd}
	if *audit {
		cmd.Args = append(cmd.Args, "-audit")
	}
	api, hostAPI := apiAddr, ""
	if *controlPlane {
		if len(forward)+len(outward) > 0 || *nodes > 1 {
			return errors.New("-control-plane is in the machine's network already, without a node; leave out -forward, -outward and -nodes")
		}
		at, err := freeAddresses(*apiPort)
		if err != nil {
			return err
		}
		api, hostAPI, *cgroup = at.api, at.api, ""
		cmd.Args = append(cmd.Args, "-control-plane", "-api", at.api, "-etcd", at.etcd, "-peer", at.peer)
	} else {
		for number := 1; number <= *nodes; number++ {
			if err := checkCgroups(below(*cgroup, number)); err != nil {
				return err
			}
		}
		if hostAPI, err = openPorts(cmd, *apiPort, forward); err != nil {
			return err
		}
		cmd.Args = append(cmd.Args, "-nodes", strconv.Itoa(*nodes), "-outward", outward.froms())
		for number := 2; number <= *nodes; number++ {
			other := nodeCommand(below(*dir, number))
			other.Args = append(other.Args, "-number", strconv.Itoa(number), "-api", inNodes(apiAddr))
			cmds = append(cmds, other)
		}
		for i, c := range cmds {
			c.Args = append(c.Args, "-cgroup-root", below(*cgroup, i+1), "-pause", *pause)
			c.SysProcAttr.Cloneflags |= syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC
		}
	}
	defer func() {
		if !*keep {
			err = errors.Join(err, removeState(*dir))
		} else {
			err = errors.Join(err, removeAllCgroups(*dir))
		}
	}()
	if err := prepare(*dir, *cgroup, api, hostAPI, *nodes); err != nil {
		return err
	}
	if err := serveOutward(*dir, outward); err != nil {
		return err
	}

	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	if err := runNodes(*dir, cmds, stop); err != nil {
		*keep = true // for its logs
		return err
	}
	return nil
}

// nodeCommand is process 1 of a node, whose state is in dir.
func nodeCommand(dir string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", "node", "-dir", dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
		Setpgid:    true, // a terminal's interrupt is for up alone
	}
	return cmd
}

// runNodes runs the nodes. When one ends, which the first does by stop, all do.
func runNodes(dir string, cmds []*exec.Cmd, stop <-chan os.Signal) error {
	// A node dies with the thread that starts it (Pdeathsig), so keep this one.
	runtime.LockOSThread()
	type end struct {
		number int
		err    error
	}
	ended := make(chan end)
	running := 0
	start := func(cmd *exec.Cmd) error {
		if err := cmd.Start(); err != nil {
			return err
		}
		running++
		number := running
		go func() { ended <- end{number, cmd.Wait()} }()
		return writeFile(below(dir, number), "node.pid", strconv.Itoa(cmd.Process.Pid)+"\n")
	}
	startAll := func() error {
		if err := start(cmds[0]); err != nil || len(cmds) == 1 {
			return err
		}
		network, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", cmds[0].Process.Pid))
		if err != nil {
			return err
		}
		defer network.Close()
		for _, cmd := range cmds[1:] {
			cmd.ExtraFiles = []*os.File{network}
			if err := start(cmd); err != nil {
				return err
			}
		}
		return nil
	}
	err := startAll()
	if err == nil {
		go func() {
			<-stop
			cmds[0].Process.Signal(syscall.SIGTERM)
		}()
		one := <-ended
		running--
		if one.err != nil {
			err = fmt.Errorf("%s: %w; its logs are in %s", placeOf(one.number).name, one.err, filepath.Join(below(dir, one.number), "logs"))
		}
	}
	for _, cmd := range cmds {
		if cmd.Process != nil {
			cmd.Process.Kill()
		}
	}
	for range running {
		<-ended
	}
	return err
}

// inNodes is where the other nodes find what listens at a port of the first.
func inNodes(address string) string {
	_, port, _ := strings.Cut(address, ":")
	return nodeIP + ":" + port
}

// openPorts opens the machine's side of the forwarded ports, for the node to
// serve, and returns the address of the API server's.
func openPorts(cmd *exec.Cmd, apiPort string, forward mappings) (hostAPI string, err error) {
	listeners, err := listen(apiPort, forward)
	if err != nil {
		return "", err
	}
	targets := []string{apiAddr}
	for _, m := range forward {
		targets = append(targets, "127.0.0.1:"+m.to)
	}
	for _, l := range listeners {
		f, err := l.(*net.TCPListener).File()
		if err != nil {
			return "", err
		}
		l.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	cmd.Args = append(cmd.Args, "-targets", strings.Join(targets, ","))
	return listeners[0].Addr().String(), nil
}

// serveOutward connects the node's side of outward ports with the machine. A
// Unix socket in the state directory leads from one network to the other.
func serveOutward(dir string, outward mappings) error {
	for _, m := range outward {
		l, err := net.Listen("unix", outwardSocket(dir, m.from))
		if err != nil {
			return err
		}
		go forwardAll(l, "tcp", "127.0.0.1:"+m.to)
	}
	return nil
}

func outwardSocket(dir, port string) string { return filepath.Join(dir, "outward-"+port+".sock") }

func (m mappings) froms() string {
	var ports []string
	for _, one := range m {
		ports = append(ports, one.from)
	}
	return strings.Join(ports, ",")
}

// listen opens the machine's side of the forwarded ports, the API server's
// first.
func listen(apiPort string, forward mappings) (ls []net.Listener, err error) {
	for _, m := range append(mappings{{from: apiPort}}, forward...) {
		l, err := net.Listen("tcp", "127.0.0.1:"+m.from)
		if err != nil {
			return nil, err
		}
		ls = append(ls, l)
	}
	return ls, nil
}

// prepare writes the cluster's certificates and settings.
func prepare(dir, cgroup, api, hostAPI string, nodes int) error {
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "pki"), 0o755), os.MkdirAll(filepath.Join(dir, "etcd"), 0o700)); err != nil {
		return err
	}
	ca, err := newPKI(filepath.Join(dir, "pki"))
	if err != nil {
		return err
	}
	for number := 1; number <= nodes; number++ {
		server := api
		if number > 1 {
			server = inNodes(api)
		}
		if err := prepareNode(below(dir, number), below(cgroup, number), server, ca, placeOf(number)); err != nil {
			return err
		}
	}
	err = errors.Join(
		ca.tokenKey("sa"),
		ca.server("apiserver", []string{"127.0.0.1", nodeIP, apiService}, "localhost",
			"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"),
		ca.client("apiserver-kubelet", "kube-apiserver", "system:masters"),
		ca.client("controllers", "system:kube-controller-manager"),
		ca.client("scheduler", "system:kube-scheduler"),
	)
	if err != nil {
		return err
	}
	for _, user := range []string{"controllers", "scheduler"} {
		if err := writeKubeconfig(dir, user, user, "https://"+api); err != nil {
			return err
		}
	}
	return writeKubeconfig(dir, "host", "admin", "https://"+hostAPI)
}

// prepareNode writes what one node needs.
func prepareNode(dir, cgroup, api string, ca *pki, at place) error {
	for _, d := range []string{"pki", "etc/cni", "manifests", "logs", "containerd", "kubelet", "podlogs"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	ca, err := ca.in(filepath.Join(dir, "pki"))
	if err != nil {
		return err
	}
	err = errors.Join(
		writeFile(dir, nodeNameFile, at.name),
		writeFile(dir, nodeIPFile, at.ip),
		writeFile(dir, "cgroup-root", cgroup),
		ca.node(at.name, at.ip),
		ca.client("admin", "kubebox-admin", "system:masters"),
		ca.client("proxy", "system:kube-proxy"),
	)
	if err != nil {
		return err
	}
	for _, user := range []string{"admin", "node", "proxy"} {
		if err := writeKubeconfig(dir, user, user, "https://"+api); err != nil {
			return err
		}
	}
	return writeSettings(dir, cgroup, at)
}

// livePID returns the process of the node of the cluster in dir, if it is up.
func livePID(dir string) (int, error) {
	b, err := os.ReadFile(filepath.Join(dir, "node.pid"))
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0, err
	}
	// The PID may be another process's by now.
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return 0, err
	}
	if !strings.Contains(string(cmdline), "\x00node\x00-dir\x00"+dir+"\x00") {
		return 0, fmt.Errorf("process %d is not the node of %s", pid, dir)
	}
	return pid, nil
}

// down stops the cluster in dir, if it is up, and removes all that it left.
func down(args []string) error {
	fs := flag.NewFlagSet("down", flag.ExitOnError)
	dir := dirFlag(fs)
	fs.Parse(args)
	abs, err := filepath.Abs(*dir)
	if err != nil {
		return err
	}
	if pid, err := livePID(abs); err == nil {
		parent := parentPID(pid) // up, which cleans up too
		if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
			return err
		}
		const limit = 30 * time.Second
		if err := awaitExit(pid, limit); err != nil {
			return err
		}
		if parent > 1 {
			if err := awaitExit(parent, limit); err != nil {
				return err
			}
		}
	}
	return removeState(abs)
}

func parentPID(pid int) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) < 2 {
		return 0
	}
	parent, _ := strconv.Atoi(f[1])
	return parent
}

// removeState removes the state directory and the cgroups of a cluster that is
// not up.
func removeState(dir string) error {
	return errors.Join(removeAllCgroups(dir), os.RemoveAll(dir))
}

// removeAllCgroups removes those of a cluster's nodes.
func removeAllCgroups(dir string) (err error) {
	for _, d := range nodeDirs(dir) {
		root, e := os.ReadFile(filepath.Join(d, "cgroup-root"))
		if e == nil {
			e = removeCgroups(string(root))
		} else if errors.Is(e, fs.ErrNotExist) {
			e = nil // never got as far as having any
		}
		err = errors.Join(err, e)
	}
	return err
}

func writeFile(dir, name, text string) error {
	return os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600)
}
