package access

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"testing"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"
)

func TestEveryCallOnThePortHasAnEnd(t *testing.T) {
	g := &Guard{Methods: map[string]Kind{"attest": Anyone, "bundle": Anyone, "renew": Agent, "nested": Downstream, "shared": Agent | Admin, "list": Admin, "follow": Agent, "tail": Admin},
		Slow: map[string]bool{"attest": true}, Endless: map[string]bool{"follow": true, "tail": true}}
	stranger := tlsInfo{TLSInfo: credentials.TLSInfo{}}
	known := tlsInfo{TLSInfo: credentials.TLSInfo{State: tls.ConnectionState{PeerCertificates: []*x509.Certificate{{}}}}}
	for _, tt := range []struct {
		by     credentials.AuthInfo
		method string
		want   time.Duration // zero: none
	}{
		{stranger, "attest", nodeCall}, {stranger, "bundle", strangerCall}, {stranger, "renew", strangerCall}, {stranger, "list", strangerCall},
		{stranger, "follow", strangerCall}, {stranger, "tail", strangerCall}, {stranger, "unknown", strangerCall},
		{known, "attest", nodeCall}, {known, "bundle", nodeCall}, {known, "renew", nodeCall}, {known, "nested", nodeCall}, {known, "shared", nodeCall},
		{known, "list", operatorCall}, {known, "unknown", operatorCall}, {known, "follow", 0}, {known, "tail", 0},
		{LocalInfo{}, "list", 0}, {LocalInfo{}, "renew", 0},
	} {
		call, end := context.WithCancel(peer.NewContext(t.Context(), &peer.Peer{AuthInfo: tt.by}))
		before := time.Now()
		ctx, err := g.BoundCall(call, &tap.Info{FullMethodName: tt.method})
		after := time.Now()
		if err != nil {
			t.Fatal(err)
		}
		until, bounded := ctx.Deadline()
		if bounded != (tt.want > 0) || bounded && (until.Before(before.Add(tt.want)) || until.After(after.Add(tt.want))) {
			t.Errorf("%s by %T: ends in %v, want %v", tt.method, tt.by, until.Sub(before), tt.want)
		}
		end()
		<-ctx.Done()
	}
}
