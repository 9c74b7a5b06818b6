package events

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/util/flowcontrol"

	"github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/test/kubetest"
)

// A server takes Events as an API server does: each name once.
type server struct {
	mu     sync.Mutex
	events map[string]*corev1.Event
	asked  int
	answer func() int // a status instead; 0: none
	took   chan struct{}
	url    string
}

func newServer(t *testing.T) *server {
	s := &server{events: map[string]*corev1.Event{}, took: make(chan struct{}, 10_000)}
	srv := httptest.NewServer(s)
	t.Cleanup(srv.Close)
	s.url = srv.URL
	return s
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	defer func() { s.took <- struct{}{} }()
	if s.answer != nil {
		if code := s.answer(); code != 0 {
			status(w, code, map[int]string{403: "Forbidden", 404: "NotFound", 500: "InternalError"}[code])
			return
		}
	}
	o, _, err := scheme.Codecs.UniversalDeserializer().Decode(body, nil, nil)
	e, ok := o.(*corev1.Event)
	if err != nil || !ok || r.URL.Path != "/api/v1/namespaces/"+e.Namespace+"/events" || e.Namespace != e.InvolvedObject.Namespace {
		status(w, 400, "BadRequest")
		return
	}
	if s.events[e.Namespace+"/"+e.Name] != nil {
		status(w, 409, "AlreadyExists")
		return
	}
	s.events[e.Namespace+"/"+e.Name] = e
	w.Header().Set("Content-Type", runtime.ContentTypeJSON)
	w.WriteHeader(201)
	json.NewEncoder(w).Encode(map[string]any{"kind": "Event", "apiVersion": "v1", "metadata": map[string]any{"name": e.Name}})
}

func status(w http.ResponseWriter, code int, reason string) {
	w.Header().Set("Content-Type", runtime.ContentTypeJSON)
	w.WriteHeader(code)
	fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":%q,"code":%d}`, reason, code)
}

// replica is a Recorder, which writes once it is run.
func (s *server) replica(t *testing.T) *Recorder {
	t.Helper()
	c, err := kube.Open("prod", kubetest.Kubeconfig(t, s.url))
	if err != nil {
		t.Fatal(err)
	}
	return New(c, slog.New(slog.NewTextHandler(t.Output(), nil)))
}

func run(t *testing.T, r *Recorder) (stop func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	return sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func (s *server) wait(t *testing.T, n int) {
	t.Helper()
	bound := time.After(time.Minute)
	for range n {
		select {
		case <-s.took:
		case <-bound:
			t.Fatal("the Events do not come")
		}
	}
}

// until waits until f holds of r's numbers.
func until(t *testing.T, r *Recorder, f func(Stats) bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	bound := time.After(time.Minute)
	for !f(r.Stats()) {
		select {
		case <-tick.C:
		case <-bound:
			t.Fatalf("it stays at %+v", r.Stats())
		}
	}
}

func refusal(i int) Event {
	return Event{Object: Pod("web", fmt.Sprintf("pod-%d", i), fmt.Sprintf("uid-%d", i)), Reason: "IdentityRefused", Message: "no identity by Identity web: the label is missing; set it"}
}

func TestEachOnce(t *testing.T) {
	s := newServer(t)
	r := s.replica(t)
	for range 100 {
		r.Record(refusal(1))
	}
	stop := run(t, r)
	until(t, r, func(st Stats) bool { return st.Written == 1 })
	r.Record(refusal(1))
	r.Record(refusal(2))
	until(t, r, func(st Stats) bool { return st.Written == 2 })
	stop()
	if s.asked != 2 || len(s.events) != 2 {
		t.Errorf("%d requests, %d Events; want 2 and 2", s.asked, len(s.events))
	}
	for _, e := range s.events {
		if e.Type != "Warning" || e.Reason != "IdentityRefused" || e.Message != refusal(1).Message || e.InvolvedObject.Kind != "Pod" || e.InvolvedObject.UID == "" || e.Source.Component != "signet-ca" || e.Count != 1 || e.LastTimestamp.IsZero() {
			t.Errorf("an Event is %+v", e)
		}
	}

	// The replica that leads next, or the same one after a restart, adds nothing.
	other := s.replica(t)
	other.Record(refusal(1))
	other.Record(refusal(3))
	stop = run(t, other)
	until(t, other, func(st Stats) bool { return st.Written == 1 && st.Pending == 0 })
	stop()
	if len(s.events) != 3 {
		t.Errorf("%d Events, want 3", len(s.events))
	}
}

// What is right again is no warning, and what comes to be wrong a second time, as before, is said a second time. A Recorder that
// is nil takes what it is told.
func TestAgainAndAgain(t *testing.T) {
	s := newServer(t)
	r := s.replica(t)
	for i, at := range []string{"one", "two", "two", "three"} {
		e := refusal(1)
		e.Normal, e.Occasion = i == 3, at
		r.Record(e)
	}
	stop := run(t, r)
	until(t, r, func(st Stats) bool { return st.Written == 3 && st.Pending == 0 })
	stop()
	types := map[string]int{}
	for _, e := range s.events {
		types[e.Type]++
	}
	if types["Warning"] != 2 || types["Normal"] != 1 {
		t.Errorf("Events by type: %v, want two warnings and one that is none", types)
	}
	var none *Recorder
	none.Record(refusal(1))
	if none.Stats() != (Stats{}) {
		t.Error("a Recorder that is nil counts")
	}
}

// 5,000 pods that are refused at once are a bounded number of requests, not many at a time.
func TestFlood(t *testing.T) {
	s := newServer(t)
	r := s.replica(t)
	stop := run(t, r)
	defer stop()
	began := time.Now()
	for i := range 5000 {
		e := refusal(i)
		e.Message += strings.Repeat("é", 5000)
		r.Record(e)
	}
	s.wait(t, 1)
	st := r.Stats()
	if st.Pending > maxPending || st.Dropped < 5000-maxPending-burst-20 {
		t.Errorf("stats %+v", st)
	}
	stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	if most := burst + perSecond*int(time.Since(began).Seconds()+1); s.asked > most {
		t.Errorf("%d requests, want %d at most", s.asked, most)
	}
	for _, e := range s.events {
		if len(e.Message) > maxMessage+3 {
			t.Errorf("a message of %d bytes", len(e.Message))
		}
	}
}

// TestFloodOfOneNamespace: while thousands of pods of one namespace are refused, who looks at one of another hears why.
func TestFloodOfOneNamespace(t *testing.T) {
	s := newServer(t)
	r := s.replica(t)
	for i := range 5000 {
		r.Record(refusal(i))
	}
	other := refusal(1)
	other.Object.Namespace = "another"
	r.Record(other)
	r.limit = flowcontrol.NewFakeAlwaysRateLimiter()
	stop := run(t, r)
	defer stop()
	s.wait(t, maxPendingOf+1)
	stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.events["another/"+nameOf(other)] == nil {
		t.Errorf("of %d Events none is in the other namespace", len(s.events))
	}
}

// What the API server does not take is given up, and what it cannot take now is tried again; neither stops the others.
func TestRefusedAndFailing(t *testing.T) {
	s := newServer(t)
	codes := []int{403, 404}
	s.answer = func() int {
		if len(codes) == 0 {
			return 0
		}
		code := codes[0]
		codes = codes[1:]
		return code
	}
	r := s.replica(t)
	for i := range 3 {
		r.Record(refusal(i))
	}
	stop := run(t, r)
	defer stop()
	until(t, r, func(st Stats) bool { return st.Written == 1 })
	stop()
	if st := r.Stats(); len(s.events) != 1 || st.Written != 1 || st.Dropped != 2 {
		t.Errorf("%d Events, stats %+v", len(s.events), st)
	}
	s.mu.Lock()
	s.answer = func() int { return 500 }
	s.mu.Unlock()
	r.Record(refusal(9))
	stop = run(t, r)
	s.wait(t, 1)
	stop()
	if st := r.Stats(); st.Pending != 1 {
		t.Errorf("after a failure %+v, want it to be kept", st)
	}
	s.mu.Lock()
	s.answer = nil
	s.mu.Unlock()
	r.limit = flowcontrol.NewFakeAlwaysRateLimiter()
	stop = run(t, r)
	defer stop()
	until(t, r, func(st Stats) bool { return st.Pending == 0 && st.Written == 2 })
}
