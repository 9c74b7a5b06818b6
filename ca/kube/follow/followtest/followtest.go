// Package followtest lets tests follow the objects of client-go's fake clientset, whose lists have no version to watch from.
package followtest

import (
	"context"
	"sync"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

// version is what a list of a fake clientset is to be given as its version.
const version = "1"

// An Object is one that a cluster has.
type Object interface {
	metav1.Object
	runtime.Object
}

// A Place remembers what was listed last, which is where a watch goes on.
type Place struct {
	mu     sync.Mutex
	listed map[string]Object
}

// A Client is as much of one of a fake clientset as is followed; L is its kind of lists.
type Client[L runtime.Object] interface {
	List(ctx context.Context, o metav1.ListOptions) (L, error)
	Watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error)
}

// List lists by c, so that a watch can go on from there.
func List[L runtime.Object](ctx context.Context, p *Place, c Client[L], o metav1.ListOptions) (L, error) {
	list, objects, err := all(ctx, c, o)
	p.note(objects)
	return list, err
}

// Watch watches by c from where the last List ended.
func Watch[L runtime.Object](ctx context.Context, p *Place, c Client[L], o metav1.ListOptions) (watch.Interface, error) {
	w, err := c.Watch(ctx, o)
	if err != nil {
		return nil, err
	}
	_, now, err := all(ctx, c, metav1.ListOptions{})
	if err != nil {
		w.Stop()
		return nil, err
	}
	return p.watch(w, now), nil
}

func all[L runtime.Object](ctx context.Context, c Client[L], o metav1.ListOptions) (list L, objects []Object, err error) {
	if list, err = c.List(ctx, o); err != nil {
		return list, nil, err
	}
	m, err := meta.ListAccessor(list)
	if err != nil {
		return list, nil, err
	}
	m.SetResourceVersion(version)
	err = meta.EachListItem(list, func(o runtime.Object) error {
		objects = append(objects, o.(Object))
		return nil
	})
	return list, objects, err
}

// note remembers the objects of a list.
func (p *Place) note(objects []Object) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.listed = map[string]Object{}
	for _, o := range objects {
		p.listed[key(o)] = o
	}
}

// watch returns a watch of a fake clientset as one that began where the list ended: what was made or changed since comes first. now is taken
// after w began, so that nothing is missed between the two; that w tells once more how an object of now's was made is left out. So nothing
// comes twice and nothing goes back, as it is with an API server. What was deleted between list and watch is not told.
func (p *Place) watch(w watch.Interface, now []Object) watch.Interface {
	out := make(chan watch.Event)
	proxy := watch.NewProxyWatcher(out)
	known := map[string]bool{}
	var first []watch.Event
	p.mu.Lock()
	for _, o := range now {
		known[key(o)] = true
		switch was, ok := p.listed[key(o)]; {
		case !ok:
			first = append(first, watch.Event{Type: watch.Added, Object: o})
		case !equality.Semantic.DeepEqual(was, o):
			first = append(first, watch.Event{Type: watch.Modified, Object: o})
		}
	}
	p.mu.Unlock()
	go func() {
		defer close(out)
		defer w.Stop()
		send := func(e watch.Event) bool {
			select {
			case out <- e:
				return true
			case <-proxy.StopChan():
				return false
			}
		}
		for _, e := range first {
			if !send(e) {
				return
			}
		}
		for {
			select {
			case e, ok := <-w.ResultChan():
				if !ok {
					return
				}
				if o, ok := e.Object.(Object); ok {
					again := e.Type == watch.Added && known[key(o)]
					delete(known, key(o))
					if again {
						continue
					}
				}
				if !send(e) {
					return
				}
			case <-proxy.StopChan():
				return
			}
		}
	}()
	return proxy
}

func key(o Object) string { return o.GetNamespace() + "/" + o.GetName() }
