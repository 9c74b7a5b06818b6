package k8spsat

import (
	"context"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-id/signet/ca/nodeattest"
	"github.com/signet-id/signet/test/cloudtest"
)

// Whatever the API server does, the attestation ends in time, nobody is let in, and the reason tells the operator what
// it was.
func TestHostileServer(t *testing.T) {
	endless := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"kind":"TokenReview","apiVersion":"authentication.k8s.io/v1","status":{"error":"`)
		chunk := strings.Repeat("a", 64<<10)
		for r.Context().Err() == nil {
			if _, err := w.Write([]byte(chunk)); err != nil {
				return
			}
		}
	}
	status := func(code int, text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { http.Error(w, text, code) }
	}
	text := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, s) }
	}
	tests := []struct {
		name    string
		handler http.HandlerFunc
		want    string
		calls   int
	}{
		{"garbage", text("<html>hello</html>"), "not the JSON object", 1},
		{"nothing", text(""), "not the JSON object", 1},
		{"another object", text(`{"kind":"SubjectAccessReview","apiVersion":"authorization.k8s.io/v1","status":{"authenticated":true}}`), "SubjectAccessReview", 1},
		{"an object with two verdicts", text(`{"kind":"TokenReview","apiVersion":"authentication.k8s.io/v1","status":{"authenticated":false,"authenticated":true}}`), "not the JSON object", 1},
		{"without end", endless, "larger than", 1},
		{"cut off", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			fmt.Fprint(w, `{"kind":`)
		}, "reading the API server's answer", maxTries},
		{"hangs up", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "asking the API server", maxTries},
		{"overloaded", status(http.StatusTooManyRequests, "later"), "429", maxTries},
		{"broken, and tells everything", status(http.StatusInternalServerError, "cannot review "+nodeToken), "not shown", maxTries},
		{"tells our own credential", status(http.StatusInternalServerError, "bad "+ownToken), "not shown", maxTries},
		{"tells the beginning of a token", status(http.StatusInternalServerError, "cannot review "+nodeToken[:16]+"..."), "not shown", maxTries},
		{"our credential has ended", status(http.StatusUnauthorized, `{"message":"Unauthorized"}`), "still good?", 1},
		{"no permission", status(http.StatusForbidden, `{"message":"cannot create resource \"tokenreviews\""}`), "needs create on tokenreviews", 1},
		{"sends us elsewhere", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://127.0.0.1:1/", http.StatusFound)
		}, "302", 1},
		{"a huge refusal", status(http.StatusBadRequest, strings.Repeat("no ", 100000)), "400", 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := cloudtest.NewKubernetes(t)
			s.Replace = tt.handler
			got, err := attest(newAttestor(t, s), goodPayload)
			if err == nil {
				t.Fatalf("let in as %v", got.Path)
			}
			r := refusal(t, err)
			if r.Kind != nodeattest.Internal || !strings.Contains(r.Error(), tt.want) {
				t.Errorf("refused with kind %d, %q; want Internal and %q", r.Kind, r.Error(), tt.want)
			}
			if len(r.Error()) > 1500 {
				t.Errorf("the error has %d bytes", len(r.Error()))
			}
			if strings.Contains(r.Text, tt.want) {
				t.Errorf("the caller, who is not trusted, is told %q", r.Text)
			}
			if n := len(s.Called()); n != tt.calls {
				t.Errorf("%d calls, want %d", n, tt.calls)
			}
		})
	}
}

// A server that stumbles is asked again, and the node never notices.
func TestTransientFaults(t *testing.T) {
	s := cloudtest.NewKubernetes(t)
	var n atomic.Int32
	s.Replace = func(w http.ResponseWriter, r *http.Request) {
		if n.Add(1)%2 == 1 {
			http.Error(w, "starting", http.StatusServiceUnavailable)
			return
		}
		s.Answer(w, r)
	}
	if _, err := attest(newAttestor(t, s), goodPayload); err != nil {
		t.Error(err)
	}
	if got := len(s.Called()); got != 6 {
		t.Errorf("%d calls, want each of three twice", got)
	}
}

// A server that does not answer holds nobody for longer than the attestation may take.
func TestSilentServer(t *testing.T) {
	s := cloudtest.NewKubernetes(t)
	release := make(chan struct{})
	s.Replace = func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-release:
		}
	}
	t.Cleanup(func() { close(release) })
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := newAttestor(t, s).Attest(ctx, nodeattest.Attempt{Payload: []byte(goodPayload)})
	if err == nil {
		t.Fatal("let in")
	}
	if ctx.Err() == nil {
		t.Errorf("it ended before its time, with %v", err)
	}
}

// Whoever answers must have a certificate of the configured authority.
func TestServerIsVerified(t *testing.T) {
	s := cloudtest.NewKubernetes(t)
	path := s.Kubeconfig(t)
	other := httptest.NewUnstartedServer(http.NotFoundHandler())
	other.TLS = selfSigned(t)
	other.StartTLS()
	t.Cleanup(other.Close)
	write(t, filepath.Join(filepath.Dir(path), "ca.crt"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: other.TLS.Certificates[0].Certificate[0]})))
	a, err := New(Config{Clusters: map[string]Cluster{"prod": {ServiceAccounts: []string{"signet:agent"}, Kubeconfig: path}}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = attest(a, goodPayload)
	if r := refusal(t, err); r.Kind != nodeattest.Internal || !strings.Contains(r.Error(), "certificate") {
		t.Errorf("refused with kind %d, %q", r.Kind, r.Error())
	}
	if n := len(s.Called()); n != 0 {
		t.Errorf("the server that was not verified got %d calls", n)
	}
}

// Credentials may rotate while the CA runs.
func TestCredentialsAreReadAgain(t *testing.T) {
	s := cloudtest.NewKubernetes(t)
	path := s.Kubeconfig(t)
	a, err := New(Config{Clusters: map[string]Cluster{"prod": {ServiceAccounts: []string{"signet:agent"}, Kubeconfig: path}}})
	if err != nil {
		t.Fatal(err)
	}
	good := read(t, path)
	write(t, path, strings.Replace(good, ownToken, "old.token.x", 1))
	if _, err := attest(a, goodPayload); err == nil || !strings.Contains(err.Error(), "401") {
		t.Errorf("with an old token: %v", err)
	}
	write(t, path, good)
	if _, err := attest(a, goodPayload); err != nil {
		t.Errorf("with the new one: %v", err)
	}
}

// A CA in a pod reaches its own cluster with what Kubernetes mounts there.
func TestInCluster(t *testing.T) {
	s := cloudtest.NewKubernetes(t)
	dir := t.TempDir()
	write(t, filepath.Join(dir, "token"), ownToken+"\n")
	write(t, filepath.Join(dir, "ca.crt"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
	host, port, err := net.SplitHostPort(s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	config := Config{Clusters: map[string]Cluster{"prod": {ServiceAccounts: []string{"signet:agent"}}}, ServiceAccountDir: dir}
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if _, err := New(config); err == nil || !strings.Contains(err.Error(), "KUBERNETES_SERVICE_HOST") {
		t.Errorf("outside a pod: %v", err)
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", host)
	t.Setenv("KUBERNETES_SERVICE_PORT", port)
	a, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := attest(a, goodPayload); err != nil {
		t.Error(err)
	}
}
