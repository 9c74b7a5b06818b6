// Package workloadapi is the agent's Workload Endpoint: a gRPC server on a Unix socket that hands each local process its
// own X509-SVIDs, JWT-SVIDs and bundles over the SPIFFE Workload API, and its call policies over signet.policy.v1.
//
// It knows who calls by the kernel's word (package peer) and what the caller is by an Attestor. What the caller may have
// it asks a Source, for which the agent's SVID cache stands. The endpoint itself keeps no SVID and talks to no CA.
package workloadapi
