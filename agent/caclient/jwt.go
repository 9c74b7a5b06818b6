package caclient

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

const (
	// maxJWTFlight is how many calls for JWT-SVIDs are under way at once. What is asked for meanwhile shares the next
	// one, so that a burst costs the CA few calls and a single request waits for nobody.
	maxJWTFlight = 2
	// singleJWTs is how many calls for one JWT-SVID each are under way at once for a batch, at a server that has no batches.
	singleJWTs = 16
	// maxJWTQueue bounds the requests that wait.
	maxJWTQueue = 4096
)

// A JWTSVID is one as the CA issued it.
type JWTSVID struct {
	Token               string
	IssuedAt, ExpiresAt time.Time
}

// jwtQueue gathers requests for JWT-SVIDs into batches. Of those who wait, whoever gets a place in flight sends the batch
// off for all; it goes on without them if they go.
type jwtQueue struct {
	flight chan struct{} // a place for each call under way
	// issue asks for a batch. The answers are positional; an error is everybody's.
	issue func(context.Context, []*jwtRequest) ([]jwtAnswer, error)

	mu      sync.Mutex
	waiting []*jwtRequest
}

type jwtRequest struct {
	entryID  string
	audience []string
	taken    chan struct{}  // closed when it has become part of a batch
	done     chan jwtAnswer // holds one
}

type jwtAnswer struct {
	svid JWTSVID
	err  error
}

func newJWTQueue(issue func(context.Context, []*jwtRequest) ([]jwtAnswer, error)) *jwtQueue {
	return &jwtQueue{flight: make(chan struct{}, maxJWTFlight), issue: issue}
}

func (q *jwtQueue) add(r *jwtRequest) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.waiting) == maxJWTQueue {
		return false
	}
	q.waiting = append(q.waiting, r)
	return true
}

func (q *jwtQueue) remove(r *jwtRequest) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if i := slices.Index(q.waiting, r); i >= 0 {
		q.waiting = slices.Delete(q.waiting, i, i+1)
	}
}

func (q *jwtQueue) take() []*jwtRequest {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := min(len(q.waiting), MaxBatch)
	batch := slices.Clone(q.waiting[:n])
	q.waiting = slices.Delete(q.waiting, 0, n)
	for _, r := range batch {
		close(r.taken)
	}
	return batch
}

// NewJWTSVID asks for a JWT-SVID of a registration entry for exactly these audiences, in this order.
func (c *Client) NewJWTSVID(ctx context.Context, entryID string, audience []string) (JWTSVID, error) {
	return c.jwt.ask(ctx, entryID, audience)
}

func (q *jwtQueue) ask(ctx context.Context, entryID string, audience []string) (JWTSVID, error) {
	r := &jwtRequest{entryID: entryID, audience: audience, taken: make(chan struct{}), done: make(chan jwtAnswer, 1)}
	if !q.add(r) {
		return JWTSVID{}, status.Error(codes.Unavailable, "too many JWT-SVIDs are being asked for; try again")
	}
	flight, taken := q.flight, r.taken
	for {
		select {
		case a := <-r.done:
			return a.svid, a.err
		case <-ctx.Done():
			q.remove(r)
			return JWTSVID{}, ctx.Err()
		case <-taken:
			flight, taken = nil, nil // nothing is left to do but to wait
		case flight <- struct{}{}:
			// The batch is for others too: it does not end with this caller, but with its call to the CA.
			go q.carry(context.WithoutCancel(ctx), q.take())
		}
	}
}

// carry asks for a batch, hands out the answers and gives its place in flight back. An empty batch was taken by somebody
// else.
func (q *jwtQueue) carry(ctx context.Context, batch []*jwtRequest) {
	defer func() { <-q.flight }()
	if len(batch) == 0 {
		return
	}
	answers, err := q.issue(ctx, batch)
	for i, r := range batch {
		if err != nil {
			r.done <- jwtAnswer{err: err}
			continue
		}
		r.done <- answers[i]
	}
}

// issueJWTs sends a batch to the CA.
func (c *Client) issueJWTs(ctx context.Context, batch []*jwtRequest) ([]jwtAnswer, error) {
	s, release, err := c.use()
	if err != nil {
		return nil, err
	}
	defer release()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if !s.spire.Load() {
		answers, err := issueJWTBatch(ctx, s, batch)
		if status.Code(err) != codes.Unimplemented { // a CA of the minor version before, or a SPIRE server
			return answers, fromStatus(err)
		}
	}
	return issueJWTsSingly(ctx, s, batch), nil
}

// issueJWTBatch asks a CA of signet for all at once.
func issueJWTBatch(ctx context.Context, s *session, batch []*jwtRequest) ([]jwtAnswer, error) {
	request := &nodev1.IssueJWTSVIDsRequest{Items: make([]*nodev1.IssueJWTSVIDsRequest_Item, len(batch))}
	for i, r := range batch {
		request.Items[i] = &nodev1.IssueJWTSVIDsRequest_Item{EntryId: r.entryID, Audience: r.audience}
	}
	response, err := nodev1.NewNodeClient(s.conn).IssueJWTSVIDs(ctx, request)
	if err != nil {
		return nil, err
	}
	if got := len(response.GetResults()); got != len(batch) {
		return nil, fmt.Errorf("the CA answered %d items with %d results", len(batch), got)
	}
	answers := make([]jwtAnswer, len(batch))
	for i, r := range response.GetResults() {
		if r.GetCode() != int32(codes.OK) {
			answers[i].err = fromStatus(status.Error(codes.Code(uint32(r.GetCode())), r.GetMessage()))
			continue
		}
		answers[i] = readJWT(r.GetToken(), r.GetIssuedAt(), r.GetExpiresAt())
	}
	return answers, nil
}

// issueJWTsSingly asks for each JWT-SVID by a call of its own, which is all that SPIRE's API has.
func issueJWTsSingly(ctx context.Context, s *session, batch []*jwtRequest) []jwtAnswer {
	answers := make([]jwtAnswer, len(batch))
	var group sync.WaitGroup
	slots := make(chan struct{}, singleJWTs)
	for i, r := range batch {
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			one, err := svidv1.NewSVIDClient(s.conn).NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: r.entryID, Audience: r.audience})
			if err != nil {
				answers[i].err = fromStatus(err)
				return
			}
			answers[i] = readJWT(one.GetSvid().GetToken(), one.GetSvid().GetIssuedAt(), one.GetSvid().GetExpiresAt())
		})
	}
	group.Wait()
	return answers
}

func readJWT(token string, iat, exp int64) jwtAnswer {
	if token == "" || iat <= 0 || exp < iat {
		return jwtAnswer{err: fmt.Errorf("the CA answered with an unusable JWT-SVID (issued at %d, expires at %d)", iat, exp)}
	}
	return jwtAnswer{svid: JWTSVID{Token: token, IssuedAt: time.Unix(iat, 0), ExpiresAt: time.Unix(exp, 0)}}
}
