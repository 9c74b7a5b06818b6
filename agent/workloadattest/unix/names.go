package unix

import (
	"sync"
	"time"
)

const (
	// nameFor is how long a name is remembered. Looking one up reads a file, or asks a directory in the network.
	nameFor = 10 * time.Second
	// maxNames bounds those that are remembered.
	maxNames = 1024
)

// names remembers the names of ids for a while. That an id has no name is not remembered: a user that is made now can use it
// at once.
type names struct {
	lookUp func(id string) (string, error)

	mu    sync.Mutex
	known map[string]named
}

type named struct {
	name string
	at   time.Time // on the steady clock
}

func newNames(lookUp func(id string) (string, error)) *names {
	return &names{lookUp: lookUp, known: make(map[string]named)}
}

// of returns the name of an id. The error is lookUp's.
func (n *names) of(id string) (string, error) {
	n.mu.Lock()
	k, ok := n.known[id]
	n.mu.Unlock()
	if ok && time.Since(k.at) < nameFor {
		return k.name, nil
	}
	name, err := n.lookUp(id)
	if err != nil || name == "" {
		return "", err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.known) >= maxNames {
		clear(n.known)
	}
	n.known[id] = named{name: name, at: time.Now()}
	return name, nil
}
