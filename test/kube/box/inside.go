package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// load imports image archives into the containerd of every node.
func load(args []string) error {
	fs := flag.NewFlagSet("load", flag.ExitOnError)
	dir := dirFlag(fs)
	fs.Parse(args)
	for _, node := range nodeDirs(*dir) {
		for _, archive := range fs.Args() {
			if err := loadInto(node, archive); err != nil {
				return err
			}
		}
	}
	return nil
}

func loadInto(dir, archive string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	cmd, err := inNode(dir, "ctr", "-n", "k8s.io", "images", "import", "-")
	if err != nil {
		return err
	}
	cmd.Stdin = f
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", archive, err, out)
	}
	return nil
}

// execInNode replaces this process by a command inside the node.
func execInNode(args []string) error {
	fs := flag.NewFlagSet("exec", flag.ExitOnError)
	dir := dirFlag(fs)
	fs.Parse(args)
	if fs.NArg() == 0 {
		return errors.New("no command")
	}
	cmd, err := inNode(*dir, fs.Args()...)
	if err != nil {
		return err
	}
	return syscall.Exec(cmd.Path, cmd.Args, cmd.Environ())
}

// inNode returns a command that runs inside the node, with kubectl ready to use.
func inNode(dir string, args ...string) (*exec.Cmd, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	pid, err := livePID(dir)
	if err != nil {
		return nil, err
	}
	wd, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("nsenter", append([]string{
		"-t", strconv.Itoa(pid), "-m", "-n", "-p", "-u", "-i", "--wdns=" + wd, "--",
	}, args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+filepath.Join(dir, "admin.kubeconfig"))
	return cmd, cmd.Err
}

// stop kills components, which stay away until they are started again.
func stop(args []string) error {
	return eachComponent("stop", args, func(dir, name string) error {
		pid, err := os.ReadFile(filepath.Join(dir, name+".pid"))
		if err != nil {
			return fmt.Errorf("%s does not run: %w", name, err)
		}
		if err := writeFile(dir, name+".stopped", ""); err != nil {
			return err
		}
		cmd, err := inNode(dir, "kill", "-9", strings.TrimSpace(string(pid)))
		if err != nil {
			return err
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return awaitPID(dir, name, false)
	})
}

// start lets components that were stopped run again.
func start(args []string) error {
	return eachComponent("start", args, func(dir, name string) error {
		if err := os.Remove(stoppedFile(dir, name)); err != nil {
			return fmt.Errorf("%s is not stopped: %w", name, err)
		}
		return awaitPID(dir, name, true)
	})
}

func eachComponent(command string, args []string, do func(dir, name string) error) error {
	fs := flag.NewFlagSet(command, flag.ExitOnError)
	dir := dirFlag(fs)
	fs.Parse(args)
	abs, err := filepath.Abs(*dir)
	if err != nil {
		return err
	}
	if fs.NArg() == 0 {
		return errors.New("want the names of components, such as kubelet, kube-apiserver or containerd")
	}
	if _, err := livePID(abs); err != nil {
		return err
	}
	for _, name := range fs.Args() {
		if err := do(abs, name); err != nil {
			return err
		}
	}
	return nil
}

// awaitPID waits until a component runs, or until it does not.
func awaitPID(dir, name string, runs bool) error {
	const limit = 10 * time.Second
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if err := awaitFile(ctx, filepath.Join(dir, name+".pid"), runs); err != nil {
		return fmt.Errorf("waited %v for %s: %w", limit, name, err)
	}
	return nil
}

// rename gives the node another name: the kubelet comes back as a node that
// the cluster has not seen before. The old Node object stays.
func rename(args []string) error {
	fs := flag.NewFlagSet("rename", flag.ExitOnError)
	dir := dirFlag(fs)
	fs.Parse(args)
	abs, err := filepath.Abs(*dir)
	if err != nil {
		return err
	}
	if fs.NArg() != 1 {
		return errors.New("want the new name")
	}
	ca, err := openPKI(filepath.Join(abs, "pki"))
	if err != nil {
		return err
	}
	if err := stop([]string{"-dir", abs, "kubelet", "kube-proxy"}); err != nil {
		return err
	}
	ip, err := os.ReadFile(filepath.Join(abs, nodeIPFile))
	if err != nil {
		return err
	}
	if err := errors.Join(ca.node(fs.Arg(0), string(ip)), writeFile(abs, nodeNameFile, fs.Arg(0))); err != nil {
		return err
	}
	return start([]string{"-dir", abs, "kubelet", "kube-proxy"})
}

// Files with the name and the address of a node.
const (
	nodeNameFile = "node-name"
	nodeIPFile   = "node-ip"
)
