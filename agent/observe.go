package agent

import (
	"fmt"
	"os"
)

// The names under which sockets are passed in (FileDescriptorName= in a unit).
const (
	// SocketWorkload is the socket at socket_path.
	SocketWorkload = "workload"
)

// Alive takes each lock that a call of a workload needs, and so returns only if none of them is stuck.
func (a *Agent) Alive() error {
	a.Status()
	a.node.mu.Lock()
	defer a.node.mu.Unlock()
	return nil
}

// Summary is the agent's state in a line.
func (a *Agent) Summary() string {
	s := a.Status()
	if why := s.notReady(); why != "" {
		return "not ready: " + why
	}
	return fmt.Sprintf("%s; %d X509-SVIDs, %d streams", s.State, s.X509SVIDs, s.Streams)
}

// Sockets are the listening sockets, by their names, for whoever keeps them over a restart. The caller closes them.
func (a *Agent) Sockets() (map[string]*os.File, error) {
	listening, lock, err := a.endpoint.Files()
	if err != nil {
		return nil, err
	}
	if lock != nil {
		lock.Close() // the next agent takes it anew, once this one has ended
	}
	return map[string]*os.File{SocketWorkload: listening}, nil
}
