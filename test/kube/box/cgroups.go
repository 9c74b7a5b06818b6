package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// podCgroups lists the directories, one in each hierarchy, that a cluster
// makes. The cgroup root is one of its own unless it is "/".
func podCgroups(root string) (dirs []string, err error) {
	if root == "" {
		return nil, nil // a control plane has none
	}
	hierarchies, err := cgroupMounts()
	for _, h := range hierarchies {
		if filepath.Clean(root) == "/" {
			dirs = append(dirs, filepath.Join(h, "kubepods"))
		} else {
			dirs = append(dirs, filepath.Join(h, root))
		}
	}
	return dirs, err
}

// checkCgroups reports an error if the cgroups that a cluster would make have
// processes.
func checkCgroups(root string) error {
	dirs, err := podCgroups(root)
	for _, d := range dirs {
		e := filepath.WalkDir(d, func(p string, _ fs.DirEntry, err error) error {
			if err != nil || filepath.Base(p) != "cgroup.procs" {
				return nil
			}
			if b, err := os.ReadFile(p); err == nil && len(b) > 0 {
				return fmt.Errorf("%s is in use: choose another -cgroup-root", d)
			}
			return nil
		})
		err = errors.Join(err, e)
	}
	return err
}

// removeCgroups removes a cluster's cgroups. Processes killed a moment ago may
// still be leaving them.
func removeCgroups(root string) error {
	tops, err := podCgroups(root)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return again(ctx, 50*time.Millisecond, func() error {
		var errs []error
		for _, top := range tops {
			errs = append(errs, removeCgroup(top))
		}
		return errors.Join(errs...)
	})
}

func removeCgroup(top string) error {
	var dirs []string
	err := filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, p)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	for i := len(dirs) - 1; i >= 0; i-- {
		if e := syscall.Rmdir(dirs[i]); e != nil && e != syscall.ENOENT {
			err = errors.Join(err, fmt.Errorf("rmdir %s: %w", dirs[i], e))
		}
	}
	return err
}

// cgroupMounts lists where the cgroup hierarchies are mounted.
func cgroupMounts() (dirs []string, err error) {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	for _, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) > 2 && (f[2] == "cgroup" || f[2] == "cgroup2") {
			dirs = append(dirs, f[1])
		}
	}
	return dirs, nil
}
