package ca

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
)

// knock opens a connection that says no more than HTTP/2 asks for, and tells whether the CA keeps it.
func (h *harness) knock(from string, certificates ...tls.Certificate) (net.Conn, error) {
	h.t.Helper()
	d := tls.Dialer{NetDialer: &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}, Config: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, Certificates: certificates}}
	conn, err := d.DialContext(h.t.Context(), "tcp", h.ca.Addr().String())
	if err != nil {
		return nil, err
	}
	h.t.Cleanup(func() { conn.Close() })
	const empty = "\x00\x00\x00\x04\x00\x00\x00\x00\x00" // SETTINGS
	if _, err := conn.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + empty)); err != nil {
		return nil, err
	}
	_, err = conn.Read(make([]byte, 1))
	return conn, err
}

// TestOpenConnectionsOfOneCaller: nobody can open connections until the CA has no file descriptor left for its log.
func TestOpenConnectionsOfOneCaller(t *testing.T) {
	h := start(t, config(t.TempDir()))
	const evil = "127.0.0.66"
	a := h.join()
	mustSync(t, a) // its connection
	mine := tls.Certificate{Certificate: a.Chain, PrivateKey: a.Key}
	for _, caller := range []struct {
		name         string
		certificates []tls.Certificate
		already      int
	}{{"a stranger", nil, 0}, {"an agent", []tls.Certificate{mine}, 1}} {
		var last net.Conn
		var err error
		for i := range maxConnsOfCaller - caller.already {
			if last, err = h.knock(evil, caller.certificates...); err != nil {
				t.Fatalf("connection %d of %s: %v", i+1, caller.name, err)
			}
		}
		if _, err := h.knock(evil, caller.certificates...); err == nil {
			t.Errorf("%s has more than %d connections", caller.name, maxConnsOfCaller)
		}
		last.Close()
		until(t, "a connection that ended is counted no more", func() bool { _, err := h.knock(evil, caller.certificates...); return err == nil })
	}
	if h.flooded("connections") == 0 {
		t.Error("the metric does not count them")
	}
	if _, err := h.knock("127.0.0.2"); err != nil {
		t.Errorf("a stranger at another address: %v", err)
	}
	mustSync(t, h.join())
}

func TestOpenConnectionsOfManyAddresses(t *testing.T) {
	var c crowd
	caller := func(n int) limitedCaller {
		return limitedCaller{address: netip.AddrFrom4([4]byte{10, 0, 0, byte(n / maxConnsOfCaller)})}
	}
	for n := range maxConnsOfStrangers {
		if err := c.enter(caller(n)); err != nil {
			t.Fatalf("connection %d: %v", n+1, err)
		}
	}
	if err := c.enter(caller(maxConnsOfStrangers)); !errors.Is(err, errStrangersConns) {
		t.Errorf("one more from another address: %v", err)
	}
	agent := limitedCaller{id: td.ID()}
	if err := c.enter(agent); err != nil {
		t.Errorf("strangers keep out who has a certificate: %v", err)
	}
	c.leave(agent)
	for n := range maxConnsOfStrangers {
		c.leave(caller(n))
	}
	if len(c.of) != 0 || c.strangers != 0 {
		t.Errorf("%d callers, %d strangers are counted when all have left", len(c.of), c.strangers)
	}
}

// TestCallsThatAreNeverFinishedEnd: a call of which the message never comes is not held for as long as its caller likes.
func TestCallsThatAreNeverFinishedEnd(t *testing.T) {
	h := startWith(t, config(t.TempDir()), func(ca *CA) { ca.guard.StrangerCall = 100 * time.Millisecond })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	conn := h.dial(nil, nil)
	for _, method := range []string{bundlev1.Bundle_GetBundle_FullMethodName, entryv1.Entry_ListEntries_FullMethodName, agentv1.Agent_RenewAgent_FullMethodName} {
		s, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.RecvMsg(&bundlev1.GetBundleRequest{}); code(err) != codes.DeadlineExceeded || ctx.Err() != nil {
			t.Errorf("%s: %v; want DeadlineExceeded, by the CA", method, err)
		}
	}
}

// TestMetadataIsBounded: a stranger cannot have the CA hold megabytes of metadata for each call.
func TestMetadataIsBounded(t *testing.T) {
	h := start(t, config(t.TempDir()))
	api := bundlev1.NewBundleClient(h.dial(nil, nil))
	get := func(n int) error {
		_, err := api.GetBundle(metadata.AppendToOutgoingContext(t.Context(), "x", strings.Repeat("x", n)), &bundlev1.GetBundleRequest{})
		return err
	}
	if err := get(8 << 10); err != nil {
		t.Errorf("8 KiB: %v", err)
	}
	if err := get(128 << 10); err == nil {
		t.Error("128 KiB of metadata are taken")
	}
}
