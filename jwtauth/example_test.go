package jwtauth_test

import (
	"context"
	"fmt"
	"net/http"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/signet-id/signet/jwtauth"
)

// A client that shows each callee a token for that callee, and others none.
func ExampleNewTransport() {
	ctx := context.Background()
	x509, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer x509.Close()
	client, err := workloadapi.New(ctx)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer client.Close()

	tokens, err := jwtauth.New(jwtauth.Config{Fetcher: client})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer tokens.Close()
	transport, err := jwtauth.NewTransport(jwtauth.TransportConfig{
		Cache:     tokens,
		Audiences: jwtauth.Audiences{"documents.internal": "documents"},
		Base:      &http.Transport{TLSClientConfig: tlsconfig.MTLSClientConfig(x509, x509, tlsconfig.AuthorizeID(spiffeid.RequireFromString("spiffe://example.org/documents-service")))},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	resp, err := (&http.Client{Transport: transport}).Get("https://documents.internal/v1/documents/7")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer resp.Body.Close()
}

// A gRPC client, likewise.
func ExampleNewPerRPC() {
	var tokens *jwtauth.Cache // see NewTransport
	var x509 *workloadapi.X509Source

	perRPC, err := jwtauth.NewPerRPC(jwtauth.PerRPCConfig{Cache: tokens, Audiences: jwtauth.Audiences{"documents.internal:8443": "documents"}})
	if err != nil {
		fmt.Println(err)
		return
	}
	conn, err := grpc.NewClient("documents.internal:8443",
		grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.MTLSClientConfig(x509, x509, tlsconfig.AuthorizeAny()))),
		grpc.WithPerRPCCredentials(perRPC))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	// Output: jwtauth: config field Cache is nil
}

// A service that takes tokens of whoever is connected.
func ExampleVerifier_Middleware() {
	verifier, err := jwtauth.NewVerifier(jwtauth.VerifierConfig{Audience: []string{"documents"}})
	if err != nil {
		fmt.Println(err) // the sources are missing: a workloadapi.JWTSource, and a workloadapi.X509Source
		return
	}
	http.Handle("/", verifier.Middleware(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if svid, ok := jwtauth.SVIDFrom(r.Context()); ok {
			fmt.Fprintln(w, "hello", svid.ID)
		}
	})))
	// Output: jwtauth: config field JWTBundles is nil; use a workloadapi.JWTSource
}
