package kube

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-id/signet/test/kubetest"
)

// open returns a client of an API server that answers as h does.
func open(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.CloseClientConnections)
	t.Cleanup(srv.Close)
	c, err := Open("prod", kubetest.Kubeconfig(t, srv.URL))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// until keeps a handler from returning before its request is given up.
func until(w http.ResponseWriter, r *http.Request) {
	w.(http.Flusher).Flush()
	<-r.Context().Done()
}

func TestAnswersAreBounded(t *testing.T) {
	for name, tt := range map[string]struct {
		handler http.HandlerFunc
		want    error
	}{
		"no answer":      {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, errSlow},
		"half an answer": {func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, `{"kind":"Node`); until(w, r) }, errSlow},
		"gigabytes": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			io.WriteString(w, `{"kind":"NodeList","apiVersion":"v1","metadata":{"continue":"`)
			for chunk := strings.Repeat("x", 1<<16); ; {
				if _, err := io.WriteString(w, chunk); err != nil {
					return
				}
			}
		}, errLarge},
		"gigabytes of an error": {func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusForbidden)
			for chunk := strings.Repeat("x", 1<<16); ; {
				if _, err := io.WriteString(w, chunk); err != nil {
					return
				}
			}
		}, errLarge},
	} {
		t.Run(name, func(t *testing.T) {
			c := open(t, tt.handler)
			c.guard.timeout, c.guard.limit = 300*time.Millisecond, 1<<20
			if errors.Is(tt.want, errLarge) {
				c.guard.timeout = time.Minute
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			_, err := c.Nodes().List(ctx, metav1.ListOptions{})
			if err == nil || !strings.Contains(err.Error(), tt.want.Error()) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), kubetest.Token) {
				t.Error("the error holds the token")
			}
		})
	}
}

// A watch outlives the bound of a request for as long as it says something, and ends when it does not.
func TestWatchLivesByWhatItSays(t *testing.T) {
	const bookmarks = 6
	c := open(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		for range bookmarks {
			io.WriteString(w, `{"type":"BOOKMARK","object":{"kind":"Node","apiVersion":"v1","metadata":{"resourceVersion":"7"}}}`+"\n")
			w.(http.Flusher).Flush()
			select {
			case <-time.After(100 * time.Millisecond):
			case <-r.Context().Done():
				return
			}
		}
		until(w, r) // the connection is there, and that is all
	})
	c.guard.timeout, c.guard.silence = 250*time.Millisecond, 400*time.Millisecond
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	w, err := c.Nodes().Watch(ctx, metav1.ListOptions{Watch: true})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	got := 0
	for e := range w.ResultChan() {
		if e.Type != "BOOKMARK" {
			t.Errorf("event %v", e)
		}
		got++
	}
	if got != bookmarks || ctx.Err() != nil {
		t.Errorf("%d bookmarks, want %d; ended by the test's own bound: %v", got, bookmarks, ctx.Err())
	}
	if r := c.Requests(); r.Watches != 1 || r.Reads != 0 || r.Writes != 0 {
		t.Errorf("counted %+v", r)
	}
}

// All clients of a cluster are bounded and counted together.
func TestEveryClientIsCounted(t *testing.T) {
	c := open(t, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNotFound) })
	ctx := t.Context()
	gvr := metav1.SchemeGroupVersion.WithResource("things")
	_, _ = c.Nodes().Get(ctx, "a", metav1.GetOptions{})
	_, _ = c.Dynamic.Resource(gvr).Get(ctx, "a", metav1.GetOptions{})
	_, _ = c.Metadata.Resource(gvr).Get(ctx, "a", metav1.GetOptions{})
	_ = c.Nodes().Delete(ctx, "a", metav1.DeleteOptions{})
	if r := c.Requests(); r.Reads != 3 || r.Writes != 1 {
		t.Errorf("counted %+v, want 3 reads and a write", r)
	}
}

// An API server that redirects, or who speaks for it, sends neither the CA's token nor a request of the CA's elsewhere.
func TestRedirectsAreNotFollowed(t *testing.T) {
	asked := make(chan string, 16)
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		asked <- r.Method + " " + r.URL.Path + " with authorization " + strings.ReplaceAll(r.Header.Get("Authorization"), kubetest.Token, "of the CA")
	}))
	defer elsewhere.Close()
	for _, status := range []int{http.StatusMovedPermanently, http.StatusFound, http.StatusTemporaryRedirect, http.StatusPermanentRedirect} {
		c := open(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, elsewhere.URL+r.URL.Path, status) })
		nodes := c.Dynamic.Resource(metav1.SchemeGroupVersion.WithResource("nodes"))
		if _, err := nodes.List(t.Context(), metav1.ListOptions{}); err == nil {
			t.Errorf("%d: a list is one", status)
		}
		if w, err := nodes.Watch(t.Context(), metav1.ListOptions{Watch: true}); err == nil {
			w.Stop()
			t.Errorf("%d: a watch is one", status)
		}
		if err := nodes.Delete(t.Context(), "a", metav1.DeleteOptions{}); err == nil {
			t.Errorf("%d: a deletion is one", status)
		}
	}
	close(asked)
	for a := range asked {
		t.Errorf("%s went elsewhere", a)
	}
}

// What is between the CA and its API server must not be either of them.
func TestPlainHTTPIsForLoopbackOnly(t *testing.T) {
	for server, want := range map[string]bool{
		"https://api.example.org": true, "http://127.0.0.1:1": true, "http://[::1]:1": true, "http://localhost:1": true,
		"http://api.example.org": false, "http://192.0.2.1:8080": false, "api.example.org:8080": false, "http://localhost.example.org": false,
	} {
		if _, err := Open("prod", kubetest.Kubeconfig(t, server)); (err == nil) != want || err != nil && (!strings.Contains(err.Error(), "not https") || strings.Contains(err.Error(), kubetest.Token)) {
			t.Errorf("%s: %v", server, err)
		}
	}
}
