package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/signet-id/signet/internal/daemon"
	"github.com/signet-id/signet/internal/svidfiles"
)

// fileFlags say how SVIDs become files, and who is told of new ones.
type fileFlags struct {
	endpoint, dir        string
	watch, remove        bool
	owner, group, mode   string
	layout               svidfiles.Layout
	audiences            []string
	exec                 string
	execTimeout          time.Duration
	signal, pidFile, exe string
	pid                  int
}

func (f *fileFlags) add(fs *pflag.FlagSet) {
	fs.StringVar(&f.endpoint, "endpoint", "", endpointFlagHelp)
	fs.BoolVar(&f.watch, "watch", false, "go on with each renewal until stopped")
	fs.StringVar(&f.owner, "owner", "", "user, by name or number, who gets the files (only root may give files away)")
	fs.StringVar(&f.group, "group", "", "group, by name or number, that gets the files")
	fs.StringVar(&f.mode, "mode", "0600", "mode of files with keys and tokens; nothing for others than owner and group")
	fs.BoolVar(&f.remove, "remove-when-gone", false, "with --watch: remove the files when this process has no identity any more (default: they stay)")
	fs.StringVar(&f.exec, "exec", "", "program to run after the files have changed, with arguments; words end at spaces, there is no shell")
	fs.DurationVar(&f.execTimeout, "exec-timeout", 30*time.Second, "how long the program of --exec may run")
	fs.StringVar(&f.signal, "signal", "", "signal to send after the files have changed: HUP, USR1, USR2 or TERM")
	fs.StringVar(&f.pidFile, "pid-file", "", "with --signal: file with the id of the process")
	fs.IntVar(&f.pid, "pid", 0, "with --signal: id of the process")
	fs.StringVar(&f.exe, "pid-exe", "", "with --signal: path of the program that the process must be running")
}

// onlyWatching refuses what has no meaning for a token in one file.
func (f *fileFlags) onlyWatching() error {
	if f.exec != "" || f.signal != "" || f.remove || f.owner != "" || f.group != "" {
		return usagef("--exec, --signal, --owner, --group and --remove-when-gone are for a directory of tokens: give --watch too")
	}
	return nil
}

// config makes what the flags say. done lets go of it again.
func (f *fileFlags) config(a *app) (c svidfiles.Config, done func(), err error) {
	var open []func() error
	done = func() {
		for _, f := range open {
			if err := f(); err != nil {
				a.note("%v", err)
			}
		}
	}
	defer func() {
		if err != nil {
			done()
		}
	}()
	if f.dir == "" {
		for flag, used := range map[string]bool{"--exec": f.exec != "", "--signal": f.signal != "", "--owner": f.owner != "", "--group": f.group != "",
			"--combined": f.layout.Combined != "", "--remove-when-gone": f.remove, "--audience": len(f.audiences) > 0} {
			if used {
				return c, done, usagef("%s is about files, of which there are none without --write DIR", flag)
			}
		}
	}
	if c.Options, err = endpointOptions(f.endpoint); err != nil {
		return c, done, err
	}
	c.Layout, c.RemoveWhenGone, c.Now = f.layout, f.remove, a.now
	c.Warn = func(err error) {
		printError(a.stderr, isTerminal(a.stderr), workloadError("following the agent", err))
	}
	if c.Layout.Tokens, err = f.tokens(); err != nil {
		return c, done, err
	}
	tellers, closing, err := f.tellers()
	if err != nil {
		return c, done, err
	}
	c.Tellers = tellers
	open = append(open, closing)
	if f.dir == "" {
		return c, done, nil
	}
	dir, err := f.dirConfig()
	if err != nil {
		return c, done, err
	}
	if err := c.Layout.Check(); err != nil {
		return c, done, &usageError{err: err}
	}
	if c.Dir, err = svidfiles.OpenDir(dir); err != nil {
		return c, done, err
	}
	open = append(open, c.Dir.Close)
	return c, done, nil
}

func (f *fileFlags) tokens() (map[string]string, error) {
	names, taken := map[string]string{}, map[string]string{}
	for _, a := range f.audiences {
		name := svidfiles.TokenName(a)
		if other, ok := taken[name]; ok && other != a {
			return nil, usagef("--audience: %s and %s would both be the file %s", escape(other), escape(a), name)
		}
		names[a], taken[name] = name, a
	}
	return names, nil
}

func (f *fileFlags) dirConfig() (svidfiles.DirConfig, error) {
	c := svidfiles.DirConfig{Owner: -1, Group: -1}
	var err error
	if c.Path, err = filepath.Abs(f.dir); err != nil {
		return c, err
	}
	mode, err := strconv.ParseUint(f.mode, 8, 32)
	if err != nil || fs.FileMode(mode)&^fs.FileMode(0o660) != 0 || mode&0o400 == 0 {
		return c, usagef("--mode %q is not an octal mode such as 0600 or 0640, without anything for others", f.mode)
	}
	c.SecretMode = fs.FileMode(mode)
	if f.owner != "" {
		if c.Owner, err = idOf(f.owner, func(name string) (string, error) {
			u, err := user.Lookup(name)
			if err != nil {
				return "", err
			}
			return u.Uid, nil
		}); err != nil {
			return c, usagef("--owner: %w", err)
		}
	}
	if f.group != "" {
		if c.Group, err = idOf(f.group, func(name string) (string, error) {
			g, err := user.LookupGroup(name)
			if err != nil {
				return "", err
			}
			return g.Gid, nil
		}); err != nil {
			return c, usagef("--group: %w", err)
		}
	}
	return c, nil
}

func idOf(name string, look func(string) (string, error)) (int, error) {
	if n, err := strconv.ParseUint(name, 10, 31); err == nil {
		return int(n), nil
	}
	id, err := look(name)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(id)
}

// tellers are who is told of new files.
func (f *fileFlags) tellers() (all []svidfiles.Teller, closing func() error, err error) {
	closing = func() error { return nil }
	if f.exec != "" {
		command := strings.Fields(f.exec)
		if len(command) == 0 || f.execTimeout <= 0 || f.execTimeout > time.Hour {
			return nil, closing, usagef("--exec %q with --exec-timeout %v: give a program, and a time of up to 1h", f.exec, f.execTimeout)
		}
		dir, err := filepath.Abs(f.dir)
		if err != nil {
			return nil, closing, err
		}
		all = append(all, &svidfiles.Exec{Command: command, Timeout: f.execTimeout, Dir: dir})
	}
	if f.signal == "" {
		if f.pidFile != "" || f.pid != 0 || f.exe != "" {
			return nil, closing, usagef("--pid-file, --pid and --pid-exe are for --signal, which is missing")
		}
		return all, closing, nil
	}
	signal, err := svidfiles.ParseSignal(f.signal)
	if err != nil {
		return nil, closing, usagef("--signal: %w", err)
	}
	if (f.pidFile == "") == (f.pid == 0) || f.pid < 0 || f.pid == 1 {
		return nil, closing, usagef("--signal needs one of --pid-file and --pid, to know whom to send it to")
	}
	s := &svidfiles.Signal{Signal: signal, PIDFile: f.pidFile, PID: f.pid, Executable: f.exe}
	if err := s.Pin(); err != nil {
		return nil, closing, fmt.Errorf("--pid: %w", err)
	}
	return append(all, s), s.Close, nil
}

// keep keeps files until told to stop, and tells the service manager when there are some.
func (a *app) keep(ctx context.Context, c svidfiles.Config, what string) (err error) {
	manager, err := daemon.NewNotifier()
	if err != nil {
		return err
	}
	defer func() {
		manager.Stopping()
		err = errors.Join(err, manager.Close())
	}()
	show := c.OnState
	c.OnState = func(s svidfiles.State) error {
		manager.Ready("the files are there")
		return show(s)
	}
	return workloadError("watching "+what, svidfiles.NewKeeper(c).Run(ctx))
}
