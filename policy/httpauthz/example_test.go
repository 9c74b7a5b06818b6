package httpauthz_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/http"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-id/signet/policy/httpauthz"
	"github.com/signet-id/signet/policy/source"
)

// A server whose identity, bundles and policies all come from the agent.
func Example() {
	ctx := context.Background()
	svids, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		log.Fatal(err)
	}
	policies, err := source.New(ctx, source.Options{})
	if err != nil {
		log.Fatal(err)
	}
	authorizer, err := httpauthz.New(httpauthz.Config{Policies: policies, Service: policies.ServiceID()})
	if err != nil {
		log.Fatal(err)
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller, _ := httpauthz.PeerID(r.Context())
		fmt.Fprintf(w, "hello, %s\n", caller)
	})
	listener, err := net.Listen("tcp", ":8443")
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(authorizer.Server(handler, svids, svids).ServeTLS(listener, "", ""))
}
