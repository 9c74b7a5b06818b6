package inject

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
)

// stranger connects from an address of its own.
func (w *webhook) stranger(t *testing.T) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	c, err := d.DialContext(t.Context(), "tcp4", strings.Replace(w.server.Addr().String(), "[::]", "127.0.0.1", 1))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestStrangersDoNotStandBeforeAPIServers: whoever sends reviews slowly has some of the slots, and not all of them.
func TestStrangersDoNotStandBeforeAPIServers(t *testing.T) {
	w := start(t)
	good := review(t, "shop", podWith(map[string]string{annotationInbound: "8443=8080"}))
	post := func() error {
		status, _, err := w.post(w.caBundle(), good, "application/json")
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("status %d", status)
		}
		return err
	}
	eventually(t, "answer", func() bool { return post() == nil })

	ctx, over := context.WithCancel(t.Context())
	defer over()
	reading, ended := make(chan struct{}, 2*maxReviews), atomic.Int64{}
	for range 2 * maxReviews {
		// The server says that it reads the body once the review has its slot.
		c := tls.Client(w.stranger(t), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}})
		if _, err := fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: 1000\r\n\r\n", Path); err != nil {
			t.Fatal(err)
		}
		go func() {
			r := bufio.NewReader(c)
			if line, err := r.ReadString('\n'); err == nil && strings.Contains(line, " 100 ") {
				reading <- struct{}{}
			}
			_, _ = io.Copy(io.Discard, r)
			if ctx.Err() == nil {
				ended.Add(1)
			}
		}()
	}
	for range reviewsPerAddress {
		<-reading
	}
	eventually(t, "strangers who wait", func() bool {
		turns := w.server.reviews
		turns.mu.Lock()
		defer turns.mu.Unlock()
		own := turns.byAddress[addressOf("127.0.0.2:1")]
		return own != nil && own.users == 2*maxReviews
	})
	if err := post(); err != nil {
		t.Errorf("an API server meanwhile: %v", err)
	}
	if n := ended.Load(); n > maxReviews { // so many had all slots; some end by bodyTimeout
		t.Errorf("an API server waited until %d strangers were done", n)
	}
	over()
}

// TestConnectionsOfOneAddressAreBounded, and it may connect again once it has fewer.
func TestConnectionsOfOneAddressAreBounded(t *testing.T) {
	w := start(t)
	shake := func() (*tls.Conn, error) {
		c := tls.Client(w.stranger(t), &tls.Config{InsecureSkipVerify: true})
		return c, c.HandshakeContext(t.Context())
	}
	var first *tls.Conn
	eventually(t, "connection", func() bool {
		var err error
		first, err = shake()
		return err == nil
	})
	for n := 1; n < connectionsPerAddress; n++ {
		if _, err := shake(); err != nil {
			t.Fatalf("connection %d: %v", n, err)
		}
	}
	if _, err := shake(); err == nil {
		t.Errorf("one address has more than %d connections", connectionsPerAddress)
	}
	eventually(t, "the API server's answer", func() bool {
		status, _, err := w.post(w.caBundle(), review(t, "shop", podWith(nil)), "application/json")
		return err == nil && status == http.StatusOK
	})
	first.Close()
	eventually(t, "connection once there is room", func() bool { _, err := shake(); return err == nil })
}
