// Package resources reads the custom resources of signet in a cluster of Kubernetes: Identities, CallPolicies, Federations and
// Revocations. Each is a document, as operators write them into files, and goes the same way into the registry. The package
// says at each resource what became of it. It knows only what an API server tells, and never opens anything while that is away.
package resources
