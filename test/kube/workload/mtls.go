package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

const (
	callTimeout = 5 * time.Second
	// between is the pause after a call.
	between = 50 * time.Millisecond
)

func serve(ctx context.Context, address string) error {
	source, err := newSource(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	self, err := source.GetX509SVID()
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	server := &http.Server{
		TLSConfig:         tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeMemberOf(self.ID.TrustDomain())),
		ReadHeaderTimeout: callTimeout,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			id, err := x509svid.IDFromCert(r.TLS.PeerCertificates[0])
			if err != nil {
				http.Error(w, "a peer without a SPIFFE ID", http.StatusForbidden)
				return
			}
			fmt.Fprintln(w, id)
		}),
	}
	fmt.Println("serving", self.ID)
	done := make(chan error, 1)
	go func() { done <- server.ServeTLS(l, "", "") }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		err := server.Close()
		<-done
		return err
	}
}

// A tally counts what was tried.
type tally struct {
	mu            sync.Mutex
	tried, failed int
}

// add counts one try. That the program ends is no failure.
func (t *tally) add(ctx context.Context, what string, err error) {
	if err != nil && ctx.Err() != nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.tried++
	if err != nil {
		t.failed++
		fmt.Printf("failed: %s: %v\n", what, err)
	}
}

func (t *tally) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return fmt.Sprintf("%d failed: %d", t.tried, t.failed)
}

func call(ctx context.Context, address string) error {
	source, err := newSource(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	self, err := source.GetX509SVID()
	if err != nil {
		return err
	}
	config := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeMemberOf(self.ID.TrustDomain()))
	kept := &http.Client{Timeout: callTimeout, Transport: &http.Transport{TLSClientConfig: config}}
	anew := &http.Client{Timeout: callTimeout, Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}
	var calls, fetches tally
	var wg sync.WaitGroup
	again := func(t *tally, what string, try func(context.Context) error) {
		wg.Go(func() {
			for ctx.Err() == nil {
				trying, cancel := context.WithTimeout(ctx, callTimeout)
				t.add(ctx, what, try(trying)) // one that takes too long has failed
				cancel()
				wait(ctx, between)
			}
		})
	}
	again(&calls, "over a kept connection", func(ctx context.Context) error { return get(ctx, kept, address) })
	again(&calls, "over a new connection", func(ctx context.Context) error { return get(ctx, anew, address) })
	if _, files := source.(folder); !files {
		again(&fetches, "fetch", fetch)
	}
	for wait(ctx, time.Second) {
		fmt.Printf("calls: %v fetches: %v\n", &calls, &fetches)
	}
	wg.Wait()
	return nil
}

func get(ctx context.Context, client *http.Client, address string) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+address, nil)
	if err != nil {
		return err
	}
	answer, err := client.Do(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(answer.Body, 1<<20)); err != nil {
		return err
	}
	if answer.StatusCode != http.StatusOK {
		return errors.New(answer.Status)
	}
	return nil
}

// fetch is the first call of a program that has just started.
func fetch(ctx context.Context) error {
	client, err := workloadapi.New(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	_, err = client.FetchX509SVID(ctx)
	return err
}
