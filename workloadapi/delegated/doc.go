// Package delegated is SPIRE's Delegated Identity API: programs on this node that the operator lists get the SVIDs of
// workloads that they name by process id or by selectors, and the bundles that the node holds.
//
// The agent registers it on its admin socket. A delegate is attested as any other workload is, and one of its own SPIFFE
// IDs must be listed, as long as its calls last. Selectors that a delegate gives are taken as they are: that is what the
// API is for, and why a delegate is trusted with every identity of the node.
package delegated
