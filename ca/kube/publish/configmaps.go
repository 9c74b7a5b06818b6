package publish

import (
	"context"
	"encoding/json"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// The ConfigMaps are written by server-side apply: it is the one way to make an object that can be allowed by its name, so
// that the CA may touch no other ConfigMap of the cluster.

// create makes the ConfigMap of a namespace where none was seen.
func (p *Publisher) create(ctx context.Context, ns string, c content) error {
	if have, err := p.c.Client.ConfigMaps(ns).Get(ctx, ConfigMap, metav1.GetOptions{}); err == nil { // the watch is behind
		p.see(have)
		return nil
	} else if !apierrors.IsNotFound(err) {
		return err
	}
	made, err := p.apply(ctx, p.configuration(ns, c), false)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	// Somebody may have made it in between, and then it is not ours: our part is taken out again.
	for _, m := range made.ManagedFields {
		if m.Manager != manager {
			if _, err := p.apply(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: ConfigMap, Namespace: ns, UID: made.UID}}, false); err != nil && !gone(err) {
				return err
			}
			return errTaken
		}
	}
	p.wrote(made)
	return nil
}

// configuration is what we say of a ConfigMap, and nothing that others may say of it.
func (p *Publisher) configuration(ns string, c content) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: ConfigMap, Namespace: ns, Labels: map[string]string{OwnerLabel: p.owner, "app.kubernetes.io/managed-by": "signet"}},
		Data: map[string]string{PEMKey: c.pem, JSONKey: c.json}}
}

func (p *Publisher) apply(ctx context.Context, cm *corev1.ConfigMap, force bool) (*corev1.ConfigMap, error) {
	cm.APIVersion, cm.Kind = "v1", "ConfigMap"
	text, err := json.Marshal(cm) // what is empty is left out
	if err != nil {
		return nil, err
	}
	return p.c.Client.ConfigMaps(cm.Namespace).Patch(ctx, cm.Name, types.ApplyYAMLPatchType, text, metav1.PatchOptions{FieldManager: manager, Force: &force})
}

// update brings a ConfigMap of ours to what it should be, whoever changed it.
func (p *Publisher) update(ctx context.Context, ns string, have held, c content) error {
	want := p.configuration(ns, c)
	want.UID, want.ResourceVersion = types.UID(have.uid), have.version
	made, err := p.apply(ctx, want, true)
	switch {
	case gone(err):
		return nil
	case apierrors.IsInvalid(err): // such as one that was made immutable, or has our keys among its binary data
		if err := p.remove(ctx, ns, have); err != nil {
			return err
		}
		return p.create(ctx, ns, c)
	case err != nil:
		return err
	}
	p.wrote(made)
	return nil
}

// remove takes a ConfigMap of ours away, if it is as it was seen.
func (p *Publisher) remove(ctx context.Context, ns string, have held) error {
	uid := types.UID(have.uid)
	err := p.c.Client.ConfigMaps(ns).Delete(ctx, ConfigMap, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid, ResourceVersion: &have.version}})
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err == nil {
		p.writes++
	}
	delete(p.maps, ns)
	return nil
}

// see notes a ConfigMap that is there.
func (p *Publisher) see(cm *corev1.ConfigMap) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.maps[cm.Namespace] = p.hold(cm)
	p.dirty[cm.Namespace] = struct{}{}
}

// A mapStore holds what the ConfigMaps of our name are like.
type mapStore struct {
	p      *Publisher
	listed map[string]struct{}
}

// Begin implements follow.Store.
func (s *mapStore) Begin() { s.listed = map[string]struct{}{} }

// Put implements follow.Store.
func (s *mapStore) Put(o metav1.Object) {
	cm, ok := o.(*corev1.ConfigMap)
	if !ok || cm.Name != ConfigMap {
		return
	}
	if s.listed != nil {
		s.listed[cm.Namespace] = struct{}{}
	}
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	now := s.p.hold(cm)
	if was, there := s.p.maps[cm.Namespace]; there && was == now {
		return
	}
	s.p.maps[cm.Namespace] = now
	s.p.mark(cm.Namespace)
}

// End implements follow.Store.
func (s *mapStore) End() {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	for ns := range s.p.maps {
		if _, there := s.listed[ns]; !there {
			delete(s.p.maps, ns)
			s.p.mark(ns)
		}
	}
	s.listed = nil
	s.p.signal()
}

// Delete implements follow.Store.
func (s *mapStore) Delete(o metav1.Object) {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	if have, there := s.p.maps[o.GetNamespace()]; o.GetName() != ConfigMap || !there || have.uid != string(o.GetUID()) {
		return // the one before the one that is there
	}
	delete(s.p.maps, o.GetNamespace())
	s.p.mark(o.GetNamespace())
}

// mark asks for a look at a namespace. p.mu is held.
func (p *Publisher) mark(ns string) {
	p.dirty[ns] = struct{}{}
	p.signal()
}

// A namespaceStore holds which namespaces ask for the bundle.
type namespaceStore struct {
	p      *Publisher
	listed map[string]struct{}
}

// Begin implements follow.Store.
func (s *namespaceStore) Begin() { s.listed = map[string]struct{}{} }

// Put implements follow.Store.
func (s *namespaceStore) Put(o metav1.Object) {
	name := o.GetName()
	// The API server filters; that it does is not left to it alone.
	asks := o.GetLabels()[Label] == "true"
	if s.listed != nil && asks {
		s.listed[name] = struct{}{}
	}
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	if !asks {
		if _, there := s.p.labelled[name]; there {
			delete(s.p.labelled, name)
			s.p.mark(name)
		}
		return
	}
	stays := o.GetDeletionTimestamp() == nil
	if was, there := s.p.labelled[name]; !there || was != stays {
		s.p.labelled[name] = stays
		s.p.mark(name)
	}
}

// End implements follow.Store.
func (s *namespaceStore) End() {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	for ns := range s.p.labelled {
		if _, there := s.listed[ns]; !there {
			delete(s.p.labelled, ns)
			s.p.mark(ns)
		}
	}
	for ns := range s.p.maps { // those that asked before this replica led
		s.p.mark(ns)
	}
	s.listed = nil
	s.p.signal()
}

// Delete implements follow.Store. A namespace that lost its label is deleted as far as this watch goes.
func (s *namespaceStore) Delete(o metav1.Object) {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	if _, there := s.p.labelled[o.GetName()]; there {
		delete(s.p.labelled, o.GetName())
		s.p.mark(o.GetName())
	}
}
