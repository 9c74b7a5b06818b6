// Package k8s attests a process by the Kubernetes pod and the container that it runs in. Its selectors are those of SPIRE's
// attestor of the same name.
//
//	k8s:ns:shop  k8s:sa:web  k8s:pod-name:web-7d4b9  k8s:pod-uid:5b3c…  k8s:pod-label:app:web  k8s:node-name:node-3
//	k8s:pod-owner:ReplicaSet:web-7d4b  k8s:pod-owner-uid:ReplicaSet:90aa…  k8s:pod-image:…  k8s:pod-image-count:2
//	k8s:pod-init-image:…  k8s:pod-init-image-count:1  k8s:container-name:web  k8s:container-image:…
//	k8s:namespace-label:team:payments
//
// The container and the pod come from the process's cgroup (package container), what they are from the pod list of the
// node's kubelet, and labels of a namespace, if they are wanted, from the API server. A pod counts only if cgroup and
// kubelet agree on it, and a container only while the kubelet says that it runs. Kubelets tell of a container up to a second
// after it has started, and more if they are busy; of its pod they have told long before. [docs/decisions/0058]
package k8s

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/signet-id/signet/agent/workloadattest"
	"github.com/signet-id/signet/agent/workloadattest/container"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi/peer"
)

// Name is the type of the selectors.
const Name = "k8s"

const (
	// freshFor is how old the pod list may be for a container that it knows. Which container is in which pod never
	// changes, but labels do.
	freshFor = 5 * time.Second

	// staleFor is how old the pod list may be for a container that it knows while the kubelet does not answer: the
	// process in it lives, so the container does, too.
	staleFor = 5 * time.Minute

	// patience is how long a newer list is waited for before such an older one is used.
	patience = time.Second

	// startingFor is how long a container is waited for that the kubelet does not list yet. Busy ones take many seconds to
	// list what they have started, and whoever starts in a pod needs its identity on its first call.
	startingFor = 30 * time.Second

	// listWithin is how long each newer list is waited for: a kubelet that is away keeps nobody for so long.
	listWithin = 5 * time.Second
)

// Errors that say why a pod is not known. They are wrapped.
var (
	// ErrNotFound says that there is no such pod on this node, or not one that runs.
	ErrNotFound = errors.New("no such pod runs on this node")

	// ErrMismatch says that cgroup and kubelet, or the parts of a reference, do not agree on the pod.
	ErrMismatch = errors.New("it is of another pod")
)

// A Method is this attestation. It is for concurrent use.
type Method struct {
	finder     *container.Finder
	kubelet    *kubelet
	pods       *follower
	namespaces *namespaces // nil if no labels are wanted
	now        func() time.Time
}

// New returns the method. It does not connect yet. Close it.
func New(cfg Config) (*Method, error) {
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("k8s attestation: %w", err)
	}
	finder, err := container.New(container.Config{CgroupRoots: cfg.CgroupRoots})
	if err != nil {
		return nil, fmt.Errorf("k8s attestation: %w", err)
	}
	k := newKubelet(cfg)
	m := &Method{finder: finder, kubelet: k, pods: newFollower(k.list), now: time.Now}
	if len(cfg.NamespaceLabels) > 0 {
		m.namespaces = newNamespaces(cfg)
	}
	return m, nil
}

// Name returns "k8s".
func (m *Method) Name() string { return Name }

// Close ends what is under way and waits for it. Calls that wait, and later ones, fail.
func (m *Method) Close() error {
	m.pods.close()
	m.kubelet.door.close()
	if m.namespaces != nil {
		m.namespaces.door.close()
	}
	return nil
}

// Patience implements workloadattest.Patient.
func (m *Method) Patience() time.Duration { return startingFor }

// Available returns nil if the kubelet answers.
func (m *Method) Available(ctx context.Context) error {
	_, err := m.pods.sinceOrFailure(ctx, m.now().Add(-freshFor))
	return err
}

// Selectors returns the selectors of a process; none if it is not in a pod.
//
// A container that the kubelet does not know yet is waited for until ctx ends.
func (m *Method) Selectors(ctx context.Context, p *peer.Process, state peer.Snapshot) ([]spiffe.Selector, error) {
	all, _, err := m.Gradually(ctx, p, state, nil)
	return all, err
}

// Gradually implements workloadattest.Gradual: of a pod whose containers are just starting it returns what the pod is, if that is
// enough, before the kubelet tells of the container.
func (m *Method) Gradually(ctx context.Context, p *peer.Process, _ peer.Snapshot, enough workloadattest.Enough) (all []spiffe.Selector, more bool, err error) {
	where, err := m.finder.Find(p)
	if err != nil {
		return nil, false, err
	}
	if where.Container == (container.Container{}) {
		return nil, false, nil
	}
	return m.gradually(ctx, where.Container, enough)
}

func (m *Method) gradually(ctx context.Context, c container.Container, enough workloadattest.Enough) (all []spiffe.Selector, more bool, err error) {
	var early []spiffe.Selector
	will := func(p *pod) bool {
		if enough == nil {
			return false
		}
		labels, err := m.namespaceSelectors(ctx, p.namespace)
		early = append(lastingSelectors(p), labels...)
		return err == nil && enough(early, comesLater)
	}
	pod, member, stale, err := m.find(ctx, c, will)
	switch {
	case errors.Is(err, errEnough):
		return early, true, nil
	case err != nil || pod == nil:
		return nil, false, err
	}
	all = podSelectors(pod)
	if member != nil {
		all = append(all, containerSelectors(member)...)
	}
	labels, err := m.namespaceSelectors(ctx, pod.namespace)
	return append(all, labels...), false, errors.Join(stale, err)
}

// find looks a container up. A pod of nil without an error says that it is not of Kubernetes. stale says why an older list
// was used. The error is errEnough if the container's pod is known and is starting, and will says that the pod will do.
func (m *Method) find(ctx context.Context, c container.Container, will func(*pod) bool) (found *pod, member *member, stale, err error) {
	begun := m.now()
	since := begun
	if known := m.pods.held(); known != nil && known.started.After(begun.Add(-staleFor)) {
		if found, member, _ = known.find(c); found != nil {
			if known.started.After(begun.Add(-freshFor)) {
				return found, member, nil, nil
			}
			since = begun.Add(-freshFor)
			if stale = m.refresh(ctx, since); stale != nil && ctx.Err() == nil {
				return found, member, fmt.Errorf("%s: what is known of it is %s old: %w", describe(c), m.now().Sub(known.started).Round(time.Second), stale), nil
			}
		}
	}
	// A list that began before this call may not have the container yet, and the first ones after it may not either.
	for {
		within, cancel := context.WithTimeout(ctx, listWithin)
		l, err := m.pods.since(within, since)
		cancel()
		if err != nil {
			return nil, nil, nil, fmt.Errorf("%s: %w", describe(c), err)
		}
		found, member, err = l.find(c)
		switch {
		case found != nil || err != nil:
			return found, member, nil, err
		case !ofKubernetes(c):
			return nil, nil, nil, nil
		}
		if p := l.starting(c); p != nil && will(p) {
			return nil, nil, nil, errEnough
		}
		since = l.started.Add(1)
	}
}

var errEnough = errors.New("the pod will do")

// refresh sees to a newer list, and leaves time to answer by an older one.
func (m *Method) refresh(ctx context.Context, since time.Time) error {
	wait := patience
	if end, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(end)/2)
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	_, err := m.pods.sinceOrFailure(ctx, since)
	return err
}

// ofKubernetes says whether a container that is not in the list may be in the next: one whose cgroup names a pod, and one
// beside the agent's own, whose pod does not show.
func ofKubernetes(c container.Container) bool {
	return c.PodUID != "" || strings.HasPrefix(c.Path, "/../") && !strings.HasPrefix(c.Path, "/../../")
}

func describe(c container.Container) string {
	switch {
	case c.ID == "" && c.Name == "":
		return "pod " + c.PodUID
	case c.ID == "":
		return fmt.Sprintf("container %s of pod %s", c.Name, c.PodUID)
	case c.PodUID == "":
		return "container " + c.ID
	}
	return fmt.Sprintf("container %s of pod %s", c.ID, c.PodUID)
}
