package daemon

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

type serverFunc func(context.Context) error

func (f serverFunc) Run(ctx context.Context) error { return f(ctx) }

// lines is a log that tells when a line has been written.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
	new chan struct{}
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf.Write(p)
	l.new <- struct{}{}
	return len(p), nil
}

func TestServeReloadsAtHangup(t *testing.T) {
	log := &lines{new: make(chan struct{}, 10)}
	answers := []struct {
		restart []string
		err     error
		want    string
	}{
		{want: "level=INFO msg=\"the configuration was reloaded\"\n"},
		{restart: []string{"listen", "data_dir"}, want: "level=WARN msg=\"the configuration was reloaded, but some changes need a restart\" fields=\"listen data_dir\"\n"},
		{err: errors.New("bad"), want: "level=ERROR msg=\"the configuration was not reloaded; the old one stays in force\" err=bad\n"},
	}
	n := 0
	err := Serve(t.Context(), serverFunc(func(context.Context) error {
		for range answers {
			if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
				return err
			}
			<-log.new
		}
		return errors.New("over")
	}), nil, log, "text", func() ([]string, error) {
		a := answers[n]
		n++
		return a.restart, a.err
	})
	if err == nil || err.Error() != "over" {
		t.Errorf("Serve = %v, want what Run returned", err)
	}
	text := log.buf.String()
	for _, a := range answers {
		if !strings.Contains(text, a.want) {
			t.Errorf("the log lacks %q:\n%s", a.want, text)
		}
	}
}

func TestServeEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := Serve(ctx, serverFunc(func(ctx context.Context) error { <-ctx.Done(); return nil }), nil, new(bytes.Buffer), "json", nil)
	if err != nil {
		t.Errorf("Serve = %v, want nil", err)
	}
}

func TestReadConfig(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yaml")
	parse := func(data []byte, name string) (string, error) {
		if string(data) == "bad" {
			return "", errors.New(name + ":1:1: bad")
		}
		return string(data), nil
	}
	if _, err := ReadConfig(file, parse); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("ReadConfig of nothing = %v, want ErrNotExist", err)
	}
	for content, want := range map[string]string{"good": "good", "bad": "", strings.Repeat("x", MaxConfigBytes+1): ""} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := ReadConfig(file, parse)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("ReadConfig of %.10q = %.10q, %v; want %q", content, got, err, want)
		}
		var ce *ConfigError
		if content == "bad" && (!errors.As(err, &ce) || !strings.Contains(ce.Hint(), "signet config check")) {
			t.Errorf("ReadConfig of a bad file = %v, want a ConfigError with a hint", err)
		}
	}
}

func TestFlags(t *testing.T) {
	level, format := "info", "text"
	Flags{LogFormat: "json"}.Override(&level, &format)
	if level != "info" || format != "json" {
		t.Errorf("Override made %q, %q", level, format)
	}
	for _, tt := range []struct {
		f    Flags
		want string
	}{
		{Flags{}, "--config is missing"},
		{Flags{Config: "c", LogLevel: "loud"}, `--log-level "loud" is not one of debug, info, warn, error`},
		{Flags{Config: "c", LogFormat: "xml"}, `--log-format "xml" is not one of text, json`},
		{Flags{Config: "c", LogLevel: "debug", LogFormat: "json"}, ""},
	} {
		if err := tt.f.Check(); (err == nil) != (tt.want == "") || err != nil && err.Error() != tt.want {
			t.Errorf("%+v.Check() = %v, want %q", tt.f, err, tt.want)
		}
	}
}
