// Package daemon runs the long-lived commands: it reads their configuration file, lets flags override what it says of
// logging, and reloads it at SIGHUP. signet and the slim programs share it; it knows neither the CA nor the agent.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/signet-id/signet/internal/daemon"
	"github.com/signet-id/signet/internal/durable"
)

// MaxConfigBytes bounds a configuration file.
const MaxConfigBytes = 1 << 20

// Flags are what every daemon is told on its command line.
type Flags struct {
	// Config is the configuration file. Needed.
	Config string
	// ConfigEnv is a variable of the environment that holds the configuration, instead of Config, where a daemon takes that.
	ConfigEnv string
	// LogLevel is debug, info, warn or error, instead of what the file says; empty: as the file says.
	LogLevel string
	// LogFormat is text or json, instead of what the file says; empty: as the file says.
	LogFormat string
}

// Check refuses flags that cannot work.
func (f Flags) Check() error {
	switch {
	case f.Config == "" && f.ConfigEnv == "":
		return errors.New("--config is missing")
	case f.Config != "" && f.ConfigEnv != "":
		return errors.New("--config and --config-env exclude each other")
	}
	switch f.LogLevel {
	case "", "debug", "info", "warn", "error":
	default:
		return fmt.Errorf("--log-level %q is not one of debug, info, warn, error", f.LogLevel)
	}
	switch f.LogFormat {
	case "", "text", "json":
	default:
		return fmt.Errorf("--log-format %q is not one of text, json", f.LogFormat)
	}
	return nil
}

// Override puts what the flags say in place of what the file says.
func (f Flags) Override(level, format *string) {
	if f.LogLevel != "" {
		*level = f.LogLevel
	}
	if f.LogFormat != "" {
		*format = f.LogFormat
	}
}

// ReadConfig reads and checks the configuration file with parse, which is the reader of the daemon's own package.
func ReadConfig[C any](file string, parse func(data []byte, file string) (C, error)) (C, error) {
	var none C
	data, err := durable.ReadFile(file, MaxConfigBytes)
	if err != nil {
		return none, fmt.Errorf("reading the configuration: %w", err)
	}
	c, err := parse(data, file)
	if err != nil {
		return none, &ConfigError{File: file, Err: err}
	}
	return c, nil
}

// ReadFlags is ReadConfig for a daemon that takes its configuration from a variable of the environment too.
func ReadFlags[C any](f Flags, parse func(data []byte, file string) (C, error)) (C, error) {
	if f.ConfigEnv == "" {
		return ReadConfig(f.Config, parse)
	}
	var none C
	name := "$" + f.ConfigEnv
	data, ok := os.LookupEnv(f.ConfigEnv)
	switch {
	case !ok:
		return none, fmt.Errorf("reading the configuration: the environment has no variable %s", f.ConfigEnv)
	case len(data) > MaxConfigBytes:
		return none, fmt.Errorf("reading the configuration: %s has %d bytes, %d at most", name, len(data), MaxConfigBytes)
	}
	c, err := parse([]byte(data), name)
	if err != nil {
		return none, &ConfigError{File: name, Err: err}
	}
	return c, nil
}

// A ConfigError says that a configuration file is read, but cannot be used.
type ConfigError struct {
	File string
	// Err has one line for each mistake.
	Err error
}

// Error returns the mistakes.
func (e *ConfigError) Error() string { return fmt.Sprintf("configuration %q: %v", e.File, e.Err) }

// Unwrap returns the mistakes.
func (e *ConfigError) Unwrap() error { return e.Err }

// Hint returns the operator's next step.
func (e *ConfigError) Hint() string {
	return fmt.Sprintf("'signet config check %s' checks it without starting anything", e.File)
}

// A Server is a daemon that is ready to serve.
type Server interface {
	// Run serves until ctx ends or a part fails.
	Run(ctx context.Context) error
}

// An Observed server says how it is, for the service manager.
type Observed interface {
	// Ready is closed once the server does its work; nil: it does from the beginning of Run on.
	Ready() <-chan struct{}
	// Alive returns nil if the server's parts move. It may return late; then the server is taken for dead.
	Alive() error
	// Summary is the server's state in a line.
	Summary() string
}

// readyWait is how long a start waits for Ready: a server whose peers are away is started all the same.
const readyWait = 15 * time.Second

// statusEvery is how often the manager hears the server's state, if it has changed.
const statusEvery = 5 * time.Second

// Serve runs s until ctx ends, and calls reload at each SIGHUP. What cannot be reloaded changes nothing and is logged to
// w, in the given format. n hears how s is. It returns when s has ended.
func Serve(ctx context.Context, s Server, n *daemon.Notifier, w io.Writer, format string, reload func() (needRestart []string, err error)) error {
	log := Logger(w, format)
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	g, ctx := errgroup.WithContext(ctx)
	running, ended := context.WithCancel(ctx)
	g.Go(func() error {
		defer ended()
		return s.Run(ctx)
	})
	if o, ok := s.(Observed); ok && n != nil {
		g.Go(func() error {
			observe(running, o, n, log)
			return nil
		})
	}
	g.Go(func() error {
		for {
			select {
			case <-running.Done():
				return nil
			case <-hangup:
			}
			n.Reloading()
			needRestart, err := reload()
			n.Ready(summary(s))
			switch {
			case err != nil:
				log.Error("the configuration was not reloaded; the old one stays in force", "err", err)
			case len(needRestart) > 0:
				log.Warn("the configuration was reloaded, but some changes need a restart", "fields", strings.Join(needRestart, " "))
			default:
				log.Info("the configuration was reloaded")
			}
		}
	})
	return g.Wait()
}

// Logger logs to w, in a daemon's format.
func Logger(w io.Writer, format string) *slog.Logger {
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, nil))
	}
	return slog.New(slog.NewTextHandler(w, nil))
}

func summary(s Server) string {
	if o, ok := s.(Observed); ok {
		return o.Summary()
	}
	return ""
}

// observe tells n how o is until ctx ends.
func observe(ctx context.Context, o Observed, n *daemon.Notifier, log *slog.Logger) {
	var watching sync.WaitGroup
	defer watching.Wait()
	defer n.Stopping()
	watching.Go(func() {
		n.Watch(ctx, func(ctx context.Context) error { return inTime(ctx, o.Alive) }, func(err error) {
			log.Error("the watchdog is not told that this program lives", "err", err)
		})
	})
	if ready := o.Ready(); ready != nil {
		timer := time.NewTimer(readyWait)
		defer timer.Stop()
		select {
		case <-ctx.Done():
			return
		case <-ready:
		case <-timer.C:
		}
	}
	said := o.Summary()
	n.Ready(said)
	ticker := time.NewTicker(statusEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if now := o.Summary(); now != said {
			said = now
			n.Status(now)
		}
	}
}

// inTime returns what f does, or ctx's error if f is late. A late f is left alone: it hangs, and the watchdog is about to
// end the program.
func inTime(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("a part of the program does not answer: %w", ctx.Err())
	}
}
