package ca

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/limits"
	"github.com/signet-id/signet/ca/nodeapi"
)

// Defaults of Limits. SPIRE's are per address, which is wrong for nodes behind one; ours are per agent where there is
// one. [SPIRE-PROTOCOL §11]
const (
	defaultMaxWait = 5 * time.Second

	// Unlimited as a rate turns a limit off.
	Unlimited = -1
)

var defaultLimits = map[string]limits.Limit{
	"connections": {Rate: 100, Burst: 500},
	"attest":      {Rate: 5, Burst: 30}, // SPIRE: 1
	"bundle":      {Rate: 20, Burst: 100},
	"renew":       {Rate: 10, Burst: 20},
	"x509":        {Rate: 500, Burst: 1000}, // SPIRE: 500
	"jwt":         {Rate: 500, Burst: 1000}, // SPIRE: 500
	"sync":        {Rate: 10, Burst: 20},
	"status":      {Rate: 10, Burst: 10}, // SPIRE: 10

	"observations": {Rate: 1000, Burst: 5000},
}

// each calls f with every limit and its key in the configuration.
func (l *Limits) each(f func(name string, l *Limit)) {
	f("connections", &l.Connections)
	f("attest", &l.Attest)
	f("bundle", &l.Bundle)
	f("renew", &l.Renew)
	f("x509", &l.X509SVIDs)
	f("jwt", &l.JWTSVIDs)
	f("sync", &l.Sync)
	f("status", &l.Status)
	f("observations", &l.Observed)
}

// check fills in the defaults and refuses what cannot work.
func (l *Limits) check(bad func(field, format string, args ...any)) {
	if l.MaxWait == 0 {
		l.MaxWait = defaultMaxWait
	}
	if l.MaxWait < 0 || l.MaxWait > maxMaxWait {
		bad("limits.max_wait", "%v is not between 0s and %v", l.MaxWait, maxMaxWait)
	}
	l.each(func(name string, one *Limit) {
		standard := defaultLimits[name]
		switch {
		case one.Rate == 0:
			one.Rate = standard.Rate
		case one.Rate < Unlimited:
			bad("limits."+name+".rate", "%d is negative; %d means no limit", one.Rate, Unlimited)
		}
		switch {
		case one.Burst == 0:
			one.Burst = max(standard.Burst, one.Rate)
		case one.Burst < 0:
			bad("limits."+name+".burst", "%d is negative", one.Burst)
		case one.Burst < nodeapi.MaxObservations && name == "observations":
			bad("limits."+name+".burst", "%d is less than %d, the largest report, which then would never be taken", one.Burst, nodeapi.MaxObservations)
		case one.Burst < nodeapi.MaxBatch && (name == "x509" || name == "jwt"):
			bad("limits."+name+".burst", "%d is less than %d, the largest batch, which then would never be signed", one.Burst, nodeapi.MaxBatch)
		}
	})
}

// maxMaxWait is well below the 10 seconds in which a connection must be made, and the 30 that agents give a call.
const maxMaxWait = 8 * time.Second

// A caller of a limited RPC: whose certificate says an ID by that, everybody else by their address.
type limitedCaller struct {
	id      spiffeid.ID
	address netip.Addr
}

// limiter holds the limits of the port. The admin socket has none.
type limiter struct {
	ca     *CA
	tables map[string]*limits.Table[limitedCaller] // by key in the configuration; what has no limit has no table
	crowd  crowd
	// serving ends when the CA is told to stop: new connections do not wait any longer then.
	serving context.Context
	stop    context.CancelFunc
}

func newLimiter(ca *CA) *limiter {
	l := &limiter{ca: ca, tables: map[string]*limits.Table[limitedCaller]{}, crowd: crowd{told: rate.Sometimes{Interval: time.Minute}}}
	l.serving, l.stop = context.WithCancel(context.Background())
	c := ca.c.Limits
	c.each(func(name string, one *Limit) {
		if one.Rate != Unlimited {
			l.tables[name] = limits.NewTable[limitedCaller](limits.Limit{Rate: one.Rate, Burst: one.Burst}, c.MaxWait)
		}
	})
	return l
}

// limited says which limit holds for an RPC. Those of admins have none; the others' callers are turned away before they
// cost anything.
var limited = map[string]string{
	agentv1.Agent_AttestAgent_FullMethodName:           "attest",
	bundlev1.Bundle_GetBundle_FullMethodName:           "bundle",
	bundlev1.Bundle_GetFederatedBundle_FullMethodName:  "bundle",
	agentv1.Agent_RenewAgent_FullMethodName:            "renew",
	agentv1.Agent_PostStatus_FullMethodName:            "status",
	entryv1.Entry_SyncAuthorizedEntries_FullMethodName: "sync",
	entryv1.Entry_GetAuthorizedEntries_FullMethodName:  "sync",
	nodev1.Node_Follow_FullMethodName:                  "sync",
	nodev1.Node_ReportObservations_FullMethodName:      "observations",
	nodev1.Node_IssueX509SVIDs_FullMethodName:          "x509",
	svidv1.SVID_BatchNewX509SVID_FullMethodName:        "x509",
	nodev1.Node_IssueJWTSVIDs_FullMethodName:           "jwt",
	svidv1.SVID_NewJWTSVID_FullMethodName:              "jwt",
	svidv1.SVID_BatchNewWITSVID_FullMethodName:         "jwt",
	svidv1.SVID_NewDownstreamX509CA_FullMethodName:     "x509",
	bundlev1.Bundle_PublishJWTAuthority_FullMethodName: "status",
}

// cost is how many signatures a call asks for, or how much it reports. A batch that is larger than any that is signed is left to the RPC, which
// says so.
func cost(req any) int {
	n, most := 1, nodeapi.MaxBatch
	switch r := req.(type) {
	case *nodev1.ReportObservationsRequest:
		n, most = len(r.Observations), nodeapi.MaxObservations
	case *svidv1.BatchNewX509SVIDRequest:
		n = len(r.Params)
	case *nodev1.IssueX509SVIDsRequest:
		n = len(r.Items)
	case *nodev1.IssueJWTSVIDsRequest:
		n = len(r.Items)
	case *svidv1.BatchNewWITSVIDRequest:
		n = len(r.Params)
	}
	if n > most {
		return 1
	}
	return max(1, n)
}

// admit is access.Guard.Limit.
func (l *limiter) admit(ctx context.Context, c *access.Caller, method string, req any) error {
	name := limited[method]
	table := l.tables[name]
	if table == nil {
		return nil
	}
	k := limitedCaller{id: c.ID}
	if name == "attest" || c.ID.IsZero() { // who attests is nobody yet, whatever the certificate says
		k = limitedCaller{address: limits.Address(c.Address)}
	}
	err := table.Take(ctx, k, cost(req))
	if x, ok := errors.AsType[*limits.ExceededError](err); ok {
		l.note(name, c.String(), c.Address, x)
		return access.Limited(x.RetryAfter, "%s: %v: limits.%s in the CA's configuration; call again later", method, x, name)
	}
	if err != nil {
		return status.FromContextError(err).Err()
	}
	return nil
}

// connect is access.LimitedCredentials.Admit.
func (l *limiter) connect(from net.Addr) error {
	table := l.tables["connections"]
	if table == nil {
		return nil
	}
	err := table.Take(l.serving, limitedCaller{address: limits.Address(from.String())}, 1)
	if x, ok := errors.AsType[*limits.ExceededError](err); ok {
		l.note("connections", "anonymous", from.String(), x)
		return fmt.Errorf("%w: limits.connections in the CA's configuration", x)
	}
	return err
}

// note counts a refusal and logs the first one of a caller in a minute.
func (l *limiter) note(name, caller, address string, x *limits.ExceededError) {
	l.ca.metrics.limited.WithLabelValues(name).Inc()
	if x.First {
		l.ca.log.Warn("a caller is over a limit", "limit", "limits."+name, "rate", x.Limit.Rate, "burst", x.Limit.Burst, "caller", caller, "address", address)
	}
}
