package proxy

import (
	"crypto/tls"
	"io"
	"testing"
)

// BenchmarkConnect is a connection from its beginning to its end, caller and backend included; for profiles of what a handshake takes.
func BenchmarkConnect(b *testing.B) {
	w := newWorld(b, allowCaller)
	p := w.start(b, inboundConfig("tcp", listen(b, "tcp", "127.0.0.1:0", echo).Addr().String()))
	config := w.caller(b, "/caller")
	for b.Loop() {
		conn, err := tls.Dial("tcp", p.in(), config)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := conn.Write([]byte("x")); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			b.Fatal(err)
		}
		conn.Close()
	}
}
