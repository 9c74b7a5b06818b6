package metadata

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestCheckEndpoint(t *testing.T) {
	for endpoint, ok := range map[string]bool{
		"http://169.254.169.254": true, "http://[fd00:ec2::254]": true, "http://127.0.0.1:1338/": true, "https://metadata": true,
		"": false, "169.254.169.254": false, "ftp://x": false, "http://": false, "http://a:b@x": false, "http://x/latest": false, "http://x?y": false, "http://x#y": false,
	} {
		if err := CheckEndpoint(endpoint); (err == nil) != ok {
			t.Errorf("CheckEndpoint(%q) = %v, want ok %t", endpoint, err, ok)
		}
	}
}

// Whatever answers at the metadata service's address, the agent comes back with an error that says what it was, and
// repeats nothing of it.
func TestAskFaults(t *testing.T) {
	tests := []struct {
		name    string
		handler http.HandlerFunc
		want    string
		calls   int32
	}{
		{"not there", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "s3cret", http.StatusNotFound) }, "answers /x with 404", 1},
		{"no permission", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "s3cret", http.StatusForbidden) }, "403", 1},
		{"broken", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "s3cret", http.StatusInternalServerError) }, "500", maxTries},
		{"too many", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "s3cret", http.StatusTooManyRequests) }, "429", maxTries},
		{"elsewhere", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/s3cret", http.StatusFound)
		}, "302", 1},
		{"without end", func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := fmt.Fprint(w, strings.Repeat("s3cret", 10000)); err != nil {
					return
				}
			}
		}, "larger than", 1},
		{"cut off", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			fmt.Fprint(w, "s3cret")
		}, "reading the metadata service's answer", maxTries},
		{"hangs up", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "asking the metadata service", maxTries},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var calls atomic.Int32
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				calls.Add(1)
				tt.handler(w, r)
			}))
			defer server.Close()
			s := Open(server.URL)
			defer s.Close()
			_, _, err := s.Ask(t.Context(), Request{Method: http.MethodGet, Path: "/x?audience=y"})
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "s3crets3cret") {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
			if n := calls.Load(); n != tt.calls {
				t.Errorf("%d calls, want %d", n, tt.calls)
			}
		})
	}
}

func TestAskAgain(t *testing.T) {
	var calls atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if calls.Add(1) == 1 {
			http.Error(w, "starting", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprint(w, "hello")
	}))
	defer server.Close()
	s := Open(server.URL + "/")
	defer s.Close()
	if _, body, err := s.Ask(t.Context(), Request{Method: http.MethodGet, Path: "/x"}); err != nil || string(body) != "hello" {
		t.Errorf("Ask: %q, %v", body, err)
	}
}

// A service that does not answer holds the agent for no longer than the caller wants.
func TestAskSilentService(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	defer server.Close()
	s := Open(server.URL)
	defer s.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, _, err := s.Ask(ctx, Request{Method: http.MethodGet, Path: "/x"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Ask: %v, want the end of the context", err)
	}
}

// Evidence is not shown to a proxy, whatever the environment says.
func TestNoProxy(t *testing.T) {
	var proxied atomic.Bool
	proxy := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { proxied.Store(true) }))
	defer proxy.Close()
	t.Setenv("HTTP_PROXY", proxy.URL)
	t.Setenv("http_proxy", proxy.URL)
	s := Open("http://metadata.invalid")
	defer s.Close()
	if _, _, err := s.Ask(t.Context(), Request{Method: http.MethodGet, Path: "/x"}); err == nil {
		t.Error("a name that does not exist has answered")
	}
	if proxied.Load() {
		t.Error("the proxy was asked")
	}
}
