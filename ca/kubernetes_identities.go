package ca

import (
	"context"

	"github.com/signet-id/signet/ca/kube/pods"
)

// openPods makes what gives the pods of the configured clusters their identities. A cluster whose pods are watched
// counts as unknown, by Synced, before the CA serves: until all its pods were told, agents keep what they hold for them.
func (ca *CA) openPods() {
	if len(ca.c.Kubernetes.Clusters) == 0 {
		return
	}
	ca.pods = pods.New(pods.Config{Registry: ca.reg, Refused: ca.notePodRefused, Log: ca.log, Now: ca.c.Now})
}

// notePodRefused tells all who asked why a pod does not get what a rule would give it.
func (ca *CA) notePodRefused(r pods.Refusal) {
	ca.log.Debug("a pod gets no identity by a rule", "rule", r.Rule, "cluster", r.Pod.Cluster, "namespace", r.Pod.Namespace, "pod", r.Pod.Name, "reason", r.Reason)
	for _, tell := range ca.podRefused {
		tell(r)
	}
}

// runPods works until ctx ends.
func (ca *CA) runPods(ctx context.Context) error {
	if ca.pods == nil {
		return nil
	}
	return ca.pods.Run(ctx)
}
