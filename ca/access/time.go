package access

import (
	"cmp"
	"context"
	"time"

	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"
)

// How long a call may take, with all that the caller sends. Otherwise anybody could begin calls, send a part of a message, and
// have the CA hold all of it for as long as they like.
const (
	// strangerCall is for whoever shows no certificate, and can only fetch the bundle.
	strangerCall = 15 * time.Second
	// nodeCall is for what nodes call and for attestation, which ask others: key stores, API servers, the node itself.
	nodeCall = 2 * time.Minute
	// operatorCall is for what operators call, and anybody with a certificate can begin to.
	operatorCall = 15 * time.Minute
)

// BoundCall gives a call on the port its end, before any of it is read, but for what is endless by its nature and judged again
// and again. It runs in the connection's own goroutine and does not block.
func (g *Guard) BoundCall(ctx context.Context, info *tap.Info) (context.Context, error) {
	most := g.callTime(ctx, info.FullMethodName)
	if most == 0 {
		return ctx, nil
	}
	bound, cancel := context.WithTimeout(ctx, most)
	context.AfterFunc(ctx, cancel) // the end of the call ends ctx
	return bound, nil
}

func (g *Guard) callTime(ctx context.Context, method string) time.Duration {
	p, _ := peer.FromContext(ctx)
	if p == nil {
		return strangerCall
	}
	t, overTLS := p.AuthInfo.(tlsInfo)
	switch {
	case !overTLS: // the admin socket
		return 0
	case len(t.State.PeerCertificates) == 0 && !g.Slow[method]:
		return cmp.Or(g.StrangerCall, strangerCall)
	case g.Endless[method]:
		return 0
	case g.Methods[method]&(Agent|Downstream|Anyone) == 0:
		return operatorCall
	}
	return nodeCall
}
