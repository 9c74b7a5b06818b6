// Package kubetest is what tests of the CA at API servers share: they are in packages below ca/kube and in test/kube, and some stand in for an
// API server themselves.
package kubetest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// Token is the credential in a Kubeconfig. It must never be in a log or an error.
const Token = "very-secret"

// Kubeconfig writes one for a test's own API server, which speaks without TLS, and returns the file.
func Kubeconfig(t testing.TB, url string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: x
contexts: [{name: x, context: {cluster: x, user: x}}]
users: [{name: x, user: {token: %s}}]
clusters: [{name: x, cluster: {server: %q}}]
`, Token, url)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// A State is the lock of what a test is told, by which it can wait until that is as it should be.
type State struct {
	mu      sync.Mutex
	changed chan struct{} // closed by the next change; nil: nobody waits
}

// Change calls f, which changes it.
func (s *State) Change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

// Look calls f, which reads it.
func (s *State) Look(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// Await waits until is holds, and returns false if ctx ends before.
func (s *State) Await(ctx context.Context, is func() bool) bool {
	for {
		s.mu.Lock()
		ok := is()
		if s.changed == nil {
			s.changed = make(chan struct{})
		}
		changed := s.changed
		s.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}
