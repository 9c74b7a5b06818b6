package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	end := time.After(time.Minute)
	for !is() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// Somebody removes the data directory under the agent: it is made anew with the agent's SVID, which is renewed as before and gets in
// again after a restart, though the join token is spent; and no other agent takes it for free.
func TestDataDirectoryRemoved(t *testing.T) {
	r := newRig(t)
	r.ca.AgentTTL = 8 * time.Second
	a, stop := r.run()
	r.ready(a)
	if err := os.RemoveAll(r.config.DataDir); err != nil {
		t.Fatal(err)
	}
	record := filepath.Join(r.config.DataDir, "node.json")
	eventually(t, "the record is there again", func() bool { _, err := os.Stat(record); return err == nil })
	if used, err := r.config.DataDirInUse(); err != nil || !used {
		t.Errorf("the directory is in use: %t, %v", used, err)
	}
	was := a.Status().NotAfter
	eventually(t, "the agent's SVID is renewed", func() bool { return a.Status().NotAfter.After(was) })
	stop()
	r.config.JoinToken = "" // it is spent
	again, _ := r.run()
	r.ready(again)
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	if n := strings.Count(r.log.text.String(), "is made anew"); n != 1 {
		t.Errorf("it was told %d times", n)
	}
}

// Where it cannot be made anew, an agent that can attest again ends, to be started anew; one that came by a token goes on.
func TestDataDirectoryThatCannotBeMade(t *testing.T) {
	for _, evidence := range []bool{true, false} {
		r := newRig(t)
		above := filepath.Join(t.TempDir(), "above")
		r.config.DataDir = filepath.Join(above, "data")
		if evidence {
			r.useEvidence()
		}
		a, err := New(r.config)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- a.Run(ctx) }()
		r.ready(a)
		if err := errors.Join(os.Rename(above, above+".away"), os.Symlink("nowhere", above)); err != nil {
			t.Fatal(err)
		}
		r.log.await(t, "cannot be made anew")
		if !evidence {
			if s := a.Status(); !s.Serving {
				t.Errorf("Status = %+v; want it serving", s)
			}
			cancel()
			<-done
			continue
		}
		if err := <-done; err == nil || !strings.Contains(err.Error(), "was removed") {
			t.Errorf("Run: %v", err)
		}
	}
}

// Nobody can call an agent whose socket was removed, or was replaced: it ends, and whoever started it starts it anew with one.
func TestSocketRemoved(t *testing.T) {
	for name, take := range map[string]func(path string) error{
		"the socket":    os.Remove,
		"its directory": func(path string) error { return os.RemoveAll(filepath.Dir(path)) },
		"another file":  func(path string) error { return errors.Join(os.Remove(path), os.WriteFile(path, nil, 0o600)) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.config.SocketPath = filepath.Join(filepath.Dir(r.config.SocketPath), "run", "a.sock")
			a, err := New(r.config)
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- a.Run(t.Context()) }()
			r.ready(a)
			if err := take(r.config.SocketPath); err != nil {
				t.Fatal(err)
			}
			if err := <-done; err == nil || !strings.Contains(err.Error(), r.config.SocketPath) {
				t.Fatalf("Run: %v", err)
			}
			if name == "another file" {
				if err := os.Remove(r.config.SocketPath); err != nil {
					t.Error(err)
				}
			}
			again, _ := r.run()
			r.ready(again)
		})
	}
}
