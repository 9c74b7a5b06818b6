package brokerclient_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-id/signet/workloadapi/broker/brokerclient"
)

// A broker gets its own SVID over the Workload API, and then keeps the files of one workload until that ends.
func Example() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	own, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix:///run/signet/agent.sock")))
	if err != nil {
		fmt.Println("no agent here")
		return
	}
	defer own.Close()
	client, err := brokerclient.New(brokerclient.Config{
		Addr: "unix:///run/signet-broker/broker.sock", SVID: own, Bundles: own,
		Server: brokerclient.ServerID(spiffeid.RequireFromString("spiffe://example.org/spire/agent/join_token/n1")),
	})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	err = client.FollowX509SVIDs(ctx, brokerclient.Process(4711), brokerclient.Dir("/run/node-proxy/4711"))
	if errors.Is(err, brokerclient.ErrGone) {
		fmt.Println("the workload has ended, and its files are gone")
	}
	// Output: no agent here
}
