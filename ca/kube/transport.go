package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
)

// Bounds of one request to an API server, whatever it answers.
const (
	requestTimeout = 30 * time.Second
	// maxResponseBytes is what one answer may have. 500 pods of the largest kind in practice have two thirds of it; what is decoded takes
	// up to forty times as much, and several lists are read at once. One with more is asked for in smaller pages: package follow.
	maxResponseBytes = 8 << 20
	// watchSilence is how long a watch may say nothing. An API server sends a bookmark about once a minute, so a watch that
	// says nothing for three is a connection of which only this side is left.
	watchSilence = 3 * time.Minute
)

var (
	errSlow  = fmt.Errorf("the API server gave no complete answer within %v", requestTimeout)
	errLarge = largeError{}
)

type largeError struct{}

func (largeError) Error() string {
	return fmt.Sprintf("the API server answers with more than %d MiB", maxResponseBytes>>20)
}

// TooLarge tells package follow what is wrong.
func (largeError) TooLarge() bool { return true }

// Requests counts what was asked of an API server.
type Requests struct {
	// Reads are gets and lists, Watches are watches begun, Writes all others.
	Reads, Watches, Writes uint64
	// Failed are those that got no answer, or one with a status of 500 or above.
	Failed uint64
}

// A guard bounds each request and counts it. A timeout of the HTTP client would end watches as well.
type guard struct {
	next                           http.RoundTripper
	timeout, silence               time.Duration
	limit                          int64
	reads, watches, writes, failed atomic.Uint64
}

func (g *guard) requests() Requests {
	return Requests{Reads: g.reads.Load(), Watches: g.watches.Load(), Writes: g.writes.Load(), Failed: g.failed.Load()}
}

// WrappedRoundTripper lets client-go find the transport below.
func (g *guard) WrappedRoundTripper() http.RoundTripper { return g.next }

// RoundTrip implements http.RoundTripper.
func (g *guard) RoundTrip(req *http.Request) (*http.Response, error) {
	watch := false
	switch w := req.URL.Query().Get("watch"); {
	case req.Method != http.MethodGet:
		if err := mayWrite(req.Context()); err != nil {
			if req.Body != nil {
				_ = req.Body.Close()
			}
			return nil, err
		}
		g.writes.Add(1)
	case w == "true" || w == "1":
		watch = true
		g.watches.Add(1)
	default:
		g.reads.Add(1)
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	timer := time.AfterFunc(g.timeout, func() { cancel(errSlow) })
	resp, err := g.next.RoundTrip(req.WithContext(ctx))
	if err != nil {
		timer.Stop()
		switch {
		case errors.Is(context.Cause(ctx), errSlow):
			err = errSlow
		case req.Context().Err() == nil:
			err = unreachable(err)
		}
		cancel(nil)
		g.failed.Add(1)
		return nil, err
	}
	if resp.StatusCode >= http.StatusInternalServerError {
		g.failed.Add(1)
	}
	b := &guardedBody{ReadCloser: resp.Body, cause: func() error { return context.Cause(ctx) }, left: g.limit}
	b.end = func() {
		timer.Stop()
		cancel(nil)
	}
	if watch && resp.StatusCode == http.StatusOK {
		b.silence, b.timer = g.silence, timer
		timer.Reset(g.silence)
	}
	resp.Body = b
	return resp, nil
}

// unreachable makes an error of err that client-go does not know for one of a broken connection. It would try ten times more, for a
// minute and longer, and nobody would be told; net/http has tried again already what a former connection may have spoilt.
func unreachable(err error) error {
	return errors.New("the API server cannot be reached: " + brokenConnection.Replace(err.Error()))
}

var brokenConnection = strings.NewReplacer("connection reset by peer", "the connection was reset", "use of closed network connection", "the connection was closed",
	"client connection lost", "the connection was lost", "can't write HTTP request on broken connection", "the connection was broken")

// A guardedBody ends a watch that says nothing for too long, and any other answer that is too long or takes too long.
type guardedBody struct {
	io.ReadCloser
	cause   func() error
	end     func()
	left    int64         // of an answer that is no watch
	silence time.Duration // of a watch; else zero
	timer   *time.Timer
}

func (b *guardedBody) Read(p []byte) (int, error) {
	if b.silence == 0 {
		if b.left < 0 {
			return 0, errLarge
		}
		if int64(len(p)) > b.left+1 { // one more than may be tells that there is more
			p = p[:b.left+1]
		}
	}
	n, err := b.ReadCloser.Read(p)
	switch {
	case b.silence > 0 && n > 0:
		b.timer.Reset(b.silence)
	case b.silence == 0:
		if b.left -= int64(n); b.left < 0 {
			return 0, errLarge
		}
	}
	if err != nil && err != io.EOF && errors.Is(b.cause(), errSlow) {
		if b.silence > 0 {
			return n, io.ErrUnexpectedEOF // a watch that broke off, which is begun again where it was
		}
		err = errSlow
	}
	return n, err
}

func (b *guardedBody) Close() error {
	b.end()
	return b.ReadCloser.Close()
}
