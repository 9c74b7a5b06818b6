package ca

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-id/signet/ca/kube/events"
	"github.com/signet-id/signet/ca/kube/pods"
	"github.com/signet-id/signet/ca/kube/spireresources"
	"github.com/signet-id/signet/ca/kube/watch"
)

// KubernetesPods says that the pods of a cluster get their identities by templated Identities. The CA follows its pods,
// nodes and namespaces.
type KubernetesPods struct{}

// watchPods adds what watches the pods of a cluster.
func (ca *CA) watchPods(c KubernetesCluster, k *kubeCluster) {
	if c.Pods == nil {
		return
	}
	log := ca.log.With("cluster", k.client.Cluster)
	refused := func(r pods.Refusal) { k.events.Record(podRefused(r)) }
	ca.podRefused = append(ca.podRefused, func(r pods.Refusal) {
		if r.Pod.Cluster == k.client.Cluster {
			refused(r)
		}
	})
	cluster := k.client.Cluster
	k.watcher = watch.New(watch.Config{Client: k.client, Expander: ca.pods, Refused: refused, KeepObjects: keepObjects(c), Log: log,
		Telling:  func(p map[string]uint64) { ca.reg.Telling(cluster, p) },
		Followed: func(p map[string]uint64) { ca.reg.Followed(cluster, p) }})
	k.parts = append(k.parts, k.watcher.Run, func(ctx context.Context) error { return ca.checkClaims(ctx, k) })
	k.ails = append(k.ails, func() []string {
		if p := k.watcher.Problem(); p != "" {
			return []string{p}
		}
		return nil
	})
}

// keepObjects tells whether something reads pods and nodes beyond what rules look at.
func keepObjects(c KubernetesCluster) bool {
	return c.PodCertificates != nil || c.SPIREResources != nil && c.SPIREResources.reads(spireresources.KindClusterSPIFFEID)
}

// podRefused is the Event that says why a pod does not get what a rule would give it.
func podRefused(r pods.Refusal) events.Event {
	message := "no identity: " + r.Reason
	if r.Rule != "" {
		message = "no identity by " + r.Rule + ": " + r.Reason
	}
	return events.Event{Object: events.Pod(r.Pod.Namespace, r.Pod.Name, r.Pod.UID),
		Reason: "IdentityRefused", Message: message}
}

// clusterProblems says in lines what is wrong with the clusters. None of it keeps the CA from serving.
func (ca *CA) clusterProblems() (out []string) {
	for _, k := range ca.clusters {
		out = append(out, k.problems()...)
	}
	return out
}

func (k *kubeCluster) problems() (out []string) {
	for _, f := range k.ails {
		out = append(out, f()...)
	}
	return out
}

// clusterMetrics are numbers of each cluster, by its name in the configuration.
type clusterMetrics struct{ ca *CA }

var clusterLabel = []string{"cluster"}

var (
	descSynced      = prometheus.NewDesc("signet_ca_kubernetes_synced", "1 if all pods of the cluster are known.", clusterLabel, nil)
	descFailing     = prometheus.NewDesc("signet_ca_kubernetes_failing", "1 if the cluster's API server does not answer as it should at the moment.", clusterLabel, nil)
	descProblems    = prometheus.NewDesc("signet_ca_kubernetes_problems", "Things that are wrong with the cluster, as /ready says them.", clusterLabel, nil)
	descObjects     = prometheus.NewDesc("signet_ca_kubernetes_objects", "Objects of the cluster that are known, by kind (pods, nodes, namespaces).", []string{"cluster", "kind"}, nil)
	descUnplaced    = prometheus.NewDesc("signet_ca_kubernetes_unplaced_pods", "Pods whose node or namespace is not known, or that were put on a former node of that name.", clusterLabel, nil)
	descTooLarge    = prometheus.NewDesc("signet_ca_kubernetes_left_out_objects", "Objects that are too large or too many, and get no identity.", clusterLabel, nil)
	descRequests    = prometheus.NewDesc("signet_ca_kubernetes_requests_total", "Requests to the cluster's API server by kind (read, watch, write).", []string{"cluster", "kind"}, nil)
	descFailed      = prometheus.NewDesc("signet_ca_kubernetes_requests_failed_total", "Requests to the cluster's API server without an answer, or with a status of 500 or above.", clusterLabel, nil)
	descEvents      = prometheus.NewDesc("signet_ca_kubernetes_events_total", "Events by outcome (written, dropped).", []string{"cluster", "outcome"}, nil)
	descBundles     = prometheus.NewDesc("signet_ca_kubernetes_bundle_namespaces", "Namespaces that are to have the trust bundle. 0 on a replica that does not lead.", clusterLabel, nil)
	descBundleFails = prometheus.NewDesc("signet_ca_kubernetes_bundle_failing", "Namespaces whose trust bundle is not as it should be, by reason (foreign: somebody else's ConfigMap is there; error).", []string{"cluster", "reason"}, nil)
	descInjected    = prometheus.NewDesc("signet_ca_kubernetes_injections_total", "Pods that asked for the proxy at the admission webhook, by outcome (injected, refused: their annotations cannot be).", []string{"cluster", "outcome"}, nil)
	descBundleWrite = prometheus.NewDesc("signet_ca_kubernetes_bundle_writes_total", "Writes of the trust bundle.", clusterLabel, nil)
)

// Describe implements prometheus.Collector. What there is depends on the configuration, so nothing is said.
func (m clusterMetrics) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (m clusterMetrics) Collect(out chan<- prometheus.Metric) {
	one := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	for _, k := range m.ca.clusters {
		gauge := func(d *prometheus.Desc, v float64, labels ...string) {
			out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, append([]string{k.client.Cluster}, labels...)...)
		}
		counter := func(d *prometheus.Desc, v uint64, labels ...string) {
			out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), append([]string{k.client.Cluster}, labels...)...)
		}
		r := k.client.Requests()
		counter(descRequests, r.Reads, "read")
		counter(descRequests, r.Watches, "watch")
		counter(descRequests, r.Writes, "write")
		counter(descFailed, r.Failed)
		gauge(descProblems, float64(len(k.problems())))
		e := k.events.Stats()
		counter(descEvents, e.Written, "written")
		counter(descEvents, e.Dropped, "dropped")
		if k.watcher != nil {
			s := k.watcher.Status()
			gauge(descSynced, one(s.Synced))
			gauge(descFailing, one(s.Err != nil))
			gauge(descObjects, float64(s.Pods), "pods")
			gauge(descObjects, float64(s.Nodes), "nodes")
			gauge(descObjects, float64(s.Namespaces), "namespaces")
			gauge(descUnplaced, float64(s.Untold))
			gauge(descTooLarge, float64(s.Left))
		}
		if k.publisher != nil {
			s := k.publisher.Status()
			gauge(descBundles, float64(s.Namespaces))
			gauge(descBundleFails, float64(s.Foreign), "foreign")
			gauge(descBundleFails, float64(s.Failing), "error")
			counter(descBundleWrite, s.Writes)
		}
		if k.injector != nil {
			s := k.injector.Stats()
			counter(descInjected, s.Injected, "injected")
			counter(descInjected, s.Refused, "refused")
		}
	}
}
