// Package spiffe reads and checks SPIFFE IDs, SVIDs, bundles and endpoint addresses as strictly as the SPIFFE standards
// ask. Everything in signet that meets such a thing from outside passes it through here first: CA, agent, Workload API,
// enforcement points and command line. It never does I/O, holds no state and starts no goroutine; its values are those
// of go-spiffe, whose own parsers are laxer than the standards in the places that this package is about.
//
// Every refusal carries the row of the conformance checklist that was broken (see [RowError] and [RowOf]), so that a
// log line, a test and the standard can be matched.
//
// All functions may be called concurrently.
package spiffe
