package spireresources

import (
	"strconv"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A place is how far objects of one kind were followed. It implements follow.Placed.
type place struct {
	moved func()

	mu               sync.Mutex
	newest, followed uint64
}

// saw notes how new an object is.
func (p *place) saw(o metav1.Object) {
	if n, err := strconv.ParseUint(o.GetResourceVersion(), 10, 64); err == nil {
		p.mu.Lock()
		p.newest = max(p.newest, n)
		p.mu.Unlock()
	}
}

// At implements follow.Placed.
func (p *place) At(version uint64) {
	p.mu.Lock()
	p.followed = version
	p.mu.Unlock()
	p.moved()
}

func (p *place) get() (newest, followed uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.newest, p.followed
}
