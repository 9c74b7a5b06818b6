package k8s

import (
	"context"
	"fmt"

	"github.com/signet-id/signet/spiffe"
)

// A Reference names a pod: by namespace and name, by uid, or by both, which must then agree.
type Reference struct{ Namespace, Name, UID string }

// A Pod is one that runs on this node.
type Pod struct {
	Namespace, Name, UID string

	// Selectors are those that all processes of the pod have. Those of single containers are not among them.
	Selectors []spiffe.Selector
}

// Pod returns the pod that a reference names, as the kubelet shows it in a list that began after this call, so that a pod that
// was deleted and made anew under its name is seen. Once somebody depends on the pod, they keep its UID and ask by it
// again: it never names another pod.
//
// What it verifies: that the kubelet of this node has a pod with this namespace and name, this uid, or both, and that the pod
// has not ended. It does not look at processes. Of several pods with one name, as while one is replaced, that one counts
// which is not being deleted.
//
// Errors: ErrNotFound; ErrMismatch if the pod of that name has another uid; and those of asking the kubelet, when nothing is
// known. Selectors beside an error, which is then about a namespace's labels, count.
func (m *Method) Pod(ctx context.Context, ref Reference) (Pod, error) {
	if ref.UID == "" && (ref.Namespace == "" || ref.Name == "") || (ref.Namespace == "") != (ref.Name == "") {
		return Pod{}, fmt.Errorf("a pod is named by namespace and name, by uid, or by both: %w", ErrNotFound)
	}
	l, err := m.pods.since(ctx, m.now())
	if err != nil {
		return Pod{}, fmt.Errorf("%s: %w", ref, err)
	}
	p, err := l.pod(ref)
	if err != nil {
		return Pod{}, err
	}
	labels, err := m.namespaceSelectors(ctx, p.namespace)
	return Pod{Namespace: p.namespace, Name: p.name, UID: p.uid, Selectors: append(podSelectors(p), labels...)}, err
}

func (r Reference) String() string {
	switch {
	case r.Name == "":
		return fmt.Sprintf("pod with uid %.100q", r.UID)
	case r.UID == "":
		return fmt.Sprintf("pod %.100q in namespace %.100q", r.Name, r.Namespace)
	}
	return fmt.Sprintf("pod %.100q in namespace %.100q with uid %.100q", r.Name, r.Namespace, r.UID)
}

// pod looks a reference up.
func (l *podList) pod(r Reference) (*pod, error) {
	var found *pod
	if r.UID != "" {
		found = l.byUID[r.UID]
	} else {
		for _, p := range l.byName[r.Namespace+"/"+r.Name] {
			if !p.ended && (found == nil || found.deleted && !p.deleted) {
				found = p
			} else if !p.ended && found.deleted == p.deleted {
				return nil, fmt.Errorf("%s: the kubelet has two of them, with the uids %s and %s: name one by its uid", r, found.uid, p.uid)
			}
		}
	}
	switch {
	case r.UID != "" && r.Name != "" && (found == nil || found.namespace != r.Namespace || found.name != r.Name) && len(l.byName[r.Namespace+"/"+r.Name]) > 0:
		return nil, fmt.Errorf("%s: %w: the one of that name has the uid %s", r, ErrMismatch, l.byName[r.Namespace+"/"+r.Name][0].uid)
	case r.UID != "" && r.Name != "" && found != nil && (found.namespace != r.Namespace || found.name != r.Name):
		return nil, fmt.Errorf("%s: %w: the one with that uid is %s in namespace %s", r, ErrMismatch, found.name, found.namespace)
	case found == nil:
		return nil, fmt.Errorf("%s: %w", r, ErrNotFound)
	case found.ended:
		return nil, fmt.Errorf("%s: %w: it has ended", r, ErrNotFound)
	case found.excess:
		return nil, fmt.Errorf("%s: %w: %w", r, ErrNotFound, errExcess)
	}
	return found, nil
}
