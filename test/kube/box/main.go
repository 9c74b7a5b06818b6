// Kubebox is a Kubernetes for end-to-end tests, in one binary.
//
// "kubebox up" makes a node out of Linux namespaces (mount, network, PID, UTS
// and IPC) and runs etcd, the Kubernetes control plane, a kubelet, kube-proxy
// and the distribution's containerd in it. Further nodes are the same without
// etcd and control plane, each on a wire to the first. Everything a node makes,
// its mounts, interfaces, firewall rules and processes, goes with its
// namespaces; only its cgroups and its state directory need removing, which up
// does when it ends.
package main

import (
	"fmt"
	"os"
	"path/filepath"
)

const usage = `usage:
  kubebox up [flags]                     run a cluster until SIGTERM or SIGINT
  kubebox down [-dir DIR]                stop it, and remove what a killed one left
  kubebox image [flags] FILE=PATH...     write an image archive of static files
  kubebox load [-dir DIR] ARCHIVE...     import image archives into every node
  kubebox exec [-dir DIR] [--] CMD...    run a command inside the node (DIR/node2: another one)
  kubebox stop [-dir DIR] COMPONENT...   kill components, which stay away
  kubebox start [-dir DIR] COMPONENT...  until this
  kubebox rename [-dir DIR] NAME         let the kubelet come back as a node of another name
  kubebox kubectl ...                    kubectl
  kubebox COMPONENT ...                  kube-apiserver, kubelet, ..., by name
`

func main() {
	// Like kubectl itself when linked or copied under that name.
	if filepath.Base(os.Args[0]) == "kubectl" {
		runKubectl(os.Args[1:])
		return
	}
	if len(os.Args) < 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	name, args := os.Args[1], os.Args[2:]
	var err error
	switch name {
	case "up":
		err = up(args)
	case "down":
		err = down(args)
	case "node": // up starts it, in the namespaces
		err = runNode(args)
	case "etcd":
		err = runEtcd(args)
	case "image":
		err = writeImage(args)
	case "load":
		err = load(args)
	case "exec":
		err = execInNode(args)
	case "stop":
		err = stop(args)
	case "start":
		err = start(args)
	case "rename":
		err = rename(args)
	case "kubectl":
		runKubectl(args)
	default:
		if components[name] == nil {
			fmt.Fprint(os.Stderr, usage)
			os.Exit(2)
		}
		os.Exit(runComponent(name, args))
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "kubebox %s: %v\n", name, err)
		os.Exit(1)
	}
}
