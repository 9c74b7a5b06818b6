package k8s

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func namespaceJSON(name string, labels object) object {
	return object{"kind": "Namespace", "apiVersion": "v1", "metadata": object{"name": name, "labels": labels}}
}

func (n *node) spaces(answer http.HandlerFunc) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.space = answer
}

func asksNamespaces(n *node) func(*Config) {
	return func(c *Config) {
		c.NamespaceLabels = []string{"team", "tier"}
		c.APIServer = n.server.URL + "/"
	}
}

func TestNamespaceLabels(t *testing.T) {
	n := newNode(t)
	n.has(podObject(podA, "shop", "web", running("web", id("a"))), podObject(podB, "shop", "api", running("api", id("b"))))
	n.spaces(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/api/v1/namespaces/shop" {
			http.NotFound(w, r)
			return
		}
		fmt.Fprint(w, toJSON(namespaceJSON("shop", object{"team": "payments", "other": "x", "tier": ""})))
	})
	m := n.method(asksNamespaces(n))
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			pod, c := podA, id("a")
			if i%2 == 1 {
				pod, c = podB, id("b")
			}
			got, err := m.selectors(within(t, 20*time.Second), in(pod, c))
			var labels []string
			for _, v := range values(got) {
				if strings.HasPrefix(v, "namespace-label:") {
					labels = append(labels, v)
				}
			}
			if want := []string{"namespace-label:team:payments", "namespace-label:tier:"}; err != nil || !slices.Equal(labels, want) {
				t.Errorf("%q, %v; want %q", labels, err, want)
			}
		})
	}
	wg.Wait()
	if asked := n.asked.Load(); asked != 1 {
		t.Errorf("the API server was asked %d times for one namespace", asked)
	}
	// Not asked for, there are none, and nobody is asked.
	other := n.method()
	if got, err := other.selectors(within(t, 20*time.Second), in(podA, id("a"))); err != nil || slices.Contains(values(got), "namespace-label:team:payments") {
		t.Errorf("without namespace_labels: %q, %v", values(got), err)
	}
	if p, err := m.Pod(within(t, 20*time.Second), Reference{UID: podA}); err != nil || !slices.Contains(values(p.Selectors), "namespace-label:team:payments") {
		t.Errorf("by reference: %+v, %v", p, err)
	}
}

// What the API server does costs the labels of the namespace, and nothing else.
func TestNamespaceFaults(t *testing.T) {
	status := func(code int, said string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { http.Error(w, said, code) }
	}
	for _, tt := range []struct {
		name    string
		handler http.HandlerFunc
		want    string
	}{
		{"another namespace", text(toJSON(namespaceJSON("bank", object{"team": "x"}))), "not that namespace"},
		{"another object", text(`{"kind":"Secret","metadata":{"name":"shop","labels":{"team":"x"}}}`), "not that namespace"},
		{"garbage", text("<html>"), "not that namespace"},
		{"nothing", text(""), "not that namespace"},
		{"without end", func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, `{"kind":"Namespace","metadata":{"name":"`)
			for chunk := strings.Repeat("a", 64<<10); r.Context().Err() == nil; {
				if _, err := fmt.Fprint(w, chunk); err != nil {
					return
				}
			}
		}, "larger than 2097152 bytes"},
		{"not allowed", status(http.StatusForbidden, "no"), "needs get on namespaces"},
		{"tells our token", status(http.StatusInternalServerError, ownToken), "[a text with the token in it]"},
		{"hangs", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "deadline"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			n.has(podObject(podA, "shop", "web", running("web", id("a"))))
			n.spaces(tt.handler)
			m := n.method(asksNamespaces(n))
			if err := m.Available(within(t, 20*time.Second)); err != nil { // the list is there: what hangs is the namespace
				t.Fatal(err)
			}
			d := 20 * time.Second
			if tt.name == "hangs" {
				d = 300 * time.Millisecond
			}
			got, err := m.selectors(within(t, d), in(podA, id("a")))
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "labels of namespace shop") || strings.Contains(err.Error(), ownToken) {
				t.Errorf("%v; want %q", err, tt.want)
			}
			if !slices.Contains(values(got), "ns:shop") || slices.ContainsFunc(values(got), func(v string) bool { return strings.HasPrefix(v, "namespace-label") }) {
				t.Errorf("selectors %q", values(got))
			}
		})
	}
}

// What is known of namespaces ages, and is bounded.
func TestNamespacesAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNamespaces(Config{NamespaceLabels: []string{"team"}})
		ns := n.entry("shop")
		ns.labels, ns.at = map[string]string{"team": "a"}, time.Now()
		time.Sleep(labelsFresh - time.Second)
		if got, err, ok := ns.answer(); !ok || err != nil || got["team"] != "a" {
			t.Errorf("fresh: %v, %v, %t", got, err, ok)
		}
		time.Sleep(time.Second)
		if _, _, ok := ns.answer(); ok {
			t.Error("labels are used without asking again")
		}
		ns.err, ns.errAt = errClosed, time.Now()
		if got, err, ok := ns.answer(); !ok || err == nil || got["team"] != "a" {
			t.Errorf("while the API server does not answer: %v, %v, %t", got, err, ok)
		}
		time.Sleep(refusedFor)
		if _, _, ok := ns.answer(); ok {
			t.Error("a failure is kept for too long")
		}
		time.Sleep(labelsStale)
		ns.errAt = time.Now()
		if got, err, ok := ns.answer(); !ok || err == nil || got != nil {
			t.Errorf("too old: %v, %v, %t", got, err, ok)
		}
		for i := range 2 * maxNamespaces {
			n.entry(fmt.Sprint("ns-", i))
		}
		if len(n.known) != maxNamespaces || n.used.Len() != maxNamespaces || n.entry("shop").labels != nil {
			t.Errorf("%d namespaces are remembered", len(n.known))
		}
	})
	for _, bad := range []string{"", "..", "a/b", "A", strings.Repeat("a", 64)} {
		if _, err := newNamespaces(Config{}).ask(t.Context(), bad); err == nil || !strings.Contains(err.Error(), "not the name of a namespace") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
