// Package followtest lets tests follow the objects of client-go's fake clientset, whose lists have no version to watch from.
package followtest

import "k8s.io/apimachinery/pkg/watch"

// Version is what a list of a fake clientset is to be given as its version.
const Version = "1"

// Watch returns a watch of a fake clientset as one that began at Version: what is there when it begins comes first. now is
// taken after w began, so that nothing is missed between the two.
func Watch(w watch.Interface, now []watch.Event) watch.Interface {
	out := make(chan watch.Event)
	p := watch.NewProxyWatcher(out)
	go func() {
		defer close(out)
		defer w.Stop()
		for _, e := range now {
			select {
			case out <- e:
			case <-p.StopChan():
				return
			}
		}
		for {
			select {
			case e, ok := <-w.ResultChan():
				if !ok {
					return
				}
				select {
				case out <- e:
				case <-p.StopChan():
					return
				}
			case <-p.StopChan():
				return
			}
		}
	}()
	return p
}
