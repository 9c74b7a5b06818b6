// Command documents-service is a whole HTTPS service that knows itself and its callers by SPIFFE ID: its identity comes
// from the Workload API, and who may call what comes from call policies. Both are kept up to date by the agent.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-id/signet/policy/httpauthz"
	"github.com/signet-id/signet/policy/source"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:9443", "address to serve")
	flag.Parse()
	log.Fatal(run(context.Background(), *listen))
}

func run(ctx context.Context, listen string) error {
	identity, err := workloadapi.NewX509Source(ctx) // asks the agent at SPIFFE_ENDPOINT_SOCKET
	if err != nil {
		return err
	}
	defer identity.Close()
	policies, err := source.New(ctx, source.Options{}) // asks the same agent
	if err != nil {
		return err
	}
	defer policies.Close()
	authorizer, err := httpauthz.New(httpauthz.Config{Policies: policies, Service: policies.ServiceID()})
	if err != nil {
		return err
	}

	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/documents/{id}", func(w http.ResponseWriter, r *http.Request) {
		caller, _ := httpauthz.PeerID(r.Context())
		fmt.Fprintf(w, "document %s for %s\n", r.PathValue("id"), caller)
	})

	listener, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	log.Printf("%s serves %s", policies.ServiceID(), listener.Addr())
	return authorizer.Server(mux, identity, identity).ServeTLS(listener, "", "")
}
