package cloudtest

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// Kubernetes is a server that answers as an API server does, or as one never should. What a real one says is in test/kube;
// this is for what a real one does not do on demand. It knows one token, NodeToken, of one pod on one node.
type Kubernetes struct {
	*httptest.Server

	// Review is the status of every TokenReview. Change it, Pod and Node before anybody asks.
	Review, Pod, Node map[string]any
	// Replace answers instead, if it is not nil.
	Replace http.HandlerFunc

	mu    sync.Mutex
	calls []string
}

const (
	// OwnToken is what the CA shows the API server.
	OwnToken = "credential.of-the.ca"
	// NodeToken is what the agent shows the CA.
	NodeToken = "aGVhZGVy.cGF5bG9hZA.c2lnbmF0dXJl"
)

// Object reads a JSON object that a test holds.
func Object(t testing.TB, text string) map[string]any {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		t.Fatal(err)
	}
	return m
}

// NewKubernetes starts a server that lets the agent in.
func NewKubernetes(t testing.TB) *Kubernetes {
	s := &Kubernetes{
		Review: Object(t, `{"authenticated": true, "audiences": ["spire-server"], "user": {"username": "system:serviceaccount:signet:agent", "extra": {
			"authentication.kubernetes.io/pod-name": ["agent-x1"], "authentication.kubernetes.io/pod-uid": ["pod-uid-1"],
			"authentication.kubernetes.io/node-name": ["node1"], "authentication.kubernetes.io/node-uid": ["node-uid-1"],
			"authentication.kubernetes.io/credential-id": ["JTI=1b4e28ba"]}}}`),
		Pod: Object(t, `{"kind": "Pod", "metadata": {"name": "agent-x1", "namespace": "signet", "uid": "pod-uid-1", "labels": {"app": "agent", "secret": "no"}},
			"spec": {"nodeName": "node1", "serviceAccountName": "agent"}, "status": {"phase": "Running", "hostIP": "10.0.0.7"}}`),
		Node: Object(t, `{"kind": "Node", "metadata": {"name": "node1", "uid": "node-uid-1", "labels": {"zone": "a", "tier": "x"}}}`),
	}
	s.Server = httptest.NewTLSServer(s)
	t.Cleanup(s.Close)
	return s
}

// ServeHTTP answers one call.
func (s *Kubernetes) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.calls = append(s.calls, r.Method+" "+r.URL.Path)
	s.mu.Unlock()
	if r.Header.Get("Authorization") != "Bearer "+OwnToken {
		http.Error(w, "who are you?", http.StatusUnauthorized)
		return
	}
	if s.Replace != nil {
		s.Replace(w, r)
		return
	}
	s.Answer(w, r)
}

// Answer is what a well-behaved server says.
func (s *Kubernetes) Answer(w http.ResponseWriter, r *http.Request) {
	var reply map[string]any
	switch r.Method + " " + r.URL.Path {
	case "POST /apis/authentication.k8s.io/v1/tokenreviews":
		var review struct{ Spec struct{ Token string } }
		if err := json.NewDecoder(r.Body).Decode(&review); err != nil || review.Spec.Token != NodeToken {
			http.Error(w, "not the node's token", http.StatusBadRequest)
			return
		}
		reply = map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": s.Review}
		w.WriteHeader(http.StatusCreated)
	case "GET /api/v1/namespaces/signet/pods/agent-x1":
		reply = s.Pod
	case "GET /api/v1/nodes/node1":
		reply = s.Node
	}
	if reply == nil {
		http.Error(w, `{"kind": "Status", "message": "not found"}`, http.StatusNotFound)
		return
	}
	json.NewEncoder(w).Encode(reply)
}

// Called are the calls so far, as method and path.
func (s *Kubernetes) Called() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.calls...)
}

// Kubeconfig writes one that reaches the stand-in.
func (s *Kubernetes) Kubeconfig(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	write(t, filepath.Join(dir, "ca.crt"), string(ca))
	path := filepath.Join(dir, "config")
	write(t, path, fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: c
contexts: [{name: c, context: {cluster: k, user: u}}]
clusters: [{name: k, cluster: {server: %q, certificate-authority: ca.crt}}]
users: [{name: u, user: {token: %s}}]
`, s.URL, OwnToken))
	return path
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
