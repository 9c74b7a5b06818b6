package ca

import "fmt"

// Ready is nil: a CA serves from the beginning of Run on.
func (ca *CA) Ready() <-chan struct{} { return nil }

// Alive takes the locks that a call needs, and so returns only if none of them is stuck. A disk that is full or slow is no
// reason to start the CA anew.
func (ca *CA) Alive() error {
	ca.reg.Counts()
	ca.node.Status()
	return nil
}

// Summary is the CA's state in a line.
func (ca *CA) Summary() string {
	if err := ca.Health(); err != nil {
		return "not ready: " + err.Error()
	}
	entries, agents, policies := ca.reg.Counts()
	summary := fmt.Sprintf("ready; %d entries, %d agents, %d call policies, %d agents follow", entries, agents, policies, len(ca.node.Status()))
	for _, p := range ca.clusterProblems() {
		summary += "; " + p
	}
	return summary
}
