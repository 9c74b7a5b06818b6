// Package brokerclient is for authors of brokers: programs that get SVIDs and bundles of workloads over the SPIFFE Broker
// API, from signet's agent or any other implementation, and hand them on or use them on the workloads' behalf.
//
// It keeps what the standard asks of clients. The server's SPIFFE ID is checked, not only its trust domain. Each message
// replaces all that an earlier one said. What is held for one workload is dropped when that workload is gone or not
// entitled any more, and nothing of the others is touched. Calls are repeated where that may help, with growing pauses,
// and not where it cannot.
//
// Where the data goes a Keeper says: Memory holds it for this program's own handshakes, Dir writes files.
package brokerclient
