package k8s

import (
	"container/list"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"sync"
	"time"

	"github.com/signet-id/signet/spiffe"
)

const (
	// labelsFresh is how long the labels of a namespace are kept, and labelsStale how long they are used while the API
	// server does not answer.
	labelsFresh = time.Minute
	labelsStale = 10 * time.Minute

	// refusedFor is how long a failure is kept.
	refusedFor = 5 * time.Second

	// maxNamespaces bounds those that are remembered, maxAsking the requests at the same time.
	maxNamespaces = 1024
	maxAsking     = 4

	maxNamespaceBytes = 2 << 20
)

// namespaces knows the labels of namespaces.
type namespaces struct {
	server string
	keys   []string
	door   *door
	asking chan struct{} // a place for each request under way

	mu    sync.Mutex
	known map[string]*list.Element // by name; the values are *namespace
	used  *list.List               // the most recently used first
}

// A namespace is what is known of one.
type namespace struct {
	name string

	// busy holds who asks for it now.
	busy chan struct{}

	mu     sync.Mutex
	labels map[string]string
	at     time.Time // of labels
	err    error
	errAt  time.Time
}

func newNamespaces(cfg Config) *namespaces {
	return &namespaces{
		server: cfg.APIServer, keys: cfg.NamespaceLabels, asking: make(chan struct{}, maxAsking), known: map[string]*list.Element{}, used: list.New(),
		door: &door{whom: "the API server", caPath: cfg.APIServerCAPath, tokenPath: cfg.TokenPath, forbidden: "the agent's service account needs get on namespaces"},
	}
}

// namespaceSelectors are those of a namespace's labels that are wanted.
func (m *Method) namespaceSelectors(ctx context.Context, name string) ([]spiffe.Selector, error) {
	if m.namespaces == nil {
		return nil, nil
	}
	labels, err := m.namespaces.labels(ctx, name)
	if err != nil {
		err = fmt.Errorf("labels of namespace %s: %w", name, err)
	}
	var all []spiffe.Selector
	for _, k := range m.namespaces.keys {
		if v, ok := labels[k]; ok {
			all = append(all, selector("namespace-label", k+":"+v))
		}
	}
	return all, err
}

// labels returns the labels of a namespace. Beside an error they are older than they should be.
func (n *namespaces) labels(ctx context.Context, name string) (map[string]string, error) {
	ns := n.entry(name)
	if labels, err, ok := ns.answer(); ok {
		return labels, err
	}
	for _, place := range []chan struct{}{ns.busy, n.asking} {
		select {
		case place <- struct{}{}:
			defer func() { <-place }()
		case <-ctx.Done():
			return ns.stale(context.Cause(ctx))
		}
	}
	if labels, err, ok := ns.answer(); ok {
		return labels, err // somebody else's wait was for the same
	}
	labels, err := n.ask(ctx, name)
	if err != nil && ctx.Err() != nil {
		return ns.stale(err) // the caller had no time: that says nothing to others
	}
	ns.mu.Lock()
	if err == nil {
		ns.labels, ns.at, ns.err = labels, time.Now(), nil
	} else {
		ns.err, ns.errAt = err, time.Now()
	}
	ns.mu.Unlock()
	if err != nil {
		return ns.stale(err)
	}
	return labels, nil
}

// answer returns what needs no request.
func (ns *namespace) answer() (map[string]string, error, bool) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	if ns.labels != nil && time.Since(ns.at) < labelsFresh {
		return ns.labels, nil, true
	}
	if ns.err == nil || time.Since(ns.errAt) >= refusedFor {
		return nil, nil, false
	}
	if ns.labels != nil && time.Since(ns.at) < labelsStale {
		return ns.labels, ns.err, true
	}
	return nil, ns.err, true
}

// stale returns older labels beside the reason why there are no newer ones.
func (ns *namespace) stale(why error) (map[string]string, error) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	if ns.labels != nil && time.Since(ns.at) < labelsStale {
		return ns.labels, why
	}
	return nil, why
}

func (n *namespaces) entry(name string) *namespace {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e := n.known[name]; e != nil {
		n.used.MoveToFront(e)
		return e.Value.(*namespace)
	}
	ns := &namespace{name: name, busy: make(chan struct{}, 1)}
	n.known[name] = n.used.PushFront(ns)
	if n.used.Len() > maxNamespaces {
		oldest := n.used.Back()
		delete(n.known, oldest.Value.(*namespace).name)
		n.used.Remove(oldest)
	}
	return ns
}

var namespaceName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// ask asks the API server. Only the wanted labels are kept.
func (n *namespaces) ask(ctx context.Context, name string) (map[string]string, error) {
	if !namespaceName.MatchString(name) {
		return nil, errors.New("that is not the name of a namespace")
	}
	var answer struct {
		Kind     string `json:"kind"`
		Metadata struct {
			Name   string            `json:"name"`
			Labels map[string]string `json:"labels"`
		} `json:"metadata"`
	}
	err := n.door.get(ctx, n.server+"/api/v1/namespaces/"+name, func(body io.Reader) error {
		text, err := io.ReadAll(io.LimitReader(body, maxNamespaceBytes+1))
		if err != nil {
			return err
		}
		if len(text) > maxNamespaceBytes {
			return fmt.Errorf("it is larger than %d bytes", maxNamespaceBytes)
		}
		if json.Unmarshal(text, &answer) != nil || answer.Kind != "Namespace" || answer.Metadata.Name != name {
			return errors.New("it is not that namespace")
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	labels := map[string]string{}
	for _, k := range n.keys {
		if v, ok := answer.Metadata.Labels[k]; ok {
			labels[k] = v
		}
	}
	return labels, nil
}
