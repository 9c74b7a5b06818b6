package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// awaitFile waits until a file is there, or until it is not.
func awaitFile(ctx context.Context, path string, there bool) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("inotify: %w", err)
	}
	changes := os.NewFile(uintptr(fd), "inotify")
	defer changes.Close()
	if _, err := unix.InotifyAddWatch(fd, filepath.Dir(path), unix.IN_CREATE|unix.IN_DELETE|unix.IN_MOVE); err != nil {
		return fmt.Errorf("watching %s: %w", filepath.Dir(path), err)
	}
	stop := context.AfterFunc(ctx, func() { changes.SetReadDeadline(time.Now()) })
	defer stop()
	buf := make([]byte, 4096) // of at least one event
	for {
		if _, err := os.Stat(path); there == !errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if _, err := changes.Read(buf); err != nil {
			return errors.Join(ctx.Err(), err)
		}
	}
}

// awaitExit waits until a process has ended. It need not be a child.
func awaitExit(pid int, limit time.Duration) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	for end := time.Now().Add(limit); ; {
		left := time.Until(end)
		if left <= 0 {
			return fmt.Errorf("process %d does not end", pid)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("process %d: %w", pid, err)
		}
		if n > 0 {
			return nil
		}
	}
}

// again calls try until it succeeds, with a wait between: for what nobody tells when it changes.
func again(ctx context.Context, every time.Duration, try func() error) error {
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return err
		}
	}
}
