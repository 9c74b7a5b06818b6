// Package broker is the agent's SPIFFE Broker Endpoint with the Broker API: programs that the operator lists get the SVIDs
// and bundles of workloads on this node that they name by process id or by Kubernetes object.
//
// It asks the same Source and the same Attestor as the Workload Endpoint. What a workload is it finds out itself: of a
// request it believes nothing but which workload is meant. It keeps no SVID and talks to no CA.
package broker
