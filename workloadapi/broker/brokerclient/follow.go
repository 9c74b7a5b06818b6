package brokerclient

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Errors that say why nothing more can be had for a workload. They are wrapped, together with the status.
var (
	// ErrGone says that the workload does not exist, or does not any more. [Broker API §4.9]
	ErrGone = errors.New("the workload does not exist")

	// ErrDenied says that the workload is not entitled to anything, or the broker to ask.
	ErrDenied = errors.New("the workload is not entitled, or this broker may not ask for it")

	// ErrRequest says that the server does not take the request: another attempt would end in the same way.
	ErrRequest = errors.New("the server does not take the request")

	errClosed = errors.New("the client is closed")
)

// A Keeper is where the data of one workload goes. Each workload has one of its own. Its methods are called one after the
// other.
type Keeper[T any] interface {
	// Take replaces everything that there was. An error is logged, and the next state comes all the same.
	Take(T) error

	// Drop removes everything, wherever it was put. It may be called when there is nothing.
	Drop()
}

// FollowX509SVIDs keeps the workload's X509-SVIDs, with the bundles that they come with, until ctx ends or nothing more can
// be had. What was kept is dropped before it returns: nobody keeps it fresh any more.
//
// Errors: ErrGone, ErrDenied (if not Config.RetryDenied), ErrRequest, and ctx's.
func (c *Client) FollowX509SVIDs(ctx context.Context, r Reference, keep Keeper[X509]) error {
	ref, err := c.pack(r)
	if err != nil {
		return err
	}
	return follow(ctx, c, keep, x509FromMessage, X509.without, func(ctx context.Context, api brokerpb.APIClient) (grpc.ServerStreamingClient[brokerpb.SubscribeToX509SVIDResponse], error) {
		return api.SubscribeToX509SVID(ctx, &brokerpb.SubscribeToX509SVIDRequest{Reference: ref})
	})
}

// FollowX509Bundles keeps the X.509 bundles that the workload may have. It is like FollowX509SVIDs in everything else.
func (c *Client) FollowX509Bundles(ctx context.Context, r Reference, keep Keeper[X509Bundles]) error {
	ref, err := c.pack(r)
	if err != nil {
		return err
	}
	return follow(ctx, c, keep, x509BundlesFromMessage, X509Bundles.without, func(ctx context.Context, api brokerpb.APIClient) (grpc.ServerStreamingClient[brokerpb.SubscribeToX509BundlesResponse], error) {
		return api.SubscribeToX509Bundles(ctx, &brokerpb.SubscribeToX509BundlesRequest{Reference: ref})
	})
}

// FollowJWTBundles keeps the JWT bundles that the workload may have. It is like FollowX509SVIDs in everything else.
func (c *Client) FollowJWTBundles(ctx context.Context, r Reference, keep Keeper[JWTBundles]) error {
	ref, err := c.pack(r)
	if err != nil {
		return err
	}
	return follow(ctx, c, keep, jwtBundlesFromMessage, JWTBundles.without, func(ctx context.Context, api brokerpb.APIClient) (grpc.ServerStreamingClient[brokerpb.SubscribeToJWTBundlesResponse], error) {
		return api.SubscribeToJWTBundles(ctx, &brokerpb.SubscribeToJWTBundlesRequest{Reference: ref})
	})
}

// FetchJWTSVIDs returns the workload's JWT-SVIDs for the audience: one for each of its identities, or for id alone if it is
// not zero. It tries again while the server is not available, until ctx ends.
//
// Errors: ErrGone, ErrDenied (if not Config.RetryDenied), ErrRequest, and ctx's.
func (c *Client) FetchJWTSVIDs(ctx context.Context, r Reference, id spiffeid.ID, audience ...string) ([]JWTSVID, error) {
	ref, err := c.pack(r)
	if err != nil {
		return nil, err
	}
	req := &brokerpb.FetchJWTSVIDRequest{Reference: ref, Audience: audience}
	if !id.IsZero() {
		req.SpiffeId = id.String()
	}
	var svids []JWTSVID
	err = c.attempts(ctx, func(ctx context.Context, api brokerpb.APIClient) (bool, error) {
		resp, err := api.FetchJWTSVID(ctx, req)
		if err != nil {
			return false, err
		}
		svids, err = jwtFromMessage(resp, id, audience)
		return true, err
	}, func() {})
	return svids, err
}

// follow calls open again and again, and hands on what comes.
func follow[M, T any](ctx context.Context, c *Client, keep Keeper[T], parse func(*M) (T, error), without func(now, before T) bool,
	open func(context.Context, brokerpb.APIClient) (grpc.ServerStreamingClient[M], error)) error {
	h := newHandOn(keep, c.cfg.Jitter, without, c.cfg.Log)
	defer h.close()
	return c.attempts(ctx, func(ctx context.Context, api brokerpb.APIClient) (progress bool, err error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := open(ctx, api)
		if err != nil {
			return false, err
		}
		for {
			m, err := stream.Recv()
			if err != nil {
				return progress, err
			}
			progress = true
			state, err := parse(m)
			if err != nil { // [Broker API §4.6]
				c.cfg.Log.LogAttrs(ctx, slog.LevelError, "a message of the Broker API is discarded; what there was before stays", slog.Any("err", err))
				continue
			}
			h.take(state)
		}
	}, h.drop)
}

// attempts calls once until it returns nil, or until another call is of no use. Progress begins the pauses anew. drop is
// called before a pause in which the workload is not entitled.
func (c *Client) attempts(ctx context.Context, once func(context.Context, brokerpb.APIClient) (progress bool, err error), drop func()) error {
	pause := c.cfg.RetryMin
	for {
		l, err := c.current()
		if err != nil {
			return err
		}
		progress, err := once(ctx, l.api)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if progress {
			pause = c.cfg.RetryMin
		}
		wait := pause/2 + rand.N(pause)
		switch code := status.Code(err); code {
		case codes.NotFound:
			return fmt.Errorf("%w: %w", ErrGone, err)
		case codes.InvalidArgument, codes.Unimplemented:
			return fmt.Errorf("%w: %w", ErrRequest, err)
		case codes.PermissionDenied:
			if !c.cfg.RetryDenied {
				return fmt.Errorf("%w: %w", ErrDenied, err)
			}
			drop()
		case codes.Unauthenticated:
			renewed, err := c.awaitSVID(ctx, l)
			if err != nil {
				return err
			}
			if renewed {
				continue
			}
		case codes.Unknown:
			if _, ok := status.FromError(err); !ok { // not the server's: the answer is unusable
				return err
			}
		}
		if reason := Reason(err); reason != "" {
			c.cfg.Log.LogAttrs(ctx, slog.LevelInfo, "the Broker API did not answer", slog.Any("err", err), slog.String("reason", reason), slog.Duration("retry_in", wait))
		} else {
			c.cfg.Log.LogAttrs(ctx, slog.LevelInfo, "the Broker API did not answer", slog.Any("err", err), slog.Duration("retry_in", wait))
		}
		if err := sleep(ctx, wait); err != nil {
			return err
		}
		pause = min(2*pause, c.cfg.RetryMax)
	}
}

// awaitSVID waits until the broker has another SVID than the one that the server did not take, and gives up the connection
// that was opened with that. It is false if the connection had shown none.
func (c *Client) awaitSVID(ctx context.Context, l *link) (bool, error) {
	pause := c.cfg.RetryMin
	for !c.renew(l) {
		if err := sleep(ctx, pause/2+rand.N(pause)); err != nil {
			return false, err
		}
		pause = min(2*pause, c.cfg.RetryMax)
	}
	return l.shown.Load() != nil, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Reason returns the reason of the standard's ErrorInfo in an error, such as WORKLOAD_NOT_FOUND, or "" if the server sent
// the bare status code. It is for logs: what to do follows from the code alone. [Broker API §4.8]
func Reason(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == "spiffe.io" {
			return info.GetReason()
		}
	}
	return ""
}
