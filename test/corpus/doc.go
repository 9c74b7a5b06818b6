// Package corpus holds decisions, and proves that every enforcement point makes each of them alike: the pure package, the
// Go library over TLS, HTTP/1.1, HTTP/2 and gRPC, Envoy's ext_authz on the agent's socket, and signet proxy. The tables in
// testdata are PolicyTest documents, so `signet policy test` runs them as well.
//
// Requests are written to real connections byte for byte, as no client library would. A point agrees if it lets through
// exactly what the table allows, and if what is let through arrives as it was sent.
package corpus
