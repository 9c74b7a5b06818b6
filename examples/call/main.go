// Command call is a client of the documents-service: call SERVICE-ID URL. It shows its X509-SVID, expects the service's,
// prints the answer, and fails if the service refuses it.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 3 {
		log.Fatal("usage: call SERVICE-ID URL")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := call(ctx, os.Args[1], os.Args[2]); err != nil {
		log.Fatal(err)
	}
}

func call(ctx context.Context, service, url string) error {
	id, err := spiffeid.FromString(service)
	if err != nil {
		return err
	}
	identity, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return err
	}
	defer identity.Close()
	client := &http.Client{Transport: &http.Transport{
		TLSClientConfig: tlsconfig.MTLSClientConfig(identity, identity, tlsconfig.AuthorizeID(id)),
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 1<<20))
	if err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("refused: %s: %s", response.Status, body)
	}
	_, err = os.Stdout.Write(body)
	return err
}
