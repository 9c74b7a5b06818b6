// Package proxy is the enforcement point for programs that cannot do it themselves: it speaks mutual TLS for a service that
// speaks none (inbound), and for a client that speaks none (outbound). It takes its X509-SVIDs, bundles, call policies and
// revocations from the agent's socket, as any workload does; signet proxy run and signet-proxy run it.
//
// Inbound, a connection or an HTTP request reaches the backend only after the call policies of the service allow it, and what
// was judged is what the backend gets: the request target byte for byte, and no header that was not there when it was judged
// but the proxy's own. Outbound, only servers with an expected SPIFFE ID are talked to. Without an agent, and with policies
// that are too old, everything is refused.
//
// Every path through it has TLS at one end, and crypto/tls keeps the keys to itself; so bytes go through the program once,
// and the kernel neither encrypts (kTLS) nor splices them.
package proxy
