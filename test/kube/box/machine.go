package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// privateProc gives a new PID namespace its /proc. From here on, mounts stay
// in this mount namespace.
func privateProc() error {
	return errors.Join(
		mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""),
		mount("proc", "/proc", "proc", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC, ""),
	)
}

func mount(source, target, fstype string, flags uintptr, data string) error {
	if err := syscall.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	return nil
}

// mounts gives the node its own /proc, /run, /var/lib/kubelet, /var/lib/cni
// and /var/log.
func (n *node) mounts() error {
	err := errors.Join(
		os.MkdirAll("/var/lib/kubelet", 0o755),
		os.MkdirAll("/var/lib/cni", 0o700),
		privateProc(),
		mount("run", "/run", "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, "mode=755"),
		mount(filepath.Join(n.dir, "kubelet"), "/var/lib/kubelet", "", syscall.MS_BIND, ""),
		mount("cni", "/var/lib/cni", "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, "mode=700"),
		mount(filepath.Join(n.dir, "podlogs"), "/var/log", "", syscall.MS_BIND, ""),
	)
	if err != nil {
		return err
	}
	// The kubelet sets these for the whole machine. Let it set copies.
	for _, name := range []string{
		"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
		"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
	} {
		target := filepath.Join("/proc/sys", name)
		value, err := os.ReadFile(target)
		if err != nil {
			return err
		}
		source := filepath.Join("/run/sysctl", name)
		err = errors.Join(os.MkdirAll(filepath.Dir(source), 0o755), os.WriteFile(source, value, 0o644))
		if err != nil {
			return err
		}
		if err := mount(source, target, "", syscall.MS_BIND, ""); err != nil {
			return err
		}
	}
	// Volumes that pods share with the node need it shared; this is still the
	// node's own mount namespace.
	return mount("", "/", "", syscall.MS_REC|syscall.MS_SHARED, "")
}

// network sets up the node's network namespace, which has no way out but to
// the other nodes.
func (n *node) network() error {
	if err := syscall.Sethostname([]byte(n.place().name)); err != nil {
		return err
	}
	commands := []string{
		"ip link set lo up",
		// A pair, so that eth0 has a carrier.
		"ip link add eth0 type veth peer name eth0-peer",
		"ip link set eth0-peer up",
		"ip addr add " + nodeIP + "/24 dev eth0",
		"ip link set eth0 up",
	}
	if n.number > 1 {
		commands = joined(n.place())
	}
	// For kube-proxy, which redirects them before they get to eth0.
	for _, c := range append(commands, "ip route add "+serviceCIDR+" dev eth0") {
		if err := n.run(strings.Fields(c)...); err != nil {
			return err
		}
	}
	if n.number > 1 {
		if err := syscall.Close(firstNetwork); err != nil { // nobody else is to have it
			return err
		}
	}
	for name, value := range map[string]string{
		"ipv4/ip_forward":                "1",
		"ipv4/conf/all/route_localnet":   "1",
		"bridge/bridge-nf-call-iptables": "1",
	} {
		if err := os.WriteFile(filepath.Join("/proc/sys/net", name), []byte(value), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// firstNetwork is the descriptor of the first node's network namespace that up
// hands on to the others.
const firstNetwork = 3

// joined are the commands that connect a further node with the first. There
// its end of the wire has the node's name; the first node is the way to all
// others.
func joined(at place) []string {
	first := fmt.Sprint("/proc/1/fd/", firstNetwork)
	on := "nsenter --net=" + first + " "
	return []string{
		"ip link set lo up",
		"ip link add eth0 type veth peer name " + at.name + " netns " + first,
		on + "ip addr add " + nodeIP + "/32 dev " + at.name,
		on + "ip link set " + at.name + " up",
		on + "ip route add " + at.ip + " dev " + at.name,
		on + "ip route add " + at.podCIDR + " via " + at.ip + " dev " + at.name,
		"ip addr add " + at.ip + "/32 dev eth0",
		"ip link set eth0 up",
		"ip route add " + nodeIP + " dev eth0",
		"ip route add " + nodeCIDR + " via " + nodeIP,
		"ip route add " + clusterCIDR + " via " + nodeIP,
	}
}

// makeCgroupRoot makes the cgroup that pods are under, and those above it.
func (n *node) makeCgroupRoot() error {
	hierarchies, err := cgroupMounts()
	if err != nil {
		return err
	}
	for _, h := range hierarchies {
		for _, name := range strings.FieldsFunc(n.cgroup, func(r rune) bool { return r == '/' }) {
			above := h
			h = filepath.Join(h, name)
			if err := os.MkdirAll(h, 0o755); err != nil {
				return err
			}
			// A new v1 cpuset admits no process until it has CPUs and memory nodes.
			for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
				if b, err := os.ReadFile(filepath.Join(above, f)); err == nil {
					if err := os.WriteFile(filepath.Join(h, f), b, 0o644); err != nil {
						return err
					}
				}
			}
		}
	}
	return nil
}

// forwardFile serves a listener that was opened outside the node by connecting
// to an address inside it.
func forwardFile(fd uintptr, target string) error {
	f := os.NewFile(fd, "listener")
	l, err := net.FileListener(f)
	f.Close()
	if err == nil {
		go forwardAll(l, "tcp", target)
	}
	return err
}

// forwardAll connects who comes to a listener with an address.
func forwardAll(l net.Listener, network, target string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			d, err := net.Dial(network, target)
			if err != nil {
				return
			}
			defer d.Close()
			go copyHalf(d, c)
			copyHalf(c, d)
		}()
	}
}

func copyHalf(dst, src net.Conn) {
	io.Copy(dst, src)
	dst.(interface{ CloseWrite() error }).CloseWrite()
}
